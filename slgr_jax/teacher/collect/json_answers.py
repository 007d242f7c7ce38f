"""Answers about a list in JSON, in any nesting: label -> score, rows, orders, ranks.

A number counts where its key says that it is a score, or where nothing else could be one; an
order where a key or the prompt says so. What is under `reasoning` and the like is not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from slgr_jax.teacher.collect.amounts import Amount, read_amount
from slgr_jax.teacher.collect.readings import Reading, agreed
from slgr_jax.teacher.collect.shown import Shown
from slgr_jax.teacher.collect.thoughts import mark_of_key

_MOST_VALUES = 64  # places in it where JSON may begin
_MOST_DEPTH = 5
SCORE_KEYS = (
    "score", "rating", "probability", "prob", "relevance", "likelihood", "match", "matchscore",
    "preference", "affinity", "similarity", "fit", "suitability", "percent", "percentage",
    "points", "stars", "grade", "value", "prediction", "interest", "compatibility", "s", "p",
)  # fmt: skip
LABEL_KEYS = (
    "label", "letter", "candidate", "option", "id", "key", "item", "name", "title", "movie", "film",
    "product", "book",
)  # fmt: skip
RANK_KEYS = ("rank", "place", "position", "order", "ranking")
_PLACE_KEY = re.compile(
    r"(?:rank|place|position|no|number|top|#)?[ _.#-]*([0-9]{1,4})(?:st|nd|rd|th)?\.?",
    re.IGNORECASE,
)


class JsonObject(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs, repeated keys too."""


class JsonValue(NamedTuple):
    """A JSON object or list in a text, and where it stands."""

    value: Any
    start: int
    end: int


def json_values(text: str, *, strict: bool = True) -> Iterator[JsonValue]:
    """JSON objects and lists in a text, outermost, in order; `strict`: no bare newline in strings,
    which a model that writes prose forgets to escape."""
    decoder = json.JSONDecoder(object_pairs_hook=JsonObject, strict=strict)
    position = 0
    for _ in range(_MOST_VALUES):
        match = re.compile(r"[{\[]").search(text, position)
        if match is None:
            return
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
            continue
        yield JsonValue(value, match.start(), position)


def plain_key(key: str) -> str:
    """A key as it is compared: lower case, letters only."""
    return re.sub(r"[^a-z]", "", key.lower())


def is_score_key(key: str) -> bool:
    """Whether what stands under a key is a score."""
    name = plain_key(key)
    return (
        name in SCORE_KEYS or name.rstrip("s") in SCORE_KEYS or name.endswith(("score", "rating"))
    )


def is_rank_key(key: str) -> bool:
    """Whether what stands under a key is a place in an order."""
    name = plain_key(key)
    return name in RANK_KEYS or name.endswith(("rank", "ranking", "ranked", "order"))


def read_json(value: Any, shown: Shown, *, ordered: bool) -> list[Reading]:
    """Every reading of a JSON value.

    Args:
      value: of `json_values`.
      ordered: an order was asked for, so that a bare list of labels is one.
    """
    return list(_read(value, shown, ordered, 0))


def _read(value: Any, shown: Shown, ordered: bool, depth: int) -> Iterator[Reading]:
    if depth > _MOST_DEPTH:
        return
    if isinstance(value, JsonObject):
        yield from _read_object(value, shown, ordered, depth)
    elif isinstance(value, list):
        reading = _from_rows(value, shown, ordered)
        if reading:
            yield reading
        else:
            for held in value:
                if not _is_row(held):  # a row says nothing without the others
                    yield from _read(held, shown, ordered, depth + 1)


