"""What a step learns from interactions: which rows that needs, and the loss.

An objective is chosen once, by the backbone and --loss (`make_objective`). It states its `reads`,
those of a guidance among them, and from a view of them gives the recommendation loss of the batch
and the scores of the guidance's candidates.

  Triples         a positive and its negatives as candidates of one query; BPR or binary
                  cross-entropy. Any backbone that scores candidates.
  LabelledItems   one item with a label; binary cross-entropy.
  Softmax         the positive against the whole catalogue, or a drawn part of it that the batch
                  shares. Backbones that are a dot product.
  Windows         every place of a history predicts the next event (or a masked one), by any of
                  these losses. Sequence backbones.

Shape letters: B triples, rows or windows, C items of one, G queries of a guidance, L places of a
window, T predicted places of a window, N shared negatives, E width of a state.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.guidance.base import Guidance
from slgr_jax.mesh import Layout
from slgr_jax.models import losses
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.base import (
    USER,
    AnyBackbone,
    DotBackbone,
    Dropout,
    FactorModel,
    FusesUsers,
    Ids,
    Params,
    SequenceBackbone,
    dots,
    feature_tables,
    item_tables,
)
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads, View
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import Context, at_interactions, recent, window_weights
from slgr_jax.sampling.negatives import SamplingPlan
from slgr_jax.training.dropping import Dropped
from slgr_jax.training.score_rings import NewScores, Rings

GUIDANCE, BOTH, TRIPLES = "guidance", "triples and guidance", "triples"


@struct.dataclass
class Learned:
    """The recommendation loss of this device's part of a batch, as sums over what is predicted.

    Attributes:
      loss: [] sum of the losses.
      right: [] how many positives score above their negatives (rows: on the right side of 0).
      count: [] how many there are.
      counts: more that a step reports, by name of `Objective.metrics`.
      new_scores: what is remembered of the batch's scores; None: nothing.
    """

    loss: Float[Array, ""]
    right: Float[Array, ""]
    count: Float[Array, ""]
    counts: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)
    new_scores: NewScores | None = None


class Guided(NamedTuple):
    """What a step's pass says of a guidance's candidates.

    Attributes:
      scores: [G, C] logits.
      differences: [G] s_0 - s_1 where C is 2; None otherwise.
    """

    scores: Float[Array, "G C"]
    differences: Float[Array, "G"] | None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every objective's loss is a function of, besides the view."""

    batch: Batch
    context: Context
    interactions: Interactions
    params: Params
    dropout: float
    negatives: int  # of each positive
    key: jax.Array
    step: Int[Array, ""]
    candidates: Candidates | None = None  # of a guidance
    rings: Rings | None = None  # of scores that are remembered

    def pass_(self, number: int) -> Dropout:
        """Dropout of the step's pass `number`; None where the backbone has none."""
        return (self.dropout, jax.random.fold_in(self.key, number)) if self.dropout > 0 else None


class Objective(Protocol):
    """One way to learn from interactions; see the module's docstring."""

    def reads(self, batch: Batch, context: Context, candidates: Candidates | None) -> Reads:
        """What `learn` needs of the tables, and what scoring a guidance's candidates does."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of `Learned.counts`."""
        ...

    @property
    def penalised(self) -> tuple[str, ...]:
        """Names in `reads` whose rows the L2 penalty is on."""
        ...

    def learn(self, view: View, inputs: Inputs) -> Learned:
        """The recommendation loss."""
        ...

    def guided(self, view: View, inputs: Inputs) -> Guided:
        """A guidance's candidates in the training pass."""
        ...


def _metrics(dropped: Dropped | None) -> tuple[str, ...]:
    return () if dropped is None else dropped.metrics


def _left(
    dropped: Dropped | None,
    inputs: Inputs,
    scores: Float[Array, "B C"],
    loss: Float[Array, "B"],
    right: Float[Array, "B"],
) -> Learned:
    """The sums over a batch's triples or rows, without those that are dropped."""
    weights = inputs.batch.weights
    counts: dict[str, jax.Array] = {}
    new_scores = None
    if dropped is not None:
        said = inputs.interactions.scored
        left = dropped.weights(scores, loss, inputs.batch, said, inputs.rings, inputs.step)
        weights, counts, new_scores = left
    return Learned(
        losses.masked_sum(loss, weights),
        losses.masked_sum(right, weights),
        jnp.sum(weights),
        counts,
        new_scores,
    )


