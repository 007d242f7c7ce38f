"""A teacher's list at scoring time: s_ui + w / r_ui, r_ui the rank of item i in the list of user u.

The cheapest use of a list, and what any other use must beat: nothing is trained. Items that are not
listed keep their score. w is one number, chosen by validation ndcg@10 among 0 and powers of two
times the spread of the scores, so that it does not depend on their unit.

An unlisted item with k items above it in s has them above it in the sum too: the first k of the sum
are among the first k of s and the listed items. So one pass over the scores serves every weight and
every list (`try_weights`).

Shape letters: U users, I items, B users of a chunk, P items of a pool, W weights, n users.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slgr_jax.config import SliceConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.evaluation.device_ranking import DeviceCsr
from slgr_jax.evaluation.device_scoring import ScoreUsers
from slgr_jax.teacher.products import rows as product_rows
from slgr_jax.teacher.products.rows import Teacher

METRIC, K = "ndcg@10", 10
# Weights that are tried, in units of the spread of a user's scores over the catalogue.
STEPS = (0.0, *(2.0**power for power in range(-5, 8)))
_LIST_STEP = 16  # listed items of one user that one loop step adds to
_CHUNK = 1 << 22  # scores on the host at once
_SPREAD_USERS = 256


@dataclasses.dataclass(frozen=True)
class Lists:
    """What a teacher adds: `items[offsets[u]:offsets[u + 1]]` of user u, and 1 / rank of each.

    Attributes:
      name: of the product.
      rows: [U] the listed items of each user, ascending.
      boosts: [rows.indices.size] float32: 1 / rank.
    """

    name: str
    rows: Csr
    boosts: np.ndarray


def lists_of(dataset: Dataset, teacher: Teacher) -> Lists:
    """The lists of a product of scores without the users' own training items; ties share a rank.

    Raises:
      InputError: the product holds preferences, which have no ranks.
    """
    if teacher.manifest.kind != "scores":
        raise InputError(
            f"teacher {teacher.manifest.name!r} holds {teacher.manifest.kind}: a blend adds 1 / "
            "rank and needs scores; collect its answers again with --pairs_to=scores"
        )
    counts = np.diff(teacher.offsets)
    users = np.repeat(np.arange(dataset.n_users, dtype=np.int64), counts)
    fresh = ~dataset.positives(("train",)).contains(users, teacher.items)
    users, items = users[fresh], teacher.items[fresh]
    boosts = 1 / product_rows.ranks(users, teacher.scores[fresh])
    order = np.lexsort((items, users))
    rows = Csr.from_pairs(users.astype(np.int32), items, dataset.n_users)
    return Lists(teacher.manifest.name, rows, boosts[order].astype(np.float32))


def listed(dataset: Dataset, teacher: Teacher) -> Lists:
    """`lists_of`, where there is something in them.

    Raises:
      InputError: the product holds preferences, or nothing but users' own training items.
    """
    lists = lists_of(dataset, teacher)
    if not lists.rows.indices.size:
        raise InputError(
            f"teacher {lists.name!r} says nothing but of users' own training items "
            f"({int(teacher.offsets[-1]):,} answers), which are not ranked: there is no list to add"
        )
    return lists


def keep_users(lists: Lists, kept: np.ndarray) -> Lists:
    """The lists of the users where `kept` [U] bool alone."""
    owners = lists.rows.owners()
    chosen = kept[owners]
    rows = Csr.from_pairs(owners[chosen], lists.rows.indices[chosen], kept.size)
    return Lists(lists.name, rows, lists.boosts[chosen])


# ------------------------------------------------------------------------ on the device


class BlendState(NamedTuple):
    """What a blend scores with."""

    state: Any  # of the scores that the list is added to
    lists: DeviceCsr
    boosts: Float[Array, " n"]
    weight: Float[Array, ""]


@functools.lru_cache(maxsize=32)
def blended(score_users: ScoreUsers) -> ScoreUsers:
    """`score_users` with the list added; its state is a `BlendState`."""

    def score(state: BlendState, users: Int[Array, " B"]) -> Float[Array, "B I"]:
        scores = score_users(state.state, users).astype(jnp.float32)
        start, count = state.lists.of(users)
        row, n_items = jnp.arange(users.size)[:, None], scores.shape[1]

        def add(i: jax.Array, scores: Float[Array, "B I"]) -> Float[Array, "B I"]:
            place = i * _LIST_STEP + jnp.arange(_LIST_STEP)[None, :]
            items = state.lists.indices.at[start[:, None] + place].get(mode="clip")
            boosts = state.boosts.at[start[:, None] + place].get(mode="clip")
            # A place past the end of a list holds another user's item: moved off the matrix.
            items = jnp.where(place < count[:, None], items, n_items)
            return scores.at[row, items].add(state.weight * boosts, mode="drop")

        return jax.lax.fori_loop(0, -(-jnp.max(count) // _LIST_STEP), add, scores)

    return score


def blend_state(state: Any, lists: Lists, weight: float) -> BlendState:
    """The state of `blended(score_users)`, on the host."""
    nothing = not lists.rows.indices.size  # an empty array cannot be clipped into
    indices: Any = np.zeros(1, np.int32) if nothing else lists.rows.indices
    boosts: Any = np.zeros(1, np.float32) if nothing else lists.boosts
    offsets: Any = lists.rows.offsets.astype(np.int32)
    return BlendState(state, DeviceCsr(offsets, indices), boosts, np.float32(weight))  # type: ignore[arg-type]


# ------------------------------------------------------------------------ the weight


@dataclasses.dataclass(frozen=True)
class Tried:
    """Validation ndcg@10 by weight and user.

    Attributes:
      weights: [W], the first 0.
      users: [n] with a validation item.
      values: [W, n] over all relevant items.
      tail: [W, n] over the relevant tail items alone; NaN where a user has none.
    """

    weights: np.ndarray
    users: np.ndarray
    values: np.ndarray
    tail: np.ndarray

    @property
    def best(self) -> int:
        """The weight with the best mean over users, the least among equals."""
        return int(np.argmax(self.values.mean(axis=1)))

    @property
    def weight(self) -> float:
        """That weight."""
        return float(self.weights[self.best])

    def cross_fitted(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """([n], [n]): `values` and `tail` of each user at the weight that the *other* half of the
        users prefers: no user's value was met by the choice of its weight."""
        half = np.random.default_rng(seed).permutation(self.users.size) % 2 == 0
        values, tail = np.empty(self.users.size), np.empty(self.users.size)
        for mine in (half, ~half):
            others = self.values[:, ~mine]
            best = int(np.argmax(others.mean(axis=1))) if others.size else 0
            values[mine], tail[mine] = self.values[best, mine], self.tail[best, mine]
        return values, tail


