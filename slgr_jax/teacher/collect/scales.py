"""Amounts or an order -> scores in [0, 1]: the scale and direction that were asked for, or none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slgr_jax.errors import InputError
from slgr_jax.teacher.ask.prompts import label
from slgr_jax.teacher.collect.amounts import Amount
from slgr_jax.teacher.collect.readings import Reading
from slgr_jax.teacher.collect.refusals import Refused

Range = tuple[float, float]
OUTSIDE, DOUBT = "outside the score range", "scale in doubt"
_ROUNDING = 1e-6  # of a score that may stand outside
_WIDE = 5.0  # a highest score from which on answers in [0, 1] are of another scale


_END = 0.1  # of the range: answers on a tenth of a scale are on another one
_ENOUGH = 20  # scores that can say so


class ScaleError(ValueError):
    """Numbers that are not on the scale that was asked for; `kind` is a key of `refusals.KINDS`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def to_scores(reading: Reading, shown: int, score_range: Range, *, ordered: bool) -> np.ndarray:
    """[shown] float32 scores in [0, 1], NaN where there is none.

    Place k (from 0) of an order is the score 1 - k / (shown - 1).

    Args:
      reading: what an answer says.
      shown: how many candidates.
      score_range: lowest and highest score asked for; mapped to 0 and 1.
      ordered: an order was asked for: whole numbers without a gap are places.

    Raises:
      ScaleError: the numbers are on another scale, or their direction is in doubt.
    """
    units = {(amount.scale, amount.most) for amount in reading.amounts.values()}
    if len(units) > 1:  # a lost % sign, or 8/10 beside 3/5: nobody knows whether all are meant
        raise ScaleError(DOUBT, "numbers in several units (" + _listed_units(units) + ")")
    order = reading.order or _order_of(reading.amounts, ordered=ordered)
    scores = np.full(shown, np.nan)
    if order:
        scores[list(order)] = 1 - np.arange(len(order)) / max(shown - 1, 1)
        return scores.astype(np.float32)

    if ordered:
        return _ranked(reading, shown)
    _refuse_places(reading.amounts)
    shares = _shares(reading.amounts, score_range)
    _refuse_other_scale(reading.amounts, score_range)
    for place, share in shares.items():
        scores[place] = share
    return np.clip(scores, 0, 1).astype(np.float32)


def _order_of(amounts: Mapping[int, Amount], *, ordered: bool) -> tuple[int, ...]:
    """The order that places tell, from 1 or from 0; empty where the numbers are none."""
    scales = {amount.scale for amount in amounts.values()}
    values = sorted(amount.value for amount in amounts.values())
    counted = len(values) > 0 and values == [values[0] + k for k in range(len(values))]
    if scales == {"place"}:
        if not counted or values[0] not in (0, 1):
            raise ScaleError(DOUBT, f"places {_listed(values)} have gaps or repeat")
        return _ascending(amounts)
    if not ordered or scales != {"asked"} or not counted or values[0] not in (0, 1):
        return ()
    if len(values) == 2 and values[0] == 0:
        raise ScaleError(DOUBT, "0 and 1 can be places or scores")
    return _ascending(amounts)


def _ascending(amounts: Mapping[int, Amount]) -> tuple[int, ...]:
    return tuple(sorted(amounts, key=lambda place: amounts[place].value))


def _ranked(reading: Reading, shown: int) -> np.ndarray:
    """Scores where an order was asked for: their places, ties share the mean."""
    unit = (0.0, 1.0)
    if len(reading.amounts) < min(shown, 2):
        raise ScaleError(DOUBT, "an order was asked for, and a single candidate has a number")
    fractions = any(held.value != int(held.value) for held in reading.amounts.values())
    plain = {held.scale for held in reading.amounts.values()} == {"asked"}
    if plain and not fractions:
        told = _listed(sorted(held.value for held in reading.amounts.values()))
        raise ScaleError(DOUBT, f"an order was asked for, and {told} are no places 1, 2, 3, ...")
    shares = _shares(reading.amounts, unit)
    values = np.array(list(shares.values()))
    above = (values[:, None] < values[None, :]).sum(1)
    ties = (values[:, None] == values[None, :]).sum(1) - 1
    scores = np.full(shown, np.nan)
    scores[list(shares)] = 1 - (above + ties / 2) / max(shown - 1, 1)
    return scores.astype(np.float32)


def _shares(amounts: Mapping[int, Amount], score_range: Range) -> dict[int, float]:
    """place -> its amount in [0, 1].

    Raises:
      ScaleError: one is outside of its scale, or its scale does not map to the one asked for.
    """
    shares = {}
    for place, amount in amounts.items():
        try:
            shares[place] = _share(amount, score_range)
        except ScaleError as error:
            raise ScaleError(error.kind, f"{label(place)}: {error.detail}") from error
    return shares


