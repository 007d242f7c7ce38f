"""Batches drawn on the device from (key, resident arrays); no iterator, no host.

Shape letters: B triples, G preferences, S steps drawn at once, I items.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.kernels import cpu
from slgr_jax.sampling import preferences, random_bits
from slgr_jax.sampling.arrays import (
    Answers,
    DeviceArrays,
    HeldOut,
    Interactions,
    PairFacts,
    Targets,
    TeacherLists,
)
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.negatives import (
    Generators,
    Plan,
    below,
    count_not_above,
    draw_outside,
    generators,
    item_at,
)

# Shifts tried by in-batch negatives before a triple is left without one (weight 0).
IN_BATCH_TRIES = 8


@struct.dataclass
class Batch:
    """What one step trains on; `draw` adds a leading axis S of steps to every field.

    A weight of 0 marks a lane that could not be drawn; of preferences there is none such.

    Attributes:
      queries: [B] users and moments; items: [B, C] (positive, negatives); weights: [B].
      labels: [B] of the first item where rows are labelled; None where it is a positive.
      shared: [N] negatives that all lanes share; None where each has its own.
      pref_queries: [G]; pref_items: [G, 2] (preferred, other); pref_margins: [G] teacher's score
        difference.
      pref_facts: of each preference; None without preferences.
      pref_targets: [G, 2] the teacher's scores, scaled to [0, 1]; None unless they are learned.
      known: answers that a gate is calibrated on; None where no gate is.
      held_out: of each preference's user, for a gate that looks ahead; None where none does.
    """

    queries: Queries
    items: Int[Array, "B C"]
    weights: Float[Array, "B"]
    labels: Float[Array, "B"] | None
    shared: Int[Array, "N"] | None
    pref_queries: Queries
    pref_items: Int[Array, "G 2"]
    pref_margins: Float[Array, "G"]
    pref_facts: PairFacts | None = None
    pref_targets: Float[Array, "G 2"] | None = None
    known: Answers | None = None
    held_out: HeldOut | None = None


def draw_triples(
    words_of: Generators, data: Interactions, plan: Plan
) -> tuple[Int[Array, "S B"], Int[Array, "S B 2"], Float[Array, "S B"]]:
    """B triples a step: a training pair uniformly with replacement, and a negative for its user.

    With `triples_per_user` = L a user is drawn by the number of their pairs, then L of the pairs,
    uniformly: each triple alone is distributed as with L = 1, and L triples touch one user row.
    """
    size, sampler = plan.triples, plan.sampler
    together = min(sampler.triples_per_user, size)
    words = random_bits.words(words_of.own, 2, size)
    if together == 1:
        pair = below(words[0], plan.drawn)
        users, positive = data.users[pair], data.items[pair]
    else:
        first = random_bits.words(words_of.other, 1, -(-size // together))[0]
        if plan.native and sampler.negatives != "in_batch" and not sampler.allow_positive_negatives:
            users, items, weights = cpu.draw_triples(
                *(first, words[0], words[1], data.users, data.items, data.negatives),
                drawn=plan.drawn,
                together=together,
            )
            if data.cumulative is not None:
                items = items.at[..., 1].set(item_at(items[..., 1], weights, data.cumulative))
            return users, items, weights
        users = jnp.repeat(data.users[below(first, plan.drawn)], together, axis=1)[:, :size]
        start = data.negatives.offsets[users]
        pair = start + below(words[0], data.negatives.offsets[users + 1] - start)
        positive = data.items[pair]
    negative, weights = _negatives(words[1], users, positive, data, plan)
    return users, jnp.stack([positive, negative], axis=-1), weights


def _negatives(
    bits: UInt32[Array, "S B"],
    users: Int[Array, "S B"],
    positive: Int[Array, "S B"],
    data: Interactions,
    plan: Plan,
) -> tuple[Int[Array, "S B"], Float[Array, "S B"]]:
    """A negative for each lane; weight 0 where there is none."""
    sampler = plan.sampler
    if sampler.negatives == "in_batch":
        return _in_batch(bits, users, positive, data, plan)
    if sampler.allow_positive_negatives:
        return _anything(bits, data, plan), jnp.ones(users.shape, jnp.float32)
    negative, weights = draw_outside(bits, users, data.negatives, data.cumulative, plan)
    return negative.astype(jnp.int32), weights


def _anything(bits: UInt32[Array, "*N"], data: Interactions, plan: Plan) -> Int[Array, "*N"]:
    """An item by mass, whoever has it."""
    if data.cumulative is None:
        return below(bits, plan.n_items)
    place = below(bits, data.cumulative[-1])
    return (jnp.searchsorted(data.cumulative, place, side="right") - 1).astype(jnp.int32)


def draw_targets(
    words_of: Generators, data: Interactions, targets: Targets, plan: Plan
) -> tuple[Queries, Int[Array, "S B C"], Float[Array, "S B"], Float[Array, "S B"] | None]:
    """B targets a step, uniformly with replacement, each with its negatives (and its label).

    A lane is left out where one of its negatives cannot be drawn.
    """
    size, count = plan.triples, plan.negatives
    chosen = below(random_bits.words(words_of.own, 1, size)[0], plan.drawn)
    users, positive = targets.users[chosen], targets.items[chosen]
    as_of = None if targets.as_of is None else targets.as_of[chosen]
    labels = None if targets.labels is None else targets.labels[chosen]
    items, weights = positive[..., None], jnp.ones(users.shape, jnp.float32)
    if count:
        bits = random_bits.words(words_of.other, 1, size * count)[0]
        lanes = jnp.repeat(users, count, axis=1), jnp.repeat(positive, count, axis=1)
        negative, able = _negatives(bits, *lanes, data, plan)
        shape = (*users.shape, count)
        items = jnp.concatenate([items, negative.reshape(shape)], axis=-1)
        weights = jnp.min(able.reshape(shape), axis=-1)
    return Queries(users, as_of), items, weights, labels


def shared_log_expected(
    items: Int[Array, "*N"], data: Interactions, plan: Plan
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


def draw(keys: jax.Array, resident: DeviceArrays, plan: Plan) -> Batch:
    """The batches of S steps, each a function of its own key."""
    of_triples, of_preferences = generators(keys)
    data, labels, shared = resident.interactions, None, None
    if data.targets is None:
        users, items, weights = draw_triples(of_triples, data, plan)
        queries = Queries(users)
    else:
        queries, items, weights, labels = draw_targets(of_triples, data, data.targets, plan)
    if plan.shared:
        bits = random_bits.words(of_triples.third, 1, plan.shared)[0]
        shared = _anything(bits, data, plan)
    nothing = jnp.zeros((weights.shape[0], 0), jnp.float32)
    nobody = nothing.astype(jnp.int32)
    extra: tuple[Any, ...] = (nobody, nobody[..., None].repeat(2, -1), nothing)
    found = targets = known = held_out = None
    if plan.preferences and resident.teacher is not None:
        if plan.guidance.guidance == "pointwise":
            assert isinstance(resident.teacher, TeacherLists)
            *scored, targets = preferences.draw_scored(of_preferences.own, resident.teacher, plan)
            extra = tuple(scored)
        else:
            extra = preferences.draw_preferences(of_preferences, resident.teacher, plan)
        found = preferences.pair_facts(data.facts, extra[0], extra[1], native=plan.native)
        if plan.known and resident.known is not None:
            known = preferences.draw_answers(
                of_preferences.third, resident.known, resident.teacher, plan
            )
            of_known = (data.facts, known.queries.users, known.items)
            known = known.replace(facts=preferences.pair_facts(*of_known, native=plan.native))  # type: ignore[attr-defined]
        if plan.held_out and resident.known is not None:
            held_out = preferences.draw_held_out(
                of_preferences.third, extra[0], resident.known.chosen, plan
            )
    histories = resident.context.histories
    # A preference is about the user as known from training: all of the training history.
    moments = None if histories is None else histories.trained[extra[0]]
    if known is not None and histories is None:
        known = known.replace(queries=Queries(known.queries.users))  # type: ignore[attr-defined]
    return Batch(
        *(queries, items, weights, labels, shared),
        *(Queries(extra[0], moments), *extra[1:], found, targets, known, held_out),
    )
