"""What the CPU kernels of a step compute, as functions of JAX arrays (rows.h, draws.cc do it).

Columns are worked on in blocks of 32 by one thread each, and the blocks' sums are added in
order: results do not depend on the number of threads. Ids are trusted to be in bounds. Tables are
float32, or packed bfloat16 rows (`embedding_table.RowFormat`), which are rounded stochastically.

Shape letters: S steps, B triples, G preferences, N queries or touched rows, C candidates of a
query, R rows of a table, W numbers of a row (values and slots), D width, U users, n entries of the
excluded sets.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt32

from slgr_jax.kernels.build import ffi_call

BLOCK = 32
RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "lazy_adam": 3}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row optimiser's update rule, one of `RULES`, and its numbers.

    `RowOptimizer.rule` of `models/embedding_table.py` gives it.
    """

    name: str
    lr: float
    eps: float = 0.0
    b1: float = 0.0
    b2: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        """As the kernels take them."""
        numbers = {name: np.float32(getattr(self, name)) for name in ("lr", "eps", "b1", "b2")}
        return {"kind": np.int64(RULES[self.name])} | numbers


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _named(kernel: str, table: jax.Array) -> str:
    """The kernel for tables of this type."""
    return f"{kernel}_{'bfloat16' if table.dtype == np.uint16 else 'float32'}"


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _words(words: jax.Array | None, *shape: int) -> jax.Array | np.ndarray:
    """What keys the rounding; float32 tables are not rounded, and need none."""
    return np.zeros(shape, np.uint32) if words is None else words


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def factor_scores(
    user_table: Num[Array, "Ru Wu"],
    item_table: Num[Array, "Ri Wi"],
    users: Int[Array, "N"],
    items: Int[Array, "N C"],
    *,
    width: int,
    unit: bool,
) -> tuple[Float[Array, "N C"], Float[Array, "N 2"], Float[Array, "2"]]:
    """Dot products of rows, which are never written out: s_nc = p_n . q_nc.

    Args:
      users, items: rows of the two tables.
      width: D, the columns that are values.
      unit: the last entry of p counts as 1 in the product (it meets the item's bias).

    Returns:
      scores, per query (|p_n|^2, sum_c |q_nc|^2), and the sum of these over queries.
    """
    n, c = items.shape
    out = (_floats(n, c), _floats(n, 2), _floats(2), _floats(_blocks(width), n, c + 2))
    call = ffi_call(_named("slgr_factor_scores", user_table), out)
    scores, squares, totals, _ = call(
        user_table, item_table, users, items, width=np.int64(width), bias=unit
    )
    return scores, squares, totals


def factor_update(
    user_table: Num[Array, "Ru Wu"],
    item_table: Num[Array, "Ri Wi"],
    user_slot: Int[Array, "Ru"],
    item_slot: Int[Array, "Ri"],
    users: Int[Array, "N"],
    items: Int[Array, "N C"],
    d_scores: Float[Array, "N C"],
    d_squares: Float[Array, "N 2"],
    words: UInt32[Array, "2 2"] | None,
    rule: Rule,
    *,
    width: int,
    unit: bool,
) -> tuple[Num[Array, "Ru Wu"], Num[Array, "Ri Wi"], Int[Array, "Ru"], Int[Array, "Ri"]]:
    """The update of both tables, given the gradient of what `factor_scores` returned.

    Gradients of equal rows are summed, then `rule` is applied once to each distinct row. The
    tables and slots (scratch, an entry a row) are updated in place.

    Args:
      words: what keys the rounding of users' and of items' rows; None for float32 tables.
    """
    n, m = users.size, items.size
    room = (n + m) * (_blocks(width) * BLOCK + 2)
    tables = (user_table, item_table, user_slot, item_slot)
    out = (*map(_like, tables), _floats(room), _ints(3 * (n + m)))
    name = _named("slgr_factor_update", user_table)
    call = ffi_call(name, out, input_output_aliases={k: k for k in range(4)})
    outputs = call(
        *tables, users, items, d_scores, d_squares, _words(words, 2, 2),
        width=np.int64(width), bias=unit, **rule.attributes,
    )  # fmt: skip
    return outputs[0], outputs[1], outputs[2], outputs[3]


