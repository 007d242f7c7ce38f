"""BERT4Rec: masked events from both sides of a sequence (Sun et al. 2019, 1904.06690)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.models.backbones.attention import Encoder, dense, gelu, last_place
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    TableRows,
    Window,
)
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.context import HISTORY, Context, Queries, recent

# Share of training sequences in which the last event alone is masked, as it is when scoring
# (Sun et al. 2019, section 3.6): the authors' code makes one beside ten of the cloze task.
ONLY_LAST = 1 / 11


def cloze_places(
    key: jax.Array, real: Bool[Array, "W L"], probability: float
) -> tuple[Int[Array, "W T"], Bool[Array, "W T"]]:
    """Which places of W sequences are masked: a share of the real events, without replacement.

    A sequence of n events has probability * n of them masked, rounded, at least one; or, with
    probability `ONLY_LAST`, its last place. A sequence without events has none. The share is
    exact where the paper's is by chance, so that few places, T = probability * L rounded, hold
    all: the loss scores no others.

    Returns:
      places: [W, T], T distinct places of each.
      chosen: [W, T] which of them are masked.
    """
    windows, length = real.shape
    most = max(1, int(probability * length + 0.5))
    words = random_bits.words_of_lanes(key, (windows, length + 1))
    uniform = (words >> 8).astype(jnp.float32) * 2.0**-24

    # The places with the largest numbers are masked; one in `ONLY_LAST` sequences puts its last
    # place above all, and padding stays below all.
    only_last = uniform[:, length] < ONLY_LAST
    is_last = jnp.arange(length, dtype=jnp.int32) == length - 1
    order = jnp.where(only_last[:, None] & is_last[None, :], 2.0, uniform[:, :length])
    places = jax.lax.top_k(jnp.where(real, order, -1.0), most)[1]

    events = jnp.sum(real, axis=1, dtype=jnp.int32)
    share = jnp.floor(probability * events.astype(jnp.float32) + 0.5).astype(jnp.int32)
    count = jnp.where(only_last, 1, jnp.clip(share, 1, most))
    count = jnp.minimum(count, events)
    return places, jnp.arange(most, dtype=jnp.int32)[None, :] < count[:, None]


class Cloze(nn.Module):
    """LN(GELU(W h + b)) of the encoder's state h, with [MASK] in the masked places.

    The output layer is the paper's (equation 7) with the LayerNorm of the authors' code and
    without a bias per item: scores are dot products with item rows.

    Attributes:
      layers, heads, hidden, init_std: of the encoder; init_std also of an entry of [MASK].
    """

    layers: int
    heads: int
    hidden: int
    init_std: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        masked: Bool[Array, "N L"],
        *,
        rate: float = 0.0,
        at: Int[Array, "N T"],
    ) -> Float[Array, "N T D"]:
        """The states of places `at`. What x holds in masked places is not read."""
        dim = x.shape[-1]
        mask = self.param("mask", nn.initializers.normal(self.init_std), (dim,))
        x = jnp.where(masked[:, :, None], mask[None, None, :], x)
        encoder = Encoder(
            self.layers, self.heads, self.hidden, False, self.init_std, name="encoder"
        )
        states = encoder(x, real | masked, rate=rate, at=at)
        return nn.LayerNorm(name="output_norm")(gelu(dense(dim, "output")(states)))


class BERT4Rec(ItemTableBackbone):
    """s_ui = <state of a [MASK] behind the user's latest events, e_i>, one table `item` [I, D].

    A sequence has L places. For a query they hold the user's last L - 1 events and [MASK]; in
    training, the last L events of a window, a share of them masked (`cloze_places`). The encoder
    reads e_i sqrt(D) and is pre-norm; `attention` says why.

    A user without events has the state of a [MASK] alone in the last place.

    Args:
      n_items, dim: I, D.
      length: L.
      layers, heads: of the transformer.
      hidden: width of its feed-forward.
      dropout: rate on inputs, attention weights and what each sublayer adds.
      init_std: entries of the table ~ N(0, init_std^2 / D).
      mask_probability: share of the events that is masked in training.
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
        mask_probability: float,
    ) -> None:
        self.tables: Mapping[str, TableSpec] = {"item": TableSpec(n_items, dim, init_std)}
        self.length, self._dim = length, dim
        self.dropout = dropout
        self._mask_probability = mask_probability
        self._network = Cloze(layers, heads, hidden, init_std)

    def init(self, key: jax.Array) -> Params:
        shape = (1, self.length, self._dim)
        real = jnp.ones(shape[:2], bool)
        variables = self._network.init(key, jnp.zeros(shape), real, real, at=last_place(real))
        return variables["params"]

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        """The last L - 1 events, [N, L - 1]: [MASK] takes the last place."""
        assert context.histories is not None
        return {"item": recent(context.histories, queries, self.length - 1)[0]}

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
        _, real = recent(context.histories, queries, self.length - 1)

        behind = ((0, 0), (0, 1))  # a place for [MASK] after the latest event
        events, real = jnp.pad(rows["item"], (*behind, (0, 0))), jnp.pad(real, behind)
        masked = jnp.zeros_like(real).at[:, -1].set(True)
        return self._states(params, events, real, masked, dropout, last_place(real))[:, 0]

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The states of masked places predict the events that the masks hide."""
        for_masks, for_dropout = jax.random.split(key)
        events, real = events[:, 1:], real[:, 1:]

        places, chosen = cloze_places(for_masks, real, self._mask_probability)
        every = jnp.arange(self.length, dtype=jnp.int32)
        hit = (places[:, :, None] == every[None, None, :]) & chosen[:, :, None]
        dropout = (self.dropout, for_dropout)
        states = self._states(params, events, real, jnp.any(hit, axis=1), dropout, places)
        return Window(states, places + 1, chosen.astype(states.dtype))

    def _states(
        self,
        params: Params,
        events: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        masked: Bool[Array, "N L"],
        dropout: Dropout,
        at: Int[Array, "N T"],
    ) -> Float[Array, "N T D"]:
        rate, rngs = (0.0, {}) if dropout is None else (dropout[0], {"dropout": dropout[1]})
        scaled = events * math.sqrt(events.shape[-1])
        states = self._network.apply(
            {"params": params}, scaled, real, masked, rate=rate, at=at, rngs=rngs
        )
        assert isinstance(states, jax.Array)
        return states
