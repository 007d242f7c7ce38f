"""Which examples a row is shown: training rows with labels, by similarity, found on the device.

    s(row, e) = 1/2 cos(h, h_e) + 1/2 cos(z_i, z_i_e)
    h = mean over the last L events before the row of z_event

The k clicked and the k not clicked examples with the largest s, of equals the one that comes first.
Of a row (u, i) at moment t no example is

    a row of u at t or later        the row itself among them
    a row of u with item i          its label would be the row's, or all but say it
    a row of u                      where the data have no times

so that no label of a row, or of what came after it, reaches it. What examples say is training's:
validation and test are rows that ask, never examples. A row that finds fewer than k has fewer.

Examples go by in blocks that keep the best so far: memory is O(rows x BLOCK), time O(rows x
examples x Z).

Shape letters: N queries, C candidates of one, E examples of a label, B of a block, k found of a
label, K = 2 k, Z width of an item's vector, R of a reasoning, L events of a history, I items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Examples that all rows of a step are compared with at once.
BLOCK = 1024
# Of a row without times, and of what fills a pool up: a user that nobody is.
NOBODY = -1


@struct.dataclass
class Pool:
    """The examples of one label, filled up to a multiple of a block by rows of `NOBODY`.

    Attributes:
      users, items: [E].
      as_of: [E] how many training interactions of the user lie before; None without times.
      histories: [E, Z] h_e, of length 1, or 0 where nothing lies before.
      reasoning: [E, R] zeros where they are not read.
    """

    users: Int[Array, "E"]
    items: Int[Array, "E"]
    as_of: Int[Array, "E"] | None
    histories: Float[Array, "E Z"]
    reasoning: Float[Array, "E R"]


@struct.dataclass
class Examples:
    """What is resident of them.

    Attributes:
      clicked, others: of label 1 and of label 0.
      vectors: [I, Z] z of each item, of length 1; 0 where it has none.
    """

    clicked: Pool
    others: Pool
    vectors: Float[Array, "I Z"]


class Found(NamedTuple):
    """The examples of rows, clicked first, of each label the most similar first.

    Attributes:
      users, items, as_of: [N, C, K]; as_of None without times.
      reasoning: [N, C, K, R].
      real: [N, C, K] False where there is no such example; the others are then some example's.
    """

    users: Int[Array, "N C K"]
    items: Int[Array, "N C K"]
    as_of: Int[Array, "N C K"] | None
    reasoning: Float[Array, "N C K R"]
    real: Bool[Array, "N C K"]


def unit(x: Float[Array, "*N Z"]) -> Float[Array, "*N Z"]:
    """Vectors over their length; zeros stay zeros."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(length > 0, x / jnp.maximum(length, 1e-12), 0.0)


def history_vectors(
    vectors: Float[Array, "I Z"], events: Int[Array, "N L"], real: Bool[Array, "N L"]
) -> Float[Array, "N Z"]:
    """h of each row, of length 1: the mean over its `real` events."""
    return unit(jnp.sum(jnp.where(real[..., None], vectors[events], 0.0), axis=-2))


def find(
    examples: Examples,
    users: Int[Array, "N"],
    items: Int[Array, "N C"],
    as_of: Int[Array, "N"] | None,
    histories: Float[Array, "N Z"],
    count: int,
) -> Found:
    """The examples of rows (user, item) at moments.

    Args:
      as_of: None: no example of the same user is found.
      histories: h of each query.
      count: k.
    """
    targets = examples.vectors[items]
    pools, parts = (examples.clicked, examples.others), []
    for pool in pools:
        asking = users, items, as_of, histories, targets
        at, real = _nearest(pool, examples.vectors, *asking, count)
        moments = None if pool.as_of is None else pool.as_of[at]
        parts.append(Found(pool.users[at], pool.items[at], moments, pool.reasoning[at], real))
    clicked, others = parts
    joined: Found = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), clicked, others)
    return joined._replace(users=jnp.maximum(joined.users, 0))


def _nearest(
    pool: Pool,
    vectors: Float[Array, "I Z"],
    users: Int[Array, "N"],
    items: Int[Array, "N C"],
    as_of: Int[Array, "N"] | None,
    histories: Float[Array, "N Z"],
    targets: Float[Array, "N C Z"],
    count: int,
) -> tuple[Int[Array, "N C k"], Bool[Array, "N C k"]]:
    """Places in the pool, and which of them are examples of the row."""
    size = min(BLOCK, pool.users.shape[0])
    blocks = pool.users.shape[0] // size
    shape = *items.shape, count

    def step(
        best: tuple[jax.Array, jax.Array], number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        begin = number * size

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, size)

        owners, listed = cut(pool.users)[None], cut(pool.items)
        of_history = jnp.einsum("nz,bz->nb", histories, cut(pool.histories))
        of_target = jnp.einsum("ncz,bz->ncb", targets, vectors[listed])
        same = (owners == users[:, None])[:, None, :]
        if as_of is None or pool.as_of is None:
            allowed = ~same
        else:
            before = (cut(pool.as_of)[None] < as_of[:, None])[:, None, :]
            allowed = ~same | (before & (listed[None, None] != items[..., None]))
        allowed = allowed & (owners != NOBODY)[:, None]
        similarity = jnp.where(allowed, 0.5 * of_history[:, None] + 0.5 * of_target, -jnp.inf)
        values, places = best
        values, order = jax.lax.top_k(jnp.concatenate([values, similarity], axis=2), count)
        earlier = jnp.take_along_axis(places, jnp.minimum(order, count - 1), axis=2)
        return (values, jnp.where(order < count, earlier, begin + order - count)), None

    nothing = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    (values, places), _ = jax.lax.scan(step, nothing, jnp.arange(blocks, dtype=jnp.int32))
    return places, values > -jnp.inf
