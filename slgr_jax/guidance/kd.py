"""Knowledge distillation with soft labels: alpha * cross-entropy(t, sigmoid(s)).

Hinton et al. 2015 (arXiv 1503.02531) for two classes, as LLM-CF (CIKM 2024) and S-LLMR (arXiv
2512.21526) have it as a baseline, with t the teacher's probability that the user likes the item:

    t = sigmoid(logit(P) / T),   P the teacher's score as --kd_scores reads it
    loss = -t log sigmoid(s) - (1 - t) log(1 - sigmoid(s)),   a mean over the items drawn

It is drawn and weighed as pointwise guidance is, two items of a user at a time. LLM-CF scores each
row of the training data, here it is any item that the teacher scored.

Needs: a teacher's scores or lists. Fits every backbone. Costs: two candidates a pair, on the fast
path of dot products.

Shape letters: G pairs of scored items.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.base import Sources
from slgr_jax.guidance.gated import GatedArrays
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.pointwise import Pointwise, PointwiseDraw
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.context import Histories
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.teacher_arrays import TeacherLists


def soft_labels(
    scaled: Float[Array, "..."], floor: float, ceiling: float, scores: str, temperature: float
) -> Float[Array, "..."]:
    """t of the module's docstring.

    Args:
      scaled: the teacher's scores, (score - floor) / (ceiling - floor).
      scores: as --kd_scores.
    """
    score = floor + scaled * (ceiling - floor)
    if scores == "logit":
        return jax.nn.sigmoid(score / temperature)
    probability = scaled if scores == "scaled" else score
    if temperature == 1.0:
        return probability
    return jax.nn.sigmoid((jnp.log(probability) - jnp.log1p(-probability)) / temperature)


class SoftLabels(Pointwise):
    """See the module's docstring."""

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        teacher = super().teacher_arrays(sources)
        scores, floor, ceiling = self.run.kd.scores, teacher.floor, teacher.ceiling
        if scores == "probability" and not 0 <= floor <= ceiling <= 1:
            raise ConfigError(
                f"--kd_scores=probability, and scores of teacher {self.run.guidance.teacher} go "
                f"from {floor:g} to {ceiling:g}; use --kd_scores=logit or scaled"
            )
        return teacher

    def draw(
        self,
        words_of: Generators,
        arrays: GatedArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> PointwiseDraw:
        drawn, teacher = super().draw(words_of, arrays, interactions, histories), arrays.teacher
        assert isinstance(teacher, TeacherLists)
        knobs = self.run.kd
        targets = soft_labels(
            drawn.targets, teacher.floor, teacher.ceiling, knobs.scores, knobs.temperature
        )
        return dataclasses.replace(drawn, targets=targets)

    def errors(
        self, scores: Float[Array, "G 2"], targets: Float[Array, "G 2"]
    ) -> Float[Array, "G"]:
        return jnp.mean(losses.binary_cross_entropy(scores, targets), axis=1)


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> SoftLabels:
    """The soft-label distillation of a run."""
    return SoftLabels(run, Gating(run, reference_backbones, native), native)
