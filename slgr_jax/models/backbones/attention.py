"""The transformer over a history that SASRec and BERT4Rec share.

What was chosen where papers and code differ:

  LayerNorm before each sublayer (pre-norm) and once at the end. SASRec's form; it trains without
    a warm-up of the learning rate (Xiong et al. 2020), which BERT4Rec's post-norm asks for.
  GELU (exact), in both: BERT4Rec's form, and RecBole's for SASRec, whose paper has ReLU.
  Matrices ~ N(0, 0.02^2), biases 0, as BERT and RecBole have them: sublayers add little to the
    items at first.
  Positions ~ N(0, init_std^2) an entry, as large as item rows times sqrt(D), which SASRec's code
    feeds. They are counted from the latest event: it always has the last one.

Shape letters: N sequences, L places, T places of them that are asked for, D width, H heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.errors import ConfigError
from slgr_jax.sampling import random_bits

# Finite, so that a softmax over nothing but padding is a number; exp of it is 0 beside any logit.
MASKED = -1e9


class Drop(nn.Module):
    """Dropout on words of `random_words`: x / (1 - rate) with probability 1 - rate, else 0.

    Flax's own draws them with Threefry, which on CPU costs more than the layer it is put on.

    Attributes:
      axis: which axis of x is that of a batch's lanes.
    """

    axis: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "*N"], rate: float) -> Float[Array, "*N"]:
        if rate == 0.0:
            return x
        words = random_bits.words_of_lanes(self.make_rng("dropout"), x.shape, self.axis)
        return jnp.where(words >= jnp.uint32(rate * 2**32), x / (1.0 - rate), 0.0)


def dense(width: int, name: str) -> nn.Dense:
    """x W + b, drawn as BERT draws it."""
    return nn.Dense(width, kernel_init=nn.initializers.normal(0.02), name=name)


def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x times the standard normal distribution function at x (Hendrycks & Gimpel 2016)."""
    # Through erf, as BERT has it: jax.nn.gelu's erfc keeps digits that nothing here needs.
    return 0.5 * x * (1.0 + jax.lax.erf(x / math.sqrt(2.0)))


def last_place(real: Bool[Array, "N L"]) -> Int[Array, "N 1"]:
    """The last place of every sequence, for `Encoder`."""
    return jnp.full((real.shape[0], 1), real.shape[1] - 1, jnp.int32)


def mixed_by_heads(
    queries: Float[Array, "N T H E"],
    keys: Float[Array, "N L H E"],
    values: Float[Array, "N L H E"],
    visible: Bool[Array, "N #T L"],
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> Float[Array, "N T D"]:
    """softmax(q k' / sqrt(E)) v of each head, side by side; finite where nothing is visible.

    Args:
      visible: which keys a query sees.
      drop: dropout of the weights.
    """
    logits = jnp.einsum("nthe,nlhe->nhtl", queries, keys) / math.sqrt(queries.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED), axis=-1)
    mixed = jnp.einsum("nhtl,nlhe->nthe", drop(weights), values)
    return mixed.reshape(*mixed.shape[:2], -1)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + FeedForward(LN(x)) (Vaswani et al. 2017, pre-norm).

    Attributes:
      heads: H; each attends in width D / H.
      hidden: width inside the feed-forward.
      causal: a place attends to itself and earlier ones only.
    """

    heads: int
    hidden: int
    causal: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        *,
        rate: float,
        at: Int[Array, "N T"] | None = None,
    ) -> Float[Array, "N T D"]:
        """The new states of places `at` (None: all), each from the places that are `real`."""
        count, length, dim = x.shape

        # Queries, keys and values of all heads in one matrix product.
        projected = dense(3 * dim, "qkv")(nn.LayerNorm(name="attention_norm")(x))
        projected = projected.reshape(count, length, 3, self.heads, dim // self.heads)
        queries, keys, values = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
        places = jnp.arange(length, dtype=jnp.int32)[None, :]
        visible, position = real[:, None, :], places
        if at is not None:  # only these places ask; all of them are asked
            sequence = jnp.arange(count, dtype=jnp.int32)[:, None]
            x, queries, position = x[sequence, at], queries[sequence, at], at
        if self.causal:
            visible = visible & (places[:, None, :] <= position[:, :, None])

        drop = functools.partial(Drop(), rate=rate)
        mixed = mixed_by_heads(queries, keys, values, visible, drop)
        x = x + Drop()(dense(dim, "attended")(mixed), rate)

        inner = gelu(dense(self.hidden, "inner")(nn.LayerNorm(name="forward_norm")(x)))
        return x + Drop()(dense(dim, "outer")(inner), rate)


class Encoder(nn.Module):
    """LN(Blocks(Dropout(x + positions))); places that are not `real` influence no other.

    The state of a place that is not real is the final norm's bias: what all states share.

    Attributes:
      layers: blocks.
      heads, hidden, causal: of each block.
      init_std: of an entry of the positions.
    """

    layers: int
    heads: int
    hidden: int
    causal: bool
    init_std: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N L D"],
        real: Bool[Array, "N L"],
        *,
        rate: float = 0.0,
        at: Int[Array, "N T"] | None = None,
    ) -> Float[Array, "N T D"]:
        """The states of places `at` (None: all L).

        Raises:
          ConfigError: the heads do not divide the width.
        """
        length, dim = x.shape[1:]
        if dim % self.heads:
            raise ConfigError(
                f"--dim={dim} is not a multiple of --heads={self.heads}, which share it evenly; "
                "change either"
            )

        positions = self.param("positions", nn.initializers.normal(self.init_std), (length, dim))
        x = Drop()(x + positions[None], rate)

        for layer in range(self.layers):
            block = Block(self.heads, self.hidden, self.causal, name=f"block_{layer}")
            # The last block is worked out only where somebody looks.
            x = block(x, real, rate=rate, at=at if layer == self.layers - 1 else None)

        if at is not None:
            real = jnp.take_along_axis(real, at, axis=1)
        # Padding is no key of any place, but as a query it has looked at something.
        return nn.LayerNorm(name="norm")(jnp.where(real[:, :, None], x, 0.0))
