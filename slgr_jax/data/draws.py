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
from slgr_jax.data.batches import (
    Answers,
    Chosen,
    Excluded,
    HeldOut,
    Interactions,
    Known,
    KnownLists,
    KnownPairs,
    Resident,
    Targets,
    TeacherLists,
    TeacherPairs,
)
from slgr_jax.data.context import Queries
from slgr_jax.kernels import cpu
from slgr_jax.random_words import words as random_words

# Shifts tried by in-batch negatives before a triple is left without one (weight 0).
IN_BATCH_TRIES = 8


@struct.dataclass
class Batch:
    """What one step trains on; `draw` adds a leading axis S of steps to every field.

    A weight of 0 marks a lane that could not be drawn.

    Attributes:
      queries: [B] users and moments; items: [B, C] (positive, negatives); weights: [B].
      labels: [B] of the first item where rows are labelled; None where it is a positive.
      shared: [N] negatives that all lanes share; None where each has its own.
      pref_queries: [G]; pref_items: [G, 2] (preferred, other); pref_margins: [G] teacher's score
        difference; pref_weights: [G].
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
    pref_weights: Float[Array, "G"]
    pref_targets: Float[Array, "G 2"] | None = None
    known: Answers | None = None
    held_out: HeldOut | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of a draw: they are compiled in."""

    n_items: int
    drawn: int  # interactions (or windows) that triples are drawn from
    triples: int
    preferences: int
    sampler: SamplerConfig
    guidance: GuidanceConfig
    search_steps: int  # halvings that cover the longest excluded row
    native: bool = False  # whether the CPU kernels search
    certain: bool = False  # whether every lane has its negatives: weights are 1
    negatives: int = 1  # of each lane: C - 1
    shared: int = 0  # negatives that the lanes of a step share
    known: int = 0  # answers that the gate is calibrated on
    held_out: bool = False  # whether each preference comes with held-out items of its user
    margin_scale: float = 1.0  # a typical teacher margin, in which gates read them


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
    return _item_at(place, weight, cumulative), weight


def _item_at(
    place: Int[Array, "*B"], weight: Float[Array, "*B"], cumulative: Int[Array, "I1"]
) -> Int[Array, "*B"]:
    """The item whose mass is at a place; 0 where none was drawn."""
    item = jnp.searchsorted(cumulative, place, side="right") - 1
    return jnp.where(weight > 0, item, 0).astype(jnp.int32)


def _other(key: jax.Array) -> jax.Array:
    """A key for more words of the same draw."""
    return jax.random.fold_in(key, 1)


