"""The last scores that a run gave some pairs (u, i), and how often their losses were dropped.

A pair has a ring of its last m scores s (logits, as the loss read them), whose variance says what
the recommender makes of it (LLMHD, arXiv 2409.10343, which takes one score an epoch):

    v = 1/m sum_k (s_k - mean)^2    large: learned, but hard; small: noise that is never learned

A step reads and writes the rings of its batch alone, and sorts their places: of a pair that is
drawn twice the first lane counts, on any number of devices.

Shape letters: P pairs, m scores of a ring, B triples or rows, C items of one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.mesh import Layout


@struct.dataclass
class Rings:
    """What is remembered of P pairs.

    Attributes:
      scores: the last m of each, in the order of a ring: the k-th is at k modulo m.
      times: how many there were.
      dropped: how many of these were of losses that were dropped.
    """

    scores: Float[Array, "*N P m"]
    times: Int[Array, "*N P"]
    dropped: Int[Array, "*N P"]


@struct.dataclass
class NewScores:
    """What a batch says of pairs.

    Attributes:
      pairs: which; P: none that is remembered.
      scores: of each.
      dropped: whether the loss that it is part of was dropped.
    """

    pairs: Int[Array, "B C"]
    scores: Float[Array, "B C"]
    dropped: Bool[Array, "B"]


def empty(pairs: int, size: int) -> Rings:
    """Rings before the first step."""
    none = jnp.zeros((pairs,), jnp.int32)
    return Rings(jnp.zeros((pairs, size), jnp.float32), none, none)


def variances(
    rings: Rings, pairs: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """v of each pair, and whether its ring is full (not so: v is of less than m scores)."""
    size = rings.scores.shape[1]
    scores = rings.scores.at[pairs].get(mode="fill", fill_value=0.0)
    times = rings.times.at[pairs].get(mode="fill", fill_value=0)
    return jnp.var(scores, axis=-1), times >= size


def remember(rings: Rings, new: NewScores, layout: Layout) -> Rings:
    """The rings with the scores of a batch, each device's part of it, in place of the oldest."""
    every = jax.tree.map(layout.gather_over_all, new)
    count, size = rings.scores.shape
    width = every.pairs.shape[1]
    pairs, scores = every.pairs.ravel(), every.scores.ravel()
    dropped = jnp.repeat(every.dropped, width)
    order = jnp.argsort(pairs)  # stable: of equals the first lane stays first
    of_sorted = pairs[order]
    again = jnp.concatenate([jnp.zeros(1, bool), of_sorted[1:] == of_sorted[:-1]])
    rows = jnp.where(again, count, of_sorted)
    slots = rings.times.at[rows].get(mode="fill", fill_value=0) % size
    return Rings(
        rings.scores.at[rows, slots].set(scores[order], mode="drop"),
        rings.times.at[rows].add(1, mode="drop"),
        rings.dropped.at[rows].add(dropped[order].astype(jnp.int32), mode="drop"),
    )
