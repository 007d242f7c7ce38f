"""Sums that do not depend on who has which numbers, against fractions of Python's own."""

from __future__ import annotations

import fractions
import json

import numpy as np
import pytest

from slgr_jax.sampling import moments
from slgr_jax.sampling.moments import Moments


def numbers(seed: int = 0, n: int = 400) -> np.ndarray:
    """Of every size that a float32 has, subnormal ones too, and of both signs."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.integers(-44, 38, n)
    return (rng.standard_normal(n) * sizes).astype(np.float32)


def test_sums_are_exact():
    values = np.append(numbers(), np.float32([0, 2.0**-149, np.finfo(np.float32).max]))
    exact = [fractions.Fraction(float(value)) for value in values]
    of_all = Moments.of(values)
    assert fractions.Fraction(of_all.total, 2**172) == sum(exact)
    assert fractions.Fraction(of_all.squares, 2**344) == sum(value**2 for value in exact)
    assert (of_all.least, of_all.greatest) == (values.min(), values.max())
    assert of_all.mean == float(sum(exact) / len(exact))


def test_they_are_the_same_however_dealt(monkeypatch):
    values = numbers(1)
    of_all = Moments.of(values)
    shuffled = np.random.default_rng(2).permutation(values)
    parts = [Moments.of(part) for part in np.split(shuffled, [0, 7, 300])]
    assert sum(parts, Moments()) == of_all
    monkeypatch.setattr(moments, "_AT_ONCE", 33)
    assert Moments.of(values) == of_all
    # As processes tell each other; one has none.
    texts = [json.dumps(list(vars(part).values())) for part in parts]
    monkeypatch.setattr(moments.cluster, "every", lambda text: texts)
    assert parts[0].of_job() == of_all


def test_mean_and_deviation_are_numpys():
    values = np.random.default_rng(3).random(5000).astype(np.float32)
    of_all = Moments.of(values)
    assert of_all.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-14)
    assert of_all.deviation == pytest.approx(values.std(dtype=np.float64), rel=1e-12)
    alike = Moments.of(np.full(1000, 0.1, np.float32))
    assert alike.deviation == 0.0, "of floats it would not be"
    assert (Moments().mean, Moments().deviation) == (0.0, 0.0)
