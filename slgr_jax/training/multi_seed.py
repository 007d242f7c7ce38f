"""Runs that differ in nothing but their seed, trained as one program.

    states [N, ...]  = the N initial states, stacked
    states', sums, health = vmap(steps)(states, resident, keys [N, 2], K)

The resident arrays (the runs of an ensemble too) and K are shared. A small model leaves most of an
accelerator idle, and N of them in one program take little longer than one. The CPU kernels do not
vmap, so that these are XLA's programs; on a CPU a process a run is faster.

Every run comes out as `loop.train` with --kernels=xla leaves it: its initial state and its draws
to the bit, its numbers to rounding, its own best state and patience, its own directory. A run that
is over is computed on until the last one is; those steps are thrown away.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slgr_jax.config import RunConfig, differences
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, NonFiniteError, listing
from slgr_jax.models.scoring import ServingState
from slgr_jax.sampling.arrays import DeviceArrays
from slgr_jax.training import build as runs_lib
from slgr_jax.training import checkpoint, loop, run_directory
from slgr_jax.training.step import Health, RunSteps, Sums, Trainer, TrainState, make_program
from slgr_jax.training.training_log import TrainingLog

# Of a device's memory, what stacked seeds may take; the rest is for validation.
_SHARE = 0.75


def train_seeds(runs: Sequence[RunConfig], *, together: int = 0) -> list[loop.Outcome]:
    """Train runs that differ in seed and workdir; their outcomes, in order.

    A run that is finished is not trained again. Nothing is saved of a run before it is over: a
    call that is killed leaves those that are, and starts the others over. One that `loop.train`
    has begun is resumed by it, alone, after the others.

    Args:
      runs: what to train.
      together: seeds in one program, at most; 0: as many as fit the device.

    Raises:
      UserError: as `loop.train`; a non-finite step names its seed.
      ConfigError: they differ in more, share a workdir, or ask for the CPU kernels.
      KeyboardInterrupt: a signal came.
    """
    if not runs:
        return []
    first = _alike(runs)
    dataset = loop.load_data(first)
    trainer, resident = runs_lib.build(first, dataset)
    saved = {run.workdir: _saved(run, dataset, trainer) for run in runs}
    fresh = [run for run in runs if saved[run.workdir] is None]
    found: dict[str, loop.Outcome] = {}
    if fresh:
        with jax.transfer_guard("disallow"):
            found = _train_fresh(fresh, dataset, trainer, resident, together)
    for run in runs:
        progress = saved[run.workdir]
        if progress is None:
            continue
        if loop.over(run.train, progress):
            found[run.workdir] = loop.outcome("finished", progress, 0.0)
            continue
        found[run.workdir] = loop.train(run)
        if found[run.workdir].status != "finished":
            raise KeyboardInterrupt
    return [found[run.workdir] for run in runs]


def _alike(runs: Sequence[RunConfig]) -> RunConfig:
    """The first run, with XLA's programs, which stands for all that they share."""
    first = runs[0]
    for run in runs[1:]:
        other = [x for x in differences(first, run) if not x.startswith("--seed:")]
        if run.data != first.data:
            other.append(f"--data: {first.data} -> {run.data}")
        if other:
            raise ConfigError(
                f"{first.workdir} and {run.workdir} differ in more than their seed "
                f"({listing(other)}); train them one by one"
            )
    counts = collections.Counter(run.workdir for run in runs)
    workdir, most = counts.most_common(1)[0]
    if most > 1:
        raise ConfigError(f"{most} runs have --workdir={workdir}; give each its own")
    if first.train.kernels == "native":
        raise ConfigError(
            "--kernels=native: seeds that are trained together run XLA's programs; use "
            "--kernels=xla or auto, or train them one by one"
        )
    return dataclasses.replace(first, train=dataclasses.replace(first.train, kernels="xla"))


def _saved(run: RunConfig, dataset: Dataset, trainer: Trainer) -> checkpoint.Progress | None:
    """Where the run's directory says that it stands; None: it has no checkpoint.

    Raises:
      ConfigError: it holds another run.
    """
    with (
        run_directory.opened(run, dataset),
        contextlib.closing(checkpoint.Checkpoints(run.workdir, trainer, writable=True)) as saved,
    ):
        return saved.progress()


# --------------------------------------------------------------------- stacked states


