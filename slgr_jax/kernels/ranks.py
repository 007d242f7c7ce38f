"""What the CPU kernels of full ranking compute, as functions of JAX arrays (ranks.cc does it).

A user's scores are ranked by one thread, and all results are integers or scores: they do
not depend on the number of threads. Ids are trusted to be in bounds, rows to ascend.

Shape letters: B users of a chunk, I items, U users, E width of a vector, K cut-off, W room for a
user's relevant items, D distinct scores, P panels of N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from slgr_jax.kernels.build import ffi_call

PANEL = 32  # of items, the same in products.h
Ragged = tuple[jax.Array, jax.Array]  # offsets [U + 1], indices [>= n]: ascending rows of items


class Ranked(NamedTuple):
    """The results of `rank_rows`.

    Attributes:
      bad: the row has a NaN or infinite score; nothing else of it counts then.
      score: of the user's relevant items, in order; -inf where one is masked.
      greater: candidates with a greater score.
      tied: other candidates with the same score.
      tied_before: those of them with a smaller index.
      items: the best candidates; of equal scores the smaller index first, -1 past the last.
      values: their scores, -inf past the last.
    """

    bad: Bool[Array, "B"]
    score: Float[Array, "B W"]
    greater: Int[Array, "B W"]
    tied: Int[Array, "B W"]
    tied_before: Int[Array, "B W"]
    items: Int[Array, "B K"]
    values: Float[Array, "B K"]


class Items(NamedTuple):
    """The vectors of all items, as rows and as the products read them.

    Attributes:
      rows: item after item.
      panels: column after column of `PANEL` items at a time; 0 past the last item.
      greatest: the greatest number, without signs: scores that cannot overflow are not looked at.
    """

    rows: Float[Array, "I E"]
    panels: Float[Array, "P E N"]
    greatest: Float[Array, ""]

    @classmethod
    def of(cls, rows: Float[Array, "I E"]) -> Items:
        """All of it, of the vectors."""
        n, width = rows.shape
        whole = jnp.pad(rows, ((0, -n % PANEL), (0, 0)))
        panels = whole.reshape(-1, PANEL, width).swapaxes(1, 2)
        return cls(rows, panels, jnp.max(jnp.abs(rows), initial=0.0))


class Vectors(NamedTuple):
    """Scores as what they are products of: s_ui = <queries_u, items_i>."""

    queries: Float[Array, "B E"]
    items: Items


Scores = jax.Array | Vectors  # [B, I], or what it is the product of


def _of(scores: Scores) -> tuple[str, tuple[jax.Array, ...]]:
    """Whether a kernel takes the scores as rows or as products, and what it takes of them."""
    return (
        ("products", (scores.queries, *scores.items))
        if isinstance(scores, Vectors)
        else ("rows", (scores,))
    )


def rank_rows(
    scores: Scores,
    users: Int[Array, "B"],
    seen: Ragged,
    relevant: Ragged,
    *,
    width: int,
    k: int,
) -> Ranked:
    """Ranks each user's relevant items, and lists the best, among the items not in `seen`.

    Of `Vectors` a score is the sum over even columns plus that over odd ones, each in the order of
    columns, with one rounding a column where the processor has it: the same bits whoever is ranked
    beside the user, and of items with the same vector the same score. No matrix is written.

    Args:
      scores: of each user and item; -0.0 counts as 0.0.
      users: rows of `seen` and `relevant`; under 0: padding, whose results mean nothing.
      width: W, at least the longest row of `relevant`; 0 for no ranks.
      k: K; 0 for no lists.

    The counts of a relevant item that is masked, and places past a user's last, are 0.
    """
    n = users.size
    places, lists = (n, width), (n, k)
    shapes = [places, places, places, places, lists, lists]
    kinds = [np.float32, np.int32, np.int32, np.int32, np.int32, np.float32]
    out = [jax.ShapeDtypeStruct((n,), np.bool_)]
    out += [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    source, arrays = _of(scores)
    return Ranked(*ffi_call(f"slgr_rank_{source}", out)(*arrays, users, *seen, *relevant))


def pool_rows(
    scores: Scores,
    users: Int[Array, "B"],
    seen: Ragged,
    relevant: Ragged,
    tables: Sequence[jax.Array],
) -> UInt32[Array, "B 2"]:
    """sum_i (2 |{pairs above s_ui}| + |{pairs at s_ui}|) over items in neither of the user's rows.

    Args:
      scores, users, seen, relevant: as for `rank_rows`.
      tables: what `ranking_metrics.pool_tables` makes of the pairs' scores, in its order.

    Returns:
      Low and high words of each user's sum; 0 for padding.
    """
    source, arrays = _of(scores)
    call = ffi_call(f"slgr_pool_{source}", jax.ShapeDtypeStruct((users.size, 2), np.uint32))
    counts: jax.Array = call(*arrays, users, *seen, *relevant, *tables)
    return counts
