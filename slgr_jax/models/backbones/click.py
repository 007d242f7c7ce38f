"""Click prediction: DeepFM, xDeepFM, AutoInt, DCN, DCNv2 and DIN as `JointBackbone`s.

A row, (query, candidate), has these fields, each of width D:
  user; item; the mean of the item's categories;
  the mean of the last L events' items; the mean of the events' category means;
  each feature of the user and of the item (`sampling.features`), and the mean of the events' own;
  what their vectors come to (`adapters`), and the mean of the events' own, unless events go
  without (`VectorSizes.of_events`): the field is the candidate's alone then;
  each feature of the interaction: of the query, the same for all of its candidates
  (`context.at_interactions`).
Chunks of texts (`vector_maps.Extractor`) are no field: what they come to for the user and the
candidate is added to the fields (of `Din` the candidate's), without events.
Categories where the data have some, history unless it is switched off, features where --features
names some. `Din` gets the events themselves. A mean of nothing is a vector of zeros: an item
without categories, a query without events. An event's item reads the same table as a candidate.

DeepFM and xDeepFM add a first-order term: a number for each id, averaged as its field is. It is
the last entry of the id's row, of width D + 1, so that it costs no table of its own.

Shape letters: N queries, C candidates, L events, F categories of an item (in `_with_texts`: all
fields of a row), S numbers of a row's chunks, K blocks of B candidates, T fields of an item
(itself, categories, features), P of an event (as many, unless vectors are the candidates' alone),
Q fields of the query, W width of a row (D or D + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.data.features import INTERACTION
from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import chunk_extractor
from slgr_jax.models.backbones.adapters import FIELDS as VECTOR_FIELDS
from slgr_jax.models.backbones.adapters import NONE, PARAMS, SHARED
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    Params,
    TableRows,
)
from slgr_jax.models.backbones.interactions import (
    PAIRS,
    AutoInt,
    Dcn,
    DcnV2,
    DeepFm,
    Din,
    FieldNetwork,
    XDeepFm,
)
from slgr_jax.models.backbones.vector_maps import Adapter, Extractor
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling import features as features_lib
from slgr_jax.sampling.context import (
    FEATURES,
    FIELDS,
    HISTORY,
    Context,
    Queries,
    Sizes,
    at_interactions,
    categories_of,
    recent,
)

# Rows that a deterministic pass puts through a network at once: the candidates of a full ranking
# go block by block, as a row of xDeepFM holds tens of kilobytes between two layers.
BLOCK = 4096
FIRST_ORDER = frozenset({"deepfm", "xdeepfm"})


class ClickModel:
    """A network over fields as a `JointBackbone`: tables `user`, `item`, `category`, those of
    features.

    Attributes:
      dim: D.
      adapters, vector_fields: see `adapters.Adapted`.
    """

    adapters: Mapping[str, Adapter] = NONE
    vector_fields = True

    def __init__(
        self,
        network: FieldNetwork | Din,
        *,
        sizes: Sizes,
        dim: int,
        length: int,
        init_std: float,
        dropout: float,
        history: bool,
        first_order: bool,
    ) -> None:
        self._network, self.dim, self._length = network, dim, length
        self._categories, self._history = sizes.categories > 0, history
        self._first_order = first_order
        self._beside = int(sizes.examples is not None)
        counts = {"user": sizes.users, "item": sizes.items}
        if self._categories:
            counts["category"] = sizes.categories
        by_side = {
            "user": sizes.user_features,
            "item": sizes.item_features,
            INTERACTION: sizes.interaction_features,
        }
        self._features = {
            side: 0 if of_side is None else of_side.features for side, of_side in by_side.items()
        }
        for side, of_side in by_side.items():
            if of_side is not None:
                counts[features_lib.TABLES[side]] = of_side.rows
        of_items = sizes.item_vectors
        self._event_vectors = of_items is None or of_items.of_events
        vectors = {"user": sizes.user_vectors, "item": sizes.item_vectors}
        self._vectors = {
            side: of_side is not None and not of_side.alone and not of_side.fields
            for side, of_side in vectors.items()
        }
        # Side -> the name of its chunks.
        self._chunks = {
            side: VECTOR_FIELDS[side]
            for side, of_side in vectors.items()
            if of_side is not None and of_side.fields
        }
        width = dim + first_order
        self.tables: Mapping[str, TableSpec] = {
            name: TableSpec(
                count, width, init_std, scalars=int(first_order), of_users=name == "user"
            )
            for name, count in counts.items()
        }
        moments = history or by_side[INTERACTION] is not None
        reads = {HISTORY: moments, FIELDS: self._categories, FEATURES: any(by_side.values())}
        self.reads = frozenset(name for name, is_read in reads.items() if is_read)
        self.dropout = dropout

    def init(self, key: jax.Array) -> Params:
        return self._variables(key)["params"]

    def pair_width(self) -> int:
        """See `PairBackbone.pair_width`."""
        left = jax.eval_shape(self._variables, jax.random.key(0))[PAIRS]["vector"]
        return int(left.shape[-1])

    def _variables(self, key: jax.Array) -> Params:
        """What the network makes on one row: fresh parameters, and the row's `PAIRS`."""
        of_query, parts, alone = self._counts
        of_target = alone + self._beside
        if isinstance(self._network, Din):
            query, real = jnp.zeros((1, of_query, self.dim)), jnp.zeros((1, 1), bool)
            target, event = (
                jnp.zeros((1, 1, fields, self.dim)) for fields in (parts + of_target, parts)
            )
            return self._network.init(key, query, target, event, real)
        return self._network.init(key, jnp.zeros((1, self.fields + self._beside, self.dim)))

    @property
    def _counts(self) -> tuple[int, int, int]:
        """Fields of a query, of an event, and of a candidate beyond those of an event."""
        alone = int(self._vectors["item"] and not self._event_vectors)
        parts = 1 + self._categories + self._features["item"] + self._vectors["item"] - alone
        of_query = 1 + self._features["user"] + self._features[INTERACTION] + self._vectors["user"]
        return of_query, parts, alone

    @property
    def fields(self) -> int:
        """F of `pair_fields`."""
        of_query, parts, alone = self._counts
        return of_query + parts * (1 + self._history) + alone

    def ids(self, context: Context, queries: Queries, items: Int[Array, "N C"]) -> Ids:
        """`user` [N]; `item` [N, C + L], candidates then events; `category` [N, C + L, F]; those of
        features, `user_feature` and `interaction_feature` [N, S], `item_feature` [N, C + L, S]."""
        seen, _ = self._items(context, queries, items)
        ids = {"user": queries.users, "item": seen}
        if self._categories:
            assert context.fields is not None
            ids["category"] = categories_of(context.fields, seen)[0]
        interactions = at_interactions(context, queries).interactions
        for side, named in (("user", queries.users), ("item", seen), (INTERACTION, interactions)):
            if self._features[side]:
                ids[features_lib.TABLES[side]] = self._slots(context, side).rows[named]
        looked_up = seen if self._event_vectors else items
        for side, named in (("user", queries.users), ("item", looked_up)):
            if self._vectors[side]:
                ids[VECTOR_FIELDS[side]] = named
        for side, named in (("user", queries.users), ("item", items)):
            if side in self._chunks:
                ids[self._chunks[side]] = named
        return ids

    def _slots(self, context: Context, side: str) -> features_lib.FeatureSlots:
        slots = None if context.features is None else context.features.slots(side)
        assert slots is not None
        return slots

    def _feature_fields(
        self, rows: TableRows, context: Context, side: str, named: Int[Array, "..."]
    ) -> list[Float[Array, "... P W"]]:
        """[the fields of a side's features, that of its vectors]; [] without any."""
        fields = []
        if self._features[side]:
            of_slots = rows[features_lib.TABLES[side]]
            fields.append(features_lib.each(self._slots(context, side), named, of_slots))
        if self._vectors.get(side) and (side != "item" or self._event_vectors):
            fields.append(rows[VECTOR_FIELDS[side]][..., None, :])
        return fields

    def score(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout = None,
        beside: Float[Array, "N C D"] | None = None,
    ) -> Float[Array, "N C"]:
        """Logits; `beside` is one more field of each candidate, where `Sizes.examples` has one."""
        given = params, rows, context, queries, items, dropout, beside
        return self._of_pairs(*given, vectors=False)

    def pair_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout = None,
        beside: Float[Array, "N C D"] | None = None,
    ) -> Float[Array, "N C E"]:
        """See `PairBackbone.pair_vectors`: a first-order term is no part of it."""
        given = params, rows, context, queries, items, dropout, beside
        return self._of_pairs(*given, vectors=True)

    def pair_fields(
        self, rows: TableRows, context: Context, queries: Queries, items: Int[Array, "N C"]
    ) -> Float[Array, "N C F D"]:
        """What is known of each pair, alike for all models: the fields of the query, the mean of
        its events', those of the candidate."""
        query, target, events, real = self._fields(rows, context, queries, items)
        if self._history:
            query = _with_mean(query, events, real)
        side = jnp.broadcast_to(query[:, None], (*items.shape, *query.shape[1:]))
        return jnp.concatenate([side, target], axis=2)[..., : self.dim]

    def _fields(
        self, rows: TableRows, context: Context, queries: Queries, items: Int[Array, "N C"]
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bool[Array, "N L"]]:
        """Fields of the query [N, Q, W], of the candidates [N, C, T, W] and of the events
        [N, L, P, W], and which events are real."""
        seen, real = self._items(context, queries, items)
        fields = rows["item"][:, :, None, :]
        if self._categories:
            assert context.fields is not None
            counted = categories_of(context.fields, seen)[1]
            means = _mean(rows["category"], counted)
            fields = jnp.concatenate([fields, means[:, :, None, :]], axis=2)
        of_items = self._feature_fields(rows, context, "item", seen)
        fields = jnp.concatenate([fields, *of_items], axis=2)
        target, events = fields[:, : items.shape[1]], fields[:, items.shape[1] :]
        if self._vectors["item"] and not self._event_vectors:
            of_vectors = rows[VECTOR_FIELDS["item"]]
            target = jnp.concatenate([target, of_vectors[:, :, None, :]], axis=2)
        of_users = self._feature_fields(rows, context, "user", queries.users)
        interactions = at_interactions(context, queries).interactions
        if interactions is not None:
            of_users += self._feature_fields(rows, context, INTERACTION, interactions)
        query = jnp.concatenate([rows["user"][:, None, :], *of_users], axis=1)
        return query, target, events, real

    def _of_pairs(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        dropout: Dropout,
        beside: Float[Array, "N C D"] | None,
        *,
        vectors: bool,
    ) -> Float[Array, "N C ..."]:
        """Logits of the candidates, or the vectors before them."""
        query, target, events, real = self._fields(rows, context, queries, items)
        if self._history and not isinstance(self._network, Din):
            query = _with_mean(query, events, real)
        if beside is not None:
            width = target.shape[-1] - self.dim
            padded = jnp.pad(beside, ((0, 0), (0, 0), (0, width)))
            target = jnp.concatenate([target, padded[:, :, None]], axis=2)

        chunks = {side: rows[name] for side, name in self._chunks.items()}
        of_user = {side: kept[:, None] for side, kept in chunks.items() if side == "user"}
        of_candidates = {"target": target, **chunks}
        of_candidates.pop("user", None)

        def run(of_candidates: Mapping[str, jax.Array]) -> Float[Array, "N C ..."]:
            of_texts = {side: x for side, x in of_candidates.items() if side != "target"} | of_user
            target = of_candidates["target"]
            rows_of = query, target, events, real
            return self._run(params, *rows_of, of_texts, dropout, vectors=vectors)

        # Blocks would all draw the same dropout masks.
        return run(of_candidates) if dropout is not None else _by_block(run, of_candidates)

    def _items(
        self, context: Context, queries: Queries, items: Int[Array, "N C"]
    ) -> tuple[Int[Array, "N CL"], Bool[Array, "N L"]]:
        """Candidates then events, and which of the events are real."""
        if not self._history:
            return items, jnp.zeros((items.shape[0], 0), bool)
        assert context.histories is not None
        events, real = recent(context.histories, queries, self._length)
        return jnp.concatenate([items, events], axis=1), real

    def _run(
        self,
        params: Params,
        query: Float[Array, "N Q W"],
        target: Float[Array, "N C T W"],
        events: Float[Array, "N L P W"],
        real: Bool[Array, "N L"],
        chunks: Mapping[str, Float[Array, "N _ S"]],
        dropout: Dropout,
        *,
        vectors: bool,
    ) -> Float[Array, "N C ..."]:
        """Logits of candidates, or the vectors before them.

        Args:
          chunks: side -> what `vector_maps.Extractor` keeps of a user (once) or of each candidate.
        """
        network, dim = self._network, self.dim
        asking, (n, c) = (query[:, :1], target[:, :, 0]), target.shape[:2]
        first_order: jax.Array | None = None
        inputs: tuple[jax.Array, ...]
        if isinstance(network, Din):
            inputs = query, self._with_texts(params, asking, target, chunks), events, real
        else:
            side = jnp.broadcast_to(query[:, None], (n, c, *query.shape[1:]))
            fields = jnp.concatenate([side, target], axis=2)
            fields = self._with_texts(params, asking, fields, chunks)
            fields = fields.reshape(n * c, -1, query.shape[2])
            inputs = (fields[..., :dim],)
            if self._first_order:
                first_order = jnp.sum(fields[..., dim], axis=1).reshape(n, c)
        if vectors:
            of_rows = {"params": params}, *inputs
            _, left = network.apply(*of_rows, dropout=dropout, mutable=[PAIRS])
            return jnp.asarray(left[PAIRS]["vector"]).reshape(n, c, -1)
        scores = network.apply({"params": params}, *inputs, dropout=dropout)
        assert isinstance(scores, jax.Array)
        scores = scores.reshape(n, c)
        return scores if first_order is None else scores + first_order

    def _with_texts(
        self,
        params: Params,
        asking: tuple[Float[Array, "N 1 W"], Float[Array, "N C W"]],
        fields: Float[Array, "N C F W"],
        chunks: Mapping[str, Float[Array, "N _ S"]],
    ) -> Float[Array, "N C F W"]:
        """Fields X as X + Z (`chunk_extractor`), their first-order weights as they are.

        Args:
          asking: the rows of the user and of the candidates, which chunks are selected by.
        """
        if not chunks:
            return fields
        of_user, of_item = (row[..., : self.dim] for row in asking)
        query = jnp.concatenate([jnp.broadcast_to(of_user, of_item.shape), of_item], axis=2)
        of_adapters, parts = params[PARAMS], []
        for side, kept in sorted(chunks.items()):
            name = self._chunks[side]
            extractor = self.adapters[name]
            assert isinstance(extractor, Extractor)
            parts.append(extractor.of_query(of_adapters[name], kept, query))
        of_texts, present = zip(*parts, strict=True)
        z = chunk_extractor.aligned(
            of_adapters[SHARED]["alignment"],
            fields[..., : self.dim],
            jnp.concatenate(of_texts, axis=2),
            jnp.concatenate(present, axis=2),
        )
        return fields + jnp.pad(z, [(0, 0)] * 3 + [(0, fields.shape[3] - self.dim)])


