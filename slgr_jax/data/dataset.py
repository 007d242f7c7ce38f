"""A dataset directory in memory: pairs of each part, counts, slices, item table.

Shape letters: U users, I items, n interactions of a part.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import SliceConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import schema, shards, user_ranges
from slgr_jax.data.features import Feature
from slgr_jax.errors import ShardError

if TYPE_CHECKING:
    import scipy.sparse


@dataclasses.dataclass(frozen=True)
class Csr:
    """Ragged rows of int32: row r is `indices[offsets[r]:offsets[r + 1]]`, ascending, no repeats.

    Attributes:
      offsets: [R + 1] int64.
      indices: [n] int32.
      lengths: [R] int32 of every row, where rows of others were left unread and are empty here.
    """

    offsets: np.ndarray
    indices: np.ndarray
    lengths: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """[R] int32: the length of each row, of those that were left unread too."""
        return np.diff(self.offsets).astype(np.int32) if self.lengths is None else self.lengths

    def row(self, r: int) -> np.ndarray:
        """The entries of row `r`, ascending."""
        return self.indices[self.offsets[r] : self.offsets[r + 1]]

    def owners(self) -> np.ndarray:
        """[n] int64: the row of each entry of `indices`."""
        return np.repeat(np.arange(self.offsets.size - 1), np.diff(self.offsets))

    def keys(self, n_columns: int) -> np.ndarray:
        """[n] int64: row * `n_columns` + index of each entry; strictly ascending.

        One number a pair, for set operations on pairs. `n_columns` must exceed every index.
        """
        keys = self.owners()
        keys *= n_columns
        keys += self.indices
        return keys

    def contains(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """[m] bool: whether row `rows[k]` holds `indices[k]`; False for rows that are not there.

        A binary search within each row, all of them at once: O(m log longest row), and no array
        of the size of `indices`.

        Args:
          rows, indices: [m] integers of any size and order, negative ones too.
        """
        rows, indices = np.asarray(rows, np.int64), np.asarray(indices, np.int64)
        inside = (rows >= 0) & (rows < self.offsets.size - 1)
        clipped = np.where(inside, rows, 0)
        low = np.where(inside, self.offsets[clipped], 0)
        end = np.where(inside, self.offsets[np.minimum(clipped + 1, self.offsets.size - 1)], 0)

        # Invariant: entries before `low` are smaller, entries from `high` on are not.
        high = end.copy()
        while (open_ := low < high).any():
            middle = np.where(open_, (low + high) // 2, 0)
            smaller = open_ & (self.indices[middle] < indices)
            low = np.where(smaller, middle + 1, low)
            high = np.where(open_ & ~smaller, middle, high)

        hit = low < end
        hit[hit] = self.indices[low[hit]] == indices[hit]
        return hit

    def matrix(self, n_columns: int, dtype: Any = np.float32) -> scipy.sparse.csr_matrix:
        """[R, n_columns] with 1 at each entry."""
        import scipy.sparse  # not at the top: training without a teacher never needs it

        ones = np.ones(self.indices.size, dtype)
        shape = (self.offsets.size - 1, n_columns)
        return scipy.sparse.csr_matrix((ones, self.indices, self.offsets), shape=shape)

    def among(self, chosen: np.ndarray) -> Csr:
        """The same rows with the entries e alone for which `chosen[e]`, [C] bool."""
        kept = chosen[self.indices]
        offsets = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[self.offsets]
        return Csr(offsets, self.indices[kept])

    @staticmethod
    def empty(n_rows: int) -> Csr:
        """Rows without entries."""
        return Csr(np.zeros(n_rows + 1, np.int64), np.zeros(0, np.int32))

    @staticmethod
    def from_pairs(rows: np.ndarray, indices: np.ndarray, n_rows: int) -> Csr:
        """Group `indices` by `rows`, sort within each row and drop repeats."""
        if not rows.size:
            return Csr.empty(n_rows)
        # One number a pair: sorted in place, several times faster than by two keys.
        width = int(indices.max()) + 1
        keys = rows.astype(np.int64)
        keys *= width
        keys += indices
        keys.sort()
        repeated = keys[1:] == keys[:-1]
        if repeated.any():
            keys = keys[np.append(True, ~repeated)]
        offsets = np.searchsorted(keys, np.arange(n_rows + 1) * width)
        keys %= width
        return Csr(offsets.astype(np.int64, copy=False), keys.astype(np.int32))


def beaten(offsets: np.ndarray, scores: np.ndarray, min_gap: float = 0.0) -> np.ndarray:
    """[n] int64: how many entries of its own user each entry is preferred over.

    Entry k beats entry l where s_k > s_l and s_k - s_l >= min_gap; as scores ascend within a
    user, those are the first entries of the user's slice. A tie beats nothing.
    """
    lengths = np.diff(offsets)
    low = np.repeat(offsets[:-1], lengths)
    if min_gap <= 0:  # all before the first equal one
        position = np.arange(scores.size, dtype=np.int64)
        tied = (position > low) & (scores == np.roll(scores, 1))
        return np.maximum.accumulate(np.where(tied, 0, position)) - low
    exact = scores.astype(np.float64)
    first, high = low.copy(), np.arange(scores.size, dtype=np.int64)
    unsettled = low < high
    while unsettled.any():
        middle = (low + high) // 2
        gap = exact - exact[middle]
        wins = (gap > 0) & (gap >= min_gap)
        low = np.where(unsettled & wins, middle + 1, low)
        high = np.where(unsettled & ~wins, middle, high)
        unsettled = low < high
    return low - first


@dataclasses.dataclass(frozen=True)
class Part:
    """Interactions of one part, sorted by user, then time, then item.

    Attributes:
      users, items: [n] int32.
      timestamps: [n] int64 microseconds since 1970 UTC, or None where the source has none.
      ratings: [n] float32, or None where the source has none.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None
    ratings: np.ndarray | None

    def __len__(self) -> int:
        return int(self.users.size)


