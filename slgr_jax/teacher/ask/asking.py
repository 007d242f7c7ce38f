"""What each user is asked, and what that costs: requests without their words.

What a user is asked is a function of (seed, user) and of the user's candidates.

Shape letters: U users, I items, n candidates of one user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.config import LIST_SIZES, TEXT_PROMPTS, RequestConfig, SliceConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.ask import answer_form, candidates, prompts
from slgr_jax.teacher.ask.candidates import CandidateSet
from slgr_jax.teacher.ask.prompts import Template

_CALIBRATION = 1 << schema.REASONS.index("calibration")


def user_requests(
    user: int,
    items: np.ndarray,
    tests: np.ndarray,
    hidden: np.ndarray,
    options: RequestConfig,
    seed: int,
) -> list[tuple[int, np.ndarray]]:
    """What one user's requests show: (permutation, items in shown order), in order.

    Args:
      user: user index.
      items: [n] candidates, ascending.
      tests: [n] bool, drawn for calibration; hidden: [n] bool, of those the training items.
      options: `prompt` and the sizes; seed: of all shuffles.
    """
    rng = np.random.default_rng((seed, user))
    if options.prompt in ("pointwise", "rating"):
        return [(0, np.array([item])) for item in rng.permutation(items)]
    if options.prompt == "pairwise":
        return _pairs(items, tests, hidden, options, rng)

    shown: list[tuple[int, np.ndarray]] = []
    parts = -(-items.size // options.list_size)
    for part in np.array_split(rng.permutation(items), parts):
        if options.prompt == "ranking" and part.size < 2:
            continue
        orders = [part, *(rng.permutation(part) for _ in range(options.permutations - 1))]
        shown += list(enumerate(orders))
    return shown


def _pairs(
    items: np.ndarray, tests: np.ndarray, hidden: np.ndarray, options: RequestConfig, rng: Any
) -> list[tuple[int, np.ndarray]]:
    """Distinct pairs, those of a hidden item with one drawn beside it first."""
    first, second = np.triu_indices(items.size, 1)
    known = tests[first] & tests[second] & (hidden[first] != hidden[second])
    shuffled = rng.permutation(first.size)
    chosen = shuffled[np.argsort(~known[shuffled], kind="stable")][: options.pairs]
    pairs = np.stack([items[first[chosen]], items[second[chosen]]], axis=1)
    if options.orders == "both":
        return [(k, pair[:: 1 - 2 * k]) for pair in pairs for k in (0, 1)]
    if options.orders == "random":
        swap = rng.random(chosen.size) < 0.5
        pairs[swap] = pairs[swap][:, ::-1]
    return [(0, pair) for pair in pairs]


@dataclasses.dataclass(frozen=True)
class AskingPlan:
    """What a set of requests costs, after the budget.

    Attributes:
      users: [U] bool, users that are asked.
      facts: requests, users, prompt_tokens, answer_tokens (estimates), cost; cut_users, of which
        cut_cold_users and cut_calibration_users; all_users, all_requests before the budget.
      tokens_by: how tokens were estimated.
    """

    users: np.ndarray
    facts: Mapping[str, int | float]
    tokens_by: str

    def report(self) -> str:
        """A few lines for people."""
        facts = self.facts
        lines = [
            f"plan: {facts['requests']:,} requests about {facts['users']:,} users, "
            f"{facts['prompt_tokens']:,} prompt + {facts['answer_tokens']:,} answer tokens "
            f"(estimated by {self.tokens_by}), "
            + (f"cost {facts['cost']:,.2f}" if facts["cost"] else "no --price_in or --price_out")
        ]
        if facts["cut_users"]:
            lines.append(
                f"  the budget cuts {facts['cut_users']:,} of {facts['all_users']:,} users "
                f"({facts['cut_cold_users']:,} cold, {facts['cut_calibration_users']:,} for "
                f"calibration) and {facts['all_requests'] - facts['requests']:,} of "
                f"{facts['all_requests']:,} requests"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Asker:
    """Everything that decides what is asked of whom, and in which words."""

    dataset: Dataset
    drawn: CandidateSet
    template: Template
    lines: list[str]
    options: RequestConfig
    seed: int
    score_range: tuple[int, int]
    offsets: np.ndarray  # [U + 1] into the candidates

    def of_user(self, user: int) -> list[tuple[int, np.ndarray]]:
        """`user_requests` of one user; of a free list the catalogue that each shows."""
        if self.options.prompt == "free_list":
            return self._free_lists(user)
        candidates_of_user = slice(self.offsets[user], self.offsets[user + 1])
        items = self.drawn.items[candidates_of_user]
        tests = (self.drawn.reasons[candidates_of_user] & _CALIBRATION) > 0
        hidden = np.isin(items, self.drawn.hidden.row(user))
        return user_requests(user, items, tests, hidden, self.options, self.seed)

    def _free_lists(self, user: int) -> list[tuple[int, np.ndarray]]:
        """Items that have a text and that the user may still choose, in another order each time;
        none where no catalogue is shown. Hidden training items are among them."""
        repeats = range(self.options.permutations)
        if self.options.catalogue == "none":
            return [(k, np.zeros(0, np.int32)) for k in repeats]
        trained = self.dataset.positives(("train",)).row(user)
        chosen = trained[~np.isin(trained, self.drawn.hidden.row(user))]
        shown = np.setdiff1d(_described(self.lines), chosen)
        rng = np.random.default_rng((self.seed, user))
        return [(k, rng.permutation(shown)) for k in repeats]

    def response_format(self, shown: int) -> dict[str, Any] | None:
        """What a request about `shown` candidates says of the form of its answer."""
        options = self.options
        if options.prompt == "free_list":
            shown = options.list_size
        return answer_form.response_format(
            options.prompt, shown, options.structured, self.score_range
        )

    def answer_tokens(self) -> tuple[int, int]:
        """Tokens of a whole answer: (of all of it, more for each candidate that is shown)."""
        whole, each = answer_form.answer_tokens(self.options.prompt, self.options.structured)
        if self.options.prompt == "free_list":
            return whole + each * self.options.list_size, 0
        return whole, each


def _described(lines: Sequence[str]) -> np.ndarray:
    """Items that have a text, ascending."""
    return np.flatnonzero(np.array([bool(line) for line in lines])).astype(np.int32)


def asker(
    dataset: Dataset,
    drawn: CandidateSet,
    lines: list[str],
    options: RequestConfig,
    seed: int,
    score_range: Sequence[int] = (0, 1),
) -> Asker:
    """What `plan` and `requests.write` need; the template is read here, and refused here.

    Raises:
      ConfigError: the template, the size of lists, the catalogue or the range of scores cannot be
        used.
    """
    if options.prompt in TEXT_PROMPTS:
        raise ConfigError(
            f"--prompt={options.prompt} asks for a text of each {TEXT_PROMPTS[options.prompt]} and "
            "needs no candidates: give it to slgr teach requests"
        )
    options = _sized(options, lines)
    if len(score_range) != 2 or score_range[0] >= score_range[1]:
        shown = ",".join(map(str, score_range))
        raise ConfigError(f"--score_range={shown} is not a lowest and a highest score, e.g. 0,1")

    lowest_highest = (score_range[0], score_range[1])
    offsets = np.zeros(dataset.n_users + 1, np.int64)
    np.cumsum(np.bincount(drawn.users, minlength=dataset.n_users), out=offsets[1:])
    template = prompts.read_template(
        options.prompt,
        options.template,
        structured=options.structured,
        score_range=lowest_highest,
        catalogue=options.catalogue,
        count=options.list_size,
    )
    return Asker(dataset, drawn, template, lines, options, seed, lowest_highest, offsets)


def _sized(options: RequestConfig, lines: Sequence[str]) -> RequestConfig:
    """The options with the size of their lists; refuses a catalogue that no prompt holds."""
    if options.list_size == 1:
        raise ConfigError("--list_size=1 is no list: give 2 or more, or 0 for the default")
    sizes = LIST_SIZES
    size = options.list_size or sizes.get(options.prompt, sizes[""])
    if options.prompt != "free_list":
        if options.catalogue != "none":
            raise ConfigError(
                f"--catalogue={options.catalogue} is of --prompt=free_list; --prompt="
                f"{options.prompt} shows its candidates"
            )
    elif options.catalogue == "all":
        tokens = int(prompts.token_counter()[1]([line + "\n" for line in lines if line]).sum())
        if tokens > options.catalogue_tokens:
            raise ConfigError(
                f"--catalogue=all: the {_described(lines).size:,} titles are about {tokens:,} "
                f"tokens, more than --catalogue_tokens={options.catalogue_tokens:,}; raise it if "
                "the model reads as many, or use --catalogue=none"
            )
    return dataclasses.replace(options, list_size=size)


def shown_history(asker: Asker) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [U + 1], items): the last `history_items` training items of each user that a
    prompt shows, oldest first. Nothing but training is read, and hidden items are left out."""
    return last_items(
        asker.dataset, asker.lines, asker.options.history_items, hidden=asker.drawn.hidden
    )


