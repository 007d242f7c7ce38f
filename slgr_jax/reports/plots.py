"""The picture of an evaluation: one metric by slice, a bar for each run."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.ranking_metrics import Values
from slgr_jax.evaluation.results import MAIN_SLICES, EvaluatedRun
from slgr_jax.files import atomically

# Okabe and Ito's palette: distinct with colour-blindness and in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def drawn_slices(run: EvaluatedRun, part: str) -> Mapping[str, Values]:
    """Slices by name, of the ranking where there is one, else of the rows (metrics `rows_...`)."""
    if part in run.parts:
        return run.parts[part].slices
    slices = run.rows.get(part, {})
    return {
        name: {f"rows_{metric}": value for metric, value in values.items()} | {"n": values["n"]}
        for name, values in slices.items()
    }


def panels(runs: Sequence[EvaluatedRun], part: str) -> list[tuple[str, list[str]]]:
    """(title, slice names) of each panel of the picture, without slices that no user is in."""
    of_runs = [drawn_slices(run, part) for run in runs]
    names = list(dict.fromkeys(name for slices in of_runs for name in slices))
    names = [name for name in names if any(slices.get(name, {}).get("n") for slices in of_runs)]

    groups = (
        ("users and items", lambda name: name in MAIN_SLICES),
        ("users by training history", lambda name: name.startswith("history")),
        ("relevant items by training popularity", lambda name: name.startswith("popularity")),
    )
    out = [(title, [name for name in names if belongs(name)]) for title, belongs in groups]
    return [(title, chosen) for title, chosen in out if chosen]


def _tick(name: str, counts: set[int]) -> str:
    short = name.replace("_", " ")
    if name.startswith(("history", "popularity")):
        short = name.removeprefix("history").removeprefix("popularity").strip()
        short = short.replace("<=", "≤ ").replace(">", "> ").replace("-", "–")
    n = f"{counts.pop():,}" if len(counts) == 1 else "varies"
    return f"{short}\nn = {n}"


def draw(runs: Sequence[EvaluatedRun], metric: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """A picture of `metric` by slice: a row of panels per part, a bar per run; returns its path.

    A bar that is missing has no value (no users, or undefined); n counts the slice's users.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in runs[0].parts or runs[0].rows if panels(runs, part)]
    if not parts:
        raise ConfigError("nothing to draw: no user has relevant items in valid or test")
    layout = [panels(runs, part) for part in parts]

    bars = len(runs)
    width = min(0.85, 0.25 + 0.2 * bars) / bars  # of one bar, in groups
    per_group = max(0.85, 0.24 * bars)  # inches
    groups = max(sum(len(names) for _, names in row) for row in layout)
    legend_rows = -(-bars // 4) if bars > 1 else 0
    height = 3.3 * len(parts) + 0.6 + 0.25 * legend_rows
    figure = Figure(figsize=(max(7.0, 1.2 + per_group * groups), height), layout="constrained")
    FigureCanvasAgg(figure)

    rows = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for part, row, subfigure in zip(parts, layout, rows, strict=True):
        axes = subfigure.subplots(
            1,
            len(row),
            sharey=True,
            squeeze=False,
            gridspec_kw={"width_ratios": [len(names) for _, names in row]},
        )[0]
        for (title, names), axis in zip(row, axes, strict=True):
            _draw_panel(axis, runs, part, metric, names, width)
            if subfigure is rows[0]:
                axis.set_title(title, fontsize=10)
        axes[0].set_ylabel(f"{part} {metric}")

    name = runs[0].dataset.manifest.name
    title = f"{metric} by slice, {name}" + (f": {runs[0].label}" if bars == 1 else "")
    figure.suptitle(title, fontsize=12)
    if bars > 1:
        handles, names = rows[0].axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(bars, 4), frameon=False)
    return atomically(pathlib.Path(path), lambda partial: figure.savefig(partial, dpi=150))


def _draw_panel(
    axis: Any,
    runs: Sequence[EvaluatedRun],
    part: str,
    metric: str,
    names: list[str],
    width: float,
) -> None:
    places = np.arange(len(names))
    for i, run in enumerate(runs):
        slices = drawn_slices(run, part)
        values = [slices.get(name, {}).get(metric) for name in names]
        heights = np.array([np.nan if value is None else value for value in values], float)
        centres = places + (i - (len(runs) - 1) / 2) * width
        color = COLORS[i % len(COLORS)]
        drawn = axis.bar(centres, heights, 0.92 * width, color=color, label=run.label, zorder=2)
        if len(runs) <= 2:
            text = ["" if np.isnan(value) else f"{value:.3f}" for value in heights]
            axis.bar_label(drawn, text, fontsize=7 if len(runs) == 1 else 6, padding=2)

    every = [drawn_slices(run, part) for run in runs]
    counts = [{int(slices[name]["n"] or 0) for slices in every if name in slices} for name in names]
    ticks = [_tick(name, n) for name, n in zip(names, counts, strict=True)]
    axis.set_xticks(places, ticks, fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.margins(y=0.12)
    axis.grid(axis="y", color="0.88", zorder=0)
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)
