"""A small writer of dataset directories, so that teacher tests need no raw data."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import fingerprints, schema, shards

# Ids that only survive as exact text: a leading zero, a space, any script, a comma.
USERS = ("007", "7", "ann lee", "Ωμέγα", "u,5")
ITEMS = ("01", "1", " x", "café", "10", "电影")
TRAIN = {0: [0, 1, 2], 1: [0, 1], 2: [0, 3, 4], 3: [2], 4: [0, 1, 2, 3]}
VALID = {0: [3], 2: [1]}
TEST = {0: [4], 1: [3], 4: [5]}


def write_dataset(
    path,
    *,
    users=USERS,
    items=ITEMS,
    train=TRAIN,
    valid=VALID,
    test=TEST,
    titles=None,
    categories=None,
    texts=None,
    name="tiny",
):
    """Write a dataset directory; `train`, `valid`, `test` map user index -> item indices."""
    pairs = {}
    for part, held in (("train", train), ("valid", valid), ("test", test)):
        flat = [(u, i) for u in sorted(held) for i in held[u]]
        columns = np.array(flat, np.int32).reshape(-1, 2)
        pairs[part] = (columns[:, 0], columns[:, 1])
    none = [None] * len(items)
    tables = {
        "users": pa.table([list(users), [None] * len(users)], schema=schema.USERS),
        "items": pa.table(
            [list(items), titles or none, texts or none, categories or none], schema=schema.ITEMS
        ),
    }
    for part, (u, i) in pairs.items():
        empty = pa.nulls(u.size)
        tables[part] = pa.table(
            [u, i, empty.cast(schema.TIMESTAMP), empty.cast(pa.float32())],
            schema=schema.INTERACTIONS,
        )
    with shards.atomic_directory(path) as root:
        files = {
            key: shards.write_shards(root, f"{key}/part", table, rows_per_shard=4)
            for key, table in tables.items()
        }
        manifest = schema.DatasetManifest(
            name=name,
            created="2025-01-01T00:00:00+00:00",
            source={},
            split={},
            filters={},
            counts={},
            id_map_hash=fingerprints.id_map_hash(pa.array(users), pa.array(items)),
            split_hash=fingerprints.split_hash(pairs),
            files=files,
        )
        schema.write_manifest(root, manifest)
    return dataset_lib.load(path)


@pytest.fixture
def make_dataset(tmp_path):
    """`make_dataset(name="data", **parts)` -> a loaded dataset under `tmp_path`."""
    return lambda folder="data", **parts: write_dataset(tmp_path / folder, **parts)


@pytest.fixture
def tiny(make_dataset):
    """5 users, 6 items, ids that only exact text comparison tells apart."""
    return make_dataset()