@dataclasses.dataclass(frozen=True)
class Slices:
    """Which users are cold and which items are tail; the thresholds as resolved numbers."""

    cold_user_history: int  # cold: at most this many training interactions
    tail_item_popularity: int  # the training count of the most popular tail item
    cold_users: np.ndarray  # [U] bool
    tail_items: np.ndarray  # [I] bool


@dataclasses.dataclass(frozen=True)
class OfUsers:
    """Whose training interactions a process has read, and what is counted over everybody's.

    Attributes:
      read: [U] bool.
      history: [U] int32: distinct training items of each user.
      popularity: [I] int32: distinct training users of each item.
      rows: training interactions.
    """

    read: np.ndarray
    history: np.ndarray
    popularity: np.ndarray
    rows: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything a run needs to know of a dataset directory."""

    path: pathlib.Path
    manifest: schema.DatasetManifest
    train: Part
    valid: Part
    test: Part
    user_ids: pa.Array  # [U] string: external ids
    items: pa.Table  # schema.ITEMS, row i is item i
    features: tuple[Feature, ...] = ()  # as prepared; `known_features` has the categories too
    as_split: Dataset | None = None  # of `with_validation`: what that was called on
    of_users: OfUsers | None = None  # of `own_users.load`: train has rows of some, test has none
    user_bounds: np.ndarray | None = None  # [V + 1] of `user_ranges`; None: numbered by ids

    def with_validation(self) -> Dataset:
        """The dataset of a run that learns from validation too (`slgr train --refit`).

        Its training part is training and validation, its validation part empty. What is counted
        (`history`, `popularity`, `slices`, the values of features) stays that of training alone,
        so that slices and a gate's inputs mean what they meant before.
        """
        assert self.as_split is None, "validation joins training once"
        nothing = np.zeros(0, np.int32)
        train, order = _joined(self.train, self.valid)
        order = np.concatenate([order, np.arange(order.size, order.size + len(self.test))])
        return dataclasses.replace(
            self,
            train=train,
            valid=Part(nothing, nothing, None, None),
            features=tuple(
                features_lib.taken(feature, order)
                if feature.side == features_lib.INTERACTION
                else feature
                for feature in self.features
            ),
            as_split=self,
        )

    @property
    def _counted(self) -> Dataset:
        return self.as_split or self

    @functools.cached_property
    def split_rows(self) -> np.ndarray:
        """[n] where each training interaction of the split is in `train`."""
        if self.as_split is None:
            return np.arange(len(self.train))
        order = _joined(self.as_split.train, self.as_split.valid)[1]
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        return place[: len(self.as_split.train)]

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return int(self.items.num_rows)

    @functools.cached_property
    def _train_positives(self) -> Csr:
        pairs = Csr.from_pairs(self.train.users, self.train.items, self.n_users)
        if self.of_users is None:
            return pairs
        return dataclasses.replace(pairs, lengths=self.of_users.history)

    @property
    def train_rows(self) -> int:
        """Interactions of the training part, those that were left unread too."""
        return len(self.train) if self.of_users is None else self.of_users.rows

    @property
    def train_pairs(self) -> int:
        """Distinct (user, item) of the training part, those that were left unread too."""
        return int(self.positives(("train",)).counts.sum(dtype=np.int64))

    @functools.cached_property
    def history(self) -> np.ndarray:
        """[U] int32: distinct training items of each user."""
        return self._counted.positives(("train",)).counts

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """[I] int32: distinct training users of each item."""
        return self._counted.learned_popularity

    @functools.cached_property
    def learned_popularity(self) -> np.ndarray:
        """[I] int32: distinct users of each item in what is learned from; other than `popularity`
        only of `with_validation`."""
        if self.of_users is not None:
            return self.of_users.popularity
        indices = self.positives(("train",)).indices
        return np.bincount(indices, minlength=self.n_items).astype(np.int32)

    @functools.cached_property
    def known_features(self) -> tuple[Feature, ...]:
        """What --features may name: those prepared, and the items' categories."""
        categories = features_lib.categories(self.items, self.popularity > 0)
        return self.features if categories is None else (*self.features, categories)

    def part(self, name: str) -> Part:
        """The part called `train`, `valid` or `test`."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def positives(self, parts: Sequence[str]) -> Csr:
        """User -> sorted distinct items over the named parts; that of train is kept."""
        if tuple(parts) == ("train",):
            return self._train_positives
        chosen = [self.part(name) for name in parts]
        users = np.concatenate([part.users for part in chosen])
        items = np.concatenate([part.items for part in chosen])
        return Csr.from_pairs(users, items, self.n_users)

    def moments(self, part: str) -> np.ndarray:
        """[n] int32: how many events of its user lie before each interaction of a part.

        train: the event's place among the user's training events, as the part orders them (by
        time, then item; without times by item alone). valid: the user's training events. test:
        those of training and validation.
        """
        users = self.part(part).users
        if part == "train":  # sorted by user and time
            counts = np.bincount(users, minlength=self.n_users)
            start = np.cumsum(counts) - counts
            return (np.arange(users.size) - start[users]).astype(np.int32)
        before = {"valid": ("train",), "test": ("train", "valid")}[part]
        events = np.concatenate([self.part(name).users for name in before])
        return np.bincount(events, minlength=self.n_users).astype(np.int32)[users]

    def slices(self, config: SliceConfig) -> Slices:
        """Cold users and tail items by training counts.

        Cold: at most `cold_user_history` training items; -1 takes the 25 % quantile (lower) over
        users with any training item. Tail: the first `tail_item_fraction` of the catalogue in
        order of (training count, item index), so that ties have one answer; or, with
        `tail_item_popularity`, the items of at most so many training users.
        """
        config = config.thresholds
        threshold = config.cold_user_history
        if threshold < 0:
            histories = self.history[self.history > 0]
            threshold = int(np.quantile(histories, 0.25, method="lower")) if histories.size else 0
        order = np.lexsort((np.arange(self.n_items), self.popularity))
        n_tail = int(round(config.tail_item_fraction * self.n_items))
        if config.tail_item_popularity >= 0:
            n_tail = int(np.sum(self.popularity <= config.tail_item_popularity))
        tail = np.zeros(self.n_items, bool)
        tail[order[:n_tail]] = True
        edge = int(self.popularity[tail].max()) if n_tail else -1
        return Slices(threshold, edge, self.history <= threshold, tail)


def _joined(part: Part, more: Part) -> tuple[Part, np.ndarray]:
    """The interactions of both, in the order of a part, and where each is in one after the other.

    What one of them lacks, the whole lacks.
    """

    def both(name: str) -> np.ndarray | None:
        columns = [getattr(each, name) for each in (part, more) if len(each)]
        missing = not columns or any(column is None for column in columns)
        return None if missing else np.concatenate(columns)

    users, items = (np.concatenate([x, y]) for x, y in zip(*map(_pairs, (part, more)), strict=True))
    timestamps, ratings = both("timestamps"), both("ratings")
    order = np.lexsort((items, users) if timestamps is None else (items, timestamps, users))
    joined = Part(
        users[order],
        items[order],
        None if timestamps is None else timestamps[order],
        None if ratings is None else ratings[order],
    )
    return joined, order


def _pairs(part: Part) -> tuple[np.ndarray, np.ndarray]:
    return part.users, part.items


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Dataset:
    """Read the dataset directory at `path`, checking every shard against the manifest.

    Args:
      path: what `slgr prepare --out` wrote.
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError: not a finished dataset directory.
      ShardError: a shard is missing, truncated, corrupt, or holds an id outside the id maps.
    """
    root = pathlib.Path(path)
    manifest = schema.read_dataset_manifest(root)
    users = shards.read_shards(root, manifest.files["users"], schema.USERS, verify=verify)
    items = shards.read_shards(root, manifest.files["items"], schema.ITEMS, verify=verify)
    parts: dict[str, Any] = {}
    for name in schema.PARTS:
        tables = shards.open_shards(root, manifest.files[name], schema.INTERACTIONS, verify=verify)
        parts[name] = part_of(tables, f"{root}/{name}", users.num_rows, items.num_rows)
    rows = {
        "user": users.num_rows,
        "item": items.num_rows,
        features_lib.INTERACTION: sum(map(len, parts.values())),
    }
    return Dataset(
        features=features_lib.read(root, manifest, rows, verify=verify),
        path=root,
        manifest=manifest,
        user_ids=users.column("user_id").combine_chunks(),
        items=items,
        user_bounds=user_ranges.read_bounds(root, manifest, users.num_rows, verify=verify),
        **parts,
    )


def part_of(tables: list[pa.Table], where: str, n_users: int, n_items: int) -> Part:
    """The rows of shards as arrays; the shards are taken out of the list, and their memory freed,
    one after the other.

    Raises:
      ShardError: an index is outside the id maps.
    """
    n_rows = sum(table.num_rows for table in tables)
    columns: dict[str, np.ndarray] = {"user": np.empty(n_rows, np.int32)}
    columns["item"] = np.empty(n_rows, np.int32)
    for name, dtype in (("timestamp", np.int64), ("rating", np.float32)):
        if not any(table.column(name).null_count for table in tables):
            columns[name] = np.empty(n_rows, dtype)
    first = 0
    while tables:
        table = tables.pop(0)
        for name, values in columns.items():
            column = table.column(name)
            column = column.cast(pa.int64()) if name == "timestamp" else column
            for chunk, place in _places(column, first):
                values[place] = chunk
        first += table.num_rows
    for name, bound in (("user", n_users), ("item", n_items)):
        ids = columns[name]
        if ids.size and (ids.min() < 0 or ids.max() >= bound):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ShardError(f"{where}: {name} index {bad} is outside the id map of {bound}")
    return Part(columns["user"], columns["item"], columns.get("timestamp"), columns.get("rating"))


def _places(column: pa.ChunkedArray, first: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The chunks of a column without nulls, and where each goes if the column begins at `first`."""
    for chunk in column.chunks:
        yield chunk.to_numpy(), slice(first, first + len(chunk))
        first += len(chunk)
