"""Batch-API results -> scores: one line, one answer at a time, without state or files.

A line is read in both shapes that are seen in practice: `response.body.choices` (OpenAI, vLLM
run-batch) and `response.choices` (the completion itself). What cannot be used is a `Refused` with
the reason, never an exception. Labels alone say which candidate is meant; titles are not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slgr_jax.teacher.collect import list_answers
from slgr_jax.teacher.collect.refusals import Refused

_MOST_TEXT = 100_000  # characters of an answer that are read
_YES, _NO = frozenset({"yes", "y", "true"}), frozenset({"no", "n", "false"})
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
# `A` before another word is an article, unless that word gives a reason.
_CHOICE = re.compile(
    r"\b(?i:answer|choice|prefers?|chooses?|picks?|option)\b(?:\s+(?:is|would be))?"
    r"\s*[:=]?\s*[\"'*(\[]*(B|A(?!\s+(?!because|since|over|as\b|for\b|given)[a-z]))(?![A-Za-z'])"
)
_STRESSED = re.compile(r"\*\*(.+?)\*\*|\\boxed\{(.+?)\}")
_WORD = re.compile(r"[A-Za-z]+")
_DIGIT = re.compile(r"(?<![\d.,\-])([1-5])(?!\d|[.,]\d)(?!\s*(?:to|-|–)\s*\d)")


class Completion(NamedTuple):
    """What a model answered.

    Attributes:
      custom_id: of the request.
      text: the answer, without what a reasoning model thought.
      tokens: of each of its tokens the token and the log-probabilities of the likeliest ones in
        its place; empty where they were not asked for.
      cut: the answer ended because it was too long.
      prompt_tokens, completion_tokens: what was paid for; None where not told.
    """

    custom_id: str
    text: str
    tokens: Sequence[tuple[str, Mapping[str, float]]]
    cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    sample: int = 0

    @property
    def usage(self) -> dict[str, int | None]:
        """What was paid for, by name."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


@dataclasses.dataclass(frozen=True)
class Answer:
    """Scores in [0, 1] of the candidates in shown order, NaN where there is none, float32.

    Of two compared items there is one number: the probability that the first is preferred.
    `cut` answers ended too early; what they had said is kept.
    """

    scores: np.ndarray
    cut: bool = False


# --- one line ----------------------------------------------------------------------------------


def read_line(line: bytes) -> Completion | Refused:
    """One line of a results or errors file."""
    try:
        raw = json.loads(line.decode("utf-8-sig"))  # a file may begin with a byte order mark
    except (ValueError, RecursionError) as error:
        return Refused("", "not JSON", str(error)[:200])
    if not isinstance(raw, dict):
        return Refused("", "not an object", type(raw).__name__)
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Refused("", "no custom_id", "")
    response = raw.get("response")
    if raw.get("error"):
        return Refused(custom_id, "error", _message(raw["error"]))
    if not isinstance(response, dict):
        return Refused(custom_id, "no response", "" if response is None else str(response)[:200])
    body = response.get("body", response)
    if not isinstance(body, dict):
        return Refused(custom_id, "no response", str(body)[:200])
    status = response.get("status_code", 200)
    if status != 200 or body.get("error"):
        detail = f"status {status}: {_message(body.get('error', ''))}"
        return Refused(custom_id, "error", detail)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Refused(custom_id, "no choices", "")
    return _completion(custom_id, choices[0], body.get("usage"))


def _completion(custom_id: str, choice: Mapping[str, Any], usage: Any) -> Completion | Refused:
    message = choice.get("message")
    if isinstance(message, dict):
        text = message.get("content")
        if isinstance(text, list):
            parts = [part.get("text") for part in text if isinstance(part, dict)]
            text = "".join(part for part in parts if isinstance(part, str))
        if not text and message.get("refusal"):
            return Refused(custom_id, "refusal", str(message["refusal"])[:200])
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        return Refused(custom_id, "no text", "")
    text = _THOUGHT.sub("", text[:_MOST_TEXT])
    text = _THOUGHT_END.split(text)[-1].strip()  # the prompt may have opened the thought
    if not text:
        return Refused(custom_id, "empty answer", str(choice.get("finish_reason"))[:40])
    used = usage if isinstance(usage, dict) else {}
    return Completion(
        custom_id=custom_id,
        text=text,
        tokens=_tokens(choice.get("logprobs")),
        cut=choice.get("finish_reason") == "length",
        prompt_tokens=_count(used.get("prompt_tokens")),
        completion_tokens=_count(used.get("completion_tokens")),
    )


