"""Embedding tables that are read and updated row by row.

A table of R rows of width D is one array [Rp, W] of packed rows (`RowFormat`): each row carries
its S optimiser slots right behind its D values, so a lookup with its update is one gather and
one scatter of contiguous rows, and never a table-sized temporary. Rp is R padded to the mesh.

Values are stored in float32 or bfloat16, slots always in float32: in bfloat16 a sum stops
growing once what it is given is below half a unit in its last place (ulp). For the same reason
bfloat16 values are rounded stochastically: up with the probability that keeps the expectation.

A batch touches N rows, some more than once. Their gradients are summed first and the
optimiser is applied once to each distinct row, as a dense optimiser would.

Shape letters: R rows, Rp of them with padding, Rs of a device's block, D width, S slots, W numbers
of a packed row, N touched rows (with repeats).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from slgr_jax.kernels import cpu
from slgr_jax.mesh import Layout
from slgr_jax.models import row_exchange
from slgr_jax.models.row_optimizers import RowOptimizer, Sgd
from slgr_jax.sampling import random_bits


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """Size and initialisation of one table: entries ~ N(0, init_std^2 / width).

    Attributes:
      scalars: how many of a row's last entries are no part of its vector (a bias, say).
      of_users: whether row u is user u's, so that it can be where the user is.
    """

    rows: int
    width: int
    init_std: float
    scalars: int = 0
    of_users: bool = False

    @property
    def vector_width(self) -> int:
        """E: how many of a row's first entries are its vector."""
        return self.width - self.scalars


class InitialRows(NamedTuple):
    """What the rows of a table begin with, where it is given.

    Attributes:
      values: [Rp, C] what the first C numbers of each row's vector begin with, of the
        `TableSpec.vector_width` that it has; the others are drawn.
      share: [Rp] how much of a row is its vector: a in a v + sqrt(1 - a^2) r, with r what would be
        drawn; 0 where there is no vector, padding among them.
    """

    values: Float[Array, "Rp C"]
    share: Float[Array, "Rp"]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How the D values and S float32 slots of a row lie side by side as W numbers.

        values in   numbers of a row                                 storage   bytes a row
        float32     D values, S slots                                float32   4 D + 4 S
        bfloat16    D values, S slots' upper, S slots' lower halves  uint16    2 D + 4 S

    bfloat16 rows are stored as integers because XLA may change bits that are not a number's:
    its CPU compiler turns NaN patterns of bfloat16 numbers into another NaN (scatter, select,
    concatenate; jax 0.10), and the lower half of a float32 is such a pattern one time in 258.
    Halves stand in two planes, and not two by two, so that packing is elementwise.

    Attributes:
      width: D.
      slots: S.
      dtype: of the values; float32 or bfloat16.
    """

    width: int
    slots: int
    dtype: str

    @classmethod
    def of(cls, table: Num[Array, "R W"], width: int) -> RowFormat:
        """The format of a table whose rows have D = `width` values."""
        behind = table.shape[1] - width
        if table.dtype == jnp.uint16:
            return cls(width, behind // 2, "bfloat16")  # a slot takes two
        return cls(width, behind, "float32")

    def pack(
        self,
        values: Float[Array, "N D"],
        slots: Float[Array, "N S"],
        noise: UInt32[Array, "N D"] | None = None,
    ) -> Num[Array, "N W"]:
        """Rows from float32 values and slots; slots are kept to the bit.

        Args:
          values: each becomes one of its two bfloat16 neighbours where values are bfloat16.
          slots: of the same rows.
          noise: uniform in [0, 2^16), to round stochastically; None rounds to nearest.
        """
        if self.dtype == "float32":
            return jnp.concatenate([values, slots], axis=1)
        bits = jax.lax.bitcast_convert_type(slots, jnp.uint32)
        planes = [_upper_half(values, noise), bits >> 16, bits & 0xFFFF]
        return jnp.concatenate([plane.astype(jnp.uint16) for plane in planes], axis=1)

    def unpack(self, rows: Num[Array, "N W"]) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        """The float32 values and slots of rows."""
        if self.dtype == "float32":
            return rows[:, : self.width], rows[:, self.width :]
        cut = self.width + self.slots
        values, upper, lower = (
            plane.astype(jnp.uint32)
            for plane in (rows[:, : self.width], rows[:, self.width : cut], rows[:, cut:])
        )
        values, slots = values << 16, upper << 16 | lower
        return (
            jax.lax.bitcast_convert_type(values, jnp.float32),
            jax.lax.bitcast_convert_type(slots, jnp.float32),
        )


def _upper_half(
    values: Float[Array, "N D"], noise: UInt32[Array, "N D"] | None
) -> UInt32[Array, "N D"]:
    """bfloat16 bits of float32 values: (bits + noise) >> 16, where bfloat16 cuts a float32.

    A value on the bfloat16 grid stays (its lower half is 0), infinities among them; a NaN stays
    a NaN.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    if noise is None:
        noise = 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    # A NaN may be one by its lower half alone, and noise may carry it over the sign.
    return jnp.where(jnp.isnan(values), bits >> 16 | 0x40, bits + noise >> 16)


