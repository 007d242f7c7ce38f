"""One configuration of this project's trainer in a process of its own, told when to run.

Started by `throughput.py` and `scaling.py` over `turns`. The job:
    pairs            folder that `synthetic.Pairs.save` wrote
    config           a RunConfig as JSON (`knobs.to_json`); its `data` is the folder of teachers
    seconds, steps   length of a turn: about so many seconds, or exactly so many steps
    gather_rows      rows of the table that `gather_bandwidth` reads; absent: as many as users
    validation       whether an item of each user is held back, as guided cases need; absent: no
Steps run as in training: dispatches of K steps, enqueued without waiting. A turn waits once, for
its last state.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import synthetic
import synthetic_dataset
import turns
from turns import Contestant, Facts, Turn

from slgr_jax import __version__
from slgr_jax.config import RunConfig, knobs
from slgr_jax.errors import UserError
from slgr_jax.models.backbones import DotBackbone, reads_of
from slgr_jax.models.row_access import RowAccess
from slgr_jax.sampling import arrays
from slgr_jax.training import build, programs
from slgr_jax.training.state import TrainState, init_state
from slgr_jax.training.step import Sums, Trainer, draw_steps, make_run_steps

GATHER_WIDTH = 64  # of float32: rows of 256 bytes
GATHER_SECONDS = 0.5


# --- steps ---------------------------------------------------------------------------------------


class Stepper:
    """A trainer, its state, and steps on request."""

    def __init__(self, trainer: Trainer, resident: arrays.DeviceArrays) -> None:
        self.trainer, self.resident = trainer, resident
        seed, everywhere = trainer.config.train.seed, trainer.layout.replicated
        self.state: TrainState = jax.block_until_ready(init_state(trainer, seed))
        self._key = jax.device_put(jax.random.key_data(jax.random.key(seed + 1)), everywhere)
        self._run_steps = make_run_steps(trainer)
        self.dispatch = programs.steps_per_dispatch(trainer)

    def run(self, steps: int) -> list[Sums]:
        """Do `steps`, wait for the state; the sums of each dispatch.

        Raises:
          Refused: a number is no longer finite.
        """
        sums, health = [], []
        for start in range(0, steps, self.dispatch):
            count = np.int32(min(self.dispatch, steps - start))
            count = jax.device_put(count, self.trainer.layout.replicated)
            self.state, new, where = self._run_steps(self.state, self.resident, self._key, count)
            sums.append(new)
            health.append(where)
        jax.block_until_ready(self.state)
        if any(int(of_dispatch.step) >= 0 for of_dispatch in jax.device_get(health)):
            raise turns.Refused("a number is not finite: lower --lr")
        return sums

    def turn(self, steps: int) -> Turn:
        """Time `steps`; lanes (and places) that had nothing to learn from do not count."""
        begin = time.perf_counter()
        sums = self.run(steps)
        seconds = time.perf_counter() - begin
        return Turn(triples(sums), seconds)


def triples(sums: Sequence[Sums]) -> float:
    """How many triples were learned from; of sequence backbones, predicted places."""
    return sum(float(of_dispatch["triples"]) for of_dispatch in jax.device_get(sums))


def row_bytes(trainer: Trainer, state: TrainState) -> dict[str, float]:
    """Bytes of one row of each table: its values and its optimiser slots."""
    return {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(state.tables[name]))
        / trainer.layout.padded_rows(spec.rows)
        for name, spec in trainer.backbone.tables.items()
    }


def rows_named(trainer: Trainer, resident: arrays.DeviceArrays) -> dict[str, int]:
    """Rows of each table that a step names, as often as it does; of whole tables every row, once.

    A step that moves no row but computes dot products (`dot_access.DotAccess`) names the same ones.
    """
    rows = RowAccess(trainer.backbone, trainer.row_optimizer, trainer.layout, native=False)

    def named(key: jax.Array, resident: arrays.DeviceArrays) -> dict[str, list[jax.Array]]:
        drawn = draw_steps(trainer, key[None], resident)
        batch, guided = jax.tree.map(lambda x: x[0], drawn)
        guidance = trainer.guidance
        candidates = None if guidance is None else guidance.candidates(guided)
        reads = trainer.objective.reads(batch, resident.context, candidates)
        return rows.ids_by_table(resident.context, reads)

    found = jax.eval_shape(named, jax.random.key_data(jax.random.key(0)), resident)
    return {name: sum(ids.size for ids in groups) for name, groups in found.items()}


def bytes_per_step(rows: Mapping[str, int], bytes_of_row: Mapping[str, float]) -> float:
    """2 * sum over tables of (rows that a step names) * (bytes of a row).

    Each named row is read once and written once, however often a batch names it. Dense
    parameters, interactions and what is computed between the two are left out.
    """
    return 2.0 * sum(count * bytes_of_row[name] for name, count in rows.items())


def rows_per_triple(trainer: Trainer) -> int:
    """Rows that a click backbone predicts for each triple: the positive and its negatives; else 0.

    They are what trainers of such models count.
    """
    if isinstance(trainer.backbone, DotBackbone):
        return 0
    return 1 + trainer.plan.negatives


# --- the machine ---------------------------------------------------------------------------------


def gather_bandwidth(rows: int) -> float:
    """Bytes a second that gathering random rows of 256 bytes moves: the floor of a step's time.

    On a CPU: every core copies rows into a small buffer, so only what is read crosses the memory
    bus, and counts. On a device: a gather by JAX, what is read and what is written counts.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _gather_on_host(rows)
    table = jax.block_until_ready(jnp.ones((rows, GATHER_WIDTH), jnp.float32))
    ids = jax.random.randint(jax.random.key(0), (1 << 21,), 0, rows)
    gather = jax.jit(lambda table, ids: table.at[ids].get(mode="promise_in_bounds"))
    rate = _rate(lambda: jax.block_until_ready(gather(table, ids)))
    return rate * ids.size * 2 * GATHER_WIDTH * 4 * len(devices)


