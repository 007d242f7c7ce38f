"""Full ranking on the device: every user against every item that is not masked.

Shape letters: U users, I items, B users of a chunk, K cut-off, W relevant items a chunk has
room for, N relevant pairs.

A chunk's scores exist only on the device, [B, I] at a time; what comes back is a few numbers
per relevant item. One chunk is one jitted call of fixed shapes: the loops over a user's
relevant and seen items have a dynamic length, so that a chunk costs what its own users need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slgr_jax.config import EvaluationConfig, SliceConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, NonFiniteError, listing
from slgr_jax.metrics import (
    PartResult,
    Ranking,
    TopItems,
    assemble,
    part_data,
    pool_tables,
    summarize_part,
)

ScoreUsers = Callable[[Any, jax.Array], jax.Array]  # (state, users [B] int32) -> [B, I] float32

_SEEN_STEP = 16  # seen items of one user that one loop step masks
_BLOCK = 128  # items counted or compared together; the catalogue is padded to whole blocks
_CPU_CHUNK = 1 << 22  # scores of a chunk that a CPU ranks fastest
_POOL_TILE = 1 << 20  # scores that one step of the pooled AUC's loop looks up
_COUNTS = ("greater", "tied", "tied_before")
_PAIR_DTYPES = {"score": np.float32} | dict.fromkeys(_COUNTS, np.int32)


class _Rows(NamedTuple):
    """A `Csr` on the device; `indices` is padded to a power of two."""

    offsets: jax.Array  # [U + 1] int32
    indices: jax.Array  # [>= n] int32

    def of(self, users: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First position and length of each user's row, [B] each; 0 long where `users` < 0."""
        at = jnp.maximum(users, 0)
        start = self.offsets[at]
        return start, jnp.where(users < 0, 0, self.offsets[at + 1] - start)


class _Pool(NamedTuple):
    """What `metrics.pool_tables` makes of all relevant scores, on the device."""

    scores: jax.Array  # [D] float32
    above2: jax.Array  # [D] int32
    ties: jax.Array  # [D] int32
    base: jax.Array  # [cells] int32
    low: jax.Array  # [] float32
    scale: jax.Array  # [] float32
    steps: jax.Array  # [] int32


# ------------------------------------------------------------------------ inside the jit