def _read_object(value: JsonObject, shown: Shown, ordered: bool, depth: int) -> Iterator[Reading]:
    if _is_row(value) and (reading := _from_rows([value], shown, ordered)):
        yield reading
        return
    whole = _by_label(value, shown) or _parallel(value, shown) or _by_place(value, shown)
    if whole:
        yield whole
        return
    for key, held in value:
        mark = mark_of_key(key)
        if mark == "skip":
            continue
        says_order = is_rank_key(key) or (ordered and not is_score_key(key))
        if isinstance(held, str):
            inside = [_from_string(held, shown, ordered=says_order)]
        else:
            inside = list(_read(held, shown, says_order, depth + 1))
        for reading in inside:
            if reading:
                yield reading.marked(mark if mark and reading.mark == "plain" else None)


def _is_row(value: Any) -> bool:
    """Whether an object names one candidate: {"label": "A", ...}."""
    return isinstance(value, JsonObject) and any(
        plain_key(key) in LABEL_KEYS and isinstance(held, str) for key, held in value
    )


def _by_label(value: JsonObject, shown: Shown) -> Reading:
    """{"A": 0.9, "B": {"score": 0.5, "reason": ...}, "C": "80%"}."""
    told = [(key, amount, rank) for key, held in value
            if (amount := _amount(held)) is not None or _is_number(held)
            for rank in (_is_rank(held),)]  # fmt: skip
    places = shown.resolve([key for key, _, _ in told])
    if places is None:
        return Reading()
    known = [
        (place, amount, rank)
        for place, (_, amount, rank) in zip(places, told, strict=True)
        if place is not None
    ]
    if not known or 2 * len(known) < len(told):  # fewer: keys are titles, and `M` is one
        return Reading()
    amounts = agreed([(place, amount) for place, amount, _ in known if amount is not None])
    if all(rank for _, _, rank in known):
        amounts = {place: Amount(amount.value, "place") for place, amount in amounts.items()}
    return Reading(amounts)


def _parallel(value: JsonObject, shown: Shown) -> Reading:
    """{"labels": ["A", "B"], "scores": [0.9, 0.5]}: neither is an order."""
    lists = [(key, held) for key, held in value if isinstance(held, list) and held]
    lists = [(key, held) for key, held in lists if not isinstance(held, JsonObject)]
    numbers = [(key, held) for key, held in lists if all(_is_number(x) for x in held)]
    names = [
        (key, held)
        for key, held in lists
        if all(isinstance(x, str) for x in held) and not any(map(read_amount, held))
    ]
    if len(numbers) != 1 or len(names) != 1 or len(numbers[0][1]) != len(names[0][1]):
        return Reading()
    places = shown.resolve(names[0][1])
    if places is None or None in places:
        return Reading()
    rank = is_rank_key(numbers[0][0])
    pairs = []
    for place, number in zip(places, numbers[0][1], strict=True):
        amount = _amount(number)
        if place is not None and amount is not None:
            pairs.append((place, Amount(amount.value, "place") if rank else amount))
    return Reading(agreed(pairs))


def _by_place(value: JsonObject, shown: Shown) -> Reading:
    """{"1": "B", "2": "A"} or {"rank_1": "B", ...}: places from 1 or 0, without a gap."""
    matches = [(_PLACE_KEY.fullmatch(key.strip()), held) for key, held in value]
    ranked = [(int(m[1]), held) for m, held in matches if m and isinstance(held, str)]
    if len(ranked) < 2 or len(ranked) != len(value):
        return Reading()
    ranked.sort(key=lambda pair: pair[0])
    numbers = [number for number, _ in ranked]
    if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return Reading()
    return Reading(order=_order([held for _, held in ranked], shown))


def _order(texts: Sequence[str], shown: Shown) -> tuple[int, ...]:
    """Places that texts name, if each names one and none twice."""
    places = shown.resolve(texts)
    if not places or None in places or len(set(places)) < len(places):
        return ()
    return tuple(place for place in places if place is not None)


def _from_string(text: str, shown: Shown, *, ordered: bool) -> Reading:
    """A string inside JSON: {"ranking": "B > A > C"}, or with commas where a key says order."""
    links = re.split(r"\s*(?:>|→|->)\s*", text.strip())
    if len(links) < 2 and ordered:
        links = re.split(r"\s*[,;]\s*", text.strip())
    return Reading(order=_order(links, shown)) if len(links) > 1 else Reading()


