"""Batches drawn on the device from (key, resident arrays); no iterator, no host.

Negatives are drawn by inverting the distribution with the user's positives cut out, so no
draw is ever rejected and no positive is ever returned. For a user with sorted positives
p_0 < p_1 < ... and uniform negatives, the r-th non-positive item is r + #{k: p_k - k <= r}:
one random word and one binary search over the user's row. Popularity-weighted negatives are
the same with item masses in place of counts.

Shape letters: B triples, G preferences, S steps drawn at once, U users, I items, n training pairs,
E entries of the teacher's lists.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.config import GuidanceConfig, SamplerConfig
from slgr_jax.data.batches import Excluded, Interactions, Resident, TeacherLists, TeacherPairs
from slgr_jax.kernels import cpu
from slgr_jax.random_words import words as random_words

# Shifts tried by in-batch negatives before a triple is left without one (weight 0).
IN_BATCH_TRIES = 8


@struct.dataclass
class Batch:
    """What one step trains on; `draw` adds a leading axis S of steps to every field.

    A weight of 0 marks a lane that could not be drawn.

    Attributes:
      users: [B]; items: [B, 2] (positive, negative); weights: [B].
      pref_users: [G]; pref_items: [G, 2] (preferred, other); pref_margins: [G] teacher's score
        difference; pref_weights: [G].
    """

    users: Int[Array, "B"]
    items: Int[Array, "B 2"]
    weights: Float[Array, "B"]
    pref_users: Int[Array, "G"]
    pref_items: Int[Array, "G 2"]
    pref_margins: Float[Array, "G"]
    pref_weights: Float[Array, "G"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of a draw: they are compiled in."""

    n_items: int
    n_pairs: int
    triples: int
    preferences: int
    sampler: SamplerConfig
    guidance: GuidanceConfig
    search_steps: int  # halvings that cover the longest excluded row
    native: bool = False  # whether the CPU kernels search


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
    low: Int[Array, "B"],
    high: Int[Array, "B"],
    value: Int[Array, "B"],
    steps: int,
) -> Int[Array, "B"]:
    """#{k in [low, high): keys[k] <= value} for rows in which `keys` ascends."""
    begin = low
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) >> 1
        found = keys.at[middle].get(mode="clip") <= value
        low = jnp.where(open_ & found, middle + 1, low)
        high = jnp.where(open_ & ~found, middle, high)
    return low - begin


