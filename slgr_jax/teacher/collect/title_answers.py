"""Answers that are a list of titles, the best first -> the titles as written, or why none is read.

    {"titles": ["Heat (1995)", ...]}     JSON in any nesting, rows with a title, cut off in a string
    1. **Heat** (1995) - a thief ...     numbered or bulleted lines, one title a line
    Heat                                 bare lines, where there are no others

Which item a title means is not asked here. Of several lists the one that is marked as final holds;
two that disagree are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from slgr_jax.teacher.collect import thoughts
from slgr_jax.teacher.collect.json_answers import JsonObject, JsonValue, json_values, plain_key
from slgr_jax.teacher.collect.list_answers import mark_before, text_parts
from slgr_jax.teacher.collect.readings import ListRefused
from slgr_jax.teacher.products.titles import normal

_MOST_TITLES = 1000
_MOST_TITLE = 300  # characters
_MOST_DEPTH = 5
_NAMES = ("title", "name", "item", "movie", "film", "book", "product", "song", "album", "game")
_RANKS = ("rank", "place", "position", "number", "no")
_NUMBERED = re.compile(
    r"(?P<indent>\s*)[*_#]*\(?#?(?P<number>[0-9]{1,4})[.)\]:][*_]*\s+(?P<text>.*\S)"
)
_BULLETED = re.compile(r"(?P<indent>\s*)(?:[-*•·+–]|\\-)\s+(?P<text>.*\S)")
_EMPHASISED = re.compile(r"\*\*(.+?)\*\*(.*)|__(.+?)__(.*)")
_QUOTED = re.compile(r"[\"“«„](.+?)[\"”»“](?P<rest>.*)")
_YEAR_BEHIND = re.compile(r"\s*([(\[](?:1[89]|20)[0-9]{2}[)\]])")
_IN_STRING = r'(?:[^"\\]|\\.)*'
_STRING = re.compile(f'"{_IN_STRING}"')
_CUT_LIST = re.compile(rf'\[\s*((?:"{_IN_STRING}"\s*,?\s*)+)(?:"{_IN_STRING})?\s*\Z', re.DOTALL)
_HOLE = "\ufffc"


class _List(NamedTuple):
    """A list that an answer has: where it begins, its mark (see `thoughts`), its titles."""

    start: int
    mark: str
    titles: tuple[str, ...]


def read_titles(text: str, asked: int, *, cut: bool) -> tuple[tuple[str, ...], bool] | ListRefused:
    """The titles of an answer in order, and whether the list was cut off before its end.

    Args:
      text: the answer, without thoughts.
      asked: how many titles were asked for.
      cut: the answer ended because it was too long; its last, unfinished title is left out.
    """
    text = thoughts.plain(text)
    cut = cut or text.count("{") > text.count("}")
    values = list(json_values(text))
    lists = [*_json_lists(text, values), *_cut_json(text, cut=cut)]
    words = _without_values(text, values)
    if not lists and not values:
        lists = list(_text_lists(words, cut=cut))
    if cut and lists and not values:
        words = ""
    chosen = _choose(lists)
    if isinstance(chosen, ListRefused):
        return chosen
    if not chosen:
        begins = f"begins {' '.join(text.split())[:120]!r}"
        return ListRefused("cut off", text[-200:]) if cut else ListRefused("no titles", begins)
    if turned := thoughts.direction_in_doubt(_without_entries(words)):
        return ListRefused("direction in doubt", repr(turned))
    # JSON can hold half of a surrogate pair, which no file can.
    titles = tuple(title.encode("utf-8", "replace").decode() for title in chosen[:_MOST_TITLES])
    return titles, cut and len(titles) < asked


def _choose(lists: Sequence[_List]) -> tuple[str, ...] | ListRefused:
    """The titles of the last final list; else of all plain ones, which must say the same."""
    finals = [held for held in lists if held.mark == "final"]
    plain = [held for held in lists if held.mark == "plain"]
    if lists and not finals and not plain:
        return ListRefused("only a draft", f"the {lists[-1].mark} {_begin(lists[-1].titles)}")
    held = finals[-1:] or plain
    if not held:
        return ()
    longest = max(held, key=lambda read: len(read.titles)).titles
    names = [normal(title) for title in longest]
    for read in held:
        if [normal(title) for title in read.titles] != names[: len(read.titles)]:
            return ListRefused(
                "two readings", f"{_begin(held[0].titles)}; and {_begin(read.titles)}"
            )
    return longest


def _begin(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "")


# --- JSON --------------------------------------------------------------------------------------


def _json_lists(text: str, values: Sequence[JsonValue]) -> Iterator[_List]:
    marks = text_parts(_without_values(text, values), values)
    rows = [value.value for value in values]
    if len(rows) > 1 and all(isinstance(row, JsonObject) and _title_of(row) for row in rows):
        yield _List(0, "plain", _titles(rows))  # an object a line
        return
    for value in values:
        around = next(part.mark for part in reversed(marks) if part.start <= value.start)
        before = mark_before(text, value.start)
        inside = _inside(value.value, before or "plain", 0) if before != "skip" else ()
        for mark, titles in inside:
            yield _List(value.start, around if mark == "plain" else mark, titles)


def _inside(value: Any, mark: str, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(mark, titles) of every list of titles in a JSON value."""
    if depth > _MOST_DEPTH:
        return
    if isinstance(value, JsonObject):
        numbered = _numbered_keys(value)
        if numbered:
            yield mark, numbered
            return
        for key, held in value:
            of_key = thoughts.mark_of_key(key)
            if of_key != "skip":
                yield from _inside(held, of_key or mark, depth + 1)
    elif isinstance(value, list):
        if titles := _titles(value):
            yield mark, titles
            return
        for held in value:
            yield from _inside(held, mark, depth + 1)