def row_update(
    table: Num[Array, "R W"],
    slot: Int[Array, "R"],
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    words: UInt32[Array, "2"] | None,
    rule: Rule,
) -> tuple[Num[Array, "R W"], Int[Array, "R"]]:
    """`rule` applied once to each distinct row of `ids`, with its gradients summed; in place.

    Args:
      words: what keys the rounding; None for a float32 table.
    """
    n, width = grads.shape
    room = n * (_blocks(width) * BLOCK + 2)
    out = (_like(table), _like(slot), _floats(room), _ints(3 * n))
    name = _named("slgr_row_update", table)
    call = ffi_call(name, out, input_output_aliases={0: 0, 1: 1})
    outputs = call(
        table, slot, ids, grads, _words(words, 2), width=np.int64(width), **rule.attributes
    )
    return outputs[0], outputs[1]


class Cut(Protocol):
    """The excluded sets of users: `arrays.Excluded`."""

    @property
    def offsets(self) -> Int[Array, "U1"]: ...
    @property
    def keys(self) -> Int[Array, "n"]: ...
    @property
    def marks(self) -> Int[Array, "m"]: ...
    @property
    def shifts(self) -> Int[Array, "n"] | None: ...
    @property
    def free(self) -> Int[Array, "U"]: ...


def draw_outside(
    bits: UInt32[Array, "N"], users: Int[Array, "N"], cut: Cut
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Places outside each user's excluded set, and weights: see `negatives.draw_outside`."""
    call = ffi_call("slgr_draw_outside", (_ints(*users.shape), _floats(*users.shape)))
    shifts = cut.keys if cut.shifts is None else cut.shifts
    unit = cut.shifts is None
    place, weight = call(
        bits, users, cut.offsets, cut.keys, cut.marks, shifts, cut.free, unit_mass=unit
    )
    return place, weight


def draw_triples(
    first: UInt32[Array, "S M"],
    positive: UInt32[Array, "S B"],
    negative: UInt32[Array, "S B"],
    pair_users: Int[Array, "n"],
    pair_items: Int[Array, "n"],
    cut: Cut,
    *,
    drawn: int,
    together: int,
) -> tuple[Int[Array, "S B"], Int[Array, "S B 2"], Float[Array, "S B"]]:
    """Users, (positive, place of the negative) and weights: see `batch.draw_triples`.

    Args:
      first, positive, negative: random words of each user, M = ceil(B / together), and triple.
      drawn: users are drawn by the first so many pairs.
      together: triples that follow each other and have one user.
    """
    out = (_ints(*positive.shape), _ints(*positive.shape, 2), _floats(*positive.shape))
    call = ffi_call("slgr_draw_triples", out)
    shifts = cut.keys if cut.shifts is None else cut.shifts
    users, items, weights = call(
        first, positive, negative, pair_users, pair_items,
        cut.offsets, cut.keys, cut.marks, shifts, cut.free,
        drawn=np.int64(drawn), together=np.int64(together), unit_mass=cut.shifts is None,
    )  # fmt: skip
    return users, items, weights


def draw_preferences(
    first: UInt32[Array, "S M"],
    partner: UInt32[Array, "S G"],
    share: UInt32[Array, "S G"] | None,
    starts: Int[Array, "m 4"],
    list_offsets: Int[Array, "U1"],
    list_items: Int[Array, "E"],
    list_scores: Float[Array, "E"],
    outside: Cut | None,
    *,
    together: int,
    most: int,
    floor: float,
) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"], Int[Array, "S G 2"]]:
    """Users, (preferred, other), margins and both entries, -1 where unlisted: see
    `preferences.draw_pairs`.

    Args:
      first, partner, share: random words of each first entry, M = ceil(G / together), of each
        partner, and of whether that is unlisted; None where it never is.
      outside: what is not outside a user's list, each item of mass 1; None as above.
      together: preferences that follow each other and start with entries that do.
      most: the greatest word of `share` for which the partner is unlisted.
      floor: score of an unlisted item.
    """
    pairs = _ints(*partner.shape, 2)
    out = (_ints(*partner.shape), pairs, _floats(*partner.shape), pairs)
    call = ffi_call("slgr_draw_preferences", out)
    cut = (list_offsets, list_items, list_items, list_items)
    if outside is not None:
        cut = (outside.offsets, outside.keys, outside.marks, outside.free)
    users, items, margins, entries = call(
        first, partner, partner if share is None else share, starts,
        list_offsets, list_items, list_scores, *cut,
        together=np.int64(together), unlisted=outside is not None, most=np.int64(most),
        floor=np.float32(floor),
    )  # fmt: skip
    return users, items, margins, entries


def take(values: Float[Array, "R"], at: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """values[at], read ahead: XLA's gather waits for each number that is in no cache."""
    (taken,) = ffi_call("slgr_take", (_floats(*at.shape),))(values, at)
    return taken
