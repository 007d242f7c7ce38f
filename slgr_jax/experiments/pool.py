"""Runs side by side: on a CPU in processes of one thread each, so that all cores are used; on an
accelerator the seeds of a run in one program (slgr_jax/training/multi_seed.py).

A run that is finished is not touched again: it is known by its config, its data, its teacher's
answers and its ensemble's checkpoints, and by `outcome.json`, which is written when training has
ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.process
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from slgr_jax import progress
from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError, NonFiniteError, listing
from slgr_jax.experiments import results

if TYPE_CHECKING:
    from slgr_jax.training.loop import Outcome

# Trains runs; what each came to. `train_runs` with its knobs.
Train = Callable[[Sequence[RunConfig]], list[dict[str, Any]]]


class Stream(Protocol):
    """Runs of which some can only be named when others have ended."""

    def due(self) -> list[RunConfig] | None:
        """What to train next; asked again when all of it has ended. [] when there is nothing more,
        None when it is not known yet: as long as another stream has not ended."""
        ...

    def tell(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """What the runs that were due came to, in their order; see `train_runs`."""
        ...


Job = TypeVar("Job")
Result = TypeVar("Result")
LOGGER = logging.getLogger(__name__)

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
      runs: to train; the same run is trained once.
      workers: processes; 1 trains in this process, with all threads and devices.
      root: directory that names of runs are shown from.

    Raises:
      ConfigError: a directory holds a run with other settings.
    """
    todo = {run.workdir: run for run in runs if not finished(run)}
    for run in todo.values():
        _refuse_other(run)
    shown = functools.partial(_show, root=root, begin=time.monotonic())
    for wave in waves(list(todo.values())):
        _each(_fit_group, groups(wave), workers, shown)
    return [_known(run) for run in runs]


def train_streams(
    streams: Sequence[Stream], total: int, *, workers: int, root: pathlib.Path
) -> None:
    """Train the runs of all streams, each of which goes on as soon as its own have ended.

    Args:
      total: of runs, for the bar and the time that is left.
      workers, root: as of `train_runs`.

    Raises:
      ConfigError: as of `train_runs`; what a stream raises.
      SystemExit: interrupted.
    """
    if workers == 1:
        while batches := _due(streams):
            every = [run for _, due in batches for run in due]
            outcomes = iter(train_runs(every, workers=1, root=root))
            for stream, due in batches:
                stream.tell([next(outcomes) for _ in due])
        return

    shown = functools.partial(_show, root=root, begin=time.monotonic())
    awaited: dict[int, list[RunConfig]] = {}  # place of a stream -> its runs, until all have ended
    jobs: dict[Future[None], tuple[int, RunConfig]] = {}

    def begin(pool: ProcessPoolExecutor) -> None:
        """What is due of the streams that await nothing."""
        nonlocal total
        while batches := _due([stream for at, stream in enumerate(streams) if at not in awaited]):
            for stream, due in batches:
                todo = [run for run in due if not finished(run)]
                total -= len(due) - len(todo)  # an earlier call trained them
                for run in todo:
                    _refuse_other(run)
                    jobs[pool.submit(in_worker, fit, run)] = streams.index(stream), run
                if todo:
                    awaited[streams.index(stream)] = due
                else:
                    stream.tell([_known(run) for run in due])

    done = 0
    with _interruptible(), _workers(workers) as pool:
        begin(pool)
        with progress.bar(total, "run") as bar:
            while jobs:
                for future in progress.first_ended(jobs, bar)[0]:
                    future.result()
                    at, run = jobs.pop(future)
                    done += 1
                    shown(done, total, [run])
                    if at not in (place for place, _ in jobs.values()):
                        streams[at].tell([_known(run) for run in awaited.pop(at)])
                begin(pool)


def _due(streams: Sequence[Stream]) -> list[tuple[Stream, list[RunConfig]]]:
    """What is due of each; who waits for others is asked again when one of these has ended."""
    found, waiting = list[tuple[Stream, list[RunConfig]]](), list(streams)
    while waiting:
        answers = [(stream, stream.due()) for stream in waiting]
        found += [(stream, due) for stream, due in answers if due]
        still = [stream for stream, due in answers if due is None]
        if len(still) == len(waiting):
            break
        waiting = still
    return found


def evaluate_runs(runs: Sequence[RunConfig], *, workers: int) -> None:
    """Let every run meet the test part, once."""
    todo = {run.workdir: run for run in runs if not results.evaluated(run.workdir)}
    _each(_evaluate, list(todo.values()), workers, lambda done, of, run: None)


