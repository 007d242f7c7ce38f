"""What a run takes of memory, by part, on numbers of devices that need not be there.

What is drawn from and looked up is made as training makes it, once, on the host; a state is shapes
alone; the rest is what XLA says of the step that it compiles for so many devices, which are parts
of this machine's CPU. So every number comes from the code that a run itself goes through. For GPUs
and TPUs XLA's temporaries differ; arrays are the same but for padding (a TPU pads rows to 128
numbers).

Left out: the chunk of users that a validation ranks at a time, and on the host what Python, JAX and
the compiler take, about half a gigabyte, and what sorting takes while the arrays are made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import NamedSharding, PartitionSpec

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import make_layout
from slgr_jax.sampling import user_context
from slgr_jax.sampling.arrays import Dealt, DeviceArrays
from slgr_jax.training import build, step
from slgr_jax.training.state import (
    abstract_serving,
    abstract_state,
    make_serving_state,
    rings_of,
)
from slgr_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one run on one mesh; of one device, unless said otherwise.

    Attributes:
      devices, table_shards: the mesh.
      tables: values and optimiser slots.
      dense: dense parameters with their optimiser's state, and remembered scores.
      serving: the best state, as a run that goes on reads it, and the one that a validation ranks
        with: split as `Learner.serves_blocks` and users are; whole otherwise, but that XLA may
        leave the second split.
      interactions: what batches are drawn from.
      looked_up: histories, categories, features, graphs, frozen vectors.
      teacher: what a guidance draws from and looks up.
      draws: the batches of the steps that are drawn at once.
      step: the other temporaries of a dispatch, as XLA says.
      checkpoint: all of a checkpoint on the disk, before compression; two are there for a moment.
      host: of a process that all devices belong to: the dataset, what goes to the devices, and the
        copy that a checkpoint is written from.
      host_each: of one of as many processes as devices: where it reads its own users' alone
        (`RunConfig.reads_own_users`), of training what belongs to them, and no test part.
    """

    devices: int
    table_shards: int
    tables: int
    dense: int
    serving: int
    interactions: int
    looked_up: int
    teacher: int
    draws: int
    step: int
    checkpoint: int
    host: int
    host_each: int

    @property
    def arguments(self) -> int:
        """What the step's program is given."""
        parts = self.tables, self.dense, self.interactions, self.looked_up, self.teacher
        return sum(parts)

    @property
    def device(self) -> int:
        """All that one device holds at once."""
        return self.arguments + self.serving + self.draws + self.step


def make_plans(
    run: RunConfig, dataset: Dataset, meshes: Sequence[tuple[int, int]]
) -> list[MemoryPlan]:
    """A plan for each of `meshes`, (devices, table shards).

    JAX must have as many devices; of a kind that costs nothing, CPUs.

    Raises:
      ConfigError: the run cannot be split so.
      UserError: data, teacher or knobs that do not go together.
    """
    # One device holds the arrays; the CPU kernels are of one device alone.
    by_xla = dataclasses.replace(run, train=dataclasses.replace(run.train, kernels="xla"))
    experiment = build.build(by_xla, dataset, make_layout(devices=jax.devices()[:1]))
    return [_plan(experiment, dataset, *mesh, devices=jax.devices()[: mesh[0]]) for mesh in meshes]


