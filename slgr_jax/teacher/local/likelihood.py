"""A language model as a teacher: how much more likely is a title after the titles a user liked?

score(u, i) = [log P(title_i | titles of u's training items) - log P(title_i | neutral prompt)]
/ sqrt(tokens of title_i); a title carries its categories. The second term removes what any reader
would expect, such as short and famous titles; the root keeps long titles comparable: the noise of
a sum grows with it. Form and prompt were chosen by `scorers.held_in_accuracy`, which sees training
interactions only.

Shape letters: U users, I items, n pairs.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from slgr_jax import progress
from slgr_jax.errors import InputError, UserError
from slgr_jax.teacher.local.parts import Parts
from slgr_jax.teacher.local.vectors import unit

# The prompt is `opening title MARK title MARK ...`, then comes the title; or neutral, then it.
MARK = "\n-"
# Most tokens of one title, categories included.
TITLE_TOKENS = 32
_USERS_PER_PART = 64
_MOST_PARTS = 1000
Events = tuple[np.ndarray, np.ndarray]  # users, items of a history: by user, then time


class LanguageModel(Protocol):
    """What gives log-probabilities of texts: `Transformers`."""

    name: str
    batch: int  # prompts that are worth one call

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens among them."""

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
    ) -> list[np.ndarray]:
        """Per prompt: log P(continuation | prompt) of each continuation, summed over tokens."""