def make_click(
    name: str,
    *,
    sizes: Sizes,
    dim: int,
    length: int,
    init_std: float,
    dropout: float,
    mlp: tuple[int, ...] = (200, 80),
    layers: int = 3,
    heads: int = 2,
    attention_width: int = 64,
    cin: tuple[int, ...] = (100, 100, 100),
    experts: int = 4,
    low_rank: int = 0,
    attention_mlp: tuple[int, ...] = (64, 16),
    history: bool = True,
) -> ClickModel:
    """The model `name`: deepfm, xdeepfm, autoint, dcn, dcnv2 or din.

    Args:
      dim: D.
      length: L, events of the history that count.
      init_std: of the tables (`TableSpec`).
      dropout: rate, in the perceptron.
      mlp: widths of the perceptron.
      layers: cross layers (dcn, dcnv2) or attention layers (autoint).
      heads, attention_width: of autoint; the width is that of all heads together.
      cin: maps of each layer of xdeepfm.
      experts, low_rank: of dcnv2; low_rank 0 is one full matrix a layer, without experts.
      attention_mlp: widths of din's attention unit.
      history: whether the user's events are fields.

    Raises:
      ConfigError: settings that contradict each other.
    """
    if name == "din" and not (history and length > 0):
        raise ConfigError("din weighs the events of a history: switch history on, with length > 0")
    if name == "din" and not attention_mlp:
        raise ConfigError("din's attention unit has no layers: give attention_mlp, as 64,16")
    if name == "autoint" and attention_width % heads:
        raise ConfigError(
            f"attention_width={attention_width} is no multiple of heads={heads}: "
            "each head has the same width"
        )
    odd = [size for size in cin[:-1] if size % 2]
    if name == "xdeepfm" and (odd or not cin):
        raise ConfigError(f"cin={cin}: every layer but the last is split in halves; use even sizes")
    makers: dict[str, Callable[[], FieldNetwork | Din]] = {
        "deepfm": lambda: DeepFm(mlp),
        "xdeepfm": lambda: XDeepFm(cin, mlp),
        "autoint": lambda: AutoInt(layers, heads, attention_width, mlp),
        "dcn": lambda: Dcn(layers, mlp),
        "dcnv2": lambda: DcnV2(layers, mlp, experts, low_rank),
        "din": lambda: Din(attention_mlp, mlp),
    }
    return ClickModel(
        makers[name](),
        sizes=sizes,
        dim=dim,
        length=length,
        init_std=init_std,
        dropout=dropout,
        history=history,
        first_order=name in FIRST_ORDER,
    )


