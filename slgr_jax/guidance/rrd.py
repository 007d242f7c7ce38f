"""Relaxed ranking distillation: the teacher's list in order, above items that it did not list.

Kang et al. 2020, "DE-RRD" (CIKM, arXiv 2012.04357), section 4.2. For a user, I_1..I_K are K items
of the teacher's list in its order and U_1..U_L items that are neither listed nor the user's:

    l_k    = -y_Ik + log( sum_{j >= k} exp y_Ij + sum_l exp y_Ul )
    L_RRD  = 1/K sum_k alpha_k l_k,   a mean over the lists drawn

so that the order of I counts and that of U does not. alpha_k = 1 (--gate=constant, the default
here) is the published loss over K; any other gate believes each place by itself: alpha_k is its
word on (I_k, one of U). K items are drawn anew each step without replacement, with probability
proportional to exp(-rank / T) among the first --rrd_pool places, then put back in order;
--norrd_sample takes the first K. Places that a short list lacks count nothing.

Needs: lists whose unlisted items rank below (`import --unlisted=below`, `nearest`). Fits every
backbone. Costs: K + L candidates a list; with K + L even, on the fast path of dot products.

Shape letters: G lists, K listed items, L unlisted items, S steps drawn at once, P places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import RRDConfig, RunConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.base import GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated, GatedArrays
from slgr_jax.guidance.gating import Gating, Observed
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.row_access import Candidates
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Facts
from slgr_jax.sampling.context import Histories, Queries, host32
from slgr_jax.sampling.labelled_preferences import LabelledPreferences
from slgr_jax.sampling.negatives import Generators, below, draw_outside
from slgr_jax.sampling.preferences import Preferences, at_the_end_of_training, pair_facts
from slgr_jax.sampling.teacher_arrays import TeacherLists

# A score that no exponential sees: a place that a list lacks.
_NO_SCORE = np.float32(-1e30)


@struct.dataclass
class ListArrays(GatedArrays):
    """The teacher's lists, what the gate learns from, and whose lists there are.

    Attributes:
      users: [m] those with a list and an item outside it.
      places: P, places of a list that are drawn from, at most.
    """

    users: Int[Array, "m"]
    places: int = struct.field(pytree_node=False)


@struct.dataclass
class ListDraw:
    """Lists to learn.

    Attributes:
      queries: [G]; items: [G, K + L], listed ones first, in the teacher's order.
      listed: [G, K] whether the list has such a place.
      pairs: [G, K, 2] (listed, unlisted) for the gate.
    """

    queries: Queries
    items: Int[Array, "*G C"]
    listed: Bool[Array, "*G K"]
    pairs: Preferences
    labelled: LabelledPreferences | None


def relaxed_ranking_terms(
    listed_scores: Float[Array, "G K"],
    unlisted_scores: Float[Array, "G L"],
    listed: Bool[Array, "G K"],
) -> Float[Array, "G K"]:
    """l_k of the module's docstring; 0 at places that a list lacks (its last ones)."""
    scores = jnp.where(listed, listed_scores, _NO_SCORE)
    below_or_at = jax.lax.cumlogsumexp(scores, axis=1, reverse=True)
    unlisted = jax.nn.logsumexp(unlisted_scores, axis=1, keepdims=True)
    terms = jnp.logaddexp(below_or_at, jnp.broadcast_to(unlisted, scores.shape)) - scores
    return jnp.where(listed, terms, 0.0)


