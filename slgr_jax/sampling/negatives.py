"""What every draw on the device is made of: a plan, random words, an item outside a user's set.

Items are drawn by inverting a distribution with the user's positives cut out, so no draw is ever
rejected and no positive is ever returned. For a user with sorted positives p_0 < p_1 < ... and
uniform negatives, the r-th non-positive item is r + #{k: p_k - k <= r}: one random word and one
binary search over the user's row. Popularity-weighted negatives are the same with item masses in
place of counts.

Shape letters: B lanes, S steps drawn at once, U users, I items, n entries of the excluded sets.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.config import SamplerConfig
from slgr_jax.kernels import cpu
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Excluded


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The static numbers of drawing interactions: they are compiled in.

    Attributes:
      drawn: interactions (or windows) that triples are drawn from.
      triples: B.
      native: whether the CPU kernels draw.
      every_negative: whether every triple has its negatives, so that all weights are 1.
      negatives: of each triple, C - 1.
      shared: negatives that the triples of a step share.
    """

    n_items: int
    drawn: int
    triples: int
    sampler: SamplerConfig
    native: bool = False
    every_negative: bool = False
    negatives: int = 1
    shared: int = 0


def below(bits: UInt32[Array, "..."], bound: Int[Array, "..."] | int) -> Int[Array, "..."]:
    """Integers in [0, bound) from random words: floor(bits * bound / 2^32), exact in 32 bits.

    No value's probability is off by more than 2^-32. A bound of 0 gives 0.
    """
    n = jnp.asarray(bound).astype(jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    n_high, n_low = n >> 16, n & 0xFFFF
    middle = high * n_low + ((low * n_low) >> 16)
    cross = low * n_high + (middle & 0xFFFF)
    return (high * n_high + (middle >> 16) + (cross >> 16)).astype(jnp.int32)


def count_not_above(
    keys: Int[Array, "n"],
    low: Int[Array, "*B"],
    high: Int[Array, "*B"],
    value: Int[Array, "*B"],
    steps: int,
) -> Int[Array, "*B"]:
    """#{k in [low, high): keys[k] <= value} for rows in which `keys` ascends."""
    begin = low
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) >> 1
        not_above = keys.at[middle].get(mode="clip") <= value
        low = jnp.where(open_ & not_above, middle + 1, low)
        high = jnp.where(open_ & ~not_above, middle, high)
    return low - begin


def draw_outside(
    bits: UInt32[Array, "*B"],
    users: Int[Array, "*B"],
    cut: Excluded,
    cumulative: Int[Array, "I1"] | None,
    *,
    native: bool,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
    """An item outside each user's excluded set, by mass; weight 0 where nothing is left."""
    if native:
        place, weight = cpu.draw_outside(bits.reshape(-1), users.reshape(-1), cut)
        place, weight = place.reshape(users.shape), weight.reshape(users.shape)
    else:
        free = cut.free[users]
        mass = below(bits, free)
        low, high = cut.offsets[users], cut.offsets[users + 1]
        passed = count_not_above(cut.keys, low, high, mass, cut.search_steps)
        shift = passed
        if cut.shifts is not None:
            shift = cut.shifts.at[low + passed - 1].get(mode="clip")
        place = jnp.where(free > 0, mass + jnp.where(passed > 0, shift, 0), 0)
        weight = (free > 0).astype(jnp.float32)
    if cumulative is None:
        return place, weight
    return item_at(place, weight, cumulative), weight


def item_at(
    place: Int[Array, "*B"], weight: Float[Array, "*B"], cumulative: Int[Array, "I1"]
) -> Int[Array, "*B"]:
    """The item whose mass is at a place; 0 where none was drawn."""
    item = jnp.searchsorted(cumulative, place, side="right") - 1
    return jnp.where(weight > 0, item, 0).astype(jnp.int32)


class Generators(NamedTuple):
    """Generators of the words of S steps, for what one draw needs words for."""

    own: UInt32[Array, "S 2"]
    other: UInt32[Array, "S 2"]
    third: UInt32[Array, "S 2"]


def generators(keys: jax.Array) -> tuple[Generators, Generators]:
    """Those of interactions and of a guidance, for S keys.

    All at once: Threefry is a loop of small operations, whatever the number of its keys.
    """

    def of_draw(key: jax.Array) -> jax.Array:
        more = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(1, 3))
        return random_bits.generators(jnp.concatenate([key[None], more]))

    pairs = jax.vmap(lambda key: jax.vmap(of_draw)(jax.random.split(key)))(keys)  # [S, 2, 3, 2]

    def generators_of(draw: int) -> Generators:
        return Generators(pairs[:, draw, 0], pairs[:, draw, 1], pairs[:, draw, 2])

    return generators_of(0), generators_of(1)
