"""Titles as people and LLMs write them -> items of a catalogue, or why none is meant.

A title means an item where it is the item's title to the letter; else where both are the same but
for case, quotes, dashes, punctuation and accents; else where they have the same core, which leaves
out a leading `The` and what stands in brackets, and the years do not differ. Each step needs the
only such item: a title that fits two is ambiguous and means none.

    Alien            ALIEN, "Alien", Aliēn                   not Aliens, not Alien: Resurrection
    Kid, The (1921)  The Kid (1921), kid (1921), The Kid     where no other Kid is in the catalogue
    Mad Max: Fury Road (2015)    Mad Max (2015); Mad Max only with `subtitles`

A title of the world at large is mostly of no item, so nothing is matched by likeness.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from slgr_jax.data.dataset import Dataset

# What becomes of a title; the last four mean no item.
HOW = ("exact", "normalised", "subtitle", "ambiguous", "shortened", "absent", "repeated")
# Counts of a manifest: all titles, and by `HOW`.
SAID = "titles"
_TAILED = 5  # different titles of a list with a tail, before the tails count as authors
_SHARE = {"by": 0.8, "dash": 1.0}  # of a list; a dash is as often before a subtitle

_QUOTES = "\"'`´‘’‚‛“”„‟«»‹›″′"
_DROPPED = str.maketrans(dict.fromkeys(_QUOTES))
_SPACED = str.maketrans(dict.fromkeys("-‐‑‒–—―−_.,:;!?¡¿…()[]{}/\\|*·•~™®©", " "))
_MARKS = re.compile("(?<=[a-z])[\u0300-\u036f]+")
_YEAR = re.compile(r"\b(?:1[89]|20)[0-9]{2}\b")
_BRACKET = re.compile(r"(.*\S)\s*[(\[]([^()\[\]]*)[)\]]", re.DOTALL)
# A plot or a rating behind the year: `Heat (1995) - a thief ...`, `Heat (1995) 5/5`.
_BEHIND_YEAR = re.compile(
    r"(.*?\S\s*[(\[](?:1[89]|20)[0-9]{2}[)\]])(?:\s*[-–—:,|★⭐☆].*|\s+[0-9.]+\s*/\s*[0-9]+.*)",
    re.DOTALL,
)
# Of several works of one name: part of the name, though in brackets.
_NUMBER_NOTE = re.compile(
    r"\W*(?:(?:vol|volume|part|season|series|disc|no)\b.*|[0-9ivx]+)\W*", re.I
)
_ARTICLES = "the|a|an|le|la|les|l'|el|los|las|il|lo|gli|der|die|das|den|det|de|het|een"
_ARTICLE_BEHIND = re.compile(rf"(.*\S),\s*({_ARTICLES})", re.IGNORECASE | re.DOTALL)
_TAILS = {
    "by": re.compile(r"(.*\S)\s+by\s+(\S.*)", re.DOTALL),
    "dash": re.compile(r"(.*\S)(?:\s+[-–—|]|\s*—)\s+(\S.*)", re.DOTALL),
}
_SUBTITLE = re.compile(r"(.*?\S)(?::|\s+[-–—])\s+\S.*", re.DOTALL)


_EMPHASIS = re.compile(r"(?<![\w*])[*_](\S|\S[^*_]*\S)[*_](?![\w*])")


class Match(NamedTuple):
    """What a title means.

    Attributes:
      item: index; -1 where no item is meant.
      how: one of `HOW`; exact, normalised and subtitle mean an item.
    """

    item: int
    how: str


class _Parts(NamedTuple):
    """A title taken apart.

    Attributes:
      whole: all of it, normalised, an article behind a comma put in front.
      undated: the same without the year.
      core: without a leading `the`, without brackets.
      year: in brackets at the end; None without.
      notes: the other brackets at the end, normalised.
      head: core of what stands before a subtitle; empty without one.
    """

    whole: str
    undated: str
    core: str
    year: int | None
    notes: frozenset[str]
    head: str


def normal(text: str) -> str:
    """Case, quotes, dashes, punctuation, accents of Latin letters and space made alike.

    Letters of other scripts keep their marks, which make other letters of them; signs that tell
    titles apart (C, C++, C#) stay.
    """
    text = unicodedata.normalize("NFKD", text.casefold()).translate(_DROPPED).replace("&", " and ")
    text = _MARKS.sub("", text).translate(_SPACED)
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _in_front(title: str) -> str:
    """`Kid, The` as `The Kid`."""
    behind = _ARTICLE_BEHIND.fullmatch(title)
    if behind is None:
        return title
    space = "" if behind[2].endswith("'") else " "
    return f"{behind[2]}{space}{behind[1]}"


def _core(title: str) -> str:
    text = normal(_in_front(title))
    return text.removeprefix("the ")


def _parts(text: str) -> _Parts:
    behind = _BEHIND_YEAR.fullmatch(text)
    title = behind[1] if behind else text
    year, notes, kept = None, set(), ""
    while (bracket := _BRACKET.fullmatch(title)) is not None:
        title, inside = bracket[1], bracket[2]
        years = _YEAR.findall(inside)
        if years and year is None:
            year, inside = int(years[0]), _YEAR.sub(" ", inside)
        if _NUMBER_NOTE.fullmatch(inside):
            kept = f"{inside} {kept}"
        elif note := normal(inside):
            notes.add(note)
    subtitle = _SUBTITLE.fullmatch(title)
    head = _core(subtitle[1]) if subtitle else ""
    undated = normal(" ".join([_in_front(title), kept, *sorted(notes)]))
    whole = f"{undated} {year}" if year else undated
    core = normal(f"{_core(title)} {kept}")
    return _Parts(whole, undated, core, year, frozenset(notes), head)


def clean(text: str) -> str:
    """A title without the quotes and the emphasis around it."""
    text = _EMPHASIS.sub(r"\1", " ".join(text.replace("**", "").split()))
    while text:
        bare = text.strip("*_ ")
        if len(bare) > 1 and bare[0] in _QUOTES and bare[-1] in _QUOTES:
            bare = bare[1:-1]
        if bare == text:
            break
        text = bare
    return text


class TitleIndex:
    """The titles of a catalogue."""

    def __init__(self, titles: Sequence[str | None], about: Sequence[str] = ()) -> None:
        """Index the items that have a title.

        Args:
          titles: [I] of each item; None or empty without one.
          about: [I] other texts of each item, such as its categories and its author.
        """
        self._about = [f" {normal(text)} " for text in about] or [""] * len(titles)
        self._parts: dict[int, _Parts] = {}
        self._meant: dict[tuple[str, bool], Match] = {}  # lists of many users repeat titles
        self._exact: dict[str, list[int]] = collections.defaultdict(list)
        self._whole: dict[str, list[int]] = collections.defaultdict(list)
        self._core: dict[str, list[int]] = collections.defaultdict(list)
        self._head: dict[str, list[int]] = collections.defaultdict(list)
        for item, title in enumerate(titles):
            if not title or not title.strip():
                continue
            text = " ".join(title.split())
            parts = self._parts[item] = _parts(text)
            self._exact[text].append(item)
            self._whole[parts.whole].append(item)
            self._core[parts.core].append(item)
            self._head[parts.head].append(item)
        for index in (self._whole, self._core, self._head):
            index.pop("", None)

    @classmethod
    def of(cls, dataset: Dataset) -> TitleIndex:
        """The titles of a dataset's items."""
        columns = (dataset.items.column(name).to_pylist() for name in ("categories", "text"))
        about = [
            " ".join(filter(None, [*(categories or ()), text]))
            for categories, text in zip(*columns, strict=True)
        ]
        return cls(dataset.items.column("title").to_pylist(), about)

    def match(self, titles: Sequence[str], *, subtitles: bool = False) -> list[Match]:
        """What each title of one list means.

        An author behind a title (`Dune by Frank Herbert`, `Dune - Frank Herbert`) is left out
        where the item's own texts name it, or where four in five titles of a list have one (behind
        a dash all), five or more before which different titles stand: else `Alien - Resurrection`
        would be Alien.

        Args:
          titles: of a list.
          subtitles: a title also means the only item that has it before a subtitle, whose year
            need not be told: Sapiens is `Sapiens: A Brief History of Humankind`. Wrong where the
            list means `Mad Max` and the catalogue has `Mad Max: Fury Road` alone.
        """
        cleaned = [self._written(title) for title in titles]
        tails = {kind: [_without_tail(text, kind) for text in cleaned] for kind in _TAILS}
        dressed = {kind for kind, split in tails.items() if _are_authors(cleaned, split, kind)}
        matches = []
        for place, text in enumerate(cleaned):
            match = self._match(text, subtitles)
            for kind, split in tails.items():
                head_tail = split[place]
                if match.how not in ("absent", "shortened") or head_tail is None:
                    continue
                head, tail = head_tail
                held = self._match(head, subtitles)
                if kind in dressed or self._knows(held.item, tail):
                    match = held
            matches.append(match)
        return matches

    def _written(self, title: str) -> str:
        """A title without emphasis, unless a catalogue has it so: *NSYNC."""
        text = " ".join(title.split())
        return text if text in self._exact else clean(text)

    def _knows(self, item: int, tail: str) -> bool:
        """Whether an item's own texts name what stands behind a title."""
        text = normal(tail)
        return item >= 0 and bool(text) and f" {text} " in self._about[item]

    def _match(self, text: str, subtitles: bool) -> Match:
        key = (text, subtitles)
        if key not in self._meant:
            self._meant[key] = self._look_up(text, subtitles)
        return self._meant[key]

    def _look_up(self, text: str, subtitles: bool) -> Match:
        if items := self._exact.get(text):
            return _only(items, "exact")
        parts = _parts(text)
        if items := self._whole.get(parts.whole):
            return _only(items, "normalised")
        if items := self._fitting(self._core.get(parts.core, ()), parts):
            return _only(items, "normalised")
        return self._by_subtitle(parts, subtitles)

    def _fitting(self, items: Iterable[int], said: _Parts) -> list[int]:
        """Those of the items of which year and brackets do not speak against a title.

        The same year goes before none, unless the item without one has the same words: `The
        Alien (1979)` may be `The Alien` or `Alien (1979)`.
        """
        fitting = [item for item in items if self._has_notes(item, said.notes)]
        if said.year is None:
            return fitting
        same = [item for item in fitting if self._parts[item].year == said.year]
        undated = [item for item in fitting if self._parts[item].year is None]
        if same:
            undated = [item for item in undated if self._parts[item].undated == said.undated]
        return same + undated

    def _has_notes(self, item: int, notes: frozenset[str]) -> bool:
        known = self._parts[item].notes
        return all(note in known or self._knows(item, note) for note in notes)

    def _by_subtitle(self, parts: _Parts, subtitles: bool) -> Match:
        """A title without the subtitle of the item, or with one that the item lacks."""
        longer = self._fitting(self._head.get(parts.core, ()), parts)
        shorter = [
            item
            for item in self._fitting(self._core.get(parts.head, ()), parts)
            if parts.year is not None and self._parts[item].year == parts.year
        ]
        items = sorted({*longer, *shorter})
        if len(items) != 1:
            return _only(items, "subtitle")
        same_year = parts.year is not None and self._parts[items[0]].year == parts.year
        return Match(items[0], "subtitle") if subtitles or same_year else Match(-1, "shortened")


def _only(items: Sequence[int], how: str) -> Match:
    if not items:
        return Match(-1, "absent")
    return Match(items[0], how) if len(items) == 1 else Match(-1, "ambiguous")


def _without_tail(text: str, kind: str) -> tuple[str, str] | None:
    """(title with its year, what stands behind it); None without a tail."""
    bracket = _BRACKET.fullmatch(text)
    year = ""
    if bracket and re.fullmatch(_YEAR.pattern, bracket[2].strip()):
        text, year = bracket[1], f" ({bracket[2].strip()})"
    tailed = _TAILS[kind].fullmatch(text)
    return (clean(tailed[1]) + year, tailed[2]) if tailed else None


def _are_authors(texts: Sequence[str], split: Sequence[tuple[str, str] | None], kind: str) -> bool:
    """Whether the tails of a list are authors: most have one, and one title has not several."""
    tailed = {normal(text): held[0] for text, held in zip(texts, split, strict=True) if held}
    heads = {normal(head) for head in tailed.values()}
    share = len(tailed) / max(len({normal(text) for text in texts}), 1)
    return len(tailed) >= _TAILED and share >= _SHARE[kind] and len(heads) == len(tailed)


def counts(how: Mapping[str, int]) -> dict[str, int]:
    """Counts for a manifest, by `HOW` -> how many."""
    return {SAID: sum(how.values()), **{f"{SAID}_{kind}": how.get(kind, 0) for kind in HOW}}


def report(counts: Mapping[str, int]) -> str:
    """A line for people about the counts of a manifest; empty where it counts no titles."""
    total = counts.get(SAID, 0)
    if not total:
        return ""
    words = {
        "exact": "an item's title to the letter",
        "normalised": "but for case, punctuation, accents, The or the year",
        "subtitle": "but for a subtitle",
        "ambiguous": "of two items or more (refused)",
        "shortened": "lack a subtitle of the only such item (refused; --subtitles takes them)",
        "absent": "not in the catalogue",
        "repeated": "named an item again (its first place counts)",
    }
    told = [
        f"{counts[f'{SAID}_{kind}']:,} ({counts[f'{SAID}_{kind}'] / total:.1%}) {words[kind]}"
        for kind in HOW
        if counts.get(f"{SAID}_{kind}")
    ]
    return f"{total:,} titles: " + ", ".join(told)
