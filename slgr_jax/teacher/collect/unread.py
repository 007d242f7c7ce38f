"""What stands in an answer about a list that tells nothing, for whoever is to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from slgr_jax.errors import listing
from slgr_jax.teacher.ask.prompts import label
from slgr_jax.teacher.collect.json_answers import JsonObject
from slgr_jax.teacher.collect.readings import ListRefused
from slgr_jax.teacher.collect.shown import Shown

_LINKS = re.compile(r"\s*(?:-+>|=+>|→|>)\s*")
_COMMAS = re.compile(r"\s*[,;]\s*|\s*\n\s*")
_LIKE_A_LABEL = re.compile(r"[A-Z]{1,2}")
_NAMED = re.compile(r"(?<![\w'’])([A-Z]{1,2})(?![\w'’])")


def explain(text: str, values: Sequence[Any], shown: Shown) -> ListRefused:
    """Why nothing was read.

    Args:
      text: the answer, without thoughts; values: the JSON values in it.
      shown: the candidates that it is about.
    """
    for names in (*_text_lists(values), _LINKS.split(text.strip()), _COMMAS.split(text.strip())):
        if wrong := _wrong_labels(names, shown):
            return ListRefused("labels repeated or unknown", wrong)

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = [held[0] for line in lines if (held := shown.label_with_text(line)) is not None]
    if len(places) > 1 and places == list(range(len(places))) and 2 * len(places) > len(lines):
        return ListRefused("the candidates again", _begins(text))

    named = [name for name in _NAMED.findall(shown.without_titles(text)) if name in shown.places]
    if not named:
        return ListRefused(
            "none of the labels", f"{_labels(shown)} were shown; the answer {_begins(text)}"
        )
    return ListRefused("no scores by label", _begins(text))


def _begins(text: str) -> str:
    return f"begins {' '.join(text.split())[:120]!r}"


def _labels(shown: Shown) -> str:
    return f"{label(0)} to {label(shown.size - 1)}"


def _text_lists(values: Sequence[Any]) -> Iterator[list[str]]:
    """Lists of texts in JSON values."""
    for value in values:
        if isinstance(value, JsonObject):
            yield from _text_lists([held for _, held in value])
        elif isinstance(value, list):
            if len(value) > 1 and all(isinstance(held, str) for held in value):
                yield value
            yield from _text_lists(value)


def _wrong_labels(names: Sequence[str], shown: Shown) -> str:
    """Which of several labels stand twice or are of no candidate; empty where these are none."""
    names = [name.strip(" .*`\"'()[]") for name in names]
    if len(names) < 2 or not all(map(_LIKE_A_LABEL.fullmatch, names)):
        return ""
    known = [name for name in names if name in shown.places]
    twice = sorted({name for name in known if known.count(name) > 1})
    unknown = sorted(set(names) - set(known))
    missing = [name for name in shown.places if name not in known]
    told = [
        f"{listing(group, 6)} {words}"
        for group, words in (
            (twice, "more than once"),
            (unknown, f"where {_labels(shown)} were shown"),
            (missing, "not at all"),
        )
        if group
    ]
    return ", ".join(told) if twice or unknown else ""
