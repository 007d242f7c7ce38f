"""Process start-up, the device mesh, and where each array lives on it.

Mesh axes: `data` x `table`. Every device works on its own part of the batch; the rows of a
table are split over `table` and replicated over `data`. Dense parameters, counts and
interactions are replicated. On one device every collective below is the identity.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slgr_jax.errors import ConfigError

DATA, TABLE = "data", "table"
ROW_UNIT = 128
_LLVM_LEVEL = "xla_backend_optimization_level"
T = TypeVar("T")


def put(tree: Any, sharding: Any) -> Any:
    """Host arrays on devices; a process fills its own devices, from the whole of each array.

    Over several processes `jax.device_put` would compare what each of them gives, by a collective
    that takes longer than the copy.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def of_process(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    with jax.transfer_guard("allow"):  # as explicit as a device_put, which JAX does not know
        return jax.tree.map(of_process, tree)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh and the collectives of the step, to be used inside its `shard_map`."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        return int(self.mesh.size)

    @property
    def table_shards(self) -> int:
        return int(self.mesh.shape[TABLE])

    @property
    def batch_spec(self) -> PartitionSpec:
        return PartitionSpec((DATA, TABLE))

    @property
    def table_spec(self) -> PartitionSpec:
        return PartitionSpec(TABLE)

    @property
    def table_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.table_spec)

    @property
    def batches_sharding(self) -> NamedSharding:
        """Of the batches of several steps: [S, B, ...], each device a part of B."""
        return NamedSharding(self.mesh, PartitionSpec(None, (DATA, TABLE)))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any) -> Any:
        """Host arrays, whole, on every device."""
        return put(tree, self.replicated)

    @property
    def compiler_options(self) -> dict[str, int]:
        """For `jax.jit`: on CPUs the second of LLVM's levels, unless XLA_FLAGS name one.

        XLA's default, the third, compiles for up to twice as long, to a step that computes the same
        bits and is not faster (benchmarks/LOG.md, "a machine's first start").
        """
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return (
            {_LLVM_LEVEL: 2} if cpu and _LLVM_LEVEL not in os.environ.get("XLA_FLAGS", "") else {}
        )

    def padded_rows(self, rows: int) -> int:
        """`rows` rounded up so that every block has the same size.

        The unit does not depend on the mesh for any power-of-two number of shards up to
        `ROW_UNIT`, so a checkpoint has the same shapes on all of them.
        """
        unit = math.lcm(ROW_UNIT, self.table_shards)
        return -(-rows // unit) * unit

    def sum_over_all(self, tree: T) -> T:
        """Sum over every device."""
        if self.devices == 1:
            return tree
        summed: T = jax.lax.psum(tree, (DATA, TABLE))
        return summed

    def max_over_all(self, x: jax.Array) -> jax.Array:
        """The greatest of every device."""
        return jax.lax.pmax(x, (DATA, TABLE))

    def gather_over_all(self, x: jax.Array) -> jax.Array:
        """The parts of every device, concatenated in device order."""
        return x if self.devices == 1 else jax.lax.all_gather(x, (DATA, TABLE), tiled=True)

    def gather_over_table(self, x: jax.Array) -> jax.Array:
        """The parts of the devices that share one copy of the tables, concatenated."""
        return jax.lax.all_gather(x, TABLE, tiled=True)

    def exchange_over_table(self, x: jax.Array) -> jax.Array:
        """[T, ...] a part for each of the devices that share one copy of the tables -> [T, ...]
        the parts that each of them has for this one."""
        return jax.lax.all_to_all(x, TABLE, 0, 0)

    def gather_over_data(self, x: jax.Array) -> jax.Array:
        """The parts of the devices that hold the same block of each table, concatenated."""
        return x if self.mesh.shape[DATA] == 1 else jax.lax.all_gather(x, DATA, tiled=True)

    def table_index(self) -> jax.Array:
        """Which block of each table this device holds."""
        return jax.lax.axis_index(TABLE)

    def device_index(self) -> jax.Array:
        """This device's number in batch order."""
        return jax.lax.axis_index((DATA, TABLE))


def make_layout(
    *, table_shards: int = 1, min_devices: int = 1, devices: list[jax.Device] | None = None
) -> Layout:
    """A mesh over all devices (or the given ones) with `table_shards` on the `table` axis.

    Raises:
      ConfigError: fewer devices than `min_devices`, or a number that `table_shards` does not
        divide.
    """
    available = jax.devices() if devices is None else devices
    if len(available) < min_devices:
        raise ConfigError(
            f"--min_devices={min_devices}, but JAX sees {len(available)} "
            f"({available[0].device_kind}); check the job's device request and drivers"
        )
    if len(available) % table_shards:
        raise ConfigError(
            f"--table_shards={table_shards} does not divide the {len(available)} devices; "
            "give a divisor of their number"
        )
    grid = np.array(available).reshape(len(available) // table_shards, table_shards)
    return Layout(Mesh(grid, (DATA, TABLE), axis_types=(AxisType.Auto, AxisType.Auto)))
