"""A dataset directory from rows with parts: sorted, sharded, hashed, some users at a time."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import fingerprints, lineage, schema, shards
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest.log import Log, Ranges, joined


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Which users and items have rows, and how these are counted.

    Attributes:
      users, items: [all ids] int32, the index of each id among those that are left.
      rows: part -> [U] rows of each user that is left.
      item_rows: part -> [I] of each item.
    """

    users: np.ndarray
    items: np.ndarray
    rows: Mapping[str, np.ndarray]
    item_rows: Mapping[str, np.ndarray]

    def of(self, log: Log) -> Log:
        """The log by the indices that are left."""
        return dataclasses.replace(log, users=self.users[log.users], items=self.items[log.items])

    def with_training(self) -> dict[str, np.ndarray]:
        """Side -> which of its users or items have training rows; [U] and [I] bool."""
        return {"user": self.rows["train"] > 0, "item": self.item_rows["train"] > 0}


def compact(
    rows: Ranges, user_ids: pa.Array, item_ids: pa.Array, *, keep_all: bool = False
) -> tuple[Numbering, pa.Array, pa.Array]:
    """Number the users and items that are left 0, 1, ... in id order.

    Args:
      keep_all: those without rows too.

    Returns:
      The numbering, and the ids that are left.
    """
    sizes = {"user": len(user_ids), "item": len(item_ids)}
    counts = {
        side: {part: np.zeros(n, np.int32) for part in schema.PARTS} for side, n in sizes.items()
    }
    for log in rows.logs("count"):
        assert log.parts is not None
        for code, part in enumerate(schema.PARTS):
            of_part = log.parts == code
            for side, index in (("user", log.users), ("item", log.items)):
                _add_counts(counts[side][part], index[of_part])

    def numbered(side: str, ids: pa.Array) -> tuple[np.ndarray, dict[str, np.ndarray], pa.Array]:
        of_side = counts[side]
        used = np.full(len(ids), keep_all) | (sum(of_side.values(), np.zeros(1, np.int32)) > 0)
        index = np.cumsum(used, dtype=np.int32) - 1
        return index, {part: n[used] for part, n in of_side.items()}, ids.filter(pa.array(used))

    users, of_users, user_ids = numbered("user", user_ids)
    items, of_items, item_ids = numbered("item", item_ids)
    return Numbering(users, items, of_users, of_items), user_ids, item_ids


def _add_counts(counts: np.ndarray, index: np.ndarray) -> None:
    """Add how often each place is named; the work of a range of users is as large as the range."""
    if index.size:
        first, last = int(index.min()), int(index.max())
        counts[first : last + 1] += np.bincount(index - first).astype(counts.dtype)


def write(
    config: PrepareConfig,
    name: str,
    rows: Ranges,
    numbering: Numbering,
    users: pa.Table,
    items: pa.Table,
    source: Mapping[str, Any],
    described: Mapping[str, Any],
    filters: Mapping[str, Any],
    parents: tuple[lineage.Parent, ...] = (),
    features: tuple[Feature, ...] = (),
) -> schema.DatasetManifest:
    """Write the dataset directory `config.out`, its manifest last.

    Args:
      rows: every row with its part.
      source, described, filters: what was read, how it was split, what was left out.
      parents: the datasets that it was appended to.
    """
    with shards.atomic_directory(config.out, overwrite=config.overwrite) as root:
        tables = {"users": users, "items": items}
        files = {
            key: shards.write_shards(root, key, table, rows_per_shard=config.rows_per_shard)
            for key, table in tables.items()
        }
        files |= features_lib.write(root, features, rows_per_shard=config.rows_per_shard)
        of_parts, split_hash = _write_parts(root, rows, numbering, config.rows_per_shard)
        manifest = schema.DatasetManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source=source,
            split=described,
            filters=filters,
            counts=_counts(numbering, items),
            id_map_hash=fingerprints.id_map_hash(users.column(0), items.column(0)),
            split_hash=split_hash,
            files=files | of_parts,
            parents=parents,
            features=features_lib.described(features),
        )
        schema.write_manifest(root, manifest)
    return manifest


