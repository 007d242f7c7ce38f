"""AUC, calibration bins and error against scikit-learn, closed forms and arithmetic by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from slgr_jax.errors import ConfigError
from slgr_jax.reports import calibration


def judged(seed, n=2000, digits=9):
    """Alpha and what came true, with P(right) = alpha ** 2."""
    rng = np.random.default_rng(seed)
    alpha = np.round(rng.random(n), digits)
    return alpha, rng.random(n) < alpha**2


@pytest.mark.parametrize("digits", [1, 9])
def test_auc_equals_scikit_learn(digits):
    alpha, right = judged(0, digits=digits)
    assert calibration.auc(alpha, right) == pytest.approx(roc_auc_score(right, alpha), abs=1e-14)
    assert calibration.auc(1 - alpha, right) == pytest.approx(1 - calibration.auc(alpha, right))


def test_a_constant_alpha_selects_nothing():
    _, right = judged(1)
    assert calibration.auc(np.full(right.size, 0.3), right) == 0.5
    assert math.isnan(calibration.auc(np.full(3, 0.3), np.ones(3, bool)))


def test_bins_equal_scikit_learn_where_alphas_differ():
    alpha, right = judged(2)
    binned = calibration.reliability_bins(alpha, right, 10)
    share, mean = calibration_curve(right, alpha, n_bins=10, strategy="quantile")
    assert [bin_.n for bin_ in binned] == [200] * 10
    np.testing.assert_allclose([bin_.right for bin_ in binned], share, rtol=1e-12)
    np.testing.assert_allclose([bin_.alpha for bin_ in binned], mean, rtol=1e-12)
    assert all(a.high < b.low for a, b in itertools.pairwise(binned))


def test_bins_by_hand():
    # Ten rows in two bins of five; but the four rows of 0.5 stay together. Their middle rank, 5
    # of 10, belongs to the second bin.
    alpha = np.array([0.5, 0.9, 0.1, 0.5, 0.2, 0.8, 0.5, 0.3, 0.7, 0.5])
    right = np.array([1, 1, 0, 0, 1, 1, 0, 0, 1, 0], bool)
    low, high = calibration.reliability_bins(alpha, right, 2)
    assert (low.low, low.high, low.n) == (0.1, 0.3, 3)
    assert (high.low, high.high, high.n) == (0.5, 0.9, 7)
    assert (low.alpha, low.right) == (pytest.approx(0.2), pytest.approx(1 / 3))
    assert (high.alpha, high.right) == (pytest.approx(4.4 / 7), pytest.approx(4 / 7))
    expected = (3 * (1 / 3 - 0.2) + 7 * (4.4 / 7 - 4 / 7)) / 10
    assert calibration.calibration_error(alpha, right, 2) == pytest.approx(expected)


@pytest.mark.parametrize("digits", [0, 1, 2, 9])
@pytest.mark.parametrize("bins", [1, 7, 10])
def test_bins_hold_every_row_once_in_any_order(digits, bins):
    alpha, right = judged(3, n=501, digits=digits)
    binned = calibration.reliability_bins(alpha, right, bins)
    assert len(binned) <= bins
    assert sum(bin_.n for bin_ in binned) == 501
    for bin_ in binned:
        inside = (alpha >= bin_.low) & (alpha <= bin_.high)
        assert bin_.n == inside.sum()
        assert bin_.alpha == pytest.approx(alpha[inside].mean())
        assert bin_.right == pytest.approx(right[inside].mean())
    order = np.random.default_rng(0).permutation(501)
    again = calibration.reliability_bins(alpha[order], right[order], bins)
    fields = [(b.low, b.high, b.n) for b in binned]
    assert fields == [(b.low, b.high, b.n) for b in again]
    np.testing.assert_allclose([b.right for b in binned], [b.right for b in again])


def test_a_constant_alpha_is_one_bin():
    right = np.arange(100) % 4 == 0
    (bin_,) = calibration.reliability_bins(np.full(100, 0.75), right)
    assert (bin_.n, bin_.right) == (100, 0.25)
    assert calibration.calibration_error(np.full(100, 0.75), right) == 0.5
    assert calibration.calibration_error(np.full(100, 0.25), right) == 0.0


def test_calibration_error_of_a_known_distortion():
    # P(right) = a^2, a uniform: the error is the integral of a - a^2, 1/6.
    alpha, right = judged(4, n=400_000)
    assert calibration.calibration_error(alpha, right, 50) == pytest.approx(1 / 6, abs=0.003)
    # Against the true probability nothing is left to chance but the bins.
    assert calibration.calibration_error(alpha, alpha**2, 50) == pytest.approx(1 / 6, abs=1e-3)
    assert calibration.calibration_error(alpha, alpha) == 0.0


def test_the_error_of_a_perfect_alpha_is_what_the_docstring_says():
    rng = np.random.default_rng(5)
    alpha = 0.5 + 1e-6 * rng.random(5000)  # ten bins; P(right) = 1/2
    errors = [calibration.calibration_error(alpha, rng.random(5000) < alpha) for _ in range(200)]
    assert np.mean(errors) == pytest.approx(math.sqrt(2 * 0.25 * 10 / (math.pi * 5000)), rel=0.06)
    assert np.mean(errors) == pytest.approx(0.018, abs=0.001)


@pytest.mark.parametrize(
    ("alpha", "right", "bins", "message"),
    [
        ([0.5], [1, 0], 10, "alpha has shape (1,) and right (2,)"),
        ([], [], 10, "length 0"),
        ([0.5, 1.5], [1, 0], 10, "alpha is 1.5 at row 1"),
        ([0.5, math.nan], [1, 0], 10, "alpha is nan at row 1"),
        ([0.5, 0.5], [-1, 0], 10, "right is -1.0 at row 0"),
        ([0.5, 0.5], [1, 0], 0, "bins=0; need at least 1"),
    ],
)
def test_refusals(alpha, right, bins, message):
    with pytest.raises(ConfigError) as error:
        calibration.calibration_error(np.array(alpha), np.array(right), bins)
    assert message in str(error.value)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, with what they were saved as."""
    figures, save = [], calibration._save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(calibration, "_save", keep)
    return figures


