"""Scores of a trained backbone: every item for full ranking, or given pairs.

Shape letters: B queries, I items, C candidates, T items scored at once by a JointBackbone, M runs
of an ensemble.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from slgr_jax.kernels import cpu
from slgr_jax.mesh import Layout, put
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import AnyBackbone, DotBackbone, JointBackbone
from slgr_jax.models.backbones.adapters import row_specs
from slgr_jax.models.backbones.base import Dropout, item_tables
from slgr_jax.models.candidates import Candidates, candidate_ids, candidate_scores
from slgr_jax.sampling.context import Context, Queries
from slgr_jax.sampling.features import FeatureSlots
from slgr_jax.sampling.labelled_rows import LabelledRows

# Items that a JointBackbone scores for one query at once: a tile's fields stay in a CPU's cache.
TILE = 2048


@struct.dataclass
class ServingState:
    """What scoring needs: values without optimiser slots, and the backbone's parameters.

    The values of a backbone that propagates whole tables are what they become on the graph. The
    guidance's parameters serve nothing: they say, in reports, how far the teacher was believed.
    """

    params: dict[str, Any]
    values: dict[str, jax.Array]
    guidance: dict[str, Any] = dataclasses.field(default_factory=dict)


@struct.dataclass
class Scoring:
    """What a trained backbone scores with.

    Attributes:
      serving: its parameters and tables.
      context: what it looks up of users and items.
      as_of: [U] the moment of each user: how many of their events it may look at; None where it
        reads no history.
    """

    serving: ServingState
    context: Context
    as_of: Int[Array, "U"] | None

    def queries(self, users: Int[Array, "B"]) -> Queries:
        """The users at their moments."""
        return Queries(users, None if self.as_of is None else self.as_of[users])


def moments(context: Context, part: str) -> Any:
    """[U] how many events of each user lie before `part`: valid looks at training alone, test at
    validation too; None where no history is read."""
    histories = context.histories
    if histories is None:
        return None
    if part == "test":
        return histories.offsets[1:] - histories.offsets[:-1]
    return histories.trained


def pair_scores(
    backbone: AnyBackbone,
    scoring: Scoring,
    candidates: Candidates,
    dropout: Dropout = None,
    layout: Layout | None = None,
) -> Float[Array, "B C"]:
    """Logits of candidates; of a stochastic pass with `dropout`.

    Args:
      layout: as of `_looked_up`.
    """
    serving, context = scoring.serving, scoring.context
    rows = {
        side: _looked_up(backbone, serving.values, ids, layout)
        for side, ids in candidate_ids(backbone, context, candidates).items()
    }
    return candidate_scores(backbone, serving.params, rows, context, candidates, dropout)


def reference_scores(
    backbones: Sequence[AnyBackbone],
    members: Sequence[Scoring],
    users: Int[Array, "B"],
    items: Int[Array, "B C"],
    *,
    native: bool = False,
) -> Float[Array, "M B C"]:
    """Logits of candidates by runs that were trained apart, each at its own moment of the users.

    Args:
      native: whether the CPU kernels read the rows of backbones that are a dot product of two.
    """

    def scores(backbone: AnyBackbone, member: Scoring) -> jax.Array:
        model = backbone.factor_model if isinstance(backbone, DotBackbone) else None
        if not native or model is None:
            return pair_scores(backbone, member, Candidates(member.queries(users), items))
        user, item = (member.serving.values[x] for x in (model.user_table, model.item_table))
        width, unit = user.shape[1], model.unit
        return cpu.factor_scores(user, item, users, items, width=width, unit=unit)[0]

    return jnp.stack([scores(*each) for each in zip(backbones, members, strict=True)])


# Rows that one call scores; the last chunk is filled up.
_ROWS = 4096


class ScoreRows(Protocol):
    """(scoring, rows) -> [n] logits; `between_chunks` is called between two chunks of rows."""

    def __call__(
        self,
        scoring: Scoring,
        rows: LabelledRows,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> np.ndarray: ...


def score_own_rows(
    backbone: AnyBackbone,
    layout: Layout,
    circumstances: FeatureSlots | None = None,
    *,
    split_tables: bool = False,
) -> ScoreRows:
    """`score_rows` where users are split: a device scores the rows of its own.

    Args:
      circumstances: the features of all interactions, on the host, ordered as
        `context.interaction_rows` says; each row is sent those of its own. None: the rows'
        `interactions` are counted as on the device that has their user (`user_context`).
      split_tables: whether tables of items are split over the layout's table shards, too.
    """
    users = layout.users
    assert users is not None, "users are split"
    size, own_rows = layout.devices, users.table_rows // layout.devices
    share, on_devices = max(_ROWS // size, 1), layout if split_tables else None

    def of_own(scoring: Scoring, queries: Queries, items: jax.Array) -> jax.Array:
        candidates = Candidates(queries, items[:, None])
        return pair_scores(backbone, scoring, candidates, layout=on_devices)[:, 0]

    @functools.partial(jax.jit, static_argnames="specs", out_shardings=layout.replicated)
    def chunk(
        scoring: Scoring, queries: Queries, items: jax.Array, *, specs: tuple[PartitionSpec, ...]
    ) -> jax.Array:
        if size == 1:
            return of_own(scoring, queries, items)
        of_scoring = jax.tree.unflatten(jax.tree.structure(scoring), specs)
        lanes = layout.batch_spec
        on_each = jax.shard_map(
            of_own,
            mesh=layout.mesh,
            in_specs=(of_scoring, lanes, lanes),
            out_specs=lanes,
            check_vma=False,
        )
        return on_each(scoring, queries, items)

    def score(
        scoring: Scoring,
        rows: LabelledRows,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        device, user = np.divmod(users.row[rows.users], own_rows)
        columns = user, rows.as_of, rows.items, rows.interactions
        scores = np.empty(len(rows), np.float32)
        for places in by_device(device, size, share):
            between_chunks()
            row = np.maximum(places, 0)
            piece = [None if x is None else x[row] for x in columns]
            if circumstances is not None and piece[-1] is not None:
                sent = circumstances.of(piece[-1])
                scoring = _in_circumstances(scoring, put(sent, layout.users_sharding))
                piece[-1] = np.tile(np.arange(share, dtype=np.int32), size)
            asking, as_of, items, asked = put(piece, layout.users_sharding)
            queries = Queries(asking, None if scoring.as_of is None else as_of, asked)
            leaves = jax.tree.leaves(scoring) if size > 1 else []
            specs = tuple(leaf.sharding.spec for leaf in leaves)
            of_chunk = jax.device_get(chunk(scoring, queries, items, specs=specs))
            scores[places[places >= 0]] = of_chunk[places >= 0]
        return scores

    return score


def _in_circumstances(scoring: Scoring, slots: FeatureSlots) -> Scoring:
    """A scoring in other features of interactions than those of the data."""
    assert scoring.context.features is not None, "the backbone reads features of interactions"
    features = dataclasses.replace(scoring.context.features, interaction=slots)
    context = dataclasses.replace(scoring.context, features=features)
    return dataclasses.replace(scoring, context=context)


def by_device(device: np.ndarray, devices: int, share: int) -> Int[np.ndarray, "chunks lanes"]:
    """Places of entries in chunks of `devices` x `share` lanes, a device's part its own entries'.

    Args:
      device: [n] whose each entry is.

    Returns:
      [chunks, devices * share]; -1 fills up.
    """
    order = np.argsort(device, kind="stable")
    of_sorted = device[order]
    number = np.arange(order.size) - np.searchsorted(of_sorted, of_sorted)
    chunks = -(-int(np.bincount(device, minlength=devices).max()) // share)
    places = np.full((chunks, devices, share), -1)
    places[number // share, of_sorted, number % share] = order
    return places.reshape(chunks, -1)


def score_rows(backbone: AnyBackbone) -> ScoreRows:
    """What scores labelled rows, each as of its own moment."""

    @functools.partial(jax.jit, static_argnames="where")
    def chunk(
        scoring: Scoring, queries: Queries, items: jax.Array, *, where: Sharding
    ) -> jax.Array:
        scores = pair_scores(backbone, scoring, Candidates(queries, items[:, None]))[:, 0]
        # Of tables that are split XLA might leave scores where it found the rows.
        return jax.lax.with_sharding_constraint(scores, where)

    def score(
        scoring: Scoring,
        rows: LabelledRows,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        # Whole on every device that has something of the tables.
        where = jax.tree.leaves(scoring.serving)[0].sharding
        if isinstance(where, NamedSharding):
            where = NamedSharding(where.mesh, PartitionSpec())
        out = []
        for begin in range(0, len(rows), _ROWS):
            between_chunks()
            columns = (rows.users, rows.as_of, rows.items, rows.interactions)
            piece = [None if x is None else x[begin : begin + _ROWS] for x in columns]
            padded = [
                None if x is None else np.pad(x, (0, _ROWS - x.size), mode="edge") for x in piece
            ]
            users, as_of, items, asked = put(padded, where)
            queries = Queries(users, None if scoring.as_of is None else as_of, asked)
            scores = chunk(scoring, queries, items, where=where)
            out.append((scores, min(_ROWS, len(rows) - begin)))
        parts = [np.asarray(jax.device_get(scores))[:size] for scores, size in out]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    return score


def rows_of(values: Mapping[str, jax.Array], ids: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The rows that ids name, by table, from whole tables."""
    return {name: values[name].at[wanted].get(mode="clip") for name, wanted in ids.items()}