def last_items(
    dataset: Dataset, lines: Sequence[str], most: int, *, hidden: Csr | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [U + 1], items): the last `most` training items of each user that have a line and
    are not hidden, oldest first. Nothing but training is read."""
    described = np.array([bool(line) for line in lines])
    users, items = candidates.described_history(dataset, described, hidden)
    counts = np.bincount(users, minlength=dataset.n_users)
    from_end = np.cumsum(counts)[users] - np.arange(users.size)
    keep = from_end <= most

    offsets = np.zeros(dataset.n_users + 1, np.int64)
    np.cumsum(np.bincount(users[keep], minlength=dataset.n_users), out=offsets[1:])
    return offsets, items[keep]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """[U] int64 each: requests of a user, tokens of their prompts, tokens of their answers."""

    requests: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray


def plan(asker: Asker) -> AskingPlan:
    """Estimate what asking costs, and keep the users that the budget allows.

    Whole users are cut, from the end of an order in which every stretch has its share of cold
    users and of users for calibration; the order is a function of the seed.

    Raises:
      ConfigError: the budget does not allow a single user.
      InputError: no user has two candidates, and the prompt compares.
    """
    options = asker.options
    tokens_by, sizes = _sizes(asker)
    cost = (sizes.prompt * options.price_in + sizes.answer * options.price_out) / 1e6
    able = sizes.requests > 0
    if not able.any():
        raise InputError(
            f"{asker.dataset.path}: --prompt={options.prompt} needs two candidates of one user, "
            "and no user has; raise --candidates"
        )
    kept = _within_budget(asker, able, sizes, cost)

    cold = asker.dataset.slices(SliceConfig()).cold_users
    tests = asker.drawn.hidden.counts > 0
    cut = able & ~kept
    facts: dict[str, int | float] = {
        "requests": int(sizes.requests[kept].sum()),
        "users": int(kept.sum()),
        "prompt_tokens": int(sizes.prompt[kept].sum()),
        "answer_tokens": int(sizes.answer[kept].sum()),
        "cost": round(float(cost[kept].sum()), 4),
        "cut_users": int(cut.sum()),
        "cut_cold_users": int((cut & cold).sum()),
        "cut_calibration_users": int((cut & tests).sum()),
        "all_users": int(able.sum()),
        "all_requests": int(sizes.requests.sum()),
    }
    return AskingPlan(kept, facts, tokens_by)


def _sizes(asker: Asker) -> tuple[str, Sizes]:
    """How tokens were estimated, and what asking each user takes."""
    tokens_by, count = prompts.token_counter()
    labelled = asker.options.prompt in prompts.LABELLED
    per_item = count([f"A. {line}\n" if labelled else line for line in asker.lines])
    per_event = count([f"- {line}\n" for line in asker.lines])
    frame = int(count([asker.template.render([], [], labelled=False)])[0])

    offsets, history = shown_history(asker)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_event[history])])
    before = frame + sums[offsets[1:]] - sums[offsets[:-1]]
    n_users = asker.dataset.n_users
    sizes = Sizes(
        requests=np.zeros(n_users, np.int64),
        prompt=np.zeros(n_users, np.int64),
        answer=np.zeros(n_users, np.int64),
    )

    base, more = asker.answer_tokens()
    for user in np.flatnonzero(np.diff(asker.offsets)):
        lists = asker.of_user(int(user))
        candidates_shown = sum(items.size for _, items in lists)
        in_lists = sum(per_item[items].sum() for _, items in lists)
        sizes.requests[user] = len(lists)
        sizes.prompt[user] = len(lists) * before[user] + in_lists
        sizes.answer[user] = len(lists) * base + candidates_shown * more
    return tokens_by, sizes


def _within_budget(asker: Asker, able: np.ndarray, sizes: Sizes, cost: np.ndarray) -> np.ndarray:
    # Position of a user within its stratum, as a share: any prefix has its part of each stratum.
    cold = asker.dataset.slices(SliceConfig()).cold_users
    stratum = cold * 2 + (asker.drawn.hidden.counts > 0)
    lot = np.random.default_rng((asker.seed, 1 << 32)).permutation(able.size)
    position = np.zeros(able.size)
    for number in range(4):
        users = np.flatnonzero(able & (stratum == number))
        position[users[np.argsort(lot[users])]] = (np.arange(users.size) + 0.5) / max(users.size, 1)
    order = np.flatnonzero(able)
    order = order[np.lexsort((lot[order], position[order]))]

    kept = np.zeros(able.size, bool)
    fits = affordable(asker.options, order, sizes, cost, "user", "lower --candidates")
    kept[order[fits]] = True
    return kept


def affordable(
    options: RequestConfig,
    order: np.ndarray,
    sizes: Sizes,
    cost: np.ndarray,
    side: str,
    cheaper: str,
) -> np.ndarray:
    """[n] bool: which of `order` [n], the first ones first, the budget pays for.

    Args:
      order: users (items) to ask about; `sizes` and `cost` are by these numbers.
      side: user or item.
      cheaper: what else than a larger budget helps, for errors.

    Raises:
      ConfigError: not even the first, or --max_cost without prices.
    """
    if options.max_cost and not (options.price_in or options.price_out):
        raise ConfigError("--max_cost needs prices: give --price_in and --price_out")
    limits = {
        "max_requests": (options.max_requests, sizes.requests),
        "max_tokens": (options.max_tokens, sizes.prompt + sizes.answer),
        "max_cost": (options.max_cost, cost),
    }
    who = "who" if side == "user" else "which"
    fits = np.ones(order.size, bool)
    for name, (most, spent) in limits.items():
        if most:
            fits &= np.cumsum(spent[order]) <= most
            if order.size and not fits[0]:
                raise ConfigError(
                    f"--{name}={most:g} does not pay for one {side}, {who} costs "
                    f"{spent[order[0]]:,.4g}; raise it, or {cheaper}"
                )
    return fits
