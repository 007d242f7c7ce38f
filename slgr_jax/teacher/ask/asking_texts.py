"""A text of each user or item -> batch-API request files: no candidates are drawn for it.

A user's prompt shows the last training items of that user and nothing of validation or test, an
item's prompt its row of the item table and no interaction. The files are those of `requests.py`;
in their index `items` is what a prompt shows, and `user` is -1 where it is about an item.

Shape letters: U users, I items, R rows of either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from slgr_jax.config import TEXT_PROMPTS, RequestConfig, TextConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.ask import asking, prompts, request_writing, text_prompts
from slgr_jax.teacher.ask.asking import Sizes
from slgr_jax.teacher.ask.prompts import Template
from slgr_jax.teacher.ask.request_writing import NOT_ASKED, Requests

# Options that only prompts about candidates have.
_OF_CANDIDATES = (
    *("candidate_set", "list_size", "catalogue", "catalogue_tokens", "permutations", "pairs"),
    *("orders", "top_logprobs"),
)


@dataclasses.dataclass(frozen=True)
class TextAsker:
    """Everything that decides what texts are asked for, and in which words.

    Attributes:
      dataset: whose users and items these are.
      side: user or item; fields: of an answer, each a text.
      template, options, texts, seed: what is asked, and in which order the budget cuts.
      lines: [I] how a prompt shows an item, empty where it cannot.
      offsets, items: [R + 1] and what the prompt about each row shows, oldest first.
    """

    dataset: Dataset
    side: str
    fields: tuple[str, ...]
    template: Template
    options: RequestConfig
    texts: TextConfig
    seed: int
    lines: list[str]
    offsets: np.ndarray
    items: np.ndarray

    def prompt(self, row: int) -> str:
        """The prompt about a user or an item."""
        return self.fill([self.lines[item] for item in self.of_row(row)])

    def fill(self, shown: list[str]) -> str:
        """The prompt that shows these items."""
        if self.side == "user":
            return self.template.fill(history=prompts.as_history(shown))
        return self.template.fill(item="\n".join(shown))

    def of_row(self, row: int) -> np.ndarray:
        """The items that the prompt about a row shows."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    @property
    def tokens(self) -> int:
        """Tokens of an answer, as an estimate."""
        return text_prompts.answer_tokens(self.fields, self.options, self.texts.words)

    @property
    def shown(self) -> str:
        """What prompts show, for manifests and people."""
        if self.side == "user":
            return f"the last {self.options.history_items} training items that have a title or text"
        return f"title, categories and {self.texts.item_words} words of description"


def asker(dataset: Dataset, options: RequestConfig, texts: TextConfig, seed: int = 0) -> TextAsker:
    """What `plan` and `write` need.

    Raises:
      ConfigError: the template, the factors or an option cannot be used.
      InputError: no item has a title or a description.
    """
    for name in _OF_CANDIDATES:
        value, default = getattr(options, name), getattr(RequestConfig, name)
        if value != default:
            raise ConfigError(
                f"--{name}={value} is of prompts about candidates, and --prompt={options.prompt} "
                "asks for one text of each; drop it"
            )
    side = TEXT_PROMPTS[options.prompt]
    template, fields = text_prompts.read_template(options, texts)
    if side == "user":
        lines = prompts.item_lines(dataset)
        offsets, items = asking.last_items(dataset, lines, options.history_items)
    else:
        lines = text_prompts.item_blocks(dataset, texts.item_words)
        described = np.array([bool(line) for line in lines])
        items = np.flatnonzero(described).astype(np.int32)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(described)])
    return TextAsker(dataset, side, fields, template, options, texts, seed, lines, offsets, items)


@dataclasses.dataclass(frozen=True)
class TextPlan:
    """What asking for texts costs, after the budget.

    Attributes:
      rows: [R] bool, users (items) that are asked about.
      facts: requests, prompt_tokens, answer_tokens (estimates), cost; rows, of which not_shown have
        nothing that a prompt could show, and cut the budget leaves out.
      side: user or item; tokens_by: how tokens were estimated.
    """

    rows: np.ndarray
    facts: Mapping[str, int | float]
    side: str
    tokens_by: str

    def report(self) -> str:
        """A few lines for people."""
        facts = self.facts
        lines = [
            f"plan: {facts['requests']:,} requests about as many of {facts['rows']:,} "
            f"{self.side}s, {facts['prompt_tokens']:,} prompt + {facts['answer_tokens']:,} answer "
            f"tokens (estimated by {self.tokens_by}), "
            + (f"cost {facts['cost']:,.2f}" if facts["cost"] else "no --price_in or --price_out")
        ]
        if facts["not_shown"]:
            lacks = "training item with a text" if self.side == "user" else "title or description"
            lines.append(f"  {facts['not_shown']:,} {self.side}s have no {lacks}: none is asked")
        if facts["cut"]:
            lines.append(f"  the budget cuts {facts['cut']:,} {self.side}s")
        return "\n".join(lines)


