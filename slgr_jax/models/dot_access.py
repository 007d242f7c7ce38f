"""How a step reads rows as dot products s = p . q_c, whose gradients are those of the rows:
dL/dp = sum_c ds_c q_c and dL/dq_c = ds_c p. So rows' gradients need not be written out.

  DotAccess           one CPU device; the kernels never write rows out either.
  BroadcastDotAccess  several devices, each with whole tables: ds and ids go to all of them instead
                      of rows' gradients. Of B triples 20 B bytes a device and step (28 B where
                      triples are weighed) in place of 3 B (4 D + 4): for B = 8,192, D = 64,
                      0.16 MB in place of 6.4. Where users are split, each query's row goes to all
                      devices beside ds, for the gradients of items, and p is updated where it is:
                      4 D B bytes more, 2.1 MB.

Shape letters: N queries of this device, C candidates of a query, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slgr_jax.kernels import cpu
from slgr_jax.mesh import Layout
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones.base import Dropout, FactorModel
from slgr_jax.models.candidates import Candidates, Vectors
from slgr_jax.models.row_access import NOTHING, Leaves, Masked, Reads, Tables, View
from slgr_jax.models.row_optimizers import RowOptimizer
from slgr_jax.sampling.context import Context


@dataclasses.dataclass(frozen=True)
class _DotLeaves:
    """Leaves: `scores` and `squares` = (|p|^2, |q_0|^2 + |q_1|^2) of one group of candidates, [N,
    2].

    And `totals`, the sum of the squares over queries, [2]: no loss reads them.
    """

    model: FactorModel
    width: int
    optimizer: RowOptimizer

    @staticmethod
    def _candidates(reads: Reads) -> Candidates:
        (candidates,) = reads.candidates.values()
        return candidates

    def view(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        context: Context,
        reads: Reads,
        dropout: Dropout,
        masked: Masked = NOTHING,
    ) -> View:
        return _DotView(leaves["scores"])

    def squares(
        self, params: Mapping[str, Any], leaves: Leaves, context: Context, reads: Reads
    ) -> dict[str, jax.Array]:
        (name,) = reads.candidates
        return {name: leaves["squares"][:, 0] + leaves["squares"][:, 1]}

    def finite(self, leaves: Leaves) -> dict[str, jax.Array]:
        finite = jnp.isfinite(leaves["totals"])
        return {self.model.user_table: finite[0], self.model.item_table: finite[1]}


@dataclasses.dataclass(frozen=True)
class DotAccess(_DotLeaves):
    """By the CPU kernels."""

    def read(self, state: Tables, context: Context, reads: Reads) -> Leaves:
        model, candidates = self.model, self._candidates(reads)
        scores, squares, totals = cpu.factor_scores(
            state[model.user_table],
            state[model.item_table],
            candidates.queries.users,
            candidates.items,
            width=self.width,
            unit=model.unit,
        )
        return {"scores": scores, "squares": squares, "totals": totals}

    def write(
        self,
        state: Tables,
        slots: Tables,
        context: Context,
        reads: Reads,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        user, item, candidates = (
            self.model.user_table,
            self.model.item_table,
            self._candidates(reads),
        )
        words = None
        if state[user].dtype == jnp.uint16:
            rounding = embedding_table.rounding(key, (user, item))
            words = jnp.stack([rounding[user], rounding[item]])
        new = cpu.factor_update(
            state[user],
            state[item],
            slots[user],
            slots[item],
            candidates.queries.users,
            candidates.items,
            gradient["scores"],
            gradient["squares"],
            words,
            self.optimizer.rule,
            width=self.width,
            unit=self.model.unit,
        )
        return {user: new[0], item: new[1]}, {user: new[2], item: new[3]}


@dataclasses.dataclass(frozen=True)
class BroadcastDotAccess(_DotLeaves):
    """By XLA on several devices, inside the step's `shard_map`."""

    layout: Layout

    def _rows(
        self, state: Tables, users: Int[Array, "N"], items: Int[Array, "N C"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N C D"]]:
        model, width = self.model, self.width
        return (
            embedding_table.lookup(
                state[model.user_table], users, width, self.layout, of_users=True
            ),
            embedding_table.lookup(state[model.item_table], items, width, self.layout),
        )

    def read(self, state: Tables, context: Context, reads: Reads) -> Leaves:
        candidates = self._candidates(reads)
        p, q = self._rows(state, candidates.queries.users, candidates.items)
        squares = jnp.stack([jnp.sum(p * p, axis=1), jnp.sum(q * q, axis=(1, 2))], axis=1)
        scores = jnp.sum(self._with_unit(p)[:, None, :] * q, axis=2)
        return {"scores": scores, "squares": squares, "totals": jnp.sum(squares, axis=0)}

    def _with_unit(self, p: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """What items' rows are multiplied with."""
        return p.at[:, -1].set(1.0) if self.model.unit else p

    def write(
        self,
        state: Tables,
        slots: Tables,
        context: Context,
        reads: Reads,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        candidates, gather = self._candidates(reads), self.layout.gather_over_all
        users, items = candidates.queries.users, candidates.items
        d_scores, d_squares = gradient["scores"], gradient["squares"]
        if self.layout.users is not None:
            p, q = self._rows(state, users, items)
            d_p = self._of_queries(p, q, d_scores, d_squares)
            p, items, d_scores, d_squares = map(gather, (p, items, d_scores, d_squares))
            q = embedding_table.lookup(state[self.model.item_table], items, self.width, self.layout)
        else:
            users, items, d_scores, d_squares = map(gather, (users, items, d_scores, d_squares))
            p, q = self._rows(state, users, items)
            d_p = self._of_queries(p, q, d_scores, d_squares)
        d_q = d_scores[:, :, None] * self._with_unit(p)[:, None, :]
        d_q += 2.0 * d_squares[:, 1:, None] * q
        new_tables, new_slots = dict(state), dict(slots)
        named = {self.model.user_table: (users, d_p), self.model.item_table: (items, d_q)}
        rounding = embedding_table.rounding(key, named)
        for name, (ids, grads) in named.items():
            table, slot, rows = state[name], slots[name], grads.reshape(-1, self.width)
            rest = self.optimizer, rounding[name]
            if name == self.model.user_table and self.layout.users is not None:
                new = embedding_table.update_own(table, slot, ids, rows, self.layout, *rest)
            else:
                new = embedding_table.update_block(table, slot, ids.reshape(-1), rows, *rest)
            new_tables[name], new_slots[name] = new
        return new_tables, new_slots

    def _of_queries(
        self,
        p: Float[Array, "N D"],
        q: Float[Array, "N C D"],
        d_scores: Float[Array, "N C"],
        d_squares: Float[Array, "N 2"],
    ) -> Float[Array, "N D"]:
        """dL/dp."""
        d_p = jnp.sum(d_scores[:, :, None] * q, axis=1)
        if self.model.unit:
            d_p = d_p.at[:, -1].set(0.0)
        return d_p + 2.0 * d_squares[:, :1] * p


@dataclasses.dataclass(frozen=True)
class _DotView:
    candidate_scores: jax.Array

    def scores(self, name: str, dropout: Dropout) -> jax.Array:
        assert dropout is None, "a stochastic pass needs the rows"
        return self.candidate_scores

    def vectors(self, name: str, dropout: Dropout) -> Vectors:
        raise AssertionError("dot products have no rows")

    def pair_vectors(self, name: str, dropout: Dropout) -> jax.Array:
        raise AssertionError("dot products have no network")

    def lost(self, name: str) -> jax.Array:
        raise AssertionError("dot products have no network")

    def rows(self, name: str) -> Mapping[str, jax.Array]:
        raise AssertionError("dot products have no rows")

    def table(self, name: str) -> jax.Array:
        raise AssertionError("dot products have no rows")
