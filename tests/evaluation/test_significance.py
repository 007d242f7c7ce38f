"""Tests and intervals against SciPy and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import significance


def sample(n: int, shift: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=n)
    return base + shift + rng.normal(size=n), base


@pytest.mark.parametrize(("n", "shift"), [(2, 0.3), (5, -2.0), (200, 0.1)])
def test_paired_t_equals_scipy(n, shift):
    a, b = sample(n, shift)
    assert significance.paired_t(a - b) == pytest.approx(
        scipy_stats.ttest_rel(a, b).pvalue, rel=1e-10
    )


def test_paired_t_of_two_is_a_cauchy_tail():
    # t = mean / (sd / sqrt(2)) = 2, one degree of freedom: P(|T| > 2) = 1 - 2 atan(2) / pi.
    assert significance.paired_t(np.array([1.0, 3.0])) == pytest.approx(
        1 - 2 * np.arctan(2.0) / np.pi
    )


def test_paired_t_of_constant_differences():
    assert significance.paired_t(np.zeros(5)) == 1.0
    assert significance.paired_t(np.full(5, 0.25)) == 0.0
    assert np.isnan(significance.paired_t(np.array([1.0])))


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (10, 0.95), (10, 0.5)])
def test_t_interval_equals_scipy(n, level):
    x = np.random.default_rng(n).normal(size=n) + 0.3
    expected = scipy_stats.t.interval(level, n - 1, x.mean(), scipy_stats.sem(x))
    assert significance.t_interval(x, level=level) == pytest.approx(expected)
    assert significance.t_interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert np.isnan(significance.t_interval(x[:1])).all()
    with pytest.raises(ConfigError, match="level=0"):
        significance.t_interval(x, level=0.0)


def test_wilcoxon_equals_scipy_and_ignores_zeros():
    a, b = sample(30)
    expected = scipy_stats.wilcoxon(a - b).pvalue
    assert significance.wilcoxon(a - b) == pytest.approx(expected)
    assert significance.wilcoxon(np.concatenate([a - b, np.zeros(50)])) == pytest.approx(expected)
    assert significance.wilcoxon(np.zeros(4)) == 1.0
    assert np.isnan(significance.wilcoxon(np.zeros(0)))


def test_sign_flip_enumerates_small_samples():
    d = np.array([0.5, -0.2, 0.9, 0.1, 0.4])
    sums = [
        sum(s * x for s, x in zip(signs, d, strict=True))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    expected = np.mean([abs(total) >= d.sum() - 1e-9 for total in sums])
    assert significance.sign_flip(d) == expected
    trusted = scipy_stats.permutation_test((d,), np.sum, permutation_type="samples")
    assert significance.sign_flip(d) == pytest.approx(trusted.pvalue)
    # All of one sign: only the two extreme flips reach the sum.
    assert significance.sign_flip(np.array([0.1, 0.2, 0.3, 0.7])) == 2 / 2**4


def test_sign_flip_draws_large_samples():
    a, b = sample(400, 0.12)
    expected = scipy_stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).pvalue
    p = significance.sign_flip(a - b, resamples=4000)
    assert 0.002 < expected < 0.5
    assert p == pytest.approx(expected, abs=4 * np.sqrt(expected / 4000))
    assert significance.sign_flip(a - b, resamples=4000) == p
    assert significance.sign_flip(np.ones(400), resamples=99) == 1 / 100
    assert significance.sign_flip(np.zeros(400), resamples=99) == 1.0


def test_bootstrap_interval_is_that_of_resampled_means_and_near_the_normal_form():
    d = np.subtract(*sample(500))
    low, high = significance.bootstrap_interval(d, resamples=4000)
    drawn = np.random.default_rng(0).integers(0, 500, (4000, 500))
    assert (low, high) == pytest.approx(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
    error = np.std(d) / np.sqrt(d.size)
    assert low == pytest.approx(np.mean(d) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(np.mean(d) + 1.96 * error, abs=0.15 * error)
    narrow = significance.bootstrap_interval(d, level=0.5, resamples=4000)
    assert low < narrow[0] < narrow[1] < high
    assert significance.bootstrap_interval(d, resamples=4000) == (low, high)
    assert significance.bootstrap_interval(d, resamples=4000, seed=1) != (low, high)


def test_bootstrap_interval_edges():
    assert significance.bootstrap_interval(np.full(7, 0.5), resamples=10) == (0.5, 0.5)
    assert significance.bootstrap_interval(np.array([0.25])) == (0.25, 0.25)
    assert np.isnan(significance.bootstrap_interval(np.zeros(0))).all()
    with pytest.raises(ConfigError, match="level=1"):
        significance.bootstrap_interval(np.ones(3), level=1.0)


def test_resampling_in_blocks_draws_the_asked_number(monkeypatch):
    d = np.subtract(*sample(50))
    monkeypatch.setattr(significance, "_rows", lambda n: 7)
    low, high = significance.bootstrap_interval(d, resamples=1000)
    assert low < d.mean() < high
    assert significance.sign_flip(np.ones(50), resamples=99) == 1 / 100


def test_compare_pairs_users_and_leaves_out_undefined_ones():
    a, b = sample(40)
    a[3], b[7] = np.nan, np.nan
    defined = np.ones(40, bool)
    defined[[3, 7]] = False
    test = significance.compare(a, b)
    assert test.n == 38
    assert test.mean_a == pytest.approx(a[defined].mean())
    assert test.mean_b == pytest.approx(b[defined].mean())
    assert test.difference == pytest.approx((a - b)[defined].mean())
    assert test.low < test.difference < test.high
    assert test.p_t == pytest.approx(scipy_stats.ttest_rel(a[defined], b[defined]).pvalue)
    back = significance.compare(b, a)
    assert back.difference == -test.difference
    assert back.p_t == test.p_t
    with pytest.raises(ConfigError, match=r"\(3,\) and \(4,\)"):
        significance.compare(np.ones(3), np.ones(4))


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then never falling.
    assert significance.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = significance.holm([0.02, float("nan"), 0.03])
    assert adjusted[0] == pytest.approx(0.04)
    assert np.isnan(adjusted[1])
    assert significance.holm([]) == []


def test_holm_keeps_the_family_wise_error():
    """Under the null, some of 5 tests is rejected at .05 in about 5 % of trials, not 23 %."""
    rng = np.random.default_rng(0)
    trials = rng.random((2000, 5))
    rejected = np.mean([min(significance.holm(list(row))) <= 0.05 for row in trials])
    assert rejected == pytest.approx(0.05, abs=0.015)


# --- several comparisons at once ------------------------------------------------------------------


def test_the_greatest_of_flipped_sums_by_all_flips():
    d = np.random.default_rng(3).normal(0.3, 1.0, (10, 3))
    z = d.sum(axis=0) / np.sqrt((d**2).sum(axis=0))
    flips = np.array(list(itertools.product((1, -1), repeat=10)))
    greatest = (flips @ d / np.sqrt((d**2).sum(axis=0))).max(axis=1)
    exact = (greatest[:, None] >= z * (1 - 1e-12)).mean(axis=0)
    np.testing.assert_allclose(significance.max_sign_flip(d), exact, atol=0.03)
    # A comparison that is there twice is not corrected for twice; one of zeros is none.
    doubled = np.concatenate([d, d, np.zeros((10, 1))], axis=1)
    np.testing.assert_allclose(
        significance.max_sign_flip(doubled)[:3], significance.max_sign_flip(d), atol=0.03
    )
    assert significance.max_sign_flip(doubled)[-1] == 1.0
    assert significance.max_sign_flip(np.zeros((4, 2))) == [1.0, 1.0]


def test_no_effect_is_rejected_one_time_in_twenty_whatever_is_tried():
    rng, rejected, naive = np.random.default_rng(0), 0, 0
    for trial in range(300):
        common = rng.normal(size=(60, 1))
        d = common + rng.normal(size=(60, 8))  # eight arms against one base
        best = min(significance.max_sign_flip(d, resamples=199, seed=trial))
        rejected += best < 0.05
        naive += scipy_stats.ttest_1samp(d, 0, alternative="greater").pvalue.min() < 0.05
    assert rejected / 300 < 0.09
    assert naive / 300 > 0.14


def test_values_that_differ_by_rounding_alone_are_one_value():
    """SciPy warns of them, which is an error here; two seeds come out so now and then."""
    for values in ([0.1, 0.1 * (1 + 3e-16)], [0.1, 0.1 + 1e-15, 0.1 - 1e-15]):
        assert significance.paired_t(np.array(values)) == 0.0
        assert significance.t_interval(np.array(values)) == (0.1, 0.1)
    assert significance.paired_t(np.array([0.1, 0.1 + 1e-10])) > 0.0