def plan(asker: TextAsker) -> TextPlan:
    """Estimate what asking costs, and keep the rows that the budget allows, drawn with the seed.

    Raises:
      ConfigError: the budget does not allow a single one.
      InputError: no prompt has anything to show.
    """
    options, able = asker.options, np.diff(asker.offsets) > 0
    if not able.any():
        raise InputError(
            f"{asker.dataset.path}: no {asker.side} has anything that a prompt could show; prepare "
            "it again with item titles (slgr prepare --items_input)"
        )
    tokens_by, count = prompts.token_counter()
    sizes = Sizes(
        requests=able.astype(np.int64),
        prompt=np.zeros(able.size, np.int64),
        answer=able * asker.tokens,
    )
    frame = int(count([asker.fill([])])[0])
    per_item = count([prompts.as_history([line]) + "\n" for line in asker.lines])
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_item[asker.items])])
    sizes.prompt[:] = able * (frame + sums[asker.offsets[1:]] - sums[asker.offsets[:-1]])
    cost = (sizes.prompt * options.price_in + sizes.answer * options.price_out) / 1e6

    order = np.random.default_rng((asker.seed, 1 << 32)).permutation(np.flatnonzero(able))
    cheaper = "lower --history_items" if asker.side == "user" else "lower --item_words"
    fits = asking.affordable(options, order, sizes, cost, asker.side, cheaper)
    kept = np.zeros(able.size, bool)
    kept[order[fits]] = True
    facts: dict[str, int | float] = {
        "requests": int(kept.sum()),
        "prompt_tokens": int(sizes.prompt[kept].sum()),
        "answer_tokens": int(sizes.answer[kept].sum()),
        "cost": round(float(cost[kept].sum()), 4),
        "rows": int(able.size),
        "not_shown": int((~able).sum()),
        "cut": int((able & ~kept).sum()),
    }
    return TextPlan(kept, facts, asker.side, tokens_by)


def write(
    asker: TextAsker,
    planned: TextPlan,
    root: pathlib.Path,
    *,
    model: str,
    overwrite: bool = False,
) -> schema.RequestManifest:
    """Write the request files of the planned rows at `root`, or what is missing of them.

    Raises:
      ConfigError: no model, or a --body that is no JSON object.
      InputError: `root` holds other requests, or is no directory of requests.
    """
    # A bad --body is refused before anything is done.
    request_writing.make_body(asker.options, "", "", 0, None)
    if not model:
        raise ConfigError("missing --model: the LLM that is to answer, as its server calls it")

    of_data = asker.dataset.manifest
    options = dataclasses.asdict(asker.options)
    # What prompts show is in `lines` and `shown`.
    unused = {*NOT_ASKED, *_OF_CANDIDATES, "history_items"}
    decides: dict[str, Any] = {
        "options": {name: value for name, value in options.items() if name not in unused},
        "fields": asker.fields,
        "words": asker.texts.words,
        "rows": hashlib.sha256(np.packbits(planned.rows).tobytes()).hexdigest(),
        "template": asker.template.text,
        "lines": hashlib.sha256("\0".join(asker.lines).encode()).hexdigest(),
        "shown": hashlib.sha256(asker.items.tobytes()).hexdigest(),
        "split": (of_data.split_hash, of_data.id_map_hash),
        "model": model,
    }
    manifest = schema.RequestManifest(
        fingerprint=hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest(),
        complete=False,
        dataset=of_data.name,
        id_map_hash=of_data.id_map_hash,
        split_hash=of_data.split_hash,
        candidates="",
        candidates_hash="",
        training_items="none",
        prompt=asker.options.prompt,
        template_hash=asker.template.hash,
        model=model,
        options=options,
        plan={
            **planned.facts,
            "tokens_by": planned.tokens_by,
            "side": asker.side,
            "fields": list(asker.fields),
            "shown": asker.shown,
        },
        files={"requests": (), "index": ()},
    )

    def stream(manifest: schema.RequestManifest, skip: int) -> Requests:
        return _stream(asker, planned, manifest, skip)

    return request_writing.write(root, manifest, stream, overwrite=overwrite)


def _stream(
    asker: TextAsker, planned: TextPlan, manifest: schema.RequestManifest, skip: int
) -> Requests:
    """A line and its row of the index per request, after the first `skip`."""
    options = asker.options
    form = text_prompts.response_format(asker.fields, options.structured)
    limit = options.answer_tokens or 2 * asker.tokens + 16
    number = request_writing.first_number(manifest.fingerprint)
    for position, row in enumerate(np.flatnonzero(planned.rows)[skip:], skip):
        body = request_writing.make_body(
            options, manifest.model, asker.prompt(int(row)), limit, form
        )
        user = int(row) if asker.side == "user" else -1
        yield request_writing.request(number + position, body, user, 0, asker.of_row(int(row)))
