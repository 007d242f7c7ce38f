"""What a backbone may look up while it scores: histories, item fields, features, the graph.

All of it is resident on the devices, made on the host from a dataset, and only what the backbone
says it reads (`Backbone.reads`) is made. Nothing after a query's moment is ever looked up.

Shape letters: U users, I items, N queries, C candidates, L history length, n interactions,
F categories of an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute as pc
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

from slgr_jax.config import CLICK_BACKBONES, ModelConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.features import INTERACTION, Feature
from slgr_jax.errors import ConfigError, listing
from slgr_jax.sampling.examples import Examples
from slgr_jax.sampling.features import (
    Features,
    FeatureSizes,
    FeatureSlots,
    make_slots,
    padded,
)

HISTORY, FIELDS, FEATURES, GRAPH = "history", "fields", "features", "graph"


@struct.dataclass
class Queries:
    """Who is to be scored for, and at which moment.

    Attributes:
      users: [N]; or [S, N], those of S steps that were drawn at once.
      as_of: [N] how many of the user's `Histories` events lie before the moment: a backbone looks
        at none of the later ones. None where the backbone reads no history.
      interactions: [N] in whose circumstances (hour, device) each is asked, as
        `interaction_rows` counts them; None: in those of the user's last event before the moment.
    """

    users: Int[Array, "*N"]
    as_of: Int[Array, "*N"] | None = None
    interactions: Int[Array, "*N"] | None = None


@struct.dataclass
class Histories:
    """Each user's events, oldest first: those of training, then those of validation.

    Attributes:
      offsets: [U + 1] bounds of each user's row.
      items: [n].
      trained: [U] how many of a user's events are training interactions.
      weights: [n] what each counts as something to predict; None: all alike.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "n"]
    trained: Int[Array, "U"]
    weights: Float[Array, "n"] | None = None


@struct.dataclass
class Fields:
    """The categories of each item, padded to F by repeating the item's last one.

    Attributes:
      categories: [I, F] category indices; 0 throughout where an item has none.
      counts: [I] how many of the F are the item's.
    """

    categories: Int[Array, "I F"]
    counts: Int[Array, "I"]


@struct.dataclass
class Graph:
    """The training pairs in both orders: what users touched, and who touched items.

    Attributes:
      user_offsets: [U + 1]; items: [n], a user's items, ascending.
      item_offsets: [I + 1]; users: [n], an item's users, ascending.
    """

    user_offsets: Int[Array, "U1"]
    items: Int[Array, "n"]
    item_offsets: Int[Array, "I1"]
    users: Int[Array, "n"]


@struct.dataclass
class OwnGraph:
    """What the users of one device have of the `Graph`, where users are split.

    Attributes:
      offsets: [R] where the items of each of their rows begin; they end where the next one's do.
      items: [n]; I where there is none.
      degrees: [I] how many users of all devices touched each item.
    """

    offsets: Int[Array, "R"]
    items: Int[Array, "n"]
    degrees: Int[Array, "I"]


@struct.dataclass
class FrozenVectors:
    """Vectors that are looked up like rows and never written; None where a side has none.

    Each is a table without optimiser slots (`models.embedding_table.RowFormat`) of R rows with
    padding: Z numbers, then 1 where the row has a vector, 0 where it has none. Of chunks
    (`VectorSizes.fields`) that is so of each of a row's slots, one behind the other.
    """

    item: Num[Array, "Rp W"] | None = None
    user: Num[Array, "Up V"] | None = None


@struct.dataclass
class Context:
    """What backbones read besides their tables; None for what this run's backbone does not.

    Training alone reads `vectors` and `neighbours`: serving keeps what vectors come to among its
    rows.

    Attributes:
      neighbours: [I, k] the items with the nearest vectors, the best first; -1 past the last.
    """

    histories: Histories | None = None
    fields: Fields | None = None
    graph: Graph | OwnGraph | None = None
    features: Features | None = None
    vectors: FrozenVectors | None = None
    neighbours: Int[Array, "I k"] | None = None
    examples: Examples | None = None

    def vectors_of(self, side: str) -> Num[Array, "Rp W"]:
        """The table of the vectors of items or of users, which the run has."""
        assert self.vectors is not None, "this context is serving's: it has no vectors"
        table = self.vectors.item if side == "item" else self.vectors.user
        assert table is not None, f"the run has no vectors of {side}s"
        return table


