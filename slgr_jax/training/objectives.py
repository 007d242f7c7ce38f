"""What a step learns from interactions: which rows that needs, and the loss.

An objective is chosen once, by the backbone and --loss (`make_objective`). It states its `reads`,
and from a view of them gives the recommendation loss of the batch and the scores of the
preferences, which guidance takes from there.

  Pairs           a positive and its negatives as candidates of one query; BPR or binary
                  cross-entropy. Any backbone that scores candidates.
  LabelledRows    one item with a label; binary cross-entropy.
  Softmax         the positive against the whole catalogue, or a drawn part of it that the batch
                  shares. Backbones that are a dot product.
  Windows         every place of a history predicts the next event (or a masked one), by any of
                  these losses. Sequence backbones.

Shape letters: B lanes (triples, rows or windows), C items of a lane, G preferences, L places of a
window, T predicted places of a window, N shared negatives, E width of a state.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.models import losses
from slgr_jax.models.backbones.base import (
    AnyBackbone,
    DotBackbone,
    Dropout,
    Ids,
    Params,
    SequenceBackbone,
    dots,
    item_tables,
)
from slgr_jax.models.row_access import Candidates, Reads, View
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling import negatives as negatives_lib
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import Context, recent

PREFERENCES, BOTH = "preferences", "triples and preferences"


@struct.dataclass
class Learned:
    """The recommendation loss of this device's part of a batch, as sums over what is predicted.

    Attributes:
      loss: [] sum of the losses.
      right: [] how many positives score above their negatives (rows: on the right side of 0).
      count: [] how many there are.
    """

    loss: Float[Array, ""]
    right: Float[Array, ""]
    count: Float[Array, ""]


@struct.dataclass
class Preferred:
    """What a step's pass says of its preferences.

    Attributes:
      scores: [G, 2] logits of (preferred, other).
      differences: [G] s_ua - s_ub.
    """

    scores: Float[Array, "G 2"]
    differences: Float[Array, "G"]


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

    def pass_(self, number: int) -> Dropout:
        """Dropout of the step's pass `number`; None where the backbone has none."""
        return (self.dropout, jax.random.fold_in(self.key, number)) if self.dropout > 0 else None


class Objective(Protocol):
    """One way to learn from interactions; see the module's docstring."""

    def reads(self, batch: Batch, context: Context) -> Reads:
        """What `learn` and `preferences` need of the tables."""
        ...

    @property
    def penalised(self) -> tuple[str, ...]:
        """Names in `reads` whose rows the L2 penalty is on."""
        ...

    def learn(self, view: View, inputs: Inputs) -> Learned:
        """The recommendation loss."""
        ...

    def preferences(self, view: View, inputs: Inputs) -> Preferred:
        """The preferences in the training pass."""
        ...


def _preferred(scores: Float[Array, "G 2"]) -> Preferred:
    return Preferred(scores, losses.difference(scores))


