"""Is a gate's alpha what it claims to be, P(the teacher orders this pair correctly)?

Two questions, as for any probability: does alpha put the right statements above the wrong ones
(`auc`), and is the teacher right in a share alpha of the statements given alpha
(`calibration_error`, `reliability_bins`)? A constant alpha can be calibrated and is no selector;
a good order can be far off as a probability.

Shape letters: n judged preferences, B bins.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import click_metrics


@dataclasses.dataclass(frozen=True)
class Bin:
    """Preferences of about one alpha.

    Attributes:
      low, high: least and greatest alpha in the bin.
      alpha: mean alpha.
      right: share that the teacher ordered correctly.
      n: how many preferences.
    """

    low: float
    high: float
    alpha: float
    right: float
    n: int


def _checked(alpha: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha, right = np.asarray(alpha, np.float64), np.asarray(right, np.float64)
    if alpha.shape != right.shape or alpha.ndim != 1:
        raise ConfigError(
            f"alpha has shape {alpha.shape} and right {right.shape}; need one [n] each"
        )
    if not alpha.size:
        raise ConfigError("no preference to judge: alpha and right have length 0")
    for name, values in (("alpha", alpha), ("right", right)):
        bad = ~((values >= 0) & (values <= 1))  # a NaN is bad too
        if bad.any():
            raise ConfigError(f"{name} is {values[bad][0]} at row {bad.argmax()}; need [0, 1]")
    return alpha, right


def auc(alpha: np.ndarray, right: np.ndarray) -> float:
    """P(alpha of a right statement > alpha of a wrong one), ties one half (Mann-Whitney).

    1/2 for any constant alpha; NaN where the teacher is always right, or always wrong.

    Args:
      alpha: [n] in [0, 1].
      right: [n] bool.
    """
    alpha, right = _checked(alpha, right)
    return click_metrics.auc(alpha, right)


def reliability_bins(alpha: np.ndarray, right: np.ndarray, bins: int = 10) -> tuple[Bin, ...]:
    """At most `bins` bins of about n / bins preferences each, by ascending alpha.

    Bins of equal mass, as Naeini et al. 2015 (BBQ): a gate's alpha often lies in a narrow range,
    where bins of equal width would be one. Equal alphas share a bin (the one that the middle of
    their run falls into), so the order of rows does not matter and a constant alpha is one bin.

    Args:
      alpha: [n] in [0, 1].
      right: [n] bool; or the true probability, where it is known.
      bins: B >= 1.
    """
    alpha, right = _checked(alpha, right)
    if bins < 1:
        raise ConfigError(f"bins={bins}; need at least 1")
    values, run, counts = np.unique(alpha, return_inverse=True, return_counts=True)
    twice_middle = 2 * np.cumsum(counts) - counts  # of each run, in ranks
    place = np.minimum(twice_middle * bins // (2 * alpha.size), bins - 1)
    _, place = np.unique(place, return_inverse=True)  # without empty bins
    first = np.flatnonzero(np.append(True, place[1:] != place[:-1]))
    last = np.append(first[1:], values.size) - 1
    owner = place[run]
    n = np.bincount(owner)
    mean_alpha, mean_right = np.bincount(owner, alpha) / n, np.bincount(owner, right) / n
    rows = zip(values[first], values[last], mean_alpha, mean_right, n, strict=True)
    return tuple(Bin(float(a), float(b), float(c), float(d), int(e)) for a, b, c, d, e in rows)


def calibration_error(alpha: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: sum_b n_b / n |mean alpha in b - share right in b|.

    Guo et al. 2017 (arXiv 1706.04599) eq. 3, over the bins of `reliability_bins`. It is never
    quite 0 on a sample: a perfect alpha = p has an error near sqrt(2 p (1 - p) B / (pi n)), which
    is 0.018 at p = 1/2, B = 10, n = 5000.

    Args:
      alpha: [n] in [0, 1].
      right: [n] bool; or the true probability, where it is known.
      bins: B >= 1.
    """
    binned = reliability_bins(alpha, right, bins)
    return sum(b.n * abs(b.alpha - b.right) for b in binned) / sum(b.n for b in binned)


