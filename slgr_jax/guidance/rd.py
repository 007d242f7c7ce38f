"""Ranking distillation: the first items of a teacher's list as positives, weighed by place.

    l_k = -w_k log sigmoid(y_k),   summed over the first K places of a list

Two methods of which only the weights differ; none of them carries a gradient.

RD (Tang & Wang 2018, KDD, arXiv 1809.07428), `RankingDistillation`, with r_k = k from 1 on and s_k
where the recommender ranks the item:

    w_k = a_k b_k,   a_k = exp(-r_k / lambda) / sum_j exp(-r_j / lambda)
                     b_k = tanh(max(0, mu (s_k - r_k)))

DLLM2Rec's ranking part (Cui et al. 2024, RecSys, arXiv 2405.00338), `ImportanceAware`:

    w_k ~ g_p p_k + g_c c_k + g_o o_k, with sum 1
    p_k = exp(-r_k / beta) / sum_j ...      position
    c_k = exp(t_k) / sum_j ...              confidence, t_k the teacher's score, scaled to [0, 1]
    o_k = 1 where s_k <= K, else 0          consistency

s_k is estimated at the step (`lists.estimated_ranks`), so it is no finer than n / L of n unlisted
items. RD's authors use b after some epochs only, for early ranks are noise; they are then about
half the catalogue, where b is 1. The authors of DLLM2Rec take a text's distance d for confidence,
exp(-d); with d = 1 - t it is c_k. Of DLLM2Rec the item vectors are no part of a guidance
(--item_vectors), and its DROS term is not here.

Needs: lists whose unlisted items rank below. Fits every backbone. Costs: K + L candidates a list,
of which L are scored for the ranks alone; with K + L even, on the fast path of dot products.

Shape letters: G lists, K listed items, C candidates, S steps drawn at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.config import DLLM2RecConfig, RDConfig, RunConfig
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.lists import NO_SCORE, ListDraw, ListGuidance, estimated_ranks
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.sampling.teacher_arrays import TeacherLists


def place_ranks(listed: Bool[Array, "G K"]) -> Float[Array, "G K"]:
    """The teacher's ranks: 1, 2, ..."""
    return jnp.broadcast_to(jnp.arange(1.0, listed.shape[1] + 1), listed.shape)


def position_weights(listed: Bool[Array, "G K"], temperature: float) -> Float[Array, "G K"]:
    """exp(-rank / temperature) over its sum; 0 at places that a list lacks."""
    ranks = jnp.where(listed, -place_ranks(listed) / temperature, NO_SCORE)
    return jnp.where(listed, jax.nn.softmax(ranks, axis=1), 0.0)


def discrepancy_weights(
    student_ranks: Float[Array, "G K"], teacher_ranks: Float[Array, "G K"], mu: float
) -> Float[Array, "G K"]:
    """tanh(max(0, mu (s - r))): 0 where the recommender ranks an item as high as the teacher."""
    return jnp.tanh(jnp.maximum(0.0, mu * (student_ranks - teacher_ranks)))


def importance_weights(
    listed: Bool[Array, "G K"],
    confidence: Float[Array, "G K"],
    consistent: Bool[Array, "G K"],
    knobs: DLLM2RecConfig,
) -> Float[Array, "G K"]:
    """DLLM2Rec's w of the module's docstring.

    Args:
      confidence: t, the logarithm of a place's confidence.
      consistent: where the item is among the recommender's first K.
    """
    position = position_weights(listed, knobs.temperature)
    of_score = jax.nn.softmax(jnp.where(listed, confidence, NO_SCORE), axis=1)
    mixed = knobs.position * position + knobs.confidence * of_score
    mixed = jnp.where(listed, mixed + knobs.consistency * consistent, 0.0)
    total = jnp.sum(mixed, axis=1, keepdims=True)
    return mixed / jnp.where(total > 0, total, 1.0)


class _Positives(ListGuidance):
    """-w log sigmoid(y); a subclass has `knobs` and `weights`."""

    @property
    def knobs(self) -> RDConfig | DLLM2RecConfig:
        """Its section."""
        raise NotImplementedError

    @property
    def interesting(self) -> int:
        return self.knobs.places

    @property
    def uninteresting(self) -> int:
        return self.knobs.samples

    def weights(self, drawn: ListDraw, student_ranks: Float[Array, "G K"]) -> Float[Array, "G K"]:
        """w of the module's docstring."""
        raise NotImplementedError

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G K"]:
        listed_scores, unlisted_scores = self.split(scores)
        ranks = estimated_ranks(
            listed_scores, listed_scores, drawn.listed, unlisted_scores, drawn.unlisted
        )
        # The mean over places, times K, is the sum of the method.
        return self.interesting * self.weights(drawn, ranks) * jax.nn.softplus(-listed_scores)


class RankingDistillation(_Positives):
    """RD; see the module's docstring."""

    @property
    def knobs(self) -> RDConfig:
        """Its section."""
        return self.run.rd

    def weights(self, drawn: ListDraw, student_ranks: Float[Array, "G K"]) -> Float[Array, "G K"]:
        weights = position_weights(drawn.listed, self.knobs.position)
        if self.knobs.discrepancy > 0:
            weights *= discrepancy_weights(
                student_ranks, place_ranks(drawn.listed), self.knobs.discrepancy
            )
        return weights


class ImportanceAware(_Positives):
    """DLLM2Rec's ranking part; see the module's docstring."""

    @property
    def knobs(self) -> DLLM2RecConfig:
        """Its section."""
        return self.run.dllm2rec

    def targets(
        self, scores: Float[Array, "S G K"], teacher: TeacherLists
    ) -> Float[Array, "S G K"]:
        return (scores - teacher.floor) / max(teacher.ceiling - teacher.floor, 1e-12)

    def weights(self, drawn: ListDraw, student_ranks: Float[Array, "G K"]) -> Float[Array, "G K"]:
        consistent = student_ranks <= self.interesting
        return importance_weights(drawn.listed, drawn.targets, consistent, self.knobs)


def make_rd(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> RankingDistillation:
    """The ranking distillation of a run."""
    return RankingDistillation(run, Gating(run, reference_backbones, native), native)


def make_dllm2rec(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> ImportanceAware:
    """DLLM2Rec's ranking distillation of a run."""
    return ImportanceAware(run, Gating(run, reference_backbones, native), native)
