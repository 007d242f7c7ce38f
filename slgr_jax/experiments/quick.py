"""A verdict on a teacher in a few minutes: what its lists add when scoring, beside its controls.

`slgr compare --quick`. Nothing is trained, and the test part is not met. On the best recommender
that costs nothing (popular, item-item, EASE) the teacher's lists are added as w / rank
(`evaluation/blending.py`), and so are those of each control: another user's, the crowd's, the most
popular items', item-item's. Each user's w was chosen by the other half of the users. A list that
adds no more than its controls do has nothing to teach that they have not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from slgr_jax.config import BaselineConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.dataset import load as load_dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines, blending, teacher_lists
from slgr_jax.evaluation.baselines import Fitted
from slgr_jax.evaluation.blending import Lists, Tried
from slgr_jax.evaluation.significance import holm, paired_t, t_interval
from slgr_jax.experiments import results
from slgr_jax.experiments.summary import number
from slgr_jax.files import write_atomically
from slgr_jax.reports import added_value
from slgr_jax.reports.tables import markdown_table, text_table
from slgr_jax.teacher.products import controls, preferences

CONTROLS = ("shuffled", "consensus", "popularity", "item_item")
# The control that is the lists of a baseline.
_CONTROL_OF = {"popular": "popularity", "item_item": "item_item", "ease": "ease"}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the users that were asked
LENGTHS = (5, 10, 20)  # of lists
LEVEL = 0.05
_SHOWN = ("overall", "cold users", "tail items")
JSON, MARKDOWN = "quick.json", "quick.md"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Validation NDCG@10 of what adds the teacher's lists minus that of something else.

    Attributes:
      other: what: the recommender alone, or with a control's lists added.
      slice, users: whose.
      value, than: of the teacher's, of the other.
      gain, low, high: their difference with its 95 % interval over users.
      p: of the paired t-test over users, corrected by Holm over what the slice is compared with;
        None of one user.
    """

    other: str
    slice: str
    users: int
    value: float
    than: float
    gain: float
    low: float
    high: float
    p: float | None

    @property
    def is_more(self) -> bool:
        """More, beyond chance."""
        return self.gain > 0 and self.p is not None and self.p < LEVEL


@dataclasses.dataclass(frozen=True)
class QuickVerdict:
    """What `slgr compare --quick` found.

    Attributes:
      data, teacher: what of.
      base: the recommender that lists are added to; left_out: why EASE was not tried.
      weights: what is added -> w, chosen by all of validation; 0: adding it helps nobody.
      differences: the teacher minus the base, then minus each control.
      on_top: the teacher added to the base with the best control: minus that without the teacher.
      asked: share of the users that have a list.
      by_share: share of these -> gain over the base, overall.
      by_length: first items of each list -> gain; 0: whole lists.
      best: what to train with: the teacher, one of its controls, or the base's own lists.
    """

    data: str
    teacher: str
    base: str
    left_out: str
    weights: dict[str, float]
    differences: tuple[Difference, ...]
    on_top: tuple[Difference, ...]
    asked: float
    by_share: dict[float, float]
    by_length: dict[int, float]
    best: str

    @property
    def command(self) -> str:
        """The command that trains what is best."""
        flags = [
            f"--data={self.data}",
            "--workdir=RUN",
            "--guidance=auto",
            f"--teacher={self.best}",
        ]
        return shlex.join(["slgr", "train", *flags])


def compare(
    data: str, teacher: str, options: BaselineConfig | None = None, *, seed: int = 0
) -> QuickVerdict:
    """Measure the product `teacher` of the dataset at `data`; writes its control products.

    Args:
      options: which recommenders are tried as the base.
      seed: of the halves, the draws of users and the shuffled control.

    Raises:
      ConfigError: no validation part, or no recommender is left.
      InputError: the product holds preferences, or nothing but users' own training items.
      ManifestError, ShardError: the dataset or the product cannot be used.
    """
    options = options or BaselineConfig()
    dataset = load_dataset(data)
    lists = blending.listed(dataset, preferences.load(dataset, teacher))
    base, fitted = _best_base(dataset, options)
    own = _CONTROL_OF.get(base, base)

    def fit(name: str) -> controls.ScoreUsers:
        return teacher_lists.host_scores(fitted)

    names = [
        controls.ensure(dataset, teacher, control, seed=seed, fit=fit)
        for control in dict.fromkeys((*CONTROLS, own))
    ]
    others = [blending.lists_of(dataset, preferences.load(dataset, name)) for name in names]
    # The base's own order is in its scores already: its lists are no control of it.
    compared = [its for its in others if its.name != controls.control_name(teacher, own)]
    shares = [_of_share(lists, share, seed) for share in SHARES[:-1]]
    shorter = [_first(lists, length) for length in LENGTHS]
    tried = blending.try_weights(
        fitted.score_users, fitted.state, [lists, *compared, *shares, *shorter], dataset
    )
    of_teacher, of_controls = tried[0], tried[1 : 1 + len(compared)]
    k = max(range(len(compared)), key=lambda k: _overall(of_controls[k], seed))
    on_top = _on_top(dataset, fitted, compared[k], of_controls[k], lists, seed)

    differences = _corrected(_differences(dataset, base, of_teacher, compared, of_controls, seed))
    gains = [_overall(its, seed) - _overall(of_teacher, seed, alone=True) for its in tried]
    of_shares = gains[1 + len(compared) : 1 + len(compared) + len(shares)]
    return QuickVerdict(
        data=data,
        teacher=teacher,
        base=base,
        left_out=baselines.left_out(options, dataset.n_items),
        weights={
            teacher: of_teacher.weight,
            **{its.name: o.weight for its, o in zip(compared, of_controls, strict=True)},
        },
        differences=differences,
        on_top=tuple(on_top),
        asked=float((lists.rows.counts > 0).mean()),
        by_share=dict(zip(SHARES, [*of_shares, gains[0]], strict=True)),
        by_length=dict(zip((*LENGTHS, 0), [*gains[-len(shorter) :], gains[0]], strict=True)),
        best=_best(teacher, own, differences, compared, of_controls, of_teacher, seed),
    )


