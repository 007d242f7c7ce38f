"""Which part of the users each user is in, where users are split over devices; no JAX."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class UserShards:
    """Users in V shards, a constant of a run; each device has V / devices of them.

    All shards have about as many users and about as many interactions. So lanes weigh about 1
    (`sampling.user_shards`), and no shard's arrays are much longer than another's.

    Attributes:
      count: V.
      users: U.
      rows: of a shard: those of its users, padding up to the largest shard's, and one more, so that
        a user's row has a next one.
      row: [U] where each user is in a table of all users, shard after shard.
      here: [V] bool, of whose users this process has what belongs to them; None: of all.
    """

    count: int
    users: int
    rows: int
    row: np.ndarray = dataclasses.field(compare=False, repr=False)
    here: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def deal(cls, interactions: np.ndarray, count: int) -> UserShards:
        """Users by falling number of interactions, V at a time, the first of them to the shard that
        has fewest so far: shards have as many users, to one.

        Args:
          interactions: [U] how many each user has.
        """
        users, load = interactions.size, np.zeros(count, np.int64)
        row, rows = np.empty(users, np.int32), -(-users // count) + 1
        falling = np.argsort(-interactions.astype(np.int64), kind="stable")
        for number, begin in enumerate(range(0, users, count)):
            some = falling[begin : begin + count]
            shards = np.argsort(load, kind="stable")[: some.size]
            load[shards] += interactions[some]
            row[some] = shards * rows + number
        return cls(count, users, rows, row)

    @classmethod
    def of_ranges(cls, bounds: np.ndarray) -> UserShards:
        """Shard v has the users from `bounds[v]` to before `bounds[v + 1]`, in their order.

        Args:
          bounds: [V + 1] ascending, from 0 to U.
        """
        sizes = np.diff(bounds)
        count, users, rows = sizes.size, int(bounds[-1]), int(sizes.max()) + 1
        begins = np.arange(count) * rows - bounds[:-1]
        row = (np.arange(users) + np.repeat(begins, sizes)).astype(np.int32)
        return cls(count, users, rows, row)

    @property
    def table_rows(self) -> int:
        """Rows of a table of all users, shard after shard."""
        return self.count * self.rows

    def device_of(self, users: np.ndarray, devices: int) -> np.ndarray:
        """[n] which of so many devices has each user."""
        return self.row[users] // (self.table_rows // devices)

    @functools.cached_property
    def by_row(self) -> np.ndarray:
        """[V, rows] whose row each is; U: nobody's."""
        whose = np.full(self.table_rows, self.users)
        whose[self.row] = np.arange(self.users)
        return whose.reshape(self.count, self.rows)

    def of_shard(self, shard: int) -> np.ndarray:
        """The users of a shard, in its order: its number k is in its row k."""
        whose = self.by_row[shard]
        return whose[whose < self.users]
