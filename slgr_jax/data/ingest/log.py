"""Interactions as aligned arrays, whole or in ranges of users, in memory or in files.

What decides on rows (filters, split rules, the writer) goes over ranges of users one after the
other, so that a log may be larger than memory: a range of its users never is. A log that fits is
one range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from slgr_jax import progress


@dataclasses.dataclass(frozen=True)
class Log:
    """Interactions as aligned arrays of length n, in input order.

    `users` and `items` index the sorted ids; `parts` is None until a split is known. `rows` says
    which row each was, counted through all pieces; None where nothing asks for it.
    """

    users: np.ndarray  # [n] int32
    items: np.ndarray  # [n] int32
    times: np.ndarray | None  # [n] int64 microseconds
    ratings: np.ndarray | None  # [n] float32
    parts: np.ndarray | None  # [n] int8
    rows: np.ndarray | None = None  # [n] int64

    def __len__(self) -> int:
        return int(self.users.size)

    def where(self, keep: np.ndarray) -> Log:
        """The rows of a bool mask or an index array, in its order."""
        return self._each(lambda column: column[keep])

    def slice(self, first: int, n: int | None = None) -> Log:
        """At most `n` rows from `first` on (None: all), without a copy."""
        end = None if n is None else first + n
        return self._each(lambda column: column[first:end])

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Log:
        optional = (self.times, self.ratings, self.parts, self.rows)
        changed = (None if column is None else change(column) for column in optional)
        return Log(change(self.users), change(self.items), *changed)

    def order(self) -> np.ndarray:
        """[n] where the rows are, sorted by user, time, item: as a dataset has those of a part."""
        keys = [self.users, self.items]
        if self.times is not None:
            keys.insert(1, self.times)
        return lexsorted(keys)


def joined(logs: Sequence[Log]) -> Log:
    """The rows of logs that are alike, one after the other."""
    if len(logs) == 1:
        return logs[0]

    def column(name: str) -> Any:
        columns = [getattr(log, name) for log in logs]
        return None if columns[0] is None else np.concatenate(columns)

    return Log(**{field.name: column(field.name) for field in dataclasses.fields(Log)})


def lexsorted(keys: Sequence[np.ndarray]) -> np.ndarray:
    """[n] places in ascending order of integer keys, the first counting most; ties as they came.

    As `np.lexsort(keys[::-1])`, but keys are joined to one number as far as 63 bits go, which is
    sorted several times faster than one key after the other.
    """
    packed, used = _packed(keys)
    order = np.argsort(packed, kind="stable")
    if used == len(keys):
        return order

    packed = packed[order]
    equal = packed[1:] == packed[:-1]
    if not equal.any():
        return order
    tied = np.zeros(packed.size, bool)
    tied[1:] |= equal
    tied[:-1] |= equal
    places = np.flatnonzero(tied)
    rows = order[places]
    within = np.lexsort([*(key[rows] for key in reversed(keys[used:])), packed[places]])
    order[places] = rows[within]
    return order


def _packed(keys: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """[n] int64 ordered as the first of `keys` are together, and how many these are."""
    total, room = np.zeros(keys[0].size, np.int64), 2**63
    if not total.size:
        return total, len(keys)
    for used, key in enumerate(keys):
        low, high = int(key.min()), int(key.max())
        step = 1
        if high - low >= 10**9 and not (key % 10**6).any():  # microseconds of whole seconds
            step = 10**6
        width = (high - low) // step + 1
        room //= width
        if room < 1:
            return (total, used) if used else (key.astype(np.int64), 1)
        total *= width
        total += key // step - low // step if step > 1 else key.astype(np.int64) - low
    return total, len(keys)


class Range(Protocol):
    """The rows of some users that follow one another."""

    def load(self) -> Log:
        """All columns."""
        ...

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items alone."""
        ...

    def store(self, log: Log, loaded: Log) -> None:
        """Put other rows in place of those that were `loaded`; columns may be the same arrays."""
        ...

    def __len__(self) -> int: ...


class InMemory:
    """A range that is held in memory."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def load(self) -> Log:
        return self._log

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return self._log.users, self._log.items

    def store(self, log: Log, loaded: Log) -> None:
        self._log = log

    def __len__(self) -> int:
        return len(self._log)


class Ranges:
    """A log by ranges of users, in their order; in each the rows are in input order.

    Attributes:
      times, ratings, parts: whether the rows have them.
    """

    def __init__(self, ranges: Sequence[Range], *, times: bool, ratings: bool, parts: bool) -> None:
        self._ranges = ranges
        self.times, self.ratings, self.parts = times, ratings, parts

    @classmethod
    def of(cls, log: Log) -> Ranges:
        """One range that is all of a log."""
        return cls(
            [InMemory(log)],
            times=log.times is not None,
            ratings=log.ratings is not None,
            parts=log.parts is not None,
        )

    def __len__(self) -> int:
        return sum(map(len, self._ranges))

    @property
    def is_whole(self) -> bool:
        """Whether all rows are one range, in memory."""
        return len(self._ranges) == 1 and isinstance(self._ranges[0], InMemory)

    def whole(self) -> Log:
        """The log of one range."""
        assert self.is_whole
        return self._ranges[0].load()

    def logs(self, label: str = "") -> Iterator[Log]:
        """The rows of one range after the other."""
        for each in self._over(label):
            yield each.load()

    def pairs(self, label: str = "") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """[n] users and items of one range after the other."""
        for each in self._over(label):
            yield each.pairs()

    def change(self, change: Callable[[Log], Log], label: str = "") -> None:
        """Put what `change` makes of the rows of each range in their place."""
        for each in self._over(label):
            log = each.load()
            changed = change(log)
            if changed is log:
                continue
            each.store(changed, log)
            self.ratings = changed.ratings is not None
            self.parts = changed.parts is not None

    def keep(self, mask: Callable[[Log], np.ndarray], label: str = "") -> int:
        """Leave out rows where the mask of a range is False; returns how many."""
        before = len(self)

        def kept(log: Log) -> Log:
            of_range = mask(log)
            return log if of_range.all() else log.where(of_range)

        self.change(kept, label)
        return before - len(self)

    def ranks(self, chosen: Callable[[Log], np.ndarray]) -> Callable[[Log], np.ndarray]:
        """Where the chosen rows of a range stand among all chosen ones in input order.

        Args:
          chosen: mask of a range's rows.

        Returns:
          Log of a range -> [m] places of its m chosen rows.
        """
        if self.is_whole:
            return lambda log: np.arange(np.count_nonzero(chosen(log)))
        flags = np.zeros(0, bool)
        for log in self.logs():
            assert log.rows is not None
            rows = log.rows[chosen(log)]
            if rows.size and rows[-1] >= flags.size:  # ascending
                flags = np.append(flags, np.zeros(int(rows[-1]) + 1 - flags.size, bool))
            flags[rows] = True
        rank = np.cumsum(flags, dtype=np.int32 if flags.size < 2**31 else np.int64)

        def of_range(log: Log) -> np.ndarray:
            assert log.rows is not None
            return rank[log.rows[chosen(log)]] - 1

        return of_range

    def _over(self, label: str) -> Iterator[Range]:
        if len(self._ranges) == 1:
            return iter(self._ranges)
        return progress.over(self._ranges, "range", label=label)