def _write_parts(
    root: pathlib.Path, rows: Ranges, numbering: Numbering, rows_per_shard: int
) -> tuple[dict[str, tuple[schema.ShardFile, ...]], str]:
    """Write the shards of each part; returns them, and the split's hash."""
    totals = {part: int(counts.sum()) for part, counts in numbering.rows.items()}
    writers = {part: _Writer(root, part, totals[part], rows_per_shard) for part in schema.PARTS}
    # Items of each part by user, then item: what the hash is over, after the users.
    by_item = {part: root / f"{part}.items" for part in schema.PARTS}
    for log in rows.logs("write"):
        log = numbering.of(log)
        assert log.parts is not None
        order = log.order()
        parts = log.parts[order]
        for code, part in enumerate(schema.PARTS):
            of_part = log.where(order[parts == code])
            writers[part].add(of_part)
            with open(by_item[part], "ab") as file:
                file.write(fingerprints.items_by_user(of_part.users, of_part.items))
    files = {part: writer.close() for part, writer in writers.items()}
    split_hash = fingerprints.split_hash_of(
        {part: (numbering.rows[part], path) for part, path in by_item.items()}
    )
    for path in by_item.values():
        path.unlink()
    return files, split_hash


class _Writer:
    """The rows of one part, in order, as shards of a given length."""

    def __init__(self, root: pathlib.Path, part: str, n_rows: int, rows_per_shard: int) -> None:
        self._root, self._part, self._rows_per_shard = root, part, rows_per_shard
        self._n_shards = max(1, -(-n_rows // rows_per_shard))
        self._ready: list[Log] = []
        self._files: list[schema.ShardFile] = []
        (root / part).mkdir()

    def add(self, log: Log) -> None:
        """The next rows."""
        self._ready.append(log)
        n_shards = sum(map(len, self._ready)) // self._rows_per_shard
        if n_shards:
            self._write(n_shards)

    def close(self) -> tuple[schema.ShardFile, ...]:
        """Write what is left; all shards, of which there is at least one."""
        if self._n_shards > len(self._files):
            self._write(1)
        assert len(self._files) == self._n_shards
        return tuple(self._files)

    def _write(self, n_shards: int) -> None:
        """The next shards, on all cores."""
        log = joined(self._ready)
        size, first = self._rows_per_shard, len(self._files)

        def write(k: int) -> schema.ShardFile:
            name = f"{self._part}/part-{first + k:05d}-of-{self._n_shards:05d}.arrow"
            return shards.write_shard(self._root, name, _table(log.slice(k * size, size)))

        self._files += shards.on_all_cores(write, range(n_shards))
        self._ready = [log.slice(n_shards * size)]


def _table(log: Log) -> pa.Table:
    """The rows as `schema.INTERACTIONS`."""
    n = len(log)
    times, ratings = log.times, log.ratings
    return pa.table(
        [
            pa.array(log.users),
            pa.array(log.items),
            pa.nulls(n, schema.TIMESTAMP)
            if times is None
            else pa.array(times).cast(pa.timestamp("us")).cast(schema.TIMESTAMP),
            pa.nulls(n, pa.float32()) if ratings is None else pa.array(ratings),
        ],
        schema=schema.INTERACTIONS,
    )


def _counts(numbering: Numbering, items: pa.Table) -> dict[str, int]:
    of_users = {part: rows > 0 for part, rows in numbering.rows.items()}
    of_items = {part: rows > 0 for part, rows in numbering.item_rows.items()}
    counts = {"users": of_users["train"].size, "items": items.num_rows}
    counts |= {part: int(rows.sum()) for part, rows in numbering.rows.items()}
    counts["train_users"] = int(np.count_nonzero(of_users["train"]))
    counts["train_items"] = int(np.count_nonzero(of_items["train"]))
    for part in ("valid", "test"):
        counts[f"{part}_users"] = int(np.count_nonzero(of_users[part]))
        without = of_users[part] & ~of_users["train"]
        counts[f"{part}_users_without_train"] = int(np.count_nonzero(without))
    with_rows = np.count_nonzero(of_items["train"] | of_items["valid"] | of_items["test"])
    counts["items_without_interactions"] = items.num_rows - int(with_rows)
    counts["items_with_title"] = int(items.num_rows - items.column("title").null_count)
    return counts
