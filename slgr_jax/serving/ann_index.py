"""An approximate nearest-neighbour index of item vectors by inner product, and what it misses.

usearch (the extra `export`): a hierarchical navigable small world graph (Malkov & Yashunin 2018,
1603.09320). Keys are item indices.

Shape letters: I items, E width, n users that are compared, K neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from slgr_jax import progress
from slgr_jax.errors import ConfigError

INSTALL = "pip install 'slgr_jax[export]' (from a checkout: pip install -e '.[export]')"
INDEXES = ("none", "usearch")
# Inner products are no metric, and a graph needs more links and wider searches for them.
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 32, 256, 256
_ADDED = 8192  # items that are added at once
SAMPLE = 1000  # users whose lists are compared with brute force


def build(items: Float[np.ndarray, "I E"]) -> Any:
    """A `usearch.index.Index` of item vectors.

    Raises:
      ConfigError: usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise ConfigError(f"--index=usearch needs the extra: {INSTALL}") from error
    index = Index(
        ndim=items.shape[1],
        metric="ip",
        dtype="f32",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
    keys = np.arange(len(items), dtype=np.uint64)
    with progress.bar(len(items), "item", label="index") as bar:
        for begin in range(0, len(items), _ADDED):
            part = slice(begin, begin + _ADDED)
            index.add(keys[part], items[part])
            bar.update(len(keys[part]))
    return index


def save(index: Any, path: str | os.PathLike[str]) -> None:
    """Write the index as a file that `usearch.index.Index.restore` reads."""
    index.save(os.fspath(path))


def sample(n_users: int, *, seed: int = 0) -> Int[np.ndarray, "n"]:
    """`SAMPLE` users to compare, ascending; fewer are all compared."""
    rng = np.random.default_rng(seed)
    size = min(SAMPLE, n_users)
    return np.sort(rng.choice(n_users, size, replace=False)).astype(np.int32)


def recall(
    index: Any, users: Float[np.ndarray, "n E"], items: Float[np.ndarray, "I E"], k: int
) -> tuple[float, int]:
    """(mean share of a user's true top K that the index finds, users compared).

    Args:
      users: vectors of a `sample` of them.
    """
    k = min(k, len(items))
    exact = np.concatenate(
        [np.argpartition(-(part @ items.T), k - 1)[:, :k] for part in _pieces(users, len(items))]
    )
    shown: Iterator[np.ndarray] = progress.over(list(users), "query")
    listed = np.concatenate([_keys(index, query, k)[None, :] for query in shown])
    hits = [np.isin(some, true).sum() for some, true in zip(listed, exact, strict=True)]
    return float(np.mean(hits) / k), len(users)


def _keys(index: Any, query: Float[np.ndarray, "E"], k: int) -> np.ndarray:
    """[K] item indices; -1 past what the index finds."""
    keys = np.asarray(index.search(query, k).keys, np.int64)
    return np.pad(keys, (0, k - keys.size), constant_values=-1)


def _pieces(users: np.ndarray, n_items: int) -> list[np.ndarray]:
    """Users in pieces of about 2^24 scores."""
    size = max(1, (1 << 24) // max(n_items, 1))
    return [users[begin : begin + size] for begin in range(0, len(users), size)]
