"""Products whose shards somebody else wrote: any encoding, any order, every bad row refused."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax.data import schema, shards
from slgr_jax.errors import ShardError
from slgr_jax.teacher.products import preferences

N_USERS, N_ITEMS = 5, 6


def foreign_product(dataset, tables, kind="scores", encoding="file"):
    """A product as somebody else may have written it: one shard per table, in any order."""
    root = preferences.product_path(dataset.path, "foreign")
    root.mkdir(parents=True)
    files = []
    for k, table in enumerate(tables):
        path = root / f"shard{k}"
        if encoding == "parquet":
            pq.write_table(table, path)
        else:
            make = pa.ipc.new_stream if encoding == "stream" else pa.ipc.new_file
            with make(path, table.schema) as writer:
                writer.write_table(table)
        size = path.stat().st_size
        files.append(schema.ShardFile(path.name, table.num_rows, size, shards.sha256_of(path)))
    schema.write_manifest(
        root,
        schema.TeacherManifest(
            name="foreign",
            kind=kind,
            created="",
            dataset="tiny",
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            built_from="train_only",
            unlisted="unknown",
            model="",
            prompt_hash="",
            score_kind="rank",
            counts={},
            coverage={},
            files=tuple(files),
        ),
    )


def score_table(users, items, scores):
    arrays = [pa.array(users, pa.int32()), pa.array(items, pa.int32())]
    arrays.append(pa.array(scores, pa.float32(), from_pandas=False))
    return pa.table(arrays, names=["user", "item", "score"])


@pytest.mark.parametrize("encoding", ["file", "stream", "parquet"])
def test_foreign_shards_in_any_order(tiny, encoding):
    tables = [
        score_table([4, 0, 0], [5, 3, 1], [1.0, 2.0, None]),
        score_table([], [], []),
        score_table([2, 0, 0], [0, 5, 2], [7.0, 1.0, 2.0]),
    ]
    foreign_product(tiny, tables, encoding=encoding)
    teacher = preferences.load(tiny, "foreign")
    assert teacher.offsets.tolist() == [0, 3, 3, 4, 4, 5]
    assert teacher.items.tolist() == [5, 2, 3, 0, 5]
    assert teacher.scores.tolist() == [1.0, 2.0, 2.0, 7.0, 1.0]
    assert preferences.usable_pairs(teacher).tolist() == [2, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([N_USERS], [0], [1.0]), r"user index 5 is outside the id map of 5"),
        (([0], [-1], [1.0]), r"item index -1 is outside the id map of 6"),
        (([0], [0], [float("nan")]), r"a score is nan; an item without an answer must be null"),
        (([0], [0], [float("inf")]), r"a score is inf"),
        (([1, 0, 1], [2, 2, 2], [1.0, 1.0, 1.0]), r"user 1, item 2 has two scores"),
        (([0, None], [0, 1], [1.0, 1.0]), r"shard0: column user must not be null; 1 rows are"),
    ],
)
def test_foreign_shards_with_bad_rows_are_refused(tiny, rows, message):
    foreign_product(tiny, [score_table(*rows)])
    with pytest.raises(ShardError, match=message):
        preferences.load(tiny, "foreign")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 1, 1, 1.0), r"item 1 is preferred over itself"),
        ((0, 1, 2, 0.0), r"margin 0.0 is not greater than 0"),
        ((0, 1, 2, float("nan")), r"a margin is nan"),
        ((0, 1, N_ITEMS, 1.0), r"other index 6 is outside the id map of 6"),
    ],
)
def test_foreign_preferences_with_bad_rows_are_refused(tiny, row, message):
    types_ = [pa.int32(), pa.int32(), pa.int32(), pa.float32()]
    arrays = [pa.array([value], kind) for value, kind in zip(row, types_, strict=True)]
    foreign_product(tiny, [pa.table(arrays, schema=schema.TEACHER_PREFERENCES)], "preferences")
    with pytest.raises(ShardError, match=message):
        preferences.load(tiny, "foreign")


def test_foreign_preferences_in_any_order(tiny):
    columns = {"user": [3, 0, 3], "preferred": [5, 1, 2], "other": [0, 2, 4]}
    arrays = [pa.array(column, pa.int32()) for column in columns.values()]
    arrays.append(pa.array([0.5, 1.5, 2.5], pa.float32()))
    table = pa.table(arrays, schema=schema.TEACHER_PREFERENCES)
    foreign_product(tiny, [table.slice(0, 2), table.slice(2)], "preferences", "stream")
    teacher = preferences.load(tiny, "foreign")
    assert teacher.offsets.tolist() == [0, 1, 1, 1, 3, 3]
    assert teacher.users.tolist() == [0, 3, 3]
    assert teacher.preferred.tolist() == [1, 5, 2]
    assert teacher.other.tolist() == [2, 0, 4]
    assert teacher.margin.tolist() == [1.5, 0.5, 2.5]


def test_wrong_column_type_is_refused(tiny):
    table = score_table([0], [0], [1.0]).cast(
        pa.schema([("user", pa.int64()), ("item", pa.int32()), ("score", pa.float32())])
    )
    foreign_product(tiny, [table])
    with pytest.raises(ShardError, match=r"column user is int64, expected int32"):
        preferences.load(tiny, "foreign")