def rounding(key: jax.Array, names: Iterable[str]) -> dict[str, UInt32[Array, "2"]]:
    """By table: the generator that one update rounds it with, the same on any mesh.

    By hashing the key's own words: Threefry would take longer than the rest of a small step.

    Args:
      key: of the step.
    """
    numbers = {name: np.uint32(zlib.crc32(name.encode())) for name in names}
    words = jax.random.key_data(key)[:2]
    return {
        name: random_bits.mixed(random_bits.mixed(words ^ number) + number)
        for name, number in numbers.items()
    }


def init_table(
    key: jax.Array,
    spec: TableSpec,
    optimizer: RowOptimizer,
    layout: Layout,
    dtype: str = "float32",
    initial: InitialRows | None = None,
) -> Num[Array, "Rp W"]:
    """A fresh table [Rp, W], created shard by shard on the devices of `layout`.

    The values do not depend on the number of devices. Each is a function of its row and column,
    so that no second array of the table's size is ever made.

    Args:
      initial: what rows begin with instead; None: all are drawn.
    """
    rows, width = layout.table_rows(spec.rows, of_users=spec.of_users), spec.width
    sharding = layout.rows_sharding(of_users=spec.of_users)
    first_slots = optimizer.initial(width)
    row_format = RowFormat(width, first_slots.size, dtype)

    def make(key: jax.Array, initial: InitialRows | None) -> jax.Array:
        ids = jnp.arange(rows, dtype=jnp.int32)
        values = random_bits.normal(random_bits.of_rows(key, ids, width))
        values = values * np.float32(spec.init_std / np.sqrt(width))
        if initial is not None:
            given = initial.values.shape[1]
            drawn, rest = values[:, :given], values[:, given:]
            share = initial.share[:, None]
            # To the bit the one or the other where the share is 1 or 0.
            vectors = share * initial.values + jnp.sqrt(1.0 - share**2) * drawn
            values = jnp.concatenate([vectors, rest], axis=1)
        slots = jnp.broadcast_to(first_slots[None, :], (rows, first_slots.size))
        return row_format.pack(values, slots)

    return jax.jit(make, out_shardings=sharding)(key, initial)


def values_of(
    table: Num[Array, "Rp W"], spec: TableSpec, rows: int | None = None
) -> Float[Array, "_ D"]:
    """The float32 values of a table, without optimiser slots.

    Args:
      rows: of its first so many rows; None: of all R, without padding.
    """
    first = table[: spec.rows if rows is None else rows]
    return RowFormat.of(table, spec.width).unpack(first)[0]


def all_finite(table: Num[Array, "Rp W"], width: int) -> Bool[Array, ""]:
    """Whether every value and slot of a table is a finite number; padding rows too."""
    parts = RowFormat.of(table, width).unpack(table)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in parts]))