class Likelihood:
    """Scores pairs with a language model.

    Attributes:
      name, score_kind, prompt_hash: for manifests.
      described: [I] bool, items with a title.

    Args:
      model: the language model.
      titles: [I], empty where an item has none.
      history_items: the last that many training items of a user are the prompt.
      noun: what the items are, in the plural; may be empty.
    """

    score_kind = "log_ratio"

    def __init__(
        self,
        model: LanguageModel,
        titles: Sequence[str],
        history_items: int,
        *,
        noun: str = "",
    ) -> None:
        self.name = model.name
        self.described = np.array([bool(title) for title in titles], bool)
        opening = f"{noun[:1].upper()}{noun[1:]} I like:{MARK}" if noun else f"I like:{MARK}"
        neutral = f"{noun[:1].upper()}{noun[1:]}:{MARK}" if noun else f"A list:{MARK}"
        wording = f"{opening}|{neutral}|{history_items}|{TITLE_TOKENS}"
        self.prompt_hash = hashlib.sha256(wording.encode()).hexdigest()[:16]
        self._model, self._most = model, history_items
        encoded = model.encode([" " + title for title in titles])
        self._titles = [ids[:TITLE_TOKENS] for ids in encoded]
        self._opening, self._mark, self._neutral = model.encode([opening, MARK, neutral])
        self._prior = np.full(len(titles), np.nan, np.float64)

    def score(
        self,
        history: Events,
        users: np.ndarray,
        items: np.ndarray,
        *,
        keep: pathlib.Path | None = None,
        restart: bool = False,
    ) -> np.ndarray:
        """[n] float32: the scores of pairs; NaN for a user without a history.

        Args:
          history: training events whose items have titles, by user, then time.
          users, items: [n], by user; items have titles.
          keep: directory for finished users, so that a killed job goes on; removed at the end.
          restart: drop what another job left in `keep`.
        """
        order = np.argsort(users, kind="stable")
        scored_users, starts = np.unique(users[order], return_index=True)
        ends = np.append(starts[1:], users.size)
        rows = [order[a:b] for a, b in zip(starts, ends, strict=True)]

        prompts = self._prompts(history, scored_users)
        parts = Parts(keep, self._job(prompts, users, items), restart=restart) if keep else None
        self._learn_prior(np.unique(items), parts)
        if keep:
            print(self._estimate(prompts, [items[row] for row in rows]), flush=True)

        size = max(_USERS_PER_PART, self._model.batch, -(-len(rows) // _MOST_PARTS))
        out = np.full(users.size, np.nan, np.float32)
        with progress.bar(len(rows), " users") as bar:
            for number, begin in enumerate(range(0, len(rows), size)):
                chunk = slice(begin, begin + size)
                item_lists = [items[row] for row in rows[chunk]]
                make = functools.partial(self._score_part, prompts[chunk], item_lists, bar)
                if parts is None:
                    values = make()
                else:
                    name = f"users-{number:05d}"
                    bar.update(len(rows[chunk]) if parts.has(name) else 0)
                    values = parts.get(name, make)
                out[np.concatenate(rows[chunk])] = values

        if parts is not None:
            parts.drop()
        return out

    def _prompts(self, history: Events, users: np.ndarray) -> list[list[int]]:
        """Token ids of each user's last titles; empty for a user without any."""
        owners, items = history
        starts = np.searchsorted(owners, users, "left")
        ends = np.searchsorted(owners, users, "right")
        prompts = []
        for start, end in zip(starts, ends, strict=True):
            shown = items[max(start, end - self._most) : end]
            pieces = [self._titles[item] + self._mark for item in shown]
            prompts.append(
                [*self._opening, *itertools.chain.from_iterable(pieces)] if pieces else []
            )
        return prompts

    def _score_part(
        self, prompts: Sequence[list[int]], item_lists: Sequence[np.ndarray], bar: Any
    ) -> np.ndarray:
        out = [np.full(items.size, np.nan) for items in item_lists]
        able = [k for k, prompt in enumerate(prompts) if prompt]
        for begin in range(0, len(able), self._model.batch):
            some = able[begin : begin + self._model.batch]
            values_of_prompts = self._model.log_probs(
                [prompts[k] for k in some], [[self._titles[i] for i in item_lists[k]] for k in some]
            )
            for k, values in zip(some, values_of_prompts, strict=True):
                lengths = np.array([len(self._titles[i]) for i in item_lists[k]])
                out[k] = (values - self._prior[item_lists[k]]) / np.sqrt(lengths)
            bar.update(len(some))
        bar.update(len(prompts) - len(able))
        return np.concatenate(out).astype(np.float32)

    def _learn_prior(self, items: np.ndarray, parts: Parts | None) -> None:
        """Fill log P(title | neutral prompt) of `items` where it is not known yet."""
        if not self.described[items].all():
            raise InputError(f"item {items[~self.described[items]][0]} has no title to score")
        missing = items[np.isnan(self._prior[items])]
        if missing.size:
            titles = [self._titles[item] for item in missing]

            def make() -> np.ndarray:
                return self._model.log_probs([self._neutral], [titles])[0]

            self._prior[missing] = make() if parts is None else parts.get("prior", make)

    def _job(self, prompts: Sequence[list[int]], users: np.ndarray, items: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self.name} {self.prompt_hash} {self._model.batch}".encode())
        flat = itertools.chain.from_iterable((*prompt, -1) for prompt in prompts)
        for values in (users, items, np.fromiter(flat, np.int64)):
            digest.update(np.ascontiguousarray(values, np.int64).tobytes())
        return digest.hexdigest()

    def _estimate(self, prompts: Sequence[list[int]], item_lists: Sequence[np.ndarray]) -> str:
        """What is to be done, and how long it takes at the speed of the first prompts."""
        sizes = [
            len(prompt) + sum(len(self._titles[i]) for i in items)
            for prompt, items in zip(prompts, item_lists, strict=True)
        ]

        able = [k for k, prompt in enumerate(prompts) if prompt][: self._model.batch]
        seconds = float("nan")
        if able:
            for _ in range(2):  # the first call compiles
                began = time.perf_counter()
                self._model.log_probs(
                    [prompts[k] for k in able],
                    [[self._titles[i] for i in item_lists[k]] for k in able],
                )
                seconds = time.perf_counter() - began

        speed = sum(sizes[k] for k in able) / seconds
        return (
            f"{self.name}: {len(prompts):,} users, {sum(map(len, item_lists)):,} pairs, "
            f"{sum(sizes):,} tokens; about {sum(sizes) / speed / 60:.1f} minutes at {speed:,.0f} "
            "tokens/s (fewer users: --max_users); killed, it goes on where it was"
        )


class Transformers:
    """A causal language model of the package `transformers`, by name or from a folder.

    Raises:
      UserError: the extra `transformers` is not installed, or the model cannot be loaded.
    """

    def __init__(self, path: str, *, batch_tokens: int = 8192) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"--llm={path} needs {error.name}: pip install 'slgr_jax[transformers]'"
            ) from error
        self.name, self.batch, self._batch_tokens = path, 1, batch_tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--llm={path} cannot be loaded: {reason}") from error
        self._torch, self._model = torch, model.to(device).eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens among them."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
    ) -> list[np.ndarray]:
        """As `LanguageModel.log_probs`; the keys and values of a prompt are computed once."""
        with self._torch.inference_mode():
            return [
                self._of_prompt(prompt, texts)
                for prompt, texts in zip(prompts, continuations, strict=True)
            ]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] float32 of unit length: the mean of the last states of each text's tokens; a text
        without tokens is a zero row."""
        width = int(self._model.config.get_text_config().hidden_size)
        vectors = np.zeros((len(texts), width), np.float32)
        with self._torch.inference_mode():
            for row, ids in enumerate(progress.over(self.encode(texts), " texts")):
                if ids:
                    tokens = self._torch.tensor([ids], device=self._model.device)
                    states = self._model(tokens, output_hidden_states=True).hidden_states[-1]
                    vectors[row] = states[0].float().mean(0).cpu().numpy()
        return unit(vectors)

    def _of_prompt(self, prompt: Sequence[int], many: Sequence[Sequence[int]]) -> np.ndarray:
        torch, device = self._torch, self._model.device
        longest = max(map(len, many), default=1)
        rows = max(1, self._batch_tokens // (len(prompt) + longest))
        head = torch.tensor([prompt], device=device)

        out = []
        for begin in range(0, len(many), rows):
            some = many[begin : begin + rows]
            lengths = torch.tensor([len(ids) for ids in some], device=device)
            tokens = torch.zeros((len(some), longest), dtype=torch.long, device=device)
            for row, ids in enumerate(some):
                tokens[row, : len(ids)] = torch.tensor(ids)
            first = self._model(head, use_cache=True)
            cache = first.past_key_values
            cache.batch_repeat_interleave(len(some))
            # Padding is at the end: no token before it sees it.
            rest = self._model(tokens, past_key_values=cache).logits[:, :-1]
            start = first.logits[:, -1:].expand(len(some), -1, -1)
            said = torch.cat([start, rest], dim=1).float().log_softmax(-1)
            picked = said.gather(2, tokens[:, :, None])[:, :, 0]
            inside = torch.arange(longest, device=device)[None] < lengths[:, None]
            out.append((picked * inside).sum(1).cpu().numpy())

        return np.concatenate(out) if out else np.zeros(0, np.float32)
