"""A completion -> what it says about a user or an item: one text, or a text a factor.

One answer at a time, without state or files, as `results.py` reads those about candidates. A text
may be empty, where the model knows nothing; an answer of nothing else is refused, and so is one
that is cut off, declines, says two things of one factor or leaves one out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slgr_jax.teacher.ask.text_prompts import ONE_TEXT
from slgr_jax.teacher.collect.completions import Completion
from slgr_jax.teacher.collect.json_answers import JsonObject, json_values
from slgr_jax.teacher.collect.refusals import Refused
from slgr_jax.teacher.collect.results import Answer

_MOST_DETAIL = 200  # characters of an answer that a refusal quotes
_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_MOST_DEPTH = 3
_APOLOGY = r"(?:(?:i['’]?m |i am )?(?:very |so )?sorry|i apologi[sz]e)\b"
_UNABLE = (
    r"(?:i (?:can ?not|can['’]t|could ?n['’]t|won['’]t|will not|am (?:unable|not able)|do not|"
    r"don['’]t)|i['’]m (?:unable|not able)|it is not possible|there is not enough)\b"
)
_OF_WHAT = (
    r"\b(?:assist|help|comply|provide|fulfil+|create|generate|write|describe|determine|infer|answer|"
    r"have (?:any |enough )?(?:information|access|data|knowledge)|do that|information)\b"
)
_DECLINES = re.compile(
    rf"\A\W*(?:{_APOLOGY}.{{0,20}}?\b{_UNABLE}|as an? (?:ai|artificial|language)\b|"
    rf"(?:unfortunately|regrettably)?,?\s*{_UNABLE}.{{0,60}}?{_OF_WHAT})",
    re.IGNORECASE | re.DOTALL,
)


def parse(completion: Completion, fields: Sequence[str]) -> Answer | Refused:
    """The text that an answer gives to each field.

    Args:
      completion: the answer.
      fields: those asked for, `text_prompts.ONE_TEXT` or factors.
    """

    def refused(kind: str, detail: str) -> Refused:
        return Refused(completion.custom_id, kind, detail[:_MOST_DETAIL])

    whole = completion.text
    if completion.cut:
        return refused("cut off", whole[-_MOST_DETAIL:])
    if fenced := _FENCE.match(whole):
        whole = fenced[1]
    readings = list(_readings(whole, fields))
    if not readings:
        kind = "refusal" if _DECLINES.match(whole) else "no texts"
        return refused(kind, whole)
    if any(reading != readings[0] for reading in readings):
        return refused("two readings", f"{readings[0]}; and {readings[-1]}")

    # JSON can hold half of a surrogate pair, which no file can.
    told = [text.strip().encode("utf-8", "replace").decode() for text in readings[0]]
    texts = tuple(text if any(map(str.isalnum, text)) else "" for text in told)
    if not any(texts):
        return refused("empty answer", whole)
    if declined := next((text for text in texts if _DECLINES.match(text)), ""):
        return refused("refusal", declined)
    return Answer(np.zeros(0, np.float32), texts=texts)


def _readings(whole: str, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What the answer says, once for each place where it says all of it."""
    values = [held.value for held in json_values(whole, strict=False)]
    found = [reading for value in values for reading in _of_json(value, fields, 0)]
    yield from found
    if found or any(isinstance(value, JsonObject) for value in values):
        return
    if whole.lstrip()[:1] in ("{", "["):
        return  # broken JSON is no prose
    if fields == ONE_TEXT:
        if not _DECLINES.match(whole):
            yield (whole,)
    else:
        yield from _of_lines(whole, fields)


def _of_json(value: Any, fields: Sequence[str], depth: int) -> Iterator[tuple[str, ...]]:
    """The readings of the outermost objects that have every field."""
    found = list(_of_object(value, fields)) if isinstance(value, JsonObject) else []
    yield from found
    if not found and depth < _MOST_DEPTH and isinstance(value, list):
        pairs = isinstance(value, JsonObject)
        for inner in (pair[1] for pair in value) if pairs else value:
            yield from _of_json(inner, fields, depth + 1)


def _of_object(value: JsonObject, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The texts of an object that has every field; a key that is there twice is two readings."""
    if fields == ONE_TEXT and len(value) == 1:
        value = JsonObject([(ONE_TEXT[0], value[0][1])])  # whatever a template calls it
    held: dict[str, list[str]] = {}
    for key, inner in value:
        text = _as_text(inner)
        if text is not None:
            held.setdefault(_plain(key), []).append(text)
    found = [held.get(_plain(field), []) for field in fields]
    if all(found):
        for place in range(max(map(len, found))):
            yield tuple(texts[min(place, len(texts) - 1)] for texts in found)


def _as_text(value: Any) -> str | None:
    """A value as prose: a text, a number, a list of these; None where it is none of them."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, JsonObject):
        return None
    if isinstance(value, list):
        parts = [_as_text(part) for part in value]
        return None if None in parts else ", ".join(str(part) for part in parts)
    return json.dumps(value)


def _of_lines(whole: str, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The texts of lines that begin with a field's name and a colon, up to the next such line."""
    names = "|".join(re.escape(field) for field in sorted(fields, key=len, reverse=True))
    names = names.replace(r"\ ", r"[ _]")
    heading = re.compile(
        rf"^[^\w\n]*(?:\d{{1,2}}[.)]\s*)?[^\w\n]*({names})[^\w\n:]*:[^\S\n]*\**",
        re.IGNORECASE | re.MULTILINE,
    )
    marks = list(heading.finditer(whole))
    starts = [mark.start() for mark in marks] + [len(whole)]
    held: dict[str, str] = {}
    for mark, end in zip(marks, starts[1:], strict=True):
        text = whole[mark.end() : end].strip()
        if held.setdefault(_plain(mark[1]), text) != text:
            return  # of one factor two texts
    if all(_plain(field) in held for field in fields):
        yield tuple(held[_plain(field)] for field in fields)


def _plain(name: str) -> str:
    """A field's name as it is compared: case, and what joins its words, do not count."""
    return "".join(filter(str.isalnum, name.casefold()))
