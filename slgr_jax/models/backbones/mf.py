"""Matrix factorisation: s_ui = p_u . q_i + b_i (Rendle et al. 2009, BPR-MF)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.models.backbones.base import (
    Dropout,
    FactorModel,
    Ids,
    ItemTableBackbone,
    Params,
    TableRows,
)
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.context import Context, Queries


class MatrixFactorization(ItemTableBackbone):
    """BPR-MF as a `DotBackbone`: tables `user` [U, D] and `item` [I, D], no dense parameters.

    The item's bias is the last entry of its row, which the user's last entry, counted as 1, meets:
    no table, no gather and no scatter of its own. With `item_bias` a row holds D - 1 factors.
    Dropout is on the user's vector.
    """

    reads: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        n_users: int,
        n_items: int,
        dim: int,
        item_bias: bool,
        init_std: float,
        dropout: float,
    ) -> None:
        self.tables: Mapping[str, TableSpec] = {
            "user": TableSpec(n_users, dim, init_std, scalars=int(item_bias), of_users=True),
            "item": TableSpec(n_items, dim, init_std, scalars=int(item_bias)),
        }
        self.dropout = dropout
        self.factor_model = FactorModel("user", "item", item_bias)
        self._item_bias = item_bias

    def init(self, key: jax.Array) -> Params:
        return {}

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        return {"user": queries.users}

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout = None,
    ) -> Float[Array, "N E"]:
        user = rows["user"]
        if dropout is not None:
            rate, key = dropout
            words = random_bits.words_of_lanes(key, user.shape)
            kept = words >= jnp.uint32(int(rate * 2**32))
            user = jnp.where(kept, user / (1.0 - rate), 0.0)
        if self._item_bias:
            user = user.at[..., -1].set(1.0)
        return user
