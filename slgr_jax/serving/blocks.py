"""What is computed of many users, a block of them at a time, in the order that they are asked for.

Where users are split over devices a block should be about as many of each: the others wait for the
device that has most of it. Users that are numbered shard by shard (`slgr prepare --user_shards`)
come one device's after the other's. Then blocks take users of each device in turn, and what they
come to goes through files beside the output, from which it is read in order. So memory does not
grow with the users either way.

Shape letters: n users, b of a block.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from slgr_jax import cluster
from slgr_jax.data import shards

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

Columns = tuple[np.ndarray, ...]  # [b, ...] each
# Chunks that users may take in their own order, over those that they take in turns.
_UNEVEN = 1.5


def in_order(
    run: TrainedRun,
    users: np.ndarray,
    size: int,
    of_users: Callable[[np.ndarray], Columns],
    target: pathlib.Path,
) -> Iterator[tuple[slice, Columns]]:
    """(which of `users`, what `of_users` has of them) in the order of `users`, block after block.

    All processes of a job call this and take all blocks; those that went through files come to the
    first process alone.

    Args:
      users: [n] indices.
      size: most users of a block.
      of_users: (users [b]) -> [b, ...] each.
      target: what is written of it in the end; files are made in a directory beside it.
    """
    places = [slice(begin, begin + size) for begin in range(0, users.size, size)]
    turns = _in_turns(run, users, size)
    if turns is None:
        for block in places:
            yield block, of_users(users[block])
        return
    if not cluster.is_first():
        for block in places:
            of_users(users[turns[block]])
        return
    shards.remove_leftovers(target)
    with shards.scratch_directory(target) as folder:
        kept: list[pathlib.Path] = []
        for block in places:
            which = np.sort(turns[block])
            columns = of_users(users[which])
            kept = kept or [
                _zeros(folder / f"{at}.npy", users.size, x) for at, x in enumerate(columns)
            ]
            for path, column in zip(kept, columns, strict=True):
                np.load(path, mmap_mode="r+")[which] = column
        for block in places:
            yield block, tuple(np.array(np.load(path, mmap_mode="r")[block]) for path in kept)


def _zeros(path: pathlib.Path, rows: int, like: np.ndarray) -> pathlib.Path:
    """A file of so many rows, mapped when some are written or read: else all would come to stay."""
    np.lib.format.open_memmap(path, "w+", like.dtype, (rows, *like.shape[1:]))
    return path


def _in_turns(run: TrainedRun, users: np.ndarray, size: int) -> np.ndarray | None:
    """[n] an order of users whose blocks are about as many of each device's; None: theirs is."""
    device = run.restored.device_of(users)
    if device is None:
        return None
    by_device = np.argsort(device, kind="stable")
    of_sorted = device[by_device]
    number = np.empty_like(by_device)  # among its device's users
    number[by_device] = np.arange(users.size) - np.searchsorted(of_sorted, of_sorted)
    turns = np.argsort(number, kind="stable")

    def longest(device: np.ndarray) -> int:
        begins = range(0, users.size, size)
        return sum(int(np.bincount(device[begin : begin + size]).max()) for begin in begins)

    return turns if longest(device) > _UNEVEN * longest(device[turns]) else None
