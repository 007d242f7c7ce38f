"""Batches drawn on the device from (key, device arrays); no iterator, no host.

Shape letters: B triples, S steps drawn at once, I items.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.kernels import cpu
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Interactions, Targets
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.negatives import (
    Generators,
    SamplingPlan,
    below,
    count_not_above,
    draw_outside,
    item_at,
)

# Shifts tried by in-batch negatives before a triple is left without one (weight 0).
IN_BATCH_TRIES = 8


@struct.dataclass
class Batch:
    """Interactions that one step trains on; `draw` adds a leading axis S of steps to every field.

    Attributes:
      queries: [B] users, and as of which moment.
      items: [B, C] (positive, negatives).
      weights: [B] what each counts, 1 unless `Targets.weights` says otherwise; 0 where no valid
        negative exists. Those of a shard of users are its `Share`'s.
      labels: [B] of the first item where rows are labelled; None where it is a positive.
      shared: [N] negatives that all triples share; None where each has its own.
    """

    queries: Queries
    items: Int[Array, "*S B C"]
    weights: Float[Array, "*S B"]
    labels: Float[Array, "*S B"] | None
    shared: Int[Array, "*S N"] | None


def draw_triples(
    words_of: Generators, data: Interactions, plan: SamplingPlan
) -> tuple[Int[Array, "S B"], Int[Array, "S B 2"], Float[Array, "S B"]]:
    """B triples a step: a training pair uniformly with replacement, and a negative for its user.

    With `triples_per_user` = L a user is drawn by the number of their pairs, then L of the pairs,
    uniformly: each triple alone is distributed as with L = 1, and L triples touch one user row.
    """
    size, sampler = plan.triples, plan.sampler
    together = min(sampler.triples_per_user, size)
    words = random_bits.words(words_of.own, 2, size)
    drawn = plan.drawn if data.share is None else data.share.count
    if together == 1:
        pair = below(words[0], drawn)
        users, positive = data.users[pair], data.items[pair]
    else:
        first = random_bits.words(words_of.other, 1, -(-size // together))[0]
        if plan.native and sampler.negatives != "in_batch" and not sampler.allow_positive_negatives:
            users, items, weights = cpu.draw_triples(
                first,
                words[0],
                words[1],
                data.users,
                data.items,
                data.negatives,
                drawn=plan.drawn,
                together=together,
            )
            if data.cumulative is not None:
                items = items.at[..., 1].set(item_at(items[..., 1], weights, data.cumulative))
            if data.hard is not None:
                negative, weights = _some_hard(words_of, users, items[..., 1], weights, data, plan)
                items = items.at[..., 1].set(negative)
            return users, items, weights
        users = jnp.repeat(data.users[below(first, drawn)], together, axis=1)[:, :size]
        start = data.negatives.offsets[users]
        pair = start + below(words[0], data.negatives.offsets[users + 1] - start)
        positive = data.items[pair]
    negative, weights = _negatives(words[1], users, positive, data, plan)
    negative, weights = _some_hard(words_of, users, negative, weights, data, plan)
    return users, jnp.stack([positive, negative], axis=-1), weights


def _negatives(
    bits: UInt32[Array, "S B"],
    users: Int[Array, "S B"],
    positive: Int[Array, "S B"],
    data: Interactions,
    plan: SamplingPlan,
) -> tuple[Int[Array, "S B"], Float[Array, "S B"]]:
    """A negative for each lane; weight 0 where there is none."""
    sampler = plan.sampler
    if sampler.negatives == "in_batch":
        return _in_batch(bits, users, positive, data, plan)
    if sampler.allow_positive_negatives:
        return _anything(bits, data, plan), jnp.ones(users.shape, jnp.float32)
    negative, weights = draw_outside(
        bits, users, data.negatives, data.cumulative, native=plan.native
    )
    return negative.astype(jnp.int32), weights


def _some_hard(
    words_of: Generators,
    users: Int[Array, "S B"],
    negative: Int[Array, "S B"],
    weights: Float[Array, "S B"],
    data: Interactions,
    plan: SamplingPlan,
) -> tuple[Int[Array, "S B"], Float[Array, "S B"]]:
    """The negatives with a share of them, each with that probability, from the users' pools.

    A user without a pool keeps those that there are.
    """
    pools = data.hard
    if pools is None:
        return negative, weights
    coins, places = random_bits.words(words_of.third, 2, users.shape[1])
    begin = pools.offsets[users]
    count = pools.offsets[users + 1] - begin
    item = pools.items.at[begin + below(places, count)].get(mode="clip")
    coin = (coins >> 8).astype(jnp.float32) * np.float32(2.0**-24)  # exact, in [0, 1)
    take = (coin < plan.sampler.hard_share) & (count > 0)
    return jnp.where(take, item, negative), jnp.where(take, 1.0, weights)


def _anything(
    bits: UInt32[Array, "*N"], data: Interactions, plan: SamplingPlan
) -> Int[Array, "*N"]:
    """An item by mass, whoever has it."""
    if data.cumulative is None:
        return below(bits, plan.n_items)
    place = below(bits, data.cumulative[-1])
    return (jnp.searchsorted(data.cumulative, place, side="right") - 1).astype(jnp.int32)


def draw_targets(
    words_of: Generators, data: Interactions, targets: Targets, plan: SamplingPlan
) -> tuple[Queries, Int[Array, "S B C"], Float[Array, "S B"], Float[Array, "S B"] | None]:
    """B targets a step, uniformly with replacement, each with its negatives (and its label).

    A lane is left out where one of its negatives cannot be drawn.
    """
    size, count = plan.triples, plan.negatives
    drawn = plan.drawn if data.share is None else data.share.count
    chosen = below(random_bits.words(words_of.own, 1, size)[0], drawn)
    users, positive = targets.users[chosen], targets.items[chosen]
    as_of = None if targets.as_of is None else targets.as_of[chosen]
    labels = None if targets.labels is None else targets.labels[chosen]
    items, weights = positive[..., None], jnp.ones(users.shape, jnp.float32)
    if count:
        bits = random_bits.words(words_of.other, 1, size * count)[0]
        lanes = jnp.repeat(users, count, axis=1), jnp.repeat(positive, count, axis=1)
        negative, able = _negatives(bits, *lanes, data, plan)
        negative, able = _some_hard(words_of, lanes[0], negative, able, data, plan)
        shape = (*users.shape, count)
        items = jnp.concatenate([items, negative.reshape(shape)], axis=-1)
        weights = jnp.min(able.reshape(shape), axis=-1)
    if targets.weights is not None:
        weights = weights * targets.weights[chosen]
    asked = None if targets.interactions is None else targets.interactions[chosen]
    return Queries(users, as_of, asked), items, weights, labels


def shared_log_expected(
    items: Int[Array, "*N"], data: Interactions, plan: SamplingPlan
) -> Float[Array, "*N"]:
    """log of how often an item is expected among the `plan.shared` negatives of a step."""
    if data.cumulative is None:
        return jnp.full(items.shape, np.log(plan.shared / plan.n_items), jnp.float32)
    mass = (data.cumulative[items + 1] - data.cumulative[items]).astype(jnp.float32)
    share = jnp.maximum(mass, 1.0) / data.cumulative[-1].astype(jnp.float32)
    return jnp.log(plan.shared * share)


def _in_batch(
    bits: UInt32[Array, "S B"],
    users: Int[Array, "S B"],
    positive: Int[Array, "S B"],
    data: Interactions,
    plan: SamplingPlan,
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
        rank = count_not_above(data.items, low, high, candidate, data.negatives.search_steps)
        last = data.items.at[low + rank - 1].get(mode="clip")
        owned = (rank > 0) & (last == candidate)
        if plan.sampler.allow_positive_negatives:
            owned = jnp.zeros_like(owned)
        take = (weights == 0) & ~owned
        negative = jnp.where(take, candidate, negative)
        weights = jnp.where(take, 1.0, weights)
    return negative, weights


def draw(words_of: Generators, interactions: Interactions, plan: SamplingPlan) -> Batch:
    """The batches of S steps, each a function of its own generators."""
    labels, shared = None, None
    if interactions.targets is None:
        users, items, weights = draw_triples(words_of, interactions, plan)
        queries = Queries(users)
    else:
        queries, items, weights, labels = draw_targets(
            words_of, interactions, interactions.targets, plan
        )
    if interactions.share is not None:
        weights = weights * interactions.share.weight
    if plan.shared:
        bits = random_bits.words(words_of.third, 1, plan.shared)[0]
        shared = _anything(bits, interactions, plan)
    return Batch(queries, items, weights, labels, shared)
