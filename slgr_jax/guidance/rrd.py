"""Relaxed ranking distillation: the teacher's list in order, above items that it did not list.

Kang et al. 2020, "DE-RRD" (CIKM, arXiv 2012.04357), section 4.2. For a user, I_1..I_K are K items
of the teacher's list in its order and U_1..U_L items that are neither listed nor the user's:

    l_k    = -y_Ik + log( sum_{j >= k} exp y_Ij + sum_l exp y_Ul )
    L_RRD  = 1/K sum_k alpha_k l_k,   a mean over the lists drawn (lists.py)

so that the order of I counts and that of U does not. K items are drawn anew each step without
replacement, with probability proportional to exp(-rank / T) among the first --rrd_pool places,
then put back in order; --norrd_sample takes the first K.

Needs: lists whose unlisted items rank below (`import --unlisted=below`, `nearest`). Fits every
backbone. Costs: K + L candidates a list; with K + L even, on the fast path of dot products.

Shape letters: G lists, K listed items, L unlisted items, C = K + L, S steps drawn at once, P
places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import RRDConfig, RunConfig
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.lists import NO_SCORE, ListArrays, ListDraw, ListGuidance, gumbel
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.negatives import Generators


def relaxed_ranking_terms(
    listed_scores: Float[Array, "G K"],
    unlisted_scores: Float[Array, "G L"],
    listed: Bool[Array, "G K"],
) -> Float[Array, "G K"]:
    """l_k of the module's docstring; 0 at places that are not `listed`, which play no part."""
    scores = jnp.where(listed, listed_scores, NO_SCORE)
    below_or_at = jax.lax.cumlogsumexp(scores, axis=1, reverse=True)
    unlisted = jax.nn.logsumexp(unlisted_scores, axis=1, keepdims=True)
    terms = jnp.logaddexp(below_or_at, jnp.broadcast_to(unlisted, scores.shape)) - scores
    return jnp.where(listed, terms, 0.0)


class RelaxedRanking(ListGuidance):
    """See the module's docstring."""

    @property
    def knobs(self) -> RRDConfig:
        """Its section."""
        return self.run.rrd

    @property
    def interesting(self) -> int:
        return self.knobs.interesting

    @property
    def uninteresting(self) -> int:
        return self.knobs.uninteresting

    def places(
        self, words_of: Generators, arrays: ListArrays, lengths: Int[Array, "S G"]
    ) -> Int[Array, "S G K"]:
        pool = max(min(arrays.longest, self.knobs.pool), self.interesting)
        if not self.knobs.sample or pool == self.interesting:  # then all are drawn
            return super().places(words_of, arrays, lengths)
        words = random_bits.words(words_of.own, 1, lengths.shape[1] * pool)[0]
        noise = gumbel(words.reshape(*lengths.shape, pool))
        place = jnp.broadcast_to(jnp.arange(pool, dtype=jnp.int32), noise.shape)
        weight = -place.astype(jnp.float32) / self.knobs.temperature
        keys = jnp.where(place < lengths[..., None], weight + noise, NO_SCORE)
        return jnp.sort(jax.lax.top_k(keys, self.interesting)[1], axis=-1)

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G K"]:
        return relaxed_ranking_terms(*self.split(scores), drawn.listed)


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> RelaxedRanking:
    """The relaxed ranking distillation of a run."""
    return RelaxedRanking(run, Gating(run, reference_backbones, native), native)
