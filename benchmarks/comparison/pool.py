"""Runs in processes: each worker one thread of one fresh process, so that all cores are used.

A run that is finished is not touched again: it is known by its config, its data and its teacher's
answers, and by `outcome.json`, which is written when training has ended.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.process
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np

from comparison import results
from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError, NonFiniteError, listing

# XLA's own pool and Eigen's; kernels in C++ borrow the former.
_ONE_THREAD = {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}


def workers(asked: int) -> int:
    """Processes to use: as asked for, or as many as there are cores; 1 on an accelerator."""
    import jax

    if jax.default_backend() != "cpu":
        return 1
    return asked or len(os.sched_getaffinity(0))


def train_runs(
    runs: Sequence[RunConfig], *, workers: int, root: pathlib.Path
) -> list[dict[str, Any]]:
    """Train every run, or find it finished; their outcomes, in order.

    An outcome: best_metric, best_epoch, epoch, seconds, cpu_seconds (both of the last call, if
    there were several), and error: None, or what diverged.

    Args:
      runs: what to train; the same run is trained once.
      workers: processes; 1 trains here, with all threads and devices.
      root: directory that names of runs are shown from.

    Raises:
      ConfigError: a directory holds a run with other settings.
    """
    todo = {run.workdir: run for run in runs if not finished(run)}
    for run in todo.values():
        _refuse_other(run)
    shown = functools.partial(_show, root=root)
    _each(_fit, list(todo.values()), workers, shown)
    return [_known(run) for run in runs]


def evaluate_runs(runs: Sequence[RunConfig], *, workers: int) -> None:
    """Let every run meet the test part, once."""
    todo = {run.workdir: run for run in runs if not results.evaluated(run.workdir)}
    _each(_evaluate, list(todo.values()), workers, lambda done, of, run: None)


def finished(run: RunConfig) -> bool:
    """Whether the run's directory holds this run, trained to its end on what is there now."""
    from slgr_jax import runs
    from slgr_jax.data import schema

    if results.outcome(run.workdir) is None or runs.read_config(run.workdir) != run:
        return False
    was, now = runs.recorded(run.workdir), schema.read_dataset_manifest(run.data)
    same: bool = was == {
        "split_hash": now.split_hash,
        "id_map_hash": now.id_map_hash,
        "teacher_hash": runs.teacher_hash(run),
    }
    return same


def _refuse_other(run: RunConfig) -> None:
    """Refuse a directory that holds a run which this one cannot go on from."""
    from slgr_jax import config, runs

    if not (pathlib.Path(run.workdir) / runs.CONFIG).is_file():
        return
    changed = [
        text
        for text in config.differences(runs.read_config(run.workdir), run)
        if text[2:].split(":")[0] not in runs.RESUMABLE
    ]
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with other settings ({listing(changed)}); choose another "
            "--out, or remove it"
        )


def _known(run: RunConfig) -> dict[str, Any]:
    found = results.outcome(run.workdir)
    assert found is not None, "training ended with an outcome"
    return found


def _show(done: int, of: int, run: RunConfig, *, root: pathlib.Path) -> None:
    found, name = _known(run), pathlib.Path(run.workdir).relative_to(root)
    value = found["error"] or "no validation"
    if found["best_metric"] is not None:
        value = f"{found['best_metric']:.4f} (epoch {found['best_epoch']})"
    print(f"  [{done}/{of}] {name}: {value}", flush=True)


# --------------------------------------------------------------------- one run, in its process


def _fit(run: RunConfig) -> None:
    """Train a run, its lines into RUN/train.log, and write its outcome.

    Raises:
      KeyboardInterrupt: a signal stopped it; it goes on when called again.
    """
    from slgr_jax import train

    root = pathlib.Path(run.workdir)
    root.mkdir(parents=True, exist_ok=True)
    results.forget(root)
    found: dict[str, Any] = {"best_metric": None, "best_epoch": None, "epoch": None}
    found |= {"seconds": None, "cpu_seconds": None, "error": None}
    begin = time.process_time()
    with open(root / "train.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            outcome = train.train(run)
        except NonFiniteError as error:
            found["error"] = str(error)
        else:
            if outcome.status != "finished":
                raise KeyboardInterrupt
            found |= {name: getattr(outcome, name) for name in found if hasattr(outcome, name)}
            found["cpu_seconds"] = time.process_time() - begin
    results.write_json(root / results.OUTCOME, found)


def _evaluate(run: RunConfig) -> None:
    """metrics.json and per_user.parquet; of labelled rows also bins and each user's AUC."""
    from slgr_jax import click_metrics, report, runs
    from slgr_jax.data import labelled
    from slgr_jax.scoring import score_rows

    root = pathlib.Path(run.workdir)
    runs.evaluate_run(run.workdir, root.name)
    found: dict[str, Any] = {}
    if run.evaluation.rows != "none":
        restored = runs.restore_run(run.workdir)
        data, slices = restored.dataset, restored.dataset.slices(run.slices)
        rows = labelled.make_rows(data, "test", run.evaluation, run.loss)
        scores = np.asarray(score_rows(restored.backbone)(restored.scoring("test"), rows))
        masks = click_metrics.row_slices(rows, slices)
        masks |= click_metrics.bin_slices(
            *(rows, data.history, data.popularity),
            *(run.slices.history_bins, run.slices.popularity_bins),
        )
        found = click_metrics.summarize_slices(rows, scores, masks)
        users = {"all": click_metrics.per_user(rows, scores)}
        for kind in ("tail", "head"):
            users[kind] = click_metrics.per_user(rows, scores, masks[f"{kind}_items"])
        report.write_row_users(root, data, slices, {"test": users})
    results.write_json(root / results.ROWS, found)


# --------------------------------------------------------------------- many runs


def _each(
    work: Callable[[RunConfig], None],
    runs: Sequence[RunConfig],
    workers: int,
    shown: Callable[[int, int, RunConfig], None],
) -> None:
    """`work` on every run: here, or in as many processes as `workers`.

    A failure lets the runs that have begun end, then is raised.

    Raises:
      SystemExit: interrupted.
    """
    try:
        if workers == 1 or len(runs) == 1:
            for done, run in enumerate(runs, 1):
                work(run)
                shown(done, len(runs), run)
            return
        with ProcessPoolExecutor(
            min(workers, len(runs) or 1),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
        ) as pool:
            futures: dict[Future[None], RunConfig] = {
                pool.submit(_in_worker, work, run): run for run in runs
            }
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    shown(done, len(runs), futures[future])
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except KeyboardInterrupt:
        raise SystemExit("interrupted; call again to go on") from None


def _begin() -> None:
    """Make a worker: one thread, no traceback when interrupted, no life after its parent."""
    os.environ.update(_ONE_THREAD)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # training listens while it runs
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A killed parent leaves its workers waiting for ever; what they train is safe in checkpoints.
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _in_worker(work: Callable[[RunConfig], None], run: RunConfig) -> None:
    import jax

    try:
        work(run)
    finally:
        jax.clear_caches()  # a worker lives through many runs


def check_data(data: str) -> str:
    """The name of a dataset directory; a directory that is none is an error."""
    from slgr_jax.data import schema

    manifest = schema.read_dataset_manifest(data)
    if not sum(file.rows for file in manifest.files["test"]):
        raise ConfigError(f"{data} has no test part: nothing to compare on")
    return manifest.name
