"""What guidances have in common that learn whole lists of a teacher under a gate.

A step draws G users who have a list; K places of each list, best first, and L items, uniformly,
that are neither on the list nor among the user's own. A subclass says which places, and the loss
l_k of each:

    L = mean over the lists drawn of 1/K sum_k alpha_k l_k

alpha_k = 1 (--gate=constant, the default of these guidances) is the method as published, which
believes every place; any other gate believes each place by itself: alpha_k is its word on the
preference (k-th item, one of the L). Places that a short list lacks count nothing.

Where a method asks how the recommender ranks an item now, that is found among the K + L
candidates, which the step scores anyway: no step ranks the catalogue, and nothing is older than a
step.

Shape letters: G lists, K listed items, L unlisted items, C = K + L (and more, if a method draws
more), S steps drawn at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.base import GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated, GatedArrays
from slgr_jax.guidance.gating import Observed
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling import random_bits, user_shards
from slgr_jax.sampling.arrays import Interactions, Share, drawable
from slgr_jax.sampling.context import Histories, Queries, host32
from slgr_jax.sampling.labelled_preferences import LabelledPreferences
from slgr_jax.sampling.negatives import Generators, below, draw_outside
from slgr_jax.sampling.preferences import (
    Preferences,
    at_the_end_of_training,
    lane_weights,
    pair_facts,
)
from slgr_jax.sampling.teacher_arrays import TeacherLists

Lists = TypeVar("Lists", bound="ListGuidance")
# A score that no exponential sees: of a place that a list lacks, of an item that is not drawn.
NO_SCORE = np.float32(-1e30)


@struct.dataclass
class ListArrays(GatedArrays):
    """The teacher's lists, what the gate learns from, and whose lists there are.

    Attributes:
      users: [m] those with a list and an item outside it.
      longest: places of the longest list.
      share: of a shard of users, its part of `users`.
    """

    users: Int[Array, "m"]
    longest: int = struct.field(pytree_node=False)
    share: Share | None = None


@struct.dataclass
class ListDraw:
    """Lists to learn.

    Attributes:
      queries: [G]; items: [G, C], listed ones first, best first, then the unlisted ones.
      listed: [G, K] whether the list has such a place.
      targets: [G, K] what the teacher says of each place, as the method reads it.
      unlisted: [G] how many items the unlisted ones were drawn among.
      noise: [G, K + L] what the method chooses by among the candidates; None if it does not.
      pairs: [G, K, 2] (listed, unlisted) for the gate.
    """

    queries: Queries
    items: Int[Array, "*G C"]
    listed: Bool[Array, "*G K"]
    targets: Float[Array, "*G K"]
    unlisted: Int[Array, "*G"]
    noise: UInt32[Array, "*G C"] | None
    pairs: Preferences
    labelled: LabelledPreferences | None


class ListGuidance(Gated):
    """The shared half of a guidance of lists; a subclass has `interesting`, `uninteresting` and
    `place_losses`.

    Attributes:
      chooses: whether its loss chooses among the candidates by chance (`ListDraw.noise`).
    """

    queries_knob = "--lists_per_step"
    chooses = False

    @property
    def interesting(self) -> int:
        """K: places of a list that are drawn."""
        raise NotImplementedError

    @property
    def uninteresting(self) -> int:
        """L: items outside the list that are drawn."""
        raise NotImplementedError

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G K"]:
        """l_k of the module's docstring; 0 at places that a list lacks."""
        raise NotImplementedError

    def places(
        self, words_of: Generators, arrays: ListArrays, lengths: Int[Array, "S G"]
    ) -> Int[Array, "S G K"]:
        """K distinct places of each list, ascending, 0 the best; those past its end come last."""
        return jnp.broadcast_to(jnp.arange(self.interesting), (*lengths.shape, self.interesting))

    def targets(
        self, scores: Float[Array, "S G K"], teacher: TeacherLists
    ) -> Float[Array, "S G K"]:
        """`ListDraw.targets` from the teacher's scores."""
        return scores

    @property
    def queries(self) -> int:
        """As many candidates a step as the triples have, unless --lists_per_step says so."""
        if self.run.guidance.lists_per_step:
            return self.run.guidance.lists_per_step
        lists = max(1, 2 * self.run.sampler.batch_size // self.width)
        return lists // 8 * 8 or lists

    @property
    def width(self) -> int:
        return self.interesting + self.uninteresting

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        teacher = super().teacher_arrays(sources)
        if not isinstance(teacher, TeacherLists) or teacher.unlisted is None:
            raise ConfigError(
                f"--guidance={self.run.guidance.guidance} takes lists to rank above what they "
                f"leave out, and of teacher {self.run.guidance.teacher} that is unknown; use lists "
                "whose unlisted items rank below (slgr teach import --unlisted=below, slgr teach "
                "nearest), without --unlisted_share=0, or --guidance=pairwise"
            )
        return teacher

    def arrays(self, sources: Sources) -> tuple[ListArrays, Csr | None]:
        teacher = self.teacher_arrays(sources)
        gate, left_out = self.gating.arrays(sources, teacher)
        longest = int(np.diff(np.asarray(teacher.offsets)).max())
        users = np.unique(np.asarray(teacher.starts)[:, 1])
        return ListArrays(teacher, gate, host32(users), longest), left_out

    def deal(self, arrays: GatedArrays, shards: UserShards) -> ListArrays:
        dealt = super().deal(arrays, shards)
        assert isinstance(arrays, ListArrays)
        assert isinstance(dealt, ListArrays)
        users = np.asarray(arrays.users)
        by_user: Any = user_shards.ByUser(users, shards)
        return dataclasses.replace(
            dealt,
            users=by_user.entries(user_shards.numbers_of(users, shards)),
            longest=user_shards.greatest(arrays.longest, shards),
            share=by_user.share(),
        )

    def of_shard(self: Lists, count: int) -> Lists:
        of_shard = super().of_shard(count)
        lists = dataclasses.replace(of_shard.run.guidance, lists_per_step=self.queries // count)
        return dataclasses.replace(of_shard, run=dataclasses.replace(of_shard.run, guidance=lists))

    def draw(
        self,
        words_of: Generators,
        arrays: ListArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> ListDraw:
        teacher, count = arrays.teacher, self.queries
        assert isinstance(teacher, TeacherLists)
        assert teacher.unlisted is not None
        words = random_bits.words(words_of.other, 1, count)[0]
        users = arrays.users[below(words, drawable(arrays.share, arrays.users))]
        start, end = teacher.offsets[users], teacher.offsets[users + 1]
        places = self.places(words_of, arrays, end - start)

        # Entries ascend by score: the best of a user is the last. A place that a short list lacks
        # repeats the best item, whose row is read already.
        listed = places < (end - start)[..., None]
        entry = end[..., None] - 1 - jnp.where(listed, places, 0)
        interesting, scores = teacher.items[entry], teacher.scores[entry]

        uninteresting = self._unlisted(words_of, teacher, users)
        other = uninteresting[..., jnp.arange(places.shape[-1]) % uninteresting.shape[-1]]
        pair_items = jnp.stack([interesting, other], axis=-1)
        pair_users = jnp.broadcast_to(users[..., None], interesting.shape)
        pairs = Preferences(
            at_the_end_of_training(pair_users, histories),
            pair_items,
            scores - teacher.floor,
            pair_facts(interactions.facts, pair_users, pair_items, native=self.native),
            weights=lane_weights(arrays.share, pair_users),
        )
        noise = None
        if self.chooses:
            size = count * (self.interesting + self.uninteresting)
            noise = random_bits.words(words_of.own, 1, size)[0].reshape(*users.shape, -1)
        return ListDraw(
            at_the_end_of_training(users, histories),
            jnp.concatenate([interesting, uninteresting], axis=-1),
            listed,
            self.targets(scores, teacher),
            teacher.unlisted.free[users],
            noise,
            pairs,
            self.draw_labelled(words_of, arrays, interactions.facts, histories),
        )

    def _unlisted(
        self, words_of: Generators, teacher: TeacherLists, users: Int[Array, "S G"]
    ) -> Int[Array, "S G L"]:
        """L items outside each user's list and positives, uniformly."""
        assert teacher.unlisted is not None
        count = self.uninteresting
        words = random_bits.words(words_of.other, 2, users.shape[1] * count)[1]
        repeated = jnp.repeat(users, count, axis=1)
        items, _ = draw_outside(words, repeated, teacher.unlisted, None, native=self.native)
        return items.astype(jnp.int32).reshape(*users.shape, count)

    def candidates(self, drawn: ListDraw) -> Candidates:
        return Candidates(drawn.queries, drawn.items)

    def gate_pairs(self, drawn: ListDraw) -> Preferences:
        pairs: Preferences = jax.tree.map(_flat, drawn.pairs)
        return pairs

    def split(
        self, values: Shaped[Array, "G C"]
    ) -> tuple[Shaped[Array, "G K"], Shaped[Array, "G L"]]:
        """What belongs to the listed candidates, and to the unlisted ones."""
        both = self.interesting + self.uninteresting
        return values[:, : self.interesting], values[:, self.interesting : both]

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: ListDraw,
        observed: Observed,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        def pair_scores(scores: Float[Array, "G C"]) -> Float[Array, "P 2"]:
            """Of (I_k, U_(k mod L))."""
            listed, unlisted = self.split(scores)
            other = unlisted[:, jnp.arange(self.interesting) % unlisted.shape[1]]
            return jnp.stack([listed, other], axis=-1).reshape(-1, 2)

        def stochastic(key: jax.Array, rate: float) -> Float[Array, "P 2"]:
            return pair_scores(scored.stochastic(key, rate))

        scores = pair_scores(scored.scores)
        alpha, _ = self.believe(params, scores, stochastic, drawn, observed, key)
        losses = self.place_losses(scored.scores, drawn)
        agrees = jax.lax.stop_gradient(scores[:, 0] > scores[:, 1])
        return self.added(params, alpha * _flat(losses), alpha, agrees, drawn, observed, layout)


def gumbel(words: UInt32[Array, "*N"]) -> Float[Array, "*N"]:
    """Standard Gumbel noise: the greatest k of log weight + noise are a draw of k without
    replacement by weight."""
    uniform = (words.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)
    return -jnp.log(-jnp.log(jnp.clip(uniform, 1e-9, 1.0 - 1e-7)))


def drawn_by_weight(
    log_weights: Float[Array, "G N"], words: UInt32[Array, "G N"], count: int
) -> Bool[Array, "G N"]:
    """`count` of each row drawn without replacement by weight; none whose weight is `NO_SCORE`."""
    possible = log_weights > 0.5 * NO_SCORE
    keys = jnp.where(possible, log_weights + gumbel(words), NO_SCORE)
    least = jax.lax.top_k(keys, count)[0][:, -1:]
    return possible & (keys >= least)


def number_above(
    scores: Float[Array, "G A"], others: Float[Array, "G N"], counted: Bool[Array, "G N"]
) -> Float[Array, "G A"]:
    """How many of the counted others score above each; detached."""
    above = (others[:, None, :] > scores[:, :, None]) & counted[:, None, :]
    return jax.lax.stop_gradient(jnp.sum(above, axis=-1, dtype=jnp.float32))


def estimated_ranks(
    scores: Float[Array, "G A"],
    listed_scores: Float[Array, "G K"],
    listed: Bool[Array, "G K"],
    unlisted_scores: Float[Array, "G L"],
    unlisted: Int[Array, "G"],
) -> Float[Array, "G A"]:
    """Where the recommender ranks items in the catalogue, 1 the best, as far as a step can tell.

        1 + #{listed items above} + n / L #{unlisted items above},   n unlisted items in all

    RD (Tang & Wang 2018) counts a sample of the whole catalogue; that listed items are counted one
    by one leaves less to chance. The user's own items, and places of the list that were
    not drawn, do not count.
    """
    count = unlisted_scores.shape[1]
    sampled = number_above(scores, unlisted_scores, jnp.ones_like(unlisted_scores, dtype=bool))
    share = unlisted.astype(jnp.float32)[:, None] / count
    return 1.0 + number_above(scores, listed_scores, listed) + share * sampled


def ranks_among(
    listed_scores: Float[Array, "G K"],
    unlisted_scores: Float[Array, "G L"],
    listed: Bool[Array, "G K"],
) -> Float[Array, "G C"]:
    """Where the recommender ranks each candidate among these alone, 1 the best; detached."""
    scores = jnp.concatenate([listed_scores, unlisted_scores], axis=1)
    counted = jnp.concatenate([listed, jnp.ones_like(unlisted_scores, dtype=bool)], axis=1)
    return 1.0 + number_above(scores, scores, counted)


def _flat(x: jax.Array) -> jax.Array:
    """[G, K, ...] -> [G * K, ...]."""
    return x.reshape(-1, *x.shape[2:])
