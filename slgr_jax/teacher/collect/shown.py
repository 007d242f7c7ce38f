"""What a request showed: which candidate a label or a title in an answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slgr_jax.teacher.ask.prompts import label

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "*": None,
                         "`": None})  # fmt: skip
_SAME_LENGTH = {code: held for code, held in _QUOTES.items() if held is not None}
_MASK = "\ufffb"
_YEAR = re.compile(r"\s*\((?:1[89]|20)[0-9]{2}\)$")
_NOUN = r"(?:(?:item|candidate|option|label|answer|choice|movie|film|book|product)\b\W*)?"
_BARE = re.compile(rf"\W*{_NOUN}([A-Za-z]{{1,3}})\W*", re.IGNORECASE)
_WITH_TEXT = re.compile(
    rf"\W*{_NOUN}([A-Za-z]{{1,3}})(?P<text>[.):\]*]+\s.*|\s+[-–—]\s.*|\s*\(.*)",
    re.DOTALL | re.IGNORECASE,
)


def normal(text: str) -> str:
    """Case, space, quotes, dashes and emphasis made alike: titles are equal where this is."""
    return " ".join(text.translate(_QUOTES).lower().split()).strip(" \"'.,;:")


class Shown:
    """The candidates of one request.

    Attributes:
      size: how many.
      places: label -> place, from 0, as shown.
    """

    def __init__(self, size: int, titles: Sequence[Sequence[str]] = ()) -> None:
        """`titles`: of each candidate the line that the prompt showed, and perhaps its parts that
        stand for it (the title without categories)."""
        self.size = size
        self.places = {label(place): place for place in range(size)}
        self._by_title: dict[str, int | None] = {}
        self._texts: list[list[str]] = []
        for place, texts in enumerate(titles):
            known = {normal(text) for text in texts if normal(text)}
            for text in known:
                # A title of two candidates says nothing.
                self._by_title[text] = None if text in self._by_title else place
            loose = {normal(_YEAR.sub("", text)) for text in texts}
            self._texts.append(sorted((known | loose) - {""}, key=len, reverse=True))

    def by_label(self, text: str) -> int | None:
        """The place that a text which is nothing but a label means."""
        match = _BARE.fullmatch(text.strip())
        return self.places.get(match[1].upper()) if match else None

    def by_title(self, text: str) -> int | None:
        """The place whose title this is, exactly but for case, space and quotes."""
        return self._by_title.get(normal(text))

    def texts(self, place: int) -> list[str]:
        """The texts that stand for a candidate, as `normal` has them, the longest first."""
        return self._texts[place] if place < len(self._texts) else []

    def without_titles(self, text: str) -> str:
        """The text, as long as it was, with marks in place of titles: their words say nothing."""
        lower = text.translate(_SAME_LENGTH).lower()
        if len(lower) != len(text):
            return text
        for titles in self._texts:
            for title in titles:
                start = lower.find(title) if len(title) > 3 else -1
                while start >= 0:
                    end = start + len(title)
                    text = text[:start] + _MASK * len(title) + text[end:]
                    lower = lower[:start] + _MASK * len(title) + lower[end:]
                    start = lower.find(title, end)
        return text

    def title_end(self, place: int, text: str) -> int | None:
        """Where the title of `place` ends that `text` (in plain characters) begins with."""
        if place >= len(self._texts):
            return None
        return next((len(t) for t in self._texts[place] if _begins(text.lower(), t)), None)

    def is_of_another(self, place: int, text: str) -> bool:
        """Whether a text begins with the whole title of another candidate, and not of `place`."""
        if self.title_end(place, text) is not None:
            return False
        lower = text.lower()
        return any(
            other not in (None, place) and len(title) > 3 and _begins(lower, title)
            for title, other in self._by_title.items()
        )

    def label_with_text(self, text: str) -> tuple[int, str] | None:
        """(place, what follows) of a label before a title or comment."""
        match = _WITH_TEXT.fullmatch(text.strip())
        place = self.places.get(match[1].upper()) if match else None
        if match is None or place is None:
            return None
        return place, match["text"].translate(_QUOTES).lstrip(" .):]*-(").strip()

    def resolve(self, texts: Sequence[str]) -> list[int | None] | None:
        """The places that names mean which stand together: all labels, or else all titles.

        Returns:
          A place or None of each; None instead of the list where a label and a title beside it
          mean two candidates, or where labels could be titles.
        """
        labels = [self.by_label(text) for text in texts]
        titles = [self.by_title(text) for text in texts]
        if None not in titles and len(set(titles)) == len(titles):
            return None if None not in labels and labels != titles else titles
        if None not in labels:
            return labels
        if labels.count(None) == len(labels) and titles.count(None) < len(titles):
            return titles
        places = list(labels)
        for number, text in enumerate(texts):
            if titles[number] is not None:
                places[number] = labels[number] if labels[number] == titles[number] else None
            elif places[number] is None and (held := self.label_with_text(text)) is not None:
                place, rest = held
                if self.is_of_another(place, rest):
                    return None
                places[number] = place
        return places


def _begins(text: str, title: str) -> bool:
    return text.startswith(title) and not text[len(title) : len(title) + 1].isalnum()


def plain_characters(text: str) -> str:
    """Quotes and dashes of one kind, no emphasis: as titles are compared."""
    return text.translate(_QUOTES)