def _from_rows(rows: list[Any], shown: Shown, ordered: bool) -> Reading:
    """["B", "A"], [["A", 0.9], ...], [{"label": "A", "score": 0.9}, ...], with rank: an order."""
    if rows and all(isinstance(row, str) for row in rows):
        return Reading(order=_order(rows, shown)) if ordered and len(rows) > 1 else Reading()
    told = [row for row in rows if isinstance(row, list)]
    names = [_row_names(row) for row in told]
    scored: list[tuple[int, Amount]] = []
    ranked: list[tuple[int, Amount]] = []
    for row, place in zip(told, _row_places(names, shown), strict=True):
        if place is None:
            continue
        score, rank = _row_numbers(row)
        if score is not None:
            scored.append((place, score))
        if rank is not None:
            ranked.append((place, Amount(rank.value, "place")))
    chosen = ranked if (ordered and ranked) or not scored else scored
    if 2 * len(chosen) < len(rows):
        return Reading()
    return Reading(agreed(chosen))


def _row_names(row: Any) -> list[str]:
    """The texts of a row that may name its candidate: those under a key for it, else all."""
    if not isinstance(row, JsonObject):
        return [held for held in row if isinstance(held, str)]
    texts = [(plain_key(key), held) for key, held in row if isinstance(held, str)]
    for wanted in LABEL_KEYS:
        if named := [held for key, held in texts if key == wanted]:
            return [*named, *(held for key, held in texts if key in LABEL_KEYS and key != wanted)]
    return [held for key, held in texts if mark_of_key(key) != "skip"]


def _row_places(names: Sequence[Sequence[str]], shown: Shown) -> list[int | None]:
    """The place of each row: its first name that is a label, else its title, all rows alike."""
    width = max((len(texts) for texts in names), default=0)
    for column in range(width):
        texts = [row[column] if column < len(row) else "" for row in names]
        places = shown.resolve(texts)
        if places is not None and 2 * sum(place is not None for place in places) > len(places):
            return places
    return [None] * len(names)


def _row_numbers(row: Any) -> tuple[Amount | None, Amount | None]:
    """(score, rank) of a row: by their keys; in a list without keys its only number."""
    if not isinstance(row, JsonObject):
        numbers = [_amount(held) for held in row if _is_number(held)]
        if not numbers:
            # ["A", "80%"]: the label is no amount, so what is left is the score.
            numbers = [amount for held in row[1:] if (amount := _amount(held)) is not None]
        return (numbers[0] if len(numbers) == 1 else None), None
    return _score_of(row), next((_amount(held) for key, held in row if is_rank_key(key)), None)


def _score_of(row: JsonObject) -> Amount | None:
    """The score of an object: under `score` itself, else under keys that agree."""
    told = [(plain_key(key), _amount(held)) for key, held in row if is_score_key(key)]
    for wanted in ("score", "rating"):
        for key, amount in told:
            if key == wanted and amount is not None:
                return amount
    amounts = {amount for _, amount in told if amount is not None}
    return amounts.pop() if len(amounts) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    """Whether an object has a rank and no score: {"A": {"rank": 1}}."""
    if not isinstance(value, JsonObject) or _score_of(value) is not None:
        return False
    return any(is_rank_key(key) for key, _ in value)


def _amount(value: Any) -> Amount | None:
    if isinstance(value, JsonObject):  # {"A": {"score": 0.9, "reason": ...}}
        score = _score_of(value)
        if score is None and _is_rank(value):
            return next((_amount(held) for key, held in value if is_rank_key(key)), None)
        return score
    if isinstance(value, str):
        return read_amount(value)
    if not _is_number(value):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return Amount(number, "asked") if math.isfinite(number) else None