def _looked_up(
    backbone: AnyBackbone,
    values: Mapping[str, jax.Array],
    ids: Mapping[str, jax.Array],
    layout: Layout | None,
) -> dict[str, jax.Array]:
    """`rows_of`, also from a device's blocks of tables, inside a `shard_map`.

    Args:
      layout: the devices that tables are split over, users among them; None: they are whole.
    """
    if layout is None:
        return rows_of(values, ids)
    specs = row_specs(backbone)
    return {
        name: embedding_table.lookup(
            values[name], wanted, specs[name].width, layout, of_users=specs[name].of_users
        )
        for name, wanted in ids.items()
    }


def score_users(backbone: AnyBackbone) -> Callable[[Scoring, Int[Array, "B"]], Float[Array, "B I"]]:
    """(scoring, users) -> scores of all items, for full ranking."""
    return DotScores(backbone) if isinstance(backbone, DotBackbone) else _joint(backbone)


def query_vectors(
    backbone: DotBackbone, scoring: Scoring, queries: Queries, layout: Layout | None = None
) -> Float[Array, "B E"]:
    """The vectors of queries; a score is the inner product with an item's.

    Args:
      layout: as of `_looked_up`.
    """
    serving, context = scoring.serving, scoring.context
    ids = backbone.query_ids(context, queries)
    rows = _looked_up(backbone, serving.values, ids, layout)
    return backbone.query_vectors(serving.params, rows, context, queries, dropout=None)


