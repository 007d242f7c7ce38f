"""SASRec: causal self-attention over a user's last events (Kang & McAuley 2018, 1808.09781)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.models.backbones.attention import Encoder, last_place
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    TableRows,
    Window,
)
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling.context import HISTORY, Context, Queries, recent


class SASRec(ItemTableBackbone):
    """s_ui = <state of the user's latest event, e_i>, one table `item` [I, D] for both sides.

    The encoder reads e_i sqrt(D), as the authors' code does, and `attention` says what else was
    chosen. Training with a softmax over the catalogue in place of the paper's one negative is
    what makes it strong (Klenitskiy & Vasilev 2023).

    A user without events has the state that all share, the bias of the last LayerNorm.

    Args:
      n_items, dim: I, D.
      length: L, the events that are looked at.
      layers, heads: of the transformer.
      hidden: width of its feed-forward.
      dropout: rate on inputs, attention weights and what each sublayer adds.
      init_std: entries of the table ~ N(0, init_std^2 / D).
    """

    reads = frozenset({HISTORY})
    factor_model = None

    def __init__(
        self,
        *,
        n_items: int,
        dim: int,
        length: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        init_std: float,
    ) -> None:
        self.tables: Mapping[str, TableSpec] = {"item": TableSpec(n_items, dim, init_std)}
        self.length, self._dim = length, dim
        self.dropout = dropout
        self._encoder = Encoder(layers, heads, hidden, causal=True, init_std=init_std)

    def init(self, key: jax.Array) -> Params:
        shape = (1, self.length, self._dim)
        return self._encoder.init(key, jnp.zeros(shape), jnp.ones(shape[:2], bool))["params"]

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        assert context.histories is not None
        return {"item": recent(context.histories, queries, self.length)[0]}

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout,
    ) -> Float[Array, "N E"]:
        assert context.histories is not None
        _, real = recent(context.histories, queries, self.length)
        return self._states(params, rows["item"], real, dropout, last_place(real))[:, 0]

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The state of each of the first L events predicts the event after it."""
        dropout = (self.dropout, key)
        states = self._states(params, events[:, :-1], real[:, :-1], dropout, None)
        place = jnp.arange(1, self.length + 1, dtype=jnp.int32)
        return Window(states, place, (real[:, :-1] & real[:, 1:]).astype(states.dtype))

    def _states(
        self,
        params: Params,
        events: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        dropout: Dropout,
        at: Int[Array, "N T"] | None,
    ) -> Float[Array, "N T D"]:
        rate, rngs = (0.0, {}) if dropout is None else (dropout[0], {"dropout": dropout[1]})
        scaled = events * math.sqrt(events.shape[-1])
        states = self._encoder.apply({"params": params}, scaled, real, rate=rate, at=at, rngs=rngs)
        assert isinstance(states, jax.Array)
        return states
