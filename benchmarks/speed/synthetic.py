"""Interactions that look like a recommender's, made in seconds; nothing is read or kept.

    pairs = synthetic.make(synthetic.SIZES["large"])    # sorted, distinct, a function of the seed

Activity of users is log-normal, popularity of items 1 / (rank + 20), the ranks permuted; items
of a user are drawn one after the other without replacement. Needs NumPy alone, because the
processes of peers read it where nothing else of this project can be imported.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np

HEAD = 20.0  # items weigh 1 / (rank + HEAD)
CATEGORIES, MOST_CATEGORIES = 18, 3  # in all, of an item; MovieLens-100K has 18 genres
# Users with more than this share of the catalogue are drawn by sorting, the others by rejection.
HEAVY_SHARE = 1 / 20


@dataclasses.dataclass(frozen=True)
class Size:
    """What to make.

    Attributes:
      users, items, interactions: how many.
      fewest: interactions that every user has at least.
      sigma: of the logarithm of a user's activity.
      seed: of everything.
    """

    users: int
    items: int
    interactions: int
    fewest: int = 20
    sigma: float = 1.15
    seed: int = 123


SIZES = {
    "ml100k": Size(943, 1_682, 80_000),  # the training part of MovieLens-100K
    "large": Size(138_000, 27_000, 10_000_000),  # the users and items of MovieLens-20M
    "huge": Size(10_000_000, 1_000_000, 200_000_000, fewest=5),
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Distinct (user, item), sorted by user, then item.

    Attributes:
      n_users, n_items: of the catalogue; some may be in no pair.
      users, items: [n] int32.
    """

    n_users: int
    n_items: int
    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return int(self.users.size)

    @property
    def counts(self) -> np.ndarray:
        """[n_users] interactions of each user."""
        return np.bincount(self.users, minlength=self.n_users)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `users.npy`, `items.npy` and `shape.npy` to `folder`."""
        root = pathlib.Path(folder)
        np.save(root / "users.npy", self.users)
        np.save(root / "items.npy", self.items)
        np.save(root / "shape.npy", np.array([self.n_users, self.n_items]))

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Pairs:
        """What `save` wrote."""
        root = pathlib.Path(folder)
        n_users, n_items = np.load(root / "shape.npy").tolist()
        return Pairs(n_users, n_items, np.load(root / "users.npy"), np.load(root / "items.npy"))


def make(size: Size) -> Pairs:
    """The pairs of `size`."""
    rng = np.random.default_rng(size.seed)
    counts = activity(rng, size)
    heavy = counts > size.items * HEAVY_SHARE
    keys = np.concatenate(
        [_by_rejection(rng, np.where(heavy, 0, counts), size.items)]
        + [
            _by_sorting(rng, user, int(counts[user]), size.items)
            for user in np.flatnonzero(heavy).tolist()
        ]
    )
    users, ranks = np.divmod(keys, size.items)
    # Items are numbered in no order of popularity, so a user's row is sorted once more.
    item_of_rank = rng.permutation(size.items)
    keys = users * size.items + item_of_rank[ranks]
    keys.sort()
    users, items = np.divmod(keys, size.items)
    return Pairs(size.users, size.items, users.astype(np.int32), items.astype(np.int32))


def moments(pairs: Pairs, *, seed: int = 1) -> np.ndarray:
    """[n] int64: the place in time of each pair among its user's, 0, 1, ...; a random order."""
    order = np.random.default_rng(seed).random(len(pairs))
    order = np.lexsort((order, pairs.users))  # users ascend already: only rows are shuffled
    counts = pairs.counts
    start = np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(pairs), np.int64)
    places[order] = np.arange(len(pairs)) - start
    return places


def categories(n_items: int, *, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """1 to MOST_CATEGORIES distinct categories of each item, uniformly.

    Returns:
      offsets: [n_items + 1] bounds of each item's categories.
      codes: in [0, CATEGORIES), item after item.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, MOST_CATEGORIES + 1, n_items)
    codes = rng.random((n_items, CATEGORIES)).argsort(axis=1)[:, :MOST_CATEGORIES]
    kept = np.arange(MOST_CATEGORIES)[None, :] < counts[:, None]
    return np.concatenate([[0], np.cumsum(counts)]), codes[kept]


def activity(rng: np.random.Generator, size: Size) -> np.ndarray:
    """[users] int64: interactions of each user, `size.interactions` in all.

    Log-normal, between `size.fewest` and half of the catalogue; scaled to the total, and what
    rounding leaves over is spread over random users.
    """
    most = max(size.items // 2, size.fewest)
    if not size.users * size.fewest <= size.interactions <= size.users * most:
        raise ValueError(f"{size}: every user has between {size.fewest} and {most} interactions")
    shape = rng.lognormal(0.0, size.sigma, size.users)
    luck = rng.random(size.users)  # rounds up or down, so that means below 1 are possible

    def scaled(scale: float) -> np.ndarray:
        return np.clip(np.floor(scale * shape + luck), size.fewest, most)

    low, high = 0.0, 1.0
    while scaled(high).sum() < size.interactions:
        high *= 2.0
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if scaled(middle).sum() > size.interactions else (middle, high)
    counts = scaled(low).astype(np.int64)
    while missing := size.interactions - int(counts.sum()):
        able = np.flatnonzero(counts < most)
        counts[rng.choice(able, min(missing, able.size), replace=False)] += 1
    return counts


def weights(n_items: int) -> np.ndarray:
    """[n_items] weight of each rank: ln((r + 20.5) / (r + 19.5)), within 0.03 % of 1 / (r + 20).

    The sum over the first r ranks is ln((r + 19.5) / 19.5), so a draw is one exponential.
    """
    return np.log1p(1.0 / (np.arange(n_items) + HEAD - 0.5))


def _draw(rng: np.random.Generator, count: int, n_items: int) -> np.ndarray:
    """Ranks by `weights`."""
    start = HEAD - 0.5
    places = start * np.exp(rng.random(count) * np.log1p(n_items / start)) - start
    return np.minimum(places.astype(np.int64), n_items - 1)


def _by_rejection(rng: np.random.Generator, counts: np.ndarray, n_items: int) -> np.ndarray:
    """Keys user * n_items + rank: `counts` distinct ranks a user, drawn by `weights`.

    A repeated draw is thrown away and drawn again: the same as never drawing it. Each round draws
    exactly what is missing, so nothing that was drawn is ever left out.
    """
    done: list[np.ndarray] = []
    keys, missing = np.zeros(0, np.int64), counts
    while missing.any():
        users = np.repeat(np.arange(counts.size), missing)
        keys = np.concatenate([keys, users * n_items + _draw(rng, users.size, n_items)])
        keys.sort()
        fresh = np.ones(keys.size, bool)
        fresh[1:] = keys[1:] != keys[:-1]
        keys = keys[fresh]
        owners = keys // n_items
        missing = np.where(missing > 0, counts - np.bincount(owners, minlength=counts.size), 0)
        unfinished = missing[owners] > 0
        done.append(keys[~unfinished])
        keys = keys[unfinished]
    return np.concatenate(done) if done else keys


def _by_sorting(rng: np.random.Generator, user: int, count: int, n_items: int) -> np.ndarray:
    """Keys of one user: the first `count` arrivals of exponential clocks with rates `weights`."""
    clocks = rng.standard_exponential(n_items) / weights(n_items)
    return user * n_items + np.argpartition(clocks, count - 1)[:count]