def _third(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 2)


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
        pair = below(words[0], plan.drawn)
        users, positive = data.users[pair], data.items[pair]
    else:
        first = random_words(jax.vmap(_other)(keys), 1, -(-size // together))[0]
        if plan.native and sampler.negatives != "in_batch" and not sampler.allow_positive_negatives:
            cut = data.negatives
            users, items, weights = cpu.draw_triples(
                *(first, words[0], words[1], data.users, data.items),
                *(cut.offsets, cut.keys, cut.shifts, cut.free),
                drawn=plan.drawn,
                together=together,
            )
            if data.cumulative is not None:
                items = items.at[..., 1].set(_item_at(items[..., 1], weights, data.cumulative))
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
    keys: jax.Array, data: Interactions, targets: Targets, plan: Plan
) -> tuple[Queries, Int[Array, "S B C"], Float[Array, "S B"], Float[Array, "S B"] | None]:
    """B targets a step, uniformly with replacement, each with its negatives (and its label).

    A lane is left out where one of its negatives cannot be drawn.
    """
    size, count = plan.triples, plan.negatives
    chosen = below(random_words(keys, 1, size)[0], plan.drawn)
    users, positive = targets.users[chosen], targets.items[chosen]
    until = None if targets.until is None else targets.until[chosen]
    labels = None if targets.labels is None else targets.labels[chosen]
    items, weights = positive[..., None], jnp.ones(users.shape, jnp.float32)
    if count:
        bits = random_words(jax.vmap(_other)(keys), 1, size * count)[0]
        lanes = jnp.repeat(users, count, axis=1), jnp.repeat(positive, count, axis=1)
        negative, able = _negatives(bits, *lanes, data, plan)
        shape = (*users.shape, count)
        items = jnp.concatenate([items, negative.reshape(shape)], axis=-1)
        weights = jnp.min(able.reshape(shape), axis=-1)
    return Queries(users, until), items, weights, labels


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


def draw_scored(
    keys: jax.Array, teacher: TeacherLists, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Float[Array, "S G 2"]]:
    """G times two scored items of one user: as `draw_preferences`, and the scores in [0, 1].

    The first is a listed item, uniformly; the second another of the list or, for teachers whose
    unlisted items rank below, one outside list and positives, of score 0.
    """
    words = random_words(keys, 3, plan.preferences)
    chosen = below(words[0], teacher.users.shape[0])
    entry, users = teacher.entries[chosen], teacher.users[chosen]
    start = teacher.offsets[users]
    partner = start + below(words[1], teacher.offsets[users + 1] - start)
    items = teacher.items[jnp.stack([entry, partner], axis=-1)]
    scores = teacher.scores[jnp.stack([entry, partner], axis=-1)]
    weights = jnp.ones(users.shape, jnp.float32)
    if teacher.unlisted is not None:
        outside, weights = draw_outside(words[2], users, teacher.unlisted, None, plan)
        items = items.at[..., 1].set(outside.astype(jnp.int32))
        scores = scores.at[..., 1].set(teacher.floor)
    size = max(teacher.ceiling - teacher.floor, 1e-12)
    targets = (scores - teacher.floor) / size
    return users, items, jnp.zeros_like(weights), weights, targets


def draw_answers(
    keys: jax.Array,
    known: Known,
    teacher: TeacherLists | TeacherPairs,
    plan: Plan,
) -> Answers:
    """K known answers a step, [S, K], distributed as preferences are."""
    assert known.answers is not None
    bits = random_words(keys, 4, plan.known)
    place = below(bits[0], known.count)
    if isinstance(known.answers, KnownPairs):
        chosen = known.answers.pairs[place]
        until = known.answers.until[place]
        return Answers(
            Queries(teacher.users[chosen], until),
            teacher.items[chosen],
            teacher.margins[chosen],  # type: ignore[union-attr]
            known.answers.right[place].astype(jnp.float32),
            jnp.ones(chosen.shape, jnp.float32),
        )
    assert isinstance(teacher, TeacherLists)
    return _answers_from_lists(bits, place, known.chosen, known.answers, teacher, plan)


def _answers_from_lists(
    bits: jax.Array,
    place: Int[Array, "S K"],
    chosen: Chosen,
    answers: KnownLists,
    teacher: TeacherLists,
    plan: Plan,
) -> Answers:
    at, entry = answers.chosen[place], answers.entry[place]
    users, positive = chosen.users[at], chosen.items[at]
    listed = entry >= 0
    start = answers.other_offsets[users]
    count = answers.other_offsets[users + 1] - start
    other = answers.others.at[start + below(bits[1], count)].get(mode="clip")
    own, others = teacher.scores[jnp.maximum(entry, 0)], teacher.scores[other]
    gap, least = own - others, plan.guidance.min_gap
    right = gap > 0
    rival = teacher.items[other]
    items = jnp.stack(
        [jnp.where(right, positive, rival), jnp.where(right, rival, positive)], axis=-1
    )
    margins = jnp.abs(gap)
    able = listed & (count > 0) & (margins > 0) & (margins >= least)
    weights = able.astype(jnp.float32)
    if answers.outside is not None:
        free, found = draw_outside(bits[2], users, answers.outside, None, plan)
        share = np.uint32(min(2**32 - 1, round(plan.guidance.unlisted_share * 2**32)))
        use = bits[3] <= share if share else jnp.zeros(users.shape, bool)
        over = jnp.stack(
            [jnp.where(listed, positive, rival), jnp.where(listed, free, positive)], axis=-1
        )
        room = jnp.maximum(answers.outside.free[users], 1).astype(jnp.float32)
        mass = jnp.where(listed, found, count.astype(jnp.float32) / room)
        items = jnp.where(use[..., None], over, items)
        margins = jnp.where(use, jnp.where(listed, own, others) - teacher.floor, margins)
        right = jnp.where(use, listed, right)
        weights = jnp.where(use, mass, weights)
    return Answers(
        Queries(users, chosen.until[at]), items, margins, right.astype(jnp.float32), weights
    )


def draw_held_out(keys: jax.Array, users: Int[Array, "S G"], chosen: Chosen, plan: Plan) -> HeldOut:
    """For each user one of their chosen items, uniformly, and an item they did not choose."""
    bits = random_words(keys, 2, users.shape[1])
    start = chosen.offsets[users]
    count = chosen.offsets[users + 1] - start
    positive = chosen.items.at[start + below(bits[0], count)].get(mode="clip")
    negative, able = draw_outside(bits[1], users, chosen.negatives, None, plan)
    weights = jnp.where(count > 0, able, 0.0)
    return HeldOut(jnp.stack([positive, negative.astype(jnp.int32)], axis=-1), weights)


def draw(keys: jax.Array, resident: Resident, plan: Plan) -> Batch:
    """The batches of S steps, each a function of its own key."""
    pairs = jax.vmap(jax.random.split)(keys)
    data, labels, shared = resident.interactions, None, None
    if data.targets is None:
        users, items, weights = draw_triples(pairs[:, 0], data, plan)
        queries = Queries(users)
    else:
        queries, items, weights, labels = draw_targets(pairs[:, 0], data, data.targets, plan)
    if plan.shared:
        bits = random_words(jax.vmap(_third)(pairs[:, 0]), 1, plan.shared)[0]
        shared = _anything(bits, data, plan)
    nothing = jnp.zeros((weights.shape[0], 0), jnp.float32)
    nobody = nothing.astype(jnp.int32)
    extra: tuple[Any, ...] = (nobody, nobody[..., None].repeat(2, -1), nothing, nothing)
    targets = known = held_out = None
    if plan.preferences and resident.teacher is not None:
        if plan.guidance.guidance == "pointwise":
            assert isinstance(resident.teacher, TeacherLists)
            *scored, targets = draw_scored(pairs[:, 1], resident.teacher, plan)
            extra = tuple(scored)
        else:
            extra = draw_preferences(pairs[:, 1], resident.teacher, plan)
        keys = jax.vmap(_third)(pairs[:, 1])
        if plan.known and resident.known is not None:
            known = draw_answers(keys, resident.known, resident.teacher, plan)
        if plan.held_out and resident.known is not None:
            held_out = draw_held_out(keys, extra[0], resident.known.chosen, plan)
    histories = resident.context.histories
    # A preference is about the user as known from training: all of the training history.
    moments = None if histories is None else histories.trained[extra[0]]
    if known is not None and histories is None:
        known = known.replace(queries=Queries(known.queries.users))  # type: ignore[attr-defined]
    return Batch(
        *(queries, items, weights, labels, shared),
        *(Queries(extra[0], moments), *extra[1:], targets, known, held_out),
    )
