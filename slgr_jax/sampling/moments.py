"""Mean and spread of numbers that several processes have some of each, the same however dealt.

A float32 is a whole number of 2^-172 (the last bit of the least one, 2^-149, and room for its 24
bits), so that sums of them and of their squares are sums of integers: exact, and so of any order.
A sum of floats would depend on it.
"""

from __future__ import annotations

import dataclasses
import fractions
import json
import math

import numpy as np

from slgr_jax import cluster
from slgr_jax.data import shards

_UNIT = 172  # numbers are counted in 2^-172, squares in 2^-344
_BITS = 24  # of a float32's significand
_AT_ONCE = 1 << 20  # float64 sums of this many 24-bit integers are exact


@dataclasses.dataclass(frozen=True)
class Moments:
    """What n numbers come to.

    Attributes:
      count: n.
      total, squares: their sum in 2^-172, and that of their squares in 2^-344.
      least, greatest: of all; infinite of none.
    """

    count: int = 0
    total: int = 0
    squares: int = 0
    least: float = math.inf
    greatest: float = -math.inf

    @classmethod
    def of(cls, numbers: np.ndarray) -> Moments:
        """Args:
        numbers: [n] float32, finite.
        """
        pieces = (numbers[k : k + _AT_ONCE] for k in range(0, numbers.size, _AT_ONCE))
        return sum(shards.on_all_cores(_of_piece, pieces), cls())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    def of_job(self) -> Moments:
        """Those of the numbers of every process of the job, all of whom call this.

        Raises:
          UserError: a process failed meanwhile.
        """
        texts = cluster.every(json.dumps(dataclasses.astuple(self)))
        return sum((Moments(*json.loads(text)) for text in texts), Moments())

    @property
    def mean(self) -> float:
        """The exact mean, rounded; 0 of none."""
        return float(fractions.Fraction(self.total, max(self.count, 1) << _UNIT))

    @property
    def deviation(self) -> float:
        """sqrt(mean of squares - square of mean), of which only the root is rounded; 0 of none."""
        n = max(self.count, 1)
        spread = n * self.squares - self.total**2
        return math.sqrt(fractions.Fraction(spread, n * n << (2 * _UNIT)))


def _of_piece(numbers: np.ndarray) -> Moments:
    significands, exponents = np.frexp(numbers.astype(np.float64))
    whole = np.ldexp(significands, _BITS).astype(np.int64)  # numbers = whole * 2^(exponents - 24)
    shifts = exponents - _BITS + _UNIT  # from 0 on

    def sums(integers: np.ndarray) -> list[int]:
        """Of those with each shift."""
        return [int(total) for total in np.bincount(shifts, integers)]

    squares = whole * whole  # 48 bits: summed in halves
    halves = sums(squares >> _BITS), sums(squares & ((1 << _BITS) - 1))
    return Moments(
        numbers.size,
        sum(total << shift for shift, total in enumerate(sums(whole))),
        sum(
            ((high << _BITS) + low) << 2 * shift
            for shift, (high, low) in enumerate(zip(*halves, strict=True))
        ),
        float(numbers.min()),
        float(numbers.max()),
    )