def catalogue_vectors(backbone: DotBackbone, scoring: Scoring) -> Float[Array, "I E"]:
    """The vectors of all items."""
    serving = scoring.serving
    items = {name: serving.values[name] for name in item_tables(backbone, scoring.context)}
    return backbone.item_vectors(serving.params, items)


@dataclasses.dataclass(frozen=True, eq=False)
class DotScores:
    """(scoring, users [B]) -> scores [B, I], inner products of vectors that may be asked for."""

    backbone: DotBackbone

    def queries(self, scoring: Scoring, users: jax.Array) -> jax.Array:
        """[B, E] of users."""
        return query_vectors(self.backbone, scoring, scoring.queries(users))

    def own_queries(self, scoring: Scoring, users: jax.Array, layout: Layout) -> jax.Array:
        """[B, E] of a device's own users, by their rows there, inside a `shard_map`."""
        return query_vectors(self.backbone, scoring, scoring.queries(users), layout)

    def items(self, scoring: Scoring) -> jax.Array:
        """[I, E] of all items; of tables that are split with the rows that fill them up."""
        return catalogue_vectors(self.backbone, scoring)

    def __call__(self, scoring: Scoring, users: jax.Array) -> jax.Array:
        return self.queries(scoring, users) @ self.items(scoring).T


def _joint(backbone: JointBackbone) -> Callable[[Scoring, jax.Array], jax.Array]:
    """One query at a time, a tile of the catalogue at a time: memory does not grow with either."""

    def score(scoring: Scoring, users: jax.Array) -> jax.Array:
        n_items = row_specs(backbone)["item"].rows
        size = min(TILE, n_items)
        tiles = -(-n_items // size)
        items = jnp.minimum(jnp.arange(tiles * size, dtype=jnp.int32), n_items - 1)

        def one(user: jax.Array) -> jax.Array:
            queries = scoring.queries(user[None])

            def tile(items: jax.Array) -> jax.Array:
                return pair_scores(backbone, scoring, Candidates(queries, items[None]))[0]

            return jax.lax.map(tile, items.reshape(tiles, size)).reshape(-1)[:n_items]

        return jax.lax.map(one, users)

    return score
