"""The loop: dispatch steps, validate, keep the best, stop early, survive being killed.

The host never waits between two validations: a dispatch runs K steps, and its sums are read
while the next one runs. Everything the loop needs to go on is in one checkpoint, so a resumed
run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slgr_jax import config, files
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import NonFiniteError, listing
from slgr_jax.evaluation import click_metrics, full_ranking, ranking_metrics
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import DotBackbone, JointBackbone, SequenceBackbone
from slgr_jax.models.scoring import Scoring, ServingState, moments, score_rows, score_users
from slgr_jax.sampling import arrays, labelled_rows
from slgr_jax.sampling.context import Context
from slgr_jax.training import build, checkpoint, run_directory
from slgr_jax.training.step import (
    Health,
    Sums,
    Trainer,
    TrainState,
    init_state,
    make_run_steps,
    make_serving_state,
)
from slgr_jax.training.training_log import TrainingLog

LANES_PER_DISPATCH = 1 << 21  # steps_per_dispatch=0: work in one dispatch, in triples of mf
# What else costs as much as a triple of matrix factorisation, on a CPU, to a factor of a few: a
# place of a window, a triple of a click model, 16 logits of a softmax, 8 rows that a graph reads.
# (The last two count how many go into one triple.)
_PLACE, _CLICK, _LOGITS, _GRAPH_ROWS = 64, 64, 16, 8


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


def steps_per_dispatch(trainer: Trainer) -> int:
    """K: what --steps_per_dispatch says, or as many steps as take a second, roughly."""
    backbone, plan = trainer.backbone, trainer.plan
    lanes = plan.triples + plan.preferences
    work = lanes
    if isinstance(backbone, SequenceBackbone):
        work = lanes * backbone.length * _PLACE
    elif isinstance(backbone, JointBackbone):
        work = lanes * _CLICK
    elif trainer.config.loss_name == "softmax":
        work += lanes * plan.n_items // _LOGITS
    if isinstance(backbone, DotBackbone) and backbone.whole:
        work += 12 * plan.drawn // _GRAPH_ROWS  # a few layers, both ways, forward and back
    return trainer.config.train.steps_per_dispatch or max(1, LANES_PER_DISPATCH // work)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, once; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, old[signal.SIGINT])

    for number in old:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Validation:
    """The overall validation metrics of a state: train items masked, full ranking; rows."""

    def __init__(self, trainer: Trainer, dataset: Dataset, context: Context) -> None:
        config = trainer.config
        self._config, self._kernels = config.evaluation, config.train.kernels
        self._context = context
        self._score = score_users(trainer.backbone)
        self._score_rows = score_rows(trainer.backbone)
        self._relevant = dataset.positives(("valid",))
        self._seen = dataset.positives(("train",))
        self._n_items = dataset.n_items
        self._mesh = trainer.layout.mesh if trainer.layout.devices > 1 else None
        self._rows, self._slices = None, dataset.slices(config.slices)
        if self.possible and self._config.rows != "none":
            self._rows = labelled_rows.make_rows(dataset, "valid", self._config, config.loss)

    @property
    def possible(self) -> bool:
        return self._relevant.indices.size > 0

    def __call__(self, serving: ServingState) -> dict[str, float]:
        scoring = Scoring(serving, self._context, moments(self._context, "valid"))
        found: ranking_metrics.Values = {}
        if self._config.ranking:
            ranking = full_ranking.rank(
                self._score,
                scoring,
                self._relevant,
                self._seen,
                self._n_items,
                users_per_chunk=self._config.eval_users_per_chunk,
                top_k=0,
                pooled_auc=False,
                mesh=self._mesh,
                kernels=self._kernels,
            )
            found = ranking_metrics.summarize(ranking_metrics.per_user(ranking, self._config.ks))
        if self._rows is not None:
            scores = self._score_rows(scoring, self._rows)
            overall = click_metrics.summarize_rows(self._rows, scores, self._slices)["overall"]
            found |= {f"rows_{name}": value for name, value in overall.items()}
        return {name: float(value) for name, value in found.items() if value is not None}


# What runs once at the start is a program each, with the seed as an argument: run line by line it
# would be ten, and to look one up in the compilation cache takes longer than to run it.


def _draw_key(seed: jax.Array) -> jax.Array:
    """Key data of a run's draws; the seed itself is the initialisation's."""
    return jax.random.key_data(jax.random.key(seed + 1))


def _make_init(trainer: Trainer) -> Callable[[np.int32], TrainState]:
    """Jitted `init_state`: seed -> a fresh state, laid out as the steps want it."""
    everywhere = trainer.layout.replicated
    layout = TrainState(everywhere, trainer.layout.table_sharding, everywhere, everywhere)  # type: ignore[arg-type]
    return jax.jit(functools.partial(init_state, trainer), out_shardings=layout)


def _finite(trainer: Trainer, state: TrainState) -> dict[str, jax.Array]:
    """Which of the state's parts hold only finite numbers."""
    found = {
        f"tables/{name}": embedding_table.all_finite(state.tables[name], spec.width)
        for name, spec in trainer.backbone.tables.items()
    }
    for name, part in (("params", state.params), ("opt_state", state.opt_state)):
        fine = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(part)]
        found[name] = jnp.all(jnp.array(fine))
    return found


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a loop runs besides its steps; each is compiled once, whatever the number of seeds.

    Attributes:
      init: seed -> a fresh state.
      key: seed -> key data of its draws.
      serving: (state, context) -> what validation and export score with.
      finite: state -> which of its parts hold only finite numbers.
      validate: the metrics of a serving state.
      per_epoch: steps of an epoch.
      dispatch: K, steps of a dispatch.
    """

    init: Callable[[np.int32], TrainState]
    key: Callable[[np.int32], jax.Array]
    serving: Callable[[TrainState, Context], ServingState]
    finite: Callable[[TrainState], dict[str, jax.Array]]
    validate: _Validation
    per_epoch: int
    dispatch: int


def make_programs(trainer: Trainer, dataset: Dataset, context: Context) -> Programs:
    """The programs of runs that `trainer` trains on `dataset`."""
    return Programs(
        init=_make_init(trainer),
        key=jax.jit(_draw_key, out_shardings=trainer.layout.replicated),
        serving=make_serving_state(trainer),
        finite=jax.jit(functools.partial(_finite, trainer)),
        validate=_Validation(trainer, dataset, context),
        per_epoch=-(-trainer.plan.drawn // trainer.plan.triples),
        dispatch=steps_per_dispatch(trainer),
    )


def next_epoch(train: config.TrainConfig, progress: checkpoint.Progress) -> int:
    """The epoch after which the next validation comes."""
    return min((progress.epoch // train.eval_every + 1) * train.eval_every, train.epochs)


def over(train: config.TrainConfig, progress: checkpoint.Progress) -> bool:
    """Epochs or patience are used up."""
    return progress.epoch >= train.epochs or 0 < train.patience <= progress.stale


def add_sums(
    progress: checkpoint.Progress, values: Mapping[str, np.ndarray]
) -> checkpoint.Progress:
    """The progress with a dispatch's sums added to those since the last validation."""
    total = dict(progress.sums)
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + float(value)
    return dataclasses.replace(progress, sums=total)


