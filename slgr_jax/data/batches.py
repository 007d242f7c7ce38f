"""Batches drawn on the device from (key, resident arrays); no iterator, no host.

Negatives are drawn by inverting the distribution with the user's positives cut out, so no
draw is ever rejected and no positive is ever returned. For a user with sorted positives
p_0 < p_1 < ... and uniform negatives, the r-th non-positive item is r + #{k: p_k - k <= r}:
one random word and one binary search over the user's row. Popularity-weighted negatives are
the same with item masses in place of counts.

Shape letters: B triples, G preferences, U users, I items, n training pairs, E entries of the
teacher's lists.
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
from slgr_jax.data.dataset import Csr, Dataset, beaten
from slgr_jax.errors import InputError

# Shifts tried by in-batch negatives before a triple is left without one (weight 0).
IN_BATCH_TRIES = 8


@struct.dataclass
class Batch:
    """What one step trains on. A weight of 0 marks a lane that could not be drawn.

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


@struct.dataclass
class Excluded:
    """Per user, a sorted set of items cut out of a distribution over items.

    Attributes:
      offsets: [U + 1] bounds of each user's row.
      keys: [n] mass of the items below the row's k-th item that are not cut out.
      shifts: [n] mass of the row's items up to and with the k-th.
      free: [U] mass that is left.
    """

    offsets: Int[Array, "U1"]
    keys: Int[Array, "n"]
    shifts: Int[Array, "n"]
    free: Int[Array, "U"]


@struct.dataclass
class Facts:
    """What is known of each user and item from training data alone.

    Attributes:
      history, popularity: training interactions of each user, of each item.
      cold, tail: 1 where the user is cold, where the item is tail.
    """

    history: Int[Array, "U"]
    popularity: Int[Array, "I"]
    cold: Float[Array, "U"]
    tail: Float[Array, "I"]


@struct.dataclass
class Interactions:
    """Training pairs, sorted by user and item, with what drawing triples from them needs."""

    users: Int[Array, "n"]
    items: Int[Array, "n"]
    negatives: Excluded
    cumulative: Int[Array, "I1"] | None  # mass of items below i; None when every mass is 1
    facts: Facts