def _numbered_keys(value: JsonObject) -> tuple[str, ...]:
    """{"1": "Heat", "2": "Ran"}."""
    if len(value) < 2 or [key for key, _ in value] != [str(k + 1) for k in range(len(value))]:
        return ()
    return _titles([held for _, held in value])


def _titles(rows: Sequence[Any]) -> tuple[str, ...]:
    """Titles of a list of strings, or of rows that have one; empty where it is another list."""
    titles = [_title_of(row) for row in rows if row is not None]
    if not titles or not all(titles):
        return ()
    ranks = [_rank_of(row) for row in rows if row is not None]
    if None not in ranks and len(set(ranks)) == len(ranks):
        titles = [title for _, title in sorted(zip(ranks, titles, strict=True))]
    return tuple(titles)


def _title_of(row: Any) -> str:
    """The title that a row is or has; empty without one. 1984 may come as a number."""
    if isinstance(row, str):
        return " ".join(row.split())[:_MOST_TITLE]
    if isinstance(row, int) and not isinstance(row, bool):
        return str(row)
    if not isinstance(row, JsonObject):
        return ""
    fields = {plain_key(key): held for key, held in row}
    title = next((t for name in _NAMES if isinstance(t := fields.get(name), str) and t), "")
    year = fields.get("year")
    if title and re.fullmatch(r"(?:1[89]|20)[0-9]{2}", str(year)) and f"({year})" not in title:
        title = f"{title} ({year})"
    return " ".join(title.split())[:_MOST_TITLE]


def _rank_of(row: Any) -> int | None:
    if not isinstance(row, JsonObject):
        return None
    return next((held for key, held in row if plain_key(key) in _RANKS and type(held) is int), None)


def _cut_json(text: str, *, cut: bool) -> Iterator[_List]:
    """{"titles": ["Heat", "Ran", "The Th: what was finished."""
    match = _CUT_LIST.search(text) if cut else None
    if match is None:
        return
    try:
        titles = _titles([json.loads(held) for held in _STRING.findall(match[1])])
    except ValueError:
        return
    mark = mark_before(text, match.start()) or "plain"
    if titles and mark != "skip":
        yield _List(match.start(), mark, titles)


def _without_values(text: str, values: Sequence[JsonValue]) -> str:
    """The text, as long as it was, with holes where JSON stands."""
    for value in values:
        hole = "\n" + _HOLE * (value.end - value.start - 2) + "\n"
        text = text[: value.start] + hole + text[value.end :]
    return text


# --- lines -------------------------------------------------------------------------------------


def _without_entries(text: str) -> str:
    """The text, as long as it was, with holes where entries of lists stand: `Wait Until Dark` is
    no second thought, and `Final Destination` no mark."""
    return "\n".join(
        _HOLE * len(line) if _NUMBERED.fullmatch(line) or _BULLETED.fullmatch(line) else line
        for line in text.split("\n")
    )


def _text_lists(text: str, *, cut: bool) -> Iterator[_List]:
    if cut:
        text = text[: text.rfind("\n") + 1]
    for part in text_parts(_without_entries(text), []):
        lines = text[part.start : part.end].split("\n")
        for entries in _numbered(lines) or _bulleted(lines):
            yield _List(part.start, part.mark, tuple(map(_entry, entries)))
    if not any(map(_listed, text.split("\n"))) and (bare := _bare(text)):
        yield _List(0, "plain", bare)


def _listed(line: str) -> bool:
    return bool(_NUMBERED.fullmatch(line) or _BULLETED.fullmatch(line))


def _numbered(lines: Sequence[str]) -> list[list[str]]:
    """Runs of lines that count up by one from 0 or 1, which `300: Rise of an Empire` does not."""
    runs: list[list[str]] = []
    following = -1
    for line in lines:
        match = _NUMBERED.fullmatch(line)
        if match is None:
            continue
        number = int(match["number"])
        if number != following:
            if number not in (0, 1):
                continue
            runs.append([])
        runs[-1].append(match["text"])
        following = number + 1
    return runs


def _bulleted(lines: Sequence[str]) -> list[list[str]]:
    """The bullets that are indented least: what is below them is about them."""
    matches = [match for match in map(_BULLETED.fullmatch, lines) if match]
    if not matches:
        return []
    least = min(len(match["indent"]) for match in matches)
    return [[match["text"] for match in matches if len(match["indent"]) == least]]


def _entry(text: str) -> str:
    """The title of an entry: what is emphasised or quoted at its start, with the year behind it;
    else all of it."""
    marked = _EMPHASISED.fullmatch(text)
    quoted = _QUOTED.fullmatch(text)
    if marked:
        title, rest = (marked[1], marked[2]) if marked[1] else (marked[3], marked[4])
    elif quoted:
        title, rest = quoted[1], quoted["rest"]
    else:
        return text[:_MOST_TITLE]
    year = _YEAR_BEHIND.match(rest)
    title = title.rstrip(" :")
    return (f"{title} {year[1]}" if year else title)[:_MOST_TITLE]


def _bare(text: str) -> tuple[str, ...]:
    """Lines that are nothing but titles: three or more, none of them long or a sentence."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and lines[0].endswith(":"):
        lines = lines[1:]
    if len(lines) < 3 or any(len(line) > 120 or line.endswith(":") for line in lines):
        return ()
    return tuple(lines)
