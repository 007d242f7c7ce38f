"""Answers about a list of labelled candidates -> scores, or why they cannot be read.

JSON in any nesting, with prose around it or cut off; lines, blocks and tables of scores;
`B > A > C`; numbered lists. Titles count only where they are exactly those that were shown. Of
several readings the one that is marked as final holds; two that disagree are refused.
"""

from __future__ import annotations

import ast
import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slgr_jax.teacher.collect import readings, scales, thoughts, unread
from slgr_jax.teacher.collect.json_answers import JsonObject, JsonValue, json_values, read_json
from slgr_jax.teacher.collect.readings import ListRefused, Reading
from slgr_jax.teacher.collect.shown import Shown
from slgr_jax.teacher.collect.text_answers import read_section, unclear_numbers

_MOST_PYTHON = 20_000  # characters of a text that is read as a Python literal
_LAST_WHOLE = re.compile(r".*(?:\n|[,;](?=[\s\"'])|[}>](?=\s))", re.DOTALL)
# The key of a value whose object is broken or cut off: {"draft": {...}, "final": {"A": 0.
_KEY_BEFORE = re.compile(r"[\"']([^\"'\n]{1,40})[\"']\s*:\s*\Z")
_STRING_BESIDE = re.compile(r"\"([^\"\n]{1,40})\"\s*:\s*\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_HOLE = "\ufffc"  # stands where JSON was, so that positions stay; it is no space and no letter


def read_list(
    form: str, text: str, shown: Shown, score_range: scales.Range, *, cut: bool
) -> tuple[np.ndarray, bool] | ListRefused:
    """Scores in [0, 1] of the candidates as shown (NaN where none), and whether it was cut off.

    Args:
      form: listwise or ranking. Either accepts scores and orders; place k (from 0) of an order is
        the score 1 - k / (shown - 1). Numbers 1, 2, 3, ... (or 0, 1, 2, ...) are places where an
        order was asked for.
      text: the answer, without thoughts.
      shown: the candidates.
      score_range: lowest and highest score asked for; mapped to 0 and 1.
      cut: the answer ended because it was too long.
    """
    ordered = form == "ranking"
    text = thoughts.plain(text)
    cut = cut or text.count("{") > text.count("}")
    values = list(json_values(text))
    said, why = _readings(text, values, shown, ordered=ordered, cut=cut)
    chosen = readings.choose(said, ordered=ordered)
    if chosen is None and cut:
        return ListRefused("cut off", text[-200:])
    if chosen is None:
        return why or unread.explain(text, [value.value for value in values], shown)
    if isinstance(chosen, ListRefused):
        return chosen
    if 2 * len(chosen) < chosen.said:
        return unclear_numbers([f"of {chosen.said} labels only {len(chosen)} have one: {chosen}"])

    if (turned := thoughts.direction_in_doubt(shown.without_titles(text))) and not (
        ordered and "1" in turned
    ):
        begins = " ".join(text.split())[:80]
        return ListRefused("direction in doubt", f"{turned!r} in {begins!r}")
    try:
        scores = scales.to_scores(chosen, shown.size, score_range, ordered=ordered)
    except scales.ScaleError as error:
        return ListRefused(error.kind, error.detail)
    return scores, cut and bool(np.isnan(scores).any())


def _readings(
    text: str, values: Sequence[JsonValue], shown: Shown, *, ordered: bool, cut: bool
) -> tuple[list[Reading], ListRefused | None]:
    """Every reading of a text with its mark, in order, and why there may be none."""
    blanked = text
    for value in values:
        hole = "\n" + _HOLE * (value.end - value.start - 2) + "\n"
        blanked = blanked[: value.start] + hole + blanked[value.end :]
    blanked = _STRING_BESIDE.sub(_without_notes, blanked)
    parts = text_parts(shown.without_titles(blanked), values)

    held = [] if values else _python_value(text)
    said: list[tuple[int, Reading]] = []
    for start, value in [*_joined_rows(values), *((0, v) for v in held)]:
        mark = mark_before(text, start)
        if mark != "skip":
            inside = read_json(value, shown, ordered=ordered)
            said += [(start, reading.marked(mark)) for reading in inside]

    why = None
    if not held:
        last = _LAST_WHOLE.match(blanked) if cut else None
        end = len(text) if not cut else (last.end() if last else 0)
        for part in parts:
            words = blanked[part.start : min(part.end, end)].replace(_HOLE, "")
            told, reason = read_section(words, shown, ordered=ordered)
            said += [(part.start, reading) for reading in told]
            why = why or reason
    starts = [part.start for part in parts]
    marked = []
    for position, reading in sorted(said, key=lambda pair: pair[0]):
        number = bisect.bisect_right(starts, position) - 1
        reading = dataclasses.replace(reading, section=number)
        marked.append(reading.marked(parts[number].mark if reading.mark == "plain" else None))
    return marked, why


def mark_before(text: str, start: int) -> str | None:
    """The mark of the key before a value (see `thoughts.mark_of_key`), in an object cut off."""
    key = _KEY_BEFORE.search(text[max(start - 60, 0) : start])
    return thoughts.mark_of_key(key[1]) if key else None


def _without_notes(match: re.Match[str]) -> str:
    """A key and its string in broken JSON, without what is no answer: {"reasoning": "A > B", ..."""
    return _HOLE * len(match[0]) if thoughts.mark_of_key(match[1]) else match[0]


def _joined_rows(values: Sequence[JsonValue]) -> list[tuple[int, Any]]:
    """JSON values and where they start; an object a line is one list of rows."""
    rows = [value.value for value in values]
    if len(rows) > 1 and all(isinstance(row, JsonObject) for row in rows):
        keys = {tuple(sorted(key for key, _ in row)) for row in rows}
        if len(keys) == 1 and any(isinstance(held, str) for _, held in rows[0]):
            return [(values[0].start, rows)]
        pairs = [pair for row in rows for pair in row]
        if len(pairs) == len(rows) == len({key for key, _ in pairs}):  # {"A": 0.5}\n{"B": 0.3}
            return [(values[0].start, JsonObject(pairs))]
    return [(value.start, value.value) for value in values]


def _python_value(text: str) -> list[Any]:
    """A text that is a Python literal, as JSON would have it: {'A': 0.5}, [('A', 0.5)]."""
    text = text.strip()
    if len(text) > _MOST_PYTHON or text[:1] not in ("{", "["):
        return []
    try:
        return [_as_json(ast.literal_eval(text))]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return JsonObject((str(key), _as_json(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return [_as_json(held) for held in value]
    return value


class TextPart(NamedTuple):
    """A stretch of an answer and its mark: plain, draft, example or final."""

    start: int
    end: int
    mark: str


def text_parts(text: str, values: Sequence[JsonValue]) -> list[TextPart]:
    """The text between marks. What a correction follows is taken back, as a draft is; an example
    ends with its line, or with the JSON value that it is."""
    parts = [TextPart(0, len(text), "plain")]

    def begin(position: int, mark: str) -> None:
        parts[-1] = parts[-1]._replace(end=position)
        parts.append(TextPart(position, len(text), mark))

    for cue in thoughts.cues(text):
        if cue.kind == "example":
            before = parts[-1].mark
            begin(cue.position, "example")
            begin(_example_end(text, cue.end, values), before)
        elif cue.position < parts[-1].start:
            continue
        elif cue.kind == "correction":
            parts[:] = [part._replace(mark="draft") for part in parts]
            begin(cue.position, "plain")
        else:
            begin(cue.position, cue.kind)
    return parts


def _example_end(text: str, start: int, values: Sequence[JsonValue]) -> int:
    for value in values:
        if start <= value.start <= start + 40:
            return value.end
    line = text.find("\n", start)
    return line if line >= 0 else len(text)
