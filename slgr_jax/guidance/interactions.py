"""Pseudo-interactions: alpha * w * the recommendation loss of (u, i) as if u had taken i.

    bpr, softmax   alpha w -log sigmoid(s_ui - s_uj)
    bce            alpha w 1/2 (-log sigmoid(s_ui) - log sigmoid(-s_uj))
    bce of rows    alpha w -log sigmoid(s_ui)          (--rating_threshold: one item a row)

with (u, i) drawn uniformly from a product (teacher/products/pseudo_interactions.py), w its weight,
and j an item outside the user's training items and pseudo-interactions. A softmax over two items
is BPR, which stands for it: no other item is scored. The mean over G of them is added lambda
times, so lambda = 0.1 is a share of a tenth as LLMRec (WSDM 2024) adds it to a batch of BPR, and
ColdLLM (WSDM 2025) retrains with about lambda = (its pairs) / (training pairs).

They are drawn as pairs (i, j), so any gate weighs them: alpha of a calibrated gate is how likely
it is that the user takes i rather than j. They are no training interactions: popularity, cold and
tail, negatives of triples and evaluation know nothing of them. With --interactions_edges they are
edges of LightGCN's graph.

Needs: pseudo-interactions, or lists whose unlisted items rank below. Fits every backbone; a
sequence model predicts i from all of the user's history. Costs: two candidates each, on the fast
path of dot products.

Shape letters: G pseudo-interactions; the axis of length 2 is (taken, other).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError
from slgr_jax.guidance import teacher_product
from slgr_jax.guidance.base import GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated, GatedArrays, GatedDraw
from slgr_jax.guidance.gating import Gating, Observed
from slgr_jax.mesh import Layout
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling import user_shards
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.context import GRAPH, Context, Histories, make_graph
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.preferences import draw_preferences
from slgr_jax.sampling.teacher_arrays import PreferenceRule, TeacherLists, teacher_lists
from slgr_jax.teacher.products import pseudo_interactions
from slgr_jax.teacher.products.pseudo_interactions import Pseudo


@struct.dataclass
class PseudoArrays(GatedArrays):
    """`teacher` has the pseudo-interactions as lists; `weighted`: its scores are weights."""

    weighted: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class PseudoDraw(GatedDraw):
    """What S steps train on; `taken` is [G] the weight w of each."""

    taken: Float[Array, "*G"] = struct.field(kw_only=True)


def row_loss(scores: Float[Array, "G 2"], loss: str, *, rows: bool) -> Float[Array, "G"]:
    """The recommendation loss of each, see the module's docstring.

    Args:
      loss: of `config.LOSSES`, resolved; rows: whether the objective learns one item a row.
    """
    if loss != "bce":
        return losses.bpr(losses.difference(scores))
    of_taken = losses.binary_cross_entropy(scores[:, 0], jnp.ones_like(scores[:, 0]))
    if rows:
        return of_taken
    of_other = losses.binary_cross_entropy(scores[:, 1], jnp.zeros_like(scores[:, 1]))
    return 0.5 * (of_taken + of_other)


def product(run: RunConfig, dataset: Dataset) -> Pseudo:
    """The pseudo-interactions of a run, of the users whose interactions `dataset` has.

    Raises:
      ManifestError, ShardError, InputError: the product does not fit, is damaged, or states none.
    """
    teacher = teacher_product.load(run, dataset)
    pseudo = pseudo_interactions.of_teacher(
        dataset, teacher, run.interactions.places, knob="--guidance=interactions"
    )
    if not user_shards.total(pseudo.items.size, dataset):
        raise InputError(
            f"--guidance=interactions: teacher {run.guidance.teacher!r} names nothing outside its "
            "users' own training items"
        )
    return pseudo


def with_edges(
    run: RunConfig, dataset: Dataset, backbone: AnyBackbone, context: Context
) -> Context:
    """The context (host arrays) with pseudo-interactions as edges, where the run has them so.

    Raises:
      UserError: as `product`.
    """
    if not run.adds_edges or GRAPH not in backbone.reads:
        return context
    trained, pseudo = dataset.positives(("train",)), product(run, dataset)
    owners = np.repeat(np.arange(dataset.n_users), np.diff(pseudo.offsets))
    edges = Csr.from_pairs(
        np.concatenate([trained.owners(), owners]),
        np.concatenate([trained.indices, pseudo.items]),
        dataset.n_users,
    )
    return dataclasses.replace(context, graph=make_graph(edges, dataset.n_items))


def _as_lists(pseudo: Pseudo, run: RunConfig, dataset: Dataset) -> TeacherLists:
    """Each user's pseudo-interactions as a list, above every item that is no training item."""
    return teacher_lists(
        pseudo.offsets,
        pseudo.items,
        pseudo.scores,
        min_gap=0.0,
        unlisted_share=1.0,
        unlisted_below=True,
        positives=dataset.positives(("train",)),
        n_items=dataset.n_items,
        of_all=teacher_product.of_all(run, pseudo.scores),
    )


class PseudoInteractions(Gated):
    """See the module's docstring."""

    width = 2
    draws_entries = True

    @property
    def queries(self) -> int:
        return self.run.preferences_per_step

    @property
    def rule(self) -> PreferenceRule:
        """Always a listed item over an unlisted one, each listed item as likely as another."""
        return PreferenceRule(
            count=self.queries,
            together=self.run.sampler.triples_per_user,
            native=self.native,
        )

    def teacher_arrays(self, sources: Sources) -> TeacherLists:
        pseudo = product(self.run, sources.dataset)
        return _as_lists(pseudo, self.run, sources.dataset)

    def arrays(self, sources: Sources) -> tuple[PseudoArrays, Csr | None]:
        pseudo = product(self.run, sources.dataset)
        teacher = _as_lists(pseudo, self.run, sources.dataset)
        gate, left_out = self.gating.arrays(sources, teacher, entries=self.draws_entries)
        return PseudoArrays(teacher, gate, pseudo.weighted), left_out

    def draw(
        self,
        words_of: Generators,
        arrays: PseudoArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> PseudoDraw:
        teacher = arrays.teacher
        assert isinstance(teacher, TeacherLists)
        drawn = draw_preferences(words_of, teacher, interactions.facts, histories, self.rule)
        assert drawn.entries is not None
        weights = jnp.ones(drawn.margins.shape, jnp.float32)
        if arrays.weighted:
            weights = teacher.scores[drawn.entries[..., 0]]
        return PseudoDraw(
            self.as_asked(drawn, arrays),
            self.draw_labelled(words_of, arrays, interactions.facts, histories),
            taken=weights,
        )

    def candidates(self, drawn: PseudoDraw) -> Candidates:
        return Candidates(drawn.pairs.queries, drawn.pairs.items)

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: PseudoDraw,
        observed: Observed,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        alpha, _ = self.believe(params, scored.scores, scored.stochastic, drawn, observed, key)
        rows = bool(self.run.loss.rating_threshold)
        each = row_loss(scored.scores, self.run.loss_name, rows=rows)
        scores = jax.lax.stop_gradient(scored.scores)
        agrees = scores[:, 0] > scores[:, 1]
        return self.added(
            params, alpha * drawn.taken * each, alpha, agrees, drawn, observed, layout
        )


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> PseudoInteractions:
    """The pseudo-interactions of a run."""
    return PseudoInteractions(run, Gating(run, reference_backbones, native), native)
