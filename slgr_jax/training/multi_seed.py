"""Runs that differ in nothing but their seed, trained as one program.

    states [N, ...]  = the N initial states, stacked
    states', sums, health = vmap(steps)(states, arrays, keys [N, 2], K)

The device arrays (what its reference runs score with too) and K are shared. A small model leaves
most of an accelerator idle, and N of them in one program take little longer than one. The CPU
kernels do not vmap, so that these are XLA's programs; on a CPU a process a run is faster.

Every run comes out as `loop.train` with --kernels=xla leaves it: its initial state and its draws
to the bit, its numbers to rounding, its own best state and patience, its own directory. A run that
is over is computed on until the last one is; those steps are thrown away.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slgr_jax.config import RunConfig, differences
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, listing
from slgr_jax.sampling.arrays import DeviceArrays
from slgr_jax.training import checkpoint, epochs, loop, run_directory
from slgr_jax.training.build import Experiment, build
from slgr_jax.training.loop import SeedSums
from slgr_jax.training.programs import Programs, make_programs, put_number
from slgr_jax.training.state import TrainState, abstract_serving, abstract_state
from slgr_jax.training.step import Health, RunSteps, Trainer, make_program

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
    experiment = build(first, loop.load_data(first))
    saved = {run.workdir: _saved(run, experiment.dataset) for run in runs}
    fresh = [run for run in runs if saved[run.workdir] is None]
    outcomes: dict[str, loop.Outcome] = {}
    if fresh:
        with jax.transfer_guard("disallow"):
            outcomes = _train_fresh(fresh, experiment, together)

    for run in runs:
        progress = saved[run.workdir]
        if progress is None:
            continue
        if epochs.over(run.train, progress):
            outcomes[run.workdir] = loop.outcome("finished", progress, 0.0)
            continue
        outcomes[run.workdir] = loop.train(run)
        if outcomes[run.workdir].status != "finished":
            raise KeyboardInterrupt
    return [outcomes[run.workdir] for run in runs]


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
    if first.train.user_shards:
        raise ConfigError(
            f"--user_shards={first.train.user_shards}: seeds that are trained together have all "
            "users on every device; train them one by one, or without shards"
        )
    if first.train.kernels == "native":
        raise ConfigError(
            "--kernels=native: seeds that are trained together run XLA's programs; use "
            "--kernels=xla or auto, or train them one by one"
        )
    return dataclasses.replace(first, train=dataclasses.replace(first.train, kernels="xla"))


def _saved(run: RunConfig, dataset: Dataset) -> checkpoint.Progress | None:
    """Where the run's directory says that it stands; None: it has no checkpoint.

    Raises:
      ConfigError: it holds another run.
    """
    with (
        run_directory.opened(run, dataset),
        contextlib.closing(checkpoint.Checkpoints(run.workdir, writable=True)) as saved,
    ):
        return saved.progress()


# --------------------------------------------------------------------- stacked states


def _stacked(trainer: Trainer, seeds: int) -> TrainState:
    """Shapes, types and shardings of N states."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, *leaf.sharding.spec)
        sharding = NamedSharding(trainer.layout.mesh, spec)
        return jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype, sharding=sharding)

    stacked: TrainState = jax.tree.map(stack, abstract_state(trainer))
    return stacked


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _compile(trainer: Trainer, arrays: DeviceArrays, seeds: int) -> Any:
    """The program of N seeds: (states, arrays, keys, K) -> (states', sums [N], health [N])."""
    everywhere, states = trainer.layout.replicated, _stacked(trainer, seeds)
    program = jax.jit(
        jax.vmap(make_program(trainer), in_axes=(0, None, 0, None)),
        donate_argnums=0,
        out_shardings=(_shardings(states), everywhere, everywhere),
        compiler_options=trainer.layout.compiler_options,
    )
    keys = jax.ShapeDtypeStruct((seeds, 2), jnp.uint32, sharding=everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return program.lower(states, arrays, keys, count).compile()


def _bytes(trainer: Trainer, compiled: Any, seeds: int) -> int:
    """What training N seeds holds on a device: the program's arrays, and the best states."""
    found = compiled.memory_analysis()
    leaves = jax.tree.leaves(abstract_serving(trainer))
    best = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    arrays = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(arrays + found.temp_size_in_bytes + seeds * best)


def seeds_that_fit(
    trainer: Trainer, arrays: DeviceArrays, most: int, limit_bytes: float | None
) -> tuple[int, Any]:
    """How many seeds, `most` or a half of it and so on, one program can hold; and that program.

    Args:
      limit_bytes: of each device; None: not known, `most`.
    """
    seeds = most
    while True:
        compiled = _compile(trainer, arrays, seeds)
        fits = limit_bytes is None or _bytes(trainer, compiled, seeds) <= limit_bytes
        if fits or seeds == 1:
            return seeds, compiled
        seeds = -(-seeds // 2)


def _limit(trainer: Trainer) -> float | None:
    """Bytes that stacked seeds may take of each device; None where it does not say."""
    stats = trainer.layout.mesh.devices.flat[0].memory_stats()
    return _SHARE * stats["bytes_limit"] if stats and "bytes_limit" in stats else None


# --------------------------------------------------------------------- the engine


class _Stacked:
    """The engine of N seeds: their states stacked, one program over all of them."""

    def __init__(
        self,
        experiment: Experiment,
        programs: Programs,
        run_steps: RunSteps,
        runs: Sequence[RunConfig],
    ) -> None:
        self._trainer, self._arrays = experiment.trainer, experiment.arrays
        self._run_steps, self._seeds = run_steps, len(runs)
        self._states, self._keys = self._initial(programs, runs)
        self._take: Callable[[TrainState, jax.Array], TrainState] = jax.jit(
            _take, out_shardings=_shardings(abstract_state(self._trainer))
        )

    def _initial(
        self, programs: Programs, runs: Sequence[RunConfig]
    ) -> tuple[TrainState, jax.Array]:
        """The runs' own initial states and keys, stacked one at a time to hold none twice."""
        shapes = _stacked(self._trainer, len(runs))
        empty = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=_shardings(shapes),
        )
        put = jax.jit(_put, donate_argnums=0, out_shardings=_shardings(shapes))
        states, keys = empty(), []
        for at, run in enumerate(runs):
            number = np.int32(run.train.seed)
            states = put(states, programs.init(number), np.int32(at))
            keys.append(programs.key(number))
        stack = jax.jit(jnp.stack, out_shardings=self._trainer.layout.replicated)
        return states, stack(keys)

    def advance(self, count: int) -> Any:
        self._states, sums, health = self._run_steps(
            self._states, self._arrays, self._keys, put_number(self._trainer, count)
        )
        return sums, health

    def read(self, sums: Any) -> list[SeedSums]:
        values, health = jax.device_get(sums)
        return [
            (
                {name: value[at] for name, value in values.items()},
                Health(health.step[at], health.leaves[at]),
            )
            for at in range(self._seeds)
        ]

    def state(self, seed: int) -> TrainState:
        return self._take(self._states, put_number(self._trainer, seed))


def _train_fresh(
    runs: Sequence[RunConfig], experiment: Experiment, together: int
) -> dict[str, loop.Outcome]:
    """Outcomes of runs without a checkpoint, by workdir."""
    with jax.transfer_guard("allow"):
        programs = make_programs(experiment)
        most = min(together or len(runs), len(runs))
        limit = _limit(experiment.trainer)
        size, steps = seeds_that_fit(experiment.trainer, experiment.arrays, most, limit)
    outcomes: dict[str, loop.Outcome] = {}
    for begin in range(0, len(runs), size):
        group = runs[begin : begin + size]
        if len(group) < size:
            with jax.transfer_guard("allow"):
                steps = _compile(experiment.trainer, experiment.arrays, len(group))
        outcomes |= _train_group(group, experiment, programs, steps)
    return outcomes


def _train_group(
    runs: Sequence[RunConfig], experiment: Experiment, programs: Programs, steps: RunSteps
) -> dict[str, loop.Outcome]:
    """Train the runs of one program; outcomes by workdir."""
    with contextlib.ExitStack() as stack:
        seeds = []
        for run in runs:
            may_write = stack.enter_context(run_directory.opened(run, experiment.dataset))
            loop.write_record(experiment, run, programs)
            saved = checkpoint.Checkpoints(run.workdir, writable=True, may_write=may_write)
            stack.callback(saved.close)
            log = stack.enter_context(loop.open_log(run, programs, checkpoint.Progress()))
            seeds.append(loop.SeedRun(run, saved, log))
        start = f"starting {len(runs)} seeds together"
        seeds[0].log.say(loop.opening(start, experiment, programs))
        with jax.transfer_guard("allow"):
            engine = _Stacked(experiment, programs, steps, runs)
        loop.Loop(experiment, programs, engine, seeds).train()
    return {seed.run.workdir: seed.outcome for seed in seeds if seed.outcome is not None}


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
