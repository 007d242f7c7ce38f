"""Collaborative distillation: soft labels of listed items, drawn by rank.

Lee et al. 2019, "Collaborative distillation for top-N recommendation" (ICDM, arXiv 1911.05276). Of
a user's list K items are drawn without replacement,

    P(item) ~ exp(-rank / T)
    t       = sigmoid((z + T2) / T1),   z the teacher's score
    loss    = 1/K sum -t log sigmoid(y) - (1 - t) log(1 - sigmoid(y))

with the ranks of the recommender (`student`, which the authors report to be better) or of the
teacher. The authors rank all items that a user has not got once an epoch; here the recommender
ranks, at the step, the first --cd_pool places of the list among themselves and L unlisted items.
They draw from the whole catalogue, which their teacher scores; an LLM's scores end with its list,
so items are drawn from the list alone.

Needs: lists with scores, whose unlisted items rank below. z is on the scale of a logit: with scores
within 0 and 1 lower --cd_softness. Fits every backbone. Costs: pool + L candidates a list; with an
even number of them, on the fast path of dot products.

Shape letters: G lists, P places of the pool, C = P + L candidates, S steps drawn at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.config import CDConfig, RunConfig
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.lists import (
    NO_SCORE,
    ListDraw,
    ListGuidance,
    drawn_by_weight,
    ranks_among,
)
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.sampling.teacher_arrays import TeacherLists


def soft_labels(scores: Float[Array, "..."], softness: float, shift: float) -> Float[Array, "..."]:
    """t of the module's docstring, with T1 the softness and T2 the shift."""
    return jax.nn.sigmoid((scores + shift) / softness)


class CollaborativeDistillation(ListGuidance):
    """See the module's docstring."""

    chooses = True

    @property
    def knobs(self) -> CDConfig:
        """Its section."""
        return self.run.cd

    @property
    def interesting(self) -> int:
        return self.knobs.pool

    @property
    def uninteresting(self) -> int:
        return self.knobs.samples

    def targets(
        self, scores: Float[Array, "S G P"], teacher: TeacherLists
    ) -> Float[Array, "S G P"]:
        return soft_labels(scores, self.knobs.softness, self.knobs.shift)

    def chosen(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Bool[Array, "G P"]:
        """The items of a step."""
        assert drawn.noise is not None
        ranks = jnp.broadcast_to(jnp.arange(1.0, self.interesting + 1), drawn.listed.shape)
        if self.knobs.ranks == "student":
            ranks = ranks_among(*self.split(scores), drawn.listed)[:, : self.interesting]
        log_weights = jnp.where(drawn.listed, -ranks / self.knobs.temperature, NO_SCORE)
        return drawn_by_weight(log_weights, drawn.noise[:, : self.interesting], self.knobs.items)

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G P"]:
        terms = losses.binary_cross_entropy(scores[:, : self.interesting], drawn.targets)
        share = self.interesting / self.knobs.items  # of places that are drawn: a mean over these
        return jnp.where(self.chosen(scores, drawn), share * terms, 0.0)


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> CollaborativeDistillation:
    """The collaborative distillation of a run."""
    return CollaborativeDistillation(run, Gating(run, reference_backbones, native), native)
