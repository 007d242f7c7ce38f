"""How a step reads rows as dot products: the CPU kernels compute s = p . q_c and the squared norms
and, from ds alone, the gradients of the rows, so that neither is ever written out.

Shape letters: N queries, C candidates of a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slgr_jax.kernels import cpu
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones.base import FactorModel
from slgr_jax.models.row_access import Candidates, Dropout, Leaves, Reads, Tables, View
from slgr_jax.sampling.context import Context


@dataclasses.dataclass(frozen=True)
class DotAccess:
    """Leaves: `scores` and `squares` = (|p|^2, |q_0|^2 + |q_1|^2) of one group of candidates, [N,
    2].

    And `totals`, the sum of the squares over queries, [2]: no loss reads them.
    """

    model: FactorModel
    width: int
    optimizer: embedding_table.RowOptimizer

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
class _DotView:
    candidate_scores: jax.Array

    def scores(self, name: str, dropout: Dropout) -> jax.Array:
        assert dropout is None, "a stochastic pass needs the rows"
        return self.candidate_scores

    def rows(self, name: str) -> Mapping[str, jax.Array]:
        raise AssertionError("dot products have no rows")

    def table(self, name: str) -> jax.Array:
        raise AssertionError("dot products have no rows")