def lookup(
    table: Num[Array, "Rs W"],
    ids: Int[Array, "..."],
    width: int,
    layout: Layout,
    *,
    of_users: bool = False,
) -> Float[Array, "... D"]:
    """The float32 values of rows `ids`, inside the step's `shard_map`.

    Args:
      table: this device's block of the table's rows.
      ids: this device's ids, any shape, each in [0, R). Ids are checked on the host when the
        data are loaded; here an id outside would silently read another row.
      width: D.
      layout: the mesh; with one table shard this is a plain gather.
      of_users: whether the ids are of users. Where those are split they are rows of the block.
    """
    row_format = RowFormat.of(table, width)

    def read(local: Int[Array, "N"]) -> Float[Array, "N D"]:
        values, _ = row_format.unpack(table.at[local].get(mode="promise_in_bounds"))
        return values

    flat = ids.reshape(-1)
    if layout.table_shards == 1 or layout.splits(of_users=of_users):
        rows = read(flat)
    else:
        rows = row_exchange.fetch(flat, table.shape[0], width, layout, read)
    return rows.reshape(*ids.shape, width)


def every_row(table: Num[Array, "Rs W"], spec: TableSpec, layout: Layout) -> Float[Array, "R D"]:
    """The float32 values of all R rows, without padding, inside the step's `shard_map`; where
    users are split, those of the device's own."""
    values, _ = RowFormat.of(table, spec.width).unpack(table)
    if layout.splits(of_users=spec.of_users):
        return values
    if layout.table_shards > 1:
        values = layout.gather_over_table(values)
    return values[: spec.rows]


def update_every_row(
    table: Num[Array, "Rs W"],
    grads: Float[Array, "R D"],
    optimizer: RowOptimizer,
    layout: Layout,
    generator: UInt32[Array, "2"] | None = None,
    *,
    of_users: bool = False,
) -> Num[Array, "Rs W"]:
    """Apply `optimizer` once to every row: what a dense optimiser does.

    Args:
      table: this device's block of the table.
      grads: this device's share of the gradient of `every_row`; of users that are split, all of it.
      generator, of_users: as for `update`.
    """
    rows, width = table.shape[0], grads.shape[1]
    row_format = RowFormat.of(table, width)
    ids, own = jnp.arange(rows, dtype=jnp.int32), layout.splits(of_users=of_users)
    if not own:
        grads = layout.sum_over_all(grads)
        grads = jnp.pad(grads, ((0, rows * layout.table_shards - grads.shape[0]), (0, 0)))
    if own and layout.devices > 1:
        ids = ids + layout.device_index() * rows
    elif not own and layout.table_shards > 1:
        ids = ids + layout.table_index() * rows
        grads = jax.lax.dynamic_slice_in_dim(grads, layout.table_index() * rows, rows)

    noise = None
    if row_format.dtype == "bfloat16":
        noise = random_bits.halves_of_rows(_given(generator), ids, width)
    return row_format.pack(*optimizer.apply(*row_format.unpack(table), grads), noise)


def _given(generator: UInt32[Array, "2"] | None) -> UInt32[Array, "2"]:
    if generator is None:
        raise ValueError("a bfloat16 table is updated with a generator, to round stochastically")
    return generator


