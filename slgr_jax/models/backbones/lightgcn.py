"""LightGCN: embeddings smoothed over the graph of training pairs (He et al. 2020, 2002.02126).

Shape letters: U users, I items, R rows of both or one, D width, n edges, K layers, P parts of M
tiles of T edges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.kernels import graph as kernel
from slgr_jax.mesh import part_of_lanes, sum_over_parts
from slgr_jax.models.backbones.adapters import SIDES
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    TableRows,
    unit_rows,
)
from slgr_jax.models.backbones.vector_maps import SideFeature
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.context import GRAPH, Context, Graph, OwnGraph, Queries

TILE = 8  # T
GATHERED = 1 << 25  # float32 of gathered rows in memory at once, where they are not fused away

Pair = tuple[jax.Array, jax.Array]  # of the users, of the items


@dataclasses.dataclass(frozen=True)
class Propagation:
    """How tables are propagated.

    Attributes:
      layers: K, at least 1.
      native: by the CPU kernel.
      rate: of dropped edges, in [0, 1).
    """

    layers: int
    native: bool
    rate: float = 0.0

    @property
    def threshold(self) -> int:
        """An edge is dropped where its word, uniform in [0, 2^32), is less."""
        return min(round(self.rate * 2**32), 2**32 - 1)

    @property
    def weight(self) -> float:
        """What kept edges are multiplied by, so that the sums keep their expectation."""
        return 1.0 / (1.0 - self.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def propagate(
    propagation: Propagation, tables: Pair, graph: Graph | OwnGraph, words: Pair | None
) -> Pair:
    """E = 1 / (K + 1) sum_k A^k E^(0), A_ui = A_iu = w m_ui / sqrt(d_u d_i), k = 0 .. K.

    Equations 3, 4 and 8 (with alpha_k = 1 / (K + 1)) of He et al. 2020. Degrees d are those of the
    whole graph; m_ui is 0 for dropped edges and w = 1 / (1 - rate). Rows without edges keep their
    layer-0 term alone.

    Args:
      propagation: the layers, and who computes them.
      tables: E^(0) of users [U, D] and items [I, D].
      graph: the edges; an `OwnGraph` where `tables` has a device's own users, inside a `shard_map`.
      words: uint32 words of users [U] and items [I] (`edge_words`), of which m is a function;
        None drops nothing.
    """
    user, item = tables
    if isinstance(graph, OwnGraph):
        return _of_own_users(propagation, tables, graph, words)
    if propagation.native:
        return kernel.propagate(
            user,
            item,
            (graph.user_offsets, graph.items),
            (graph.item_offsets, graph.users),
            words,
            layers=propagation.layers,
            threshold=propagation.threshold,
            weight=propagation.weight,
        )
    return _by_xla(propagation, tables, graph, words)


def _forward(
    propagation: Propagation, tables: Pair, graph: Graph | OwnGraph, words: Pair | None
) -> tuple[Pair, tuple[Graph | OwnGraph, Pair | None]]:
    return propagate(propagation, tables, graph, words), (graph, words)


def _backward(
    propagation: Propagation, kept: tuple[Graph | OwnGraph, Pair | None], grads: Pair
) -> tuple[Pair, None, None]:
    # A is symmetric, and so is any polynomial in it: the map is its own adjoint.
    if not isinstance(kept[0], OwnGraph):
        return propagate(propagation, grads, *kept), None, None
    # A device has all of its users' gradient, and a share of the items', as it hands on one.
    _, devices = part_of_lanes()
    user, item = propagate(propagation, (grads[0], sum_over_parts(grads[1])), *kept)
    return (user, item / devices), None, None


propagate.defvjp(_forward, _backward)


def edge_words(
    key: jax.Array, n_users: int, n_items: int, first_user: Int[Array, ""] | int = 0
) -> tuple[UInt32[Array, "U"], UInt32[Array, "I"]]:
    """Random words of users and items; the word of edge (u, i) is mixed(words_u + words_i).

    Both orders of the edges find the same word of an edge, without a permutation between them.

    Args:
      first_user: where the users begin among those of all devices.
    """
    keys = jax.random.split(key)
    users, items = (
        random_bits.of_rows(table_key, first + jnp.arange(rows, dtype=jnp.int32), 1)[:, 0]
        for table_key, rows, first in zip(keys, (n_users, n_items), (first_user, 0), strict=True)
    )
    return users, items


class _Tiles(NamedTuple):
    """The edges of each row cut into tiles of T, with gaps in a row's last tile.

    A segment sum of gathered rows takes XLA one memory access (on GPU an atomic addition) a
    number, and on CPU a copy of every row. The T rows of a tile are added as they are read.

    Attributes:
      row: [P, M] whose edges they are, ascending; R past the last tile.
      columns: [P, M, T] the rows at their other ends; R for gaps and dropped edges.
    """

    row: Int[Array, "P M"]
    columns: Int[Array, "P M T"]


def _tiles(
    propagation: Propagation,
    offsets: Int[Array, "R1"],
    indices: Int[Array, "n"],
    words: UInt32[Array, "R"] | None,
    width: int,
) -> _Tiles:
    """Tiles of the edges that are kept, `GATHERED` numbers a part.

    Args:
      offsets, indices: the other ends of each row's edges.
      words: of the rows.
      width: D.
    """
    rows = offsets.size - 1
    most = (indices.size + rows * (TILE - 1)) // TILE  # sum_r ceil(d_r / T) is no more
    size = min(max(1, GATHERED // (TILE * width)), most)
    parts = -(-most // size)

    # Tile t belongs to the first row whose tiles end after t, and starts as many tiles into that
    # row's edges as t lies behind the row's first tile.
    counts = -(-jnp.diff(offsets) // TILE)
    ends = jnp.cumsum(counts)
    tile = jnp.arange(parts * size, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    owner = jnp.minimum(row, rows - 1)
    start = offsets[owner] + TILE * (tile - (ends - counts)[owner])
    edge = start[:, None] + jnp.arange(TILE, dtype=jnp.int32)[None, :]
    is_edge = edge < offsets[owner + 1][:, None]  # never past the last tile
    columns = indices.at[edge].get(mode="clip")

    if words is not None:
        word = random_bits.mixed(words[owner][:, None] + words[columns])
        is_edge &= word >= jnp.uint32(propagation.threshold)
    columns = jnp.where(is_edge, columns, rows)
    return _Tiles(row.reshape(parts, size), columns.reshape(parts, size, TILE))


def _summed(tiles: _Tiles, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """sum of x_c over the edges (r, c) of each row r."""
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])  # row R is 0

    def add(total: jax.Array, part: _Tiles) -> tuple[jax.Array, None]:
        # T gathers of M rows: XLA fuses them into their sum, but one of [M, T] into none on CPU.
        gathered = [
            padded.at[part.columns[:, k]].get(mode="promise_in_bounds") for k in range(TILE)
        ]
        sums = functools.reduce(jnp.add, gathered)
        return total.at[part.row].add(sums, indices_are_sorted=True, mode="drop"), None

    return jax.lax.scan(add, jnp.zeros_like(x), tiles)[0]


def _delivered(tiles: _Tiles, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """sum of x_r over the edges (r, c) of each column c."""
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    def add(total: jax.Array, part: _Tiles) -> tuple[jax.Array, None]:
        sent = padded.at[part.row].get(mode="promise_in_bounds")
        for k in range(TILE):
            total = total.at[part.columns[:, k]].add(sent, mode="drop")
        return total, None

    return jax.lax.scan(add, jnp.zeros_like(x), tiles)[0]


def _of_own_users(
    propagation: Propagation, tables: Pair, graph: OwnGraph, words: Pair | None
) -> Pair:
    """`propagate` of a device's own users: a layer of items is the sum of what all devices' users
    send to them, which is all that travels, [I, D] a layer."""
    n_users, width = tables[0].shape
    n_items, count = graph.degrees.size, graph.items.size

    # Rows of items follow those of users, and have no edges of their own.
    offsets = jnp.pad(graph.offsets, (0, n_items + 1), constant_values=count)
    both = None if words is None else jnp.concatenate(words)
    tiles = _tiles(propagation, offsets, graph.items + n_users, both, width)

    degree = jnp.concatenate([jnp.diff(offsets[: n_users + 1]), graph.degrees])
    degree = degree.astype(jnp.float32)[:, None]
    scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1.0)), 0.0)

    def layer(k: Int[Array, ""], state: Pair) -> Pair:
        scaled, total = state
        of_items = sum_over_parts(_delivered(tiles, scaled)[n_users:])
        sums = jnp.concatenate([_summed(tiles, scaled)[:n_users], of_items])
        value = propagation.weight * scale * sums
        return scale * value, total + value

    table = jnp.concatenate(tables)
    total = jax.lax.fori_loop(0, propagation.layers, layer, (scale * table, table))[1]
    mean = total / (propagation.layers + 1)
    return mean[:n_users], mean[n_users:]


def _by_xla(propagation: Propagation, tables: Pair, graph: Graph, words: Pair | None) -> Pair:
    """`propagate` on one table of users and then items, in the steps of graph.cc."""
    n_users, width = tables[0].shape

    # One graph of users, then items: rows of items follow those of users, and so do their edges.
    offsets = jnp.concatenate([graph.user_offsets, graph.items.size + graph.item_offsets[1:]])
    indices = jnp.concatenate([graph.items + n_users, graph.users])
    both = None if words is None else jnp.concatenate(words)
    tiles = _tiles(propagation, offsets, indices, both, width)

    degree = jnp.diff(offsets).astype(jnp.float32)[:, None]
    scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1.0)), 0.0)

    def layer(k: Int[Array, ""], state: Pair) -> Pair:
        scaled, total = state  # what is summed over edges is S E, not E
        value = propagation.weight * scale * _summed(tiles, scaled)
        return scale * value, total + value

    table = jnp.concatenate(tables)
    total = jax.lax.fori_loop(0, propagation.layers, layer, (scale * table, table))[1]
    mean = total / (propagation.layers + 1)
    return mean[:n_users], mean[n_users:]


class LightGCN(ItemTableBackbone):
    """LightGCN as a `DotBackbone`: tables `user` [U, D] and `item` [I, D], no dense parameters.

    Dropout is on the edges of the training graph: a pass drops each with that rate in both
    directions and all layers, and weighs the others up.
    """

    reads: frozenset[str] = frozenset({GRAPH})
    whole = True
    side_features = True
    factor_model = None

    def __init__(
        self,
        *,
        n_users: int,
        n_items: int,
        dim: int,
        layers: int,
        init_std: float,
        dropout: float,
        native: bool,
    ) -> None:
        self.tables: Mapping[str, TableSpec] = {
            "user": TableSpec(n_users, dim, init_std, of_users=True),
            "item": TableSpec(n_items, dim, init_std),
        }
        self.dropout = dropout
        self._layers, self._native = layers, native

    def init(self, key: jax.Array) -> Params:
        return {}

    def propagate(
        self,
        params: Params,
        values: Mapping[str, Float[Array, "_ D"]],
        context: Context,
        *,
        dropout: Dropout = None,
    ) -> dict[str, Float[Array, "_ D"]]:
        assert context.graph is not None, "LightGCN reads the graph"
        user, item = values["user"], values["item"]
        rate, words = 0.0, None
        if dropout is not None and dropout[0] > 0:
            rate, key = dropout
            device, _ = part_of_lanes() if isinstance(context.graph, OwnGraph) else (0, 1)
            words = edge_words(key, user.shape[0], item.shape[0], device * user.shape[0])
        propagation = Propagation(self._layers, self._native, rate)
        sides = {name: values[name] for name in SIDES.values() if name in values}
        if not sides:
            user, item = propagate(propagation, (user, item), context.graph, words)
            return {"user": user, "item": item}
        return self._with_sides(propagation, (user, item), sides, context.graph, words)

    def _with_sides(
        self,
        propagation: Propagation,
        tables: Pair,
        sides: Mapping[str, Float[Array, "R D"]],
        graph: Graph | OwnGraph,
        words: Pair | None,
    ) -> dict[str, Float[Array, "_ D"]]:
        """E + sum over the sides f of w_f F_f / |F_f|, with F_f what the graph makes of f's rows
        and of zeros for the other side; all in one pass over the edges.

        LLMRec (WSDM'24, arXiv 2311.00423), its side information.
        """
        parts = [tables]
        for name, rows in sides.items():
            user, item = (jnp.zeros_like(table) for table in tables)
            parts.append((rows, item) if name == SIDES["user"] else (user, rows))
        together = tuple(jnp.concatenate(of_all, axis=1) for of_all in zip(*parts, strict=True))
        smoothed = propagate(propagation, together, graph, words)
        out = {}
        for name, of_all in zip(("user", "item"), smoothed, strict=True):
            total, *of_sides = jnp.split(of_all, len(parts), axis=1)
            for side, rows in zip(sides, of_sides, strict=True):
                adapter = self.adapters[side]
                assert isinstance(adapter, SideFeature)
                total += np.float32(adapter.weight) * unit_rows(rows)
            out[name] = total
        return out

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        return {"user": queries.users}

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout = None,
    ) -> Float[Array, "N E"]:
        return rows["user"]