def _share(amount: Amount, score_range: Range) -> float:
    low, high = score_range
    value, lowest, highest = amount.value, low, high
    if amount.scale == "share":
        lowest, highest = 0.0, 1.0
    elif amount.scale == "of" and amount.most != high:
        if low != 0:
            raise ScaleError(
                DOUBT, f"{value:g} of {amount.most:g} where {low:g} to {high:g} was asked for"
            )
        lowest, highest = 0.0, amount.most
    share = (value - lowest) / (highest - lowest)
    if not -_ROUNDING <= share <= 1 + _ROUNDING:
        if amount.scale == "asked":
            raise ScaleError(OUTSIDE, f"{value:g} is not in {low:g} to {high:g}")
        raise ScaleError(OUTSIDE, f"{value:g} is not in {lowest:g} to {highest:g}")
    return share


def _refuse_places(amounts: Mapping[int, Amount]) -> None:
    """1, 2, 3, ... of three or more candidates may be scores, or places with 1 as the best."""
    values = sorted(amount.value for amount in amounts.values())
    scales = {(amount.scale, amount.most) for amount in amounts.values()}
    if len(values) < 3 or len(scales) > 1 or values[0] not in (0, 1):
        return
    ((scale, most),) = scales
    counted = values == [values[0] + k for k in range(len(values))]
    if counted and (scale == "asked" or (scale == "of" and most == len(values))):
        raise ScaleError(DOUBT, f"{_listed(values)} can be places or scores")


def _refuse_other_scale(amounts: Mapping[int, Amount], score_range: Range) -> None:
    """Numbers in [0, 1] where a wider range was asked for; percents that are shares of one."""
    low, high = score_range
    plain = [amount.value for amount in amounts.values() if amount.scale == "asked"]
    fractions = [value for value in plain if value != int(value)]
    if fractions and high >= _WIDE and low >= 0 and max(plain) <= 1:
        raise ScaleError(DOUBT, f"{_listed(plain)} where {low:g} to {high:g} was asked for")
    percents = [amount.value for amount in amounts.values() if amount.scale == "share"]
    if len(percents) > 1 and 0 < max(percents) <= 0.01 and not math.isclose(max(percents), 0.01):
        raise ScaleError(DOUBT, "all are below 1 percent")


def _listed_units(units: Iterable[tuple[str, float]]) -> str:
    names = {"asked": "without a unit", "share": "percent", "place": "places"}
    return ", ".join(sorted(names.get(scale, f"of {most:g}") for scale, most in units))


def _listed(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:6])
    return shown + (", ..." if len(values) > 6 else "")


# --- the whole of a file -----------------------------------------------------------------------


@dataclasses.dataclass
class ScaleTally:
    """What the scores of listwise answers say about the scale they are on.

    Attributes:
      answers: accepted; refused: outside the range, or of another scale; example: of one.
      lowest, highest: of the accepted scores, in [0, 1]; scores: how many.
    """

    answers: int = 0
    refused: int = 0
    example: str = ""
    lowest: float = 1.0
    highest: float = 0.0
    scores: int = 0

    def add(self, scores: np.ndarray) -> None:
        """Count an accepted answer."""
        given = scores[~np.isnan(scores)]
        self.answers += 1
        self.scores += given.size
        self.lowest = min(self.lowest, float(given.min()))
        self.highest = max(self.highest, float(given.max()))

    def refuse(self, refused: Refused) -> None:
        """Count an answer on another scale; other refusals say nothing."""
        if refused.kind in (OUTSIDE, DOUBT):
            self.refused += 1
            self.example = self.example or refused.detail

    def refuse_other_scale(self, score_range: Range) -> None:
        """Stop before answers on another scale become a product.

        Raises:
          InputError: most answers are outside the range, or all scores are at one end of it.
        """
        low, high = score_range
        asked = f"--score_range={low:g},{high:g}"
        if self.refused > 1 and self.refused > self.answers:
            raise InputError(
                f"{self.refused:,} of {self.refused + self.answers:,} answers are not on the scale "
                f"{asked} ({self.example}); name the lowest and highest score that the prompt asks "
                "for with --score_range=LOWEST,HIGHEST"
            )
        end = "lowest" if self.highest <= _END else "highest" if self.lowest >= 1 - _END else ""
        if end and self.answers > 1 and self.scores >= _ENOUGH:
            raise InputError(
                f"all {self.scores:,} scores are at the {end} end of {asked}; name the scale that "
                "the prompt asks for with --score_range=LOWEST,HIGHEST"
            )
