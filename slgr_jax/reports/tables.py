"""Numbers on paper: tables, a picture, JSON and Parquet of evaluated runs.

Needs no device. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax.config import EvaluationConfig, RunConfig
from slgr_jax.data.dataset import Dataset, Slices
from slgr_jax.errors import ConfigError, listing
from slgr_jax.evaluation import click_metrics
from slgr_jax.evaluation.ranking_metrics import (
    DEFINITIONS,
    PartResult,
    UserValues,
    Values,
    check_metric,
)
from slgr_jax.evaluation.significance import compare, holm

METRICS, PER_USER, PICTURE = "metrics.json", "per_user.parquet", "metrics.png"
ROWS_PER_USER = "rows_per_user.parquet"
MAIN_SLICES = ("overall", "cold_users", "warm_users", "tail_items", "head_items")


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """A run, or a baseline on a run's data, and its results by part."""

    workdir: str
    label: str
    config: RunConfig
    dataset: Dataset
    checkpoint: str  # best | last; none of a baseline
    parts: Mapping[str, PartResult]  # full ranking; {} with --noranking
    rows: Mapping[str, Mapping[str, Values]] = dataclasses.field(default_factory=dict)
    """part -> slice -> metrics of labelled rows; {} with --rows=none"""
    baseline: Mapping[str, Any] | None = None  # name, settings, tuned_on, tried
    gate: Mapping[str, Any] | None = None  # judging.judge; None without a gate


# ------------------------------------------------------------------------ tables


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != value:
            return "-"
        return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1000 else f"{value:.4g}"
    return str(value)


def _columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> list[str]:
    return list(columns) if columns is not None else list(dict.fromkeys(k for r in rows for k in r))


def _numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    return all(v is None or isinstance(v, int | float | np.number) for v in values)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of dicts as a Markdown table, padded so that it reads as plain text too.

    Args:
      rows: one dict a row; a missing key or None shows as `-`, floats with four decimals.
      columns: which keys, in which order; default is every key in order of first use.
    """
    names = _columns(rows, columns)
    cells = [[_cell(row.get(name)).replace("|", "\\|") for name in names] for row in rows]
    lines = _aligned(names, cells, [_numeric(rows, name) for name in names], "|")
    lengths = [len(part) for part in lines[0].strip("|").split("|")]
    rule = "|".join(
        "-" * (n - 1) + (":" if _numeric(rows, name) else "-")
        for n, name in zip(lengths, names, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of dicts as aligned columns for a terminal; arguments as for `markdown_table`."""
    names = _columns(rows, columns)
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    lines = _aligned(names, cells, [_numeric(rows, name) for name in names], "")
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _aligned(
    names: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], edge: str
) -> list[str]:
    widths = [
        max(len(name), *(len(row[i]) for row in cells)) if cells else len(name)
        for i, name in enumerate(names)
    ]
    lines = []
    for row in (names, *cells):
        padded = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        line = f" {edge} ".join(padded) if edge else "  ".join(padded).rstrip()
        lines.append(f"{edge} {line} {edge}" if edge else line)
    return lines


def click_rows(runs: Sequence[EvaluatedRun], part: str) -> list[dict[str, Any]]:
    """A row per run and slice of labelled rows; rela_impr is over the first run."""
    scored = [run for run in runs if part in run.rows]
    out = []
    for name, base in scored[0].rows[part].items():
        for run in scored:
            values = run.rows[part][name]
            row = {"slice": name, "run": run.label, **values}
            if len(scored) > 1:
                mine, first = values["auc"], base["auc"]
                row["rela_impr"] = None
                if run is not scored[0] and mine is not None and first is not None:
                    row["rela_impr"] = click_metrics.rela_impr(mine, first)
            if values["n"]:
                out.append(row)
    return out


def main_columns(ks: Sequence[int]) -> tuple[str, ...]:
    """The metrics that the printed table shows."""
    return (*(f"{name}@{k}" for k in ks for name in ("recall", "ndcg")), "mrr", "auc")