@struct.dataclass
class TeacherLists:
    """Scored lists: a preference is two entries of one user with scores that differ enough.

    Entries of a user are sorted by score. `tie_low[e]:tie_high[e]` (positions in the user's row)
    are the entries too close to e to make a preference with it.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "E"]
    scores: Float[Array, "E"]
    entries: Int[Array, "m"]  # entries that can start a preference
    users: Int[Array, "m"]  # user of each of them
    tie_low: Int[Array, "m"]
    tie_high: Int[Array, "m"]
    unlisted: Excluded | None  # list and positives cut out; None: unlisted means unknown
    floor: float = struct.field(pytree_node=False)  # score that an unlisted item counts with


@struct.dataclass
class TeacherPairs:
    """Preferences as the teacher stated them, one by one."""

    users: Int[Array, "E"]
    items: Int[Array, "E 2"]
    margins: Float[Array, "E"]


@struct.dataclass
class Resident:
    """All device-resident data of a run."""

    interactions: Interactions
    teacher: TeacherLists | TeacherPairs | None


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


# --- host: build the resident arrays -----------------------------------------------------------


def host_array(x: np.ndarray, dtype: type) -> Any:
    """A contiguous host array, standing in for the device array that `device_put` makes of it."""
    return np.ascontiguousarray(x, dtype)


def _host32(x: np.ndarray) -> Any:
    return host_array(x, np.int32)


def item_masses(popularity: np.ndarray, sampler: SamplerConfig) -> np.ndarray | None:
    """[I] int64 masses of the negative distribution; None when all are 1 (uniform, in-batch).

    Popularity masses are counts for power 1, otherwise count^power scaled to integers whose sum
    stays under 2^30; an item never seen in training has mass 0.
    """
    if sampler.negatives != "popularity":
        return None
    if sampler.popularity_power == 1.0 and int(popularity.sum()) < 2**30:
        return popularity.astype(np.int64)
    weights = np.where(popularity > 0, popularity.astype(np.float64), np.nan)
    weights = np.nan_to_num(weights**sampler.popularity_power, nan=0.0)
    scaled = weights * ((2**30 - popularity.size) / weights.sum())
    return np.where(weights > 0, np.maximum(1, scaled.astype(np.int64)), 0)


def excluded(sets: Csr, masses: np.ndarray | None, n_items: int) -> Excluded:
    """Cut the sorted `sets` (user -> items) out of the distribution with `masses` over items."""
    rows = np.repeat(np.arange(sets.offsets.size - 1), np.diff(sets.offsets))
    mass = np.ones(n_items, np.int64) if masses is None else masses
    below = np.concatenate([[0], np.cumsum(mass)])
    own = np.concatenate([[0], np.cumsum(mass[sets.indices])])
    start = own[sets.offsets[:-1]][rows]
    shifts = own[1:] - start  # with the k-th
    keys = below[sets.indices] - (own[:-1] - start)  # without it
    free = below[-1] - (own[sets.offsets[1:]] - own[sets.offsets[:-1]])
    return Excluded(_host32(sets.offsets), _host32(keys), _host32(shifts), _host32(free))


def interactions(
    dataset: Dataset, sampler: SamplerConfig, cold: np.ndarray, tail: np.ndarray
) -> Interactions:
    """The training pairs of `dataset`, ready to be drawn from (host arrays).

    Raises:
      InputError: nothing to train on, or counts past what int32 arrays address.
    """
    pairs = dataset.positives(("train",))
    if pairs.indices.size == 0:
        raise InputError(f"{dataset.path} has no training interactions; check the split")
    if pairs.indices.size >= 2**31 or dataset.n_items >= 2**30:
        raise InputError(
            f"{pairs.indices.size} training pairs and {dataset.n_items} items: device-resident "
            f"arrays hold fewer than {2**31} and {2**30}"
        )
    masses = item_masses(dataset.popularity, sampler)
    return Interactions(
        users=_host32(np.repeat(np.arange(dataset.n_users), pairs.counts)),
        items=_host32(pairs.indices),
        negatives=excluded(pairs, masses, dataset.n_items),
        cumulative=None if masses is None else _host32(np.concatenate([[0], np.cumsum(masses)])),
        facts=Facts(
            history=_host32(dataset.history),
            popularity=_host32(dataset.popularity),
            cold=host_array(cold, np.float32),
            tail=host_array(tail, np.float32),
        ),
    )


def teacher_lists(
    offsets: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    guidance: GuidanceConfig,
    *,
    unlisted_below: bool,
    positives: Csr,
    n_items: int,
) -> TeacherLists:
    """Per-user score lists, ready to be drawn from (host arrays).

    Args:
      offsets: [U + 1]; items, scores: [E], each user's entries sorted by score.
      unlisted_below: an item outside a user's list ranks below it.
      positives: training pairs, never the unlisted side of a preference.
    """
    counts = np.diff(offsets)
    users = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
    # Scores ascend within a row: what an entry beats comes first, what beats it comes last.
    low = beaten(offsets, scores, guidance.min_gap)
    beaten_by = beaten(offsets[-1] - offsets[::-1], -scores[::-1], guidance.min_gap)[::-1]
    high = counts[users] - beaten_by
    partners = counts[users] - (high - low)
    use_unlisted = unlisted_below and guidance.unlisted_share > 0
    able = np.ones(items.size, bool) if use_unlisted else partners > 0
    cut = None
    if use_unlisted:
        pair_users = np.repeat(np.arange(counts.size), positives.counts)
        both = Csr.from_pairs(
            np.concatenate([users, pair_users]),
            np.concatenate([items, positives.indices]),
            counts.size,
        )
        cut = excluded(both, None, n_items)
        able &= cut.free[users] > 0
    chosen = np.flatnonzero(able)
    return TeacherLists(
        offsets=_host32(offsets),
        items=_host32(items),
        scores=host_array(scores, np.float32),
        entries=_host32(chosen),
        users=_host32(users[chosen]),
        tie_low=_host32(low[chosen]),
        tie_high=_host32(high[chosen]),
        unlisted=cut,
        floor=float(scores.min()) if scores.size else 0.0,
    )


def longest_row(resident: Resident) -> int:
    """The longest excluded row, which bounds the binary search."""
    rows = [resident.interactions.negatives]
    if isinstance(resident.teacher, TeacherLists) and resident.teacher.unlisted is not None:
        rows.append(resident.teacher.unlisted)
    return max(int(np.diff(np.asarray(row.offsets)).max(initial=0)) for row in rows)


# --- device: draw ------------------------------------------------------------------------------


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
    bits: UInt32[Array, "B"],
    users: Int[Array, "B"],
    cut: Excluded,
    cumulative: Int[Array, "I1"] | None,
    steps: int,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """An item outside each user's excluded set, by mass; weight 0 where nothing is left."""
    free = cut.free[users]
    mass = below(bits, free)
    low, high = cut.offsets[users], cut.offsets[users + 1]
    passed = count_not_above(cut.keys, low, high, mass, steps)
    shift = cut.shifts.at[low + passed - 1].get(mode="clip")
    place = mass + jnp.where(passed > 0, shift, 0)
    weight = (free > 0).astype(jnp.float32)
    if cumulative is None:
        return jnp.where(free > 0, place, 0), weight
    item = jnp.searchsorted(cumulative, place, side="right") - 1
    return jnp.where(free > 0, item, 0).astype(jnp.int32), weight


