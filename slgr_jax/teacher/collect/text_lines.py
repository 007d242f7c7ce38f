"""One line of free text: a label, perhaps its title, and the number that stands with it.

    A: 0.9    - **B** = .5    (C) 59%    D. Heat (1995) — 6/10    E | 0,4    f: 59 out of 100

A title is cut out before numbers are looked for. Where more than one number is left, or a number
with nothing that ties it to the label, the line is unclear: what it says is not guessed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from slgr_jax.teacher.collect.amounts import (
    AMOUNT,
    STANDALONE,
    Amount,
    about_equal,
    amount_of,
    find_stars,
    stars_amount,
    word_share,
)
from slgr_jax.teacher.collect.shown import Shown, plain_characters

_SCORE_WORD = (
    r"(?:(?:the\s+|a\s+|an\s+|my\s+)?(?:final\s+|match\s+|overall\s+)?(?:score|rating|probability|"
    r"relevance|likelihood|match)\s*(?:of|is|for)?)"
)
_BULLET = r"\s*(?:(?:[-•·+>|#]+|\(?(?P<number>[0-9]{1,3})[.)\]:]|(?P<rank>[0-9]{1,3})\s*\|)\s+)*"
_NOUN = (
    r"(?:(?:the\s+)?(?:item|candidate|option|label|letter|answer|choice|movie|film|book|product|"
    rf"{_SCORE_WORD}\s*(?:for|of)?)\b[\s:=#-]*)?"
)
_HEAD = re.compile(
    rf"{_BULLET}[^\w\n]{{0,4}}(?P<noun>{_NOUN})[\"'(\[]*(?P<label>[A-Za-z]{{1,3}})(?![A-Za-z0-9])"
    r"(?P<close>[\"')\]}]*)",
    re.IGNORECASE,
)
_LINK = r"(?:is|gets?|has|scores?|scored|rated|receives?|at|with)(?:\s+(?:a|an|the))?"
_STRONG = r"(?:[-=]+>|[:=|→⇒\t;,]|-(?!>))"
_SEPARATOR = re.compile(
    rf"(?:'s\b)?\s*(?P<sep>{_STRONG}|[.)](?=\s)|\b{_LINK}\b)?[\s|:=]*(?:{_SCORE_WORD}\s*[:=]?)?"
    r"[\s\"'(\[]*",
    re.IGNORECASE,
)
_ENDS = re.compile(
    rf"(?:[:=|→(-]|\b(?:score|rating|so|thus)\b)[\s\"'(\[]*(?P<amount>{AMOUNT.pattern})"
    r"[\s\"'.)\],|}}]*\Z",
    re.VERBOSE | re.IGNORECASE,
)
_LISTED = re.compile(r"\A\W*(?:[0-9]{1,3}[.)\]:]\s+)?")
_YEAR = re.compile(r"\(\s*(?:1[89]|20)[0-9]{2}\s*\)")
_NEXT = re.compile(
    r"(?:[,;|/>]\s*|\s+(?:and\s+)?)(?=[\"'(\[{]*(?P<label>[A-Za-z]{1,3})"
    r"(?:[\"')\]}]*\s*(?:[:=→(]|-\s|=>)|[\"'],))"
)
_PREFIX = re.compile(r"\A[^0-9:{}\[\]]{0,60}[:{]\s*(?=[\"'(\[{]*[A-Za-z]{1,3}[\"')\]}]*\s*[:=→])")


class Line(NamedTuple):
    """What a line, or a part of it, says of one candidate.

    Attributes:
      place: of the candidate.
      amount: its number; None where there is none or where it is unclear.
      unclear: there are numbers, and which one is meant is not clear.
      conflict: the title beside the label is of another candidate.
      number: of a numbered list; None without.
      titled: its title was beside the label.
      bare: nothing but the label (and its title, and a list's number).
      lower: the label is in lower case.
      rest: what follows label and title.
    """

    place: int
    amount: Amount | None
    unclear: bool
    conflict: bool
    number: int | None
    titled: bool
    bare: bool
    lower: bool
    rest: str


def read_line(text: str, shown: Shown) -> list[Line]:
    """What a line says of each candidate that it names at its start, or one after the other."""
    plain = " ".join(plain_characters(text).replace("\t", " | ").split())
    alone = _LISTED.sub("", plain)
    if shown.by_title(alone) is not None and shown.by_label(alone) is None:
        return []  # `3. M (1931)`: a title, not label M with a number
    parts = []
    prefix = _PREFIX.match(plain)
    position = prefix.end() if prefix and not _head(plain, shown) else 0
    while position < len(plain):
        line, position = _read_part(plain, position, shown)
        if line is None:
            break
        parts.append(line)
    return parts


def _head(text: str, shown: Shown) -> re.Match[str] | None:
    match = _HEAD.match(text)
    return match if match and match["label"].upper() in shown.places else None


def _read_part(text: str, start: int, shown: Shown) -> tuple[Line | None, int]:
    """One candidate from `start` on, and where the next one begins."""
    head = _head(text[start:], shown)
    if head is None:
        return None, start
    place = shown.places[head["label"].upper()]
    after = start + head.end()
    rest, end = text[after:], len(text)
    title_start, title_end = _title(rest, place, shown)
    for split in _NEXT.finditer(text, after + title_end):
        if split["label"].upper() in shown.places:
            rest, end = text[after : split.start()], split.end()
            break
    line = _line(head, place, rest, title_start, title_end, shown)
    return line, end


def _title(rest: str, place: int, shown: Shown) -> tuple[int, int]:
    """Where the title of `place` begins and ends in what follows its label; (0, 0) without."""
    gap = len(rest) - len(rest.lstrip(" .:)]|-(\"'"))
    end = shown.title_end(place, rest[gap:])
    return (gap, gap + end) if end is not None and gap else (0, 0)


def _line(
    head: re.Match[str], place: int, rest: str, title_start: int, title_end: int, shown: Shown
) -> Line:
    number = head["number"] or head["rank"]
    titled = title_end > 0
    conflict = not titled and shown.is_of_another(place, rest.lstrip(" .:)]|-(\"'"))
    if titled:
        # Categories and a year behind the title are part of what was shown.
        rest = re.sub(r"\A[\"')\]]*(?:\s*\([^()0-9]*\)|\s*\([0-9]{4}\))*", "", rest[title_end:])
    lower = head["label"].islower()
    amount, unclear = _amount(rest, head, titled=titled, lower=lower, low_noun=bool(head["noun"]))
    bare = not re.search(r"\w", rest)
    return Line(
        place,
        amount,
        unclear,
        conflict,
        int(number) if number else None,
        titled,
        bare,
        lower,
        rest,
    )


def _amount(
    rest: str, head: re.Match[str], *, titled: bool, lower: bool, low_noun: bool
) -> tuple[Amount | None, bool]:
    """(amount, unclear) of what follows a label and its title."""
    separator = _SEPARATOR.match(rest)
    assert separator is not None  # it can be empty
    value = rest[separator.end() :]
    strong = bool(separator["sep"]) or titled or bool(head["close"].strip("\"'"))
    match = AMOUNT.match(value)
    if match and separator["sep"] == "-" and separator.end() == separator.end("sep"):
        return None, True  # `A -0.2`: a dash or a sign
    if match and (strong or not _tail(value[match.end() :])) and _separated(separator, match, rest):
        if lower and not (low_noun or (strong and separator["sep"] != ".")):
            return None, False
        amount = amount_of(match)
        if amount is not None and _is_alone(value[match.end() :], amount):
            return amount, False
        return None, True
    if strong and (stars := find_stars(rest)) and not _tail(rest[: stars.start()]):
        return stars_amount(stars), False
    numbers = STANDALONE.findall(_YEAR.sub(" ", rest))
    if not numbers:
        share = word_share(value.strip(" \"').]|")) if strong else None
        return (Amount(share, "share") if share is not None else None), False
    last = _ENDS.search(_YEAR.sub(" ", rest))
    if last and len(numbers) == 1 and not lower:
        return _read_end(last), False
    return None, True


def _read_end(match: re.Match[str]) -> Amount | None:
    """The amount at the end of a line."""
    whole = AMOUNT.fullmatch(match["amount"])
    return amount_of(whole) if whole else None


def _tail(text: str) -> str:
    return text.strip(" \t\"'.,;:)]}|(-")


def _separated(separator: re.Match[str], match: re.Match[str], rest: str) -> bool:
    """Something stands between the label and the number: `A5` and `A.5` are no pairs."""
    return separator.end() > 0 or (rest[:1] in "-+" and match["sign"] is not None)


def _is_alone(tail: str, amount: Amount) -> bool:
    """Whether no other number follows, or only the same in another unit: 0.8 (80%)."""
    if re.match(r"\s*(?:-|to|±|\.\.+|or)\s*\.?[0-9]", tail):
        return False
    tail = _YEAR.sub(" ", tail)
    if not STANDALONE.search(tail):
        return True
    others = [amount_of(match) for match in AMOUNT.finditer(tail)]
    return bool(others) and all(
        other is not None and about_equal(other, amount) for other in others
    )