def _message(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error
    return str(error)[:200]


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _tokens(logprobs: Any) -> list[tuple[str, dict[str, float]]]:
    """Both layouts: chat (`content`, a list of objects) and completions (parallel lists)."""
    if not isinstance(logprobs, dict):
        return []
    content = logprobs.get("content")
    found: list[tuple[str, dict[str, float]]] = []
    if isinstance(content, list):
        for one in content:
            if not isinstance(one, dict) or not isinstance(one.get("token"), str):
                break
            top = one.get("top_logprobs")
            listed = [one, *(top if isinstance(top, list) else [])]
            pairs = [(x.get("token"), x.get("logprob")) for x in listed if isinstance(x, dict)]
            found.append((one["token"], _masses(pairs)))
        return found
    tokens, tops = logprobs.get("tokens"), logprobs.get("top_logprobs")
    if isinstance(tokens, list) and isinstance(tops, list):
        for token, top in zip(tokens, tops, strict=False):
            if not isinstance(token, str) or not isinstance(top, dict):
                break
            found.append((token, _masses(list(top.items()))))
    return found


def _masses(pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    return {
        token: float(value)
        for token, value in pairs
        if isinstance(token, str)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and value <= 0
    }


# --- one answer --------------------------------------------------------------------------------


def parse(
    form: str, completion: Completion, shown: int, score_range: tuple[float, float] = (0.0, 1.0)
) -> Answer | Refused:
    """The scores that an answer gives to the `shown` candidates of its request.

    Args:
      form: one of `config.PROMPTS`; for lists see `list_answers.read_list`.
      completion: the answer.
      shown: how many candidates it was about.
      score_range: lowest and highest score asked for; mapped to 0 and 1.
    """
    if form in ("listwise", "ranking"):
        found = list_answers.read_list(
            form, completion.text, shown, score_range, cut=completion.cut
        )
        if found is None:
            return Refused(completion.custom_id, "no scores by label", completion.text[:200])
        return Answer(found[0], completion.cut)
    if form == "pairwise":
        groups: tuple[frozenset[str], ...] = (frozenset({"A"}), frozenset({"B"}))
        return _parse_word(completion, _choice, groups, np.array([1.0, 0.0]), "no single choice")
    if form == "pointwise":
        groups = (_YES, _NO)
        return _parse_word(completion, _yes_no, groups, np.array([1.0, 0.0]), "neither yes nor no")
    digits = tuple(frozenset({str(k)}) for k in range(1, 6))
    return _parse_word(completion, _rating, digits, np.linspace(0, 1, 5), "no rating from 1 to 5")


def _parse_word(
    completion: Completion,
    find: Callable[[str], int | None],
    groups: Sequence[frozenset[str]],
    values: np.ndarray,
    reason: str,
) -> Answer | Refused:
    """An answer that is one of a few words: its value, or the mean under their probabilities."""
    found = find(completion.text)
    if found is None:
        return Refused(completion.custom_id, reason, completion.text[:200])
    shares = _shares(completion.tokens, groups, found)
    score = values[found] if shares is None else shares @ values
    return Answer(np.array([score], np.float32))


def _shares(
    tokens: Sequence[tuple[str, Mapping[str, float]]], groups: Sequence[frozenset[str]], said: int
) -> np.ndarray | None:
    """Probabilities of the words, from the first token that is one of them; None if there is none
    or if it is not what the text says.

    A word that is not among the listed tokens gets the most it can have: the smallest listed
    probability, or what is left over.
    """
    for token, listed in tokens:
        if _group(token, groups) is None:
            continue
        if _group(token, groups) != said:
            return None
        mass = np.zeros(len(groups))
        for text, value in listed.items():
            place = _group(text, groups)
            if place is not None:
                mass[place] += math.exp(value)
        every = [math.exp(value) for value in listed.values()]
        if not mass.sum() > 0:
            return None
        rest = min(min(every), max(0.0, 1.0 - sum(every)))
        mass = np.where(mass > 0, mass, rest)
        return mass / mass.sum()
    return None


def _group(token: str, groups: Sequence[frozenset[str]]) -> int | None:
    text = token.strip(" \t\r\n\"'*().:[]`▁Ġ")
    for place, words in enumerate(groups):
        if text in words or (words & (_YES | _NO) and text.lower() in words):
            return place
    return None


def _choice(text: str) -> int | None:
    """0 for A, 1 for B; None where the answer is neither or both."""
    found = {place for place in map(_single, _voices(text)) if place is not None}
    found |= {"AB".index(name) for name in _CHOICE.findall(text)}
    return found.pop() if len(found) == 1 else None


def _voices(text: str) -> Iterator[str]:
    """The parts of an answer in which a single label is a choice."""
    plain = list_answers.FENCE.sub("", text).strip()
    lines = [line for line in plain.splitlines() if line.strip()]
    yield from (plain, *lines[:1], *lines[-1:])
    for value in list_answers.json_values(text):
        held = [x for _, x in value] if isinstance(value, list_answers.JsonObject) else value
        yield from (part for part in held if isinstance(part, str))
    for match in _STRESSED.finditer(plain):
        yield match.group(1) or match.group(2)


def _single(text: str) -> int | None:
    match = list_answers.LABEL.fullmatch(text.strip())
    name = match.group(1) if match else ""
    return "AB".index(name) if name in ("A", "B") else None


def _yes_no(text: str) -> int | None:
    words = [word.lower() for word in _WORD.findall(text)]
    found = {0 if word in _YES else 1 for word in words if word in _YES | _NO}
    if len(found) == 1:
        return found.pop()
    first = words[0] if words else ""
    return 0 if first in _YES else 1 if first in _NO else None


def _rating(text: str) -> int | None:
    """Place 0 to 4 of the digit; `4/5` is 4; None where digits disagree."""
    plain = re.sub(r"([1-5])\s*(?:/|out of)\s*5\b", r"\1", text)
    found = set(_DIGIT.findall(plain))
    return int(found.pop()) - 1 if len(found) == 1 else None