def waves(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """The runs that read none of the others (--reference_runs), then those that read these, ..."""
    left, in_turn = list(runs), list[list[RunConfig]]()
    while left:
        untrained = {run.workdir for run in left}
        wave = [run for run in left if untrained.isdisjoint(run.reference_runs)]
        assert wave, "no run reads itself"
        in_turn.append(wave)
        left = [run for run in left if run not in wave]
    return in_turn


def groups(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs that one call trains: on an accelerator, those that differ in nothing but their seed.

    On a CPU each alone: the kernels in C++, in a process a run, are faster than XLA's programs of
    several seeds.
    """
    import jax

    if jax.default_backend() == "cpu":
        return [[run] for run in runs]
    by_settings: dict[RunConfig, list[RunConfig]] = {}
    for run in runs:
        seedless = dataclasses.replace(run.train, seed=0)
        settings = dataclasses.replace(run, workdir="", train=seedless)
        by_settings.setdefault(settings, []).append(run)
    return list(by_settings.values())


def finished(run: RunConfig) -> bool:
    """Whether the run's directory holds this run, trained to its end on what is there now."""
    from slgr_jax.data import schema
    from slgr_jax.training import run_directory

    if results.outcome(run.workdir) is None or run_directory.read_config(run.workdir) != run:
        return False

    manifest = schema.read_dataset_manifest(run.data)
    same: bool = run_directory.recorded(run.workdir) == {
        "split_hash": manifest.split_hash,
        "id_map_hash": manifest.id_map_hash,
        "teacher_hash": run_directory.teacher_hash(run),
    }
    return (
        same
        and not _other_products(run)
        and run_directory.other_reference_runs(run.workdir, run) is None
    )


def _other_products(run: RunConfig) -> bool:
    """Whether a product that the run reads beside its teacher holds something else now."""
    from slgr_jax.data import dataset
    from slgr_jax.training import edited, run_directory, vector_products

    if not (vector_products.named(run) or run.edits.named or run.hardness.product):
        return False
    record, data = run_directory.read_record(run.workdir), dataset.load(run.data, verify=False)
    return any(of.changed(run, data, record) for of in (vector_products, edited))


def _refuse_other(run: RunConfig) -> None:
    """Refuse a directory that holds a run which this one cannot go on from."""
    from slgr_jax import config
    from slgr_jax.training import run_directory

    if not (pathlib.Path(run.workdir) / run_directory.CONFIG).is_file():
        return
    changed = [
        text
        for text in config.differences(run_directory.read_config(run.workdir), run)
        if text[2:].split(":")[0] not in run_directory.RESUMABLE
    ]
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with other settings ({listing(changed)}); choose another "
            "--out, or remove it"
        )


def _known(run: RunConfig) -> dict[str, Any]:
    outcome = results.outcome(run.workdir)
    assert outcome is not None, "training ended with an outcome"
    return outcome


def _show(
    done: int, of: int, group: Sequence[RunConfig], *, root: pathlib.Path, begin: float
) -> None:
    """A line per run; the time left of this stage is that of those done, in proportion."""
    left = (time.monotonic() - begin) / done * (of - done)
    soon = f"; about {left / 60:.0f} min left of these" if left >= 60 else ""
    for run in group:
        outcome, name = _known(run), pathlib.Path(run.workdir).relative_to(root)
        value = outcome["error"] or "no validation"
        if outcome["best_metric"] is not None:
            value = f"{outcome['best_metric']:.4f} (epoch {outcome['best_epoch']})"
        LOGGER.info("  [%d/%d] %s: %s%s", done, of, name, value, soon)


# --------------------------------------------------------------------- what one call trains


def _fit_group(group: Sequence[RunConfig]) -> None:
    """Train a run, or the seeds of one together; write their outcomes.

    The lines of all seeds go into the first one's train.log. Where one of them diverges, each is
    trained alone: the others are not to be lost with it.
    """
    if len(group) == 1:
        fit(group[0])
        return
    from slgr_jax.training import multi_seed

    for run in group:
        pathlib.Path(run.workdir).mkdir(parents=True, exist_ok=True)
        results.forget(run.workdir)

    begin = time.process_time()
    try:
        with _logged(group[0]):
            outcomes = multi_seed.train_seeds(group)
    except NonFiniteError:
        for run in group:
            fit(run)
        return

    cpu_seconds = (time.process_time() - begin) / len(group)
    for run, outcome in zip(group, outcomes, strict=True):
        path = pathlib.Path(run.workdir) / results.OUTCOME
        results.write_json(path, _outcome(outcome, cpu_seconds))


@contextlib.contextmanager
def _logged(run: RunConfig) -> Iterator[None]:
    """What is printed or logged goes into RUN/train.log."""
    from slgr_jax.training import training_log

    path = pathlib.Path(run.workdir) / "train.log"
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        training_log.lines_to(log),
    ):
        yield