def _mean(rows: Float[Array, "*B K W"], real: Bool[Array, "*B K"]) -> Float[Array, "*B W"]:
    """The mean of the K rows that are `real`; 0 where none is."""
    total = jnp.sum(jnp.where(real[..., None], rows, 0.0), axis=-2)
    return total / jnp.maximum(jnp.sum(real, axis=-1), 1).astype(rows.dtype)[..., None]


def _with_mean(
    query: Float[Array, "N Q W"], events: Float[Array, "N L P W"], real: Bool[Array, "N L"]
) -> Float[Array, "N QP W"]:
    """A query's fields, and the means of its events'."""
    n, length, *shape = events.shape
    mean = _mean(events.reshape(n, length, -1), real)
    return jnp.concatenate([query, mean.reshape(n, *shape)], axis=1)


def _by_block(
    run: Callable[[Mapping[str, jax.Array]], jax.Array],
    of_candidates: Mapping[str, Float[Array, "N C ..."]],
) -> Float[Array, "N C ..."]:
    """`run` on the candidates in equal blocks of at most `BLOCK` rows (or one candidate)."""
    n, c = of_candidates["target"].shape[:2]
    blocks = -(-c // max(1, BLOCK // n))
    if blocks <= 1:
        return run(of_candidates)
    size = -(-c // blocks)

    def cut(x: Float[Array, "N C ..."]) -> Float[Array, "K N B ..."]:
        padded = jnp.pad(x, [(0, 0), (0, blocks * size - c)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(n, blocks, size, *x.shape[2:]), 1, 0)

    each = jnp.moveaxis(jax.lax.map(run, jax.tree.map(cut, dict(of_candidates))), 0, 1)
    return each.reshape(n, blocks * size, *each.shape[3:])[:, :c]