def _plan(
    experiment: build.Experiment,
    dataset: Dataset,
    count: int,
    table_shards: int,
    *,
    devices: list[jax.Device],
) -> MemoryPlan:
    if len(devices) < count:
        raise ConfigError(f"{count} devices are planned for, and JAX makes {len(devices)}")
    layout = make_layout(table_shards=table_shards, devices=devices)
    layout = dataclasses.replace(layout, users=experiment.trainer.layout.users)
    trainer = dataclasses.replace(experiment.trainer, layout=layout)
    build.check_devices(trainer)
    arrays = _abstract_arrays(experiment.arrays, trainer)
    state, serving = abstract_state(trainer), abstract_serving(trainer)
    temporaries = _compiled(trainer, state, arrays).memory_analysis().temp_size_in_bytes
    draws = min(_draws(trainer, arrays) // count, temporaries)
    checkpoint = _total((state, serving))
    return MemoryPlan(
        devices=count,
        table_shards=table_shards,
        tables=_per_device(state.tables),
        dense=_per_device((state.params, state.opt_state, state.step, rings_of(state))),
        serving=_per_device(serving) + _scored_with(trainer, state, arrays),
        interactions=_per_device(arrays.interactions),
        looked_up=_per_device(arrays.context),
        teacher=_per_device(arrays.guidance),
        draws=draws,
        step=temporaries - draws,
        checkpoint=checkpoint,
        host=of_dataset(dataset) + _total(arrays) + checkpoint,
        host_each=_read_by_each(dataset, trainer) + _per_device((arrays, state, serving)),
    )


def _read_by_each(dataset: Dataset, trainer: Trainer) -> int:
    """Bytes of the dataset that one of as many processes as devices reads (`own_users.load`)."""
    every = of_dataset(dataset)
    if not trainer.config.reads_own_users:
        return every
    train, test = (_arrays_of(part) for part in (dataset.train, dataset.test))
    counted = dataset.history.nbytes + dataset.popularity.nbytes + dataset.n_users
    return every - test - train + train // trainer.layout.devices + counted


def _abstract_arrays(arrays: DeviceArrays, trainer: Trainer) -> DeviceArrays:
    """The device arrays as shapes, laid out as `build` does it."""
    layout = trainer.layout

    def laid_out(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def dealt(arrays: Any) -> Any:
        if not isinstance(arrays, Dealt):
            return laid_out(arrays, layout.replicated)
        own = laid_out(arrays.own, layout.users_sharding)
        return dataclasses.replace(arrays, own=own, whole=laid_out(arrays.whole, layout.replicated))

    context = jax.tree.map(
        lambda spec, part: laid_out(part, NamedSharding(layout.mesh, spec)),
        user_context.specs(arrays.context, layout),
        arrays.context,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return DeviceArrays(dealt(arrays.interactions), context, dealt(arrays.guidance))


def _compiled(trainer: Trainer, state: Any, arrays: DeviceArrays) -> Any:
    at = trainer.layout.replicated
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=at)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=at)
    run_steps: Any = step.make_run_steps(trainer)
    return run_steps.lower(state, arrays, key, count).compile()


def _scored_with(trainer: Trainer, state: Any, arrays: DeviceArrays) -> int:
    """Bytes on a device of what validations rank with."""
    pick: Any = make_serving_state(trainer)
    memory = pick.lower(state, arrays.context).compile().memory_analysis()
    return int(memory.output_size_in_bytes)


def _draws(trainer: Trainer, arrays: DeviceArrays) -> int:
    """Bytes of the batches that are drawn at once, of all devices."""
    keys = jax.ShapeDtypeStruct((trainer.drawn_together, 2), jnp.uint32)
    return _total(jax.eval_shape(functools.partial(step.draw_steps, trainer), keys, arrays))


def _total(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _per_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def of_dataset(dataset: Dataset) -> int:
    """Bytes of the arrays and Arrow tables of a loaded dataset."""
    holders = dataset.train, dataset.valid, dataset.test, dataset.of_users
    total = _arrays_of(dataset) + sum(
        _arrays_of(holder) for holder in holders if holder is not None
    )
    return total


def _arrays_of(holder: Any) -> int:
    fields = (getattr(holder, field.name) for field in dataclasses.fields(holder))
    arrays = (
        x for x in fields if isinstance(x, np.ndarray | pa.Table | pa.Array | pa.ChunkedArray)
    )
    return sum(array.nbytes for array in arrays)


def as_rows(plans: Sequence[MemoryPlan]) -> list[dict[str, Any]]:
    """What to print: megabytes."""
    rows = []
    for plan in plans:
        row = dataclasses.asdict(plan)
        row = {"devices": row.pop("devices"), "table shards": row.pop("table_shards")} | {
            name.replace("_", " "): round(bytes_ / 1e6, 1) for name, bytes_ in row.items()
        }
        on_disk, host, each = (row.pop(name) for name in ("checkpoint", "host", "host each"))
        row |= {"a device": round(plan.device / 1e6, 1), "host": host, "host each": each}
        row |= {"checkpoint": on_disk}
        rows.append({name: str(value) for name, value in row.items()})
    return rows
