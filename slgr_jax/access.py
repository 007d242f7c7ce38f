"""How a step reads table rows and writes them back: as rows, or as dot products of rows.

The step differentiates its loss with respect to *leaves*, whatever `read` returned, and hands
their gradient to `write`. Which of the two it is changes no result but rounding.

  Rows     leaves are the rows themselves. Any backbone, any device.
  Factors  leaves are s = p . q_c and the squared norms, of backbones that are a dot product:
           the CPU kernels compute them and, from ds alone, the gradients of the rows, so that
           neither is ever written out.

Shape letters: N lanes (triples, then preferences), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax import tables
from slgr_jax.backbones import Backbone
from slgr_jax.backbones.base import FactorModel
from slgr_jax.distributed import Layout
from slgr_jax.kernels import cpu

Tables = Mapping[str, jax.Array]
Leaves = Mapping[str, jax.Array]


class Access(Protocol):
    """One way to read and write; see the module's docstring."""

    def read(self, state: Tables, users: Int[Array, "N"], items: Int[Array, "N 2"]) -> Leaves:
        """What the loss is differentiated by."""
        ...

    def score(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        users: Int[Array, "N"],
        items: Int[Array, "N 2"],
        *,
        dropout: tuple[float, jax.Array] | None = None,
    ) -> Float[Array, "N 2"]:
        """Logits of both items of each lane; see `Backbone.score`."""
        ...

    def squares(self, leaves: Leaves) -> Float[Array, "N"]:
        """Sum of the squared entries of all rows that a lane reads."""
        ...

    def finite(self, leaves: Leaves) -> list[Bool[Array, ""]]:
        """Per table: whether every row that was read is finite."""
        ...

    def write(
        self,
        state: Tables,
        slots: Tables,
        users: Int[Array, "N"],
        items: Int[Array, "N 2"],
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The tables and slots after one update of every row that was read."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Leaves: table name -> the rows that `backbone.ids` names."""

    backbone: Backbone
    optimizer: tables.RowOptimizer
    layout: Layout
    native: bool

    def read(self, state: Tables, users: jax.Array, items: jax.Array) -> Leaves:
        ids = self.backbone.ids(users, items)
        return {
            name: tables.lookup(state[name], ids[name], spec.width, self.layout)
            for name, spec in self.backbone.tables.items()
        }

    def score(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        users: jax.Array,
        items: jax.Array,
        *,
        dropout: tuple[float, jax.Array] | None = None,
    ) -> jax.Array:
        return self.backbone.score(params, leaves, users, items, dropout=dropout)

    def squares(self, leaves: Leaves) -> jax.Array:
        found = [
            jnp.sum(jnp.square(rows.reshape(rows.shape[0], -1)), axis=1) for rows in leaves.values()
        ]
        return jnp.sum(jnp.stack(found), axis=0)

    def finite(self, leaves: Leaves) -> list[jax.Array]:
        return [jnp.isfinite(jnp.sum(jnp.square(leaves[name]))) for name in self.backbone.tables]

    def write(
        self,
        state: Tables,
        slots: Tables,
        users: jax.Array,
        items: jax.Array,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        ids = self.backbone.ids(users, items)
        new_tables, new_slots = {}, {}
        for number, name in enumerate(self.backbone.tables):
            new_tables[name], new_slots[name] = tables.update(
                state[name],
                slots[name],
                ids[name],
                gradient[name],
                self.optimizer,
                self.layout,
                jax.random.fold_in(key, number),
                native=self.native,
            )
        return new_tables, new_slots


@dataclasses.dataclass(frozen=True)
class Factors:
    """Leaves: `scores` [N, 2] and `squares` [N, 2] = (|p|^2, |q_0|^2 + |q_1|^2)."""

    model: FactorModel
    width: int
    table_names: tuple[str, ...]
    optimizer: tables.RowOptimizer

    def read(self, state: Tables, users: jax.Array, items: jax.Array) -> Leaves:
        model = self.model
        scores, squares = cpu.factor_scores(
            state[model.user_table],
            state[model.item_table],
            users,
            items,
            width=self.width,
            unit=model.unit,
        )
        return {"scores": scores, "squares": squares}

    def score(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        users: jax.Array,
        items: jax.Array,
        *,
        dropout: tuple[float, jax.Array] | None = None,
    ) -> jax.Array:
        assert dropout is None, "a stochastic pass needs the rows"
        return leaves["scores"]

    def squares(self, leaves: Leaves) -> jax.Array:
        return leaves["squares"][:, 0] + leaves["squares"][:, 1]

    def finite(self, leaves: Leaves) -> list[jax.Array]:
        of_table = {self.model.user_table: 0, self.model.item_table: 1}
        sums = jnp.sum(leaves["squares"], axis=0)
        return [jnp.isfinite(sums[of_table[name]]) for name in self.table_names]

    def write(
        self,
        state: Tables,
        slots: Tables,
        users: jax.Array,
        items: jax.Array,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        user, item = self.model.user_table, self.model.item_table
        new = cpu.factor_update(
            state[user],
            state[item],
            slots[user],
            slots[item],
            users,
            items,
            gradient["scores"],
            gradient["squares"],
            self.optimizer.rule,
            width=self.width,
            unit=self.model.unit,
        )
        return {user: new[0], item: new[1]}, {user: new[2], item: new[3]}
