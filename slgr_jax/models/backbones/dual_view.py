"""Two views of a history, ids and texts, through one encoder: half of LLM-ESR (NeurIPS 2024).

    v_i = [e_i ; A(z_i)]                                  an item: its row, its vector mapped
    c   = CrossAttention(asks: A(z), answers: e)          of the events' rows, place by place
    t   = CrossAttention(asks: e, answers: A(z))
    u   = [Encoder(c) ; Encoder(t)]                       the same encoder twice
    s_ui = <u, v_i>                                       both views' dot products, added

The encoder is the whole of a sequence backbone, its positions and padding with it: that backbone
reads c in place of rows, then t. A place asks the events up to its own, as the encoder's do: both
views of a later event would tell what is to be predicted. Its authors' program asks all, and learns
at the last place alone. Nothing of c is e itself: there is no residual, as theirs has none.

`vector_maps.SecondView` makes v of rows and vectors, here and in serving.

Shape letters: N sequences, L places, D width of a view, H heads.
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
from slgr_jax.models.backbones.attention import mixed_by_heads
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    SequenceBackbone,
    TableRows,
    Window,
)
from slgr_jax.models.backbones.gru4rec import GRU4Rec
from slgr_jax.models.backbones.sasrec import SASRec
from slgr_jax.sampling.context import Context, Queries, recent

CROSS = "cross_attention"  # of the parameters, what is beside the encoder's


class CrossAttention(nn.Module):
    """W_o softmax((W_q LN(x)) (W_k LN(y))' / sqrt(D / H)) W_v y + b, H heads side by side.

    Norms are the house's (`attention`): rows begin short, and logits of short rows tell no event
    from another. Matrices ~ N(0, 1 / D): what comes out is as long as y, not added to it.

    Attributes:
      heads: H.
    """

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "N L D"], y: Float[Array, "N L D"], real: Bool[Array, "N L"]
    ) -> Float[Array, "N L D"]:
        """What each place of x takes from the `real` places of y up to its own."""
        count, length, dim = x.shape

        def dense(name: str, *, bias: bool = False) -> nn.Dense:
            drawn = nn.initializers.normal(1.0 / math.sqrt(dim))
            return nn.Dense(dim, use_bias=bias, kernel_init=drawn, name=name)

        def heads(projected: Float[Array, "N L D"]) -> Float[Array, "N L H E"]:
            return projected.reshape(count, length, self.heads, dim // self.heads)

        queries = heads(dense("query")(nn.LayerNorm(name="query_norm")(x)))
        # What is added to all keys changes no weight: a bias there would learn rounding.
        keys = heads(dense("key")(nn.LayerNorm(use_bias=False, name="key_norm")(y)))
        values = heads(dense("value")(y))
        places = jnp.arange(length, dtype=jnp.int32)
        visible = real[:, None, :] & (places[None, :] <= places[:, None])[None]
        return dense("output", bias=True)(mixed_by_heads(queries, keys, values, visible))


class Views(nn.Module):
    """c and t of the module's docstring; each direction has an attention of its own."""

    heads: int

    @nn.compact
    def __call__(
        self, rows: Float[Array, "N L D2"], real: Bool[Array, "N L"]
    ) -> tuple[Float[Array, "N L D"], Float[Array, "N L D"]]:
        own, of_text = jnp.split(rows, 2, axis=-1)
        return (
            CrossAttention(self.heads, name="of_ids")(of_text, own, real),
            CrossAttention(self.heads, name="of_texts")(own, of_text, real),
        )


class DualView(ItemTableBackbone):
    """A sequence backbone that reads both views; see the module's docstring.

    Args:
      encoder: whose rows of items a `SecondView` widens.
      heads: of each cross-attention.

    Raises:
      ConfigError: the heads do not divide the width of a view.
    """

    factor_model = None

    def __init__(self, encoder: Any, heads: int) -> None:
        self._encoder: SequenceBackbone = adapters.without_vectors(encoder)
        self._dim = encoder.tables["item"].width
        if self._dim % heads:
            raise ConfigError(
                f"--dim={self._dim} is not a multiple of --dual_view_heads={heads}, which share it "
                "evenly; change either"
            )
        self.tables, self.reads, self.dropout = encoder.tables, encoder.reads, encoder.dropout
        self.feature_tables, self.adapters = encoder.feature_tables, encoder.adapters
        self.length = encoder.length
        self._views = Views(heads)

    def init(self, key: jax.Array) -> Params:
        rows = jnp.zeros((1, self.length, 2 * self._dim))
        cross = self._views.init(jax.random.fold_in(key, 1), rows, jnp.ones(rows.shape[:2], bool))
        return {**self._encoder.init(key), CROSS: cross["params"]}

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        return self._encoder.query_ids(context, queries)

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
        states = [
            self._encoder.query_vectors(
                params, {"item": view}, context, queries, dropout=_of_view(dropout, number)
            )
            for number, view in enumerate(self._of_events(params, rows["item"], real))
        ]
        return jnp.concatenate(states, axis=-1)

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The encoder's window of each view: both predict the same places."""
        ids, texts = (
            self._encoder.window(params, view, real, key=jax.random.fold_in(key, number))
            for number, view in enumerate(self._of_events(params, events, real))
        )
        return ids._replace(states=jnp.concatenate([ids.states, texts.states], axis=-1))

    def _of_events(
        self, params: Params, rows: Float[Array, "N L D2"], real: Bool[Array, "N L"]
    ) -> tuple[Float[Array, "N L D"], Float[Array, "N L D"]]:
        views = self._views.apply({"params": params[CROSS]}, rows, real)
        assert isinstance(views, tuple)
        return views


def _of_view(dropout: Dropout, number: int) -> Dropout:
    """Noise of a view's own."""
    return None if dropout is None else (dropout[0], jax.random.fold_in(dropout[1], number))


def with_two_views(backbone: Any, heads: int) -> DualView:
    """A backbone whose items have a `SecondView` as one that reads histories by both.

    Raises:
      ConfigError: it is none of those whose places look back alone.
    """
    if not isinstance(backbone, SASRec | GRU4Rec):
        raise ConfigError(
            f"--dual_view reads histories from their first event on, and "
            f"{type(backbone).__name__} does not; use --backbone=sasrec or gru4rec, or drop it"
        )
    return DualView(backbone, heads)