def _outcome(outcome: Outcome, cpu_seconds: float) -> dict[str, Any]:
    """What outcome.json says of a run that was trained to its end."""
    return {
        "best_metric": outcome.best_metric,
        "best_epoch": outcome.best_epoch,
        "epoch": outcome.epoch,
        "seconds": outcome.seconds,
        "cpu_seconds": cpu_seconds,
        "error": None,
    }


def _diverged(error: NonFiniteError) -> dict[str, Any]:
    """What outcome.json says of a run whose numbers are no longer finite."""
    unknown = ("best_metric", "best_epoch", "epoch", "seconds", "cpu_seconds")
    return {**dict.fromkeys(unknown), "error": str(error)}


def fit(run: RunConfig) -> None:
    """Train a run, its lines into RUN/train.log, and write its outcome.

    Raises:
      KeyboardInterrupt: a signal stopped it; it goes on when called again.
    """
    from slgr_jax.training import loop

    root = pathlib.Path(run.workdir)
    root.mkdir(parents=True, exist_ok=True)
    results.forget(root)

    begin = time.process_time()
    with _logged(run):
        try:
            outcome = loop.train(run)
        except NonFiniteError as error:
            written = _diverged(error)
        else:
            if outcome.status != "finished":
                raise KeyboardInterrupt
            written = _outcome(outcome, time.process_time() - begin)
    results.write_json(root / results.OUTCOME, written)


def _evaluate(run: RunConfig) -> None:
    """metrics.json and per_user.parquet; of labelled rows also bins and each user's AUC."""
    from slgr_jax.reports.run_evaluation import evaluate_run

    root = pathlib.Path(run.workdir)
    evaluate_run(run.workdir, root.name)
    labelled = {} if run.evaluation.rows == "none" else _evaluate_rows(run)
    results.write_json(root / results.ROWS, labelled)  # last: it says that all is written


def _evaluate_rows(run: RunConfig) -> dict[str, Any]:
    """Slice -> metrics of the labelled test rows, bins among the slices; writes each user's AUC."""
    from slgr_jax.evaluation import click_metrics
    from slgr_jax.evaluation.results import write_row_users
    from slgr_jax.models.scoring import score_rows
    from slgr_jax.sampling import labelled_rows
    from slgr_jax.training import restore

    restored = restore.restore_run(run.workdir)
    data, slices = restored.dataset, restored.dataset.slices(run.slices)
    rows = labelled_rows.make_rows(data, "test", run.evaluation, run.loss)
    scores = np.asarray(score_rows(restored.backbone)(restored.scoring("test"), rows))

    masks = click_metrics.row_slices(rows, slices)
    masks |= click_metrics.bin_slices(
        rows,
        data.history,
        data.popularity,
        run.slices.history_bins,
        run.slices.popularity_bins,
    )
    users = {"all": click_metrics.per_user(rows, scores)}
    for kind in ("tail", "head"):
        users[kind] = click_metrics.per_user(rows, scores, masks[f"{kind}_items"])
    write_row_users(run.workdir, data, slices, {"test": users})
    return click_metrics.summarize_slices(rows, scores, masks)


# --------------------------------------------------------------------- several runs at once


def _each(
    work: Callable[[Job], None],
    jobs: Sequence[Job],
    workers: int,
    shown: Callable[[int, int, Job], None],
) -> None:
    """`work` on every job: in this process, or in as many as `workers`.

    A failure lets the jobs that have begun end, then is raised.

    Raises:
      SystemExit: interrupted.
    """
    with _interruptible():
        if workers == 1 or len(jobs) == 1:
            for done, job in enumerate(progress.over(jobs, "run"), 1):
                work(job)
                shown(done, len(jobs), job)
            return

        with _workers(min(workers, len(jobs) or 1)) as pool, progress.bar(len(jobs), "run") as bar:
            jobs_of: dict[Future[None], Job] = {
                pool.submit(in_worker, work, job): job for job in jobs
            }
            running, done = set(jobs_of), 0
            while running:
                ended, running = progress.first_ended(running, bar)
                for future in ended:
                    future.result()
                    done += 1
                    shown(done, len(jobs), jobs_of[future])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt ends the program with a line."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; call again to go on") from None


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool; where something fails, what has begun ends before that is raised."""
    with process_pool(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which do not outlive this one; call through `in_worker`."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin)


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


def in_worker(work: Callable[..., Result], *arguments: Any) -> Result:
    """`work` on its arguments, in a process of `process_pool`."""
    import jax

    try:
        return work(*arguments)
    finally:
        jax.clear_caches()  # a worker lives through many runs


def check_data(data: str) -> str:
    """The name of a dataset directory; a directory that is none is an error."""
    from slgr_jax.data import schema

    manifest = schema.read_dataset_manifest(data)
    if not sum(file.rows for file in manifest.files["test"]):
        raise ConfigError(f"{data} has no test part: nothing to compare on")
    return manifest.name
