"""Answers about a list in free text: lines of scores, blocks, tables, chains, numbered lists.

An order is read only where nothing but labels (with their titles or comments without numbers)
stands in it: lines with numbers never tell one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from slgr_jax.teacher.collect.amounts import AMOUNT, STANDALONE, Amount, amount_of, read_amount
from slgr_jax.teacher.collect.json_answers import LABEL_KEYS, is_rank_key, is_score_key, plain_key
from slgr_jax.teacher.collect.readings import ListRefused, Reading, agreed
from slgr_jax.teacher.collect.shown import Shown, plain_characters
from slgr_jax.teacher.collect.text_lines import Line, read_line

_ARROW = re.compile(r"\s*(?:-+>|=+>|→|⇒|≻|›|»|>+)\s*")
_KEYED = re.compile(
    rf"\s*[-*•]?\s*[\"'*]*(?P<key>[A-Za-z][A-Za-z_ ]{{0,29}}?)[\"'*]*\s*[:=–—|-][\s\"'*]*"
    rf"(?P<amount>{AMOUNT.pattern})[\"'*.,;\s|]*\Z",
    re.VERBOSE | re.IGNORECASE,
)
_NUMBERED = re.compile(r"\s*(?:[*_#]+\s*)?\(?#?(?P<number>[0-9]{1,3})[.)\]:]\s+(?P<text>.*\S)")
_BROKEN = re.compile(r"\W*[.,]?[0-9]+(?:\W*|\s*[,;].*)")
_HEADING = re.compile(r"\s*#|[^:]{1,60}:\s*\Z")
_BULLET = re.compile(r"\A\s*[-*•·+]\s+")
_TABLE_RULE = re.compile(r"[\s|:+=-]+")
_TIE = re.compile(r"[=≈~≥]|\bties?d?\b", re.IGNORECASE)


@dataclasses.dataclass
class _Section:
    """What the lines of a section say so far."""

    passes: list[dict[int, Amount]] = dataclasses.field(default_factory=lambda: [{}])
    unclear: dict[int, str] = dataclasses.field(default_factory=dict)
    conflict: ListRefused | None = None
    told_in: int = -2
    labels: list[tuple[int, Line]] = dataclasses.field(default_factory=list)
    current: Line | None = None

    def add(self, place: int, amount: Amount) -> None:
        """Another amount of a place begins another pass over the list."""
        if self.passes[-1].get(place, amount) != amount:
            self.passes.append({})
        self.passes[-1][place] = amount


def read_section(
    text: str, shown: Shown, *, ordered: bool
) -> tuple[list[Reading], ListRefused | None]:
    """Every reading of a part of an answer without JSON, and why there may be none.

    Args:
      text: the part, between two marks.
      ordered: an order was asked for: lists of labels are orders.
    """
    table = _tables(text, shown, ordered=ordered)
    if table:
        return table, None
    section = _read_lines(text, shown)
    if section.conflict:
        return [], section.conflict

    scores = _scores(section)
    chains = _chains(text, shown)
    if scores or section.unclear:
        return [*scores, *chains], None if scores else unclear_numbers(section.unclear.values())
    if chains or not ordered:
        return chains, None
    return [reading for reading in _lists(text, section, shown) if reading], None


def unclear_numbers(lines: Iterable[str]) -> ListRefused:
    """Numbers of which nobody can say what they are of."""
    return ListRefused("numbers without a label", "; ".join(list(lines)[:3]))


# --- lines and blocks --------------------------------------------------------------------------


def _read_lines(text: str, shown: Shown) -> _Section:
    section = _Section()
    for number, line in enumerate(re.split(r"[\n{}]", text)):
        if not line.strip():
            continue
        if _BROKEN.fullmatch(line) and section.told_in == number - 1:
            section.conflict = unclear_numbers([f"a line of {line.strip()[:40]!r} alone"])
        keyed = _KEYED.fullmatch(line)
        if keyed and is_score_key(keyed["key"]) and shown.by_label(keyed["key"]) is None:
            _add_keyed(section, keyed, line)
            continue
        parts = read_line(line, shown)
        if not parts and _HEADING.match(line):
            section.current = None
        for part in parts:
            _add_line(section, number, part, line)
            if part.amount is not None:
                section.told_in = number
    return section


def _add_keyed(section: _Section, keyed: re.Match[str], line: str) -> None:
    """`Score: 0.8` under the heading of a candidate."""
    whole = AMOUNT.fullmatch(keyed["amount"])
    amount = amount_of(whole) if whole else None
    if section.current is None:
        return
    if amount is None:
        section.unclear[section.current.place] = _quoted(line)
    else:
        section.add(section.current.place, amount)


def _quoted(line: str) -> str:
    return repr(" ".join(line.split())[:60])


def _add_line(section: _Section, number: int, part: Line, line: str) -> None:
    if part.conflict:
        section.conflict = ListRefused("label and title disagree", _quoted(line))
    if part.amount is not None:
        section.add(part.place, part.amount)
    elif part.unclear:
        section.unclear[part.place] = _quoted(line)
    elif part.bare or part.titled or re.match(r"\s*[.:)\]|,(-]", part.rest):
        section.current = part
        section.labels.append((number, part))


def _scores(section: _Section) -> list[Reading]:
    """A reading per pass; none where most labels with numbers are unclear."""
    readable = set().union(*section.passes)
    unclear = section.unclear.keys() - readable
    if not readable or len(unclear) > len(readable):
        return []
    said = len(readable) + len(unclear)
    return [Reading(held, said=said) for held in section.passes if held]


# --- tables ------------------------------------------------------------------------------------


def _tables(text: str, shown: Shown, *, ordered: bool) -> list[Reading]:
    """Tables with a head that names their columns, in Markdown, with tabs or with commas."""
    for mark in ("|", "\t", ",", ";"):
        rows = [_cells(line, mark) for line in text.splitlines() if line.count(mark)]
        rows = [row for row in rows if row and not all(_TABLE_RULE.fullmatch(c) for c in row)]
        if len(rows) >= 2 and (reading := _table(rows, shown, ordered=ordered)):
            return [reading]
    return []


def _cells(line: str, mark: str) -> list[str]:
    cells = [cell.strip(" *`\"'") for cell in line.strip().split(mark)]
    return cells[1:-1] if mark == "|" and len(cells) > 2 and not cells[0] + cells[-1] else cells


def _table(rows: Sequence[Sequence[str]], shown: Shown, *, ordered: bool) -> Reading:
    head, width = [plain_key(cell) for cell in rows[0]], len(rows[0])
    body = [row for row in rows[1:] if len(row) == width]
    labels = [k for k, key in enumerate(head) if key in LABEL_KEYS or key.rstrip("s") in LABEL_KEYS]
    scores = [k for k, key in enumerate(head) if is_score_key(key)]
    ranks = [k for k, key in enumerate(head) if is_rank_key(key) or head[k] in ("", "no")]
    wanted = ranks if (ordered and ranks) or not scores else scores
    if not labels or len(wanted) != 1 or len(body) < 1 or width < 2:
        return Reading()

    pairs = []
    names = next((places for k in labels if (places := _column(body, k, shown))), None)
    if names is None:
        return Reading()
    for place, row in zip(names, body, strict=True):
        amount = read_amount(row[wanted[0]])
        if place is not None and amount is not None:
            pairs.append((place, Amount(amount.value, "place") if wanted is ranks else amount))
    if 2 * len(pairs) < len(body):
        return Reading()
    return Reading(agreed(pairs), said=len(body))


def _column(body: Sequence[Sequence[str]], number: int, shown: Shown) -> list[int | None] | None:
    places = shown.resolve([row[number] for row in body])
    if places is None or 2 * sum(place is not None for place in places) <= len(places):
        return None
    return places


# --- orders ------------------------------------------------------------------------------------


def _chains(text: str, shown: Shown) -> list[Reading]:
    """`B > A > C` in one line or over the lines of a paragraph."""
    readings = []
    for part in re.split(r"\n\s*\n", text):
        whole = _chain(part, shown)
        lines = [whole] if whole else [_chain(line, shown) for line in part.splitlines()]
        readings += [Reading(order=order) for order in lines if order]
    return readings


def _chain(text: str, shown: Shown) -> tuple[int, ...]:
    links = _ARROW.split(plain_characters(text).strip(" \n>"))
    if len(links) < 2:
        return ()
    links[0] = re.split(r"[:\n]", links[0].strip())[-1]
    last = links[-1].strip().split("\n")[0]
    order = _places([*links[:-1], last], shown)
    # A sentence may follow the last label.
    return order or _places(
        [*links[:-1], re.split(r"[.,;!](?:\s|\Z)|\s+because\b", last)[0]], shown
    )


def _places(names: Sequence[str], shown: Shown) -> tuple[int, ...]:
    """The places of names that each are a label, perhaps with its title, or a title."""
    places = shown.resolve(names)
    if not places or None in places or len(set(places)) < len(places):
        return ()
    order = tuple(place for place in places if place is not None)
    for place, name in zip(order, names, strict=True):
        if shown.by_title(name) is not None:
            continue
        held = shown.label_with_text(name)
        rest = held[1] if held else ""
        end = shown.title_end(place, rest) or 0
        if STANDALONE.search(re.sub(r"\([0-9]{4}\)", " ", rest[end:])):
            return ()
    return order


def _lists(text: str, section: _Section, shown: Shown) -> Iterable[Reading]:
    """A numbered list, one label (or title) a line; bare labels a line; labels with commas."""
    numbered = [match for match in map(_NUMBERED.match, text.splitlines()) if match]
    if numbered:
        runs: list[list[re.Match[str]]] = []
        for match in numbered:
            if not runs or match["number"] in ("0", "1"):
                runs.append([])
            runs[-1].append(match)
        yield from (Reading(order=_numbered_order(run, shown)) for run in runs)
        return
    yield Reading(order=_plain_lines(text, section, shown) or _commas(text, shown))


def _numbered_order(run: Sequence[re.Match[str]], shown: Shown) -> tuple[int, ...]:
    numbers = [int(match["number"]) for match in run]
    if len(run) < 2 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return ()
    texts = [_BULLET.sub("", match["text"]) for match in run]
    return _places([plain_characters(text) for text in texts], shown)


def _plain_lines(text: str, section: _Section, shown: Shown) -> tuple[int, ...]:
    """Labels or titles, one a line. Titled labels in the order shown may only repeat the list."""
    lines = [_BULLET.sub("", line) for line in text.splitlines() if line.strip()]
    titles = [shown.by_title(line) for line in lines]
    titled = [title for title in titles if title is not None]
    if len(titled) >= 2 and len(titled) == len(set(titled)) and not section.labels:
        return tuple(titled) if len(titled) >= len(lines) - 1 else ()

    places = [part.place for _, part in section.labels]
    numbers = [number for number, _ in section.labels]
    if len(places) < 2 or len(set(places)) < len(places):
        return ()
    if (
        numbers != list(range(numbers[0], numbers[0] + len(numbers)))
        or len(lines) > len(places) + 2
    ):
        return ()
    bare = all(part.bare and not part.titled for _, part in section.labels)
    if not bare and places == sorted(places):
        return ()
    return tuple(places)


def _commas(text: str, shown: Shown) -> tuple[int, ...]:
    head, _, tail = text.strip().rpartition(":")
    if re.search(r"\b(?:candidates|options|items|labels)\b", head, re.IGNORECASE) and not re.search(
        r"\brank|\border|\bbest\b", head, re.IGNORECASE
    ):
        return ()
    parts = re.split(
        r"\s*[,;]\s*(?:and\s+|then\s+)?|\s+(?:and|then|followed by)\s+", tail.strip(" .[]")
    )
    if len(parts) < 2 or any(_TIE.search(part) for part in parts):
        return ()
    places = [shown.by_label(part) for part in parts]
    if None in places or len(set(places)) < len(places):
        return ()
    return tuple(place for place in places if place is not None)
