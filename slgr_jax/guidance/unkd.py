"""Unbiased knowledge distillation: a teacher's order among items of similar popularity.

Chen et al. 2023, "Unbiased knowledge distillation for recommendation" (WSDM, arXiv 2211.14729).
Items are cut into groups of equal popularity all together. Of a user's list, within a group, two
places a, b are drawn with probability ~ exp(-rank / T) each, ranks counted within the group, anew
while they are equal; with i the better of the two and j the other,

    loss = alpha * -log sigmoid(y_i - y_j),   a mean over the pairs drawn

so that a teacher's liking for popular items is not learned. Each (user, group) with two listed
items or more is drawn as often as any other; the authors give a user's groups equal shares, and the
share of a group that a short list does not reach is left out here as there. Ties of the teacher's
scores teach nothing. The authors draw pairs once an epoch, here each step does. A gate weighs each
pair.

Needs: a teacher's scores or lists. Fits every backbone. Costs: two candidates a pair, on the fast
path of dot products.

Shape letters: G pairs, S steps drawn at once, E entries of the lists, m (user, group) with two or
more of them; the axis of length 2 is (preferred, other).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.config import RunConfig, UnKDConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError
from slgr_jax.guidance import pair_losses
from slgr_jax.guidance.base import GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated, GatedArrays, GatedDraw
from slgr_jax.guidance.gating import Gating, Observed
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling import random_bits, user_shards
from slgr_jax.sampling.arrays import Interactions, Share, drawable
from slgr_jax.sampling.context import Histories, host32
from slgr_jax.sampling.negatives import Generators, below
from slgr_jax.sampling.preferences import (
    Preferences,
    at_the_end_of_training,
    lane_weights,
    pair_facts,
)
from slgr_jax.sampling.teacher_arrays import TeacherLists

LOGGER = logging.getLogger(__name__)


@struct.dataclass
class GroupedArrays(GatedArrays):
    """The teacher's lists by group of popularity, and what the gate learns from.

    Attributes:
      entries: [E] entries of the teacher's lists by user, then group, then place, the best first.
      segments: [m, 3] user, where in `entries` they begin, how many places are drawn from.
      share: of a shard of users, its part of `segments`.
    """

    entries: Int[Array, "E"]
    segments: Int[Array, "m 3"]
    share: Share | None = None


def popularity_groups(popularity: np.ndarray, count: int) -> np.ndarray:
    """[I] the group of each item, 0 that of the most popular ones; of about equal popularity
    all together, ties by index."""
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]
    groups = np.empty(popularity.size, np.int64)
    groups[order] = np.minimum(count * before // max(int(popularity.sum()), 1), count - 1)
    return groups


def two_places(
    first: UInt32[Array, "*G"],
    second: UInt32[Array, "*G"],
    lengths: Int[Array, "*G"],
    temperature: float,
) -> Int[Array, "*G 2"]:
    """Two different places below each length, the smaller first: P(a, b) ~ p_a p_b for a != b.

    p_i ~ x^i with x = exp(-1 / temperature). The first has P(a) ~ p_a (1 - p_a), whose cumulative
    sums are quadratic in x^a, and the second p without a, so that both are found by inverting a
    distribution, as drawing anew while a = b finds them.
    """
    length = lengths.astype(jnp.float32)
    rest = -math.expm1(-1.0 / temperature)  # 1 - x
    whole = -jnp.expm1(-length / temperature)  # 1 - x^n; p_i = x^i rest / whole

    # sum_{i < k} p_i (1 - p_i) = y / whole - squares y (2 - y) at y = 1 - x^k.
    squares = rest / (whole * whole * (2.0 - rest))
    linear = 1.0 / whole - 2.0 * squares
    part = _uniform(first) * (whole * linear + squares * whole * whole)
    root = jnp.sqrt(linear * linear + 4.0 * squares * part)
    positive = linear >= 0  # the form without cancellation
    y = jnp.where(positive, 2.0 * part, root - linear) / jnp.where(
        positive, linear + root, 2.0 * squares
    )
    a = _place(y, lengths, temperature)

    at_a = jnp.exp(-a.astype(jnp.float32) / temperature)
    chance = at_a * rest / whole
    mass = _uniform(second) * (1.0 - chance)
    mass += jnp.where(mass >= (1.0 - at_a) / whole, chance, 0.0)
    b = _place(mass * whole, lengths, temperature)
    b = jnp.where(b == a, jnp.where(a + 1 < lengths, a + 1, a - 1), b)  # by rounding
    return jnp.stack([jnp.minimum(a, b), jnp.maximum(a, b)], axis=-1)


def _uniform(words: UInt32[Array, "*G"]) -> Float[Array, "*G"]:
    """In (0, 1), in 2^24 steps."""
    return ((words >> 8).astype(jnp.float32) + 0.5) * np.float32(2.0**-24)


def _place(
    y: Float[Array, "*G"], lengths: Int[Array, "*G"], temperature: float
) -> Int[Array, "*G"]:
    """The k with 1 - x^k <= y < 1 - x^(k + 1)."""
    place = jnp.floor(-temperature * jnp.log1p(-jnp.minimum(y, 1.0)))
    return jnp.clip(place, 0, lengths - 1).astype(jnp.int32)


class UnbiasedDistillation(Gated):
    """See the module's docstring."""

    width = 2
    draws_entries = True

    @property
    def knobs(self) -> UnKDConfig:
        """Its section."""
        return self.run.unkd

    @property
    def queries(self) -> int:
        return self.run.preferences_per_step

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        return self.scored_lists(sources)

    def arrays(self, sources: Sources) -> tuple[GroupedArrays, Csr | None]:
        arrays, left_out = super().arrays(sources)
        teacher = arrays.teacher
        assert isinstance(teacher, TeacherLists)
        counts = np.diff(np.asarray(teacher.offsets))
        users = np.repeat(np.arange(counts.size), counts)
        groups = popularity_groups(sources.dataset.popularity, self.knobs.groups)
        keys = users * self.knobs.groups + groups[np.asarray(teacher.items)]

        # Entries of a user ascend by score: the last is the best.
        entries = np.lexsort((-np.arange(keys.size), keys))
        which, begin, length = np.unique(keys[entries], return_index=True, return_counts=True)
        able = length >= 2
        segments_of_all = user_shards.total(int(able.sum()), sources.dataset)
        if not segments_of_all:
            raise InputError(
                f"--guidance=unkd compares items of one group, and teacher "
                f"{self.run.guidance.teacher} lists no two of any of {self.knobs.groups} groups "
                "for any user; lower --unkd_groups, or give longer lists"
            )
        LOGGER.info(
            "unkd: %d of %d groups of users' items have two listed items or more",
            segments_of_all,
            self.knobs.groups * user_shards.total(int(np.count_nonzero(counts)), sources.dataset),
        )
        columns = (which // self.knobs.groups, begin, np.minimum(length, self.knobs.pool))
        segments = np.stack([column[able] for column in columns], axis=1)
        return GroupedArrays(
            teacher, arrays.gate, entries=host32(entries), segments=host32(segments)
        ), left_out

    def deal(self, arrays: GatedArrays, shards: UserShards) -> GroupedArrays:
        dealt = super().deal(arrays, shards)
        assert isinstance(arrays, GroupedArrays)
        assert isinstance(arrays.teacher, TeacherLists)
        assert isinstance(dealt, GroupedArrays)
        # `entries` are each user's own, one user after the other: as many as in the teacher's.
        owners = user_shards.owners_of(arrays.teacher.offsets)
        of_entries: Any = user_shards.ByUser(owners, shards)
        segments = np.array(arrays.segments)
        of_segments: Any = user_shards.ByUser(segments[:, 0], shards)
        segments[:, 1] = of_entries.local(segments[:, 1], segments[:, 0])
        segments[:, 0] = user_shards.numbers_of(segments[:, 0], shards)
        return dataclasses.replace(
            dealt,
            entries=of_entries.entries(of_entries.local(np.asarray(arrays.entries), owners)),
            segments=of_segments.entries(segments),
            share=of_segments.share(),
        )

    def draw(
        self,
        words_of: Generators,
        arrays: GroupedArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> GatedDraw:
        teacher = arrays.teacher
        assert isinstance(teacher, TeacherLists)
        words = random_bits.words(words_of.own, 3, self.queries)
        segment = arrays.segments[below(words[0], drawable(arrays.share, arrays.segments))]
        users, begin, lengths = jnp.moveaxis(segment, -1, 0)
        places = two_places(words[1], words[2], lengths, self.knobs.temperature)
        entries = arrays.entries[begin[..., None] + places]
        items, scores = teacher.items[entries], teacher.scores[entries]
        pairs = Preferences(
            at_the_end_of_training(users, histories),
            items,
            scores[..., 0] - scores[..., 1],
            pair_facts(interactions.facts, users, items, native=self.native),
            entries,
            lane_weights(arrays.share, users),
        )
        return GatedDraw(
            self.as_asked(pairs, arrays),
            self.draw_labelled(words_of, arrays, interactions.facts, histories),
        )

    def candidates(self, drawn: GatedDraw) -> Candidates:
        return Candidates(drawn.pairs.queries, drawn.pairs.items)

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: GatedDraw,
        observed: Observed,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        alpha, _ = self.believe(params, scored.scores, scored.stochastic, drawn, observed, key)
        assert scored.differences is not None
        margins = drawn.pairs.margins
        ordered = (margins > 0) & (margins >= self.run.guidance.min_gap)
        terms = jnp.where(ordered, alpha * pair_losses.logistic(scored.differences), 0.0)
        agrees = jax.lax.stop_gradient(scored.differences) > 0
        return self.added(params, terms, alpha, agrees, drawn, observed, layout)


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> UnbiasedDistillation:
    """The unbiased distillation of a run."""
    return UnbiasedDistillation(run, Gating(run, reference_backbones, native), native)
