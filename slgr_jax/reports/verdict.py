"""What an evaluation found, in a few lines: one small table, and a verdict in words.

The same rows go to OUT/summary.md, summary.csv and summary.tex. Needs no device.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax.errors import listing
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.reports import tables

# Columns of the small table that are slices of the metric, and those of the lists of all users.
_SLICES = ("overall", "cold_users", "warm_users", "tail_items")
_LISTS = ("coverage@", "mean_popularity@")
# A p of at most this is called a difference.
LEVEL = 0.05


def part_of(runs: Sequence[EvaluatedRun]) -> str:
    """The part that a verdict is about: test where there is one."""
    parts = [*runs[0].parts, *runs[0].rows]
    return "test" if "test" in parts else parts[0]


def summary_rows(runs: Sequence[EvaluatedRun], metric: str) -> list[dict[str, Any]]:
    """A row per run: `metric` by slice, how much of the catalogue its lists cover, how popular
    their items are; of labelled rows alone the AUC by slice and the log loss."""
    part = part_of(runs)
    if part not in runs[0].parts:
        return [_row_metrics(run, part) for run in runs]

    rows = []
    for run in runs:
        slices = run.parts[part].slices
        row: dict[str, Any] = {"run": run.label}
        row |= {name.replace("_", " "): slices[name].get(metric) for name in _SLICES}
        row |= {
            name.replace("_", " "): value
            for name, value in slices["overall"].items()
            if name.startswith(_LISTS) and name.endswith(metric[metric.find("@") :])
        }
        rows.append(row)
    return rows


def _row_metrics(run: EvaluatedRun, part: str) -> dict[str, Any]:
    slices = run.rows[part]
    row: dict[str, Any] = {"run": run.label}
    row |= {name.replace("_", " "): slices[name]["auc"] for name in _SLICES if name in slices}
    return row | {"log loss": slices["overall"].get("log_loss")}


def lines(runs: Sequence[EvaluatedRun], metric: str) -> list[str]:
    """The verdict: a line per run against the first, one about the baselines, one of caution."""
    part = part_of(runs)
    trained = [run for run in runs if run.is_run]
    baselines = [run for run in runs if run.baseline is not None]
    if part not in runs[0].parts:
        out = ["Labelled rows alone: nothing is tested user by user; see rows_per_user.parquet."]
        if trained and baselines:
            out.append(_against_baselines(trained, baselines, part, "auc", of_rows=True))
        return out
    if len({run.dataset.manifest.split_hash for run in runs}) > 1:
        return ["No verdict: the runs were trained on different splits."]

    out = []
    if len(trained) > 1:
        out += _against_first(trained, part, metric)
    more = [run.label for run in runs if run.dataset.as_split]
    if 0 < len(more) < len(runs):
        out.append(
            f"Not the same data: {listing(more)} learned from validation too, the others did not."
        )
    if trained and baselines:
        out.append(_against_baselines(trained, baselines, part, metric))
        if part in runs[0].rows:
            out.append(_against_baselines(trained, baselines, part, "auc", of_rows=True))
    out += _blends(runs, part, metric)
    if len(trained) > 1:
        out.append(
            "One run each: `slgr compare` repeats this over seeds, tunes all alike and adds "
            "controls."
        )
    return out


def _against_first(runs: Sequence[EvaluatedRun], part: str, metric: str) -> list[str]:
    first = runs[0].label
    tested = tables.paired_rows(runs, part, metric)
    by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in tested:
        by_run.setdefault(row["run"], {})[row["slice"]] = row

    out = []
    for label, of_slice in by_run.items():
        overall = of_slice["overall"]
        text = f"{label} {_word(overall)} {first} overall: {_numbers(overall)}"
        others = [
            f"{name.replace('_', ' ')} {_relative(row)}"
            for name, row in of_slice.items()
            if name != "overall" and _differs(row)
        ]
        text += f"; differs for {', '.join(others)}" if others else ""
        unseen = [name.replace("_", " ") for name, row in of_slice.items() if row["p_holm"] is None]
        few = f"; fewer than {tables.LEAST_DIFFERENT} users differ in {', '.join(unseen)}"
        text += few if unseen else ""
        out.append(f"{text}.")
    return out


def _differs(row: Mapping[str, Any]) -> bool:
    return row["p_holm"] is not None and row["p_holm"] <= LEVEL


def _word(row: Mapping[str, Any]) -> str:
    if not _differs(row):
        return "is not told apart from"
    return "is better than" if row["difference"] > 0 else "is worse than"


def _relative(row: Mapping[str, Any]) -> str:
    if not row["first"]:
        return f"({row['first']:.4f} to {row['this']:.4f})"
    return f"{100 * row['difference'] / row['first']:+.1f} %"


def _numbers(row: Mapping[str, Any]) -> str:
    """`.3049 to .2932 (+4.0 %, 95 % interval +.0031 to +.0203, p .001)`."""
    interval = f"95 % interval {row['95% low']:+.4f} to {row['95% high']:+.4f}"
    p = "not tested" if row["p_holm"] is None else f"p {row['p_holm']:.2g}"
    return f"{row['this']:.4f} to {row['first']:.4f} ({_relative(row)}, {interval}, {p})"


def _blends(runs: Sequence[EvaluatedRun], part: str, metric: str) -> list[str]:
    """A line per run with a teacher's lists added: what they add without any training."""
    labels = {run.label: run for run in runs if run.blend is not None}
    rows = [row for row in tables.blend_rows(runs, part, metric) if row["slice"] == "overall"]
    return [
        f"{row['run']} (score + w / rank, no training) {_word(row)} "
        f"{(labels[row['run']].blend or {})['run']}: {_numbers(row)}."
        for row in rows
    ]


def _against_baselines(
    runs: Sequence[EvaluatedRun],
    baselines: Sequence[EvaluatedRun],
    part: str,
    metric: str,
    *,
    of_rows: bool = False,
) -> str:
    def value(run: EvaluatedRun) -> float:
        slices = run.rows[part] if of_rows else run.parts[part].slices
        overall = slices["overall"][metric]
        return math.nan if overall is None else float(overall)

    best_run, best_baseline = max(runs, key=value), max(baselines, key=value)
    words = f"{best_baseline.label} ({'auc of labelled rows ' * of_rows}{value(best_baseline):.4f})"
    if value(best_baseline) >= value(best_run):
        return f"The baseline {words}, which learns nothing from an LLM, is above every run."
    return f"{best_run.label} ({value(best_run):.4f}) is above the best baseline, {words}."


def render(runs: Sequence[EvaluatedRun], metric: str) -> str:
    """The small table and the verdict, as the last thing a command prints."""
    part = part_of(runs)
    shown = metric if part in runs[0].parts else "auc of labelled rows"
    found = lines(runs, metric)
    text = f"in short ({part}, {shown}):\n{tables.text_table(summary_rows(runs, metric))}"
    return text + "".join(f"- {line}\n" for line in found)


def write(runs: Sequence[EvaluatedRun], metric: str, directory: pathlib.Path) -> list[pathlib.Path]:
    """Write the table as summary.md (with the verdict), summary.csv and summary.tex."""
    found = "".join(f"- {line}\n" for line in lines(runs, metric))
    title = f"{part_of(runs)}, {metric}"
    return tables.write_summary(summary_rows(runs, metric), directory, title=title, note=found)
