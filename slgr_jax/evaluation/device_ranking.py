"""Device programs of full ranking: a chunk's ranks and lists, and the pooled AUC's counts.

Each is jitted with fixed shapes. A chunk's scores [B, I] are those of `device_scoring.py`; the
loops over a user's relevant and seen items have a dynamic length, so a chunk costs what its own
users need.
On one CPU device the kernels of `kernels/ranks.py` do the work; they return the same numbers.
`placement.py` says which device ranks whom over which items: what follows is done by each.

Shape letters: U users, I items, B users of a chunk, K cut-off, W room for relevant items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from slgr_jax.evaluation.placement import Block, Placement
from slgr_jax.kernels import ranks
from slgr_jax.sampling.user_shards import flat, flat_bounds

_SEEN_STEP = 16  # seen items of one user that one loop step masks
_NOWHERE = np.iinfo(np.int32).max  # a column past any
_BLOCK = 128  # items counted or compared together; the catalogue is padded to whole blocks
_POOL_TILE = 1 << 20  # scores that one step of the pooled AUC's loop looks up
# The score of what may not be listed: below any other, and finite, as a NaN is looked for.
LEFT_OUT = np.finfo(np.float32).min
_COUNTS = ("greater", "tied", "tied_before")
PAIR_DTYPES = {"score": np.float32} | dict.fromkeys(_COUNTS, np.int32)


class DeviceCsr(NamedTuple):
    """A `Csr` on the device; `indices` is padded to a power of two."""

    offsets: jax.Array  # [U + 1] int32
    indices: jax.Array  # [>= n] int32

    def of(self, users: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First position and length of each user's row, [B] each; 0 long where `users` < 0."""
        row = jnp.maximum(users, 0)
        start = self.offsets[row]
        return start, jnp.where(users < 0, 0, self.offsets[row + 1] - start)


class Listable(NamedTuple):
    """Which items may be listed; None: all of them."""

    allowed: jax.Array | None  # [I] bool, for every user
    only: DeviceCsr | None  # rows of what each user may get


class Pool(NamedTuple):
    """What `ranking_metrics.pool_tables` makes of all relevant scores, on the device."""

    scores: jax.Array  # [D] float32
    above2: jax.Array  # [D] int32
    ties: jax.Array  # [D] int32
    base: jax.Array  # [cells] int32
    low: jax.Array  # [] float32
    scale: jax.Array  # [] float32
    steps: jax.Array  # [] int32


def _scatter_rows(
    scores: jax.Array, users: jax.Array, rows: DeviceCsr, value: float, block: Block
) -> jax.Array:
    """`scores` [B, I] with `value` at each user's items in `rows`."""

    def fill(scores: jax.Array, row: jax.Array, columns: jax.Array) -> jax.Array:
        return scores.at[row, columns].set(value, mode="drop")

    return _over_rows(scores, users, rows, block, fill)


