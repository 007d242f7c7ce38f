"""A dataset of which a process reads the training interactions of its own users alone.

Where users are numbered shard by shard (`user_ranges`), these are in files of their own, and no
other is opened; what is of everybody (`Dataset.history`, `Dataset.popularity`) is in files too.

Otherwise all files are read one after the other, twice: to count what is of everybody, by which
users are dealt out, and to keep the rows of those that are this process's. So no more is in memory
than these rows and a file.

Users and items are as by `dataset.load`, and validation is whole, since ranks of all users come
together; the test part and the features, which no such run reads, are left on the disk.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from slgr_jax.data import schema, shards, user_ranges
from slgr_jax.data.dataset import Dataset, OfUsers, Part, part_of
from slgr_jax.data.schema import DatasetManifest, ShardFile
from slgr_jax.errors import ShardError

_OPTIONAL = {"timestamps": "timestamp", "ratings": "rating"}  # of `Part`, and the file's column


def load(
    path: str | os.PathLike[str],
    choose: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    *,
    verify: bool = True,
) -> Dataset:
    """The dataset at `path`, with the training interactions of some users.

    Args:
      choose: ([U] distinct training items of each user, `Dataset.user_bounds`) -> [U] bool, whose
        rows to read.
      verify: also compare the SHA-256 of each file that is read.

    Raises:
      ManifestError, ShardError: as of `dataset.load`.
    """
    root = pathlib.Path(path)
    manifest = schema.read_dataset_manifest(root)
    users = shards.read_shards(root, manifest.files["users"], schema.USERS, verify=verify)
    items = shards.read_shards(root, manifest.files["items"], schema.ITEMS, verify=verify)
    source = _Source(root, manifest, users.num_rows, items.num_rows)
    files = manifest.files["train"]
    bounds = user_ranges.read_bounds(root, manifest, source.n_users, verify=verify)
    if bounds is None:
        each = (source.part([file], verify=verify) for file in files)
        history, popularity, complete = _count(each, root, source.n_users, source.n_items)
    else:
        history, popularity = user_ranges.read_counts(
            root, manifest, source.n_users, source.n_items, verify=verify
        )
        complete = {name: column in manifest.train_columns for name, column in _OPTIONAL.items()}
    read = choose(history, bounds)
    # Without bounds they were compared when they were counted.
    train = _joined(source.rows_of(read, verify=verify and bounds is not None), complete)
    if bounds is not None and len(train) != history[read].sum(dtype=np.int64):
        raise ShardError(
            f"{root}/history counts {history[read].sum(dtype=np.int64)} training items of users "
            f"who have {len(train)} rows in {root}/train: prepare it again"
        )
    nothing = np.zeros(0, np.int32)
    return Dataset(
        path=root,
        manifest=manifest,
        train=train,
        valid=source.part(manifest.files["valid"], verify=verify),
        test=Part(nothing, nothing, None, None),
        user_ids=users.column("user_id").combine_chunks(),
        items=items,
        of_users=OfUsers(read, history, popularity, sum(file.rows for file in files)),
        user_bounds=bounds,
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """A dataset directory whose interactions are read a few files at a time."""

    root: pathlib.Path
    manifest: DatasetManifest
    n_users: int
    n_items: int

    def part(self, files: Sequence[ShardFile], *, verify: bool) -> Part:
        """The rows of files."""
        tables = shards.open_shards(self.root, files, schema.INTERACTIONS, verify=verify)
        where = str(self.root / files[0].path) if files else str(self.root)
        return part_of(tables, where, self.n_users, self.n_items)

    def rows_of(self, read: np.ndarray, *, verify: bool) -> list[Part]:
        """The training rows of some users ([U] bool), from the files that may have any."""
        files, whole = [], True
        for file in self.manifest.files["train"]:
            first, last = self.manifest.user_ranges.get(file.path, (0, self.n_users - 1))
            if (of_file := read[first : last + 1]).any():
                files.append(file)
                whole &= bool(of_file.all())
        if whole:
            return [self.part(files, verify=verify)]
        return [_only(self.part([file], verify=verify), read) for file in files]


def _count(
    parts: Iterator[Part], root: pathlib.Path, n_users: int, n_items: int
) -> tuple[np.ndarray, np.ndarray, dict[str, bool]]:
    """Distinct items of each user, distinct users of each item, and which columns are complete."""
    history, popularity = np.zeros(n_users, np.int32), np.zeros(n_items, np.int32)
    complete = dict.fromkeys(_OPTIONAL, True)

    def count(keys: np.ndarray) -> None:
        keys = np.sort(keys)  # nearly sorted: a fortieth of the time of np.unique's hash table
        keys = keys[np.diff(keys, prepend=-1) > 0]
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
        columns = [getattr(part, name) for part in parts if len(part)] or [nothing]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    nothing = np.zeros(0, np.int32)
    timestamps, ratings = (column(name) if complete[name] else None for name in _OPTIONAL)
    return Part(column("users"), column("items"), timestamps, ratings)
