"""Pointwise guidance: alpha * (sigmoid(s) - t)^2, t the teacher's score scaled to [0, 1].

S-LLMR (arXiv 2512.21526) table 3, "LLM pointwise MSE", which believes everything (--gate=constant,
the default here). Items are drawn two of a user at a time, so that any gate can weigh them: alpha
of the pair says whether the teacher orders it rightly.

Needs: a teacher's scores or lists. Fits every backbone. Costs: two candidates a pair, on the fast
path of dot products.

Shape letters: G pairs of scored items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig
from slgr_jax.guidance.base import GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated, GatedArrays
from slgr_jax.guidance.gating import Gating, Observed
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.context import Histories
from slgr_jax.sampling.labelled_preferences import LabelledPreferences
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.preferences import (
    Preferences,
    at_the_end_of_training,
    draw_scored,
    lane_weights,
    pair_facts,
)
from slgr_jax.sampling.teacher_arrays import TeacherLists


@struct.dataclass
class PointwiseDraw:
    """Pairs of scored items, and what supervises the gate.

    Attributes:
      pairs: the item with the greater score first, as a gate reads it.
      targets: [G, 2] the teacher's scores of both, scaled to [0, 1].
    """

    pairs: Preferences
    targets: Float[Array, "*G 2"]
    labelled: LabelledPreferences | None


def squared_errors(scores: Float[Array, "G 2"], targets: Float[Array, "G 2"]) -> Float[Array, "G"]:
    """(sigmoid(s) - t)^2, the mean of both items."""
    return jnp.mean(jnp.square(jax.nn.sigmoid(scores) - targets), axis=1)


class Pointwise(Gated):
    """See the module's docstring."""

    width = 2
    draws_entries = True

    @property
    def queries(self) -> int:
        return self.run.preferences_per_step

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        return self.scored_lists(sources)

    def draw(
        self,
        words_of: Generators,
        arrays: GatedArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> PointwiseDraw:
        teacher = arrays.teacher
        assert isinstance(teacher, TeacherLists)
        users, items, targets, entries = draw_scored(
            words_of.own, teacher, self.queries, native=self.native
        )

        # A gate is asked about (preferred, other).
        swapped = (targets[..., 0] < targets[..., 1])[..., None]
        items = jnp.where(swapped, items[..., ::-1], items)
        entries = jnp.where(swapped, entries[..., ::-1], entries)
        targets = jnp.where(swapped, targets[..., ::-1], targets)
        margins = (targets[..., 0] - targets[..., 1]) * (teacher.ceiling - teacher.floor)

        pairs = Preferences(
            at_the_end_of_training(users, histories),
            items,
            margins,
            pair_facts(interactions.facts, users, items, native=self.native),
            entries,
            lane_weights(teacher.share, users),
        )
        return PointwiseDraw(
            self.as_asked(pairs, arrays),
            targets,
            self.draw_labelled(words_of, arrays, interactions.facts, histories),
        )

    def candidates(self, drawn: PointwiseDraw) -> Candidates:
        return Candidates(drawn.pairs.queries, drawn.pairs.items)

    def errors(
        self, scores: Float[Array, "G 2"], targets: Float[Array, "G 2"]
    ) -> Float[Array, "G"]:
        """The loss of each pair of items, believed."""
        return squared_errors(scores, targets)

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: PointwiseDraw,
        observed: Observed,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        alpha, _ = self.believe(params, scored.scores, scored.stochastic, drawn, observed, key)
        terms = alpha * self.errors(scored.scores, drawn.targets)
        scores = jax.lax.stop_gradient(scored.scores)
        agrees = (scores[:, 0] > scores[:, 1]) & (drawn.targets[:, 0] > drawn.targets[:, 1])
        return self.added(params, terms, alpha, agrees, drawn, observed, layout)


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> Pointwise:
    """The pointwise guidance of a run."""
    return Pointwise(run, Gating(run, reference_backbones, native), native)