def close_epoch(
    trainer: Trainer,
    progress: checkpoint.Progress,
    found: Mapping[str, float] | None,
    seconds: float,
) -> tuple[checkpoint.Progress, dict[str, float | int], str]:
    """Keep the best validation, count towards the patience.

    Args:
      progress: with the sums of all steps since the last validation.
      found: the metrics of this validation; None: there is nothing to validate on.
      seconds: that those steps took.

    Returns:
      The progress after it, whose `best_epoch` is its `epoch` if this state is the best so far;
      what the log records of it; the line to show.
    """
    sums, train = progress.sums, trainer.config.train
    means = {
        name: value / sums["steps"]
        for name, value in sums.items()
        if name not in ("steps", "triples", "preferences")
    }
    if not trainer.guided:
        means = {k: v for k, v in means.items() if k not in ("alpha", "agreement")}
    epoch = next_epoch(train, progress)
    rate = sums["triples"] / max(seconds, 1e-9)
    record: dict[str, float | int] = {"epoch": epoch}
    record |= {f"train/{name}": value for name, value in means.items()}
    record["triples_per_s"] = round(rate)
    text = f"epoch {epoch:4d}  loss {means['loss']:.4f}"
    if trainer.guided:
        text += f"  guidance {means['guidance_loss']:.4f}  alpha {means['alpha']:.3f}"
    value, best = None, progress.best_metric
    if found is not None:
        record |= {f"valid/{name}": one for name, one in found.items()}
        value = found[train.early_stop_metric]
        text += f"  valid {train.early_stop_metric} {value:.4f}"
    progress = dataclasses.replace(progress, epoch=epoch, sums={})
    if value is None or best is None or value > best:
        progress = dataclasses.replace(progress, best_metric=value, best_epoch=epoch, stale=0)
        text += "" if value is None else " *"
    else:
        progress = dataclasses.replace(progress, stale=progress.stale + 1)
    return progress, record, f"{text}  {rate / 1e6:.2f} M triples/s"


