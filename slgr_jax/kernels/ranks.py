"""What the CPU kernels of full ranking compute, as functions of JAX arrays (ranks.cc does it).

A user's row of scores is ranked by one thread, and all results are integers or scores: they do
not depend on the number of threads. Ids are trusted to be in bounds, rows to ascend.

Shape letters: B users of a chunk, I items, U users, K cut-off, W room for a user's relevant items,
D distinct scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from slgr_jax.kernels.build import ffi_call

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


def rank_rows(
    scores: Float[Array, "B I"],
    users: Int[Array, "B"],
    seen: Ragged,
    relevant: Ragged,
    *,
    width: int,
    k: int,
) -> Ranked:
    """Ranks each user's relevant items, and lists the best, among the items not in `seen`.

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
    return Ranked(*ffi_call("slgr_rank_rows", out)(scores, users, *seen, *relevant))


def pool_rows(
    scores: Float[Array, "B I"],
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
    call = ffi_call("slgr_pool_rows", jax.ShapeDtypeStruct((users.size, 2), np.uint32))
    counts: jax.Array = call(scores, users, *seen, *relevant, *tables)
    return counts
