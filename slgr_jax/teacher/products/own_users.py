"""A product of which a process keeps its own users' rows (`data/own_users.py`).

Where its users are a few ranges, no other rows are read. Otherwise all are, by ranges of users one
after the other, so that no more is in memory than what is kept and the rows of a range.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.rows import Teacher


def load(dataset: Dataset, name: str, *, pieces: int, verify: bool = True) -> Teacher:
    """The rows of the users whose interactions `dataset` has.

    Args:
      dataset: of `own_users.load`.
      pieces: where these users are scattered, in how many ranges of users all rows are read.

    Raises:
      ManifestError, ShardError: as of `preferences.load`.
    """
    assert dataset.of_users is not None, "rows of everybody are read by preferences.load"
    read, bounds = dataset.of_users.read, dataset.user_bounds
    ranges = _ranges_of(read)
    if bounds is None or len(ranges) >= bounds.size:
        ends = np.arange(pieces + 1) * read.size // pieces
        ranges = np.stack([ends[:-1], ends[1:]], axis=1)
    kept = []
    for first, end in ranges.tolist():
        teacher = preferences.load(dataset, name, verify=verify, users=(first, end))
        kept.append(teacher if read[first:end].all() else _only(teacher, read))
    lengths = np.sum([np.diff(teacher.offsets) for teacher in kept], axis=0)
    columns = {
        field.name: np.concatenate([getattr(teacher, field.name) for teacher in kept])
        for field in dataclasses.fields(Teacher)
        if field.name not in ("manifest", "offsets")
    }
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Teacher(kept[0].manifest, offsets, **columns)


def _ranges_of(read: np.ndarray) -> np.ndarray:
    """[n, 2] first and end of each run of users that are read; of none an empty one."""
    changes = np.flatnonzero(np.diff(read, prepend=False, append=False))
    return changes.reshape(-1, 2) if changes.size else np.zeros((1, 2), np.int64)


def _only(teacher: Teacher, read: np.ndarray) -> Teacher:
    """The rows of some users."""
    lengths = np.diff(teacher.offsets)
    keep = np.repeat(read, lengths)
    columns = {
        field.name: values[keep]
        for field in dataclasses.fields(Teacher)
        if isinstance(values := getattr(teacher, field.name), np.ndarray)
        and field.name != "offsets"
        and values.size == keep.size
    }
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.where(read, lengths, 0))])
    return dataclasses.replace(teacher, offsets=offsets, **columns)
