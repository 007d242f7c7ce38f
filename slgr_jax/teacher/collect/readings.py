"""What a part of an answer says about a list, and which of several parts holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from slgr_jax.teacher.ask.prompts import label
from slgr_jax.teacher.collect.amounts import Amount


class ListRefused(NamedTuple):
    """Why an answer about a list cannot be read: a key of `refusals.KINDS`, and what was seen."""

    kind: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """Amounts by place, or places in order, the best first.

    Attributes:
      amounts: place -> amount.
      order: places; empty where there are amounts.
      mark: what the answer calls it: final, draft, example, or plain.
      said: how many labels had something beside them that may have been a number.
      section: which part of the answer, between two marks, it is of.
    """

    amounts: Mapping[int, Amount] = dataclasses.field(default_factory=dict)
    order: tuple[int, ...] = ()
    mark: str = "plain"
    said: int = 0
    section: int = 0

    def __bool__(self) -> bool:
        return bool(self.amounts or self.order)

    def __len__(self) -> int:
        return max(len(self.amounts), len(self.order))

    def __str__(self) -> str:
        """`C > A > B`, or `A 0.5, B 0.2`; the first six."""
        if self.order:
            return " > ".join(map(label, self.order[:6])) + (" > ..." if len(self) > 6 else "")
        told = [f"{label(place)} {held.value:g}" for place, held in sorted(self.amounts.items())]
        return ", ".join(told[:6]) + (", ..." if len(self) > 6 else "")

    def marked(self, mark: str | None) -> Reading:
        """The same under another mark, unless that is None."""
        return self if mark is None else dataclasses.replace(self, mark=mark)


def agreed(pairs: Iterable[tuple[int, Amount]]) -> dict[int, Amount]:
    """place -> amount; a place with two different amounts has none."""
    amounts: dict[int, Amount] = {}
    torn = set()
    for place, amount in pairs:
        if amounts.setdefault(place, amount) != amount:
            torn.add(place)
    return {place: amount for place, amount in amounts.items() if place not in torn}


def choose(readings: Sequence[Reading], *, ordered: bool) -> Reading | ListRefused | None:
    """The reading that holds, or why none does; None where there is none.

    The last one that is marked final; else all that are neither drafts nor examples, which must
    agree. What was asked for goes before the other kind: an order where `ordered`, else amounts.

    Args:
      readings: in the order of the text.
      ordered: an order was asked for.
    """
    said = [reading for reading in readings if reading]
    finals = [reading for reading in said if reading.mark == "final"]
    plain = [reading for reading in said if reading.mark == "plain"]
    if not said:
        return None
    if not finals and not plain:
        return ListRefused("only a draft", f"the {said[-1].mark} {said[-1]}, and nothing follows")
    if finals:
        last = max(reading.section for reading in finals)
        return _merged([held for held in finals if held.section == last], ordered=ordered)
    return _merged(plain, ordered=ordered)


def _of_kind(readings: Sequence[Reading], *, ordered: bool) -> list[Reading]:
    asked = [reading for reading in readings if bool(reading.order) == ordered]
    return asked or list(readings)


def _merged(readings: Sequence[Reading], *, ordered: bool) -> Reading | ListRefused:
    asked = _of_kind(readings, ordered=ordered)
    merged = asked[0]
    for reading in asked[1:]:
        joined = _join(merged, reading)
        if joined is None:
            return ListRefused("two readings", f"{merged}; and {reading}")
        merged = joined
    return _with_reverse_check(merged, readings)


def _join(first: Reading, second: Reading) -> Reading | None:
    """Both as one; None where they disagree."""
    if bool(first.order) != bool(second.order):
        return None
    if first.order:
        long, short = sorted((first, second), key=len, reverse=True)
        places = {place: number for number, place in enumerate(long.order)}
        shared = [places[place] for place in short.order if place in places]
        if len(shared) < len(short.order) or shared != sorted(shared):
            return None
        return long
    if any(second.amounts.get(place, amount) != amount for place, amount in first.amounts.items()):
        return None
    return dataclasses.replace(
        first,
        amounts={**first.amounts, **second.amounts},
        said=first.said + second.said,
    )


def _with_reverse_check(chosen: Reading, readings: Sequence[Reading]) -> Reading | ListRefused:
    """`chosen`, unless a reading of the other kind speaks against it.

    An order that was asked for must be that of the scores beside it; scores that were asked for
    hold whatever list stands beside them, unless that turns them around: then one of the two is
    worst first, and nobody can say which.
    """
    for reading in readings:
        scores, order = (reading, chosen) if chosen.order else (chosen, reading)
        shared = [place for place in order.order if place in scores.amounts]
        if any(scores.amounts[place].scale == "place" for place in shared):
            continue
        values = [scores.amounts[place].value for place in shared]
        if chosen.order and values != sorted(values, reverse=True):
            return ListRefused("order against scores", f"{order}; but {scores}")
        if len(values) > 2 and values == sorted(values) and values[0] < values[-1]:
            return ListRefused("order against scores", f"{order}; but {scores}")
    return chosen
