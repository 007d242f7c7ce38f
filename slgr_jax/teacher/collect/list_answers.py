"""Answers about a list of labelled candidates: scores or an order, in the dresses LLMs give them.

JSON in any nesting, with a fence or prose around it or cut off; `A: 0.9` lines; `B > A > C`;
numbered lists; labels with commas. A label alone says which candidate is meant: what follows it
(a title) is not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.teacher.ask.prompts import label

_MOST_VALUES = 64  # places in it where JSON may begin
_SCORE_KEYS = ("score", "rating", "probability", "relevance", "likelihood", "value")
_LABEL_KEYS = ("label", "letter", "candidate", "option", "id", "key", "item", "name")
_RANK_KEYS = ("rank", "place", "position")
FENCE = re.compile(r"```[a-zA-Z]*\n?")
LABEL = re.compile(
    r"\W*(?:(?:item|candidate|option|label|answer|choice)\b\W*)?([A-Za-z]{1,3})"
    r"(?:\W*|[.):\]*]+\s.*|\s+[-–—]\s.*|\s*\(.*)",
    re.DOTALL | re.IGNORECASE,
)
_PAIR = re.compile(
    r"(?<![A-Za-z0-9])([A-Z]{1,3})(?![A-Za-z0-9])[\"'*\])]*\s*[:=]\s*[\"'*]*"
    r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w.]*\w|\s*%)"
)
_TITLED = re.compile(
    r"^[^\w\n]*([A-Z]{1,3})[.):\]*]+[ \t].*(?:[:=–]|[ \t]-)"
    r"[ \t*\"']*(-?\d+(?:\.\d+)?)[*\"',]*[ \t]*$",
    re.MULTILINE,
)
_TOLD = re.compile(
    r"[:=–]\s*[\"'*]*-?\d+(?:\.\d+)?\W*?(?:[,;\n}]|$)"
)  # a number at the end of a part
_BULLET = re.compile(r"\s*(?:\d+\s*[.):]|[-*•])\s+(.*\S)|\s*(\S.*)")


class JsonObject(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs, repeated keys too."""


@dataclasses.dataclass(frozen=True)
class _Read:
    """What a reading of an answer found: scores by place, or places in order, the best first."""

    scores: Mapping[int, float] = dataclasses.field(default_factory=dict)
    order: tuple[int, ...] = ()

    def __len__(self) -> int:
        return max(len(self.scores), len(self.order))


def read_list(
    form: str, text: str, shown: int, score_range: tuple[float, float], *, cut: bool
) -> tuple[np.ndarray, int] | None:
    """Scores in [0, 1] of the candidates as shown, NaN where none, and how many were clipped.

    Args:
      form: listwise or ranking. Either accepts scores and orders; place k (from 0) of an order is
        the score 1 - k / (shown - 1). Numbers 1, 2, 3, ... are places where an order was asked for.
      text: the answer.
      shown: number of candidates.
      score_range: lowest and highest score asked for; mapped to 0 and 1.
      cut: the answer ended because it was too long.

    Returns:
      None where no label has a score or a place.
    """
    places = {label(k): k for k in range(shown)}
    text = FENCE.sub("", text)
    best = _Read()
    for value in json_values(text):
        found = _from_json(value, places)
        if len(found) >= max(len(best), 1):  # of equals the last: an example comes first
            best = found
    if not best:
        readings = (_lines_of_scores(text, places, cut), _chains(text, places))
        best = max(readings, key=len)
    if not best:
        best = _lines_of_labels(text, places)
    if not best:
        return None
    scores = np.full(shown, np.nan)
    order = best.order
    if form == "ranking" and not order:
        order = _places_told(best.scores)
    if order:
        scores[list(order)] = 1 - np.arange(len(order)) / max(shown - 1, 1)
        return scores.astype(np.float32), 0
    low, high = score_range
    for place, value in best.scores.items():
        scores[place] = (value - low) / (high - low)
    outside = int(((scores < 0) | (scores > 1)).sum())
    return np.clip(scores, 0, 1).astype(np.float32), outside


def _places_told(scores: Mapping[int, float]) -> tuple[int, ...]:
    """The order that label -> 1, 2, 3, ... tells; none where the numbers are something else."""
    if sorted(scores.values()) != [float(k) for k in range(1, len(scores) + 1)]:
        return ()
    return tuple(sorted(scores, key=lambda place: scores[place]))


def json_values(text: str) -> Iterator[Any]:
    """JSON objects and lists in a text, outermost, in order."""
    decoder = json.JSONDecoder(object_pairs_hook=JsonObject)
    at = 0
    for _ in range(_MOST_VALUES):
        match = re.compile(r"[{\[]").search(text, at)
        if match is None:
            return
        try:
            value, at = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            at = match.start() + 1
            continue
        yield value


def _from_json(value: Any, places: Mapping[str, int], depth: int = 0) -> _Read:
    if depth > 4:
        return _Read()
    if isinstance(value, JsonObject):
        numbers = [(_place(key, places), _number(held)) for key, held in value]
        told = [(p, n) for p, n in numbers if n is not None]
        found = [(p, n) for p, n in told if p is not None]
        if 2 * len(found) >= max(len(told), 1):  # fewer: keys are titles, and `M` is one
            return _Read(_agreed(found))
        inside = [_from_json(held, places, depth + 1) for _, held in value]
    elif isinstance(value, list):
        read = _from_rows(value, places)
        if read:
            return read
        inside = [_from_json(held, places, depth + 1) for held in value]
    else:
        return _from_text(value, places)
    return max(inside, key=len, default=_Read())


