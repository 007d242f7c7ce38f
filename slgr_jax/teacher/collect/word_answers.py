"""Answers of one word: A or B, yes or no, a rating from 1 to 5; or in doubt, none.

What is marked as final goes before the rest, and what a correction follows does not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from slgr_jax.teacher.collect import thoughts
from slgr_jax.teacher.collect.amounts import (
    AMOUNT,
    DIGIT_WORDS,
    Amount,
    amount_of,
    find_stars,
    read_amount,
    stars_amount,
    word_share,
)
from slgr_jax.teacher.collect.json_answers import (
    JsonObject,
    is_score_key,
    json_values,
    plain_key,
)
from slgr_jax.teacher.collect.shown import Shown, normal, plain_characters

YES, NO = frozenset({"yes", "y", "true"}), frozenset({"no", "n", "false"})
_ANSWER_KEYS = frozenset(
    {"answer", "choice", "label", "preference", "preferred", "chosen", "winner", "selected",
     "selection", "option", "pick", "better", "best", "final", "finalanswer", "decision", "result",
     "letter", "recommendation", "candidate", "item", "response", "verdict", "output"}
)  # fmt: skip
_STRESSED = re.compile(r"\*\*(.+?)\*\*|\\boxed\{(.+?)\}")


def _settled(text: str, read: Callable[[str], int | None]) -> int | None:
    """What the part that is marked as final says; without one, what is left of corrections."""
    cues = thoughts.cues(text)
    finals = [cue for cue in cues if cue.kind == "final"]
    if finals and (said := read(text[finals[-1].position :])) is not None:
        return said
    corrections = [cue for cue in cues if cue.kind == "correction" and text[: cue.position].strip()]
    return read(text[corrections[-1].end :] if corrections else text)


def _outside_json(text: str) -> str:
    for value in reversed(list(json_values(text))):
        text = text[: value.start] + "\n" + text[value.end :]
    return text.strip()


# --- A or B ------------------------------------------------------------------------------------

# `A` before another word is an article, unless that word gives a reason.
_LABEL = (
    r"[\"'*(\[]*(B|A(?!\s+(?!because|since|over|as\b|for\b|given)[a-z]))(?![A-Za-z'])"
    r"(?!\s*(?:or|and|nor|/)\s)"
)
_CHOICE = re.compile(
    r"(?:\b(?i:answer|choice|pick|preference|winner|selection|verdict|decision)\b"
    r"(?:\s+(?:is|would be)\s*:?|\s*[:=])"
    rf"|\b(?i:prefers?|chooses?|picks?|selects?|go(?:es)? (?:with|for))\b)\s*{_LABEL}"
)
_NEGATED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot|\bavoid|\bhardly|\bunlikely)\b[^.;,\n]{0,30}\Z",
    re.IGNORECASE,
)


def read_choice(text: str, shown: Shown) -> int | None:
    """0 for A, 1 for B; None where the answer is neither or both."""
    return _settled(thoughts.plain(text), lambda part: _choice(part, shown))


def _choice(text: str, shown: Shown) -> int | None:
    said = {place for voice in _voices(text) for place in _single(voice, shown)}
    for value in json_values(text):
        said |= {place for part in _json_choices(value.value) for place in _single(part, shown)}
    for match in _CHOICE.finditer(text):
        if not _NEGATED.search(text[: match.start()]):
            said.add("AB".index(match[1]))
    links = [link.strip(" .") for link in _outside_json(text).split(">")]
    if len(links) == 2 and {shown.by_label(link) for link in links} == {0, 1}:
        said = {place for place in (shown.by_label(links[0]),) if place is not None}
    return said.pop() if len(said) == 1 else None


def _voices(text: str) -> Iterator[str]:
    """The parts of an answer in which a single label is a choice."""
    plain = _outside_json(text)
    lines = [line for line in plain.splitlines() if line.strip()]
    yield from (plain, *lines[:1], *lines[-1:])
    for match in _STRESSED.finditer(plain):
        yield match[1] or match[2]


def _json_choices(value: Any) -> Iterator[str]:
    """Texts that an object names as the answer; the only text of a list."""
    if isinstance(value, JsonObject):
        for key, held in value:
            if plain_key(key) in _ANSWER_KEYS and isinstance(held, str):
                yield held
            elif held is True and len(plain_key(key)) == 1:  # {"A": true, "B": false}
                yield key
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        yield value[0]


def _single(text: str, shown: Shown) -> set[int]:
    """The candidate that a text names; both where its label and its title disagree."""
    meant = {shown.by_title(text), shown.by_label(text)} - {None}
    if meant:
        return {place for place in meant if place is not None}
    held = shown.label_with_text(plain_characters(text))
    if held is None:
        return set()
    place, rest = held
    if shown.is_of_another(place, rest):
        return {0, 1}
    rest = rest[shown.title_end(place, rest) or 0 :]
    if re.search(r"[0-9]|>|\b[AB]\b(?![a-z'])", re.sub(r"\([0-9]{4}\)", "", rest)):
        return set()
    return {place}


# --- yes or no ---------------------------------------------------------------------------------

_EITHER = re.compile(r"\b(?:yes\s*(?:or|/)\s*no|yes\s*,?\s*and\s+no)\b", re.IGNORECASE)
# A word that is an answer: no other word follows it in its sentence, as in `no doubt`; or it
# begins the text and a subject follows.
_SAID = re.compile(
    r"(?P<before>[^.!?\n]{0,40}?)\b(?P<word>yes|no)\b(?=[\"'”’*_)\]}`]*\s*(?:[.,;:!?\n\-–—(]|\Z))",
    re.IGNORECASE,
)
_BEGINS = re.compile(
    r"\A[\W_]*(?:(?P<yes>yes)\b(?!\s+(?:and|or)\b)|(?P<no>no)\s+(?:they|he|she|it|this|the|i)\b)",
    re.IGNORECASE,
)
_UNSURE = re.compile(r"(?:\bnot|n['’]t|\bnever|\bthan|\bif|\bwhether|\bneither)\W[^.;:,\n]*\Z",
                     re.IGNORECASE)  # fmt: skip


def read_yes_no(text: str) -> int | None:
    """0 for yes, 1 for no; None where the answer is neither or both."""
    return _settled(thoughts.plain(text), _yes_no)


def _yes_no(text: str) -> int | None:
    said = {word for value in json_values(text) for word in _json_yes_no(value.value)}
    plain = _outside_json(text)
    word = normal(plain)
    if word in YES | NO:
        said.add(0 if word in YES else 1)
    if both := _EITHER.search(plain):
        if "and" in both[0].lower():
            return None
        plain = _EITHER.sub(" ", plain)

    if begins := _BEGINS.match(plain):
        said.add(0 if begins["yes"] else 1)
    for match in _SAID.finditer(plain):
        if not _UNSURE.search(match["before"]):
            said.add(0 if match["word"].lower() == "yes" else 1)
    return said.pop() if len(said) == 1 else None


def _json_yes_no(value: Any) -> Iterator[int]:
    if not isinstance(value, JsonObject):
        return
    alone = len(value) == 1
    for key, held in value:
        name = plain_key(key)
        if not (alone or name in _ANSWER_KEYS) or re.search(r"not|dislike|reject|avoid", name):
            continue
        word = str(held).lower().strip(" .!") if isinstance(held, str | bool) else ""
        if word in YES | NO:
            yield 0 if word in YES else 1


# --- 1 to 5 ------------------------------------------------------------------------------------

_OWN_SCALE = re.compile(
    r"\(?\b(?:(?:on|from|using)\s+)?(?:a\s+|the\s+)?(?:scale\s+|range\s+)?(?:of\s+|from\s+)?"
    r"(?:from\s+)?1\s*(?:\([^()]*\)\s*)?(?:-|–|to)\s*5\b(?:\s*\([^()]*\))?\s*(?:scale|points?)?\)?",
    re.IGNORECASE,
)
_OTHER_SCALE = re.compile(
    r"\b(?:scale|range|from|of)\b[^.\n0-9]{0,12}[01]\s*(?:\([^()]*\)\s*)?(?:-|–|to)\s*[0-9]+|"
    r"\b[0-9]+[- ]?point scale",
    re.IGNORECASE,
)
_OUT_OF = re.compile(r"\s*\(?(?:out of|of)\s+(?:five|5)\)?(?:\s+stars)?\.?\Z", re.IGNORECASE)
_LINE = re.compile(
    r"[^\w-]*(?:-\s+)?(?:(?:my|the|overall|final)\s+)*"
    r"(?:(?:rating|score|answer|stars)[^\w-]*(?:is|of)?[^\w-]*(?:-\s+)?)?"
    rf"(?P<amount>{AMOUNT.pattern})[\s\"'*_.)\]}}]*",
    re.VERBOSE | re.IGNORECASE,
)


def read_rating(text: str, shown: Shown) -> int | None:
    """Place 0 to 4 of a rating from 1 to 5; None where it is on another scale or in doubt."""
    plain = thoughts.plain(text)
    for title in shown.texts(0):
        plain = re.sub(re.escape(title), " ", plain, flags=re.IGNORECASE)
    return _settled(plain, _rating)


def _rating(text: str) -> int | None:
    text = _OWN_SCALE.sub(" ", plain_characters(text))
    if _OTHER_SCALE.search(text):
        return None
    amounts = [amount for value in json_values(text) for amount in _json_amounts(value.value)]
    plain = _outside_json(text)
    amounts += _amounts(plain)
    ratings = {_as_rating(amount) for amount in amounts}
    if not amounts and (word := _rating_word(plain)) is not None:
        return word
    return ratings.pop() if len(ratings) == 1 else None


def _json_amounts(value: Any) -> Iterator[Amount | None]:
    if isinstance(value, JsonObject):
        for key, held in value:
            alone = len(value) == 1 or plain_key(key) in _ANSWER_KEYS
            if (is_score_key(key) or alone) and isinstance(held, int | float | str):
                yield read_amount(str(held))


def _amounts(text: str) -> list[Amount | None]:
    """Those that have a line to themselves; without any, all."""
    lines = [match for match in map(_LINE.fullmatch, text.splitlines()) if match]
    alone = [AMOUNT.fullmatch(match["amount"]) for match in lines]
    matches = [match for match in alone if match] or list(AMOUNT.finditer(text))
    stars = find_stars(text)
    shown = [stars_amount(stars)] if stars else []
    return [*map(amount_of, matches), *shown]


def _as_rating(amount: Amount | None) -> int | None:
    """0 to 4 of a whole number from 1 to 5, alone or of five."""
    if amount is None or amount.value not in (1, 2, 3, 4, 5):
        return None
    if amount.scale != "asked" and not (amount.scale == "of" and amount.most == 5):
        return None
    return int(amount.value) - 1


def _rating_word(text: str) -> int | None:
    """`four`, `four out of five`, `perfectly`."""
    word = normal(_OUT_OF.sub("", re.sub(r"\s+stars?\W*\Z", "", text.strip())))
    if 1 <= DIGIT_WORDS.get(word, 0) <= 5:
        return DIGIT_WORDS[word] - 1
    share = word_share(word)
    return None if share is None else round(4 * share)
