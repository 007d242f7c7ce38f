"""A product of which a process keeps its own users' rows (`data/own_users.py`)."""

from __future__ import annotations

import dataclasses

import numpy as np

from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.rows import Teacher


def load(
    dataset: Dataset, name: str, *, pieces: int, verify: bool = True
) -> tuple[Teacher, np.ndarray]:
    """The rows of the users whose interactions `dataset` has, and everybody's scores or margins.

    The product is read by ranges of users, one after the other: in memory are the rows of a range,
    those that are kept, and one number of each other row, which a typical margin is the spread of.

    Args:
      dataset: of `own_users.load`.
      pieces: how many ranges.

    Raises:
      ManifestError, ShardError: as of `preferences.load`.
    """
    assert dataset.of_users is not None, "rows of everybody are read by preferences.load"
    kept, numbers = [], []
    for piece in range(pieces):
        teacher = preferences.load(dataset, name, verify=verify, reader=(piece, pieces))
        numbers.append(teacher.numbers)
        kept.append(_only(teacher, dataset.of_users.read))
    lengths = np.sum([np.diff(teacher.offsets) for teacher in kept], axis=0)
    columns = {
        field.name: np.concatenate([getattr(teacher, field.name) for teacher in kept])
        for field in dataclasses.fields(Teacher)
        if field.name not in ("manifest", "offsets")
    }
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Teacher(kept[0].manifest, offsets, **columns), np.concatenate(numbers)


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
