"""Pictures of a comparison, from what report.json holds: a column of panels per backbone."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.experiments import results
from slgr_jax.experiments.summary import Row

_MARKERS = "osD^vP*X"
Style = Mapping[str, tuple[str, str]]  # arm -> colour and marker, the same in every picture
FEWEST = 30  # users or rows of a bin that is drawn


def draw(report: Mapping[str, Any], out: pathlib.Path) -> list[str]:
    """Write every picture that the numbers allow; their names.

    Args:
      report: what report.json holds.
      out: directory of the pictures.
    """
    rows = [row for row in report["rows"] if row["primary"]]
    style = _style(report["protocol"]["arms"])
    names = []

    def save(name: str, figure: Any) -> None:
        if figure is not None:
            figure.savefig(out / name, dpi=130)
            names.append(name)

    save("bars.png", _bars(rows, style))
    for bins in ("history", "popularity"):
        save(f"gain_by_{bins}.png", _gains(rows, bins, style))
    save("alpha_by_slice.png", _alpha_by_slice(report["gate"], style))
    save("reliability.png", _reliability(report["gate"], style))
    save("alpha_by_epoch.png", _alpha_by_epoch(report["alpha_by_epoch"], style))
    return names


def _panels(rows: Sequence[Row], width: float, draw_one: Callable[[Any, list[Row]], None]) -> Any:
    """A figure with one panel per backbone of `rows`, drawn by `draw_one`; None without rows."""
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    backbones = list(dict.fromkeys(row["backbone"] for row in rows))

    figure = Figure(figsize=(width, 3.1 * len(backbones) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(backbones), 1, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for backbone, axis in zip(backbones, axes, strict=True):
        draw_one(axis, [row for row in rows if row["backbone"] == backbone])
        axis.set_title(backbone, fontsize=10)
        axis.grid(axis="y", color="0.9", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)

    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 6) or 1,
        frameon=False,
        fontsize=8,
    )
    return figure


def _style(arms: Sequence[str]) -> Style:
    """A ninth arm has the first colour and another marker."""
    from slgr_jax.reports.plots import COLORS

    return {
        arm: (COLORS[i % len(COLORS)], _MARKERS[i // len(COLORS) % len(_MARKERS)])
        for i, arm in enumerate(arms)
    }


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """[n] a number of each row; NaN where it has none."""
    return _numbers([row.get(key) for row in rows])


def _spread(rows: Sequence[Mapping[str, Any]], middle: str) -> np.ndarray:
    """[2, n] lengths of error bars; NaN where there is no interval."""
    centre = _column(rows, middle)
    lengths = np.stack([centre - _column(rows, "low"), _column(rows, "high") - centre])
    return np.maximum(lengths, 0.0)  # of equal seeds, rounding leaves less than 0


def _bars(rows: Sequence[Row], style: Style) -> Any:
    rows = [row for row in rows if row["slice"] in results.MAIN_SLICES]

    def panel(axis: Any, of_backbone: list[Row]) -> None:
        drawn = {row["slice"] for row in of_backbone}
        names = [name for name in results.MAIN_SLICES if name in drawn]
        arms = list(dict.fromkeys(row["arm"] for row in of_backbone))
        width = 0.85 / len(arms)
        for i, arm in enumerate(arms):
            cells = [_cell(of_backbone, arm, name) for name in names]
            centres = np.arange(len(names)) + (i - (len(arms) - 1) / 2) * width
            hatch = None if style[arm][1] == _MARKERS[0] else "//"
            axis.bar(
                centres,
                _column(cells, "mean"),
                0.92 * width,
                yerr=_spread(cells, "mean"),
                error_kw={"elinewidth": 0.8},
                color=style[arm][0],
                hatch=hatch,
                label=arm,
                zorder=2,
            )
        axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.set_ylabel(f"test {of_backbone[0]['metric']}", fontsize=9)

    return _panels(rows, 9.0, panel)


def _cell(rows: Sequence[Row], arm: str, name: str) -> Mapping[str, Any]:
    """The row of an arm and a slice; {} without."""
    return next((row for row in rows if (row["arm"], row["slice"]) == (arm, name)), {})


def _gains(rows: Sequence[Row], bins: str, style: Style) -> Any:
    """Difference to `none` by bin, with its 95 % interval over seeds.

    Bins of fewer than `FEWEST` are left to the table: one user's luck would set the scale.

    Args:
      bins: history or popularity.
    """
    rows = [
        row
        for row in rows
        if row["slice"].startswith(bins)
        and row.get("vs_none")
        and (row.get("rows", row["users"]) or 0) >= FEWEST
    ]

    def panel(axis: Any, of_backbone: list[Row]) -> None:
        names = list(dict.fromkeys(row["slice"] for row in of_backbone))
        arms = list(dict.fromkeys(row["arm"] for row in of_backbone))
        for i, arm in enumerate(arms):
            tests = [_cell(of_backbone, arm, name).get("vs_none") or {} for name in names]
            centres = np.arange(len(names)) + 0.6 * (i - (len(arms) - 1) / 2) / len(arms)
            axis.errorbar(
                centres,
                _column(tests, "difference"),
                yerr=_spread(tests, "difference"),
                color=style[arm][0],
                marker=style[arm][1],
                markersize=4,
                linewidth=1,
                label=arm,
            )
        axis.axhline(0, color="black", linewidth=0.8)

        counts = {row["slice"]: row.get("rows", row["users"]) for row in reversed(of_backbone)}
        ticks = [f"{name.removeprefix(bins).strip()}\nn = {counts[name]:,}" for name in names]
        axis.set_xticks(range(len(names)), ticks)
        axis.set_ylabel(f"{of_backbone[0]['metric']}, gain over none", fontsize=9)
        noun = "users by training items" if bins == "history" else "items by training users"
        axis.set_xlabel(noun, fontsize=9)

    return _panels(rows, 9.0, panel)


def _alpha_by_slice(gates: Sequence[Row], style: Style) -> Any:
    """Bars: mean alpha; black strokes: share of known pairs on which the teacher is right."""

    def panel(axis: Any, of_backbone: list[Row]) -> None:
        names = list(dict.fromkeys(name for gate in of_backbone for name in gate["slices"]))
        width = 0.85 / len(of_backbone)
        for i, gate in enumerate(of_backbone):
            values = [gate["slices"].get(name, {}) for name in names]
            centres = np.arange(len(names)) + (i - (len(of_backbone) - 1) / 2) * width
            axis.bar(
                centres,
                _column(values, "alpha"),
                0.92 * width,
                color=style[gate["arm"]][0],
                label=gate["arm"],
                zorder=2,
            )
            axis.hlines(
                _column(values, "right"),
                centres - width / 2,
                centres + width / 2,
                color="black",
                zorder=3,
                label="teacher right" if i == 0 else None,
            )
        ticks = [name.replace("_", " ") for name in names]
        axis.set_xticks(range(len(names)), ticks, rotation=30 if len(names) > 6 else 0)
        axis.set_ylim(0, 1)
        axis.set_ylabel("alpha", fontsize=9)

    return _panels(gates, 10.0, panel)


def _reliability(gates: Sequence[Row], style: Style) -> Any:
    """How often the teacher is right by alpha; a calibrated gate is on the diagonal."""

    def panel(axis: Any, of_backbone: list[Row]) -> None:
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        for gate in of_backbone:
            x = [bin_["alpha"] for bin_ in gate["reliability"]]
            y = [bin_["right"] for bin_ in gate["reliability"]]
            color, marker = style[gate["arm"]]
            axis.plot(x, y, color=color, marker=marker, markersize=4, label=gate["arm"])
        axis.set_xlabel("alpha", fontsize=9)
        axis.set_ylabel("share of known pairs\nwhere the teacher is right", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)

    return _panels([gate for gate in gates if gate["reliability"]], 4.5, panel)


def _alpha_by_epoch(curves: Sequence[Row], style: Style) -> Any:
    """Mean alpha of the preferences drawn in each epoch."""

    def panel(axis: Any, of_backbone: list[Row]) -> None:
        for curve in of_backbone:
            color, marker = style[curve["arm"]]
            axis.plot(
                curve["epochs"],
                curve["alpha"],
                color=color,
                marker=marker,
                markersize=3,
                linewidth=1,
                label=curve["arm"],
            )
        axis.set_ylim(0, 1)
        axis.set_xlabel("epoch of training, seed 0", fontsize=9)
        axis.set_ylabel("mean alpha", fontsize=9)

    return _panels(curves, 6.0, panel)