def _best_base(dataset: Dataset, options: BaselineConfig) -> tuple[str, Fitted]:
    """The recommender with the best validation ndcg@10, the first among equals."""
    asked = added_value.names(options, dataset.n_items)
    if not asked:
        raise ConfigError("--baselines=none leaves nothing to add the lists to")
    best: tuple[float, str, Fitted] | None = None
    nothing = Lists("", Csr.empty(dataset.n_users), np.zeros(0, np.float32))
    for name in asked:
        fitted = baselines.tune(baselines.make_baseline(name, options), dataset).fitted
        (tried,) = blending.try_weights(fitted.score_users, fitted.state, [nothing], dataset)
        value = float(tried.values[0].mean())
        if best is None or value > best[0]:
            best = value, name, fitted
    assert best is not None, "some recommender is asked for"
    return best[1], best[2]


def _of_share(lists: Lists, share: float, seed: int) -> Lists:
    """The lists of a share of the users that have some, drawn."""
    asked = np.flatnonzero(lists.rows.counts)
    kept = np.zeros(lists.rows.counts.size, bool)
    drawn = np.random.default_rng(seed).permutation(asked)
    kept[drawn[: int(round(share * asked.size))]] = True
    return blending.keep_users(lists, kept)


def _first(lists: Lists, length: int) -> Lists:
    """The first `length` items of each list; of those that tie with the last, all or none."""
    chosen = lists.boosts >= np.float32(1 / length)
    rows = Csr.from_pairs(
        lists.rows.owners()[chosen], lists.rows.indices[chosen], lists.rows.counts.size
    )
    return Lists(lists.name, rows, lists.boosts[chosen])


def _overall(tried: Tried, seed: int, *, alone: bool = False) -> float:
    """The mean over users, cross-fitted, or without the lists."""
    return float((tried.values[0] if alone else tried.cross_fitted(seed)[0]).mean())


def _differences(
    dataset: Dataset,
    base: str,
    of_teacher: Tried,
    compared: Sequence[Lists],
    of_controls: Sequence[Tried],
    seed: int,
) -> list[Difference]:
    ours = of_teacher.cross_fitted(seed)
    alone = (of_teacher.values[0], of_teacher.tail[0])
    rows = _by_slice(dataset, of_teacher, base, ours, alone)
    for lists, tried in zip(compared, of_controls, strict=True):
        rows += _by_slice(dataset, of_teacher, lists.name, ours, tried.cross_fitted(seed))
    return rows


def _on_top(
    dataset: Dataset, fitted: Fitted, control: Lists, of_control: Tried, lists: Lists, seed: int
) -> list[Difference]:
    """The teacher added to what has the best control's lists already."""
    (tried,) = blending.try_weights(
        blending.blended(fitted.score_users),
        blending.blend_state(fitted.state, control, of_control.weight),
        [lists],
        dataset,
    )
    without = (tried.values[0], tried.tail[0])
    return _by_slice(dataset, tried, control.name, tried.cross_fitted(seed), without)


def _by_slice(
    dataset: Dataset,
    tried: Tried,
    other: str,
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
) -> list[Difference]:
    than = dict(blending.by_slice(dataset, tried, *theirs))
    return [
        _difference(other, name, values, than[name])
        for name, values in blending.by_slice(dataset, tried, *ours)
        if name in _SHOWN
    ]


