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


def draw(found: Mapping[str, Any], out: pathlib.Path) -> list[str]:
    """Write every picture that the numbers allow; their names."""
    rows = [row for row in found["rows"] if row["primary"]]
    style = _style(found["protocol"]["arms"])
    names = []

    def save(name: str, figure: Any) -> None:
        if figure is not None:
            figure.savefig(out / name, dpi=130)
            names.append(name)

    save("bars.png", _bars(rows, style))
    for what in ("history", "popularity"):
        save(f"gain_by_{what}.png", _gains(rows, what, style))
    save("alpha_by_slice.png", _alpha_by_slice(found["gate"], style))
    save("reliability.png", _reliability(found["gate"], style))
    save("alpha_by_epoch.png", _alpha_by_epoch(found["alpha_by_epoch"], style))
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
        *(handles.values(), handles.keys()),
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


def _spread(found: Sequence[Mapping[str, Any]], middle: str) -> np.ndarray:
    """[2, n] lengths of error bars; NaN where there is no interval."""
    at, low, high = (_numbers([one.get(key) for one in found]) for key in (middle, "low", "high"))
    return np.stack([at - low, high - at])


def _bars(rows: Sequence[Row], style: Style) -> Any:
    rows = [row for row in rows if row["slice"] in results.MAIN_SLICES]

    def panel(axis: Any, mine: list[Row]) -> None:
        names = [s for s in results.MAIN_SLICES if any(row["slice"] == s for row in mine)]
        arms = list(dict.fromkeys(row["arm"] for row in mine))
        width = 0.85 / len(arms)
        for i, arm in enumerate(arms):
            found = [_one(mine, arm, name) for name in names]
            at = np.arange(len(names)) + (i - (len(arms) - 1) / 2) * width
            hatch = None if style[arm][1] == _MARKERS[0] else "//"
            axis.bar(
                *(at, _numbers([one.get("mean") for one in found]), 0.92 * width),
                yerr=_spread(found, "mean"),
                error_kw={"elinewidth": 0.8},
                color=style[arm][0],
                hatch=hatch,
                label=arm,
                zorder=2,
            )
        axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.set_ylabel(f"test {mine[0]['metric']}", fontsize=9)

    return _panels(rows, 9.0, panel)


def _one(rows: Sequence[Row], arm: str, name: str) -> Mapping[str, Any]:
    return next((row for row in rows if (row["arm"], row["slice"]) == (arm, name)), {})


def _gains(rows: Sequence[Row], what: str, style: Style) -> Any:
    """Difference to `none` by bin, with its 95 % interval over seeds.

    Bins of fewer than `FEWEST` are left to the table: one user's luck would set the scale.
    """
    rows = [
        row
        for row in rows
        if row["slice"].startswith(what)
        and row.get("vs_none")
        and (row.get("rows", row["users"]) or 0) >= FEWEST
    ]

    def panel(axis: Any, mine: list[Row]) -> None:
        names = list(dict.fromkeys(row["slice"] for row in mine))
        arms = list(dict.fromkeys(row["arm"] for row in mine))
        for i, arm in enumerate(arms):
            found = [_one(mine, arm, name).get("vs_none") or {} for name in names]
            at = np.arange(len(names)) + 0.6 * (i - (len(arms) - 1) / 2) / len(arms)
            axis.errorbar(
                *(at, _numbers([one.get("difference") for one in found])),
                yerr=_spread(found, "difference"),
                color=style[arm][0],
                marker=style[arm][1],
                markersize=4,
                linewidth=1,
                label=arm,
            )
        axis.axhline(0, color="black", linewidth=0.8)
        counts = [
            next(row.get("rows", row["users"]) for row in mine if row["slice"] == name)
            for name in names
        ]
        ticks = [
            f"{n.removeprefix(what).strip()}\nn = {c:,}" for n, c in zip(names, counts, strict=True)
        ]
        axis.set_xticks(range(len(names)), ticks)
        axis.set_ylabel(f"{mine[0]['metric']}, gain over none", fontsize=9)
        noun = "users by training items" if what == "history" else "items by training users"
        axis.set_xlabel(noun, fontsize=9)

    return _panels(rows, 9.0, panel)


def _alpha_by_slice(gates: Sequence[Row], style: Style) -> Any:
    """Bars: mean alpha; black strokes: share of known pairs on which the teacher is right."""

    def panel(axis: Any, mine: list[Row]) -> None:
        names = list(dict.fromkeys(name for gate in mine for name in gate["slices"]))
        width = 0.85 / len(mine)
        for i, gate in enumerate(mine):
            values = [gate["slices"].get(name, {}) for name in names]
            at = np.arange(len(names)) + (i - (len(mine) - 1) / 2) * width
            color = style[gate["arm"]][0]
            heights = _numbers([one.get("alpha") for one in values])
            axis.bar(at, heights, 0.92 * width, color=color, label=gate["arm"], zorder=2)
            right = _numbers([one.get("right") for one in values])
            axis.hlines(right, at - width / 2, at + width / 2, color="black", zorder=3,
                        label="teacher right" if i == 0 else None)  # fmt: skip
        ticks = [name.replace("_", " ") for name in names]
        axis.set_xticks(range(len(names)), ticks, rotation=30 if len(names) > 6 else 0)
        axis.set_ylim(0, 1)
        axis.set_ylabel("alpha", fontsize=9)

    return _panels(gates, 10.0, panel)


def _reliability(gates: Sequence[Row], style: Style) -> Any:

    def panel(axis: Any, mine: list[Row]) -> None:
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        for gate in mine:
            bins = gate["reliability"]
            x, y = ([one[key] for one in bins] for key in ("alpha", "right"))
            color, marker = style[gate["arm"]]
            axis.plot(x, y, color=color, marker=marker, markersize=4, label=gate["arm"])
        axis.set_xlabel("alpha", fontsize=9)
        axis.set_ylabel("share of known pairs\nwhere the teacher is right", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)

    return _panels([gate for gate in gates if gate["reliability"]], 4.5, panel)


def _alpha_by_epoch(found: Sequence[Row], style: Style) -> Any:

    def panel(axis: Any, mine: list[Row]) -> None:
        for one in mine:
            color, marker = style[one["arm"]]
            axis.plot(one["epochs"], one["alpha"], color=color, marker=marker, markersize=3,
                      linewidth=1, label=one["arm"])  # fmt: skip
        axis.set_ylim(0, 1)
        axis.set_xlabel("epoch of training, seed 0", fontsize=9)
        axis.set_ylabel("mean alpha", fontsize=9)

    return _panels(found, 6.0, panel)
