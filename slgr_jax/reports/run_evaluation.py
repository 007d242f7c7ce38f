"""The evaluation of a run: validation and test, its gate, and the files that hold them."""

from __future__ import annotations

import dataclasses
import logging
import pathlib

from slgr_jax.evaluation import results
from slgr_jax.evaluation.ranking_metrics import PartResult, Values
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.reports import gate_evaluation
from slgr_jax.serving import TrainedRun, load
from slgr_jax.training import checkpoint_manifest, epochs, tracking

LOGGER = logging.getLogger(__name__)


def evaluate_run(
    workdir: str, label: str, which: str = "best", *, data: str | None = None
) -> EvaluatedRun:
    """Rank validation and test with a run's state; writes metrics.json and per_user.parquet.

    Of a refit test alone: validation is its training data.

    Args:
      label: its name in tables.
      which: best or last.
      data: where its dataset is now; None: where it was trained.
    """
    run = load(workdir, which, data=data)
    _say_unfinished(run)
    gate = gate_evaluation.evaluate_gate(run)
    parts: dict[str, PartResult] = {}
    rows: dict[str, dict[str, Values]] = {}
    for part in ("test",) if run.config.train.refit else ("valid", "test"):
        ranking, by_slice = run.evaluate(part)
        if ranking is not None:
            parts[part] = ranking
        if by_slice:
            rows[part] = by_slice
    evaluated = EvaluatedRun(workdir, label, run.config, run.dataset, which, parts, rows, gate=gate)
    results.write_run(evaluated)
    tracking.summarize(dataclasses.replace(run.config, workdir=workdir), _test_metrics(evaluated))
    return evaluated


def _test_metrics(run: EvaluatedRun) -> dict[str, float]:
    """What trackers are told of the test part: `test/ndcg@10`, `test/tail_items/ndcg@10`, ..."""
    ranked = run.parts["test"].slices if "test" in run.parts else {}
    tables = [("", ranked), ("rows_", run.rows.get("test", {}))]
    return {
        f"test/{prefix}{metric}" if name == "overall" else f"test/{name}/{prefix}{metric}": value
        for prefix, by_slice in tables
        for name, values in by_slice.items()
        if name.isidentifier()  # no bins
        for metric, value in values.items()
        if value is not None
    }


def _say_unfinished(run: TrainedRun) -> None:
    """Warn where more training would change the numbers."""
    root = pathlib.Path(run.workdir) / checkpoint_manifest.DIRECTORY
    manifest = checkpoint_manifest.newest(root, checkpoint_manifest.read)
    train = run.config.train
    if manifest is not None and not epochs.over(train, manifest.progress):
        LOGGER.warning(
            "%s is not finished: epoch %d of at most %d; the same slgr train goes on",
            run.workdir,
            manifest.progress.epoch,
            train.epochs,
        )
