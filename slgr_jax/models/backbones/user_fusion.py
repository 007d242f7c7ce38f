"""Vectors of a user beside its history: what LANE (arXiv 2407.02833) and SLIM (WWW 2024) fuse.

A sequence backbone's states s of a history take up the user's frozen vectors z_1 .. z_S, mapped
(`vector_maps.UserVectors`), p = A(z). g = 1 where the user has a vector, 0 where not.

    attention (LANE)    a = s + LN(MultiHead(asks: s, answers: p_1 .. p_S))
                        F = a + LN(FeedForward(a)),  FeedForward: D -> D, ReLU, D -> D
                        f = s + g (F - s)
    concat (SLIM)       f = s + g (W [p ; s] + b)
    score               s_ui = <f, v_i>

so that a user without a vector is asked for by s, as without all this. LANE's preferences are S = 5
sentences of an LLM, SLIM's rationale is one text. SLIM writes W' [p ; s] + b, which is the same
with W' = W + [0 ; I]: here it begins near s. What an LLM says of a user is made of training
interactions alone (`built_from` of the product): it is the same at every place of the history, so
that in training a place knows something of what comes after it, and in evaluation it does not.

With `--adapter_gate` g = sigmoid(w log(1 + n) + b), n the user's training interactions.

Shape letters: N sequences, T states of each, S slots of a user's vectors, D width, E = D here, V
numbers of a user's row, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.attention import Drop, dense, mixed_by_heads
from slgr_jax.models.backbones.base import (
    USER,
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    SequenceBackbone,
    TableRows,
    Window,
)
from slgr_jax.models.backbones.vector_maps import UserVectors
from slgr_jax.sampling.context import Context, Queries

FUSION = "user_fusion"  # of the parameters, what is beside the backbone's


class PreferenceAttention(nn.Module):
    """F - s of the module's docstring. Queries, keys and values are matrices ~ N(0, 1 / D).

    Attributes:
      heads: H; each attends in width D / H.
    """

    heads: int

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "N T D"],
        preferences: Float[Array, "N S D"],
        real: Bool[Array, "N S"],
        rate: float,
    ) -> Float[Array, "N T D"]:
        """What each state takes from the `real` preferences of its sequence."""
        dim = states.shape[-1]

        def heads(name: str, x: Float[Array, "N A D"]) -> Float[Array, "N A H E"]:
            drawn = nn.initializers.normal(1.0 / math.sqrt(dim))
            mapped = nn.Dense(dim, use_bias=False, kernel_init=drawn, name=name)(x)
            return mapped.reshape(*x.shape[:2], self.heads, dim // self.heads)

        mixed = mixed_by_heads(
            heads("query", states),
            heads("key", preferences),
            heads("value", preferences),
            real[:, None, :],
            lambda weights: Drop()(weights, rate),
        )
        attended = states + nn.LayerNorm(name="attention_norm")(
            Drop()(nn.Dense(dim, name="attended")(mixed), rate)
        )
        inner = Drop()(jax.nn.relu(nn.Dense(dim, name="inner")(attended)), rate)
        forward = nn.LayerNorm(name="forward_norm")(
            Drop()(nn.Dense(dim, name="outer")(inner), rate)
        )
        return attended + forward - states


class Concat(nn.Module):
    """W [p ; s] + b of the one vector that a user has."""

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "N T D"],
        preferences: Float[Array, "N S D"],
        real: Bool[Array, "N S"],
        rate: float,
    ) -> Float[Array, "N T D"]:
        beside = jnp.broadcast_to(preferences, states.shape)
        return dense(states.shape[-1], "map")(jnp.concatenate([beside, states], axis=-1))


class UserFusion(ItemTableBackbone):
    """A sequence backbone whose states take up vectors of the user; see the module's docstring.

    Args:
      encoder: its adapters have one of users, a `UserVectors`.
      how: attention | concat.
      heads: of the attention.

    Raises:
      ConfigError: the heads do not divide the width of a state.
    """

    factor_model = None

    def __init__(self, encoder: Any, how: str, heads: int) -> None:
        of_users = adapters.of(encoder)[USER]
        assert isinstance(of_users, UserVectors), "with_vectors makes one"
        self._slots, self._dim = of_users.slots, of_users.width
        if how == "attention" and self._dim % heads:
            raise ConfigError(
                f"states of {self._dim} numbers (--dim) are not shared evenly by "
                f"--user_fusion_heads={heads}; change either"
            )
        self._encoder: SequenceBackbone = adapters.without_vectors(encoder)
        self.tables, self.reads, self.dropout = encoder.tables, encoder.reads, encoder.dropout
        self.feature_tables, self.adapters = encoder.feature_tables, encoder.adapters
        self.length = encoder.length
        self._fusion = PreferenceAttention(heads) if how == "attention" else Concat()

    def init(self, key: jax.Array) -> Params:
        states = jnp.zeros((1, 1, self._dim))
        kept = jnp.zeros((1, self._slots, self._dim))
        real = jnp.ones(kept.shape[:2], bool)
        fusion = self._fusion.init(jax.random.fold_in(key, 1), states, kept, real, 0.0)
        return {**self._encoder.init(key), FUSION: fusion["params"]}

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        return {**self._encoder.query_ids(context, queries), USER: queries.users}

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout,
    ) -> Float[Array, "N E"]:
        states = self._encoder.query_vectors(params, rows, context, queries, dropout=dropout)
        beside = None if dropout is None else (dropout[0], jax.random.fold_in(dropout[1], 2))
        return self.fused(params, states[:, None], rows[USER], dropout=beside)[:, 0]

    def item_vectors(self, params: Params, rows: TableRows) -> Float[Array, "... E"]:
        return self._encoder.item_vectors(params, rows)

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The encoder's, of histories alone: `fused` comes after it."""
        return self._encoder.window(params, events, real, key=key)

    def fused(
        self,
        params: Params,
        states: Float[Array, "N T E"],
        users: Float[Array, "N V"],
        *,
        dropout: Dropout,
    ) -> Float[Array, "N T E"]:
        """f of the module's docstring.

        Args:
          users: what `UserVectors` makes of the vectors of each sequence's user.
        """
        of_slots = users[:, :-1].reshape(users.shape[0], self._slots, self._dim + 1)
        rate, rngs = (0.0, {}) if dropout is None else (dropout[0], {"dropout": dropout[1]})
        added = self._fusion.apply(
            {"params": params[FUSION]},
            states,
            of_slots[..., :-1],
            of_slots[..., -1] > 0,
            rate,
            rngs=rngs,
        )
        assert isinstance(added, jax.Array)
        return states + users[:, -1, None, None] * added


def with_user_fusion(backbone: Any, how: str, heads: int) -> UserFusion:
    """A backbone whose adapters have one of users as one whose states take up what it makes.

    Raises:
      ConfigError: users are no histories to it.
    """
    if not isinstance(backbone, SequenceBackbone) or "user" in backbone.tables:
        raise ConfigError(
            f"--user_fusion={how} is for backbones to which a user is a history, and "
            f"{type(backbone).__name__} is none; use --backbone=sasrec, gru4rec or bert4rec, or "
            "drop it"
        )
    return UserFusion(backbone, how, heads)