def draw_outside(
    bits: UInt32[Array, "*B"],
    users: Int[Array, "*B"],
    cut: Excluded,
    cumulative: Int[Array, "I1"] | None,
    plan: Plan,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
    """An item outside each user's excluded set, by mass; weight 0 where nothing is left."""
    if plan.native:
        lanes = (bits.reshape(-1), users.reshape(-1))
        place, weight = cpu.draw_outside(*lanes, cut.offsets, cut.keys, cut.shifts, cut.free)
        place, weight = place.reshape(users.shape), weight.reshape(users.shape)
    else:
        free = cut.free[users]
        mass = below(bits, free)
        low, high = cut.offsets[users], cut.offsets[users + 1]
        passed = count_not_above(cut.keys, low, high, mass, plan.search_steps)
        shift = passed
        if cut.shifts is not None:
            shift = cut.shifts.at[low + passed - 1].get(mode="clip")
        place = jnp.where(free > 0, mass + jnp.where(passed > 0, shift, 0), 0)
        weight = (free > 0).astype(jnp.float32)
    if cumulative is None:
        return place, weight
    item = jnp.searchsorted(cumulative, place, side="right") - 1
    return jnp.where(weight > 0, item, 0).astype(jnp.int32), weight


def _other(key: jax.Array) -> jax.Array:
    """A key for more words of the same draw."""
    return jax.random.fold_in(key, 1)


def draw_triples(
    keys: jax.Array, data: Interactions, plan: Plan
) -> tuple[Int[Array, "S B"], Int[Array, "S B 2"], Float[Array, "S B"]]:
    """B triples a step: a training pair uniformly with replacement, and a negative for its user.

    With `triples_per_user` = L a user is drawn by the number of their pairs, then L of the pairs,
    uniformly: each triple alone is distributed as with L = 1, and L triples touch one user row.
    """
    size, sampler = plan.triples, plan.sampler
    together = min(sampler.triples_per_user, size)
    words = random_words(keys, 2, size)
    if together == 1:
        pair = below(words[0], plan.n_pairs)
        users, positive = data.users[pair], data.items[pair]
    else:
        first = below(
            random_words(jax.vmap(_other)(keys), 1, -(-size // together))[0], plan.n_pairs
        )
        users = jnp.repeat(data.users[first], together, axis=1)[:, :size]
        start = data.negatives.offsets[users]
        pair = start + below(words[0], data.negatives.offsets[users + 1] - start)
        positive = data.items[pair]
    if sampler.negatives == "in_batch":
        negative, weights = _in_batch(words[1], users, positive, data, plan)
    elif sampler.allow_positive_negatives:
        if data.cumulative is None:
            negative = below(words[1], plan.n_items)
        else:
            place = below(words[1], data.cumulative[-1])
            negative = jnp.searchsorted(data.cumulative, place, side="right") - 1
        weights = jnp.ones(users.shape, jnp.float32)
    else:
        negative, weights = draw_outside(words[1], users, data.negatives, data.cumulative, plan)
    return users, jnp.stack([positive, negative.astype(jnp.int32)], axis=-1), weights


def _in_batch(
    bits: UInt32[Array, "S B"],
    users: Int[Array, "S B"],
    positive: Int[Array, "S B"],
    data: Interactions,
    plan: Plan,
) -> tuple[Int[Array, "S B"], Float[Array, "S B"]]:
    """Another triple's positive: the first of a few random lanes that the user does not have."""
    size = plan.triples
    lane = jnp.arange(size, dtype=jnp.int32)[None, :]
    negative, weights = positive, jnp.zeros(positive.shape, jnp.float32)
    if size == 1:
        return negative, weights
    first = below(bits, size - 1)
    low, high = data.negatives.offsets[users], data.negatives.offsets[users + 1]
    for attempt in range(min(IN_BATCH_TRIES, size - 1)):
        shift = 1 + (first + attempt) % (size - 1)
        candidate = jnp.take_along_axis(positive, (lane + shift) % size, axis=1)
        # Items ascend within a user's row, so membership is a search for the candidate.
        rank = count_not_above(data.items, low, high, candidate, plan.search_steps)
        last = data.items.at[low + rank - 1].get(mode="clip")
        owned = (rank > 0) & (last == candidate)
        if plan.sampler.allow_positive_negatives:
            owned = jnp.zeros_like(owned)
        take = (weights == 0) & ~owned
        negative = jnp.where(take, candidate, negative)
        weights = jnp.where(take, 1.0, weights)
    return negative, weights


def draw_preferences(
    keys: jax.Array, teacher: TeacherLists | TeacherPairs, plan: Plan
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"], Float[Array, "S G"]]:
    """G preferences a step (users, (preferred, other), margins, weights).

    From lists: an entry uniformly, then a partner of the same user uniformly among those it
    makes a preference with, or (teachers whose unlisted items rank below) an item outside list
    and positives. With pair_selection=largest_gap, `pair_candidates` times as many are drawn
    and those with the largest teacher margin are kept (S-LLMR section 3.2).
    With `triples_per_user` = L, L entries that follow each other are drawn together.
    """
    keep = plan.preferences
    greedy = plan.guidance.pair_selection == "largest_gap"
    size = keep * plan.guidance.pair_candidates if greedy else keep
    stated = teacher.users.shape[0]  # pairs, or entries that can start one
    together = min(plan.sampler.triples_per_user, size)
    starts = random_words(jax.vmap(_other)(keys), 1, -(-size // together))[0]
    first = below(starts, stated)
    run = first[:, :, None] + jnp.arange(together, dtype=jnp.int32)[None, None, :]
    chosen = (run % stated).reshape(first.shape[0], -1)[:, :size]
    if isinstance(teacher, TeacherPairs):
        users, items, margins = (
            teacher.users[chosen],
            teacher.items[chosen],
            teacher.margins[chosen],
        )
        weights = jnp.ones(users.shape, jnp.float32)
    else:
        users, items, margins, weights = _from_lists(keys, chosen, teacher, plan)
    if greedy:
        _, best = jax.lax.top_k(jnp.where(weights > 0, margins, -jnp.inf), keep)
        users, margins, weights = (
            jnp.take_along_axis(x, best, axis=1) for x in (users, margins, weights)
        )
        items = jnp.take_along_axis(items, best[:, :, None], axis=1)
    return users, items, margins, weights


def _from_lists(
    keys: jax.Array, chosen: Int[Array, "S G"], teacher: TeacherLists, plan: Plan
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"], Float[Array, "S G"]]:
    words = random_words(keys, 1 if teacher.unlisted is None else 2, chosen.shape[1])
    entry, users = teacher.entries[chosen], teacher.users[chosen]
    low, high = teacher.tie_low[chosen], teacher.tie_high[chosen]
    start = teacher.offsets[users]
    partners = teacher.offsets[users + 1] - start - (high - low)
    place = below(words[0], partners)
    beats = place < low  # scores ascend: what an entry beats comes before it
    partner = start + place + jnp.where(beats, 0, high - low)
    partner = jnp.where(partners > 0, partner, entry)
    preferred, other = jnp.where(beats, entry, partner), jnp.where(beats, partner, entry)
    items = teacher.items[jnp.stack([preferred, other], axis=-1)]
    margins = teacher.scores[preferred] - teacher.scores[other]
    weights = (partners > 0).astype(jnp.float32)
    if teacher.unlisted is not None:
        outside, able = draw_outside(words[0], users, teacher.unlisted, None, plan)
        share = np.uint32(min(2**32 - 1, round(plan.guidance.unlisted_share * 2**32)))
        use = (words[1] <= share) | (partners <= 0) if share else partners <= 0
        listed = jnp.stack([teacher.items[entry], outside], axis=-1)
        items = jnp.where(use[..., None], listed, items)
        margins = jnp.where(use, teacher.scores[entry] - teacher.floor, margins)
        weights = jnp.where(use, able, weights)
    return users, items, margins, weights


def draw(keys: jax.Array, resident: Resident, plan: Plan) -> Batch:
    """The batches of S steps, each a function of its own key."""
    pairs = jax.vmap(jax.random.split)(keys)
    users, items, weights = draw_triples(pairs[:, 0], resident.interactions, plan)
    steps = users.shape[0]
    extra: tuple[Any, ...] = (
        jnp.zeros((steps, 0), jnp.int32),
        jnp.zeros((steps, 0, 2), jnp.int32),
        jnp.zeros((steps, 0), jnp.float32),
        jnp.zeros((steps, 0), jnp.float32),
    )
    if plan.preferences and resident.teacher is not None:
        extra = draw_preferences(pairs[:, 1], resident.teacher, plan)
    return Batch(users, items, weights, *extra)
