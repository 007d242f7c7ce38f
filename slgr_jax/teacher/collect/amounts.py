"""Numbers as people and LLMs write them: 0.59, .5, 0,59, 59%, 6/10, 59 out of 100, stars, words.

An `Amount` says what was written and on which scale; `to_scores` in `scales.py` maps it to [0, 1].
What could be two things (1,000; 3-4; over 0.9) is no amount.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple


class Amount(NamedTuple):
    """A number and its scale.

    Attributes:
      value: the number.
      scale: `asked` (no unit: on the scale that was asked for), `of` (`value` of `most`), `share`
        (of 1: percent, a word), or `place` (1st, #1: a place in an order).
      most: the m of `k of m`, else 0.
    """

    value: float
    scale: str
    most: float = 0.0


# Words of rating scales, each from 0 (worst) to 1 (best) in equal steps. A phrase is of one scale.
_WORD_SCALES = (
    (("very low",), ("low",), ("medium", "moderate", "average"), ("high",), ("very high",)),
    (
        ("very poor", "terrible"),
        ("poor", "bad"),
        ("fair", "okay", "ok", "average"),
        ("good",),
        ("excellent", "very good"),
    ),
    (
        ("very unlikely", "highly unlikely", "extremely unlikely"),
        ("unlikely",),
        ("neutral", "possible"),
        ("likely",),
        ("very likely", "highly likely", "extremely likely"),
    ),
    (
        ("not at all",),
        ("slightly", "a little"),
        ("somewhat", "moderately"),
        ("very", "very well", "very much"),
        ("perfectly", "extremely", "extremely well"),
    ),
    (
        ("strongly disagree",),
        ("disagree",),
        ("neutral",),
        ("agree",),
        ("strongly agree",),
    ),
)
_NOUNS = re.compile(
    r"\s+(?:match|fit|relevance|interest|preference|likelihood|probability|score|chance|rating)$"
)
_FILLED, _EMPTY, _HALF = "★⭐✭✮🌟", "☆✩", "½⯨⯪"
_STARS = re.compile(f"[{_FILLED}{_EMPTY}{_HALF}\ufe0f]+")
_DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)

NUMBER = r"(?:[0-9]{1,15}(?:[.,][0-9]{1,18})?|\.[0-9]{1,18})(?:[eE][-+]?[0-9]{1,3})?"
# An amount in a text. What precedes it (a sign, #) is told apart from separators by the caller.
AMOUNT = re.compile(
    rf"""(?:(?P<about>[~≈]|about|around|roughly|approximately|approx\.?|ca\.)\s*)?
    (?P<place>\#\s?|(?:rank|place|position|no\.)\s*[:=#]?\s*)?
    (?P<sign>[-+])?(?P<number>{NUMBER})
    (?:
      (?P<ordinal>st|nd|rd|th)\b
      | \s?(?P<percent>%|percent\b|per\scent\b|pct\b)
      | \s*(?:/|\bout\s+of\b|\bof\b)\s*(?P<most>[0-9]{{1,6}}(?:\.0+)?)(?![\w/%]|[.,][0-9])
        (?:\s*-?(?:stars?|points?|pts)\b)?
      | \s*-?(?P<stars>stars?\b|[{_FILLED}])
      | (?:\s*(?:points?|pts)\b)?
    )(?![\w%]|[.,:/][0-9]|[.,]?[^\w\s]{{1,2}}[0-9])""",
    re.VERBOSE | re.IGNORECASE,
)
# Any number that stands alone, to see whether a text holds one.
STANDALONE = re.compile(rf"(?<![\w./])[-+]?{NUMBER}(?!\w)")


def amount_of(match: re.Match[str]) -> Amount | None:
    """What a match of `AMOUNT` says; None where it could be two things."""
    value = _decimal(match["number"])
    if value is None:
        return None
    if match["sign"] == "-":
        value = -value
    if match["ordinal"] or match["place"]:
        return Amount(value, "place") if value == int(value) and value >= 0 else None
    if match["number"].startswith(".") and (match["percent"] or match["most"]):
        return None  # .83% is more often .83 or 83% than 0.0083
    if match["percent"]:
        return Amount(value / 100, "share")
    if match["most"]:
        most = float(match["most"])
        return Amount(value, "of", most) if most > 0 else None
    return Amount(value, "of", 5.0) if match["stars"] else Amount(value, "asked")


def _decimal(text: str) -> float | None:
    """A number with a decimal point or comma; `1,000` could be either and is neither."""
    whole, comma, rest = text.partition(",")
    if comma and len(rest) == 3 and whole.strip("0"):
        return None
    value = float(text.replace(",", "."))
    return value if math.isfinite(value) else None


def read_amount(text: str, *, words: bool = True) -> Amount | None:
    """The amount that a whole text is, such as a table's cell or a string in JSON.

    Args:
      text: may have quotes, emphasis or a full stop around it.
      words: also words of rating scales (`good`, `very likely`).
    """
    plain = text.strip(" \t\r\n\"'*_`()[]").rstrip(".").strip()
    stars = _STARS.fullmatch(plain)
    if stars:
        return _count_stars(plain)
    match = AMOUNT.fullmatch(plain)
    if match:
        return amount_of(match)
    if words and (share := word_share(plain)) is not None:
        return Amount(share, "share")
    return None


def find_stars(text: str) -> re.Match[str] | None:
    """The only run of stars in a text."""
    runs = list(_STARS.finditer(text))
    return runs[0] if len(runs) == 1 else None


def _count_stars(text: str) -> Amount | None:
    filled = sum(text.count(star) for star in _FILLED)
    halves, empty = sum(text.count(half) for half in _HALF), sum(text.count(s) for s in _EMPTY)
    most = filled + halves + empty if empty else 5
    if halves > 1 or not filled + halves + empty or filled + halves > most:
        return None
    return Amount(filled + halves / 2, "of", float(most))


def stars_amount(match: re.Match[str]) -> Amount | None:
    """What a run of stars says: filled of all shown, or of five where no empty one is."""
    return _count_stars(match[0])


def word_share(text: str) -> float | None:
    """0 to 1 of a phrase that is a step of a rating scale; None for anything else."""
    phrase = _NOUNS.sub("", " ".join(text.lower().replace("-", " ").split()))
    shares = {
        step / (len(scale) - 1)
        for scale in _WORD_SCALES
        for step, phrases in enumerate(scale)
        if phrase in phrases
    }
    return shares.pop() if len(shares) == 1 else None


DIGIT_WORDS: Mapping[str, int] = {word: value for value, word in enumerate(_DIGIT_WORDS)}


def about_equal(first: Amount, second: Amount) -> bool:
    """Whether two amounts say the same in two units: 0.8 and 80%, 8/10 and 0.8."""
    return first == second or math.isclose(_share(first), _share(second), abs_tol=1e-9)


def _share(amount: Amount) -> float:
    return amount.value / amount.most if amount.scale == "of" else amount.value
