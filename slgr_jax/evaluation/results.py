"""What the evaluation of a run or of a baseline came to, and its files: JSON and Parquet.

Needs no device. `slgr_jax.reports` renders these numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Dataset, Slices
from slgr_jax.evaluation import click_metrics
from slgr_jax.evaluation.ranking_metrics import DEFINITIONS, PartResult, UserValues, Values
from slgr_jax.files import atomically

METRICS, PER_USER, PICTURE = "metrics.json", "per_user.parquet", "metrics.png"
ROWS_PER_USER = "rows_per_user.parquet"
MAIN_SLICES = ("overall", "cold_users", "warm_users", "tail_items", "head_items")


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """A run, or a baseline on a run's data, and its results by part.

    Attributes:
      workdir: where its files are.
      label: its name in tables.
      config, dataset: what it was trained with and on; of a baseline, the run's beside it.
      checkpoint: best or last; none of a baseline.
      parts: part -> full ranking; {} with --noranking.
      rows: part -> slice -> metrics of labelled rows; {} with --rows=none.
      baseline: name, settings, tuned_on, tried; None of a run.
      gate: `gate_evaluation.judge`; None without a gate.
      blend: of a run with a teacher's lists added when it scores: run (the label of what they were
        added to), teacher, weight, tuned_on, tried; None of others.
    """

    workdir: str
    label: str
    config: RunConfig
    dataset: Dataset
    checkpoint: str
    parts: Mapping[str, PartResult]
    rows: Mapping[str, Mapping[str, Values]] = dataclasses.field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None
    gate: Mapping[str, Any] | None = None
    blend: Mapping[str, Any] | None = None

    @property
    def is_run(self) -> bool:
        """Something that was trained, and nothing added to it."""
        return self.baseline is None and self.blend is None


def thresholds(run: EvaluatedRun) -> dict[str, Any]:
    """The slices as resolved numbers, and what was masked."""
    slices = run.dataset.slices(run.config.slices)
    config = run.config.slices.thresholds
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
    if run.blend is not None:
        out["blend"] = dict(run.blend)
    if run.gate is not None:
        out["gate"] = dict(run.gate)
    return out | {"thresholds": thresholds(run), "definitions": dict(DEFINITIONS)}


def user_table(run: EvaluatedRun) -> pa.Table:
    """A row per part, user and kind of relevant items: what paired tests need.

    Columns: part, items (all, tail, head: which relevant items count; tail_apart, head_apart of
    --rank_apart: which are candidates, too), user (external id), n_relevant, history (training
    items), cold, then the metrics (null where undefined).
    """
    pieces = [
        _user_rows(run.dataset, result.data.slices, part, kind, table)
        for part, result in run.parts.items()
        for kind, table in result.users.items()
    ]
    return pa.concat_tables(pieces) if pieces else pa.table({})


def _user_rows(
    dataset: Dataset, slices: Slices, part: str, kind: str, of_users: UserValues
) -> pa.Table:
    n = of_users.users.size
    columns: dict[str, Any] = {
        "part": pa.array([part] * n, pa.string()),
        "items": pa.array([kind] * n, pa.string()),
        "user": dataset.user_ids.take(pa.array(of_users.users)),
        "n_relevant": pa.array(of_users.n_relevant, pa.int64()),
        "history": pa.array(dataset.history[of_users.users], pa.int32()),
        "cold": pa.array(slices.cold_users[of_users.users], pa.bool_()),
    }
    for name, values in of_users.values.items():
        columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
    return pa.table(columns)


def write_row_users(
    workdir: str | os.PathLike[str],
    dataset: Dataset,
    slices: Slices,
    of_parts: Mapping[str, Mapping[str, UserValues]],
) -> pathlib.Path:
    """Write `rows_per_user.parquet`: the columns of `user_table`, of labelled rows.

    Args:
      workdir: the run's directory.
      dataset, slices: what the rows are of.
      of_parts: part -> items (all; tail, head: only rows of such items) -> values.
    """
    table = pa.concat_tables(
        [
            _user_rows(dataset, slices, part, kind, values)
            for part, kinds in of_parts.items()
            for kind, values in kinds.items()
        ]
    )
    path = pathlib.Path(workdir) / ROWS_PER_USER
    return atomically(path, lambda partial: pq.write_table(table, partial))


def write_run(run: EvaluatedRun) -> list[pathlib.Path]:
    """Write `metrics.json` and `per_user.parquet` into the run's directory."""
    root = pathlib.Path(run.workdir)
    text = json.dumps(metrics_json(run), indent=2, allow_nan=False) + "\n"
    table = user_table(run)
    return [
        atomically(root / METRICS, lambda path: path.write_text(text, encoding="utf-8")),
        atomically(root / PER_USER, lambda path: pq.write_table(table, path)),
    ]
