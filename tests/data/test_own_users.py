"""What a process reads of its own users is what it would have of a whole dataset and product."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax.data import own_users, schema, shards
from slgr_jax.data.dataset import load
from slgr_jax.errors import ShardError
from slgr_jax.teacher.products import own_users as own_rows
from slgr_jax.teacher.products import preferences

USERS, ITEMS = 30, 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards of seven rows: users go on in the next ones; some have an item twice, some nothing."""
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.integers(0, USERS - 2, 200), rng.integers(0, ITEMS, 200)], axis=1)
    assert len(np.unique(pairs[:100], axis=0)) < 100
    path = tmp_path_factory.mktemp("data") / "d"
    parts = pairs[:100], pairs[100:150], pairs[150:]
    dataset = worlds.write_dataset(path, *parts, n_users=USERS, n_items=ITEMS, ratings=True)
    tables = shards.read_shards(path, dataset.manifest.files["train"], schema.INTERACTIONS)
    files = shards.write_shards(path, "train/small", tables, rows_per_shard=7)
    manifest = dataclasses.replace(
        dataset.manifest, files={**dataset.manifest.files, "train": files}
    )
    schema.write_manifest(path, manifest)
    return load(path)


@pytest.mark.parametrize("process", [0, 1, 2])
def test_own_interactions_and_the_counts_of_all(whole, process):
    asked = []

    def choose(history):
        asked.append(history)
        return np.arange(USERS) % 3 == process

    own = own_users.load(whole.path, choose)
    keep = whole.train.users % 3 == process
    for name in ("users", "items", "timestamps", "ratings"):
        np.testing.assert_array_equal(getattr(own.train, name), getattr(whole.train, name)[keep])
        np.testing.assert_array_equal(getattr(own.valid, name), getattr(whole.valid, name))
    assert len(own.test) == 0
    for name in ("history", "popularity"):
        np.testing.assert_array_equal(getattr(own, name), getattr(whole, name))
        assert getattr(own, name).dtype == getattr(whole, name).dtype
    np.testing.assert_array_equal(asked[0], whole.history)
    assert (own.train_rows, own.train_pairs) == (whole.train_rows, whole.train_pairs)
    positives = own.positives(("train",))
    np.testing.assert_array_equal(positives.counts, whole.history)
    for user in range(USERS):
        items = whole.positives(("train",)).row(user) if user % 3 == process else []
        np.testing.assert_array_equal(positives.row(user), items)


@pytest.mark.parametrize("kind", ["scores", "preferences"])
def test_own_rows_of_a_teacher_and_the_numbers_of_all(whole, kind):
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(USERS), rng.integers(0, 6, USERS)).astype(np.int32)
    first = np.concatenate([rng.permutation(ITEMS)[:n] for n in np.bincount(users)])
    numbers = (0.1 + rng.random(users.size)).astype(np.float32)
    if kind == "scores":
        worlds.teach(whole, users, first.astype(np.int32), numbers, name=kind)
    else:
        other = ((first + 1) % ITEMS).astype(np.int32)
        columns = [users, first.astype(np.int32), other, numbers]
        table = pa.table(columns, names=["user", "preferred", "other", "margin"])
        provenance = preferences.Provenance()
        table = table.cast(schema.TEACHER_SCHEMAS[kind])
        preferences.write_product(whole, kind, table, provenance=provenance)
    read = np.arange(USERS) % 2 == 1
    everybody = preferences.load(whole, kind)
    dataset = own_users.load(whole.path, lambda history: read)
    own, every = own_rows.load(dataset, kind, pieces=3)
    name = {"scores": "scores", "preferences": "margin"}[kind]
    np.testing.assert_array_equal(every, getattr(everybody, name))
    keep = np.repeat(read, np.diff(everybody.offsets))
    for name in ("items", "scores", "users", "preferred", "other", "margin"):
        values = getattr(everybody, name)
        np.testing.assert_array_equal(getattr(own, name), values[keep] if values.size else values)
    np.testing.assert_array_equal(
        np.diff(own.offsets), np.where(read, np.diff(everybody.offsets), 0)
    )


def test_interactions_that_are_not_by_user_are_refused(whole, tmp_path):
    pairs = np.stack([np.arange(10), np.zeros(10, int)], axis=1)
    dataset = worlds.write_dataset(
        tmp_path / "d", pairs, pairs[:0], pairs[:0], n_users=10, n_items=2
    )
    tables = shards.read_shards(dataset.path, dataset.manifest.files["train"], schema.INTERACTIONS)
    files = shards.write_shards(
        dataset.path, "train/other", tables.take(np.arange(10)[::-1]), rows_per_shard=100
    )
    manifest = dataclasses.replace(
        dataset.manifest, files={**dataset.manifest.files, "train": files}
    )
    schema.write_manifest(dataset.path, manifest)
    with pytest.raises(ShardError, match="is not sorted by user"):
        own_users.load(dataset.path, lambda history: history > 0)
