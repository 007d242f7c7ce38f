"""A log that is larger than memory: columns in temporary files, then ranges of users.

Stretches of the input are added one after the other, with ids of their own. Ids are numbered as
they come (`_GrowingIds`) and columns appended to files; at the end ids are ranked by their text,
and the rows, read again in pieces, go to files of the range that their user is in. A range is about
as long as a stretch, or one user.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax import progress
from slgr_jax.data.ingest.log import Log, Ranges
from slgr_jax.data.ingest.memory import Memory
from slgr_jax.data.ingest.write import Numbering
from slgr_jax.errors import InputError

_TYPES = {
    "users": np.int32,
    "items": np.int32,
    "times": np.int64,
    "ratings": np.float32,
    "parts": np.int8,
    "rows": np.int64,
}
_AT_ONCE = 1 << 22  # rows that are read, sorted by range and written


class Spill:
    """Stretches of rows in `root`; `ranges` ends it."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._users, self._items = _GrowingIds("user"), _GrowingIds("item")
        self._rows_of_user = np.zeros(0, np.int64)
        self._columns: list[str] = []
        self._n_rows = 0

    def add(self, log: Log, user_ids: pa.Array, item_ids: pa.Array) -> None:
        """Append the rows of a stretch.

        Args:
          user_ids, item_ids: the distinct ids of the stretch; the log's codes index them.

        Raises:
          InputError: the disk is full; or the stretch has other columns than those before it.
        """
        users = self._users.numbers(user_ids)[log.users]
        items = self._items.numbers(item_ids)[log.items]
        values = {"users": users, "items": items}
        for name in ("times", "ratings", "parts"):
            if (column := getattr(log, name)) is not None:
                values[name] = column
        self._columns = self._columns or list(values)
        if list(values) != self._columns:
            noun = (set(values) ^ set(self._columns)).pop()
            raise InputError(f"some input files have {noun} and some have none; make them alike")

        counts = np.bincount(users, minlength=len(self._users))
        counts[: self._rows_of_user.size] += self._rows_of_user
        self._rows_of_user = counts
        self._n_rows += users.size
        for name, column in values.items():
            _append(self._root / name, column)

    def ranges(self, most_rows: int, *, numbered: bool) -> tuple[Ranges, pa.Array, pa.Array]:
        """The rows by ranges of users, and the ids of users and items in the order of their text.

        Args:
          most_rows: rows of a range, unless one user has more.
          numbered: keep which row of the input each was.
        """
        user_ids, user_rank = self._users.ranked()
        item_ids, item_rank = self._items.ranked()
        counts = np.zeros(len(user_ids), np.int64)
        counts[user_rank] = self._rows_of_user
        range_of_user = _ranges_of(counts, most_rows)
        names = [*self._columns, "rows"] if numbered else self._columns
        roots = _folders(self._root, int(range_of_user[-1]) + 1)
        n_done = 0
        with progress.bar(self._n_rows, "row", label="sort by user", scale=True) as bar:
            for columns in self._read():
                columns["users"] = user_rank[columns["users"]]
                columns["items"] = item_rank[columns["items"]]
                n = columns["users"].size
                if numbered:
                    columns["rows"] = np.arange(n_done, n_done + n)
                _deal(columns, range_of_user[columns["users"]], roots)
                n_done += n
                bar.update(n)
        for name in self._columns:
            (self._root / name).unlink()
        return _on_disk(roots, names, np.bincount(range_of_user, counts)), user_ids, item_ids

    def _read(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns, some rows at a time."""
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(open(self._root / name, "rb")) for name in self._columns
            }
            for first in range(0, self._n_rows, _AT_ONCE):
                n = min(_AT_ONCE, self._n_rows - first)
                yield {name: _values(file, name, n) for name, file in files.items()}


def in_order(rows: Ranges, numbering: Numbering, memory: Memory) -> Ranges:
    """The rows by ranges of users in the order of a numbering; in a range in no order.

    What is in memory is one range, and stays as it is.
    """
    if rows.is_whole:
        return rows
    counts = sum(numbering.rows.values(), np.zeros(1, np.int64))
    range_of_user = _ranges_of(counts, memory.rows)
    roots = _folders(memory.scratch(), int(range_of_user[-1]) + 1)
    names: list[str] = []

    def move(log: Log) -> Log:
        columns = {name: getattr(log, name) for name in _TYPES}
        columns = {name: column for name, column in columns.items() if column is not None}
        names[:] = columns
        _deal(columns, range_of_user[numbering.users[log.users]], roots)
        return log.slice(0, 0)  # its room on the disk is for the next ones

    rows.change(move, "number users")
    return _on_disk(roots, names, np.bincount(range_of_user, counts))


def _folders(root: pathlib.Path, count: int) -> list[pathlib.Path]:
    """New ones, for the columns of as many ranges."""
    roots = [root / f"range-{k:05d}" for k in range(count)]
    for path in roots:
        path.mkdir()
    return roots


def _deal(
    columns: Mapping[str, np.ndarray], of_row: np.ndarray, roots: Sequence[pathlib.Path]
) -> None:
    """Append each row to the files of its range, those of a range in their order.

    Args:
      columns: [n] each.
      of_row: [n] ranges.
      roots: folders of the ranges.
    """
    order = np.argsort(of_row, kind="stable")
    ends = np.cumsum(np.bincount(of_row, minlength=len(roots)))
    for name, column in columns.items():
        ordered = column[order]
        for root, end, start in zip(roots, ends, [0, *ends[:-1]], strict=True):
            if start < end:
                _append(root / name, ordered[start:end])


def _on_disk(roots: Sequence[pathlib.Path], names: Sequence[str], rows: np.ndarray) -> Ranges:
    """The ranges in folders, of as many rows each."""
    counts = rows.astype(np.int64).tolist()
    return Ranges(
        [_OnDisk(root, names, n) for root, n in zip(roots, counts, strict=True)],
        times="times" in names,
        ratings="ratings" in names,
        parts="parts" in names,
    )


def _ranges_of(counts: np.ndarray, most_rows: int) -> np.ndarray:
    """[U] uint16: the range of each user, 0, 1, ... without a gap.

    Users belong together whose first rows, in the order of users, lie between the same multiples of
    `most_rows`.
    """
    most_rows = max(most_rows, int(counts.sum()) >> 15, 1)  # at most 2^15 ranges
    loose = (np.cumsum(counts) - counts) // most_rows
    return (np.cumsum(np.diff(loose, prepend=0) > 0)).astype(np.uint16)


class _OnDisk:
    """A range whose columns are files in a folder."""

    def __init__(self, root: pathlib.Path, names: Sequence[str], n_rows: int) -> None:
        self._root, self._names, self._n_rows = root, list(names), n_rows

    def load(self) -> Log:
        columns = {name: self._column(name) for name in self._names}
        return Log(**{name: columns.get(name) for name in _TYPES})  # type: ignore[arg-type]

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return self._column("users"), self._column("items")

    def store(self, log: Log, loaded: Log) -> None:
        columns = {name: getattr(log, name) for name in _TYPES}
        self._names = [name for name, column in columns.items() if column is not None]
        for name in self._names:
            if columns[name] is not getattr(loaded, name):
                (self._root / name).unlink(missing_ok=True)
                _append(self._root / name, columns[name])
        self._n_rows = len(log)

    def __len__(self) -> int:
        return self._n_rows

    def _column(self, name: str) -> np.ndarray:
        with open(self._root / name, "rb") as file:
            return _values(file, name, self._n_rows)


class _GrowingIds:
    """Distinct ids, numbered as they came."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._ids = pa.array([], pa.string())

    def __len__(self) -> int:
        return len(self._ids)

    def numbers(self, ids: pa.Array) -> np.ndarray:
        """[n] int32: the number of each of n distinct ids; new ones come behind the others."""
        place = pc.index_in(ids, value_set=self._ids)
        is_new = place.is_null()
        numbers = pc.fill_null(place, 0).to_numpy().astype(np.int32)
        mask = is_new.to_numpy(zero_copy_only=False)
        n_new = int(np.count_nonzero(mask))
        numbers[mask] = len(self._ids) + np.arange(n_new, dtype=np.int32)
        try:
            self._ids = pa.concat_arrays([self._ids, ids.filter(is_new)])
        except pa.ArrowInvalid as error:  # past 2^31 bytes
            raise InputError(f"the input holds too many distinct {self._noun} ids") from error
        return numbers

    def ranked(self) -> tuple[pa.Array, np.ndarray]:
        """The ids in the order of their text, and [n] int32 the place there of each number."""
        order = pc.sort_indices(self._ids)
        rank = np.empty(len(order), np.int32)
        rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
        return self._ids.take(order), rank


def _append(path: pathlib.Path, column: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(np.ascontiguousarray(column).data.cast("B"))
    except OSError as error:
        raise InputError(
            f"rows that do not fit into memory cannot be written to {path.parent}: "
            f"{os.strerror(error.errno or 0)}; give them room with --temp_dir=DIR, or memory "
            "with --memory"
        ) from error


def _values(file: BinaryIO, name: str, n: int) -> np.ndarray:
    values = np.fromfile(file, _TYPES[name], n)
    if values.size != n:
        raise InputError(
            f"{file.name} was cut off while rows were sorted: {values.size} of {n} are there"
        )
    return values