@dataclasses.dataclass(frozen=True)
class VectorSizes:
    """What shapes an adapter.

    Attributes:
      width: Z, numbers of a vector.
      alone: whether vectors stand in place of rows.
      of_events: whether events of a history have them as fields, too.
      fields: of rows with several vectors (chunks) that are chosen among, how many slots each field
        of the text has; empty: a row has one vector.
    """

    width: int
    alone: bool
    of_events: bool = True
    fields: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExampleSizes:
    """What shapes the network over examples of rows.

    Attributes:
      width: R, numbers of a reasoning.
      timed: whether rows have moments.
    """

    width: int
    timed: bool


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of a dataset that shape a backbone."""

    users: int
    items: int
    categories: int = 0  # distinct categories of items; 0 where items have none
    categories_per_item: int = 0  # F
    longest_history: int = 0  # events of the user who has most; 0 where no history is read
    user_features: FeatureSizes | None = None
    item_features: FeatureSizes | None = None
    interaction_features: FeatureSizes | None = None
    user_vectors: VectorSizes | None = None
    item_vectors: VectorSizes | None = None
    examples: ExampleSizes | None = None


def at_interactions(context: Context, queries: Queries) -> Queries:
    """The queries, each with the interaction whose features hold; as they are where none are read.

    A user without an event before the moment has the row of interactions of which nothing is
    known, the last one. Of a context with one row (`TrainedRun.in_context`) everybody has that.
    """
    slots = None if context.features is None else context.features.interaction
    if slots is None:
        return queries
    unknown = slots.rows.shape[0] - 1
    chosen = queries.interactions
    if chosen is None:
        assert context.histories is not None, "the last event is one of the history"
        assert queries.as_of is not None
        last = context.histories.offsets[queries.users] + queries.as_of - 1
        chosen = jnp.where(queries.as_of > 0, last, unknown)
    return Queries(queries.users, queries.as_of, jnp.minimum(chosen, unknown))


def recent(
    histories: Histories, queries: Queries, length: int
) -> tuple[Int[Array, "N L"], Bool[Array, "N L"]]:
    """The last L events before each query, oldest first, the latest always in the last place.

    Returns:
      items: [N, L]. Places before the user's first event repeat it, so that no row is touched
        that is not the user's own (a user without events gets somebody's).
      real: [N, L] whether a place holds an event of its own.
    """
    assert queries.as_of is not None, "a backbone that reads histories is queried with a moment"

    # Places before the first event are moved onto it; the latest event stays in the last place.
    start = histories.offsets[queries.users]
    back = jnp.arange(length, dtype=jnp.int32)[None, :] - length  # -L .. -1
    place = queries.as_of[:, None] + back
    real = place >= 0
    event = start[:, None] + jnp.maximum(place, 0)
    return histories.items.at[event].get(mode="clip"), real


def window_weights(
    histories: Histories, queries: Queries, length: int
) -> Float[Array, "N L1"] | None:
    """What the last L events before each query and the one at it count as something to predict, in
    the order of `recent`; None: all alike."""
    if histories.weights is None:
        return None
    assert queries.as_of is not None, "a window ends at a moment"
    place = queries.as_of[:, None] + jnp.arange(length + 1, dtype=jnp.int32)[None, :] - length
    event = histories.offsets[queries.users][:, None] + jnp.maximum(place, 0)
    return histories.weights.at[event].get(mode="clip")


def categories_of(
    fields: Fields, items: Int[Array, "..."]
) -> tuple[Int[Array, "... F"], Bool[Array, "... F"]]:
    """The category indices of items and which of them count."""
    categories = fields.categories[items]
    place = jax.lax.broadcasted_iota(jnp.int32, categories.shape, categories.ndim - 1)
    return categories, place < fields.counts[items][..., None]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The features that a run reads.

    Attributes:
      features: of users, of items and of interactions.
      most_values: values kept of a multi-valued feature, in the order of the input.
    """

    features: tuple[Feature, ...] = ()
    most_values: int = 1

    def of(self, side: str) -> list[Feature]:
        """Those of users, of items or of interactions."""
        return [feature for feature in self.features if feature.side == side]

    @property
    def cut(self) -> int:
        """Values of multi-valued features that are not kept."""
        counts = [feature.ragged()[0] for feature in self.features if feature.kind == "multi"]
        return sum(int(np.maximum(each - self.most_values, 0).sum()) for each in counts)

    @property
    def digest(self) -> str:
        """SHA-256 over them; empty without any."""
        return features_lib.digest(self.features)