def _gather_on_host(rows: int) -> float:
    cores = os.cpu_count() or 1
    table = np.ones((rows, GATHER_WIDTH), np.float32)
    rng = np.random.default_rng(0)
    at_once, calls = 1 << 11, 1 << 6
    ids = [rng.integers(0, rows, (calls, at_once)) for _ in range(cores)]
    buffers = [np.empty((at_once, GATHER_WIDTH), np.float32) for _ in range(cores)]

    def copy(core: int) -> None:
        for chosen in ids[core]:
            table.take(chosen, axis=0, out=buffers[core], mode="clip")

    with ThreadPoolExecutor(cores) as pool:
        rate = _rate(lambda: list(pool.map(copy, range(cores))))
    return rate * cores * calls * at_once * GATHER_WIDTH * 4


def _rate(work: Any) -> float:
    """Calls a second of `work`: the best of as many as GATHER_SECONDS have room for."""
    work()
    times: list[float] = []
    while sum(times) < GATHER_SECONDS or len(times) < 3:
        times.append(turns.timed(work))
    return 1.0 / min(times)


class Memory:
    """What the process uses at this moment, in 10^6 bytes.

    Attributes:
      peak_mb: of the host since the last `Memory`.
      device_peak_mb: of all devices since the start; None where they keep no count, as CPUs.
      in_use_mb: of the devices, or of the host where they keep no count.
    """

    def __init__(self) -> None:
        self.peak_mb = turns.peak_mb()
        turns.restart_peak()
        self.device_peak_mb = _device_mb("peak_bytes_in_use")
        in_use = _device_mb("bytes_in_use")
        self.in_use_mb = turns.peak_mb() if in_use is None else in_use

    def grown_since(self, earlier: Memory) -> float:
        """What was added; on a host the most that was ever added since the last `Memory`."""
        now = self.peak_mb if self.device_peak_mb is None else self.in_use_mb
        return now - earlier.in_use_mb


def _device_mb(key: str) -> float | None:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if any(key not in of_device for of_device in stats):
        return None
    return sum(float(of_device[key]) for of_device in stats) / 1e6


# --- the job -------------------------------------------------------------------------------------


def prepare(job: Facts) -> Contestant:
    """The job's trainer, compiled and warm."""
    # Another process may train on the same GPU; growing on demand leaves it its share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Compilation is measured: nothing that was compiled earlier may be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return _prepare(job)
    except UserError as error:
        raise turns.Refused(str(error)) from error


def _kernels(trainer: Trainer) -> str:
    """Who reads and writes the rows: the CPU kernels serve float32 alone."""
    float32 = trainer.config.optimizer.table_dtype == "float32"
    return "native" if trainer.plan.native and float32 else "xla"


def whole_dispatches(steps: int, dispatch: int) -> int:
    """The next multiple of a dispatch: what is done once a dispatch (4 bytes a row are cleared) is
    part of a turn as it is of an epoch, even where the estimate of a turn's length was unlucky."""
    return -(-steps // dispatch) * dispatch


def _prepare(job: Facts) -> Contestant:
    run = knobs.from_json(RunConfig, job["config"], "the job's config")
    pairs = synthetic.Pairs.load(job["pairs"])
    dataset = synthetic_dataset.from_pairs(
        pairs, run.data, reads_of(run.model), validation=job.get("validation", False)
    )
    experiment = build.build(run, dataset)
    trainer, resident = experiment.trainer, experiment.arrays
    gather_rows = job.get("gather_rows") or dataset.n_users
    del dataset, pairs, experiment
    jax.block_until_ready(resident)
    built = Memory()
    stepper = Stepper(trainer, resident)
    compiling = turns.timed(lambda: stepper.run(1))
    compile_s = compiling - turns.timed(lambda: stepper.run(1))
    ready = Memory()
    steps = job["steps"] or whole_dispatches(
        turns.units_for(job["seconds"], stepper.run), stepper.dispatch
    )
    size = row_bytes(trainer, stepper.state)
    moved = bytes_per_step(rows_named(trainer, resident), size)
    turns_taken: list[Turn] = []
    devices = trainer.layout.mesh.devices.ravel()
    facts: Facts = {
        "versions": {"slgr_jax": __version__, "jax": jax.__version__, "numpy": np.__version__}
        | {"jaxlib": importlib.metadata.version("jaxlib"), "python": platform.python_version()},
        "devices": f"{devices.size} x {devices[0].device_kind}",
        "platform": devices[0].platform,
        "cores": os.cpu_count(),
        "kernels": _kernels(trainer),
        "compile_s": compile_s,
        "steps_per_turn": steps,
        "steps_per_dispatch": stepper.dispatch,
        "row_bytes": size,
        "rows_per_triple": rows_per_triple(trainer),
    }

    def turn() -> Turn:
        turns_taken.append(stepper.turn(steps))
        return turns_taken[-1]

    def finish() -> Facts:
        after = Memory()
        # Known only now: how many places a window predicts depends on the histories drawn.
        per_step = sum(turn.triples for turn in turns_taken) / (steps * len(turns_taken))
        return {
            "peak_mb": max(built.peak_mb, ready.peak_mb, after.peak_mb),
            "device_peak_mb": after.device_peak_mb,
            "state_mb": after.grown_since(built),
            "triples_per_step": per_step,
            "bytes_per_triple": moved / per_step,
            "gather_bandwidth": gather_bandwidth(gather_rows),
        }

    return Contestant(facts, turn, finish)


if __name__ == "__main__":
    turns.serve(prepare)
