"""Does a training step cost more when the tables grow? It must not touch rows that it does not use.

    python benchmarks/speed/scaling.py --out=scaling.png

Time per triple with 10^4 to 10^7 users (27,000 items) and 10^4 to 10^7 items (138,000 users), the
batch and the number of interactions fixed; synthetic data, one process a size (worker.py); median,
minimum and maximum over --repeats turns of --seconds. Beside it what moving a triple's rows alone
would take: its bytes (as in throughput.py) by the bandwidth of gathering random rows out of a table
as large as the one that grows, up to 2^22 rows. Both rise while a table outgrows the caches; a cost
of O(rows) would rise a thousandfold. As users grow their histories get shorter, and negatives a
little cheaper to draw.

Memory of a row, stated: D values and S optimiser slots as stored, and 4 bytes of scratch while
steps run. Measured: how much more the process or the device held than at the smallest size, by row.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import synthetic
import turns
from absl import flags as absl_flags
from turns import Player

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config import RunConfig, knobs
from slgr_jax.errors import ConfigError, UserError, listing

HERE = pathlib.Path(__file__).parent
FIXED = synthetic.SIZES["large"]  # of the table that does not grow
MOST_GATHERED = 1 << 22
SCRATCH = 4  # bytes a row
LEAST_GROWTH = 100e6  # bytes; below, what compiling leaves behind is more than the rows
Row = dict[str, Any]


def size_of(vary: str, rows: int, interactions: int) -> synthetic.Size:
    """The data with `rows` users or items; users may have no interaction."""
    size = dataclasses.replace(FIXED, interactions=interactions, fewest=0)
    return (
        dataclasses.replace(size, users=rows)
        if vary == "users"
        else (dataclasses.replace(size, items=rows))
    )


def measure(
    size: synthetic.Size, vary: str, base: RunConfig, *, repeats: int, seconds: float
) -> Row:
    """One size: nanoseconds a triple and what the process held."""
    rows = size.users if vary == "users" else size.items
    with tempfile.TemporaryDirectory() as folder:
        synthetic.make(size).save(folder)
        job = {
            "pairs": folder,
            "config": knobs.to_json(dataclasses.replace(base, data=folder)),
            "seconds": seconds,
            "steps": 0,
            "gather_rows": min(rows, MOST_GATHERED),
        }
        with Player([sys.executable, str(HERE / "worker.py")], job) as player:
            taken = [1e9 / player.turn().rate for _ in range(repeats)]
            facts = player.facts | player.finish()
    return {
        "vary": vary,
        "users": size.users,
        "items": size.items,
        "ns_per_triple": statistics.median(taken),
        "min": min(taken),
        "max": max(taken),
        "rows_alone_ns": facts["bytes_per_triple"] / facts["gather_bandwidth"] * 1e9,
        "stated_bytes_per_row": max(facts["row_bytes"].values()) + SCRATCH,
        **facts,
    }


def with_slopes(rows: Sequence[Row]) -> list[Row]:
    """`rows` of one table that grows, with the memory of a row measured against the first."""
    first, out = rows[0], []
    for row in rows:
        more = sum(row[kind] - first[kind] for kind in ("users", "items"))
        grown = (row["state_mb"] - first["state_mb"]) * 1e6
        told = more * row["stated_bytes_per_row"] >= LEAST_GROWTH
        out.append(row | {"measured_bytes_per_row": grown / more if told else None})
    return out


def render(rows: Sequence[Row]) -> str:
    """What was measured on what, and a table."""
    from slgr_jax.reports import tables

    names = {
        "vary": "grows",
        "users": "users",
        "items": "items",
        "ns_per_triple": "ns/triple",
        "min": "min",
        "max": "max",
        "rows_alone_ns": "rows alone",
        "stated_bytes_per_row": "bytes/row stated",
        "measured_bytes_per_row": "measured",
        "peak_mb": "peak MB",
        "device_peak_mb": "device MB",
    }
    shown = [
        {
            name: round(row[key]) if isinstance(row[key], float) else row[key]
            for key, name in names.items()
            if any(one[key] is not None for one in rows)
        }
        for row in rows
    ]
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"{first['devices']}; {versions}; {first['knobs']}\n\n{tables.markdown_table(shown)}"


def draw(rows: Sequence[Row], path: str) -> None:
    """Time per triple by the number of rows, a panel a growing table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from slgr_jax.reports.plots import COLORS

    kinds = list(dict.fromkeys(row["vary"] for row in rows))
    figure = Figure(figsize=(3.8 * len(kinds), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(panels, kinds, strict=True):
        mine = [row for row in rows if row["vary"] == kind]
        at = [row[kind] for row in mine]
        middle = [row["ns_per_triple"] for row in mine]
        spread = [
            [row["ns_per_triple"] - row["min"] for row in mine],
            [row["max"] - row["ns_per_triple"] for row in mine],
        ]
        axis.errorbar(
            *(at, middle, spread), fmt="o-", color=COLORS[0], capsize=3, label="training step"
        )
        alone = [row["rows_alone_ns"] for row in mine]
        axis.plot(at, alone, "s--", color=COLORS[1], label="moving its rows alone")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        other = "items" if kind == "users" else "users"
        axis.set_title(f"{mine[0][other]:,} {other}", fontsize=10)
        axis.set_xlabel(kind)
        axis.grid(axis="y", color="0.88", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ns per triple")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Cost of a triple by table size, {rows[0]['devices']}", fontsize=11)
    figure.savefig(path, dpi=150)


def define_flags() -> tuple[str, ...]:
    """Define this command's own flags; their names, for --help."""
    absl_flags.DEFINE_string("out", None, "picture to write (.png, .pdf, .svg)")
    absl_flags.DEFINE_list(
        "table_rows", ["10000", "100000", "1000000", "10000000"], "rows of the table that grows"
    )
    absl_flags.DEFINE_list("vary", ["users", "items"], "which table grows: users, items")
    absl_flags.DEFINE_integer(
        "interactions", 2_000_000, "training pairs at every size", lower_bound=1
    )
    absl_flags.DEFINE_integer("repeats", 5, "timed turns of each size", lower_bound=1)
    absl_flags.DEFINE_float("seconds", 0.5, "about how long a turn takes", lower_bound=0.0)
    absl_flags.DEFINE_float(
        "max_gb",
        8.0,
        "leave out sizes whose tables are larger; making them takes up to three times as much",
        lower_bound=0.0,
    )
    absl_flags.DEFINE_string("json", "", "also write the rows to this file")
    return ("out", "table_rows", "vary", "interactions", "repeats", "seconds", "max_gb", "json")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    unknown = [kind for kind in given.vary if kind not in ("users", "items")]
    if unknown or not given.vary:
        raise ConfigError(f"--vary: {listing(unknown)} is not one of: users, items")
    if not given.table_rows or not all(text.isdecimal() for text in given.table_rows):
        raise ConfigError(
            f"--table_rows: {listing(given.table_rows)}: expected integers, e.g. 10000,1000000"
        )
    base = flags.run_config_from_flags("", "")
    what = f"batch {base.sampler.batch_size}, {base.optimizer.table_optimizer}"
    what += f", {base.optimizer.table_dtype}, d = {base.model.dim}, {given.interactions:,} pairs"
    rows: list[Row] = []
    for vary in given.vary:
        found: list[Row] = []
        for count in sorted(map(int, given.table_rows)):
            size = size_of(vary, count, given.interactions)
            if found:
                per_row = found[-1]["stated_bytes_per_row"]
                gb = (size.users + size.items) * per_row / 1e9
                if gb > given.max_gb:
                    print(f"  {count:,} {vary}: left out, {gb:.1f} GB > --max_gb", flush=True)
                    continue
            try:
                row = measure(size, vary, base, repeats=given.repeats, seconds=given.seconds)
            except turns.Refused as refusal:
                raise UserError(str(refusal)) from refusal
            found.append(row | {"knobs": what})
            print(f"  {count:,} {vary}: {row['ns_per_triple']:.0f} ns a triple", flush=True)
        rows += with_slopes(found)
    print(f"\n{render(rows)}")
    draw(rows, given.out)
    if given.json:
        text = json.dumps(rows, indent=2) + "\n"
        pathlib.Path(given.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sections = config.sections()
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(sections[n] for n in sections if n not in ("slices", "evaluation")),
        own=define_flags(),
        required=("out",),
    )