def metric_rows(
    runs: Sequence[EvaluatedRun], part: str, *, bins: bool = True
) -> list[dict[str, Any]]:
    """A row per run and slice (slice by slice, so that runs are next to each other).

    Slices that no user is in are left out; with `bins` off, so are the history and popularity
    bins.
    """
    names = dict.fromkeys(
        name
        for run in runs
        for name, values in run.parts[part].slices.items()
        if values["n"] and (bins or name in MAIN_SLICES)
    )
    rows = []
    for name in names:
        for run in runs:
            values = run.parts[part].slices.get(name)
            if values is None:
                continue
            row: dict[str, Any] = {"slice": name}
            if len(runs) > 1:
                row["run"] = run.label
            row["n"] = values["n"]
            rows.append(row | {key: values[key] for key in main_columns(run.config.evaluation.ks)})
    return rows


def gate_rows(runs: Sequence[EvaluatedRun], *, bins: bool = True) -> list[dict[str, Any]]:
    """A row per slice and gated run: mean alpha, how often the teacher is right, pairs."""
    gated = [run for run in runs if run.gate is not None]
    names = dict.fromkeys(
        name for run in gated for name in (run.gate or {})["slices"] if bins or name in MAIN_SLICES
    )
    return [
        {"slice": name, "run": run.label} | dict(run.gate["slices"][name])
        for name in names
        for run in gated
        if run.gate is not None and name in run.gate["slices"]
    ]


def _gate_note(runs: Sequence[EvaluatedRun]) -> str:
    """What the rows of `gate_rows` are, and each gate's two numbers."""
    lines = [
        "pairs of a test item and an item the user never chose on which the teacher has a word, "
        "drawn as training draws preferences"
    ]
    for run in runs:
        if run.gate is not None:
            auc, error = run.gate["auc"], run.gate["calibration_error"]
            shown = "undefined" if auc is None else f"{auc:.3f}"
            lines.append(f"{run.label}: AUC of alpha {shown}, calibration error {error:.3f}")
    return "\n".join(lines) + "\n"


def list_rows(runs: Sequence[EvaluatedRun], part: str) -> list[dict[str, Any]]:
    """A row per run: what only `overall` has (pooled AUC, coverage, popularity)."""
    rows = []
    for run in runs:
        values = run.parts[part].slices["overall"]
        names = [name for name in values if name.startswith(("auc_", "coverage@", "mean_"))]
        rows.append({"run": run.label} | {name: values[name] for name in names})
    return rows


