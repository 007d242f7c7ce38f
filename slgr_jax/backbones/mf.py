"""Matrix factorisation: s_ui = p_u . q_i + b_i (Rendle et al. 2009, BPR-MF)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slgr_jax.backbones.base import FactorModel
from slgr_jax.tables import Rows, TableSpec


class DotProduct(nn.Module):
    """Scores from gathered rows; the item bias is the last entry of the item's row.

    Keeping the bias in the row (the user's last entry counts as 1) costs no table, no gather
    and no scatter of its own. With `item_bias` a row of width D holds D - 1 factors.
    """

    item_bias: bool

    @nn.compact
    def __call__(
        self, user: Float[Array, "B D"], item: Float[Array, "B C D"], *, dropout: float = 0.0
    ) -> Float[Array, "B C"]:
        product = with_unit(user, self.item_bias)[:, None, :] * item
        if dropout > 0.0:
            product = nn.Dropout(dropout, deterministic=False)(product)
        return jnp.sum(product, axis=-1)


def with_unit(user: Float[Array, "*B D"], item_bias: bool) -> Float[Array, "*B D"]:
    """The user vector with its last entry set to 1 where that entry meets the item's bias."""
    if not item_bias:
        return user
    return user.at[..., -1].set(1.0)


class MatrixFactorization:
    """BPR-MF as a `Backbone`: tables `user` [U, D] and `item` [I, D], no dense parameters."""

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
            "user": TableSpec(n_users, dim, init_std),
            "item": TableSpec(n_items, dim, init_std),
        }
        self.dropout = dropout
        self.factor_model = FactorModel("user", "item", item_bias)
        self._item_bias = item_bias
        self._module = DotProduct(item_bias)

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        return {}

    def ids(
        self, users: Int[Array, "B"], items: Int[Array, "B C"]
    ) -> Mapping[str, Int[Array, "..."]]:
        return {"user": users, "item": items}

    def score(
        self,
        params: Mapping[str, Any],
        rows: Rows,
        users: Int[Array, "B"],
        items: Int[Array, "B C"],
        *,
        dropout: tuple[float, jax.Array] | None = None,
    ) -> Float[Array, "B C"]:
        rate, rngs = (0.0, {}) if dropout is None else (dropout[0], {"dropout": dropout[1]})
        scores = self._module.apply(
            {"params": params}, rows["user"], rows["item"], dropout=rate, rngs=rngs
        )
        assert isinstance(scores, jax.Array)
        return scores

    def factors(
        self, params: Mapping[str, Any], values: Mapping[str, Float[Array, "R D"]]
    ) -> tuple[Float[Array, "U E"], Float[Array, "I E"]]:
        return with_unit(values["user"], self._item_bias), values["item"]
