"""What a process reads of its own users is what it would have of a whole dataset and product."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax.data import own_users, schema, shards, user_ranges
from slgr_jax.data.dataset import load
from slgr_jax.errors import ShardError
from slgr_jax.reports import inspection
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

    def choose(history, bounds):
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
def test_own_rows_of_a_teacher(whole, kind):
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
    dataset = own_users.load(whole.path, lambda history, bounds: read)
    own = own_rows.load(dataset, kind, pieces=3)
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
        own_users.load(dataset.path, lambda history, bounds: history > 0)


SHARDS = 6


@pytest.fixture
def by_shard(tmp_path):
    return worlds.dataset_by_shard(tmp_path, SHARDS)


def _of_shards(*numbers):
    def choose(history, bounds):
        read = np.zeros(history.size, bool)
        for number in numbers:
            read[bounds[number] : bounds[number + 1]] = True
        return read

    return choose


def _is_part_of(own, whole, read):
    keep = read[whole.train.users]
    assert 0 < keep.sum() < keep.size
    np.testing.assert_array_equal(own.train.users, whole.train.users[keep])
    np.testing.assert_array_equal(own.train.items, whole.train.items[keep])
    np.testing.assert_array_equal(own.train.timestamps, whole.train.timestamps[keep])
    assert own.train.ratings is whole.train.ratings is None
    for name in ("history", "popularity", "user_bounds"):
        np.testing.assert_array_equal(getattr(own, name), getattr(whole, name))
        assert getattr(own, name).dtype == getattr(whole, name).dtype
    assert (own.train_rows, own.train_pairs) == (whole.train_rows, whole.train_pairs)
    np.testing.assert_array_equal(own.valid.items, whole.valid.items)


def test_files_of_other_shards_are_not_opened(by_shard):
    """They are gone; counts of everybody are those of all interactions, to the bit."""
    whole = load(by_shard.path)
    assert whole.history.sum() == len(whole.train)
    bounds, manifest = whole.user_bounds, whole.manifest
    for path, (first, _) in manifest.user_ranges.items():
        if not bounds[2] <= first < bounds[4]:
            (whole.path / path).unlink()
    for file in manifest.files["test"]:
        (whole.path / file.path).unlink()
    own = own_users.load(whole.path, _of_shards(2, 3))
    _is_part_of(own, whole, _of_shards(2, 3)(whole.history, bounds))
    with pytest.raises(ShardError, match=r"part-0000.*arrow is missing"):
        own_users.load(whole.path, _of_shards(3, 4))


def test_its_owner_alone_names_a_damaged_file(by_shard):
    path = min(by_shard.manifest.user_ranges)  # of the first shard
    damaged = bytearray((by_shard.path / path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (by_shard.path / path).write_bytes(damaged)
    own = own_users.load(by_shard.path, _of_shards(*range(1, SHARDS)))
    assert len(own.train)
    with pytest.raises(ShardError, match=f"{path} does not match its SHA-256"):
        own_users.load(by_shard.path, _of_shards(0, 1))


def test_users_of_any_shards_are_found_in_all_files(by_shard):
    read = np.arange(by_shard.n_users) % 3 == 0
    own = own_users.load(by_shard.path, lambda history, bounds: read)
    _is_part_of(own, by_shard, read)


def test_counts_that_are_not_those_of_the_interactions_are_refused(by_shard):
    bounds, manifest = by_shard.user_bounds, by_shard.manifest
    history = by_shard.history.copy()
    history[0] += 1
    files = user_ranges.write(
        by_shard.path, bounds, history, by_shard.popularity, rows_per_shard=100
    )
    schema.write_manifest(
        by_shard.path, dataclasses.replace(manifest, files={**manifest.files, **files})
    )
    with pytest.raises(ShardError, match=r"/history counts \d+ training items of users who have"):
        own_users.load(by_shard.path, _of_shards(0))
    (fault,) = inspection.inspect_data(str(by_shard.path)).faults
    assert re.search(r"/history has \d+ in row 0, the training interactions \d+", fault)


def test_a_products_files_of_other_shards_are_not_opened(by_shard):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(by_shard.n_users, dtype=np.int32), 3)
    items = np.tile(np.arange(3, dtype=np.int32), by_shard.n_users)
    worlds.teach(by_shard, users, items, rng.random(users.size).astype(np.float32))
    everybody = preferences.load(by_shard, "t")
    bounds, root = by_shard.user_bounds, preferences.product_path(by_shard.path, "t")
    assert len(everybody.manifest.files) == SHARDS
    for path, (first, last) in everybody.manifest.user_ranges.items():
        (shard,) = set(np.searchsorted(bounds, [first, last], side="right") - 1)
        if shard not in (1, 4):
            (root / path).unlink()
    dataset = own_users.load(by_shard.path, _of_shards(1, 4))
    own = own_rows.load(dataset, "t", pieces=2)
    keep = np.repeat(dataset.of_users.read, 3)
    np.testing.assert_array_equal(own.scores, everybody.scores[keep])
    np.testing.assert_array_equal(own.items, everybody.items[keep])
    np.testing.assert_array_equal(np.diff(own.offsets), 3 * dataset.of_users.read)
    scattered = own_users.load(by_shard.path, lambda history, bounds: np.arange(40) % 2 == 0)
    with pytest.raises(ShardError, match="is missing"):
        own_rows.load(scattered, "t", pieces=2)
