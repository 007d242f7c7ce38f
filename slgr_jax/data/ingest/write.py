"""A dataset directory from rows with parts: sorted, sharded, hashed, some users at a time."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import fingerprints, lineage, schema, shards, user_ranges
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest.log import Log, Ranges, joined
from slgr_jax.user_shards import UserShards


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Which users and items have rows, and how these are counted.

    Attributes:
      users, items: [all ids] int32, the index of each id among those that are left.
      rows: part -> [U] rows of each user that is left.
      item_rows: part -> [I] of each item.
      bounds: [V + 1] where each shard of users begins, and U; None: users are in id order.
    """

    users: np.ndarray
    items: np.ndarray
    rows: Mapping[str, np.ndarray]
    item_rows: Mapping[str, np.ndarray]
    bounds: np.ndarray | None = None

    def of(self, log: Log) -> Log:
        """The log by the indices that are left."""
        return dataclasses.replace(log, users=self.users[log.users], items=self.items[log.items])

    def offsets(self, part: str) -> np.ndarray:
        """[U + 1] where the rows of each user begin among those of a part."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows[part], dtype=np.int64)])

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


def by_shard(numbering: Numbering, user_ids: pa.Array, count: int) -> tuple[Numbering, pa.Array]:
    """Users numbered anew, so that each of `count` shards of them is a range; in it in id order.

    Shards are dealt by training interactions, as training deals those that it is not given
    (`UserShards.deal`): a pair is there once, so that a user's rows are its items.
    """
    dealt = UserShards.deal(numbering.rows["train"], count)
    shard = dealt.row // dealt.rows
    order = np.argsort(shard, kind="stable")
    number = np.empty(order.size, np.int32)
    number[order] = np.arange(order.size, dtype=np.int32)
    numbering = dataclasses.replace(
        numbering,
        users=number[numbering.users],
        rows={part: rows[order] for part, rows in numbering.rows.items()},
        bounds=np.cumsum([0, *np.bincount(shard, minlength=count)]),
    )
    return numbering, user_ids.take(pa.array(order))


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
        shard_files, shard_facts = _user_shards(
            root, rows, numbering, of_parts["train"], items.num_rows, config.rows_per_shard
        )
        manifest = schema.DatasetManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source=source,
            split=described,
            filters=filters,
            counts=_counts(numbering, items),
            id_map_hash=fingerprints.id_map_hash(users.column(0), items.column(0)),
            split_hash=split_hash,
            files=files | of_parts | shard_files,
            parents=parents,
            features=features_lib.described(features),
            **shard_facts,
        )
        schema.write_manifest(root, manifest)
    return manifest


def _write_parts(
    root: pathlib.Path, rows: Ranges, numbering: Numbering, rows_per_shard: int
) -> tuple[dict[str, tuple[schema.ShardFile, ...]], str]:
    """Write the shards of each part; returns them, and the split's hash."""
    # Of training alone a process reads its own users'; validation is read whole.
    rows_of = {
        part: user_ranges.rows_of_shards(None, numbering.offsets(part)) for part in schema.PARTS
    }
    rows_of["train"] = user_ranges.rows_of_shards(numbering.bounds, numbering.offsets("train"))
    writers = {
        part: _Writer(root, part, shards.lengths_of(rows_of[part], rows_per_shard))
        for part in schema.PARTS
    }
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
    """The rows of one part, in order, as shards of given lengths."""

    def __init__(self, root: pathlib.Path, part: str, lengths: Sequence[int]) -> None:
        self._root, self._part, self._lengths = root, part, lengths
        self._ready: list[Log] = []
        self._files: list[schema.ShardFile] = []
        (root / part).mkdir()

    def add(self, log: Log) -> None:
        """The next rows."""
        self._ready.append(log)
        ends = np.cumsum(self._lengths[len(self._files) :])
        n_shards = int(np.searchsorted(ends, sum(map(len, self._ready)), side="right"))
        if n_shards:
            self._write(n_shards)

    def close(self) -> tuple[schema.ShardFile, ...]:
        """All shards, of which there is at least one."""
        assert len(self._files) == len(self._lengths)
        return tuple(self._files)

    def _write(self, n_shards: int) -> None:
        """The next shards, on all cores."""
        log, done = joined(self._ready), len(self._files)
        lengths = self._lengths[done : done + n_shards]
        begins = np.cumsum([0, *lengths]).tolist()

        def write(k: int) -> schema.ShardFile:
            name = f"{self._part}/part-{done + k:05d}-of-{len(self._lengths):05d}.arrow"
            return shards.write_shard(self._root, name, _table(log.slice(begins[k], lengths[k])))

        self._files += shards.on_all_cores(write, range(n_shards))
        self._ready = [log.slice(begins[-1])]


def _user_shards(
    root: pathlib.Path,
    rows: Ranges,
    numbering: Numbering,
    train: Sequence[schema.ShardFile],
    n_items: int,
    rows_per_shard: int,
) -> tuple[dict[str, tuple[schema.ShardFile, ...]], dict[str, Any]]:
    """Write what is known of everybody where users are numbered by shard.

    Returns:
      The files, and the manifest's fields; nothing where users are in id order.
    """
    if numbering.bounds is None:
        return {}, {}
    of_items = numbering.item_rows["train"]
    # Items that have no rows may stand behind those that are counted (--keep_items).
    of_items = np.append(of_items, np.zeros(n_items - of_items.size, of_items.dtype))
    files = user_ranges.write(
        root,
        numbering.bounds,
        numbering.rows["train"],
        of_items,
        rows_per_shard=rows_per_shard,
    )
    optional = {"timestamp": rows.times, "rating": rows.ratings}
    return files, {
        "user_shards": numbering.bounds.size - 1,
        "user_ranges": user_ranges.of_files(train, numbering.offsets("train")),
        "train_columns": tuple(name for name, is_there in optional.items() if is_there),
    }


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
