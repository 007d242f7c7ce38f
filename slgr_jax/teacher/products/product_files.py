"""The shards of a product: which of them hold whose rows."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards, user_ranges
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products import rows


def write(
    root: pathlib.Path,
    prefix: str,
    table: pa.Table,
    offsets: np.ndarray,
    dataset: Dataset,
    rows_per_shard: int,
) -> tuple[tuple[schema.ShardFile, ...], schema.UserRanges]:
    """Write rows that ascend by user; returns their shards, and the users of each.

    Where the dataset's users are numbered by shards of them (`user_ranges`), no file has rows of
    two of these.

    Args:
      offsets: [U + 1] where the rows of each user begin.
    """
    files = shards.write_shards(
        root,
        prefix,
        table,
        rows_per_shard=rows_per_shard,
        parts=user_ranges.rows_of_shards(dataset.user_bounds, offsets),
    )
    return files, user_ranges.of_files(files, offsets)


def read(
    root: pathlib.Path,
    manifest: schema.TeacherManifest,
    *,
    verify: bool,
    users: tuple[int, int] | None = None,
) -> list[pa.Table]:
    """The rows of a product, a table a shard.

    Args:
      users: as of `preferences.load`.

    Raises:
      ShardError: a shard that was read is missing, truncated or corrupt.
    """
    files, columns = manifest.files, schema.TEACHER_SCHEMAS[manifest.kind]
    if users is None:
        return shards.open_shards(root, files, columns, verify=verify)

    first, end = users
    if manifest.order != "user":
        opened = shards.open_shards(root, files, columns, verify=verify)
        return [rows.only_users(table, first, end) for table in opened]

    def may_have_some(file: schema.ShardFile) -> bool:
        least, greatest = manifest.user_ranges.get(file.path, (first, first))
        return least < end and greatest >= first

    files = tuple(file for file in files if may_have_some(file))
    opened = shards.open_shards(root, files, columns, verify=False)
    tables = [rows.slice_users(table, first, end) for table in opened]
    if verify:
        in_range = [f for f, table in zip(files, tables, strict=True) if table.num_rows]
        shards.on_all_cores(lambda file: shards.check_bytes(root, file), in_range)
    return tables
