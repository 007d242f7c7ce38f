"""Is one run better than another? Paired tests over users or seeds, intervals, corrections.

Differences are a - b of the same user (or seed), so positive means that `a` is greater.
scipy.stats takes as long to import as JAX: it is, when a test needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from slgr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One paired comparison of `a` with `b`.

    Attributes:
      n: pairs in which both are defined.
      mean_a, mean_b: over those pairs.
      difference: mean of a - b.
      low, high: bootstrap interval of `difference`.
      p_t: two-sided paired t-test.
      p_sign_flip: two-sided permutation test that flips the sign of each difference.
      p_wilcoxon: two-sided Wilcoxon signed-rank test; differences of 0 are left out.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_t: float
    p_sign_flip: float
    p_wilcoxon: float


def _pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ConfigError(f"paired values have shapes {a.shape} and {b.shape}; need one [n] each")
    defined = ~(np.isnan(a) | np.isnan(b))
    return a[defined], b[defined]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level={level} must be between 0 and 1; .95 is usual")


def _alike(values: np.ndarray) -> bool:
    """Whether values are one but for rounding: SciPy divides by their deviation, and warns."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values[0]))


def paired_t(differences: np.ndarray) -> float:
    """Two-sided p of the paired t-test: the mean of `differences` [n] is 0.

    1.0 if all are 0; NaN with fewer than two.
    """
    from scipy import stats as scipy_stats

    d = np.asarray(differences, np.float64)
    if d.size < 2:
        return float("nan")
    if _alike(d):
        return 1.0 if d[0] == 0 else 0.0
    return float(scipy_stats.ttest_1samp(d, 0.0).pvalue)


def wilcoxon(differences: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; zeros are left out, ties get mean ranks.

    1.0 if all are 0; NaN without any difference.
    """
    from scipy import stats as scipy_stats

    d = np.asarray(differences, np.float64)
    if not d.size:
        return float("nan")
    d = d[d != 0]
    return float(scipy_stats.wilcoxon(d).pvalue) if d.size else 1.0


def sign_flip(differences: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the permutation test that flips the sign of each difference [n].

    Under the hypothesis of no effect a and b may swap places in any pair. All 2^n flips are
    tried if there are no more than `resamples`, else that many are drawn; a drawn p counts
    the observed flip, so it is at least 1 / (resamples + 1). NaN without any difference.

    The same test as `scipy.stats.permutation_test` of one sample, whose flips take seven times
    as long: it sorts random numbers, here a flip is one random bit.
    """
    d = np.asarray(differences, np.float64)
    if not d.size:
        return float("nan")
    observed = abs(d.sum()) * (1 - 1e-12)  # rounding must not turn an equal sum into a smaller one
    if d.size < 63 and 2**d.size <= resamples:
        flips = (np.arange(2**d.size)[:, None] >> np.arange(d.size)[None, :]) & 1
        return float(np.mean(np.abs((1 - 2 * flips) @ d) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for begin in range(0, resamples, _rows(d.size)):
        rows = min(_rows(d.size), resamples - begin)
        signs = 1.0 - 2.0 * rng.integers(0, 2, (rows, d.size), np.int8)
        extreme += int(np.sum(np.abs(signs @ d) >= observed))
    return (extreme + 1) / (resamples + 1)


def max_sign_flip(differences: np.ndarray, *, resamples: int = 1999, seed: int = 0) -> list[float]:
    """One-sided p of each of m paired comparisons, corrected for all of them.

    The test of `sign_flip` on the greatest of the standardised sums z_j = sum_i d_ij / sqrt(sum_i
    d_ij^2): a user's differences [m] change sign together, so that what the comparisons have in
    common (the same `b`, for instance) is not corrected for twice. p_j is the share of flips, the
    observed one among them, in which max_j z_j is at least the observed z_j: the single-step maxT
    method of Westfall and Young (1993), which holds the family-wise error.

    Args:
      differences: [n, m] of n users, without NaN; small p where a column's mean is above 0.

    Returns:
      [m] p-values; 1.0 where all differences are 0.
    """
    d = np.asarray(differences, np.float64)
    norms = np.sqrt((d**2).sum(axis=0))
    scaled = np.divide(d, norms, out=np.zeros_like(d), where=norms > 0)
    observed = scaled.sum(axis=0)
    observed -= 1e-12 * np.abs(observed)  # rounding must not turn an equal sum into a smaller one
    rng, extreme = np.random.default_rng(seed), np.zeros(d.shape[1], np.int64)
    for begin in range(0, resamples, _rows(len(d))):
        rows = min(_rows(len(d)), resamples - begin)
        signs = 1.0 - 2.0 * rng.integers(0, 2, (rows, len(d)), np.int8)
        greatest = (signs @ scaled).max(axis=1)
        extreme += (greatest[:, None] >= observed).sum(axis=0)
    p = (extreme + 1) / (resamples + 1)
    return [float(value) for value in np.where(norms > 0, p, 1.0)]


def t_interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of `values` [n]: mean -+ t_{n-1} sd / sqrt(n).

    NaNs with fewer than two.
    """
    from scipy import stats as scipy_stats

    _check_level(level)
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return float("nan"), float("nan")
    if _alike(x):
        return float(x[0]), float(x[0])
    low, high = scipy_stats.ttest_1samp(x, 0.0).confidence_interval(level)
    return float(low), float(high)


def bootstrap_interval(
    differences: np.ndarray, *, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `differences` [n]; NaNs without any."""
    from scipy import stats as scipy_stats

    _check_level(level)
    d = np.asarray(differences, np.float64)
    if d.size < 2:  # SciPy refuses a single value, whose resamples are all itself
        value = float(d[0]) if d.size else float("nan")
        return value, value

    low, high = scipy_stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        batch=_rows(d.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def _rows(n: int) -> int:
    """Resamples of `n` values to hold at once: about 32 MiB."""
    return max(1, (1 << 22) // max(n, 1))


def compare(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, resamples: int = 999, seed: int = 0
) -> Comparison:
    """Everything about a - b over users or seeds.

    Args:
      a, b: [n] values of the same users (seeds); a pair with a NaN is left out.
      level: of the interval.
      resamples: of the interval and of the sign-flip test.
      seed: of both.
    """
    a, b = _pairs(a, b)
    d = a - b
    low, high = bootstrap_interval(d, level=level, resamples=resamples, seed=seed)
    mean_a, mean_b, mean = (float(np.mean(x)) if x.size else float("nan") for x in (a, b, d))
    return Comparison(
        n=int(d.size),
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean,
        low=low,
        high=high,
        p_t=paired_t(d),
        p_sign_flip=sign_flip(d, resamples=resamples, seed=seed),
        p_wilcoxon=wilcoxon(d),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: reject where below the level, and the family-wise error holds.

    A NaN stays a NaN and is not counted as a test.
    """
    p = np.asarray(p_values, np.float64)
    tested = np.flatnonzero(~np.isnan(p))

    # The k-th smallest of m counts for m - k + 1 tests, and none is below a smaller one.
    order = tested[np.argsort(p[tested], kind="stable")]
    out = np.full(p.size, np.nan)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1.0)
    return [float(value) for value in out]