def draw_triples(
    key: jax.Array, data: Interactions, plan: Plan
) -> tuple[Int[Array, "B"], Int[Array, "B 2"], Float[Array, "B"]]:
    """B triples: a training pair uniformly with replacement, and a negative for its user."""
    words = jax.random.bits(key, (2, plan.triples), jnp.uint32)
    pair = below(words[0], plan.n_pairs)
    users, positive = data.users[pair], data.items[pair]
    sampler = plan.sampler
    if sampler.negatives == "in_batch":
        negative, weights = _in_batch(words[1], users, positive, data, plan)
    elif sampler.allow_positive_negatives:
        if data.cumulative is None:
            negative = below(words[1], plan.n_items)
        else:
            place = below(words[1], data.cumulative[-1])
            negative = jnp.searchsorted(data.cumulative, place, side="right") - 1
        weights = jnp.ones(plan.triples, jnp.float32)
    else:
        negative, weights = draw_outside(
            words[1], users, data.negatives, data.cumulative, plan.search_steps
        )
    return users, jnp.stack([positive, negative.astype(jnp.int32)], axis=1), weights


def _in_batch(
    bits: UInt32[Array, "B"],
    users: Int[Array, "B"],
    positive: Int[Array, "B"],
    data: Interactions,
    plan: Plan,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Another triple's positive: the first of a few random lanes that the user does not have."""
    size = plan.triples
    lane = jnp.arange(size, dtype=jnp.int32)
    if size == 1:
        return positive, jnp.zeros(1, jnp.float32)
    first = below(bits, size - 1)
    tries = min(IN_BATCH_TRIES, size - 1)
    low, high = data.negatives.offsets[users], data.negatives.offsets[users + 1]
    negative, weights = positive, jnp.zeros(size, jnp.float32)
    for attempt in range(tries):
        shift = 1 + (first + attempt) % (size - 1)
        candidate = positive[(lane + shift) % size]
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
    key: jax.Array, teacher: TeacherLists | TeacherPairs, plan: Plan
) -> tuple[Int[Array, "G"], Int[Array, "G 2"], Float[Array, "G"], Float[Array, "G"]]:
    """G preferences (users, (preferred, other), margins, weights).

    From lists: an entry uniformly, then a partner of the same user uniformly among those it
    makes a preference with, or (teachers whose unlisted items rank below) an item outside list
    and positives. With pair_selection=largest_gap, `pair_candidates` times as many are drawn
    and those with the largest teacher margin are kept (S-LLMR section 3.2).
    """
    keep = plan.preferences
    greedy = plan.guidance.pair_selection == "largest_gap"
    size = keep * plan.guidance.pair_candidates if greedy else keep
    words = jax.random.bits(key, (3, size), jnp.uint32)
    if isinstance(teacher, TeacherPairs):
        row = below(words[0], teacher.users.shape[0])
        users, items, margins = teacher.users[row], teacher.items[row], teacher.margins[row]
        weights = jnp.ones(size, jnp.float32)
    else:
        users, items, margins, weights = _from_lists(words, teacher, plan)
    if greedy:
        _, best = jax.lax.top_k(jnp.where(weights > 0, margins, -jnp.inf), keep)
        users, items, margins, weights = users[best], items[best], margins[best], weights[best]
    return users, items, margins, weights


def _from_lists(
    words: UInt32[Array, "3 G"], teacher: TeacherLists, plan: Plan
) -> tuple[Int[Array, "G"], Int[Array, "G 2"], Float[Array, "G"], Float[Array, "G"]]:
    chosen = below(words[0], teacher.entries.shape[0])
    entry, users = teacher.entries[chosen], teacher.users[chosen]
    low, high = teacher.tie_low[chosen], teacher.tie_high[chosen]
    start = teacher.offsets[users]
    partners = teacher.offsets[users + 1] - start - (high - low)
    place = below(words[1], partners)
    partner = start + place + jnp.where(place >= low, high - low, 0)
    partner = jnp.where(partners > 0, partner, entry)
    mine, theirs = teacher.scores[entry], teacher.scores[partner]
    a, b = teacher.items[entry], teacher.items[partner]
    first = mine >= theirs
    items = jnp.stack([jnp.where(first, a, b), jnp.where(first, b, a)], axis=1)
    margins, weights = jnp.abs(mine - theirs), (partners > 0).astype(jnp.float32)
    if teacher.unlisted is not None:
        outside, able = draw_outside(words[1], users, teacher.unlisted, None, plan.search_steps)
        share = np.uint32(min(2**32 - 1, round(plan.guidance.unlisted_share * 2**32)))
        use = (words[2] <= share) | (partners <= 0) if share else partners <= 0
        items = jnp.where(use[:, None], jnp.stack([a, outside], axis=1), items)
        margins = jnp.where(use, mine - teacher.floor, margins)
        weights = jnp.where(use, able, weights)
    return users, items, margins, weights


def draw(key: jax.Array, resident: Resident, plan: Plan) -> Batch:
    """The batch of one step."""
    for_triples, for_preferences = jax.random.split(key)
    users, items, weights = draw_triples(for_triples, resident.interactions, plan)
    extra: tuple[Any, ...]
    if plan.preferences and resident.teacher is not None:
        extra = draw_preferences(for_preferences, resident.teacher, plan)
    else:
        extra = (
            jnp.zeros(0, jnp.int32),
            jnp.zeros((0, 2), jnp.int32),
            jnp.zeros(0, jnp.float32),
            jnp.zeros(0, jnp.float32),
        )
    return Batch(users, items, weights, *extra)