def _guided(scores: Float[Array, "G C"]) -> Guided:
    return Guided(scores, losses.difference(scores) if scores.shape[1] == 2 else None)


def _apart(candidates: Candidates | None) -> dict[str, Candidates]:
    """A guidance's candidates as a group of their own."""
    return {} if candidates is None else {GUIDANCE: candidates}


def _at_interactions(candidates: Candidates, context: Context) -> Candidates:
    return Candidates(at_interactions(context, candidates.queries), candidates.items)


def _as_pairs(candidates: Candidates) -> Candidates:
    """[G, C] candidates as [G * C / 2, 2]: queries are repeated, one after the other."""
    pairs = candidates.items.shape[1] // 2
    if pairs == 1:
        return candidates
    queries = jax.tree.map(lambda x: jnp.repeat(x, pairs, axis=0), candidates.queries)
    return Candidates(queries, candidates.items.reshape(-1, 2))


@dataclasses.dataclass(frozen=True)
class Triples:
    """-log sigmoid(s_ui - s_uj), or binary cross-entropy of positive and negatives as rows.

    With one negative, triples and a guidance's pairs of candidates have the same shape and are
    scored in one pass (`merged`).
    """

    pair_loss: str  # bpr | bce
    merged: bool
    dropped: Dropped | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return _metrics(self.dropped)

    @property
    def penalised(self) -> tuple[str, ...]:
        return (BOTH,) if self.merged else (TRIPLES,)

    def reads(self, batch: Batch, context: Context, candidates: Candidates | None) -> Reads:
        triples = Candidates(batch.queries, batch.items)
        if not self.merged:
            return Reads({TRIPLES: triples, **_apart(candidates)}, {})
        if candidates is None:
            return Reads({BOTH: triples}, {})
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]),
            _at_interactions(triples, context),
            _as_pairs(_at_interactions(candidates, context)),
        )
        return Reads({BOTH: both}, {})

    def _merged(self, view: View, inputs: Inputs) -> tuple[Guided, Guided]:
        """Of triples and of a guidance. Split last, so that gradients meet by concatenation."""
        scores = view.scores(BOTH, inputs.pass_(0))
        differences = losses.difference(scores)
        triples = inputs.batch.items.shape[0]
        sizes = (triples, scores.shape[0] - triples)
        (of_triples, others), (triple_differences, other_differences) = (
            jax.lax.split(x, sizes) for x in (scores, differences)
        )
        if inputs.candidates is None or inputs.candidates.items.shape[1] == 2:
            return Guided(of_triples, triple_differences), Guided(others, other_differences)
        others = others.reshape(inputs.candidates.items.shape)
        return Guided(of_triples, triple_differences), Guided(others, None)

    def learn(self, view: View, inputs: Inputs) -> Learned:
        if self.merged:
            triples, _ = self._merged(view, inputs)
            assert triples.differences is not None
            scores, differences = triples.scores, triples.differences[:, None]
        else:
            scores = view.scores(TRIPLES, inputs.pass_(0))
            differences = scores[:, :1] - scores[:, 1:]
        right = jnp.mean((differences > 0).astype(jnp.float32), axis=1)
        if self.pair_loss == "bpr":
            loss = jnp.mean(losses.bpr(differences), axis=1)
        else:
            labels = jnp.zeros_like(scores).at[:, 0].set(1.0)
            loss = jnp.mean(losses.binary_cross_entropy(scores, labels), axis=1)
        return _left(self.dropped, inputs, scores, loss, right)

    def guided(self, view: View, inputs: Inputs) -> Guided:
        if not self.merged:
            return _guided(view.scores(GUIDANCE, inputs.pass_(1)))
        return self._merged(view, inputs)[1]


@dataclasses.dataclass(frozen=True)
class LabelledItems:
    """Binary cross-entropy of one item with its label."""

    dropped: Dropped | None = None
    penalised = (TRIPLES,)

    @property
    def metrics(self) -> tuple[str, ...]:
        return _metrics(self.dropped)

    def reads(self, batch: Batch, context: Context, candidates: Candidates | None) -> Reads:
        rows = Candidates(batch.queries, batch.items)
        return Reads({TRIPLES: rows, **_apart(candidates)}, {})

    def learn(self, view: View, inputs: Inputs) -> Learned:
        scores, batch = view.scores(TRIPLES, inputs.pass_(0))[:, 0], inputs.batch
        assert batch.labels is not None
        right = ((scores > 0) == (batch.labels > 0.5)).astype(jnp.float32)
        loss = losses.binary_cross_entropy(scores, batch.labels)
        return _left(self.dropped, inputs, scores[:, None], loss, right)

    def guided(self, view: View, inputs: Inputs) -> Guided:
        return _guided(view.scores(GUIDANCE, inputs.pass_(1)))