# ---------------------------------------------------------------------- pictures


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> pathlib.Path:
    from slgr_jax.files import atomically

    return atomically(pathlib.Path(path), lambda partial: figure.savefig(partial, dpi=150))


def _diagonal(axis: Any) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=1)
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_aspect("equal")
    axis.grid(color="0.9", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def draw_reliability(
    bins_by_gate: Mapping[str, Sequence[Bin]], path: str | os.PathLike[str], *, title: str = ""
) -> pathlib.Path:
    """The reliability diagram: share right against mean alpha, a line per gate; returns its path.

    On the dashed line alpha is calibrated; below it the teacher is believed too much. Bars are
    95 % intervals (Wilson) of the share right.
    """
    from slgr_jax.reports.plots import COLORS

    figure = _figure(5.2, 5.0)
    axis = figure.subplots()
    _diagonal(axis)
    for i, (name, bins) in enumerate(bins_by_gate.items()):
        n = np.array([bin_.n for bin_ in bins], float)
        right = np.array([bin_.right for bin_ in bins])
        centre, half = _wilson(right, n)
        error = np.maximum(0.0, [right - (centre - half), centre + half - right])
        axis.errorbar(
            [bin_.alpha for bin_ in bins],
            right,
            error,
            color=COLORS[i % len(COLORS)],
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=f"{name} (n = {int(n.sum()):,})",
            zorder=3,
        )
    axis.set_xlabel("mean alpha of the bin")
    axis.set_ylabel("share of preferences the teacher got right")
    axis.set_title(title or "is alpha a probability?", fontsize=11)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return _save(figure, path)


def _wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width of Wilson's score interval of a share."""
    scale = 1 + z**2 / n
    half = z / scale * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (share + z**2 / (2 * n)) / scale, half


def draw_alpha_against_truth(
    alpha: np.ndarray,
    truth: np.ndarray,
    history: np.ndarray,
    popularity: np.ndarray,
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> pathlib.Path:
    """In a world with a known answer: alpha beside the true reliability; returns the path.

    Left: the two against each other, a dot per preference (at most 4000 of them). Then the means
    of both by history length and by popularity: a gate that has found the region follows the
    truth's line.

    Args:
      alpha, truth: [n] in [0, 1].
      history: [n] training interactions of the user.
      popularity: [n] training interactions of the pair, e.g. the mean of its items.
    """
    from slgr_jax.reports.plots import COLORS

    alpha, truth = _checked(alpha, truth)
    figure = _figure(12.0, 4.3)
    cloud, *axes = figure.subplots(1, 3)

    _diagonal(cloud)
    shown = slice(None, None, max(1, -(-alpha.size // 4000)))
    cloud.plot(truth[shown], alpha[shown], ".", color=COLORS[0], markersize=3, alpha=0.3, zorder=2)
    cloud.set_xlabel("true reliability")
    cloud.set_ylabel("alpha")

    facts = (("training history of the user", history), ("popularity of the pair", popularity))
    for axis, (name, fact) in zip(axes, facts, strict=True):
        logs, mean_alpha = _means(np.log1p(fact), alpha)
        _, mean_truth = _means(np.log1p(fact), truth)
        x = np.expm1(logs)
        axis.plot(x, mean_truth, color="0.35", linestyle="--", marker="s", ms=4, label="truth")
        axis.plot(x, mean_alpha, color=COLORS[1], marker="o", ms=4, label="alpha")
        axis.set_xscale("symlog", linthresh=1.0)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel(name)
        axis.grid(color="0.9", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title or "alpha against the true reliability of the teacher", fontsize=12)
    return _save(figure, path)


def _means(places: np.ndarray, values: np.ndarray, bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Mean place and mean value in at most `bins` bins of equal mass; equal places together."""
    edges = np.unique(np.quantile(places, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    _, owner = np.unique(np.searchsorted(edges, places), return_inverse=True)
    n = np.bincount(owner)
    return np.bincount(owner, places) / n, np.bincount(owner, values) / n
