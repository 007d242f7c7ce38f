"""The loop: dispatch steps, validate, keep the best, stop early, survive being killed.

The host never waits between two validations: a dispatch runs K steps, and its sums are read
while the next one runs. Everything the loop needs to go on is in one checkpoint, so a resumed
run is bit-identical to an uninterrupted one.

One loop serves one seed and many: what advances their states is an `Engine`, here that of one seed;
`multi_seed.py` has that of a vmapped program.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from slgr_jax import cluster, config
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import NonFiniteError, listing
from slgr_jax.evaluation import ranking_metrics
from slgr_jax.models.scoring import ServingState
from slgr_jax.training import (
    agreement,
    checkpoint,
    epochs,
    initial_values,
    restore,
    run_directory,
)
from slgr_jax.training.build import Experiment, build
from slgr_jax.training.checkpoint import Checkpoints, Progress
from slgr_jax.training.programs import Programs, make_programs, put_number
from slgr_jax.training.state import TrainState, abstract_serving, abstract_state
from slgr_jax.training.step import Health, RunSteps, Trainer, make_run_steps
from slgr_jax.training.tracking import Trackers
from slgr_jax.training.training_log import TrainingLog

LOGGER = logging.getLogger(__name__)

# A loss so many times that of a recommender that knows nothing: training does not come back.
_DIVERGED = 1e3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How `train` ended.

    Attributes:
      status: finished | interrupted.
      epoch, step: how far it got.
      best_epoch, best_metric: of the validation that --early_stop_metric names.
      seconds: wall time of this call's epochs, evaluation included.
    """

    status: str
    epoch: int
    step: int
    best_epoch: int
    best_metric: float | None
    seconds: float


# -------------------------------------------------------------------------------------- engine

SeedSums = tuple[Mapping[str, Any], Health]  # numbers, by name of `Trainer.sum_names`


class Engine(Protocol):
    """What advances the states of N seeds, which all stand at the same step."""

    def advance(self, count: int) -> Any:
        """Dispatch `count` steps; what `read` takes, still on the device."""
        ...

    def read(self, sums: Any) -> list[SeedSums]:
        """The sums and the health of a dispatch, by seed."""
        ...

    def state(self, seed: int) -> TrainState:
        """The state of one of them."""
        ...


class OneSeed:
    """The engine of one seed: the program of `step.make_run_steps`."""

    def __init__(
        self, experiment: Experiment, run_steps: RunSteps, state: TrainState, key: jax.Array
    ) -> None:
        self._arrays, self._run_steps = experiment.arrays, run_steps
        self._put = functools.partial(put_number, experiment.trainer)
        self._state, self._key = state, key

    def advance(self, count: int) -> Any:
        self._state, sums, health = self._run_steps(
            self._state, self._arrays, self._key, self._put(count)
        )
        return sums, health

    def read(self, sums: Any) -> list[SeedSums]:
        return [jax.device_get(sums)]

    def state(self, seed: int) -> TrainState:
        return self._state


# ---------------------------------------------------------------------------------------- loop


@dataclasses.dataclass
class SeedRun:
    """One of a loop's runs: where it stands and what it writes to."""

    run: config.RunConfig
    saved: Checkpoints
    log: TrainingLog
    progress: Progress = dataclasses.field(default_factory=Progress)
    best: ServingState | None = None
    outcome: Outcome | None = None
    diverged: bool = False

    @property
    def over(self) -> bool:
        """Epochs or patience are used up."""
        return epochs.over(self.run.train, self.progress)

    def watch(self, loss: float, n_items: int) -> None:
        """Warn once when the loss is far above that of a recommender that knows nothing.

        That is log 2 of pairs and rows and log I of a softmax over I items.
        """
        ignorant = math.log(max(n_items, 2))
        if loss > _DIVERGED * ignorant and not self.diverged:
            self.diverged = True
            LOGGER.warning(
                "%s: the loss is %.3g, of a recommender that knows nothing at most %.3g: training "
                "diverges; lower --lr (%g) or --lambda",
                self.run.workdir, loss, ignorant, self.run.optimizer.lr,
            )  # fmt: skip

    def fail(self, what: str) -> NonFiniteError:
        """The error of a run that is not finite any more."""
        kept = self.saved.progress()
        good = (
            f"the checkpoint of step {kept.step} is kept" if kept else "there is no checkpoint yet"
        )
        return NonFiniteError(
            f"seed {self.run.train.seed} ({self.run.workdir}): {what} not finite; {good}; lower "
            "--lr, --dense_lr or --lambda, or raise --l2"
        )


