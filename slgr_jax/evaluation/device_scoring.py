"""Device program of the scores of a chunk of users, for whoever ranks or lists them there.

The scores [B, I] exist only on the device. `placement.py` says which device scores whom over which
items.

Shape letters: U users, I items, B users of a chunk, E width of a vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.placement import Placement
from slgr_jax.kernels import ranks
from slgr_jax.mesh import Layout

ScoreUsers = Callable[[Any, jax.Array], jax.Array]  # (state, users [B] int32) -> [B, I] float32


@runtime_checkable
class ByVectors(Protocol):
    """`ScoreUsers` whose scores are inner products."""

    def __call__(self, state: Any, users: jax.Array, /) -> jax.Array: ...

    def queries(self, state: Any, users: jax.Array, /) -> jax.Array:
        """[B, E] vectors of users."""
        ...

    def own_queries(self, state: Any, users: jax.Array, layout: Layout, /) -> jax.Array:
        """[B, E] vectors of a device's own users, by their rows there, inside a `shard_map` over
        the layout with the device's part of what is split."""
        ...

    def items(self, state: Any, /) -> jax.Array:
        """[I, E] vectors of all items; more rows where tables are padded."""
        ...


@functools.partial(jax.jit, static_argnames=("by_vectors", "n_items"))
def items_of(state: Any, *, by_vectors: ByVectors, n_items: int) -> ranks.Items:
    """The vectors of all items, as the kernels want them that rank by products."""
    rows = by_vectors.items(state)
    if rows.shape[0] != n_items:
        raise ConfigError(f"score_users has vectors of {rows.shape[0]} items, expected {n_items}")
    return ranks.Items.of(rows.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="by_vectors")
def queries_of(state: Any, users: jax.Array, *, by_vectors: ByVectors) -> jax.Array:
    """[B, E] float32 vectors of a chunk's users; those under 0 are padding."""
    return by_vectors.queries(state, jnp.maximum(users, 0)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("users", "n_items", "at"))
def score_room(*, users: int, n_items: int, at: Placement) -> jax.Array:
    """[users, I] float32 that `score_chunk` may write to."""
    room = jnp.zeros((users, n_items), jnp.float32)
    return room if at.mesh is None else at.laid_out(room, at.of_scores)


@functools.partial(
    jax.jit,
    static_argnames=("score_users", "n_items", "at", "specs"),
    donate_argnames=("room",),
    keep_unused=True,
)
def score_chunk(
    room: jax.Array | None,
    state: Any,
    users: jax.Array,
    *,
    score_users: ScoreUsers,
    n_items: int,
    at: Placement,
    specs: tuple[PartitionSpec, ...] = (),
) -> jax.Array:
    """[B, I] float32, split by user over the mesh. Users under 0 are padding.

    Its own program, so that both passes over a chunk see the same bits. `room` is given up: the
    scores are written over it. New memory for each chunk would take a CPU longer to hand out, a
    page at a time, than the scores to compute.

    Args:
      users: where they are split their rows; a device's part of them are its own, which it scores
        with what it has of them.
      score_users: where items are split `ByVectors`.
      n_items: I; where items are split, with the padding of their tables.
      specs: where users are split, of the leaves of `state`.
    """
    del room

    def scored(state: Any, users: jax.Array) -> jax.Array:
        scores = score_users(state, jnp.maximum(users, 0))
        if scores.shape != (users.size, n_items):
            wanted = (users.size, n_items)
            raise ConfigError(f"score_users gave scores of shape {scores.shape}, expected {wanted}")
        return scores.astype(jnp.float32)

    if at.mesh is None:
        return scored(state, users)
    if at.split_items:
        by_vectors: ByVectors = score_users  # type: ignore[assignment]
        if at.split is None:
            # Rows of users are fetched from whoever has them: XLA sends those of a chunk, no table.
            queries = by_vectors.queries(state, jnp.maximum(users, 0))
        else:
            queries = own_queries(by_vectors, state, users, at, specs)
        items = at.laid_out(by_vectors.items(state), at.of_items)
        scores = at.laid_out(queries, at.of_users) @ items.T
        return at.laid_out(scores.astype(jnp.float32), at.of_scores)
    if at.split is None:
        return at.laid_out(scored(state, users), at.of_users)

    def of_own(state: Any, users: jax.Array) -> jax.Array:
        return scored(state, at.own_rows(users))

    of_state = jax.tree.unflatten(jax.tree.structure(state), specs)
    on_each = jax.shard_map(
        of_own,
        mesh=at.mesh,
        in_specs=(of_state, at.of_users),
        out_specs=at.of_users,
        check_vma=False,
    )
    return on_each(state, users)


def own_queries(
    by_vectors: ByVectors,
    state: Any,
    users: jax.Array,
    at: Placement,
    specs: tuple[PartitionSpec, ...],
) -> jax.Array:
    """[B, E] vectors of users that are split: each device makes those of its own, which are its
    part of what the devices that rank them together have of a chunk.

    Args:
      users: their rows; under 0 is padding.
      specs: of the leaves of `state`.
    """

    def of_own(state: Any, users: jax.Array) -> jax.Array:
        return by_vectors.own_queries(state, at.rows_on_device(users), at.layout)

    lanes = at.layout.batch_spec
    on_each = jax.shard_map(
        of_own,
        mesh=at.mesh,
        in_specs=(jax.tree.unflatten(jax.tree.structure(state), specs), lanes),
        out_specs=lanes,
        check_vma=False,
    )
    queries: jax.Array = on_each(state, users)
    return queries
