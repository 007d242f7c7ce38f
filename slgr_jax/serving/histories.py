"""What new users have done: lists of items, from Python or from a file, checked and put in order.

A file has a row an event, with columns user, item and, if there, times. It is read as `slgr
prepare` reads interactions: CSV, JSON lines or Parquet by its ending, times in seconds,
milliseconds, ... or as dates; a row that cannot be used is refused with its place.

Shape letters: E events of all new users.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest import interactions, sources
from slgr_jax.errors import ConfigError, InputError, listing

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

UNKNOWN = ("refuse", "skip")
ENDINGS: Mapping[str, tuple[str, str]] = {  # ending -> layout, delimiter
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".jsonl": ("jsonl", ","),
    ".parquet": ("parquet", ","),
}


@dataclasses.dataclass(frozen=True)
class History:
    """What a new user has done.

    Attributes:
      items: ids; an item that repeats counts where it is first, as in prepared data, and its
        weights add up.
      times: of each, in any unit; None: in the order of the list, oldest first.
      weights: how much each counts in the loss, > 0; None: the same. Of a run with --rating_power,
        its ratings to that power. Histories and graphs know no weights.
    """

    items: Sequence[str]
    times: Sequence[float] | np.ndarray | None = None
    weights: Sequence[float] | np.ndarray | None = None


class Events(NamedTuple):
    """Events of all new users, sorted by user, time and item; no pair repeats."""

    users: Int[np.ndarray, "E"]
    items: Int[np.ndarray, "E"]
    times: Int[np.ndarray, "E"]  # ranks
    weights: Float[np.ndarray, "E"]


def read_histories(
    path: str | os.PathLike[str],
    *,
    user_column: str = "user",
    item_column: str = "item",
    time_column: str = "timestamp",
) -> dict[str, History]:
    """Name -> what that user has done, for `TrainedRun.fold_in`; users in the order of their ids.

    Without a column of times a user's rows are in order of time, oldest first.

    Raises:
      InputError: the file is not there, is of no layout that is known, or holds a row that cannot
        be used.
    """
    place = pathlib.Path(path)
    if place.suffix.lower() not in ENDINGS:
        raise InputError(f"{place}: the ending says the layout, one of: {listing(ENDINGS)}")
    if not place.is_file():
        raise InputError(f"{place} is not there; give a file of histories with a row an event")
    layout, delimiter = ENDINGS[place.suffix.lower()]
    config = PrepareConfig(
        source=layout,
        input=str(place),
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column="",
        delimiter=delimiter,
    )
    log, user_ids, item_ids, _ = interactions.read_log(sources.read(config), config)

    names, ids = user_ids.to_pylist(), np.array(item_ids.to_pylist(), object)
    order = np.argsort(log.users, kind="stable")  # the rows of a user stay in their order
    bounds = np.searchsorted(log.users[order], np.arange(len(names) + 1))
    histories = {}
    for user, name in enumerate(names):
        rows = order[bounds[user] : bounds[user + 1]]
        times = None if log.times is None else log.times[rows]
        histories[name] = History(ids[log.items[rows]].tolist(), times)
    return histories


def events_of(
    run: TrainedRun, histories: Mapping[str, Sequence[str] | History], unknown: str
) -> tuple[list[str], Events, dict[str, int]]:
    """Who is folded in, their events, and what was left out.

    Raises:
      ConfigError, InputError: see `TrainedRun.fold_in`.
    """
    if unknown not in UNKNOWN:
        raise ConfigError(f"unknown={unknown!r} is not one of: {listing(UNKNOWN)}")
    if not histories:
        raise InputError("no histories: give at least one user with a list of item ids")
    checked = {str(name): _checked(str(name), history) for name, history in histories.items()}
    sizes = np.array([len(history.items) for history in checked.values()])
    asked = pa.array([str(i) for history in checked.values() for i in history.items], pa.string())
    items = _item_index(run, asked, unknown)
    users = np.repeat(np.arange(sizes.size), sizes)
    order = [_or_range(history.times, len(history.items)) for history in checked.values()]
    weights = [_or_ones(history.weights, len(history.items)) for history in checked.values()]
    times, weight = np.concatenate(order), np.concatenate(weights)

    known = items >= 0
    left = np.bincount(users[known], minlength=sizes.size) > 0
    if not left.any():
        raise InputError(
            f"none of the {items.size} items of {sizes.size} users is known to the run"
        )
    skipped = {
        "unknown item": int(np.unique(asked.filter(pa.array(~known)).to_pylist()).size),
        "user without a known item": int((~left).sum()),
    }
    kept = np.lexsort((items, times, users))
    kept = kept[known[kept]]
    number = np.cumsum(left) - 1
    events = _distinct(
        number[users[kept]], items[kept], times[kept], weight[kept], run.dataset.n_items
    )
    names = [name for name, has in zip(checked, left, strict=True) if has]
    return names, events, {kind: count for kind, count in skipped.items() if count}


def _checked(name: str, history: Sequence[str] | History) -> History:
    if isinstance(history, str):
        raise InputError(f"history of user {name!r} is the text {history!r}; give a list of ids")
    given = history if isinstance(history, History) else History(list(history))
    count = len(given.items)
    if not count:
        raise InputError(
            f"history of user {name!r} is empty: nothing is known of this user; leave it out, or "
            "recommend what is popular"
        )
    for kind in ("times", "weights"):
        values = getattr(given, kind)
        if values is None:
            continue
        if len(values) != count:
            raise InputError(f"history of user {name!r}: {count} items and {len(values)} {kind}")
        bad = [v for v in values if not math.isfinite(v) or (kind == "weights" and v <= 0)]
        if bad:
            needed = "finite and > 0" if kind == "weights" else "finite"
            raise InputError(
                f"history of user {name!r}: {kind} must be {needed}, and one is {bad[0]}"
            )
    return given


def _item_index(run: TrainedRun, asked: pa.Array, unknown: str) -> Int[np.ndarray, "E"]:
    """Item indices; -1 for unknown ids where these are skipped."""
    if unknown == "refuse":
        return run.item_index(asked.to_pylist())
    known = run.dataset.items.column("item_id").combine_chunks()
    index = pc.fill_null(pc.index_in(asked, value_set=known), -1)
    return np.asarray(index.to_numpy(zero_copy_only=False), np.int32)


def _or_range(times: Any, count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float64) if times is None else np.asarray(times, np.float64)


def _or_ones(weights: Any, count: int) -> np.ndarray:
    return np.ones(count) if weights is None else np.asarray(weights, np.float64)


def _distinct(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, weights: np.ndarray, n_items: int
) -> Events:
    """Each pair where it is first, with the sum of its weights, of rows sorted by user and time."""
    _, first, inverse = np.unique(
        users.astype(np.int64) * n_items + items, return_index=True, return_inverse=True
    )
    total = np.zeros(users.size)
    total[first] = np.bincount(inverse, weights=weights)
    keep = np.sort(first)
    ranks = np.unique(times, return_inverse=True)[1]
    return Events(
        users[keep].astype(np.int32),
        items[keep].astype(np.int32),
        ranks[keep].astype(np.int64),
        total[keep],
    )