def choose_features(model: ModelConfig, dataset: Dataset) -> Chosen:
    """The features that --features names, without what is a field of click backbones anyway.

    Raises:
      ConfigError: the dataset does not have them.
    """
    if model.features == "none":
        return Chosen()
    named = features_lib.choose(dataset.known_features, model.features, dataset.path)
    if model.backbone in CLICK_BACKBONES:
        named = tuple(feature for feature in named if feature.name != features_lib.CATEGORIES)
    else:
        of_interactions = [feature for feature in named if feature.side == INTERACTION]
        if of_interactions and (model.features != "all" or of_interactions == list(named)):
            raise ConfigError(
                f"--features={model.features}: --backbone={model.backbone} reads no features of "
                f"interactions ({listing(feature.name for feature in of_interactions)}); drop "
                f"them, or use one of {listing(CLICK_BACKBONES)}"
            )
        named = tuple(feature for feature in named if feature.side != INTERACTION)
    return Chosen(named, model.most_feature_values)


def make_context(
    dataset: Dataset, reads: Collection[str], *, most_categories: int, chosen: Chosen | None = None
) -> Context:
    """The resident arrays (host arrays) that a backbone with these `reads` looks up.

    Args:
      reads: of HISTORY, FIELDS, FEATURES, GRAPH.
      most_categories: categories kept of an item that has more, in the order the item names them.
      chosen: the features of FEATURES; None: none.
    """
    chosen = chosen or Chosen()
    slots = [make_slots(chosen.of(side), chosen.most_values)[0] for side in ("user", "item")]
    slots.append(_interaction_slots(dataset, chosen))
    return Context(
        make_histories(dataset) if HISTORY in reads else None,
        _fields(dataset, most_categories)[0] if FIELDS in reads else None,
        make_graph(dataset.positives(("train",)), dataset.n_items) if GRAPH in reads else None,
        Features(*slots) if FEATURES in reads else None,
    )


def sizes(
    dataset: Dataset, reads: Collection[str], *, most_categories: int, chosen: Chosen | None = None
) -> Sizes:
    """What shapes a backbone with these `reads` on `dataset`."""
    names, width = 0, 0
    if FIELDS in reads:
        fields, names = _fields(dataset, most_categories)
        width = fields.categories.shape[1]
    longest = 0
    if HISTORY in reads:
        events = np.concatenate([dataset.train.users, dataset.valid.users])
        longest = int(np.bincount(events, minlength=1).max())
    users, items, interactions = (
        make_slots(chosen.of(side), chosen.most_values)[1] if chosen else None
        for side in features_lib.SIDES
    )
    counts = (dataset.n_users, dataset.n_items, names, width, longest)
    return Sizes(*counts, users, items, interactions)


def host32(x: np.ndarray) -> Any:
    """A contiguous host array, standing in for the device array that `device_put` makes of it."""
    return np.ascontiguousarray(x, np.int32)