def _from_text(value: Any, places: Mapping[str, int]) -> _Read:
    """A string inside JSON: {"ranking": "B > A > C"}."""
    return _chains(value, places) if isinstance(value, str) else _Read()


def _from_rows(rows: list[Any], places: Mapping[str, int]) -> _Read:
    """["B", "A"], [["A", 0.9], ...], [{"label": "A", "score": 0.9}, ...], with rank: an order."""
    labels = [_place(row, places) if isinstance(row, str) else None for row in rows]
    if rows and None not in labels:
        return _Read(order=tuple(dict.fromkeys(p for p in labels if p is not None)))
    scored: list[tuple[int, float]] = []
    ranked: list[tuple[float, int]] = []
    for row in rows:
        pairs = row if isinstance(row, JsonObject) else []
        if isinstance(row, list) and not isinstance(row, JsonObject):
            pairs = JsonObject(("", held) for held in row)
        place = _row_label(pairs, places)
        if place is None:
            continue
        by_key = {key.lower(): number for key, number in ((k, _number(v)) for k, v in pairs)}
        numbers = [
            number for number in map(_number, (held for _, held in pairs)) if number is not None
        ]
        score = _first(by_key, _SCORE_KEYS)
        rank = _first(by_key, _RANK_KEYS)
        if score is None and rank is None and len(numbers) == 1:
            score = numbers[0]
        if score is not None:
            scored.append((place, score))
        elif rank is not None:
            ranked.append((rank, place))
    if 2 * max(len(scored), len(ranked)) < len(rows):
        return _Read()
    if len(ranked) > len(scored):
        return _Read(order=tuple(dict.fromkeys(place for _, place in sorted(ranked))))
    return _Read(_agreed(scored))


def _row_label(pairs: Sequence[tuple[str, Any]], places: Mapping[str, int]) -> int | None:
    """The place that a row names: under a key for it, else by its only label."""
    texts = [(key.lower(), held) for key, held in pairs if isinstance(held, str)]
    named = [(key, _place(held, places)) for key, held in texts]
    found = [(key, place) for key, place in named if place is not None]
    under = [place for wanted in _LABEL_KEYS for key, place in found if key == wanted]
    if under:
        return under[0]
    return found[0][1] if len(found) == 1 else None


def _first(by_key: Mapping[str, float | None], keys: Sequence[str]) -> float | None:
    return next((by_key[key] for key in keys if by_key.get(key) is not None), None)


def _agreed(pairs: Sequence[tuple[int, float]]) -> dict[int, float]:
    """place -> number; a place with two different numbers has none."""
    found: dict[int, float] = {}
    torn = set()
    for place, number in pairs:
        if found.setdefault(place, number) != number:
            torn.add(place)
    return {place: number for place, number in found.items() if place not in torn}


def _place(text: str, places: Mapping[str, int]) -> int | None:
    match = LABEL.fullmatch(text.strip())
    return places.get(match.group(1).upper()) if match else None


def _number(value: Any) -> float | None:
    if isinstance(value, JsonObject):  # {"A": {"score": 0.9, "reason": ...}}
        told = {key.lower(): held for key, held in value if not isinstance(held, list)}
        value = next((told[key] for key in _SCORE_KEYS if key in told), None)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _lines_of_scores(text: str, places: Mapping[str, int], cut: bool) -> _Read:
    """`A: 0.9`, in lines or many in one, also in JSON that was cut off; `A. Title: 0.9` lines."""
    cut = cut or text.count("{") > text.count("}")
    best: dict[int, float] = {}
    for pattern in (_PAIR, _TITLED):
        told = list(pattern.finditer(text))
        if cut and told and told[-1].end() == len(text):
            told.pop()  # more digits may have followed
        numbers = [(places.get(match.group(1)), _number(match.group(2))) for match in told]
        found = _agreed([(p, n) for p, n in numbers if p is not None and n is not None])
        if len(found) >= len(best) and 2 * len(found) >= len(_TOLD.findall(text)):
            best = found
    return _Read(best)


def _chains(text: str, places: Mapping[str, int]) -> _Read:
    """`B > A > C` in one line or over the lines of a paragraph; the longest."""
    best: tuple[int, ...] = ()
    for part in (*re.split(r"\n\s*\n", text), *text.splitlines()):
        links = part.split(">")
        if len(links) < 2:
            continue
        links[0] = re.split(r"[:\n]", links[0].strip())[-1]
        links[-1] = links[-1].strip().split("\n")[0]
        named = [_place(link, places) for link in links]
        order = tuple(dict.fromkeys(place for place in named if place is not None))
        if None not in named and len(order) > len(best):
            best = order
    return _Read(order=best)


def _lines_of_labels(text: str, places: Mapping[str, int]) -> _Read:
    """A numbered or bare list, one label a line; or labels with commas between them."""
    lines = [match for match in map(_BULLET.fullmatch, text.splitlines()) if match]
    named = [(_place(m.group(1) or m.group(2), places), bool(m.group(1))) for m in lines]
    order = tuple(dict.fromkeys(place for place, _ in named if place is not None))
    listed = sum(place is not None for place, _ in named)
    if listed >= 2 and (listed == len(named) or all(mark for p, mark in named if p is not None)):
        return _Read(order=order)
    parts = re.split(r"[,;]", text.split(":")[-1])
    commas = [_place(part, places) for part in parts]
    if len(parts) > 1 and None not in commas:
        return _Read(order=tuple(dict.fromkeys(place for place in commas if place is not None)))
    return _Read()