def _difference(other: str, name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    low, high = t_interval(ours - theirs)
    return Difference(
        other=other,
        slice=name,
        users=int(ours.size),
        value=float(ours.mean()),
        than=float(theirs.mean()),
        gain=float((ours - theirs).mean()),
        low=low,
        high=high,
        p=number(paired_t(ours - theirs)),
    )


def _corrected(rows: Sequence[Difference]) -> tuple[Difference, ...]:
    """The rows with p corrected by Holm over those of their slice."""
    out = list(rows)
    for name in dict.fromkeys(row.slice for row in rows):
        places = [k for k, row in enumerate(rows) if row.slice == name]
        raw = [rows[k].p for k in places]
        adjusted = holm([np.nan if p is None else p for p in raw])
        for k, p in zip(places, adjusted, strict=True):
            out[k] = dataclasses.replace(rows[k], p=number(p))
    return tuple(out)


def _best(
    teacher: str,
    own: str,
    differences: Sequence[Difference],
    compared: Sequence[Lists],
    of_controls: Sequence[Tried],
    of_teacher: Tried,
    seed: int,
) -> str:
    """What has the best cross-fitted validation: the teacher only if it is above its controls
    beyond chance; a control or the teacher only if it is above the base beyond chance."""
    overall = [row for row in differences if row.slice == "overall"]
    if all(row.is_more for row in overall):
        return teacher
    alone = of_teacher.values[0]
    candidates = []
    for lists, tried in zip(compared, of_controls, strict=True):
        gains = tried.cross_fitted(seed)[0] - alone
        if gains.mean() > 0 and paired_t(gains) < LEVEL / len(compared):
            candidates.append((float(gains.mean()), lists.name))
    return max(candidates)[1] if candidates else controls.control_name(teacher, own)


# --- words and files -----------------------------------------------------------------------------


def rows_of(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Rows for tables."""
    return [{"minus": row.other, **dataclasses.asdict(row)} for row in differences]


def said(verdict: QuickVerdict) -> list[str]:
    """What was found, in sentences; the command last."""
    overall = [row for row in verdict.differences if row.slice == "overall"]
    over_base, over_controls = overall[0], overall[1:]
    lines = [
        f"On {verdict.base} ({over_base.than:.4f}), the best recommender that costs nothing, "
        f"{verdict.teacher} adds {_gain(over_base)} NDCG@10."
    ]
    beaten = [row for row in over_controls if row.is_more]
    if len(beaten) == len(over_controls):
        lines.append("That is more than every control adds, beyond chance.")
    else:
        rest = [row for row in over_controls if not row.is_more]
        shown = ", ".join(f"{row.other} ({_gain(row)} over it)" for row in rest)
        lines.append(f"It is not told apart from, or below: {shown}.")
    top = verdict.on_top[0]
    lines.append(f"On top of {top.other} it adds {_gain(top)}.")
    for name in _SHOWN[1:]:
        of_slice = [row for row in verdict.differences if row.slice == name]
        if of_slice:
            least = min(of_slice, key=lambda row: row.gain)
            word = (
                "more than the base and every control"
                if all(row.is_more for row in of_slice)
                else f"at least {_gain(least)} (against {least.other})"
            )
            lines.append(f"{name.capitalize()}: {word}.")
    lines += _worth_of_more(verdict)
    if verdict.left_out:
        lines.append(f"{verdict.left_out}.")
    return [*lines, f"Train what is best: {verdict.command}"]


def _worth_of_more(verdict: QuickVerdict) -> list[str]:
    """What more answers would be worth."""
    full, half = verdict.by_share[1.0], verdict.by_share[0.5]
    text = f"Half of the users asked gives {half:+.4f}, all of them {full:+.4f}"
    if verdict.asked < 1:
        rest = full * (1 - verdict.asked) / max(verdict.asked, 1e-9)
        text += (
            f"; {verdict.asked:.0%} of the users have a list: asking the others may give about "
            f"{rest:+.4f} more, if they are like these"
        )
    lengths = ", ".join(
        f"{length or 'all'} items {gain:+.4f}" for length, gain in verdict.by_length.items()
    )
    return [f"{text}. By how much of each list is used: {lengths}."]


def _gain(row: Difference) -> str:
    return f"{row.gain:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"


_NOTE = """\
Validation NDCG@10 of score + w / rank in a list. Each user's w was chosen by the other half of the
users; intervals (95 %) and paired t-tests are over users, p corrected by Holm within a slice.
Nothing was trained, and the test part was not met: `slgr compare` does both.
"""


def render(verdict: QuickVerdict, *, markdown: bool = False) -> str:
    """The table and what was found."""
    table = markdown_table if markdown else text_table
    columns = ("minus", "slice", "users", "value", "than", "gain", "low", "high", "p")
    lines = [f"- {line}" for line in said(verdict)]
    title = f"{verdict.teacher} added to {verdict.base}, minus"
    return "\n".join([title, "", table(rows_of(verdict.differences), columns), _NOTE, *lines, ""])


def write(verdict: QuickVerdict, out: pathlib.Path) -> list[pathlib.Path]:
    """Write quick.json and quick.md into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    facts = dataclasses.asdict(verdict) | {"command": verdict.command, "verdict": said(verdict)}
    for name in ("by_share", "by_length"):
        facts[name] = {str(key): value for key, value in facts[name].items()}
    results.write_json(out / JSON, facts)
    write_atomically(out / MARKDOWN, render(verdict, markdown=True))
    return [out / JSON, out / MARKDOWN]
