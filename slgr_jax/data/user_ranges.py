"""Users numbered shard by shard, as `slgr prepare --user_shards` leaves them.

Shard v of V has the users from `bounds[v]` to before `bounds[v + 1]`, and files of its own that no
other shard has training interactions in. What else a process of a job needs to know of everybody is
in files of numbers: how many training items each user has, and how many users each item.

Shape letters: V shards, U users, I items.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.schema import DatasetManifest, ShardFile, UserRanges
from slgr_jax.errors import ManifestError

PathLike = str | os.PathLike[str]
_KEYS = {
    "user_shards": schema.USER_SHARDS,
    "history": schema.HISTORY,
    "popularity": schema.POPULARITY,
}


def write(
    root: PathLike,
    bounds: np.ndarray,
    history: np.ndarray,
    popularity: np.ndarray,
    *,
    rows_per_shard: int,
) -> dict[str, tuple[ShardFile, ...]]:
    """Write what is known of everybody under `root`; files by their key in the manifest.

    Args:
      bounds: [V + 1].
      history: [U] distinct training items of each user.
      popularity: [I] distinct training users of each item.
    """
    columns = (bounds[:-1], history, popularity)
    return {
        key: shards.write_shards(
            root,
            key,
            pa.table([pa.array(column, pa.int32())], schema=layout),
            rows_per_shard=rows_per_shard,
        )
        for (key, layout), column in zip(_KEYS.items(), columns, strict=True)
    }


def read_bounds(
    root: PathLike, manifest: DatasetManifest, n_users: int, *, verify: bool
) -> np.ndarray | None:
    """[V + 1] where each shard begins, and U; None where users are numbered by their ids.

    Raises:
      ManifestError, ShardError: the file is missing or damaged, or not of V shards of U users.
    """
    if not manifest.user_shards:
        return None
    begins = _column(root, manifest, "user_shards", manifest.user_shards, verify=verify)
    bounds = np.append(begins, n_users).astype(np.int64)
    if bounds[0] or (np.diff(bounds) < 0).any():
        raise ManifestError(f"{root}/user_shards does not cut {n_users} users: prepare it again")
    return bounds


def read_counts(
    root: PathLike, manifest: DatasetManifest, n_users: int, n_items: int, *, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[U] training items of each user and [I] training users of each item, int32.

    Raises:
      ManifestError, ShardError: as of `read_bounds`.
    """
    history = _column(root, manifest, "history", n_users, verify=verify)
    return history, _column(root, manifest, "popularity", n_items, verify=verify)


def _column(
    root: PathLike, manifest: DatasetManifest, key: str, n_rows: int, *, verify: bool
) -> np.ndarray:
    files = manifest.files.get(key, ())
    listed = sum(file.rows for file in files)
    if listed != n_rows:
        raise ManifestError(
            f"{os.path.join(root, schema.MANIFEST)} is damaged: {key} has {listed} rows, expected "
            f"{n_rows}; prepare it again"
        )
    return shards.read_shards(root, files, _KEYS[key], verify=verify).column(0).to_numpy()


def of_files(files: Sequence[ShardFile], offsets: np.ndarray) -> UserRanges:
    """First and last user of each file that has rows.

    Args:
      files: one after the other, their rows by user.
      offsets: [U + 1] where the rows of each user begin in all of them.
    """
    ends = np.cumsum([0, *(file.rows for file in files)])
    owners = np.searchsorted(offsets, np.stack([ends[:-1], ends[1:] - 1]), side="right") - 1
    return {
        file.path: (int(first), int(last))
        for file, first, last in zip(files, *owners, strict=True)
        if file.rows
    }


def rows_of_shards(bounds: np.ndarray | None, offsets: np.ndarray) -> list[int]:
    """Rows of each shard of users; of all, where these are in no shards.

    Args:
      bounds: [V + 1] or None.
      offsets: as of `of_files`.
    """
    ends = offsets[[0, -1]] if bounds is None else offsets[bounds]
    return [int(rows) for rows in np.diff(ends)]
