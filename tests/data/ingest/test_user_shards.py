"""Users numbered shard by shard: the same interactions, in ranges that share no file."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import slgr_jax
from slgr_jax.data import fingerprints, schema
from slgr_jax.data.dataset import Dataset, load
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError
from slgr_jax.reports import inspection
from slgr_jax.user_shards import UserShards

SHARDS = 6


def table(n: int = 900) -> pa.Table:
    """Rows of 40 users and 30 items: repeated pairs, one very active user."""
    rng = np.random.default_rng(0)
    users = np.where(rng.random(n) < 0.2, 7, rng.integers(0, 40, n))
    return pa.table(
        {
            "user": pa.array([f"u{user}" for user in users]),
            "item": pa.array(rng.integers(100, 130, n)),
            "timestamp": pa.array(1_500_000_000 + rng.integers(0, 400, n) * 3600),
        }
    )


def prepared(folder: pathlib.Path, name: str, **knobs: Any) -> Dataset:
    source = folder / "log.parquet"
    if not source.exists():
        pq.write_table(table(), source, row_group_size=100)
    slgr_jax.prepare(source="parquet", input=source, out=folder / name, rows_per_shard=50, **knobs)
    return load(folder / name)


def rows_of(dataset: Dataset, part: str) -> set[tuple[Any, ...]]:
    rows = dataset.part(part)
    users = dataset.user_ids.take(pa.array(rows.users)).to_pylist()
    items = dataset.items.column("item_id").take(pa.array(rows.items)).to_pylist()
    return set(zip(users, items, rows.timestamps.tolist(), strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """The same rows with users in the order of their ids, and by shards."""
    folder = tmp_path_factory.mktemp("d")
    return prepared(folder, "by_id"), prepared(folder, "by_shard", user_shards=SHARDS)


def test_the_same_interactions_by_ranges_of_users(both):
    by_id, by_shard = both
    for part in schema.PARTS:
        assert rows_of(by_shard, part) == rows_of(by_id, part)
        users = by_shard.part(part).users
        assert (np.diff(users) >= 0).all()
    # Shards are those that training would deal, and in each users keep the order of their ids.
    bounds, dealt = by_shard.user_bounds, UserShards.deal(by_id.history, SHARDS)
    of_user = dict(zip(by_id.user_ids.to_pylist(), dealt.row // dealt.rows, strict=True))
    ids = by_shard.user_ids.to_pylist()
    for shard in range(SHARDS):
        of_shard = ids[bounds[shard] : bounds[shard + 1]]
        assert of_shard == sorted(user for user, number in of_user.items() if number == shard)
    ranges = UserShards.of_ranges(bounds)
    np.testing.assert_array_equal(ranges.row // ranges.rows, [of_user[user] for user in ids])
    np.testing.assert_array_equal(ranges.by_row.ravel()[ranges.row], np.arange(len(ids)))
    assert ranges.by_row[:, -1].tolist() == [len(ids)] * SHARDS, "a user's row has a next one"


def test_no_file_has_rows_of_two_shards(both):
    _, dataset = both
    manifest, bounds = dataset.manifest, dataset.user_bounds
    assert manifest.user_shards == SHARDS
    rows, seen = 0, np.zeros(dataset.n_users, bool)
    for file in manifest.files["train"]:
        users = dataset.train.users[rows : rows + file.rows]
        assert list(manifest.user_ranges[file.path]) == [users[0], users[-1]]
        first, last = np.searchsorted(bounds, users[[0, -1]], side="right")
        assert first == last
        assert file.rows <= 50
        rows += file.rows
        seen[users] = True
    np.testing.assert_array_equal(seen, dataset.history > 0)


def test_hashes_are_those_of_the_new_numbers(both):
    by_id, dataset = both
    pairs = {name: (dataset.part(name).users, dataset.part(name).items) for name in schema.PARTS}
    assert dataset.manifest.split_hash == fingerprints.split_hash(pairs)
    assert dataset.manifest.id_map_hash != by_id.manifest.id_map_hash
    assert inspection.inspect_data(str(dataset.path)).faults == []


def test_features_of_interactions_stay_with_their_rows(tmp_path):
    rows = table()
    columns = rows["user"].to_pylist(), rows["item"].to_pylist()
    pairs = pa.array([f"{user} {item}" for user, item in zip(*columns, strict=True)])
    pq.write_table(rows.append_column("pair", pairs), tmp_path / "log.parquet")
    dataset = prepared(tmp_path, "d", user_shards=SHARDS, interaction_features="pair:categorical")
    (feature,) = dataset.features
    users = np.concatenate([dataset.part(name).users for name in schema.PARTS])
    items = np.concatenate([dataset.part(name).items for name in schema.PARTS])
    users, items = dataset.user_ids.take(users), dataset.items["item_id"].take(items)
    stated = 0
    for user, item, code in zip(users, items, feature.column.to_pylist(), strict=True):
        if code is not None:  # none where training has no such pair
            assert feature.values[code] == f"{user} {item}"
            stated += 1
    assert stated >= len(dataset.train)


def test_more_rows_keep_the_numbers_and_lose_the_shards(both, tmp_path):
    _, dataset = both
    more = pa.table({"user": ["u1", "new"], "item": [100, 101], "timestamp": [1_600_000_000] * 2})
    pq.write_table(more, tmp_path / "more.parquet")
    given = {"source": "parquet", "input": tmp_path / "more.parquet", "append": dataset.path}
    manifest = slgr_jax.prepare(**given, out=tmp_path / "d2")
    child = load(tmp_path / "d2")
    assert child.user_ids.to_pylist() == [*dataset.user_ids.to_pylist(), "new"]
    assert child.user_bounds is None
    assert f"users are no longer numbered by {SHARDS} shards" in prepare.summary(manifest)
    with pytest.raises(ConfigError, match=r"--user_shards=3 numbers users anew, and --append"):
        slgr_jax.prepare(**given, out=tmp_path / "d3", user_shards=3)