def paired_rows(
    runs: Sequence[EvaluatedRun], part: str, metric: str, *, resamples: int = 999
) -> list[dict[str, Any]]:
    """Each later run against the first, user by user, on the main slices.

    `p_holm` corrects `p` (paired t-test) for the number of rows.
    """
    first = runs[0]
    rows: list[dict[str, Any]] = []
    for run in runs[1:]:
        for name in MAIN_SLICES:
            pair = [_user_values(one, part, name, metric) for one in (run, first)]
            users, at, at_first = np.intersect1d(pair[0][0], pair[1][0], return_indices=True)
            if not users.size:
                continue
            found = compare(pair[0][1][at], pair[1][1][at_first], resamples=resamples)
            row = {"slice": name, "run": run.label, "n": found.n, "first": found.mean_b}
            row |= {"this": found.mean_a, "difference": found.difference}
            row |= {"95% low": found.low, "95% high": found.high, "p": found.p_t}
            rows.append(row | {"p_flip": found.p_sign_flip})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _user_values(
    run: EvaluatedRun, part: str, name: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    result = run.parts[part]
    table = result.users[name.removesuffix("_items") if name.endswith("_items") else "all"]
    mask = result.data.masks.users.get(name)
    chosen = slice(None) if mask is None else mask[table.users]
    if metric not in table.values:
        known = listing(table.values, limit=len(table.values))
        raise ConfigError(f"--metric={metric} has no value per user; choose one of: {known}")
    return table.users[chosen], table.values[metric][chosen]


def footer(run: EvaluatedRun) -> str:
    """What the numbers mean: thresholds, masks and definitions."""
    lines = ["thresholds (training counts only):"]
    facts = thresholds(run)
    lines.append(
        f"  cold users: at most {facts['cold_user_history']} training items "
        f"({facts['n_cold_users']} of {run.dataset.n_users} users)"
    )
    lines.append(
        f"  tail items: the {facts['tail_item_fraction']:.0%} least popular, at most "
        f"{facts['tail_item_popularity']} training users "
        f"({facts['n_tail_items']} of {run.dataset.n_items} items)"
    )
    for part, masked in facts["masked"].items():
        dropped = facts["dropped_relevant"][part]
        note = f"; {dropped} relevant pairs dropped because masked" if dropped else ""
        lines.append(f"  {part}: masks each user's {' and '.join(masked)} items{note}")
    lines.append(f"definitions (checkpoint: {run.checkpoint}):")
    shown = {
        **(DEFINITIONS if run.parts else {}),
        **(click_metrics.DEFINITIONS if run.rows else {}),
    }
    for name, text in shown.items():
        lines += textwrap.wrap(
            f"{name}: {text}", 96, initial_indent="  ", subsequent_indent="      "
        )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------ files


def thresholds(run: EvaluatedRun) -> dict[str, Any]:
    """The slices as resolved numbers, and what was masked."""
    slices = run.dataset.slices(run.config.slices)
    config = run.config.slices
    return {
        "cold_user_history": slices.cold_user_history,
        "tail_item_popularity": slices.tail_item_popularity,
        "tail_item_fraction": config.tail_item_fraction,
        "n_cold_users": int(slices.cold_users.sum()),
        "n_tail_items": int(slices.tail_items.sum()),
        "history_bins": list(config.history_bins),
        "popularity_bins": list(config.popularity_bins),
        "masked": {part: list(result.data.masked) for part, result in run.parts.items()},
        "dropped_relevant": {part: result.n_dropped for part, result in run.parts.items()},
        "checkpoint": run.checkpoint,
    }


def metrics_json(run: EvaluatedRun) -> dict[str, Any]:
    """`metrics.json`: part -> slice -> metric -> value (null where undefined); what it means.

    A baseline's also says which settings were tried and chosen.
    """
    out: dict[str, Any] = {part: dict(result.slices) for part, result in run.parts.items()}
    if run.rows:
        out["rows"] = {part: dict(slices) for part, slices in run.rows.items()}
        out["rows_definitions"] = dict(click_metrics.DEFINITIONS)
    if run.baseline is not None:
        out["baseline"] = dict(run.baseline)
    if run.gate is not None:
        out["gate"] = dict(run.gate)
    return out | {"thresholds": thresholds(run), "definitions": dict(DEFINITIONS)}


def user_table(run: EvaluatedRun) -> pa.Table:
    """A row per part, user and kind of relevant items: what paired tests need.

    Columns: part, items (all, tail, head: which relevant items count), user (external id),
    n_relevant, history (training items), cold, then the metrics (null where undefined).
    """
    pieces = [
        _user_rows(run.dataset, result.data.slices, part, kind, table)
        for part, result in run.parts.items()
        for kind, table in result.users.items()
    ]
    return pa.concat_tables(pieces) if pieces else pa.table({})


def _user_rows(
    dataset: Dataset, slices: Slices, part: str, kind: str, found: UserValues
) -> pa.Table:
    n = found.users.size
    columns: dict[str, Any] = {
        "part": pa.array([part] * n, pa.string()),
        "items": pa.array([kind] * n, pa.string()),
        "user": dataset.user_ids.take(pa.array(found.users)),
        "n_relevant": pa.array(found.n_relevant, pa.int64()),
        "history": pa.array(dataset.history[found.users], pa.int32()),
        "cold": pa.array(slices.cold_users[found.users], pa.bool_()),
    }
    for name, values in found.values.items():
        columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
    return pa.table(columns)


def write_row_users(
    workdir: str | os.PathLike[str],
    dataset: Dataset,
    slices: Slices,
    found: Mapping[str, Mapping[str, UserValues]],
) -> pathlib.Path:
    """Write `rows_per_user.parquet`: the columns of `user_table`, of labelled rows.

    Args:
      workdir: the run's directory.
      dataset, slices: what the rows are of.
      found: part -> items (all; tail, head: only rows of such items) -> values.
    """
    table = pa.concat_tables(
        [
            _user_rows(dataset, slices, part, kind, values)
            for part, kinds in found.items()
            for kind, values in kinds.items()
        ]
    )
    path = pathlib.Path(workdir) / ROWS_PER_USER
    return atomically(path, lambda partial: pq.write_table(table, partial))


def atomically(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`write` to a file beside `path`, then put it in place: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_run(run: EvaluatedRun) -> list[pathlib.Path]:
    """Write `metrics.json` and `per_user.parquet` into the run's directory."""
    root = pathlib.Path(run.workdir)
    text = json.dumps(metrics_json(run), indent=2, allow_nan=False) + "\n"
    table = user_table(run)
    return [
        atomically(root / METRICS, lambda path: _write_text(path, text)),
        atomically(root / PER_USER, lambda path: pq.write_table(table, path)),
    ]


def _write_text(path: pathlib.Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def labels(workdirs: Sequence[str]) -> list[str]:
    """Short distinct names of runs: as few trailing path components as tell them apart."""
    parts = [pathlib.Path(os.path.abspath(one)).parts for one in workdirs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"--workdir names the same run twice: {listing(workdirs)}")


# ------------------------------------------------------------------------ everything


def choose_metric(asked: str, config: EvaluationConfig) -> str:
    """The metric to draw and to test: `asked`, or ndcg@10 (ndcg at the first cut-off without 10);
    of runs that only score rows, rows_auc.

    Raises:
      ConfigError: there is no such metric.
    """
    ks, rows = config.ks, config.rows != "none"
    own = f"ndcg@{10 if 10 in ks else ks[0]}" if config.ranking else "rows_auc"
    return check_metric(asked or own, ks, ranking=config.ranking, rows=rows)


def render(runs: Sequence[EvaluatedRun], metric: str, *, bins: bool = True) -> str:
    """The tables of every part, paired tests against the first run, and what it all means.

    Baselines are tested apart, so that p_holm of the runs is the same with and without them.
    `bins` off leaves history and popularity bins to the picture and to metrics.json.
    """
    first = runs[0]
    families = {
        "run": [run for run in runs[1:] if run.baseline is None],
        "baseline": [run for run in runs[1:] if run.baseline is not None],
    }
    splits = {run.dataset.manifest.split_hash for run in runs}
    out = []
    for part in first.parts:
        out += [
            f"{part}: full ranking, mean over users",
            text_table(metric_rows(runs, part, bins=bins)),
        ]
        out += [f"{part}: the lists of all users", text_table(list_rows(runs, part))]
        for what, others in families.items():
            rows = paired_rows([first, *others], part, metric) if len(splits) == 1 else []
            if not rows:
                continue
            out += [
                f"{part}: {metric} user by user, each {what} minus {first.label}",
                text_table(rows)
                + "p: paired t-test; p_flip: sign-flip permutation test; p_holm: p corrected for "
                "the rows above (Holm)\n",
            ]
    for part in first.rows:
        out += [f"{part}: labelled rows", text_table(click_rows(runs, part))]
    if rows := gate_rows(runs, bins=bins):
        out += [
            "test: how far the gate believed the teacher, and how often it was right",
            text_table(rows) + _gate_note(runs),
        ]
    if len(splits) > 1:
        out.append("no paired tests: the runs were trained on different splits\n")
    out += [_settings_line(run) for run in runs if run.baseline is not None]
    return "\n".join([*out, footer(first)])


def _settings_line(run: EvaluatedRun) -> str:
    """What a baseline was given, and how that was chosen."""
    assert run.baseline is not None
    text = ", ".join(f"{name} {value:g}" for name, value in run.baseline["settings"].items())
    tried = len(run.baseline["tried"])
    why = f", the best of {tried} by {run.baseline['tuned_on']}" if tried else ""
    return f"baseline {run.label}: {text or 'no settings'}{why}\n"