def try_weights(
    score_users: ScoreUsers, state: Any, lists: Sequence[Lists], dataset: Dataset
) -> list[Tried]:
    """Each weight of each list on validation; training items are masked.

    Args:
      score_users, state: as for `full_ranking.rank`, at the moment of validation.

    Raises:
      ConfigError: there are no validation items to choose a weight by.
    """
    seen, relevant = dataset.positives(("train",)), _relevant(dataset)
    users = np.flatnonzero(relevant.counts)
    if not users.size:
        raise ConfigError(f"{dataset.path} has no validation part: nothing to choose a weight by")
    tail = dataset.slices(SliceConfig()).tail_items
    compiled = jax.jit(score_users)

    def scored(asked: np.ndarray, chunk: int) -> np.ndarray:
        padded = np.full(chunk, asked[0], np.int32)
        padded[: asked.size] = asked
        return np.array(compiled(state, padded), np.float32)[: asked.size]

    chunk = max(1, min(users.size, _CHUNK // max(dataset.n_items, 1)))
    sample = users[np.random.default_rng(0).permutation(users.size)[: min(_SPREAD_USERS, chunk)]]
    weights = np.array(STEPS) * _spread(scored(sample, chunk))
    pieces: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in lists]
    for begin in range(0, users.size, chunk):
        of_chunk = users[begin : begin + chunk]
        scores = scored(of_chunk, chunk)
        _mark(scores, seen, of_chunk, -np.inf)
        wanted = np.zeros(scores.shape, bool)
        _mark(wanted, relevant, of_chunk, True)
        for its, of_list in zip(pieces, lists, strict=True):
            pool = _pool(scores, wanted, of_list, of_chunk)
            its.append(_ndcg(pool, weights, wanted, tail))
    return [
        Tried(weights, users, *(np.concatenate(part, axis=1) for part in zip(*its, strict=True)))
        for its in pieces
    ]


def alone(lists: Lists, dataset: Dataset) -> Tried:
    """The list as it is, for every user with a validation item; what it does not name is not found.

    Has the one weight 1. A user without a list finds nothing.
    """
    relevant = _relevant(dataset)
    users = np.flatnonzero(relevant.counts)
    tail, chunk = dataset.slices(SliceConfig()).tail_items, max(1, _CHUNK // dataset.n_items)
    pieces = []
    for begin in range(0, users.size, chunk):
        of_chunk = users[begin : begin + chunk]
        scores = np.full((of_chunk.size, dataset.n_items), -np.inf, np.float32)
        for row, user in enumerate(of_chunk):
            scores[row, lists.rows.row(user)] = 0
        wanted = np.zeros(scores.shape, bool)
        _mark(wanted, relevant, of_chunk, True)
        pieces.append(_ndcg(_pool(scores, wanted, lists, of_chunk), np.ones(1), wanted, tail))
    values, of_tail = (np.concatenate(part, axis=1) for part in zip(*pieces, strict=True))
    return Tried(np.ones(1), users, values, of_tail)


def _relevant(dataset: Dataset) -> Csr:
    """[U] validation items that are not masked."""
    valid, train = dataset.positives(("valid",)), dataset.positives(("train",))
    owners = valid.owners()
    fresh = ~train.contains(owners, valid.indices)
    return Csr.from_pairs(owners[fresh], valid.indices[fresh], dataset.n_users)


def _spread(scores: np.ndarray) -> float:
    """The mean over users of the standard deviation of their scores [B, I]; 1 if it is 0."""
    return float(scores.astype(np.float64).std(axis=1).mean()) or 1.0


def _mark(matrix: np.ndarray, rows: Csr, users: np.ndarray, value: Any) -> None:
    """Set `matrix` [B, I] at the items of each user's row."""
    for row, user in enumerate(users):
        matrix[row, rows.row(user)] = value


class _Pool(NamedTuple):
    """The items that may be among a user's first K, ascending by index."""

    base: np.ndarray  # [B, P] float32; -inf of what is masked or there twice
    boosts: np.ndarray  # [B, P] float32
    relevant: np.ndarray  # [B, P] bool
    items: np.ndarray  # [B, P]


def _pool(scores: np.ndarray, relevant: np.ndarray, lists: Lists, users: np.ndarray) -> _Pool:
    n_items, k = scores.shape[1], min(K, scores.shape[1])
    first = _first(scores, k)
    longest = int(lists.rows.counts[users].max(initial=0))
    listed = np.full((users.size, longest), n_items)
    boosts = np.zeros((users.size, n_items + 1), np.float32)
    for row, user in enumerate(users):
        begin, end = lists.rows.offsets[user], lists.rows.offsets[user + 1]
        items = lists.rows.indices[begin:end]
        listed[row, : items.size] = items
        boosts[row, items] = lists.boosts[begin:end]
    items = np.sort(np.concatenate([first, listed], axis=1), axis=1)
    absent = items == n_items
    absent[:, 1:] |= items[:, 1:] == items[:, :-1]
    clipped, of_row = np.minimum(items, n_items - 1), np.arange(users.size)[:, None]
    return _Pool(
        base=np.where(absent, -np.inf, scores[of_row, clipped]).astype(np.float32),
        boosts=boosts[of_row, items],
        relevant=relevant[of_row, clipped] & ~absent,
        items=clipped,
    )


def _first(scores: np.ndarray, k: int) -> np.ndarray:
    """[B, k] the first k items of each row; of equal scores at the end those of the least index."""
    n = scores.shape[1]
    if k == n:
        return np.broadcast_to(np.arange(n), scores.shape)
    least = np.partition(scores, n - k, axis=1)[:, n - k, None]
    # Equal scores rank by index: as many of those that tie with the last as there is room for.
    above, ties = scores > least, scores == least
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (ties & (np.cumsum(ties, axis=1) <= room))
    return np.nonzero(chosen)[1].reshape(-1, k)


def _ndcg(
    pool: _Pool, weights: np.ndarray, relevant: np.ndarray, tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([W, B], [W, B]): ndcg@K over relevant items, over relevant tail items (NaN without)."""
    discounts = 1 / np.log2(np.arange(2, K + 2))
    ideals = np.concatenate([[np.nan], np.cumsum(discounts)])
    kinds = (pool.relevant, pool.relevant & tail[pool.items])
    counts = (relevant.sum(axis=1), (relevant & tail).sum(axis=1))
    values = np.empty((2, weights.size, relevant.shape[0]))
    for place, weight in enumerate(weights.tolist()):
        total = pool.base + np.float32(weight) * pool.boosts
        order = np.argsort(-total, axis=1, kind="stable")[:, :K]  # pools ascend by item
        real = np.take_along_axis(total, order, axis=1) > -np.inf
        for kind in range(2):
            hits = np.take_along_axis(kinds[kind], order, axis=1) & real
            gained = hits @ discounts[: order.shape[1]]
            values[kind, place] = gained / ideals[np.minimum(counts[kind], K)]
    return values[0], values[1]


def slices(dataset: Dataset, tried: Tried) -> Mapping[str, np.ndarray]:
    """Name -> [n] bool: whose values count (`tail items`: take `tail`, where it is defined)."""
    cold = dataset.slices(SliceConfig()).cold_users[tried.users]
    return {
        "overall": np.ones(tried.users.size, bool),
        "cold users": cold,
        "warm users": ~cold,
        "tail items": ~np.isnan(tried.tail[0]),
    }


def by_slice(
    dataset: Dataset, tried: Tried, values: np.ndarray, tail: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """(slice, its users' values) of `values` and `tail` [n]; slices without users are left out."""
    for name, chosen in slices(dataset, tried).items():
        if chosen.any():
            yield name, (tail if name == "tail items" else values)[chosen]
