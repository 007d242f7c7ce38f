"""A dataset directory in memory: groups, counts, slices, and refusal of damaged parts."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slgr_jax.config import PrepareConfig, SliceConfig
from slgr_jax.data import dataset, schema, shards
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ManifestError, ShardError


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40))
def test_csr_groups_sorts_and_drops_repeats(pairs: list[tuple[int, int]]) -> None:
    table = np.array(pairs, np.int32).reshape(-1, 2)
    csr = dataset.Csr.from_pairs(table[:, 0], table[:, 1], 5)
    expected = [sorted({item for user, item in pairs if user == row}) for row in range(5)]
    assert [csr.row(row).tolist() for row in range(5)] == expected
    assert csr.counts.tolist() == [len(row) for row in expected]
    assert (csr.offsets.dtype, csr.indices.dtype) == (np.int64, np.int32)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40),
    st.lists(st.tuples(st.integers(-2, 7), st.integers(-2, 8)), max_size=40),
)
def test_csr_says_whose_entries_are_whose(
    pairs: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    table = np.array(pairs, np.int32).reshape(-1, 2)
    csr = dataset.Csr.from_pairs(table[:, 0], table[:, 1], 5)
    distinct = sorted(set(pairs))
    assert csr.owners().tolist() == [row for row, _ in distinct]
    assert csr.keys(10).tolist() == [10 * row + index for row, index in distinct]
    assert (csr.owners().dtype, csr.keys(10).dtype) == (np.int64, np.int64)

    queries = np.array(asked, np.int32).reshape(-1, 2)
    expected = [query in distinct for query in asked]
    assert csr.contains(queries[:, 0], queries[:, 1]).tolist() == expected


def test_csr_without_rows() -> None:
    csr = dataset.Csr.from_pairs(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
    assert csr.contains(np.array([0, -1]), np.array([0, 0])).tolist() == [False, False]
    assert csr.keys(3).size == csr.owners().size == 0


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """Users a..d with 1, 2, 3, 4 training items (k0 most popular), one valid and one test row."""
    rows = [(user, f"k{item}", "train") for n, user in enumerate("abcd") for item in range(n + 1)]
    rows += [("a", "k9", "valid"), ("e", "k0", "test")]
    lines = ["user,item,fold", *(",".join(row) for row in rows)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    config = PrepareConfig(
        source="csv",
        input=str(tmp_path / "log.csv"),
        out=str(tmp_path / "d"),
        split_column="fold",
        rows_per_shard=4,
    )
    prepare.prepare(config)
    return tmp_path / "d"


def test_counts_come_from_training_only(directory: pathlib.Path) -> None:
    data = dataset.load(directory)
    assert data.user_ids.to_pylist() == list("abcde")
    assert data.history.tolist() == [1, 2, 3, 4, 0]
    assert data.popularity.tolist() == [4, 3, 2, 1, 0]
    assert data.positives(("train", "valid")).row(0).tolist() == [0, 4]
    assert data.train.timestamps is None
    assert data.train.ratings is None


@pytest.mark.parametrize(
    ("config", "cold", "tail", "threshold", "edge"),
    [
        # Quarter of the users with history (1, 2, 3, 4): the lower 25 % quantile is 1.
        (SliceConfig(), [1, 0, 0, 0, 1], [0, 0, 0, 0, 1], 1, 0),
        (SliceConfig(cold_user_history=2, tail_item_fraction=0.6), [1, 1, 0, 0, 1],
         [0, 0, 1, 1, 1], 2, 2),
        (SliceConfig(cold_user_history=0, tail_item_fraction=0.0), [0, 0, 0, 0, 1],
         [0, 0, 0, 0, 0], 0, -1),
        (SliceConfig(tail_item_popularity=2), [1, 0, 0, 0, 1], [0, 0, 1, 1, 1], 1, 2),
        (SliceConfig(slice_preset="s_llmr"), [1, 1, 1, 0, 1], [0, 0, 0, 0, 1], 3, 0),
        (SliceConfig(slice_preset="llm_esr"), [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], 9, 4),
    ],
)  # fmt: skip
def test_slices(
    directory: pathlib.Path,
    config: SliceConfig,
    cold: list[int],
    tail: list[int],
    threshold: int,
    edge: int,
) -> None:
    found = dataset.load(directory).slices(config)
    assert found.cold_users.astype(int).tolist() == cold
    assert found.tail_items.astype(int).tolist() == tail
    assert (found.cold_user_history, found.tail_item_popularity) == (threshold, edge)


def test_a_flipped_byte_is_refused_unless_unchecked(directory: pathlib.Path) -> None:
    path = directory / "train" / "part-00001-of-00003.arrow"
    data = bytearray(path.read_bytes())
    # An index inside the data: valid Arrow, in range, and wrong.
    position = data.index(np.array([2, 2, 3, 3], np.int32).tobytes())
    data[position] = 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00001-of-00003.* does not match its SHA-256"):
        dataset.load(directory)
    assert dataset.load(directory, verify=False).history.tolist() != [1, 2, 3, 4, 0]


def test_an_index_outside_the_map_is_refused(directory: pathlib.Path) -> None:
    manifest = schema.read_dataset_manifest(directory)
    for column, row in (("user", [5, 0]), ("item", [0, -1])):
        table = pa.table(
            [[row[0]], [row[1]], pa.nulls(1, schema.TIMESTAMP), pa.nulls(1, pa.float32())],
            schema=schema.INTERACTIONS,
        )
        file = shards.write_shard(directory, manifest.files["test"][0].path, table)
        files = {**manifest.files, "test": (file,)}
        schema.write_manifest(
            directory, schema.DatasetManifest(**{**vars(manifest), "files": files})
        )
        with pytest.raises(ShardError, match=f"test: {column} index .* is outside the id map of 5"):
            dataset.load(directory)


def test_manifests_are_checked(directory: pathlib.Path) -> None:
    path = directory / schema.MANIFEST
    sealed = path.read_text()
    path.write_text(sealed.replace('"created": "20', '"created": "30'))
    with pytest.raises(ManifestError, match=r"is damaged \(its SHA-256 is .*slgr prepare"):
        dataset.load(directory)
    for monster in ("[" * 50_000, "9" * 5_000):
        path.write_text(monster)
        with pytest.raises(ManifestError, match="is damaged"):
            dataset.load(directory)
    whole = json.loads(sealed)
    del whole["checksum"]  # of an earlier version: accepted
    for damage, message in (
        ({"format": "other"}, "describes 'other', expected 'slgr_jax.dataset'"),
        ({"version": 99}, "has version 99, this code reads 1"),
        ({"extra": 1}, "missing .*; unknown extra"),
        ({"split_hash": 7}, "is damaged: split_hash is 7; make it again with slgr prepare"),
        ({"counts": 5}, "is damaged: counts is 5; make it again"),
        ({"files": {"train": []}}, "it lists no files of items, test, users, valid"),
        ({"files": whole["files"] | {"test": 5}}, "is damaged: 5 does not describe a shard"),
        ({"files": whole["files"] | {"test": [{"rows": 1}]}}, "does not describe a shard"),
    ):
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(ManifestError, match=message):
            dataset.load(directory)
    path.write_text(json.dumps(whole)[:-5])
    with pytest.raises(ManifestError, match="is damaged"):
        dataset.load(directory)
    path.unlink()
    with pytest.raises(ManifestError, match="is not a finished product"):
        dataset.load(directory)
    with pytest.raises(ManifestError, match="is not a directory"):
        dataset.load(directory / "nowhere")
