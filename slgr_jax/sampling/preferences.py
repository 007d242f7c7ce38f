"""What is drawn on the device of a teacher: preferences, scored items, labelled preferences.

Shape letters: G preferences, K labelled preferences, S steps drawn at once, E entries of the lists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.kernels import cpu
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import (
    Answers,
    Chosen,
    Facts,
    HeldOut,
    Known,
    KnownLists,
    KnownPairs,
    PairFacts,
    TeacherLists,
    TeacherPairs,
)
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.negatives import Generators, Plan, below, draw_outside


def draw_preferences(
    words_of: Generators, teacher: TeacherLists | TeacherPairs, plan: Plan
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"]]:
    """G preferences a step (users, (preferred, other), margins).

    From lists: an entry uniformly, then a partner of the same user uniformly among those it
    makes a preference with, or (teachers whose unlisted items rank below) an item outside list
    and positives. With pair_selection=largest_gap, `pair_candidates` times as many are drawn
    and those with the largest teacher margin are kept (S-LLMR section 3.2).
    With `triples_per_user` = L, L entries that follow each other are drawn together.
    """
    keep = plan.preferences
    greedy = plan.guidance.pair_selection == "largest_gap"
    size = keep * plan.guidance.pair_candidates if greedy else keep
    together = min(plan.sampler.triples_per_user, size)
    starts = random_bits.words(words_of.other, 1, -(-size // together))[0]
    if isinstance(teacher, TeacherLists) and plan.native:
        users, items, margins = _from_lists_native(words_of.own, starts, size, teacher, plan)
    else:
        following = jnp.arange(together, dtype=jnp.int32)[None, None, :]
        run = below(starts, teacher.stated)[:, :, None] + following
        chosen = (run % teacher.stated).reshape(starts.shape[0], -1)[:, :size]
        if isinstance(teacher, TeacherLists):
            users, items, margins = _from_lists(words_of.own, chosen, teacher, plan)
        else:
            users = teacher.users[chosen]
            items, margins = teacher.items[chosen], teacher.margins[chosen]
    if greedy:
        _, best = jax.lax.top_k(margins, keep)
        users, margins = (jnp.take_along_axis(x, best, axis=1) for x in (users, margins))
        items = jnp.take_along_axis(items, best[:, :, None], axis=1)
    return users, items, margins


def _unlisted_words(plan: Plan) -> int:
    """The greatest word for which a partner is an unlisted item."""
    return min(2**32 - 1, round(plan.guidance.unlisted_share * 2**32))


def _from_lists(
    own: UInt32[Array, "S 2"], chosen: Int[Array, "S G"], teacher: TeacherLists, plan: Plan
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"]]:
    words = random_bits.words(own, 1 if teacher.unlisted is None else 2, chosen.shape[1])
    entry, users, low, high = jnp.moveaxis(teacher.starts[chosen], -1, 0)
    start = teacher.offsets[users]
    partners = teacher.offsets[users + 1] - start - (high - low)
    place = below(words[0], partners)
    beats = place < low  # scores ascend: what an entry beats comes before it
    partner = start + place + jnp.where(beats, 0, high - low)
    partner = jnp.where(partners > 0, partner, entry)
    preferred, other = jnp.where(beats, entry, partner), jnp.where(beats, partner, entry)
    items = teacher.items[jnp.stack([preferred, other], axis=-1)]
    margins = teacher.scores[preferred] - teacher.scores[other]
    if teacher.unlisted is not None:
        outside, _ = draw_outside(words[0], users, teacher.unlisted, None, plan)
        use = (words[1] <= np.uint32(_unlisted_words(plan))) | (partners <= 0)
        listed = jnp.stack([teacher.items[entry], outside], axis=-1)
        items = jnp.where(use[..., None], listed, items)
        margins = jnp.where(use, teacher.scores[entry] - teacher.floor, margins)
    return users, items, margins


def _from_lists_native(
    own: UInt32[Array, "S 2"],
    starts: UInt32[Array, "S M"],
    size: int,
    teacher: TeacherLists,
    plan: Plan,
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"]]:
    """What `_from_lists` draws from entries that start at `starts`, by the CPU kernel."""
    cut = teacher.unlisted
    words = random_bits.words(own, 1 if cut is None else 2, size)
    return cpu.draw_preferences(
        *(starts, words[0], None if cut is None else words[1]),
        *(teacher.starts, teacher.offsets, teacher.items, teacher.scores),
        cut,
        together=min(plan.sampler.triples_per_user, size),
        most=_unlisted_words(plan),
        floor=teacher.floor,
    )


def draw_scored(
    own: UInt32[Array, "S 2"], teacher: TeacherLists, plan: Plan
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"], Float[Array, "S G 2"]]:
    """G times two scored items of one user: as `draw_preferences`, and the scores in [0, 1].

    The first is a listed item, uniformly; the second another of the list or, for teachers whose
    unlisted items rank below, one outside list and positives, of score 0.
    """
    words = random_bits.words(own, 3, plan.preferences)
    chosen = below(words[0], teacher.stated)
    entry, users, _, _ = jnp.moveaxis(teacher.starts[chosen], -1, 0)
    start = teacher.offsets[users]
    partner = start + below(words[1], teacher.offsets[users + 1] - start)
    items = teacher.items[jnp.stack([entry, partner], axis=-1)]
    scores = teacher.scores[jnp.stack([entry, partner], axis=-1)]
    if teacher.unlisted is not None:
        outside, _ = draw_outside(words[2], users, teacher.unlisted, None, plan)
        items = items.at[..., 1].set(outside.astype(jnp.int32))
        scores = scores.at[..., 1].set(teacher.floor)
    size = max(teacher.ceiling - teacher.floor, 1e-12)
    return users, items, jnp.zeros(users.shape, jnp.float32), (scores - teacher.floor) / size


def draw_answers(
    own: UInt32[Array, "S 2"],
    known: Known,
    teacher: TeacherLists | TeacherPairs,
    plan: Plan,
) -> Answers:
    """K labelled preferences a step, [S, K], distributed as preferences are."""
    assert known.answers is not None
    bits = random_bits.words(own, 4, plan.known)
    place = below(bits[0], known.count)
    if isinstance(known.answers, KnownPairs):
        assert isinstance(teacher, TeacherPairs)
        chosen = known.answers.pairs[place]
        as_of = known.answers.as_of[place]
        return Answers(
            Queries(teacher.users[chosen], as_of),
            teacher.items[chosen],
            teacher.margins[chosen],
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
        share = np.uint32(_unlisted_words(plan))
        use = bits[3] <= share if share else jnp.zeros(users.shape, bool)
        # Where nothing outside is asked for, a row that is in a cache: reading rows is the cost.
        asked = jnp.where(use & listed, users, 0)
        free, found = draw_outside(bits[2], asked, answers.outside, None, plan)
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
        Queries(users, chosen.as_of[at]), items, margins, right.astype(jnp.float32), weights
    )


def draw_held_out(
    own: UInt32[Array, "S 2"], users: Int[Array, "S G"], chosen: Chosen, plan: Plan
) -> HeldOut:
    """For each user one of their chosen items, uniformly, and an item they did not choose."""
    bits = random_bits.words(own, 2, users.shape[1])
    start = chosen.offsets[users]
    count = chosen.offsets[users + 1] - start
    positive = chosen.items.at[start + below(bits[0], count)].get(mode="clip")
    negative, able = draw_outside(bits[1], users, chosen.negatives, None, plan)
    weights = jnp.where(count > 0, able, 0.0)
    return HeldOut(jnp.stack([positive, negative.astype(jnp.int32)], axis=-1), weights)


def pair_facts(
    facts: Facts, users: Int[Array, "*G"], items: Int[Array, "*G 2"], *, native: bool = False
) -> PairFacts:
    """What is known of pairs. What of it nothing reads, is not looked up in a compiled program."""

    def of(values: jax.Array, at: jax.Array) -> jax.Array:
        return cpu.take(values, at) if native else values[at]

    return PairFacts(
        log_history=of(facts.log_history, users),
        log_popularity=of(facts.log_popularity, items),
        cold=of(facts.cold, users),
        tail=of(facts.tail, items),
    )
