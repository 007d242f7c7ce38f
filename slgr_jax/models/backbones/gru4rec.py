"""GRU4Rec: a recurrent network over a user's last events (Hidasi et al. 2016, 1511.06939)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.models.backbones.attention import Drop
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


def _by_gate(initializer: Any) -> Any:
    """An initialiser of [n, 3 H] that draws each gate's [n, H] by itself."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        keys, shape_of_gate = jax.random.split(key, 3), (shape[0], shape[1] // 3)
        gates = [initializer(gate_key, shape_of_gate, dtype) for gate_key in keys]
        return jnp.concatenate(gates, axis=1)

    return init


class GruLayer(nn.Module):
    """A layer of gated recurrent units (Cho et al. 2014), gates as in cuDNN and PyTorch.

        r = sigmoid(x W_r + b_r + h U_r)       z = sigmoid(x W_z + b_z + h U_z)
        n = tanh(x W_n + b_n + r * (h U_n + c))       h' = (1 - z) * n + z * h

    W = [W_r, W_z, W_n] and b are of `input`, U = `recurrent`, c = `reset_bias`; PyTorch's second
    biases of r and z are redundant, b_r and b_z stand for both. h starts at 0. Where an event is
    not `real`, h stays.

    Attributes:
      width: H.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "L N D"], real: Bool[Array, "L N"]) -> Float[Array, "L N H"]:
        """h after each event; time is the first axis, which the scan takes slices of."""
        width = self.width
        by_gate = _by_gate(nn.initializers.glorot_uniform())
        from_x = nn.Dense(3 * width, kernel_init=by_gate, name="input")(x)
        by_gate = _by_gate(nn.initializers.orthogonal())
        recurrent = self.param("recurrent", by_gate, (width, 3 * width))
        reset_bias = self.param("reset_bias", nn.initializers.zeros, (width,))

        def step(
            h: Float[Array, "N H"], inputs: tuple[Float[Array, "N H3"], Bool[Array, "N"]]
        ) -> tuple[Float[Array, "N H"], Float[Array, "N H"]]:
            now, is_event = inputs
            before = h @ recurrent
            gates = jax.nn.sigmoid(now[:, : 2 * width] + before[:, : 2 * width])
            r, z = gates[:, :width], gates[:, width:]
            kept = before[:, 2 * width :] + reset_bias[None, :]
            n = jnp.tanh(now[:, 2 * width :] + r * kept)
            h = jnp.where(is_event[:, None], (1.0 - z) * n + z * h, h)
            return h, h

        start = jnp.zeros((x.shape[1], width), from_x.dtype)
        return jax.lax.scan(step, start, (from_x, real))[1]


class Recurrent(nn.Module):
    """Layers of GRU with dropout on the input of each, and a dense map of the last to width D.

    Attributes:
      layers: recurrent layers.
      width: H of each.
    """

    layers: int
    width: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        *,
        rate: float = 0.0,
        only_last: bool = False,
    ) -> Float[Array, "N T D"]:
        """The state after each of the L places (T = L), or after the last (T = 1)."""
        dim = x.shape[-1]
        states, real = jnp.swapaxes(x, 0, 1), real.T
        for layer in range(self.layers):
            states = GruLayer(self.width, name=f"layer_{layer}")(Drop(axis=1)(states, rate), real)
        states = states[-1:] if only_last else states
        output = nn.Dense(dim, kernel_init=nn.initializers.glorot_uniform(), name="output")
        return output(jnp.swapaxes(states, 0, 1))


class GRU4Rec(ItemTableBackbone):
    """s_ui = <A h_u + a, e_i>, h_u the GRU's state after the user's latest event.

    One table `item` [I, D] for both sides, as in RecBole; the paper feeds one-hot items and has
    output weights of its own. Inputs are e_i sqrt(D), so that they do not start small.

    A user without events has h = 0 and the state a, which all share.

    Args:
      n_items, dim: I, D.
      length: L, the events that are looked at.
      layers: of the recurrent network; the paper found one best.
      hidden: H, the width of its state.
      dropout: rate on the input of each layer.
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
        hidden: int,
        dropout: float,
        init_std: float,
    ) -> None:
        self.tables: Mapping[str, TableSpec] = {"item": TableSpec(n_items, dim, init_std)}
        self.length, self._dim = length, dim
        self.dropout = dropout
        self._network = Recurrent(layers, hidden)

    def init(self, key: jax.Array) -> Params:
        shape = (1, self.length, self._dim)
        return self._network.init(key, jnp.zeros(shape), jnp.ones(shape[:2], bool))["params"]

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
        return self._states(params, rows["item"], real, dropout, only_last=True)[:, 0]

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The state after each of the first L events predicts the event after it."""
        dropout = (self.dropout, key)
        states = self._states(params, events[:, :-1], real[:, :-1], dropout, only_last=False)
        place = jnp.arange(1, self.length + 1, dtype=jnp.int32)
        return Window(states, place, (real[:, :-1] & real[:, 1:]).astype(states.dtype))

    def _states(
        self,
        params: Params,
        events: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        dropout: Dropout,
        *,
        only_last: bool,
    ) -> Float[Array, "N T D"]:
        rate, rngs = (0.0, {}) if dropout is None else (dropout[0], {"dropout": dropout[1]})
        scaled = events * math.sqrt(events.shape[-1])
        states = self._network.apply(
            {"params": params}, scaled, real, rate=rate, only_last=only_last, rngs=rngs
        )
        assert isinstance(states, jax.Array)
        return states