def _preference_lanes(batch: Batch) -> dict[str, Candidates]:
    if batch.pref_items.shape[0] == 0:
        return {}
    return {PREFERENCES: Candidates(batch.pref_queries, batch.pref_items)}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """-log sigmoid(s_ui - s_uj), or binary cross-entropy of positive and negatives as rows.

    With one negative, triples and preferences have the same shape and are scored in one pass
    (`merged`).
    """

    pair_loss: str  # bpr | bce
    merged: bool

    @property
    def penalised(self) -> tuple[str, ...]:
        return (BOTH,) if self.merged else ("lanes",)

    def reads(self, batch: Batch, context: Context) -> Reads:
        if not self.merged:
            own = {"lanes": Candidates(batch.queries, batch.items)}
            return Reads({**own, **_preference_lanes(batch)}, {})
        if batch.pref_items.shape[0] == 0:
            return Reads({BOTH: Candidates(batch.queries, batch.items)}, {})
        queries = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), batch.queries, batch.pref_queries
        )
        items = jnp.concatenate([batch.items, batch.pref_items])
        return Reads({BOTH: Candidates(queries, items)}, {})

    def _merged(self, view: View, inputs: Inputs) -> tuple[Preferred, Preferred]:
        """Of triples and of preferences. Split last, so that gradients meet by concatenation."""
        scores = view.scores(BOTH, inputs.pass_(0))
        sizes = (inputs.batch.items.shape[0], inputs.batch.pref_items.shape[0])
        each, differences = (jax.lax.split(x, sizes) for x in (scores, losses.difference(scores)))
        return Preferred(each[0], differences[0]), Preferred(each[1], differences[1])

    def learn(self, view: View, inputs: Inputs) -> Learned:
        weights = inputs.batch.weights
        if self.merged:
            triples, _ = self._merged(view, inputs)
            scores, differences = triples.scores, triples.differences[:, None]
        else:
            scores = view.scores("lanes", inputs.pass_(0))
            differences = scores[:, :1] - scores[:, 1:]
        right = jnp.mean((differences > 0).astype(jnp.float32), axis=1)
        if self.pair_loss == "bpr":
            loss = jnp.mean(losses.bpr(differences), axis=1)
        else:
            labels = jnp.zeros_like(scores).at[:, 0].set(1.0)
            loss = jnp.mean(losses.binary_cross_entropy(scores, labels), axis=1)
        return Learned(
            losses.masked_sum(loss, weights), losses.masked_sum(right, weights), jnp.sum(weights)
        )

    def preferences(self, view: View, inputs: Inputs) -> Preferred:
        if not self.merged:
            return _preferred(view.scores(PREFERENCES, inputs.pass_(1)))
        return self._merged(view, inputs)[1]


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Binary cross-entropy of one item a lane with its label."""

    penalised = ("lanes",)

    def reads(self, batch: Batch, context: Context) -> Reads:
        return Reads(
            {"lanes": Candidates(batch.queries, batch.items), **_preference_lanes(batch)}, {}
        )

    def learn(self, view: View, inputs: Inputs) -> Learned:
        scores, batch = view.scores("lanes", inputs.pass_(0))[:, 0], inputs.batch
        assert batch.labels is not None
        right = ((scores > 0) == (batch.labels > 0.5)).astype(jnp.float32)
        loss = losses.binary_cross_entropy(scores, batch.labels)
        return Learned(
            losses.masked_sum(loss, batch.weights),
            losses.masked_sum(right, batch.weights),
            jnp.sum(batch.weights),
        )

    def preferences(self, view: View, inputs: Inputs) -> Preferred:
        return _preferred(view.scores(PREFERENCES, inputs.pass_(1)))


@dataclasses.dataclass(frozen=True)
class _Catalogue:
    """Softmax over every item, or over the negatives that a step shares."""

    backbone: DotBackbone
    plan: negatives_lib.Plan

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

    def reads(self, batch: Batch, context: Context) -> Reads:
        rows, whole = self.catalogue.reads(batch, context)
        rows["query"] = self.backbone.query_ids(context, batch.queries)
        rows["item"] = self.backbone.item_ids(context, batch.items[:, 0])
        return Reads(_preference_lanes(batch), rows, whole)

    def learn(self, view: View, inputs: Inputs) -> Learned:
        backbone, batch = self.backbone, inputs.batch
        states = backbone.query_vectors(
            *(inputs.params, view.rows("query"), inputs.context, batch.queries),
            dropout=inputs.pass_(0),
        )
        positives = backbone.item_vectors(inputs.params, view.rows("item"))
        return self.catalogue.learn(
            view, inputs, states, positives, batch.items[:, 0], batch.weights
        )

    def preferences(self, view: View, inputs: Inputs) -> Preferred:
        return _preferred(view.scores(PREFERENCES, inputs.pass_(1)))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Every predicted place of a window, by any loss; see `SequenceBackbone.window`."""

    backbone: SequenceBackbone
    loss: str  # softmax | sampled_softmax | bce | bpr
    catalogue: _Catalogue
    penalised = ("window", "candidates")

    def reads(self, batch: Batch, context: Context) -> Reads:
        rows: dict[str, Ids] = {}
        whole: frozenset[str] = frozenset()
        if self.loss in ("softmax", "sampled_softmax"):
            rows, whole = self.catalogue.reads(batch, context)
        rows["window"] = {"item": self._events(batch, context)[0]}
        rows["candidates"] = {"item": batch.items}
        return Reads(_preference_lanes(batch), rows, whole)

    def _events(
        self, batch: Batch, context: Context
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        assert context.histories is not None
        return recent(context.histories, batch.queries, self.backbone.length)

    def learn(self, view: View, inputs: Inputs) -> Learned:
        backbone, batch = self.backbone, inputs.batch
        ids, there = self._events(batch, inputs.context)
        last, candidates = batch.items[:, :1], view.rows("candidates")["item"]
        ids = jnp.concatenate([ids, last], axis=1)
        events = jnp.concatenate([view.rows("window")["item"], candidates[:, :1]], axis=1)
        there = jnp.concatenate([there, jnp.ones_like(last, dtype=bool)], axis=1)
        found = backbone.window(inputs.params, events, there, key=inputs.key)
        place = jnp.broadcast_to(found.place, found.weights.shape)
        targets = jnp.take_along_axis(ids, place, axis=1)
        weights = found.weights * batch.weights[:, None]
        rows = {"item": jnp.take_along_axis(events, place[:, :, None], axis=1)}
        positives = backbone.item_vectors(inputs.params, rows)
        if self.loss in ("softmax", "sampled_softmax"):
            joined = map(_joined, (found.states, positives, targets, weights))
            return self.catalogue.learn(view, inputs, *joined)
        windows, places = weights.shape
        drawn = candidates[:, 1:].reshape(windows, -1, inputs.negatives, candidates.shape[-1])
        negatives = backbone.item_vectors(inputs.params, {"item": drawn[:, :places]})
        own = jnp.sum(found.states * positives, axis=-1)[..., None]
        others = dots(found.states, negatives)
        if self.loss == "bpr":
            each = jnp.mean(losses.bpr(own - others), axis=-1)
        else:
            scores = jnp.concatenate([own, others], axis=-1)
            labels = jnp.zeros_like(scores).at[..., 0].set(1.0)
            each = jnp.mean(losses.binary_cross_entropy(scores, labels), axis=-1)
        right = jnp.mean((own > others).astype(jnp.float32), axis=-1)
        return Learned(
            losses.masked_sum(each, weights), losses.masked_sum(right, weights), jnp.sum(weights)
        )

    def preferences(self, view: View, inputs: Inputs) -> Preferred:
        return _preferred(view.scores(PREFERENCES, inputs.pass_(1)))


def _joined(x: jax.Array) -> jax.Array:
    """[W, T, ...] -> [W * T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def make_objective(run: RunConfig, backbone: AnyBackbone, plan: negatives_lib.Plan) -> Objective:
    """The objective that --loss names for `backbone`."""
    loss = run.loss_name
    if isinstance(backbone, SequenceBackbone):
        return Windows(backbone, loss, _Catalogue(backbone, plan))
    if loss in ("softmax", "sampled_softmax"):
        assert isinstance(backbone, DotBackbone)  # config.LOSSES_OF
        return Softmax(backbone, _Catalogue(backbone, plan))
    if plan.negatives == 0:
        return LabelledRows()
    # Dropout as the gate's uncertainty needs passes over the preferences alone.
    stochastic = plan.preferences > 0 and run.gate.uncertainty == "dropout"
    return Pairs(loss, merged=plan.negatives == 1 and not stochastic)


def negatives_of_lane(run: RunConfig, length: int) -> int:
    """C - 1: negatives drawn for a lane.

    Args:
      length: L of a sequence backbone; 0 for others.
    """
    if run.loss.rating_threshold or run.loss_name in ("softmax", "sampled_softmax"):
        return 0
    return run.loss.negatives_per_positive * max(length, 1)