def test_the_diagram_shows_the_bins_and_wilson_intervals(tmp_path, drawn):
    alpha, right = judged(6, n=400)
    bins = calibration.reliability_bins(alpha, right, 5)
    path = calibration.draw_reliability({"one": bins, "two": bins[:2]}, tmp_path / "a" / "r.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    axis = drawn[0].axes[0]
    line, caps = axis.containers[0][0], axis.containers[0][1]
    np.testing.assert_allclose(np.array(line.get_xdata(), float), [bin_.alpha for bin_ in bins])
    np.testing.assert_allclose(line.get_ydata(), [bin_.right for bin_ in bins])
    for bin_, low, high in zip(bins, caps[0].get_ydata(), caps[1].get_ydata(), strict=True):
        test = stats.binomtest(round(bin_.right * bin_.n), bin_.n)
        expected = test.proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["one (n = 400)", "two (n = 160)"]


def test_alpha_against_truth_shows_means_by_history_and_popularity(tmp_path, drawn):
    rng = np.random.default_rng(7)
    history = rng.choice([1, 5, 50], 3000)
    truth, alpha = np.where(history > 5, 0.5, 0.9), rng.random(3000)
    path = calibration.draw_alpha_against_truth(
        alpha, truth, history, rng.random(3000) * 100, tmp_path / "t.png"
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    by_truth, by_alpha = drawn[0].axes[1].get_lines()
    np.testing.assert_allclose(by_truth.get_xdata(), [1, 5, 50])
    np.testing.assert_allclose(by_truth.get_ydata(), [0.9, 0.9, 0.5])
    expected = [alpha[history == h].mean() for h in (1, 5, 50)]
    np.testing.assert_allclose(by_alpha.get_ydata(), expected)