def make_histories(dataset: Dataset, weights: np.ndarray | None = None) -> Histories:
    """Events of each user by part (training first), then in the order of the part: by time.

    Args:
      weights: what each training interaction counts as something to predict; None: all alike.
    """
    train, valid = dataset.train, dataset.valid
    users = np.concatenate([train.users, valid.users])
    items = np.concatenate([train.items, valid.items])
    order = _events_by_user(dataset)
    offsets = np.zeros(dataset.n_users + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=dataset.n_users), out=offsets[1:])
    trained = np.bincount(train.users, minlength=dataset.n_users)
    histories = Histories(host32(offsets), host32(items[order]), host32(trained))
    if weights is None:
        return histories
    of_events = np.concatenate([weights, np.ones(len(valid), weights.dtype)])[order]
    counted: Any = np.ascontiguousarray(of_events, np.float32)  # stands in for the device array
    return dataclasses.replace(histories, weights=counted)


def _events_by_user(dataset: Dataset) -> np.ndarray:
    """[n] the events of training, then those of validation, ordered by user."""
    users = np.concatenate([dataset.train.users, dataset.valid.users])
    return np.argsort(users, kind="stable")  # each part is sorted by user and time


def of_users(context: Context, users: Int[np.ndarray, "n"]) -> Context:
    """A context (host arrays) of some users, in their order, with room for a power of two of
    events and one more, of which nothing is known; without a graph."""
    histories, features, places = context.histories, context.features, None
    if histories is not None:
        begins = np.asarray(histories.offsets)[:-1][users]
        counts = np.diff(np.asarray(histories.offsets))[users]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        room = 1 << int(offsets[-1]).bit_length()
        places = np.full(room + 1, np.iinfo(np.int32).max)
        places[: offsets[-1]] = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
        events = np.asarray(histories.items)[np.minimum(places, histories.items.shape[0] - 1)]
        trained = np.asarray(histories.trained)[users]
        histories = Histories(host32(offsets), host32(events), host32(trained))
    if features is not None:
        user, interaction = features.user, features.interaction
        if interaction is not None and places is not None:
            interaction = interaction.of(places)
        features = Features(None if user is None else user.of(users), features.item, interaction)
    return Context(histories, context.fields, features=features)


def interaction_rows(dataset: Dataset, part: str) -> np.ndarray:
    """[n] int32 where the features of a part's interactions are among `Features.interaction`.

    Those of training and validation are where `Histories` has the event; those of test follow.
    """
    trained, events = len(dataset.train), len(dataset.train) + len(dataset.valid)
    if part == "test":
        return np.arange(events, events + len(dataset.test), dtype=np.int32)
    row = np.empty(events, np.int32)
    row[_events_by_user(dataset)] = np.arange(events, dtype=np.int32)
    return row[:trained] if part == "train" else row[trained:]


def _interaction_slots(dataset: Dataset, chosen: Chosen) -> FeatureSlots | None:
    """Those of all interactions, and of one of which nothing is known."""
    features = chosen.of(INTERACTION)
    if not features:
        return None
    parts = len(features[0].column)
    with_unknown = [features_lib.extended(feature, parts + 1) for feature in features]
    slots, _ = make_slots(with_unknown, chosen.most_values)
    assert slots is not None
    events = _events_by_user(dataset)
    order = np.concatenate([events, np.arange(events.size, parts + 1)])
    return FeatureSlots(slots.rows[order], slots.weights[order], slots.widths)


def _fields(dataset: Dataset, most: int) -> tuple[Fields, int]:
    """Category arrays, and how many distinct categories there are."""
    column = dataset.items.column("categories").combine_chunks()
    counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
    flat = pc.list_flatten(column).dictionary_encode()  # a null list flattens to nothing
    codes = np.asarray(flat.indices)
    kept, categories = padded(counts, codes, most)
    return Fields(host32(categories), host32(kept)), len(flat.dictionary)


def make_graph(pairs: Csr, n_items: int) -> Graph:
    """The graph of users and items with `pairs`, user -> items, as its edges (host arrays)."""
    back = Csr.from_pairs(pairs.indices, pairs.owners(), n_items)
    return Graph(
        user_offsets=host32(pairs.offsets),
        items=host32(pairs.indices),
        item_offsets=host32(back.offsets),
        users=host32(back.indices),
    )
