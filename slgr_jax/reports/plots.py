"""The picture of an evaluation: one metric of every run, overall and where it is hard."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.ranking_metrics import Values
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.files import atomically
from slgr_jax.reports import verdict

# Okabe and Ito's palette: distinct with colour-blindness and in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
RUN, FIRST, BASELINE = COLORS[0], COLORS[4], "#BBBBBB"
SLICES = ("overall", "cold_users", "warm_users", "tail_items")


def drawn_slices(run: EvaluatedRun, part: str) -> Mapping[str, Values]:
    """Slices by name, of the ranking where there is one, else of the rows (metrics `rows_...`)."""
    if part in run.parts:
        return run.parts[part].slices
    slices = run.rows.get(part, {})
    return {
        name: {f"rows_{metric}": value for metric, value in values.items()} | {"n": values["n"]}
        for name, values in slices.items()
    }


def panels(runs: Sequence[EvaluatedRun], part: str, metric: str) -> list[str]:
    """The slices to draw: those of `SLICES` in which some run has a value other than 0."""
    of_runs = [drawn_slices(run, part) for run in runs]
    return [name for name in SLICES if any(slices.get(name, {}).get(metric) for slices in of_runs)]


def draw(runs: Sequence[EvaluatedRun], metric: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """A picture of `metric` on the part that a verdict is about; returns its path.

    A panel a slice, a bar a run: the first run light, with a line at its value, baselines grey. All
    other slices are in metrics.json. A run without a value has no bar.

    Raises:
      ConfigError: no run has a value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    part = verdict.part_of(runs)
    names = panels(runs, part, metric)
    if not names:
        raise ConfigError(f"nothing to draw: {metric} has no value but 0 on the {part} part")

    size = (max(7.0, 1.5 + 2.3 * len(names)), 1.3 + 0.32 * len(runs))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axis in zip(names, axes, strict=True):
        _draw_panel(axis, runs, part, metric, name)
    axes[0].set_yticks(np.arange(len(runs)), [run.label for run in runs], fontsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(f"{part} {metric}, {runs[0].dataset.manifest.name}", fontsize=11)
    return atomically(pathlib.Path(path), lambda partial: figure.savefig(partial, dpi=150))


def _draw_panel(axis: Any, runs: Sequence[EvaluatedRun], part: str, metric: str, name: str) -> None:
    values = [drawn_slices(run, part).get(name, {}).get(metric) for run in runs]
    widths = np.array([np.nan if value is None else value for value in values], float)
    colors = [BASELINE if run.baseline is not None else RUN for run in runs]
    if len(runs) > 1 and runs[0].baseline is None:
        colors[0] = FIRST
        axis.axvline(widths[0], color=FIRST, linewidth=1, linestyle="--", zorder=3)
    bars = axis.barh(np.arange(len(runs)), widths, 0.72, color=colors, zorder=2)
    text = ["" if np.isnan(value) else f"{value:.4f}" for value in widths]
    axis.bar_label(bars, text, fontsize=8, padding=3)

    counts = {int(drawn_slices(run, part).get(name, {}).get("n") or 0) for run in runs}
    n = f"{counts.pop():,}" if len(counts) == 1 else "varies"
    axis.set_title(f"{name.replace('_', ' ')}\nn = {n}", fontsize=9)
    axis.margins(x=0.28)  # room for the numbers
    axis.set_xlim(left=0)
    axis.grid(axis="x", color="0.9", zorder=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
