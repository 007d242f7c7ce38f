"""A dataset of which a process reads the training interactions of its own users alone.

Shards are read one after the other, twice: to count what is of everybody (`Dataset.history`,
`Dataset.popularity`), by which users are dealt out, and to keep the rows of those that are this
process's. So no more is in memory than these rows and a shard. Users and items are as by
`dataset.load`, and validation is whole, since ranks of all users come together; the test part and
the features, which no such run reads, are left on the disk.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset, OfUsers, Part, part_of
from slgr_jax.errors import ShardError


def load(
    path: str | os.PathLike[str],
    choose: Callable[[np.ndarray], np.ndarray],
    *,
    verify: bool = True,
) -> Dataset:
    """The dataset at `path`, with the training interactions of some users.

    Args:
      choose: [U] distinct training items of each user -> [U] bool, whose rows to read.
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError, ShardError: as of `dataset.load`.
    """
    root = pathlib.Path(path)
    manifest = schema.read_dataset_manifest(root)
    users = shards.read_shards(root, manifest.files["users"], schema.USERS, verify=verify)
    items = shards.read_shards(root, manifest.files["items"], schema.ITEMS, verify=verify)
    sizes = users.num_rows, items.num_rows

    def parts(name: str, *, verify: bool) -> Iterator[Part]:
        for file in manifest.files[name]:
            tables = shards.open_shards(root, [file], schema.INTERACTIONS, verify=verify)
            yield part_of(tables, str(root / file.path), *sizes)

    history, popularity, complete = _count(parts("train", verify=verify), root, *sizes)
    read = choose(history)
    own = [_only(part, read) for part in parts("train", verify=False)]
    tables = shards.open_shards(root, manifest.files["valid"], schema.INTERACTIONS, verify=verify)
    nothing = np.zeros(0, np.int32)
    return Dataset(
        path=root,
        manifest=manifest,
        train=_joined(own, complete),
        valid=part_of(tables, f"{root}/valid", *sizes),
        test=Part(nothing, nothing, None, None),
        user_ids=users.column("user_id").combine_chunks(),
        items=items,
        of_users=OfUsers(
            read, history, popularity, sum(file.rows for file in manifest.files["train"])
        ),
    )


def with_test(dataset: Dataset, *, verify: bool = True) -> Dataset:
    """A dataset of `load` with the test part of all users, for whoever ranks it.

    Raises:
      ShardError: as of `dataset.load`.
    """
    root, files = dataset.path, dataset.manifest.files["test"]
    tables = shards.open_shards(root, files, schema.INTERACTIONS, verify=verify)
    test = part_of(tables, f"{root}/test", dataset.n_users, dataset.n_items)
    return dataclasses.replace(dataset, test=test)


def _count(
    parts: Iterator[Part], root: pathlib.Path, n_users: int, n_items: int
) -> tuple[np.ndarray, np.ndarray, dict[str, bool]]:
    """Distinct items of each user, distinct users of each item, and which columns are complete."""
    history, popularity = np.zeros(n_users, np.int32), np.zeros(n_items, np.int32)
    complete = {"timestamps": True, "ratings": True}

    def count(keys: np.ndarray) -> None:
        keys = np.unique(keys)
        first, last = (int(key) // n_items for key in keys[[0, -1]]) if keys.size else (0, -1)
        history[first : last + 1] += np.bincount(
            keys // n_items - first, minlength=last + 1 - first
        ).astype(np.int32)
        np.add(popularity, np.bincount(keys % n_items, minlength=n_items), popularity,
               casting="unsafe")  # fmt: skip

    rest = np.zeros(0, np.int64)  # of the last user so far, who may go on in the next shard
    for part in parts:
        for name in complete:
            complete[name] &= getattr(part, name) is not None or not len(part)
        keys = np.concatenate([rest, part.users.astype(np.int64) * n_items + part.items])
        users = keys // n_items
        if (users[1:] < users[:-1]).any():
            raise ShardError(
                f"{root}/train is not sorted by user, so that no process can read its own users' "
                "interactions: prepare it again"
            )
        cut = int(np.searchsorted(users, users[-1])) if users.size else 0
        count(keys[:cut])
        rest = keys[cut:]
    count(rest)
    return history, popularity, complete


def _only(part: Part, read: np.ndarray) -> Part:
    """The rows of some users."""
    keep = read[part.users]
    return Part(
        part.users[keep],
        part.items[keep],
        None if part.timestamps is None else part.timestamps[keep],
        None if part.ratings is None else part.ratings[keep],
    )


def _joined(parts: list[Part], complete: dict[str, bool]) -> Part:
    """One after the other; a column that everybody's interactions do not have is none."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts if len(part)] or [nothing])

    nothing = np.zeros(0, np.int32)
    timestamps, ratings = (
        column(name) if complete[name] else None for name in ("timestamps", "ratings")
    )
    return Part(column("users"), column("items"), timestamps, ratings)