def _over_rows(
    carry: jax.Array,
    users: jax.Array,
    rows: DeviceCsr,
    block: Block,
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`carry = step(carry, row [B, 1], columns [B, _SEEN_STEP])` until all of `rows` have come.

    `carry` is [B, I]; where a row has ended, or its item is in another block, the column is none.
    """
    start, count = rows.of(users)
    row = jnp.arange(users.size)[:, None]

    def some(i: jax.Array, carry: jax.Array) -> jax.Array:
        place = i * _SEEN_STEP + jnp.arange(_SEEN_STEP)[None, :]
        items = rows.indices.at[start[:, None] + place].get(mode="clip")
        # A place past the end of a row holds another user's item: moved off the matrix.
        columns = jnp.where(place < count[:, None], block.columns(items), _NOWHERE)
        return step(carry, row, columns)

    return jax.lax.fori_loop(0, -(-jnp.max(count) // _SEEN_STEP), some, carry)


def _candidates(
    scores: jax.Array, users: jax.Array, seen: DeviceCsr, block: Block
) -> tuple[jax.Array, jax.Array]:
    """Scores with masked items at -inf, padded with -inf to whole blocks; and which rows are bad.

    -0.0 becomes 0.0: `lax.top_k` would tell them apart, a comparison does not.
    """
    bad = (users >= 0) & ~(jnp.max(jnp.abs(scores), axis=1) < jnp.inf)  # a NaN is not less
    scores = _without_padding(jnp.where(scores == 0, 0.0, scores), -jnp.inf, block)
    scores = jnp.pad(scores, ((0, 0), (0, -scores.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    scores = _scatter_rows(scores, users, seen, -jnp.inf, block)
    return scores, block.greatest(bad.astype(jnp.int32)) > 0


def _without_padding(scores: jax.Array, value: float, block: Block) -> jax.Array:
    """`scores` with `value` where a row of a padded table is no item's."""
    if block.axis is None:
        return scores
    return jnp.where(block.items(scores.shape[1])[None, :] < block.n_items, scores, value)


def _rank_relevant(
    scores: jax.Array, users: jax.Array, relevant: DeviceCsr, width: int, block: Block
) -> dict[str, jax.Array]:
    """[B, width] each: score, greater, tied and tied_before of a user's relevant items.

    The three counts share one pass: within a block none exceeds _BLOCK < 1024, so they are
    added up as three 10-bit digits of one int32.
    """
    start, count = relevant.of(users)
    n = users.size
    index = block.items(scores.shape[1])[None, :]
    place = start[:, None] + jnp.arange(width)[None, :]
    items = relevant.indices.at[place].get(mode="clip")
    cells = scores.at[jnp.arange(n)[:, None], block.columns(items)]
    of_items = block.greatest(cells.get(mode="fill", fill_value=-jnp.inf))
    out = {name: jnp.zeros((n, width), jnp.int32) for name in _COUNTS}

    def step(p: jax.Array, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
        item, score = items[:, p], of_items[:, p][:, None]
        equal = scores == score
        before = equal & (index < item[:, None])
        digits = (scores > score).astype(jnp.int32)
        digits += (equal.astype(jnp.int32) << 10) + (before.astype(jnp.int32) << 20)
        blocks = jnp.sum(digits.reshape(n, -1, _BLOCK), axis=2)
        counts = {
            "greater": jnp.sum(blocks & 1023, axis=1),
            "tied": jnp.sum((blocks >> 10) & 1023, axis=1),
            "tied_before": jnp.sum(blocks >> 20, axis=1),
        }
        return {name: out[name].at[:, p].set(counts[name]) for name in out}

    counted = jax.lax.fori_loop(0, jnp.max(count), step, out)
    counted = {name: block.total(counts) for name, counts in counted.items()}
    counted["tied"] -= 1  # with itself
    # A masked item ties with all masked ones and with the padding; past a user's last is no item.
    masked = (of_items == -jnp.inf) | (jnp.arange(width)[None, :] >= count[:, None])
    values = {name: jnp.where(masked, 0, counts) for name, counts in counted.items()}
    return {"score": of_items, **values}


def _top(scores: jax.Array, k: int, block: Block) -> dict[str, jax.Array]:
    """The K best of each user, of all blocks; items without a score are -1.

    The K best of all are among the K best of each block. Blocks come in the order of items and ties
    fall by it within a block, so that they do over all.
    """
    best = _top_of_block(scores, min(k, scores.shape[1]))
    if block.axis is not None:
        listed = block.side_by_side(best["items"] + block.first)
        values, place = jax.lax.top_k(block.side_by_side(best["scores"]), k)
        best = {"items": jnp.take_along_axis(listed, place, axis=1), "scores": values}
    return best | {"items": jnp.where(best["scores"] == -jnp.inf, -1, best["items"])}


def _top_of_block(scores: jax.Array, k: int) -> dict[str, jax.Array]:
    """`lax.top_k` of [B, blocks * _BLOCK], in two stages where that looks at fewer numbers.

    The K best lie in the K blocks with the greatest maxima: any other block has K numbers
    above its own. Blocks keep the order of items, so ties fall as in `lax.top_k`.
    """
    n, n_items = scores.shape
    if n_items < 4 * k * _BLOCK:
        values, items = jax.lax.top_k(scores, k)
    else:
        by_block = scores.reshape(n, -1, _BLOCK)
        blocks = jnp.sort(jax.lax.top_k(jnp.max(by_block, axis=2), k)[1], axis=1)
        few = jax.vmap(lambda row, chosen: row[chosen])(by_block, blocks).reshape(n, -1)
        values, place = jax.lax.top_k(few, k)
        # A place among the chosen blocks back to an item: its block's first, and where in it.
        block = jnp.take_along_axis(blocks, place // _BLOCK, axis=1)
        items = block * _BLOCK + place % _BLOCK
    return {"items": items, "scores": values}


def _pool_counts(scores: jax.Array, pool: Pool, pieces: int, bits: int) -> jax.Array:
    """[B, pieces] int32: digits (base 2^bits) of each row's sum of 2 * above + tied.

    above, tied: relevant pairs of any user with a greater, with the same score. An excluded
    number is +inf, which has none. A digit's sum over the row stays under 2^31.
    """
    n, n_items = scores.shape
    tile = min(n_items, max(_POOL_TILE // n, _BLOCK))

    def step(t: jax.Array, total: jax.Array) -> jax.Array:
        begin = jnp.minimum(t * tile, n_items - tile)  # the last tile overlaps the one before
        x = jax.lax.dynamic_slice_in_dim(scores, begin, tile, axis=1)
        x = jnp.where(begin + jnp.arange(tile)[None, :] < t * tile, jnp.inf, x)

        # A binary search for the first relevant score that is not below x, from x's cell on.
        def halve(i: jax.Array, place: jax.Array) -> jax.Array:
            jump = jnp.int32(1) << (pool.steps - 1 - i)
            probe = pool.scores.at[place + jump - 1].get(mode="fill", fill_value=jnp.inf)
            return jnp.where(probe < x, place + jump, place)

        place = jax.lax.fori_loop(0, pool.steps, halve, pool.base[_cell(x, pool)])
        count = pool.above2[place] - jnp.where(pool.scores[place] == x, pool.ties[place], 0)
        digits = [(count >> (bits * i)) & ((1 << bits) - 1) for i in range(pieces)]
        return total + jnp.stack([jnp.sum(digit, axis=1) for digit in digits], axis=1)

    return jax.lax.fori_loop(0, -(-n_items // tile), step, jnp.zeros((n, pieces), jnp.int32))


def _cell(x: jax.Array, pool: Pool) -> jax.Array:
    """The table cell of a score; rounding may put it one off, which the table allows for."""
    place = (jnp.maximum(x, pool.low) * 0.5 - pool.low * 0.5) * pool.scale
    return jnp.minimum(place, pool.base.size - 1).astype(jnp.int32)


def _own_csr(rows: DeviceCsr) -> DeviceCsr:
    """What a device has of a `Csr` that is split, as if it were all."""
    bounds = flat_bounds(rows.offsets, rows.indices.shape[1])
    # The last row is no user's, so that its end is never asked for.
    return DeviceCsr(bounds, flat(rows.indices))


@functools.partial(jax.jit, static_argnames=("at",), donate_argnames=("scores",))
def keep_listable(
    scores: jax.Array, users: jax.Array, listable: Listable, *, at: Placement
) -> jax.Array:
    """[B, I] `scores`, which are given up, with LEFT_OUT where an item may not be listed."""

    def keep(
        scores: jax.Array, users: jax.Array, allowed: jax.Array | None, only: DeviceCsr | None
    ) -> jax.Array:
        block = at.block(scores.shape[1])
        if allowed is not None:
            here = allowed.at[block.items(scores.shape[1])].get(mode="fill", fill_value=False)
            scores = jnp.where(here[None, :], scores, LEFT_OUT)
        if only is None:
            return scores

        def take(kept: jax.Array, row: jax.Array, columns: jax.Array) -> jax.Array:
            wanted = scores.at[row, columns].get(mode="fill", fill_value=LEFT_OUT)
            return kept.at[row, columns].set(wanted, mode="drop")

        return _over_rows(jnp.full_like(scores, LEFT_OUT), users, only, block, take)

    return _on_each(keep, at, at.of_scores if at.mesh else None, scores, users, *listable)


@functools.partial(jax.jit, static_argnames=("width", "k", "at", "native"))
def rank_chunk(
    scores: ranks.Scores,
    users: jax.Array,
    seen: DeviceCsr,
    relevant: DeviceCsr | None,
    *,
    width: int,
    k: int,
    at: Placement,
    native: bool,
) -> dict[str, Any]:
    """Ranks of relevant items (unless None), top-K lists (unless K is 0), non-finite rows.

    scores: for the kernels also `ranks.Vectors`, of one device.
    bad: [B] bool, a NaN or infinite score. Of such rows, and of padding, nothing else counts.
    masked: [B] how many items are.
    pairs: [B, W] each, of the user's relevant items in order: score, -inf where it is masked;
      candidates that are greater, other ones that are tied, tied ones with a smaller index.
    top: [B, K] items, -1 past the last, and their scores, -inf past the last.
    """

    def by_kernel(
        scores: Any, users: Any, seen: DeviceCsr, relevant: DeviceCsr | None
    ) -> dict[str, Any]:
        ranked = ranks.rank_rows(scores, users, seen, relevant or seen, width=width, k=k)
        out: dict[str, Any] = {"bad": ranked.bad, "masked": seen.of(users)[1]}
        if relevant is not None:
            out["pairs"] = {name: getattr(ranked, name) for name in PAIR_DTYPES}
        if k:
            out["top"] = {"items": ranked.items, "scores": ranked.values}
        return out

    def rows(scores: Any, users: Any, seen: Any, relevant: Any) -> dict[str, Any]:
        block = at.block(scores.shape[1])
        scores, bad = _candidates(scores, users, seen, block)
        out: dict[str, Any] = {"bad": bad, "masked": seen.of(users)[1]}
        if relevant is not None:
            out["pairs"] = _rank_relevant(scores, users, relevant, width, block)
        if k:
            out["top"] = _top(scores, k, block)
        return out

    return _on_rows(by_kernel if native else rows, at, scores, users, seen, relevant)


@functools.partial(jax.jit, static_argnames=("at",))
def log_sum_chunk(
    scores: jax.Array,
    users: jax.Array,
    seen: DeviceCsr,
    temperature: jax.Array | float,
    *,
    at: Placement,
) -> dict[str, jax.Array]:
    """log_sums: [B] log sum_j exp(s_j / temperature) over the items that are not masked; bad: [B],
    as of `rank_chunk`. Of items that are whole on every device."""

    def rows(
        scores: jax.Array, users: jax.Array, seen: DeviceCsr, temperature: jax.Array
    ) -> dict[str, jax.Array]:
        bad = (users >= 0) & ~(jnp.max(jnp.abs(scores), axis=1) < jnp.inf)
        left = _scatter_rows(scores, users, seen, -jnp.inf, at.block(scores.shape[1]))
        return {"log_sums": jax.nn.logsumexp(left / temperature, axis=1), "bad": bad}

    return _on_rows(rows, at, scores, users, seen, temperature)


@functools.partial(jax.jit, static_argnames=("pieces", "bits", "at", "native"))
def pool_chunk(
    scores: ranks.Scores,
    users: jax.Array,
    seen: DeviceCsr,
    relevant: DeviceCsr,
    pool: Pool,
    *,
    pieces: int,
    bits: int,
    at: Placement,
    native: bool,
) -> jax.Array:
    """[B, pieces]: `_pool_counts` over each user's candidates that are not relevant.

    Rows of padding may be counted too; the host leaves them out. The kernel counts in 64 bits:
    its `pieces` are 2, its `bits` 32.
    """
    if native:
        return _on_rows(ranks.pool_rows, at, scores, users, seen, relevant, pool)

    def rows(scores: Any, users: Any, seen: Any, relevant: Any, pool: Any) -> jax.Array:
        block = at.block(scores.shape[1])
        scores = _without_padding(scores, jnp.inf, block)
        for excluded in (seen, relevant):
            scores = _scatter_rows(scores, users, excluded, jnp.inf, block)
        return block.total(_pool_counts(scores, pool, pieces, bits))

    return _on_rows(rows, at, scores, users, seen, relevant, pool)


def _on_rows(function: Any, at: Placement, scores: Any, users: Any, *others: Any) -> Any:
    """`function(scores, users, *others)`, each device on its own users; results on all."""
    if at.mesh is None:
        return _on_each(function, at, None, scores, users, *others)
    results = _on_each(function, at, at.of_users, scores, users, *others)
    # Every process reads every result: they are small, the scores are not among them.
    return jax.tree.map(lambda x: at.laid_out(x, PartitionSpec()), results)


def _on_each(
    function: Any, at: Placement, out: PartitionSpec | None, scores: Any, users: Any, *others: Any
) -> Any:
    """`function(scores, users, *others)`, each device on its own users; results are there.

    Args:
      out: how the results are split.
      others: whole on every device; rows of users, where these are split, with their users.
    """
    is_own = [at.split is not None and isinstance(other, DeviceCsr) for other in others]

    def of_own(scores: Any, users: Any, *others: Any) -> Any:
        if at.split is not None:
            users = at.own_rows(users)
        own = [_own_csr(x) if its else x for x, its in zip(others, is_own, strict=True)]
        return function(scores, users, *own)

    if at.mesh is None:
        return of_own(scores, users, *others)
    specs = [at.of_users if its else PartitionSpec() for its in is_own]
    on_each = jax.shard_map(
        of_own,
        mesh=at.mesh,
        in_specs=(at.of_scores, at.of_users, *specs),
        out_specs=out,
        check_vma=False,
    )
    return on_each(scores, users, *others)
