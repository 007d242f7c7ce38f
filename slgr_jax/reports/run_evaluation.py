"""The evaluation of a run: validation and test, its gate, and the files that hold them."""

from __future__ import annotations

import dataclasses
import logging

from slgr_jax import cluster
from slgr_jax.evaluation import results
from slgr_jax.evaluation.ranking_metrics import PartResult, Values
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.reports import gate_evaluation
from slgr_jax.serving import TrainedRun, job
from slgr_jax.training import checkpoint_manifest, epochs, tracking

LOGGER = logging.getLogger(__name__)


def evaluate_run(
    workdir: str, label: str, which: str = "best", *, data: str | None = None
) -> EvaluatedRun:
    """Rank validation and test with a run's state; writes metrics.json and per_user.parquet.

    Of a refit test alone: validation is its training data. The processes of a job all call this,
    and the first of them writes; the gate's report, which reads all preferences, is left out.

    Args:
      label: its name in tables.
      which: best or last.
      data: where its dataset is now; None: where it was trained.
    """
    run = job.load(workdir, which, data=data)
    if cluster.is_first():
        _say_unfinished(run)
    gate = None
    if cluster.processes() == 1:
        gate = gate_evaluation.evaluate_gate(run)
    elif run.config.guided:
        cluster.say_first(f"{workdir}: its gate is judged by slgr evaluate in one process alone")
    parts: dict[str, PartResult] = {}
    rows: dict[str, dict[str, Values]] = {}
    for part in ("test",) if run.config.train.refit else ("valid", "test"):
        ranking, by_slice = run.evaluate(part)
        if ranking is not None:
            parts[part] = ranking
        if by_slice:
            rows[part] = by_slice
    evaluated = EvaluatedRun(workdir, label, run.config, run.dataset, which, parts, rows, gate=gate)
    cluster.together(lambda: _write(evaluated) if cluster.is_first() else None)
    return evaluated


def _write(evaluated: EvaluatedRun) -> None:
    """The run's files, and what trackers are told."""
    results.write_run(evaluated)
    config = dataclasses.replace(evaluated.config, workdir=evaluated.workdir)
    tracking.summarize(config, _test_metrics(evaluated))


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
    train, progress = run.config.train, checkpoint_manifest.progress_of(run.workdir)
    if progress is not None and not epochs.over(train, progress):
        LOGGER.warning(
            "%s is not finished: epoch %d of at most %d; the same slgr train goes on",
            run.workdir,
            progress.epoch,
            train.epochs,
        )
