"""Dual correction distillation: relaxed ranking where recommender and teacher disagree.

Lee & Kim 2021, "Dual correction strategy for ranking distillation in top-N recommender system"
(CIKM, arXiv 2109.03459). Of P listed and M unlisted candidates of a user, with r the teacher's rank
(1, 2, ... of listed items, P' + 1 of all others, P' being how many there are of the P) and s the
recommender's, both among these candidates,

    K listed items, underestimated    P(item) ~ max(1e-5, tanh(max(0, (s - r) / tau)))
    L unlisted ones, overestimated    P(item) ~ tanh(max(0, (r - s) / tau))

are drawn without replacement, of the latter fewer where fewer are ranked too high, and

    L_DCD = L_RRD(all P, all M) + L_RRD(the K, in the teacher's order; the L)

with rrd.py's loss, each a mean over its places. The authors rank the whole catalogue of each user
once an epoch, O(users x items); here the ranks are those of the step, among candidates that it
scores anyway. Their third term, the same of each item's users, needs a teacher that ranks users.

Needs: lists whose unlisted items rank below. Fits every backbone. Costs: P + M candidates a list;
with P + M even, on the fast path of dot products.

Shape letters: G lists, P listed candidates, M unlisted ones, C = P + M.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.config import DCDConfig, RunConfig
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.lists import (
    NO_SCORE,
    ListDraw,
    ListGuidance,
    drawn_by_weight,
    ranks_among,
)
from slgr_jax.guidance.rrd import relaxed_ranking_terms
from slgr_jax.models.backbones import AnyBackbone

_LEAST = 1e-5  # weight of a listed item that is not ranked too low


def error_weights(
    errors: Float[Array, "G N"], temperature: float, least: float = 0.0
) -> Float[Array, "G N"]:
    """max(least, tanh(max(0, errors in ranks / temperature)))."""
    return jnp.maximum(jnp.tanh(jnp.maximum(errors / temperature, 0.0)), least)


class DualCorrection(ListGuidance):
    """See the module's docstring."""

    chooses = True

    @property
    def knobs(self) -> DCDConfig:
        """Its section."""
        return self.run.dcd

    @property
    def interesting(self) -> int:
        return self.knobs.listed_pool

    @property
    def uninteresting(self) -> int:
        return self.knobs.unlisted_pool

    def corrected(
        self, scores: Float[Array, "G C"], drawn: ListDraw
    ) -> tuple[Bool[Array, "G P"], Bool[Array, "G M"]]:
        """Which listed items are underestimated, which unlisted ones overestimated, as drawn."""
        assert drawn.noise is not None
        knobs, listed = self.knobs, drawn.listed
        ranks = ranks_among(*self.split(scores), listed)
        of_listed, of_unlisted = self.split(ranks)
        places = jnp.arange(1.0, self.interesting + 1)
        below_the_list = jnp.sum(listed, axis=1, keepdims=True) + 1.0

        too_low = error_weights(of_listed - places[None], knobs.temperature, _LEAST)
        too_high = error_weights(below_the_list - of_unlisted, knobs.temperature)
        for_listed, for_unlisted = self.split(drawn.noise)
        return (
            drawn_by_weight(_log(too_low, listed), for_listed, knobs.interesting),
            drawn_by_weight(_log(too_high, too_high > 0), for_unlisted, knobs.uninteresting),
        )

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G P"]:
        listed_scores, unlisted_scores = self.split(scores)
        low, high = self.corrected(scores, drawn)
        terms = relaxed_ranking_terms(
            listed_scores, jnp.where(high, unlisted_scores, NO_SCORE), low
        )
        terms *= self.interesting / self.knobs.interesting  # a mean over those drawn
        if self.knobs.relaxed:
            terms += relaxed_ranking_terms(listed_scores, unlisted_scores, drawn.listed)
        return terms


def _log(weights: Float[Array, "G N"], possible: Bool[Array, "G N"]) -> Float[Array, "G N"]:
    return jnp.where(possible, jnp.log(jnp.where(possible, weights, 1.0)), NO_SCORE)


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> DualCorrection:
    """The dual correction distillation of a run."""
    return DualCorrection(run, Gating(run, reference_backbones, native), native)
