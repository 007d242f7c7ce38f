"""Process start-up, the device mesh, and where each array lives on it.

Mesh axes: `data` x `table`. Every device works on its own part of the batch; the rows of a
table are split over `table` and replicated over `data`. Dense parameters, counts and
interactions are replicated. On one device every collective below is the identity.

With `UserShards` all that belongs to users is split over every device, `data` x `table`: the rows
of their table, their interactions, their histories, their preferences. A device draws for its own
users alone, and knows them by their row among the rows that it has.
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
from slgr_jax.user_shards import UserShards as UserShards

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


def part_of_lanes() -> tuple[jax.Array | int, int]:
    """Which part of the lanes of a batch the surrounding `shard_map` works on, and of how many
    equal ones; (0, 1) outside of any.

    So noise of lanes is a function of their number in the batch, whatever the mesh: a step's key
    is the same on every device.
    """
    if not {DATA, TABLE} <= set(jax.sharding.get_abstract_mesh().manual_axes):
        return 0, 1
    return jax.lax.axis_index((DATA, TABLE)), int(jax.lax.axis_size((DATA, TABLE)))


def sum_over_parts(x: jax.Array) -> jax.Array:
    """The sum over all devices of the surrounding `shard_map`; `x` itself outside of any."""
    if part_of_lanes()[1] == 1:
        return x
    summed: jax.Array = jax.lax.psum(x, (DATA, TABLE))
    return summed


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh and the collectives of the step, to be used inside its `shard_map`.

    Attributes:
      users: how users are split over the devices; None: what belongs to them is on every device.

    Raises:
      ConfigError: shards of users that the devices cannot have as many of each.
    """

    mesh: Mesh
    users: UserShards | None = None

    def __post_init__(self) -> None:
        if self.users is not None and self.users.count % self.devices:
            raise ConfigError(
                f"--user_shards={self.users.count} is not a multiple of the {self.devices} "
                "devices: it is a constant of the run; train on a number of them that divides it, "
                "or anew with another"
            )

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

    def splits(self, *, of_users: bool) -> bool:
        """Whether a table is split over all devices by its users."""
        return of_users and self.users is not None

    def rows_spec(self, *, of_users: bool) -> PartitionSpec:
        """How a table of users, or another one, is split."""
        return self.batch_spec if self.splits(of_users=of_users) else self.table_spec

    def rows_sharding(self, *, of_users: bool) -> NamedSharding:
        """Where the rows of a table of users, or of another one, are."""
        return NamedSharding(self.mesh, self.rows_spec(of_users=of_users))

    @property
    def users_sharding(self) -> NamedSharding:
        """Of [V, ...] what belongs to the users of each shard."""
        return NamedSharding(self.mesh, self.batch_spec)

    @property
    def shards_here(self) -> int:
        """Shards of users that each device has."""
        assert self.users is not None, "users are split"
        return self.users.count // self.devices

    @property
    def shards_of_process(self) -> np.ndarray:
        """[V] bool: which shards of users are on devices of this process."""
        own = [x.process_index == jax.process_index() for x in self.mesh.devices.flat]
        return np.repeat(own, self.shards_here)

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

    def table_rows(self, rows: int, *, of_users: bool) -> int:
        """Rows of a table with its padding."""
        return self.users.table_rows if of_users and self.users else self.padded_rows(rows)

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

    def first_shard(self) -> jax.Array | int:
        """The first of this device's shards of users."""
        return 0 if self.devices == 1 else self.device_index() * self.shards_here


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