class RelaxedRanking(Gated):
    """See the module's docstring."""

    queries_knob = "--rrd_lists_per_step"

    @property
    def knobs(self) -> RRDConfig:
        """Its section."""
        return self.run.rrd

    @property
    def queries(self) -> int:
        """As many candidates a step as the triples have, unless --rrd_lists_per_step says so."""
        if self.knobs.lists_per_step:
            return self.knobs.lists_per_step
        lists = max(1, 2 * self.run.sampler.batch_size // self.width)
        return lists // 8 * 8 or lists

    @property
    def width(self) -> int:
        return self.knobs.interesting + self.knobs.uninteresting

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        teacher = super().teacher_arrays(sources)
        if not isinstance(teacher, TeacherLists) or teacher.unlisted is None:
            raise ConfigError(
                f"--guidance=rrd ranks lists above what they leave out, and of teacher "
                f"{self.run.guidance.teacher} that is unknown; use lists whose unlisted items rank "
                "below (slgr teach import --unlisted=below, slgr teach nearest), without "
                "--unlisted_share=0, or --guidance=pairwise"
            )
        return teacher

    def arrays(self, sources: Sources) -> tuple[ListArrays, Csr | None]:
        teacher = self.teacher_arrays(sources)
        gate, left_out = self.gating.arrays(sources, teacher)
        longest = int(np.diff(np.asarray(teacher.offsets)).max())
        users = np.unique(np.asarray(teacher.starts)[:, 1])
        places = max(min(longest, self.knobs.pool), self.knobs.interesting)
        return ListArrays(teacher, gate, host32(users), places), left_out

    def draw(
        self,
        words_of: Generators,
        arrays: ListArrays,
        facts: Facts,
        histories: Histories | None,
    ) -> ListDraw:
        teacher, count = arrays.teacher, self.queries
        assert isinstance(teacher, TeacherLists)
        words = random_bits.words(words_of.other, 1, count)[0]
        users = arrays.users[below(words, arrays.users.shape[0])]
        places = self._places(words_of, arrays, users)

        # Entries ascend by score: the best of a user is the last. A place that a short list lacks
        # repeats the best item, whose row is read already.
        start, end = teacher.offsets[users], teacher.offsets[users + 1]
        listed = places < (end - start)[..., None]
        entry = end[..., None] - 1 - jnp.where(listed, places, 0)
        interesting, margins = teacher.items[entry], teacher.scores[entry] - teacher.floor

        uninteresting = self._unlisted(words_of, teacher, users)
        other = uninteresting[..., jnp.arange(places.shape[-1]) % uninteresting.shape[-1]]
        pair_items = jnp.stack([interesting, other], axis=-1)
        pair_users = jnp.broadcast_to(users[..., None], interesting.shape)
        pairs = Preferences(
            at_the_end_of_training(pair_users, histories),
            pair_items,
            margins,
            pair_facts(facts, pair_users, pair_items, native=self.native),
        )
        return ListDraw(
            at_the_end_of_training(users, histories),
            jnp.concatenate([interesting, uninteresting], axis=-1),
            listed,
            pairs,
            self.draw_labelled(words_of, arrays, facts, histories),
        )

    def _places(
        self, words_of: Generators, arrays: ListArrays, users: Int[Array, "S G"]
    ) -> Int[Array, "S G K"]:
        """K distinct places of each list, ascending; those past a list's end come last."""
        count = self.knobs.interesting
        if not self.knobs.sample:
            return jnp.broadcast_to(jnp.arange(count), (*users.shape, count))
        size = users.shape[1] * arrays.places
        words = random_bits.words(words_of.own, 1, size)[0].reshape(*users.shape, arrays.places)
        # The K greatest of log weight + Gumbel noise are a draw without replacement by weight.
        uniform = (words.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)
        noise = -jnp.log(-jnp.log(jnp.clip(uniform, 1e-9, 1.0 - 1e-7)))
        place = jnp.broadcast_to(jnp.arange(arrays.places, dtype=jnp.int32), noise.shape)
        assert isinstance(arrays.teacher, TeacherLists)
        lengths = arrays.teacher.offsets[users + 1] - arrays.teacher.offsets[users]
        weight = -place.astype(jnp.float32) / self.knobs.temperature
        keys = jnp.where(place < lengths[..., None], weight + noise, _NO_SCORE)
        return jnp.sort(jax.lax.top_k(keys, count)[1], axis=-1)

    def _unlisted(
        self, words_of: Generators, teacher: TeacherLists, users: Int[Array, "S G"]
    ) -> Int[Array, "S G L"]:
        """L items outside each user's list and positives, uniformly."""
        assert teacher.unlisted is not None
        count = self.knobs.uninteresting
        words = random_bits.words(words_of.other, 2, users.shape[1] * count)[1]
        repeated = jnp.repeat(users, count, axis=1)
        items, _ = draw_outside(words, repeated, teacher.unlisted, None, native=self.native)
        return items.astype(jnp.int32).reshape(*users.shape, count)

    def candidates(self, drawn: ListDraw) -> Candidates:
        return Candidates(drawn.queries, drawn.items)

    def gate_pairs(self, drawn: ListDraw) -> Preferences:
        pairs: Preferences = jax.tree.map(_flat, drawn.pairs)
        return pairs

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: ListDraw,
        observed: Observed,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        count = self.knobs.interesting

        def pair_scores(scores: Float[Array, "G C"]) -> Float[Array, "P 2"]:
            """Of (I_k, U_(k mod L))."""
            unlisted = scores[:, count:]
            other = unlisted[:, jnp.arange(count) % unlisted.shape[1]]
            return jnp.stack([scores[:, :count], other], axis=-1).reshape(-1, 2)

        def stochastic(key: jax.Array, rate: float) -> Float[Array, "P 2"]:
            return pair_scores(scored.stochastic(key, rate))

        scores = pair_scores(scored.scores)
        alpha, _ = self.believe(params, scores, stochastic, drawn, observed, key)
        terms = relaxed_ranking_terms(
            scored.scores[:, :count], scored.scores[:, count:], drawn.listed
        )
        agrees = jax.lax.stop_gradient(scores[:, 0] > scores[:, 1])
        return self.added(params, alpha * _flat(terms), alpha, agrees, drawn, observed, layout)


def _flat(x: jax.Array) -> jax.Array:
    """[G, K, ...] -> [G * K, ...]."""
    return x.reshape(-1, *x.shape[2:])


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> RelaxedRanking:
    """The relaxed ranking distillation of a run."""
    return RelaxedRanking(run, Gating(run, reference_backbones, native), native)
