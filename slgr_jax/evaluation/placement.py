"""Where the users of a chunk are ranked, and where the items are that they are ranked over.

    users split     each device scores its users of the chunk over all items
    items split     the devices of one `table` axis have a block of the items each: all of them
                    score the same users, each over its block, and what they count is added up

Shape letters: B users of a chunk, I items.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from slgr_jax.mesh import DATA, TABLE, Layout, UserShards


class Block(NamedTuple):
    """The items that a device scores, and what is known of all of them together.

    Attributes:
      first: the first of them.
      size: how many columns of scores they have, those of no item among them.
      n_items: I.
      axis: the mesh axis that the blocks are split over; None: this is all of them.
    """

    first: jax.Array | int
    size: int
    n_items: int
    axis: str | None

    def columns(self, items: jax.Array) -> jax.Array:
        """Where items are in the block; a number past any column where they are in another."""
        local = items - self.first
        here = (local >= 0) & (local < self.size)
        return jnp.where(here, local, jnp.iinfo(jnp.int32).max)

    def items(self, columns: int) -> jax.Array:
        """[columns] the item of each column, I or more where there is none."""
        index = jnp.arange(columns)
        return jnp.where(index < self.size, self.first + index, self.n_items)

    def greatest(self, x: jax.Array) -> jax.Array:
        """The greatest over all blocks."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all blocks."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def side_by_side(self, x: jax.Array) -> jax.Array:
        """[B, blocks * n] what every block has, [B, n] each, in the order of items."""
        return x if self.axis is None else jax.lax.all_gather(x, self.axis, axis=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which device has what; a static argument of the programs.

    Attributes:
      mesh: devices that the users of a chunk are split over; None: the default device.
      split: whose users are on which device for good; None: anybody's are on each.
      split_items: I, where items are split over the mesh's `table`; 0: they are whole on each.
    """

    mesh: Mesh | None = None
    split: UserShards | None = None
    split_items: int = 0

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else int(self.mesh.size)

    @property
    def _user_axes(self) -> tuple[str, ...]:
        assert self.mesh is not None
        return (DATA,) if self.split_items else self.mesh.axis_names

    @property
    def layout(self) -> Layout:
        """The devices that users are split over."""
        assert self.mesh is not None
        return Layout(self.mesh, self.split)

    @property
    def user_parts(self) -> int:
        """How many parts the users of a chunk are in."""
        return self.mesh.shape[DATA] if self.mesh and self.split_items else self.devices

    @property
    def of_users(self) -> PartitionSpec:
        """Of [B, ...], a number for each user of a chunk."""
        return PartitionSpec(self._user_axes)

    @property
    def of_items(self) -> PartitionSpec:
        """Of [I, ...], a row for each item."""
        return PartitionSpec(TABLE if self.split_items else None)

    @property
    def of_scores(self) -> PartitionSpec:
        """Of [B, I]."""
        return PartitionSpec(self._user_axes, TABLE if self.split_items else None)

    def laid_out(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`x` with a layout, inside of a program over the mesh."""
        assert self.mesh is not None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    @functools.cached_property
    def by_user(self) -> Sharding:
        """Where [B, ...] is put; where users are split, what ranking asks of them as well."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, self.of_users)

    @property
    def with_users(self) -> Sharding:
        """Of [V, ...], where users are split: each shard's on the device that has its users."""
        return self.by_user if self.mesh is None else self.layout.users_sharding

    @property
    def everywhere(self) -> Sharding | None:
        """Where an array is put whole; None: on the default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def own_rows(self, users: jax.Array) -> jax.Array:
        """Where users of `split` are in what a device has of the rows to rank for its part of
        them, inside a `shard_map`; padding stays -1."""
        assert self.split is not None
        first: jax.Array | int = 0
        if self.mesh is not None:
            part = jax.lax.axis_index(self._user_axes)
            first = part * (self.split.table_rows // self.user_parts)
        return jnp.where(users < 0, -1, users - first)

    def rows_on_device(self, users: jax.Array) -> jax.Array:
        """Where the users of a device are in its part of their table, inside a `shard_map`; 0 for
        padding."""
        assert self.split is not None
        first = self.layout.device_index() * (self.split.table_rows // self.devices)
        return jnp.where(users < 0, 0, users - first)

    def block(self, columns: int) -> Block:
        """The items of a device whose scores have so many columns, inside a `shard_map`."""
        if not self.split_items:
            return Block(0, columns, columns, None)
        return Block(jax.lax.axis_index(TABLE) * columns, columns, self.split_items, TABLE)
