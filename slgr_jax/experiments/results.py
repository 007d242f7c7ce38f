"""What a run's directory says of it: outcome, log, metrics by slice, values of users, the gate.

outcome.json   how training ended (`pool`); rows.json   slices of labelled rows, bins among them
The other files are those of slgr train and slgr evaluate. Only the test part is read.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from slgr_jax import json_files
from slgr_jax.errors import ConfigError
from slgr_jax.files import write_atomically

OUTCOME, ROWS, LOG = "outcome.json", "rows.json", "log.jsonl"
# As in evaluation/results.py, which takes seconds to import (JAX); a test holds them together.
METRICS = "metrics.json"
PER_USER, ROWS_PER_USER = "per_user.parquet", "rows_per_user.parquet"
MAIN_SLICES = ("overall", "cold_users", "warm_users", "tail_items", "head_items")
# Slices that users fall into whole, by what a row of per_user.parquet says, or whose relevant
# items are told apart there. Of popularity bins there is no value per user.
_KINDS = {"tail_items": "tail", "head_items": "head"}

PathLike = str | pathlib.Path


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; None where there is none.

    Raises:
      ConfigError: it is damaged.
    """
    return _loads(path.read_bytes(), str(path)) if path.is_file() else None


def _loads(text: str | bytes, where: str) -> Any:
    try:
        return json_files.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{where} is damaged ({error}); put back a copy, or remove the run's directory to "
            "train it again"
        ) from error


def outcome(workdir: PathLike) -> dict[str, Any] | None:
    """How training ended; None before it has."""
    written: dict[str, Any] | None = read_json(pathlib.Path(workdir) / OUTCOME)
    return written


def forget(workdir: PathLike) -> None:
    """Remove what is said of a run that is about to train on."""
    for name in (OUTCOME, ROWS, METRICS, PER_USER, ROWS_PER_USER):
        (pathlib.Path(workdir) / name).unlink(missing_ok=True)


def evaluated(workdir: PathLike) -> bool:
    """Whether the run has met the test part; `rows.json` is written last."""
    return (pathlib.Path(workdir) / ROWS).is_file()


def log(workdir: PathLike) -> list[dict[str, Any]]:
    """The records of log.jsonl, one a validation."""
    path = pathlib.Path(workdir) / LOG
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    return [_loads(line, f"{path}, line {number},") for number, line in enumerate(lines, start=1)]


def slices(workdir: PathLike) -> dict[str, dict[str, Any]]:
    """Slice -> metric -> value on the test part; rows of labels as rows_auc, rows_n, ..."""
    root = pathlib.Path(workdir)
    ranked = read_json(root / METRICS).get("test", {})
    by_slice = {name: dict(values) for name, values in ranked.items()}
    for name, values in read_json(root / ROWS).items():
        of_rows = {f"rows_{metric}": value for metric, value in values.items()}
        by_slice.setdefault(name, {}).update(of_rows)
    return by_slice


def metrics_of(by_slice: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> list[str]:
    """The metrics that are compared, of those a run has; greater is better."""
    ranking = [f"{name}@{k}" for k in ks for name in ("ndcg", "recall")]
    overall = by_slice.get("overall", {})
    return [name for name in (*ranking, "mrr", "rows_auc", "rows_gauc") if name in overall]


class Users:
    """The values of users of one run.

    Args:
      workdir: a run that was evaluated.
      metrics: whose values are wanted.
    """

    def __init__(self, workdir: PathLike, metrics: Sequence[str]) -> None:
        root = pathlib.Path(workdir)
        self._tables: dict[str, dict[str, np.ndarray]] = {}
        for prefix, name in (("", PER_USER), ("rows_", ROWS_PER_USER)):
            path = root / name
            if not path.is_file() or not (columns := pq.read_schema(path).names):
                continue
            # A user's AUC is what GAUC is the mean of, and the nearest thing that AUC has.
            wanted = {"auc"} if prefix else {m for m in metrics if m in columns}
            table = pq.read_table(path, columns=["part", "items", "user", "cold", *wanted])
            test = np.array(table["part"].to_pylist()) == "test"
            facts = {c: np.array(table[c].to_pylist())[test] for c in ("items", "user", "cold")}
            for column in wanted:
                values = table[column].to_numpy()[test].astype(np.float64)
                names = (f"{prefix}auc", f"{prefix}gauc") if prefix else (column,)
                self._tables |= {metric: {**facts, "value": values} for metric in names}

    def of(self, slice_name: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """External ids (sorted) and values of a main slice's users; None where there are none."""
        table = self._tables.get(metric)
        if table is None or slice_name not in MAIN_SLICES:
            return None
        keep = table["items"] == _KINDS.get(slice_name, "all")
        if slice_name in ("cold_users", "warm_users"):
            keep &= table["cold"] == (slice_name == "cold_users")
        order = np.argsort(table["user"][keep])
        return table["user"][keep][order], table["value"][keep][order]


def gate(workdir: PathLike) -> dict[str, Any] | None:
    """What evaluation says of the run's gate; None of runs without one."""
    written = read_json(pathlib.Path(workdir) / METRICS).get("gate")
    return dict(written) if written else None


def speed(workdir: PathLike) -> float | None:
    """Triples a second in the fastest epoch: other epochs compile, or share the machine."""
    rates = (record["triples_per_s"] for record in log(workdir) if "triples_per_s" in record)
    return max(map(float, rates), default=None)
