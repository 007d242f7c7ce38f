"""The protocols that recommenders follow.

A backbone is pure functions; its tables and parameters live in the train state. It reads table
rows (`rows`, keyed as its ids are), dense parameters (`params`) and what is known of users and
items (`Context`). There are three kinds:

  DotBackbone       score = <vector of the query, vector of the item>; ranks a catalogue by one
                    matrix product. Matrix factorisation, graphs.
  SequenceBackbone  a DotBackbone that learns from every place of a window of a history at once.
  JointBackbone     score of (query, item) through a network that sees both. Click prediction.

Shape letters: N queries, C candidates per query, L places of a window, D width, E width of the
vectors whose dot product is the score, I items.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.models.backbones.adapters import NONE
from slgr_jax.models.backbones.vector_maps import Adapter
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling import features as features_lib
from slgr_jax.sampling.context import FEATURES, Context, Queries, Sizes

USER = "user"  # the name that rows of users go by
Ids = Mapping[str, Int[Array, "..."]]  # table name -> ids of the rows that are read, any shape
TableRows = Mapping[str, jax.Array]  # table name -> the rows that were read, [..., D]
Params = Mapping[str, Any]
Dropout = tuple[float, jax.Array] | None  # (rate, key) of a stochastic pass; None: deterministic


@dataclasses.dataclass(frozen=True)
class FactorModel:
    """A backbone whose score is a dot product of two rows: s_ui = p_u . q_i, nothing else.

    Attributes:
      user_table, item_table: whose rows, of the same width, p_u and q_i are.
      unit: the last entry of p_u counts as 1, so that the last of q_i is the item's bias.
    """

    user_table: str
    item_table: str
    unit: bool


class Backbone(Protocol):
    """What every recommender states of itself."""

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """Name -> size of each embedding table."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """What of the `Context` it looks up: HISTORY, FIELDS, FEATURES, GRAPH of
        `sampling.context`."""
        ...

    @property
    def dropout(self) -> float:
        """The dropout rate of a training pass; 0 for none."""
        ...

    def init(self, key: jax.Array) -> Params:
        """The dense parameters (a Flax `params` collection; {} where there are none)."""
        ...


@runtime_checkable
class DotBackbone(Backbone, Protocol):
    """score(query, item) = <query_vectors(query), item_vectors(item)>."""

    @property
    def whole(self) -> bool:
        """Whether scoring needs every row of every table (`propagate`), not those of a batch."""
        ...

    @property
    def factor_model(self) -> FactorModel | None:
        """How to score without writing rows out, where a deterministic score is a dot product."""
        ...

    def propagate(
        self,
        params: Params,
        values: Mapping[str, Float[Array, "_ D"]],
        context: Context,
        *,
        dropout: Dropout = None,
    ) -> dict[str, Float[Array, "_ D"]]:
        """What the rows that the other methods read are gathered from: the tables themselves, or
        (`whole`) what they become on the graph. Serving keeps the result."""
        ...

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        """Rows that the query's side reads, [N, ...]."""
        ...

    def item_ids(self, context: Context, items: Int[Array, "..."]) -> Ids:
        """Rows that the item's side reads: row i of each table it names is item i's."""
        ...

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout,
    ) -> Float[Array, "N E"]:
        """The vectors of queries from the rows that `query_ids` names."""
        ...

    def item_vectors(self, params: Params, rows: TableRows) -> Float[Array, "... E"]:
        """The vectors of items from the rows that `item_ids` names."""
        ...


class ItemTableBackbone:
    """What most of them share: tables as they are, and row i of table `item` as item i's vector.

    Attributes:
      feature_tables: table -> the table of features whose rows are added to its rows.
      adapters, vector_fields: see `adapters.Adapted`.
    """

    whole = False
    tables: Mapping[str, TableSpec]
    reads: frozenset[str]
    feature_tables: Mapping[str, str] = types.MappingProxyType({})
    adapters: Mapping[str, Adapter] = NONE
    vector_fields = False

    def propagate(
        self,
        params: Params,
        values: Mapping[str, Float[Array, "_ D"]],
        context: Context,
        *,
        dropout: Dropout = None,
    ) -> dict[str, Float[Array, "_ D"]]:
        """See `DotBackbone.propagate`."""
        return dict(values)

    def item_ids(self, context: Context, items: Int[Array, "..."]) -> Ids:
        """See `DotBackbone.item_ids`."""
        return {"item": items}

    def item_vectors(self, params: Params, rows: TableRows) -> Float[Array, "... E"]:
        """See `DotBackbone.item_vectors`."""
        return rows["item"]


class Window(NamedTuple):
    """What a sequence backbone predicts of W windows, T places each.

    Attributes:
      states: [W, T, E] vectors to score targets and negatives with.
      place: [T] or [W, T]: which of the window's L + 1 events is the target of each.
      weights: [W, T] 1 where there is something to predict.
    """

    states: Float[Array, "W T E"]
    place: Int[Array, "..."]
    weights: Float[Array, "W T"]