def _scatter_rows(scores: jax.Array, users: jax.Array, rows: _Rows, value: float) -> jax.Array:
    """`scores` [B, I] with `value` at each user's items in `rows`."""
    start, count = rows.of(users)
    row = jnp.arange(users.size)[:, None]

    def step(i: jax.Array, scores: jax.Array) -> jax.Array:
        at = i * _SEEN_STEP + jnp.arange(_SEEN_STEP)[None, :]
        items = rows.indices.at[start[:, None] + at].get(mode="clip")
        items = jnp.where(at < count[:, None], items, scores.shape[1])  # past the end: dropped
        return scores.at[row, items].set(value, mode="drop")

    return jax.lax.fori_loop(0, -(-jnp.max(count) // _SEEN_STEP), step, scores)


def _candidates(scores: jax.Array, users: jax.Array, seen: _Rows) -> tuple[jax.Array, jax.Array]:
    """Scores with masked items at -inf, padded with -inf to whole blocks; and which rows are bad.

    -0.0 becomes 0.0: `lax.top_k` would tell them apart, a comparison does not.
    """
    bad = (users >= 0) & ~(jnp.max(jnp.abs(scores), axis=1) < jnp.inf)  # a NaN is not less
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.pad(scores, ((0, 0), (0, -scores.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    return _scatter_rows(scores, users, seen, -jnp.inf), bad


def _rank_relevant(
    scores: jax.Array, users: jax.Array, relevant: _Rows, width: int
) -> dict[str, jax.Array]:
    """[B, width] each: score, greater, tied and tied_before of a user's relevant items.

    The three counts share one pass: within a block none exceeds _BLOCK < 1024, so they are
    added up as three 10-bit digits of one int32.
    """
    start, count = relevant.of(users)
    n = users.size
    index = jnp.arange(scores.shape[1])[None, :]
    out = {name: jnp.zeros((n, width), dtype) for name, dtype in _PAIR_DTYPES.items()}

    def step(p: jax.Array, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
        item = relevant.indices.at[start + p].get(mode="clip")
        mine = jnp.take_along_axis(scores, item[:, None], axis=1)
        equal = scores == mine
        before = equal & (index < item[:, None])
        digits = (scores > mine).astype(jnp.int32)
        digits += (equal.astype(jnp.int32) << 10) + (before.astype(jnp.int32) << 20)
        blocks = jnp.sum(digits.reshape(n, -1, _BLOCK), axis=2)
        found = {
            "score": mine[:, 0],
            "greater": jnp.sum(blocks & 1023, axis=1),
            "tied": jnp.sum((blocks >> 10) & 1023, axis=1) - 1,
            "tied_before": jnp.sum(blocks >> 20, axis=1),
        }
        return {name: out[name].at[:, p].set(found[name]) for name in out}

    return jax.lax.fori_loop(0, jnp.max(count), step, out)


def _top(scores: jax.Array, k: int) -> dict[str, jax.Array]:
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
        values, at = jax.lax.top_k(few, k)
        items = jnp.take_along_axis(blocks, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK
    return {"items": jnp.where(values == -jnp.inf, -1, items), "scores": values}


def _pool_counts(scores: jax.Array, pool: _Pool, pieces: int, bits: int) -> jax.Array:
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
        at = pool.base[_cell(x, pool)]

        def halve(i: jax.Array, at: jax.Array) -> jax.Array:
            jump = jnp.int32(1) << (pool.steps - 1 - i)
            probe = pool.scores.at[at + jump - 1].get(mode="fill", fill_value=jnp.inf)
            return jnp.where(probe < x, at + jump, at)

        at = jax.lax.fori_loop(0, pool.steps, halve, at)
        count = pool.above2[at] - jnp.where(pool.scores[at] == x, pool.ties[at], 0)
        digits = [(count >> (bits * i)) & ((1 << bits) - 1) for i in range(pieces)]
        return total + jnp.stack([jnp.sum(digit, axis=1) for digit in digits], axis=1)

    return jax.lax.fori_loop(0, -(-n_items // tile), step, jnp.zeros((n, pieces), jnp.int32))


def _cell(x: jax.Array, pool: _Pool) -> jax.Array:
    """The table cell of a score; rounding may put it one off, which the table allows for."""
    place = (jnp.maximum(x, pool.low) * 0.5 - pool.low * 0.5) * pool.scale
    return jnp.minimum(place, pool.base.size - 1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("score_users", "n_items", "mesh"))
def _score_chunk(
    state: Any, users: jax.Array, *, score_users: ScoreUsers, n_items: int, mesh: Mesh | None
) -> jax.Array:
    """[B, I] float32, split by user over `mesh`. Users under 0 are padding.

    Its own program, so that both passes over a chunk see the same bits.
    """
    scores = score_users(state, jnp.maximum(users, 0))
    if scores.shape != (users.size, n_items):
        wanted = (users.size, n_items)
        raise ConfigError(f"score_users gave scores of shape {scores.shape}, expected {wanted}")
    scores = scores.astype(jnp.float32)
    return scores if mesh is None else jax.lax.with_sharding_constraint(scores, _by_user(mesh))


@functools.partial(jax.jit, static_argnames=("width", "k", "mesh"))
def _rank_chunk(
    scores: jax.Array,
    users: jax.Array,
    seen: _Rows,
    relevant: _Rows | None,
    *,
    width: int,
    k: int,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Ranks of relevant items (unless None), top-K lists (unless K is 0), non-finite rows."""

    def rows(scores: Any, users: Any, seen: Any, relevant: Any) -> dict[str, Any]:
        scores, bad = _candidates(scores, users, seen)
        out: dict[str, Any] = {"bad": bad}
        if relevant is not None:
            out["pairs"] = _rank_relevant(scores, users, relevant, width)
        if k:
            out["top"] = _top(scores, k)
        return out

    return _on_rows(rows, mesh, scores, users, seen, relevant)


@functools.partial(jax.jit, static_argnames=("pieces", "bits", "mesh"))
def _pool_chunk(
    scores: jax.Array,
    users: jax.Array,
    seen: _Rows,
    relevant: _Rows,
    pool: _Pool,
    *,
    pieces: int,
    bits: int,
    mesh: Mesh | None,
) -> jax.Array:
    """[B, pieces]: `_pool_counts` over each user's candidates that are not relevant.

    Rows of padding are counted too; the host leaves them out.
    """

    def rows(scores: Any, users: Any, seen: Any, relevant: Any, pool: Any) -> jax.Array:
        for excluded in (seen, relevant):
            scores = _scatter_rows(scores, users, excluded, jnp.inf)
        return _pool_counts(scores, pool, pieces, bits)

    return _on_rows(rows, mesh, scores, users, seen, relevant, pool)


def _by_user(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _on_rows(function: Any, mesh: Mesh | None, scores: Any, users: Any, *whole: Any) -> Any:
    """`function(scores, users, *whole)`, each device on its own users; results on all."""
    if mesh is None:
        return function(scores, users, *whole)
    by_user, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (by_user, by_user, *(everywhere for _ in whole))
    split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=by_user, check_vma=False)
    # Every process reads every result: they are small, the scores are not among them.
    found = split(scores, users, *whole)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, everywhere))


# ------------------------------------------------------------------------ on the host


class _Scorer:
    """Scores users a chunk at a time; knows where arrays go."""

    def __init__(
        self,
        score_users: ScoreUsers,
        state: Any,
        users: np.ndarray,
        n_items: int,
        users_per_chunk: int,
        mesh: Mesh | None,
    ) -> None:
        self.users, self.n_items, self.mesh = users, n_items, mesh
        self._score = functools.partial(
            _score_chunk, state, score_users=score_users, n_items=n_items, mesh=mesh
        )
        size = 1 if mesh is None else mesh.size
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        chunk = min(users_per_chunk, 1 << max(users.size - 1, 0).bit_length())
        if platform == "cpu":  # faster while the scores of a chunk fit the caches
            fitting = max(_CPU_CHUNK // max(n_items, 1), 8)
            chunk = min(chunk, (1 << (fitting.bit_length() - 1)) * size)
        self.chunk = -(-chunk // size) * size

    def put(self, tree: Any) -> Any:
        """The arrays, whole, on every device."""
        mesh = self.mesh
        return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec()))

    def put_rows(self, csr: Csr) -> _Rows:
        """The ragged rows on every device."""
        n = int(csr.offsets[-1])
        if n >= 2**31:
            raise ConfigError(f"{n} interactions to mask or find; the limit is 2^31 - 1")
        indices = np.zeros(1 << max(n - 1, 0).bit_length(), np.int32)
        indices[:n] = csr.indices
        return _Rows(*self.put((csr.offsets.astype(np.int32), indices)))

    def each(self, call: Callable[[jax.Array, jax.Array, np.ndarray], Any]) -> Iterator[Any]:
        """(slice of `users`, host copy of `call(scores, chunk, users)`) for every chunk.

        The device is one chunk ahead of the host.
        """
        by_user = None if self.mesh is None else _by_user(self.mesh)
        waiting: list[tuple[slice, Any]] = []
        for begin in range(0, self.users.size, self.chunk):
            mine = self.users[begin : begin + self.chunk]
            padded = np.full(self.chunk, -1, np.int32)
            padded[: mine.size] = mine
            chunk = jax.device_put(padded, by_user)
            waiting.append((slice(begin, begin + mine.size), call(self._score(chunk), chunk, mine)))
            if len(waiting) == 2:
                where, found = waiting.pop(0)
                yield where, jax.device_get(found)
        for where, found in waiting:
            yield where, jax.device_get(found)


def _refuse_nonfinite(users: np.ndarray, bad: np.ndarray) -> None:
    named = users[bad[: users.size]]
    if named.size:
        raise NonFiniteError(
            f"the model gives a NaN or infinite score for {named.size} of {users.size} users "
            f"ranked together, user index {listing(map(str, named), limit=3)}; "
            "restore an earlier checkpoint or train again with a lower --lr"
        )


def _width(count: int) -> int:
    """Room for `count` relevant items: 16 * 4^i, so that few programs are compiled."""
    width = 16
    while width < count:
        width *= 4
    return width


def top_k(
    score_users: ScoreUsers,
    state: Any,
    users: np.ndarray,
    seen: Csr,
    n_items: int,
    *,
    k: int,
    users_per_chunk: int = 1024,
    mesh: Mesh | None = None,
) -> TopItems:
    """The `k` best items of each of `users` that are not in the user's row of `seen`.

    Args:
      score_users: pure function (state, users [B] int32) -> [B, I] float32. It is compiled
        once per function object, so pass the same one each time.
      state: pytree of device arrays, passed on to it.
      users: [n] user indices.
      seen: [U] rows of masked items.
      n_items: I.
      k: length of the lists; shorter if the catalogue is.
      users_per_chunk: most users scored at once; bounds the memory.
      mesh: devices to split a chunk's users over; None is the default device.

    Raises:
      NonFiniteError: a score is NaN or infinite.
    """
    users = np.asarray(users, np.int32)
    order = np.argsort(seen.counts[users], kind="stable")  # a chunk's users cost about the same
    scorer = _Scorer(score_users, state, users[order], n_items, users_per_chunk, mesh)
    masked = scorer.put_rows(seen)
    best = functools.partial(_rank_chunk, width=0, k=min(k, n_items), mesh=mesh)
    items = np.empty((users.size, min(k, n_items)), np.int32)
    scores = np.empty(items.shape, np.float32)
    for at, found in scorer.each(lambda s, chunk, _: best(s, chunk, masked, None)):
        mine = order[at]
        _refuse_nonfinite(users[mine], found["bad"])
        items[mine] = found["top"]["items"][: mine.size]
        scores[mine] = found["top"]["scores"][: mine.size]
    return TopItems(users, items, scores)


def rank(
    score_users: ScoreUsers,
    state: Any,
    relevant: Csr,
    seen: Csr,
    n_items: int,
    *,
    users_per_chunk: int = 1024,
    top_k: int = 20,
    pooled_auc: bool = True,
    mesh: Mesh | None = None,
) -> Ranking:
    """Rank every user that has relevant items over all items that are not masked.

    The work is about (relevant pairs) x I comparisons; the pooled AUC scores everything once
    more. Equal scores rank by item index, as in `jax.lax.top_k`.

    Args:
      score_users, state, n_items, users_per_chunk, mesh: as for `top_k`.
      relevant: [U] rows of items to find.
      seen: [U] rows of masked items; a relevant item among them is dropped and counted.
      top_k: length of `Ranking.top_items`; 0 for none.
      pooled_auc: also compute `Ranking.pooled_auc`.

    Raises:
      NonFiniteError: a score is NaN or infinite.
    """
    counts = relevant.counts
    users = np.flatnonzero(counts).astype(np.int32)
    users = users[np.lexsort((seen.counts[users], counts[users]))]
    scorer = _Scorer(score_users, state, users, n_items, users_per_chunk, mesh)
    masked, wanted = scorer.put_rows(seen), scorer.put_rows(relevant)
    places = functools.partial(_rank_chunk, k=min(top_k, n_items), mesh=mesh)

    def dispatch(scores: jax.Array, chunk: jax.Array, mine: np.ndarray) -> dict[str, Any]:
        return places(scores, chunk, masked, wanted, width=_width(int(counts[mine].max())))

    pairs: dict[str, list[np.ndarray]] = {name: [] for name in _PAIR_DTYPES}
    top = np.empty((users.size, min(top_k, n_items)), np.int32)
    for at, found in scorer.each(dispatch):
        mine = users[at]
        _refuse_nonfinite(mine, found["bad"])
        width = found["pairs"]["score"].shape[1]
        there = np.arange(width)[None, :] < counts[mine][:, None]
        for name, parts in pairs.items():
            parts.append(found["pairs"][name][: mine.size][there])
        if top.shape[1]:
            top[at] = found["top"]["items"][: mine.size]
    flat = {
        name: np.concatenate([np.zeros(0, dtype), *pairs[name]])
        for name, dtype in _PAIR_DTYPES.items()
    }
    ranking = assemble(users, relevant, seen, n_items, flat, top)
    if not pooled_auc:
        return ranking
    return dataclasses.replace(ranking, pooled_auc=_pooled_auc(scorer, ranking, masked, wanted))


def _pooled_auc(scorer: _Scorer, ranking: Ranking, masked: _Rows, wanted: _Rows) -> float:
    """Exact AUC over all (relevant, non-relevant candidate) pairs of all users.

    Each non-relevant score is looked up among the sorted relevant ones, in a second pass.
    """
    n_relevant = int(ranking.items.size)
    ranked = np.isin(scorer.users, ranking.users)  # a user may have lost all relevant items
    n_other = int(np.sum(ranking.n_candidates - ranking.counts))
    if not n_relevant or not n_other:
        return float("nan")
    if n_relevant >= 2**30:
        raise ConfigError(f"{n_relevant} relevant pairs; use --nopooled_auc beyond 2^30")
    pool = _Pool(**scorer.put(pool_tables(ranking.scores)))
    bits = 31 - (scorer.n_items - 1).bit_length()
    pieces = -(-(2 * n_relevant).bit_length() // bits)
    look_up = functools.partial(_pool_chunk, pieces=pieces, bits=bits, mesh=scorer.mesh)
    total = 0  # a Python integer: pairs x pairs may pass 2^63
    for at, digits in scorer.each(lambda s, chunk, _: look_up(s, chunk, masked, wanted, pool)):
        sums = digits[: ranked[at].size][ranked[at]].astype(np.int64).sum(axis=0)
        total += sum(int(value) << (bits * i) for i, value in enumerate(sums))
    return total / (2 * n_relevant * n_other)


def evaluate_dataset(
    score_users: ScoreUsers,
    state: Any,
    dataset: Dataset,
    slices: SliceConfig,
    evaluation: EvaluationConfig,
    *,
    parts: Sequence[str] = ("valid", "test"),
    mesh: Mesh | None = None,
) -> dict[str, PartResult]:
    """Every metric of every slice of each of `parts`: valid masks train, test train and valid.

    Args:
      score_users, state, mesh: as for `top_k`.
      dataset: gives relevant and masked items.
      slices: what is cold, tail, and the bins.
      evaluation: cut-offs, users ranked at once, pooled AUC or not.
    """
    out = {}
    for part in parts:
        data = part_data(dataset, part, slices)
        ranking = rank(
            score_users,
            state,
            data.relevant,
            data.seen,
            dataset.n_items,
            users_per_chunk=evaluation.eval_users_per_chunk,
            top_k=max(evaluation.ks),
            pooled_auc=evaluation.pooled_auc,
            mesh=mesh,
        )
        out[part] = summarize_part(ranking, data, evaluation.ks)
    return out
