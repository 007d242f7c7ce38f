"""Gated pairwise guidance: alpha * pair(s_ua - s_ub) on the teacher's preferences.

S-LLMR (arXiv 2512.21526) sections 3.2 and 3.3: L_LLM = sum alpha_uab * max(0, m - (s_ua - s_ub)),
here a mean over preferences, so that lambda does not depend on how many are drawn. With
--gate=constant it is global pairwise distillation.

Needs: a teacher's scores, lists or pairs. Fits every backbone. Costs: two candidates a preference,
on the fast path of dot products.

Shape letters: G preferences; the axis of length 2 is (preferred item, other item).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from slgr_jax.config import RunConfig
from slgr_jax.guidance import pair_losses
from slgr_jax.guidance.base import GuidanceLoss, Scored, mean_over_queries
from slgr_jax.guidance.gated import Gated, GatedArrays, GatedDraw
from slgr_jax.guidance.gating import Gating, Observed
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.context import Histories
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.preferences import draw_preferences


class Pairwise(Gated):
    """See the module's docstring."""

    width = 2
    draws_entries = True

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Where a preference's weight is not alpha, its mean is told too."""
        weighed = self.run.guidance_loss_name in ("confidence", "gain")
        return (*Gated.metrics, "weight") if weighed else Gated.metrics

    @property
    def queries(self) -> int:
        return self.run.preferences_per_step

    def draw(
        self,
        words_of: Generators,
        arrays: GatedArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> GatedDraw:
        preferences = draw_preferences(
            words_of, arrays.teacher, interactions.facts, histories, self.rule
        )
        return GatedDraw(
            self.as_asked(preferences, arrays),
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
        alpha, prior = self.believe(params, scored.scores, scored.stochastic, drawn, observed, key)
        assert scored.differences is not None
        pair_loss = pair_losses.pair_loss(self.run.guidance_loss_name, self.run.pairwise.margin)
        terms = pair_loss(scored.differences, alpha, prior)
        agrees = jax.lax.stop_gradient(scored.differences) > 0
        added = self.added(params, terms, alpha, agrees, drawn, observed, layout)
        if "weight" not in self.metrics:
            return added
        weights = pair_losses.weight(self.run.guidance_loss_name, alpha, prior)
        weight = mean_over_queries(weights, layout)
        return added._replace(metrics={**added.metrics, "weight": weight})


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> Pairwise:
    """The pairwise guidance of a run."""
    return Pairwise(run, Gating(run, reference_backbones, native), native)