class Loop:
    """The epochs of N seeds; every one that is not over stands at the same step.

    Args:
      seeds: the runs, in the engine's order.
      interruptible: whether they are saved between validations and when a stop is asked for.
      stop: set by whoever wants the loop to save and leave.
    """

    def __init__(
        self,
        experiment: Experiment,
        programs: Programs,
        engine: Engine,
        seeds: Sequence[SeedRun],
        *,
        interruptible: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        self._experiment, self._programs, self._engine = experiment, programs, engine
        self._seeds, self._interruptible = seeds, interruptible
        layout, wanted = experiment.trainer.layout, stop or threading.Event()
        self._agreement = agreement.make_agreement(layout, wanted, self._due)
        self._in_flight: list[Any] = []  # what the engine reads, and the wishes sent with it
        self._begin = self._last_save = time.monotonic()

    @property
    def _live(self) -> list[tuple[int, SeedRun]]:
        """The runs that are not over, with their place in the engine."""
        return [(at, seed) for at, seed in enumerate(self._seeds) if seed.outcome is None]

    def train(self) -> None:
        """Train until every run is over, or a stop is asked for: each has its outcome then."""
        for at, seed in self._live:
            begins = bool(seed.run.train.init_from) and not seed.progress.step
            if begins and not self._validate_beginning(at, seed):
                self._finish(at, seed, "interrupted")
            elif seed.over:
                self._finish(at, seed, "finished")
        while self._live:
            begin, before = time.monotonic(), self._triples()
            whole = self._round()
            triples, seconds = self._triples() - before, time.monotonic() - begin
            rate = triples / seconds if triples else None
            for at, seed in self._live:
                validated = whole and self._validate(at, seed, rate)
                if validated and seed.over:
                    self._finish(at, seed, "finished")
                elif self._agreement.stop:
                    self._finish(at, seed, "interrupted")
                elif validated and self._agreement.save:
                    self._save(at, seed)

    def _triples(self) -> float:
        """Trained by each run since its last validation, before a resumption too."""
        return self._live[0][1].progress.sums.get("triples", 0.0)

    def _validate_beginning(self, at: int, seed: SeedRun) -> bool:
        """Validate what --init_from gave: the state to beat, and the best if nothing does.

        False if a stop was asked for meanwhile.
        """
        programs, context = self._programs, self._experiment.arrays.context
        seed.best = programs.serving(self._engine.state(at), context)
        if not programs.validate.possible:
            return True
        name = seed.run.train.early_stop_metric
        try:
            metrics = programs.validate(seed.best, self._agreement.between_chunks)
        except agreement.InterruptedValidation:
            return False
        seed.progress = dataclasses.replace(seed.progress, best_metric=metrics[name])
        record = {"epoch": 0, **{f"valid/{key}": metric for key, metric in metrics.items()}}
        self._record(seed, record, f"epoch    0  begins with valid {name} {metrics[name]:.4f}")
        return True

    def _round(self) -> bool:
        """Run up to the next validation; False if a stop was asked for first."""
        programs = self._programs
        progress, train = self._live[0][1].progress, self._live[0][1].run.train
        start = progress.epoch * programs.per_epoch
        step, end = progress.step, epochs.next_epoch(train, progress) * programs.per_epoch
        while step < end:
            done = step - start
            count = min(programs.dispatch - done % programs.dispatch, end - step)
            self._in_flight.append((self._engine.advance(count), self._agreement.cast()))
            step += count
            for _, seed in self._live:
                seed.progress = dataclasses.replace(seed.progress, step=step)
            if len(self._in_flight) > 1:
                self._read()
            if step < end and self._interruptible:  # that of `end` comes after its validation
                if self._agreement.stop:
                    return False
                if self._agreement.save:
                    for at, seed in self._live:
                        self._save(at, seed)
        self._drain()
        return True

    def _drain(self) -> None:
        """Read everything in flight."""
        while self._in_flight:
            self._read()

    def _read(self) -> None:
        sums, votes = self._in_flight.pop(0)
        by_seed = self._engine.read(sums)
        self._agreement.count(votes)
        for at, seed in self._live:
            sums, health = by_seed[at]
            if health.step >= 0:
                raise seed.fail(_leaves_at_fault(self._experiment.trainer, health))
            seed.progress = epochs.add_sums(seed.progress, sums)
            seed.log.advance(seed.progress.step)

    def _validate(self, at: int, seed: SeedRun, rate: float | None) -> bool:
        """Validate a run, keep its best state, count towards its patience.

        False if a stop was asked for meanwhile: whoever goes on from this step does it again.
        """
        programs = self._programs
        serving = programs.serving(self._engine.state(at), self._experiment.arrays.context)
        metrics = None
        if programs.validate.possible:
            try:
                metrics = programs.validate(serving, self._agreement.between_chunks)
            except agreement.InterruptedValidation:
                return False
        name = seed.run.train.early_stop_metric
        if metrics is not None and name not in metrics:  # scores of which nothing can be measured
            raise seed.fail(f"validation after step {seed.progress.step - 1}: {name}")
        seed.progress, record, line = epochs.close_epoch(
            self._experiment.trainer, seed.progress, metrics, rate
        )
        if seed.progress.best_epoch == seed.progress.epoch:
            seed.best = serving
        seed.watch(record["train/loss"], self._experiment.trainer.plan.n_items)
        self._record(seed, record, line)
        return True

    def _record(self, seed: SeedRun, record: dict[str, float | int], line: str) -> None:
        prefix = f"seed {seed.run.train.seed}  " if len(self._seeds) > 1 else ""
        seed.log.record(seed.progress.step, record, prefix + line)

    def _due(self) -> bool:
        every = self._experiment.config.train.checkpoint_every_s
        return self._interruptible and time.monotonic() - self._last_save >= every

    def _save(self, at: int, seed: SeedRun) -> None:
        """Write a checkpoint, of a state in which every number is finite."""
        self._drain()
        state = self._engine.state(at)
        finite = jax.device_get(self._programs.finite(state))
        bad = [name for name, fine in finite.items() if not fine]
        if bad:
            raise seed.fail(f"after step {seed.progress.step - 1}: {listing(bad)}")
        assert seed.best is not None, "the first validation is the best so far"
        seed.saved.save(state, seed.best, seed.progress)
        self._last_save = time.monotonic()
        self._agreement.saved()

    def _finish(self, at: int, seed: SeedRun, status: str) -> None:
        self._save(at, seed)
        seed.outcome = outcome(status, seed.progress, time.monotonic() - self._begin)
        seed.log.end(status)


def _leaves_at_fault(trainer: Trainer, health: Health) -> str:
    """`step S: names` of what was not finite first."""
    names = trainer.leaf_names
    bad = [name for bit, name in enumerate(names) if int(health.leaves) >> bit & 1]
    return f"step {int(health.step)}: {listing(bad)}"


def outcome(status: str, progress: Progress, seconds: float) -> Outcome:
    """How a run that stands at `progress` ended."""
    return Outcome(
        status,
        progress.epoch,
        progress.step,
        progress.best_epoch,
        progress.best_metric,
        seconds,
    )


# --------------------------------------------------------------------------------------- a run


def train(run: config.RunConfig) -> Outcome:
    """Train `run` in its workdir, resuming what is there.

    `agreement.STOPS` save and return an `interrupted` outcome; the same call goes on later. The
    processes of a job (`cluster.start`) all call this.

    Raises:
      UserError: bad data, teacher, config or a non-finite step, each with its fix.
    """
    with agreement.stop_on_signal() as stop, cluster.session(), jax.transfer_guard("disallow"):
        dataset = cluster.together(lambda: load_data(run))
        agreement.refuse_other_settings(run, dataset)
        with jax.transfer_guard("allow"):  # set-up: constants and keys are made here
            experiment = cluster.together(lambda: build(run, dataset))
        with run_directory.opened(run, dataset) as may_write:
            return _train_one(experiment, stop, may_write)


def load_data(run: config.RunConfig) -> Dataset:
    """The run's dataset, once it is known that its validation has what --early_stop_metric names.

    Raises:
      ConfigError: it has not.
      ManifestError, ShardError: the dataset is damaged.
    """
    ranking_metrics.check_metric(
        run.train.early_stop_metric,
        run.evaluation.ks,
        ranking=run.evaluation.ranking,
        rows=run.evaluation.rows != "none",
    )
    if run.reads_own_users and cluster.processes() > 1:
        return restore.load_own_users(run)
    return restore.load_data(run)


def _train_one(
    experiment: Experiment, stop: threading.Event, may_write: Callable[[], None]
) -> Outcome:
    run, trainer = experiment.config, experiment.trainer
    seed_number = np.int32(run.train.seed)
    with jax.transfer_guard("allow"):
        programs = make_programs(experiment)
        key = programs.key(seed_number)
        run_steps: Any = make_run_steps(trainer)
        saved = cluster.together(
            lambda: checkpoint.Checkpoints(
                run.workdir,
                writable=True,
                verify=run.train.verify_checksums,
                may_write=may_write,
            )
        )
        progress = cluster.together(saved.progress)
        agreement.refuse_other_progress(run.workdir, progress)
        if progress is None:
            progress = Progress()
            state = programs.init(seed_number)
            best = programs.serving(state, experiment.arrays.context)
        else:
            state, best = saved.restore(abstract_state(trainer), abstract_serving(trainer))
        if cluster.processes() > 1:
            # Gloo waits half a minute for whoever is still compiling, and then ends the job.
            lowered = run_steps.lower(state, experiment.arrays, key, put_number(trainer, 1))
            run_steps = cluster.together(lowered.compile)

    cluster.together(lambda: write_record(experiment, run, programs))
    engine = OneSeed(experiment, run_steps, state, key)
    del state  # the first dispatch takes its memory
    with open_log(run, programs, progress) as log:
        start = f"resuming at step {progress.step}" if progress.step else "starting"
        log.say(opening(start, experiment, programs))
        seed = SeedRun(run, saved, log, progress, best)
        Loop(experiment, programs, engine, [seed], interruptible=True, stop=stop).train()
        saved.close()
    assert seed.outcome is not None
    return seed.outcome


def open_log(run: config.RunConfig, programs: Programs, progress: Progress) -> TrainingLog:
    """The log of a run that stands at `progress`."""
    with jax.transfer_guard("allow"):  # a tracker may look at the devices
        speaks = cluster.is_first()  # for all processes of the job
        return TrainingLog(
            run.workdir,
            epoch=progress.epoch if progress.step else -1,  # -1: keeps no record at all
            total=run.train.epochs * programs.per_epoch,
            trackers=Trackers(run) if speaks and run.train.tracker_names else None,
            silent=not speaks,
        )


def write_record(experiment: Experiment, run: config.RunConfig, programs: Programs) -> None:
    """Write `run.json`."""
    run_directory.write_record(
        run,
        experiment.dataset,
        experiment.trainer,
        experiment.initial,
        **experiment.counts,
        steps_per_epoch=programs.per_epoch,
        steps_per_dispatch=programs.dispatch,
    )


def opening(start: str, experiment: Experiment, programs: Programs) -> str:
    """The line before the first epoch."""
    run, dataset, layout = experiment.config, experiment.dataset, experiment.trainer.layout
    kind = layout.mesh.devices.ravel()[0].device_kind
    guidance = "none"
    if run.guided:
        guidance = f"{run.guidance.guidance} of {run.guided_by} through gate {run.gate.gate}"
    return (
        f"{start}: {run.model.backbone} on {dataset.manifest.name}, {dataset.n_users} users x "
        f"{dataset.n_items} items, {dataset.train_rows} training interactions, "
        f"{programs.per_epoch} steps an epoch, {layout.devices} x {kind}, guidance: {guidance}"
        f"{initial_values.summary(experiment.initial, dataset)}"
    )
