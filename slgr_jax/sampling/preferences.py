"""What is drawn on the device of a teacher: preferences, scored items, lists, their users' facts.

Shape letters: G preferences (or lists), S steps drawn at once, E entries of the lists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.kernels import cpu
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Facts, PairFacts, Share
from slgr_jax.sampling.context import Histories, Queries
from slgr_jax.sampling.negatives import Generators, below, draw_outside
from slgr_jax.sampling.teacher_arrays import PreferenceRule, TeacherLists, TeacherPairs


@struct.dataclass
class Preferences:
    """Drawn preferences: [S, G] of S steps, [G] of one.

    Attributes:
      items: [..., 2] (preferred, other).
      margins: the teacher's score difference.
      facts: what is known of each.
      entries: [..., 2] where both are in the teacher's lists, -1 where an item is not listed; None
        where preferences are not of lists, or nobody asks.
      weights: of a shard of users, each its `Share`'s; None: all weigh 1.
    """

    queries: Queries
    items: Int[Array, "*G 2"]
    margins: Float[Array, "*G"]
    facts: PairFacts
    entries: Int[Array, "*G 2"] | None = None
    weights: Float[Array, "*G"] | None = None


class DrawnPairs(NamedTuple):
    """What `draw_pairs` draws: `Preferences` of which nothing else is known yet."""

    users: Int[Array, "S G"]
    items: Int[Array, "S G 2"]
    margins: Float[Array, "S G"]
    entries: Int[Array, "S G 2"] | None


def at_the_end_of_training(users: Int[Array, "*G"], histories: Histories | None) -> Queries:
    """Queries of users as training knows them: a teacher speaks of all of the training history."""
    return Queries(users, None if histories is None else histories.trained[users])


def lane_weights(share: Share | None, lanes: Int[Array, "*G"]) -> Float[Array, "*G"] | None:
    """What each lane weighs that is drawn from a shard of users; None: all weigh 1."""
    return None if share is None else jnp.broadcast_to(share.weight, lanes.shape)


def draw_preferences(
    words_of: Generators,
    teacher: TeacherLists | TeacherPairs,
    facts: Facts,
    histories: Histories | None,
    rule: PreferenceRule,
) -> Preferences:
    """G preferences a step, and what is known of them."""
    users, items, margins, entries = draw_pairs(words_of, teacher, rule)
    return Preferences(
        at_the_end_of_training(users, histories),
        items,
        margins,
        pair_facts(facts, users, items, native=rule.native),
        entries,
        lane_weights(teacher.share, users),
    )


def draw_pairs(
    words_of: Generators, teacher: TeacherLists | TeacherPairs, rule: PreferenceRule
) -> DrawnPairs:
    """G preferences a step.

    From lists: an entry uniformly, then a partner of the same user uniformly among those it
    makes a preference with, or (teachers whose unlisted items rank below) an item outside list
    and positives. With `rule.candidates` > 1 so many times as many are drawn and those with the
    largest teacher margin are kept (S-LLMR section 3.2). With `rule.together` = L, L entries that
    follow each other are drawn together.
    """
    size = rule.count * rule.candidates
    together = min(rule.together, size)
    starts = random_bits.words(words_of.other, 1, -(-size // together))[0]

    if isinstance(teacher, TeacherLists) and rule.native:
        drawn = _from_lists_native(words_of.own, starts, size, teacher, rule)
    else:
        following = jnp.arange(together, dtype=jnp.int32)[None, None, :]
        run = below(starts, teacher.stated)[:, :, None] + following
        chosen = (run % teacher.stated).reshape(starts.shape[0], -1)[:, :size]
        if isinstance(teacher, TeacherLists):
            drawn = _from_lists(words_of.own, chosen, teacher, rule)
        else:
            drawn = DrawnPairs(
                teacher.users[chosen], teacher.items[chosen], teacher.margins[chosen], None
            )

    if rule.candidates > 1:
        _, best = jax.lax.top_k(drawn.margins, rule.count)
        at = {2: best, 3: best[:, :, None]}
        drawn = jax.tree.map(lambda x: jnp.take_along_axis(x, at[x.ndim], axis=1), drawn)
    return drawn


def unlisted_words(rule: PreferenceRule) -> int:
    """The greatest word for which a partner is an unlisted item."""
    return min(2**32 - 1, round(rule.unlisted_share * 2**32))


def _from_lists(
    own: UInt32[Array, "S 2"],
    chosen: Int[Array, "S G"],
    teacher: TeacherLists,
    rule: PreferenceRule,
) -> DrawnPairs:
    words = random_bits.words(own, 1 if teacher.unlisted is None else 2, chosen.shape[1])
    entry, users, low, high = jnp.moveaxis(teacher.starts[chosen], -1, 0)
    start = teacher.offsets[users]

    # A partner by its place among the user's entries with low:high left out.
    partners = teacher.offsets[users + 1] - start - (high - low)
    place = below(words[0], partners)
    beats = place < low  # scores ascend: what an entry beats comes before it
    partner = start + place + jnp.where(beats, 0, high - low)
    partner = jnp.where(partners > 0, partner, entry)

    preferred, other = jnp.where(beats, entry, partner), jnp.where(beats, partner, entry)
    entries = jnp.stack([preferred, other], axis=-1)
    items = teacher.items[entries]
    margins = teacher.scores[preferred] - teacher.scores[other]
    if teacher.unlisted is not None:
        outside, _ = draw_outside(words[0], users, teacher.unlisted, None, native=rule.native)
        use = (words[1] <= np.uint32(unlisted_words(rule))) | (partners <= 0)
        over_unlisted = jnp.stack([teacher.items[entry], outside], axis=-1)
        items = jnp.where(use[..., None], over_unlisted, items)
        margins = jnp.where(use, teacher.scores[entry] - teacher.floor, margins)
        one_listed = jnp.stack([entry, jnp.full_like(entry, -1)], axis=-1)
        entries = jnp.where(use[..., None], one_listed, entries)
    return DrawnPairs(users, items, margins, entries)


def _from_lists_native(
    own: UInt32[Array, "S 2"],
    starts: UInt32[Array, "S M"],
    size: int,
    teacher: TeacherLists,
    rule: PreferenceRule,
) -> DrawnPairs:
    """What `_from_lists` draws from entries that start at `starts`, by the CPU kernel."""
    cut = teacher.unlisted
    words = random_bits.words(own, 1 if cut is None else 2, size)
    return DrawnPairs(
        *cpu.draw_preferences(
            starts,
            words[0],
            None if cut is None else words[1],
            teacher.starts,
            teacher.offsets,
            teacher.items,
            teacher.scores,
            cut,
            together=min(rule.together, size),
            most=unlisted_words(rule),
            floor=teacher.floor,
        )
    )


def draw_scored(
    own: UInt32[Array, "S 2"], teacher: TeacherLists, count: int, *, native: bool
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G 2"], Int[Array, "S G 2"]]:
    """G times two scored items of one user: users, items, scores scaled to [0, 1], entries.

    The first is a listed item, uniformly; the second another of the list or, for teachers whose
    unlisted items rank below, one outside list and positives, of score 0.
    """
    words = random_bits.words(own, 3, count)
    chosen = below(words[0], teacher.stated)
    entry, users, _, _ = jnp.moveaxis(teacher.starts[chosen], -1, 0)
    start = teacher.offsets[users]
    partner = start + below(words[1], teacher.offsets[users + 1] - start)

    entries = jnp.stack([entry, partner], axis=-1)
    items, scores = teacher.items[entries], teacher.scores[entries]
    if teacher.unlisted is not None:
        outside, _ = draw_outside(words[2], users, teacher.unlisted, None, native=native)
        items = items.at[..., 1].set(outside.astype(jnp.int32))
        scores = scores.at[..., 1].set(teacher.floor)
        entries = entries.at[..., 1].set(-1)
    span = max(teacher.ceiling - teacher.floor, 1e-12)
    return users, items, (scores - teacher.floor) / span, entries


def pair_facts(
    facts: Facts, users: Int[Array, "*G"], items: Int[Array, "*G 2"], *, native: bool = False
) -> PairFacts:
    """What is known of pairs. Fields that nothing reads are removed by dead-code elimination."""

    def at(values: jax.Array, ids: jax.Array) -> jax.Array:
        return cpu.take(values, ids) if native else values[ids]

    return PairFacts(
        log_history=at(facts.log_history, users),
        log_popularity=at(facts.log_popularity, items),
        cold=at(facts.cold, users),
        tail=at(facts.tail, items),
        fold=None if facts.fold is None else facts.fold[users],
    )
