"""Answers that name items by titles -> item indices, and counts of what means none."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products import titles
from slgr_jax.teacher.products.titles import TitleIndex


def items_of(
    users: pa.ChunkedArray,
    columns: Mapping[str, pa.ChunkedArray],
    scores: np.ndarray | None,
    dataset: Dataset,
    *,
    subtitles: bool,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The item index of each title by column, -1 where it means none, and `titles.counts`.

    Args:
      users: [rows] whose answers these are: the titles of a user are one list.
      columns: by name [rows] titles.
      scores: [rows], more is better: of a user's rows about one item the best one keeps it, the
        first of equal ones. None: rows are not ranked, and none is repeated.
      dataset: its titles; subtitles: see `TitleIndex.match`.
    """
    catalogue = TitleIndex.of(dataset)
    lists: dict[str, list[int]] = collections.defaultdict(list)
    for row, user in enumerate(users.to_pylist()):
        lists[user].append(row)

    how: collections.Counter[str] = collections.Counter()
    items = {name: np.full(len(users), -1, np.int64) for name in columns}
    for name, column in columns.items():
        written = column.to_pylist()
        for rows in lists.values():
            best_first = rows if scores is None else _best_first(rows, scores)
            listed: set[int] = set()
            matches = catalogue.match([written[row] for row in best_first], subtitles=subtitles)
            for row, match in zip(best_first, matches, strict=True):
                repeated = scores is not None and match.item in listed
                how["repeated" if repeated else match.how] += 1
                if match.item >= 0 and not repeated:
                    listed.add(match.item)
                    items[name][row] = match.item
    return items, titles.counts(how)


def _best_first(rows: list[int], scores: np.ndarray) -> list[int]:
    """Rows by score, the best first; those without one last."""
    return sorted(rows, key=lambda row: -scores[row] if scores[row] == scores[row] else np.inf)