@runtime_checkable
class SequenceBackbone(DotBackbone, Protocol):
    """Reads the user's last L events (a masked place may be one of the L): `query_ids` are
    {"item": ids} of `context.recent`.

    A window is L + 1 events: the L before a query's moment (as `recent` gives them) and the one
    at it.
    """

    @property
    def length(self) -> int:
        """L."""
        ...

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """One training pass (with dropout) over windows.

        Args:
          events: rows of table `item` of the L + 1 events, oldest first, the latest always last.
          real: which of them are events of the user.
          key: of dropout, and of masks where the backbone draws some; the same on every device.
            What is drawn of it for lanes is drawn by their number (`random_bits.words_of_lanes`).
        """
        ...


@runtime_checkable
class FusesUsers(SequenceBackbone, Protocol):
    """A SequenceBackbone whose states take up rows of their user: `query_ids` has `USER`, too."""

    def fused(
        self,
        params: Params,
        states: Float[Array, "N T E"],
        users: Float[Array, "N V"],
        *,
        dropout: Dropout,
    ) -> Float[Array, "N T E"]:
        """What states of a window, or of queries, come to beside the rows of their users."""
        ...


@runtime_checkable
class JointBackbone(Backbone, Protocol):
    """score(query, item) through a network that sees both sides together."""

    def ids(self, context: Context, queries: Queries, items: Int[Array, "N C"]) -> Ids:
        """Rows that scoring (queries, items) reads, [N, ...]."""
        ...

    def score(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout,
    ) -> Float[Array, "N C"]:
        """Logits of the candidates from the rows that `ids` names."""
        ...


@runtime_checkable
class PairBackbone(JointBackbone, Protocol):
    """A JointBackbone whose network has a vector of each pair before its logit."""

    def pair_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout,
    ) -> Float[Array, "N C E"]:
        """What the logits of the candidates are a linear function of."""
        ...

    def pair_width(self) -> int:
        """E."""
        ...


@runtime_checkable
class LosesBeside(JointBackbone, Protocol):
    """A JointBackbone that loses something by itself on each row that it learns from."""

    @property
    def lost_weight(self) -> float:
        """What that is multiplied with; 0: there is none."""
        ...

    def lost(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
    ) -> Float[Array, "N C"]:
        """What is lost on candidates, from the rows that `ids` names."""
        ...


AnyBackbone = DotBackbone | JointBackbone


def dots(states: Float[Array, "... E"], vectors: Float[Array, "... C E"]) -> Float[Array, "... C"]:
    """Scores of C candidates for each state."""
    return jnp.einsum("...e,...ce->...c", states, vectors)


def unit_rows(x: Float[Array, "*N Z"]) -> Float[Array, "*N Z"]:
    """Vectors over their length; zeros, and their gradient, stay zero."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(squares > 0, jax.lax.rsqrt(jnp.maximum(squares, 1e-24)), 0.0)


def with_features(backbone: AnyBackbone, sizes: Sizes) -> AnyBackbone:
    """A copy of an `ItemTableBackbone` that adds the features of users and items to their rows.

    Wherever its methods see a row of `user`, it is
      p_u + sum over the features f of u of what f comes to (`sampling.features`),
    and of `item` likewise (LightFM, Kula 2015, arXiv 1507.08439, section 3): an item's bias too.
    Serving keeps the sums in place of the rows. Other backbones, and sides without a table or
    without features, are as they were.
    """
    if not isinstance(backbone, ItemTableBackbone):
        return backbone
    by_table = {"user": sizes.user_features, "item": sizes.item_features}
    of_table: dict[str, str] = {}
    tables = dict(backbone.tables)
    for name, side in by_table.items():
        if side is not None and name in backbone.tables:
            of_table[name] = features_lib.TABLES[name]
            spec = dataclasses.replace(backbone.tables[name], rows=side.rows, of_users=False)
            tables[of_table[name]] = spec
    if not of_table:
        return backbone
    composed = copy.copy(backbone)
    composed.feature_tables, composed.tables = of_table, tables
    composed.reads = backbone.reads | {FEATURES}
    return composed


def feature_tables(backbone: AnyBackbone) -> Mapping[str, str]:
    """Table -> the table of features whose rows are added to its rows; {} for most backbones."""
    return backbone.feature_tables if isinstance(backbone, ItemTableBackbone) else {}


def with_features_added(
    backbone: AnyBackbone, values: Mapping[str, Float[Array, "_ D"]], context: Context
) -> dict[str, Float[Array, "_ D"]]:
    """Whole tables, those of users and items with their features added; rows that fill a table up
    have none."""
    out = dict(values)
    for name, feature_table in feature_tables(backbone).items():
        assert context.features is not None
        slots = context.features.slots(name)
        if feature_table in values and slots is not None:
            total = features_lib.total_of_all(slots, values[feature_table])
            if name in out:
                filling = out[name].shape[0] - total.shape[0]
                total = out[name] + jnp.pad(total, ((0, filling), (0, 0)))
            out[name] = total
    return out


def item_tables(backbone: DotBackbone, context: Context) -> frozenset[str]:
    """The tables whose row i is item i's."""
    return frozenset(backbone.item_ids(context, jnp.zeros((1,), jnp.int32)))


def missing_members(backbone: object) -> list[str]:
    """What `backbone` lacks of the protocol that it comes closest to; [] for a backbone."""

    def missing(protocol: type) -> list[str]:
        bases = (base for base in protocol.__mro__ if getattr(base, "_is_protocol", False))
        members = {name for base in bases for name in vars(base) if not name.startswith("_")}
        return sorted(name for name in members if not hasattr(backbone, name))

    return min(map(missing, (DotBackbone, JointBackbone)), key=len)