def _stacked(trainer: Trainer, seeds: int) -> TrainState:
    """Shapes, types and shardings of N states."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, *leaf.sharding.spec)
        sharding = NamedSharding(trainer.layout.mesh, spec)
        return jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype, sharding=sharding)

    stacked: TrainState = jax.tree.map(stack, checkpoint.abstract_state(trainer))
    return stacked


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _compile(trainer: Trainer, resident: DeviceArrays, seeds: int) -> Any:
    """The program of N seeds: (states, resident, keys, K) -> (states', sums [N], health [N])."""
    everywhere, states = trainer.layout.replicated, _stacked(trainer, seeds)
    program = jax.jit(
        jax.vmap(make_program(trainer), in_axes=(0, None, 0, None)),
        donate_argnums=0,
        out_shardings=(_shardings(states), everywhere, everywhere),
        compiler_options=trainer.layout.compiler_options,
    )
    keys = jax.ShapeDtypeStruct((seeds, 2), jnp.uint32, sharding=everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return program.lower(states, resident, keys, count).compile()


def _bytes(trainer: Trainer, compiled: Any, seeds: int) -> int:
    """What training N seeds holds on a device: the program's arrays, and the best states."""
    found = compiled.memory_analysis()
    leaves = jax.tree.leaves(checkpoint.abstract_serving(trainer))
    best = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    arrays = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(arrays + found.temp_size_in_bytes + seeds * best)


def seeds_that_fit(
    trainer: Trainer, resident: DeviceArrays, most: int, limit_bytes: float | None
) -> tuple[int, RunSteps]:
    """How many seeds, `most` or a half of it and so on, one program can hold; and that program.

    Args:
      limit_bytes: of each device; None: not known, `most`.
    """
    seeds = most
    while True:
        compiled = _compile(trainer, resident, seeds)
        fits = limit_bytes is None or _bytes(trainer, compiled, seeds) <= limit_bytes
        if fits or seeds == 1:
            return seeds, compiled
        seeds = -(-seeds // 2)


def _limit(trainer: Trainer) -> float | None:
    """Bytes that stacked seeds may take of each device; None where it does not say."""
    stats = trainer.layout.mesh.devices.flat[0].memory_stats()
    return _SHARE * stats["bytes_limit"] if stats and "bytes_limit" in stats else None


# --------------------------------------------------------------------- the loop


@dataclasses.dataclass
class _Seed:
    """One of the runs: where it stands and what it writes to."""

    run: RunConfig
    saved: checkpoint.Checkpoints
    journal: TrainingLog
    progress: checkpoint.Progress = dataclasses.field(default_factory=checkpoint.Progress)
    best: ServingState | None = None
    outcome: loop.Outcome | None = None

    def fail(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"seed {self.run.train.seed} ({self.run.workdir}): {what} not finite; lower --lr or "
            "--lambda, or raise --l2"
        )


def _train_fresh(
    runs: Sequence[RunConfig],
    dataset: Dataset,
    trainer: Trainer,
    resident: DeviceArrays,
    together: int,
) -> dict[str, loop.Outcome]:
    """Outcomes of runs without a checkpoint, by workdir."""
    with jax.transfer_guard("allow"):
        programs = loop.make_programs(trainer, dataset, resident.context)
        most = min(together or len(runs), len(runs))
        size, steps = seeds_that_fit(trainer, resident, most, _limit(trainer))
    found: dict[str, loop.Outcome] = {}
    for begin in range(0, len(runs), size):
        mine = runs[begin : begin + size]
        if len(mine) < size:
            with jax.transfer_guard("allow"):
                steps = _compile(trainer, resident, len(mine))
        with contextlib.ExitStack() as stack:
            group = _Group(mine, dataset, trainer, resident, programs, steps, stack)
            found |= group.train()
    return found


class _Group:
    """The runs of one program; every one that is not over stands at the same step."""

    def __init__(
        self,
        runs: Sequence[RunConfig],
        dataset: Dataset,
        trainer: Trainer,
        resident: DeviceArrays,
        programs: loop.Programs,
        steps: RunSteps,
        stack: contextlib.ExitStack,
    ) -> None:
        self.trainer, self.resident, self.programs = trainer, resident, programs
        self.run_steps = steps
        self.seeds = []
        for run in runs:
            stack.enter_context(run_directory.opened(run, dataset))
            loop.write_record(run, dataset, trainer, programs)
            saved = checkpoint.Checkpoints(run.workdir, trainer, writable=True)
            journal = loop.open_journal(run, programs, checkpoint.Progress())
            self.seeds.append(_Seed(run, saved, stack.enter_context(journal)))
            stack.callback(saved.close)
        start = f"starting {len(runs)} seeds together"
        self.seeds[0].journal.say(loop.opening(start, dataset, trainer, programs))
        with jax.transfer_guard("allow"):
            self.states, self.keys = self._initial()
            self._take: Callable[[TrainState, jax.Array], TrainState] = jax.jit(
                _take, out_shardings=_shardings(checkpoint.abstract_state(trainer))
            )
        self._in_flight: list[tuple[Sums, Health]] = []
        self._begin = time.monotonic()

    def _initial(self) -> tuple[TrainState, jax.Array]:
        """The runs' own initial states and keys, stacked one at a time to hold none twice."""
        shapes = _stacked(self.trainer, len(self.seeds))
        empty = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=_shardings(shapes),
        )
        put = jax.jit(_put, donate_argnums=0, out_shardings=_shardings(shapes))
        states, keys = empty(), []
        for at, seed in enumerate(self.seeds):
            number = np.int32(seed.run.train.seed)
            states = put(states, self.programs.init(number), np.int32(at))
            keys.append(self.programs.key(number))
        stack = jax.jit(jnp.stack, out_shardings=self.trainer.layout.replicated)
        return states, stack(keys)

    @property
    def live(self) -> list[tuple[int, _Seed]]:
        """The runs that are not over, with their place in the stack."""
        return [(at, seed) for at, seed in enumerate(self.seeds) if seed.outcome is None]

    def train(self) -> dict[str, loop.Outcome]:
        """Train until every run is over; outcomes by workdir."""
        while self.live:
            begin = time.monotonic()
            self._round()
            seconds = time.monotonic() - begin
            for at, seed in self.live:
                self._close(at, seed, seconds)
        return {seed.run.workdir: seed.outcome for seed in self.seeds if seed.outcome is not None}

    def _round(self) -> None:
        """Run up to the next validation."""
        seed, programs = self.live[0][1], self.programs
        epochs = loop.next_epoch(seed.run.train, seed.progress) - seed.progress.epoch
        steps = epochs * programs.per_epoch
        for done in range(0, steps, programs.dispatch):
            count = self._put(min(programs.dispatch, steps - done))
            self.states, sums, health = self.run_steps(self.states, self.resident, self.keys, count)
            for _, seed in self.live:
                step = seed.progress.step + min(programs.dispatch, steps - done)
                seed.progress = dataclasses.replace(seed.progress, step=step)
            self._in_flight.append((sums, health))
            if len(self._in_flight) > 1:
                self._read()
        while self._in_flight:
            self._read()

    def _put(self, number: int) -> jax.Array:
        return jax.device_put(np.int32(number), self.trainer.layout.replicated)

    def _read(self) -> None:
        sums, health = jax.device_get(self._in_flight.pop(0))
        for at, seed in self.live:
            where = Health(health.step[at], health.leaves[at])
            if where.step >= 0:
                raise seed.fail(loop.leaves_at_fault(self.trainer, where))
            mine = {name: values[at] for name, values in sums.items()}
            seed.progress = loop.add_sums(seed.progress, mine)
            seed.journal.advance(seed.progress.step)

    def _close(self, at: int, seed: _Seed, seconds: float) -> None:
        """Validate a run, keep its best state; write all that is left of it once it is over."""
        programs, state = self.programs, self._take(self.states, self._put(at))
        serving = programs.serving(state, self.resident.context)
        found = programs.validate(serving) if programs.validate.possible else None
        closed = loop.close_epoch(self.trainer, seed.progress, found, seconds)
        seed.progress, record, text = closed
        if seed.progress.best_epoch == seed.progress.epoch:
            seed.best = serving
        seed.journal.record(seed.progress.step, record, f"seed {seed.run.train.seed}  {text}")
        if not loop.over(seed.run.train, seed.progress):
            return
        bad = loop.not_finite(programs, state)
        if bad:
            raise seed.fail(f"after step {seed.progress.step - 1}: {listing(bad)}")
        assert seed.best is not None, "the first validation is the best so far"
        seed.saved.save(state, seed.best, seed.progress)
        seed.outcome = loop.outcome("finished", seed.progress, time.monotonic() - self._begin)


def _take(states: TrainState, at: jax.Array) -> TrainState:
    """The state at a place of the stack."""
    taken: TrainState = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), states
    )
    return taken


def _put(states: TrainState, state: TrainState, at: jax.Array) -> TrainState:
    """The stack with a state at a place."""
    new: TrainState = jax.tree.map(
        lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, at, 0), states, state
    )
    return new