def leaves_at_fault(trainer: Trainer, health: Health) -> str:
    """`step S: names` of what was not finite first."""
    names = trainer.leaf_names
    bad = [name for bit, name in enumerate(names) if int(health.leaves) >> bit & 1]
    return f"step {int(health.step)}: {listing(bad)}"


def not_finite(programs: Programs, state: TrainState) -> list[str]:
    """The parts of a state that hold a NaN or an infinity."""
    return [name for name, fine in jax.device_get(programs.finite(state)).items() if not fine]


def open_journal(
    run: config.RunConfig, programs: Programs, progress: checkpoint.Progress
) -> TrainingLog:
    """The log of a run that stands at `progress`."""
    return TrainingLog(
        run.workdir,
        step=progress.step,
        epoch=progress.epoch,
        total=run.train.epochs * programs.per_epoch,
        tensorboard=run.train.tensorboard,
    )


def write_record(
    run: config.RunConfig, dataset: Dataset, trainer: Trainer, programs: Programs
) -> None:
    """Write `run.json`."""
    resolved = {
        "steps_per_epoch": programs.per_epoch,
        "steps_per_dispatch": programs.dispatch,
    }
    text = run_directory.record(run, dataset, trainer, **resolved)
    files.write_atomically(pathlib.Path(run.workdir) / run_directory.RECORD, text)


class _Loop:
    """One call of `train`: the state, where it stands, and what is still in flight."""

    def __init__(
        self,
        run: config.RunConfig,
        trainer: Trainer,
        resident: arrays.DeviceArrays,
        dataset: Dataset,
    ) -> None:
        self.run, self.trainer, self.resident = run, trainer, resident
        self.programs = make_programs(trainer, dataset, resident.context)
        self.key = self.programs.key(np.int32(run.train.seed))
        self.run_steps = make_run_steps(trainer)
        self.saved = checkpoint.Checkpoints(run.workdir, trainer, writable=True)
        progress = self.saved.progress()
        if progress is None:
            self.progress = checkpoint.Progress()
            self.state = self.programs.init(np.int32(run.train.seed))
            self.best = self.programs.serving(self.state, self.resident.context)
        else:
            self.progress = progress
            self.state, self.best = self.saved.restore()
        self.last_save = time.monotonic()
        self._in_flight: list[tuple[Sums, Health]] = []

    # -- steps --

    def round(self, journal: TrainingLog, stop: threading.Event) -> bool:
        """Run up to the next validation; False if a signal came first."""
        per_epoch, dispatch = self.programs.per_epoch, self.programs.dispatch
        start = self.progress.epoch * per_epoch
        end = next_epoch(self.run.train, self.progress) * per_epoch
        while self.progress.step < end:
            at = self.progress.step - start
            count = min(dispatch - at % dispatch, end - self.progress.step)
            steps = jax.device_put(np.int32(count), self.trainer.layout.replicated)
            self.state, sums, health = self.run_steps(self.state, self.resident, self.key, steps)
            self.progress = dataclasses.replace(self.progress, step=self.progress.step + count)
            self._in_flight.append((sums, health))
            if len(self._in_flight) > 1:
                self._read(journal)
            if self.progress.step < end:  # the checkpoint of `end` comes after its validation
                if stop.is_set():
                    return False
                if self.due():
                    self.save(journal)
        self.drain(journal)
        return True

    def drain(self, journal: TrainingLog) -> None:
        """Read everything in flight."""
        while self._in_flight:
            self._read(journal)

    def _read(self, journal: TrainingLog) -> None:
        values, where = jax.device_get(self._in_flight.pop(0))
        if where.step >= 0:
            raise self._non_finite(leaves_at_fault(self.trainer, where))
        self.progress = add_sums(self.progress, values)
        journal.advance(self.progress.step)

    def _non_finite(self, what: str) -> NonFiniteError:
        kept = self.saved.progress()
        good = (
            f"the checkpoint of step {kept.step} is kept" if kept else "there is no checkpoint yet"
        )
        return NonFiniteError(f"{what} not finite; {good}; lower --lr or --lambda, or raise --l2")

    # -- epochs --

    def close_round(self, journal: TrainingLog, seconds: float) -> None:
        """Validate, keep the best state, count towards the patience."""
        serving = self.programs.serving(self.state, self.resident.context)
        validate = self.programs.validate
        found = validate(serving) if validate.possible else None
        self.progress, record, text = close_epoch(self.trainer, self.progress, found, seconds)
        if self.progress.best_epoch == self.progress.epoch:
            self.best = serving
        journal.record(self.progress.step, record, text)

    @property
    def over(self) -> bool:
        """Epochs or patience are used up."""
        return over(self.run.train, self.progress)

    # -- checkpoints --

    def due(self) -> bool:
        return time.monotonic() - self.last_save >= self.run.train.checkpoint_every_s

    def save(self, journal: TrainingLog) -> None:
        """Write a checkpoint, of a state in which every number is finite."""
        self.drain(journal)
        bad = not_finite(self.programs, self.state)
        if bad:
            raise self._non_finite(f"after step {self.progress.step - 1}: {listing(bad)}")
        self.saved.save(self.state, self.best, self.progress)
        self.last_save = time.monotonic()


