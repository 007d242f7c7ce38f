"""Embedding tables that are read and updated row by row.

A table of R rows of width D is one float32 array [R', D + S]: each row carries its S
optimiser slots right behind its D values, so a lookup with its update is one gather and one
scatter of contiguous rows, and never a table-sized temporary. R' is R padded to the mesh.

A batch touches N rows, some more than once. Their gradients are summed first and the
optimiser is applied once to each distinct row, as a dense optimiser would.

Shape letters: R rows, D width, S slots, N touched rows (with repeats).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slgr_jax.config import OptimizerConfig
from slgr_jax.distributed import Layout

Rows = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """Size and initialisation of one table: entries ~ N(0, init_std^2 / width)."""

    rows: int
    width: int
    init_std: float


class RowOptimizer(Protocol):
    """An update rule for rows, each with its own slots.

    `apply` maps (values [N, D], slots [N, S], gradient [N, D]) to new values and slots. It sees
    each touched row once, with the sum of its gradients.
    """

    def slots(self, width: int) -> int:
        """S for rows of width D."""
        ...

    def initial(self, width: int) -> np.ndarray:
        """The [S] slots of an untouched row."""
        ...

    def apply(
        self,
        values: Float[Array, "N D"],
        slots: Float[Array, "N S"],
        grad: Float[Array, "N D"],
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        """One update of each row."""
        ...


@dataclasses.dataclass(frozen=True)
class Sgd:
    """w <- w - lr g. On touched rows equal to `optax.sgd(lr)`."""

    lr: float

    def slots(self, width: int) -> int:
        return 0

    def initial(self, width: int) -> np.ndarray:
        return np.zeros(0, np.float32)

    def apply(
        self, values: jax.Array, slots: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return values - self.lr * grad, slots


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """a <- a + g^2; w <- w - lr g / sqrt(a + eps), per entry, a starts at 0.1.

    On touched rows equal to `optax.adagrad(lr, initial_accumulator_value=0.1, eps)`
    (Duchi et al. 2011).
    """

    lr: float
    eps: float

    def slots(self, width: int) -> int:
        return width

    def initial(self, width: int) -> np.ndarray:
        return np.full(width, 0.1, np.float32)

    def apply(
        self, values: jax.Array, slots: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        slots = slots + grad * grad
        return values - self.lr * grad * jax.lax.rsqrt(slots + self.eps), slots


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad:
    """a <- a + mean(g^2); w <- w - lr g / sqrt(a + eps): one accumulator a row, from 0.1.

    The row-wise variant of DLRM-style trainers: 4 bytes of state a row instead of 4 D.
    """

    lr: float
    eps: float

    def slots(self, width: int) -> int:
        return 1

    def initial(self, width: int) -> np.ndarray:
        return np.full(1, 0.1, np.float32)

    def apply(
        self, values: jax.Array, slots: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        slots = slots + jnp.mean(grad * grad, axis=1, keepdims=True)
        return values - self.lr * grad * jax.lax.rsqrt(slots + self.eps), slots


@dataclasses.dataclass(frozen=True)
class LazyAdam:
    """Adam on the rows a batch touches, with each row's own step count.

    A row's trajectory is exactly that of `optax.adam(lr, b1, b2, eps)` fed the steps that touch
    the row; steps that do not touch it neither decay its moments nor move it. Slots: first
    moment [D], second moment [D], count [1].
    """

    lr: float
    b1: float
    b2: float
    eps: float

    def slots(self, width: int) -> int:
        return 2 * width + 1

    def initial(self, width: int) -> np.ndarray:
        return np.zeros(2 * width + 1, np.float32)

    def apply(
        self, values: jax.Array, slots: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        width = values.shape[1]
        count = slots[:, 2 * width :] + 1.0
        first = self.b1 * slots[:, :width] + (1.0 - self.b1) * grad
        second = self.b2 * slots[:, width : 2 * width] + (1.0 - self.b2) * grad * grad
        # 1 - b^t through expm1: exact where b^t is close to 1, as it is for b2 and small t.
        first_scale = -jnp.expm1(count * np.float32(np.log(self.b1))) if self.b1 else 1.0
        second_scale = -jnp.expm1(count * np.float32(np.log(self.b2))) if self.b2 else 1.0
        step = (first / first_scale) / (jnp.sqrt(second / second_scale) + self.eps)
        return values - self.lr * step, jnp.concatenate([first, second, count], axis=1)


def make_row_optimizer(config: OptimizerConfig) -> RowOptimizer:
    """The row optimiser that `config.table_optimizer` names."""
    makers: dict[str, Callable[[], RowOptimizer]] = {
        "sgd": lambda: Sgd(config.lr),
        "adagrad": lambda: Adagrad(config.lr, config.eps),
        "rowwise_adagrad": lambda: RowwiseAdagrad(config.lr, config.eps),
        "lazy_adam": lambda: LazyAdam(config.lr, config.adam_b1, config.adam_b2, config.eps),
    }
    return makers[config.table_optimizer]()


def init_table(
    key: jax.Array, spec: TableSpec, optimizer: RowOptimizer, layout: Layout
) -> Float[Array, "R W"]:
    """A fresh table [R', D + S], created shard by shard on the devices of `layout`.

    The values do not depend on the number of devices: padding rows come last.
    """
    rows, width = layout.padded_rows(spec.rows), spec.width
    initial = optimizer.initial(width)

    def make(key: jax.Array) -> jax.Array:
        values = jax.random.normal(key, (rows, width), jnp.float32)
        values = values * np.float32(spec.init_std / np.sqrt(width))
        slots = jnp.broadcast_to(initial[None, :], (rows, initial.size))
        return jnp.concatenate([values, slots], axis=1)

    return jax.jit(make, out_shardings=layout.table_sharding)(key)


def values_of(table: Float[Array, "R W"], spec: TableSpec) -> Float[Array, "R D"]:
    """The values of a table, without optimiser slots and padding rows."""
    return table[: spec.rows, : spec.width]


def lookup(
    table: Float[Array, "Rs W"], ids: Int[Array, "..."], width: int, layout: Layout
) -> Float[Array, "... D"]:
    """The values of rows `ids`, inside the step's `shard_map`.

    Args:
      table: this device's block of the table's rows.
      ids: this device's ids, any shape, each in [0, R). Ids are checked on the host when the
        data are loaded; here an id outside would silently read another row.
      width: D.
      layout: the mesh; with one table shard this is a plain gather.
    """
    flat = ids.reshape(-1)
    if layout.table_shards == 1:
        rows = table.at[flat].get(mode="promise_in_bounds")[:, :width]
    else:
        every = layout.gather_over_table(flat)
        local = every - layout.table_index() * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = table.at[jnp.where(mine, local, 0)].get(mode="promise_in_bounds")[:, :width]
        rows = layout.scatter_over_table(jnp.where(mine[:, None], rows, 0.0))
    return rows.reshape(*ids.shape, width)


def update(
    table: Float[Array, "Rs W"],
    slot: Int[Array, "Rs"],
    ids: Int[Array, "..."],
    grads: Float[Array, "... D"],
    optimizer: RowOptimizer,
    layout: Layout,
) -> tuple[Float[Array, "Rs W"], Int[Array, "Rs"]]:
    """Apply `optimizer` once to each distinct row of `ids`, with its gradients summed.

    Distinct rows are found without a sort: every lane writes its number into `slot` at its
    row, one of them stays, and reading back gives all lanes of a row the same representative.
    `slot` needs no clearing, since only entries written in this call are read.

    Args:
      table: this device's block of the table.
      slot: [Rs] int32 scratch with the block's rows, carried from step to step.
      ids: this device's ids in [0, R), any shape.
      grads: gradient of each, same leading shape.
    """
    width = grads.shape[-1]
    ids = layout.gather_over_all(ids.reshape(-1))
    grads = layout.gather_over_all(grads.reshape(-1, width))
    rows = table.shape[0]
    lane = jnp.arange(ids.size, dtype=jnp.int32)
    if layout.table_shards == 1:
        local, mode, put = ids, "promise_in_bounds", "promise_in_bounds"
    else:
        local = ids - layout.table_index() * rows
        mine = (local >= 0) & (local < rows)
        # Rows of other blocks: written nowhere, and worth nothing where they are read.
        local, grads = jnp.where(mine, local, rows), jnp.where(mine[:, None], grads, 0.0)
        mode, put = "clip", "drop"
    if isinstance(optimizer, Sgd):
        return table.at[local].add(-optimizer.lr * grads, mode=put), slot
    slot = slot.at[local].set(lane, mode=put)
    representative = slot.at[local].get(mode=mode)
    total = jnp.zeros_like(grads).at[representative].add(grads, mode="promise_in_bounds")
    is_representative = representative == lane
    old = table.at[local].get(mode=mode)
    values, slots = optimizer.apply(old[:, :width], old[:, width:], total)
    new = jnp.concatenate([values, slots], axis=1)
    target = jnp.where(is_representative & (local < rows), local, rows)
    return table.at[target].set(new, mode="drop", unique_indices=True), slot