@dataclasses.dataclass(frozen=True)
class _Catalogue:
    """Softmax over every item, or over the negatives that a step shares."""

    backbone: DotBackbone
    plan: SamplingPlan

    def reads(self, batch: Batch, context: Context) -> tuple[dict[str, Ids], frozenset[str]]:
        """Rows by name, and whole tables."""
        if batch.shared is None:
            return {}, item_tables(self.backbone, context)
        return {"shared": self.backbone.item_ids(context, batch.shared)}, frozenset()

    def learn(
        self,
        view: View,
        inputs: Inputs,
        states: Float[Array, "M E"],
        positives: Float[Array, "M E"],
        targets: Int[Array, "M"],
        weights: Float[Array, "M"],
    ) -> Learned:
        """The loss of places with a state, a target item and its vector each."""
        backbone, shared = self.backbone, inputs.batch.shared
        count = jnp.sum(weights)
        if shared is None:
            names = item_tables(backbone, inputs.context)
            vectors = backbone.item_vectors(
                inputs.params, {name: view.table(name) for name in names}
            )
            loss, right = losses.softmax_cross_entropy(states, vectors, targets, weights)
            return Learned(loss, right, count)
        negatives = backbone.item_vectors(inputs.params, view.rows("shared"))
        expected = batch_lib.shared_log_expected(shared, inputs.interactions, self.plan)
        each, first = losses.sampled_softmax_cross_entropy(
            states, positives, negatives, targets, shared, expected
        )
        return Learned(losses.masked_sum(each, weights), losses.masked_sum(first, weights), count)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The positive of each query against the catalogue."""

    backbone: DotBackbone
    catalogue: _Catalogue
    penalised = ("query", "item")
    metrics: tuple[str, ...] = ()

    def reads(self, batch: Batch, context: Context, candidates: Candidates | None) -> Reads:
        rows, whole = self.catalogue.reads(batch, context)
        rows["query"] = self.backbone.query_ids(context, batch.queries)
        rows["item"] = self.backbone.item_ids(context, batch.items[:, 0])
        return Reads(_apart(candidates), rows, whole)

    def learn(self, view: View, inputs: Inputs) -> Learned:
        backbone, batch = self.backbone, inputs.batch
        states = backbone.query_vectors(
            inputs.params,
            view.rows("query"),
            inputs.context,
            batch.queries,
            dropout=inputs.pass_(0),
        )
        positives = backbone.item_vectors(inputs.params, view.rows("item"))
        return self.catalogue.learn(
            view, inputs, states, positives, batch.items[:, 0], batch.weights
        )

    def guided(self, view: View, inputs: Inputs) -> Guided:
        return _guided(view.scores(GUIDANCE, inputs.pass_(1)))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Every predicted place of a window, by any loss; see `SequenceBackbone.window`."""

    backbone: SequenceBackbone
    loss: str  # softmax | sampled_softmax | bce | bpr
    catalogue: _Catalogue
    penalised = ("window", "candidates")
    metrics: tuple[str, ...] = ()

    def reads(self, batch: Batch, context: Context, candidates: Candidates | None) -> Reads:
        rows: dict[str, Ids] = {}
        whole: frozenset[str] = frozenset()
        if self.loss in ("softmax", "sampled_softmax"):
            rows, whole = self.catalogue.reads(batch, context)
        of_users = {USER: batch.queries.users} if isinstance(self.backbone, FusesUsers) else {}
        rows["window"] = {"item": self._events(batch, context)[0], **of_users}
        rows["candidates"] = {"item": batch.items}
        return Reads(_apart(candidates), rows, whole)

    def _events(
        self, batch: Batch, context: Context
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        assert context.histories is not None
        return recent(context.histories, batch.queries, self.backbone.length)

    def learn(self, view: View, inputs: Inputs) -> Learned:
        backbone, batch = self.backbone, inputs.batch
        ids, is_event = self._events(batch, inputs.context)
        last, candidates = batch.items[:, :1], view.rows("candidates")["item"]
        ids = jnp.concatenate([ids, last], axis=1)
        of_window = view.rows("window")
        events = jnp.concatenate([of_window["item"], candidates[:, :1]], axis=1)
        is_event = jnp.concatenate([is_event, jnp.ones_like(last, dtype=bool)], axis=1)

        predicted = backbone.window(inputs.params, events, is_event, key=inputs.key)
        if isinstance(backbone, FusesUsers):
            states = backbone.fused(
                inputs.params, predicted.states, of_window[USER], dropout=inputs.pass_(2)
            )
            predicted = predicted._replace(states=states)
        place = jnp.broadcast_to(predicted.place, predicted.weights.shape)
        targets = jnp.take_along_axis(ids, place, axis=1)
        weights = predicted.weights * batch.weights[:, None]
        histories = inputs.context.histories
        assert histories is not None
        counted = window_weights(histories, batch.queries, backbone.length)
        if counted is not None:
            weights = weights * jnp.take_along_axis(counted, place, axis=1)
        rows = {"item": jnp.take_along_axis(events, place[:, :, None], axis=1)}
        positives = backbone.item_vectors(inputs.params, rows)
        if self.loss in ("softmax", "sampled_softmax"):
            joined = map(_joined, (predicted.states, positives, targets, weights))
            return self.catalogue.learn(view, inputs, *joined)

        windows, places = weights.shape
        drawn = candidates[:, 1:].reshape(windows, -1, inputs.negatives, candidates.shape[-1])
        negatives = backbone.item_vectors(inputs.params, {"item": drawn[:, :places]})
        positive_scores = jnp.sum(predicted.states * positives, axis=-1)[..., None]
        negative_scores = dots(predicted.states, negatives)
        if self.loss == "bpr":
            terms = jnp.mean(losses.bpr(positive_scores - negative_scores), axis=-1)
        else:
            scores = jnp.concatenate([positive_scores, negative_scores], axis=-1)
            labels = jnp.zeros_like(scores).at[..., 0].set(1.0)
            terms = jnp.mean(losses.binary_cross_entropy(scores, labels), axis=-1)

        right = jnp.mean((positive_scores > negative_scores).astype(jnp.float32), axis=-1)
        return Learned(
            losses.masked_sum(terms, weights), losses.masked_sum(right, weights), jnp.sum(weights)
        )

    def guided(self, view: View, inputs: Inputs) -> Guided:
        return _guided(view.scores(GUIDANCE, inputs.pass_(1)))


def _joined(x: jax.Array) -> jax.Array:
    """[W, T, ...] -> [W * T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def dot_model(backbone: AnyBackbone) -> FactorModel | None:
    """How a backbone's pairs are scored by dot products of rows, where that is all they are."""
    if not isinstance(backbone, DotBackbone) or backbone.dropout > 0:
        return None
    if feature_tables(backbone) or adapters.of(backbone):  # a row is the sum of several
        return None
    return backbone.factor_model


def make_objective(
    run: RunConfig,
    backbone: AnyBackbone,
    guidance: Guidance | None,
    plan: SamplingPlan,
    layout: Layout,
) -> Objective:
    """The objective that --loss names for `backbone`."""
    loss = run.loss_name
    if isinstance(backbone, SequenceBackbone):
        return Windows(backbone, loss, _Catalogue(backbone, plan))
    if loss in ("softmax", "sampled_softmax"):
        assert isinstance(backbone, DotBackbone)  # config.LOSSES_OF
        return Softmax(backbone, _Catalogue(backbone, plan))
    share = run.loss.drop_share
    hardness = run.hardness if run.hardness.product else None
    how = run.loss.drop, layout, run.loss.drop_steps, hardness
    dropped = Dropped(share, *how) if share else None
    if plan.negatives == 0:
        return LabelledItems(dropped)
    # Lists as pairs read a query's rows once a pair: worth it only where these stay in a cache.
    as_pairs = (
        guidance is None
        or guidance.width == 2
        or (guidance.width % 2 == 0 and plan.native and dot_model(backbone) is not None)
    )
    # A stochastic pass scores a guidance's candidates alone, and vectors are no dot products.
    # Dropout is a function of a lane's number among those of its kind.
    apart = guidance is not None and (
        guidance.reads_stochastic or guidance.reads_vectors or backbone.dropout > 0
    )
    return Triples(loss, plan.negatives == 1 and as_pairs and not apart, dropped)


def negatives_of_triple(run: RunConfig, length: int) -> int:
    """C - 1: negatives drawn for a positive, or for a window.

    Args:
      length: L of a sequence backbone; 0 for others.
    """
    if run.loss.rating_threshold or run.loss_name in ("softmax", "sampled_softmax"):
        return 0
    return run.loss.negatives_per_positive * max(length, 1)