def train(run: config.RunConfig) -> Outcome:
    """Train `run` in its workdir, resuming what is there.

    SIGTERM and SIGINT save and return an `interrupted` outcome; the same call goes on later.

    Raises:
      UserError: bad data, teacher, config or a non-finite step, each with its fix.
    """
    dataset = load_data(run)
    with _stop_on_signal() as stop, jax.transfer_guard("disallow"):
        return _train(run, dataset, stop)


def load_data(run: config.RunConfig) -> Dataset:
    """The run's dataset, once it is known that its validation has what --early_stop_metric names.

    Raises:
      ConfigError: it has not.
      ManifestError, ShardError: the dataset is damaged.
    """
    ranking_metrics.check_metric(
        *(run.train.early_stop_metric, run.evaluation.ks),
        ranking=run.evaluation.ranking,
        rows=run.evaluation.rows != "none",
    )
    return dataset_lib.load(run.data, verify=run.train.verify_checksums)


def _train(run: config.RunConfig, dataset: Dataset, stop: threading.Event) -> Outcome:
    with jax.transfer_guard("allow"):  # set-up: constants and keys are made here
        trainer, resident = build.build(run, dataset)
    with run_directory.opened(run, dataset):
        return _train_in_workdir(run, dataset, trainer, resident, stop)


def _train_in_workdir(
    run: config.RunConfig,
    dataset: Dataset,
    trainer: Trainer,
    resident: arrays.DeviceArrays,
    stop: threading.Event,
) -> Outcome:
    with jax.transfer_guard("allow"):
        loop = _Loop(run, trainer, resident, dataset)
    write_record(run, dataset, trainer, loop.programs)
    begin = time.monotonic()
    with open_journal(run, loop.programs, loop.progress) as journal:
        at = loop.progress.step
        start = f"resuming at step {at}" if at else "starting"
        journal.say(opening(start, dataset, trainer, loop.programs))
        status = "finished"
        while not loop.over:
            round_begin = time.monotonic()
            whole = loop.round(journal, stop)
            if whole:
                loop.close_round(journal, time.monotonic() - round_begin)
            if stop.is_set():
                status = "interrupted"
                break
            if whole and loop.due():
                loop.save(journal)
        loop.save(journal)
        loop.saved.close()
    return outcome(status, loop.progress, time.monotonic() - begin)


def outcome(status: str, progress: checkpoint.Progress, seconds: float) -> Outcome:
    """How a run that stands at `progress` ended."""
    best = (progress.best_epoch, progress.best_metric)
    return Outcome(status, progress.epoch, progress.step, *best, seconds)


def opening(start: str, dataset: Dataset, trainer: Trainer, programs: Programs) -> str:
    """The line before the first epoch."""
    run, layout = trainer.config, trainer.layout
    kind = layout.mesh.devices.ravel()[0].device_kind
    guided = f"{run.guidance.teacher} through gate {run.gate.gate}" if trainer.guided else "none"
    return (
        f"{start}: {run.model.backbone} on {dataset.manifest.name}, {dataset.n_users} users x "
        f"{dataset.n_items} items, {len(dataset.train)} training interactions, "
        f"{programs.per_epoch} steps an epoch, {layout.devices} x {kind}, guidance: {guided}"
    )