def update(
    table: Num[Array, "Rs W"],
    slot: Int[Array, "Rs"],
    ids: Int[Array, "..."],
    grads: Float[Array, "... D"],
    optimizer: RowOptimizer,
    layout: Layout,
    generator: UInt32[Array, "2"] | None = None,
    *,
    of_users: bool = False,
    native: bool = False,
) -> tuple[Num[Array, "Rs W"], Int[Array, "Rs"]]:
    """Apply `optimizer` once to each distinct row of `ids`, with its gradients summed.

    Distinct rows are found without a sort: every entry of `ids` writes its number into `slot` at
    its row, one of them stays, and reading back gives all entries of a row the same
    representative. `slot` needs no clearing, since only what this call has written is read.

    Args:
      table: this device's block of the table.
      slot: [Rs] int32 scratch with the block's rows, carried from step to step.
      ids: this device's ids in [0, R), any shape.
      grads: gradient of each, same leading shape.
      generator: of this update (`rounding`), the same on every device; for bfloat16 values.
      of_users: as for `lookup`: nothing goes to another device.
      native: let the CPU kernel do it.

    Raises:
      ValueError: a bfloat16 table without a generator.
    """
    width = grads.shape[-1]
    ids, grads = ids.reshape(-1), grads.reshape(-1, width)

    if layout.splits(of_users=of_users):
        return update_own(table, slot, ids, grads, layout, optimizer, generator)

    def apply(carry: tuple[Any, Any], local: jax.Array, summands: jax.Array) -> tuple[Any, Any]:
        first = layout.table_index() * table.shape[0]
        return update_block(
            *carry, local, summands, optimizer, generator, first=first, past_the_end=True
        )

    if layout.table_shards > 1:
        return row_exchange.deliver(ids, grads, table.shape[0], layout, apply, (table, slot))
    ids, grads = layout.gather_over_all(ids), layout.gather_over_all(grads)
    if native:
        bfloat16 = RowFormat.of(table, width).dtype == "bfloat16"
        words = _given(generator) if bfloat16 else None
        return cpu.row_update(table, slot, ids, grads, words, optimizer.rule)
    return update_block(table, slot, ids, grads, optimizer, generator)


def update_own(
    table: Num[Array, "Rs W"],
    slot: Int[Array, "Rs"],
    users: Int[Array, "N"],
    grads: Float[Array, "N D"],
    layout: Layout,
    optimizer: RowOptimizer,
    generator: UInt32[Array, "2"] | None,
) -> tuple[Num[Array, "Rs W"], Int[Array, "Rs"]]:
    """`update` of the rows of this device's own users: nobody else has a gradient of them.

    Args:
      users: their rows of the block.
    """
    first = 0 if layout.devices == 1 else layout.device_index() * table.shape[0]
    return update_block(table, slot, users, grads, optimizer, generator, first=first)


def update_block(
    table: Num[Array, "Rs W"],
    slot: Int[Array, "Rs"],
    local: Int[Array, "N"],
    grads: Float[Array, "N D"],
    optimizer: RowOptimizer,
    generator: UInt32[Array, "2"] | None,
    *,
    first: Int[Array, ""] | int = 0,
    past_the_end: bool = False,
) -> tuple[Num[Array, "Rs W"], Int[Array, "Rs"]]:
    """`update` of rows of this device's block, given all gradients of them.

    Args:
      local: numbers in the block.
      first: the number of the block's first row in the table.
      past_the_end: whether some are Rs, past the block's end, which is written nowhere.
    """
    rows, row_format = table.shape[0], RowFormat.of(table, grads.shape[1])
    noise = None
    if row_format.dtype == "bfloat16":
        noise = random_bits.halves_of_rows(_given(generator), local + first, grads.shape[1])

    mode, put = ("clip", "drop") if past_the_end else ("promise_in_bounds", "promise_in_bounds")
    if isinstance(optimizer, Sgd) and row_format.dtype == "float32":
        return table.at[local].add(-optimizer.lr * grads, mode=put), slot

    entry = jnp.arange(local.size, dtype=jnp.int32)
    slot = slot.at[local].set(entry, mode=put)
    representative = slot.at[local].get(mode=mode)
    total = jnp.zeros_like(grads).at[representative].add(grads, mode="promise_in_bounds")

    old_values, old_slots = row_format.unpack(table.at[local].get(mode=mode))
    values, slots = optimizer.apply(old_values, old_slots, total)
    packed = row_format.pack(values, slots, noise)
    # A row is written once, by its representative; past the block's end means nowhere.
    target = jnp.where((representative == entry) & (local < rows), local, rows)
    return table.at[target].set(packed, mode="drop", unique_indices=True), slot
