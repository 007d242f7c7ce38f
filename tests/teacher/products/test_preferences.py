"""Answers in, product out, arrays back: by value, and each refusal by its message."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slgr_jax.config import SliceConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import beaten
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.preferences import Provenance

# Most answers here are on training items, so that their indices are easy to follow.
import_scores = functools.partial(preferences.import_scores, keep_training_items=True)


def csv_file(tmp_path, text, name="answers.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def parquet_file(tmp_path, columns, name="answers.parquet"):
    pq.write_table(pa.table(columns), tmp_path / name)
    return tmp_path / name


SCORES = "user,item,score\n007,01,0.5\n007,1,0.25\n007, x,\n7,电影,2\n7,café,2\n"


def lists(teacher):
    """user -> [(score, item)] in the order of the arrays."""
    rows = itertools.pairwise(teacher.offsets)
    return {
        u: list(zip(teacher.scores[a:b].tolist(), teacher.items[a:b].tolist(), strict=True))
        for u, (a, b) in enumerate(rows)
        if b > a
    }


def test_scores_come_back_masked_and_sorted(tiny, tmp_path):
    manifest = import_scores(tiny.path, csv_file(tmp_path, SCORES), "t")
    teacher = preferences.load(tiny, "t")
    assert lists(teacher) == {0: [(0.25, 1), (0.5, 0)], 1: [(2.0, 3), (2.0, 5)]}
    assert teacher.offsets.tolist() == [0, 2, 4, 4, 4, 4]
    assert (teacher.offsets.dtype, teacher.items.dtype, teacher.scores.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )
    assert teacher.manifest == manifest
    assert manifest.counts["rows"] == 5
    assert manifest.counts["answered"] == 4
    assert manifest.counts["unanswered"] == 1
    # User 7 ties: no preference, so one user and its two items are covered.
    assert preferences.usable_pairs(teacher).tolist() == [1, 0, 0, 0, 0]
    assert manifest.counts["preferences"] == 1
    assert manifest.coverage["users"] == pytest.approx(1 / 5)
    assert manifest.coverage["items"] == pytest.approx(2 / 6)
    assert (manifest.id_map_hash, manifest.split_hash) == (
        tiny.manifest.id_map_hash,
        tiny.manifest.split_hash,
    )


def test_coverage_of_cold_users_and_tail_items(tiny, tmp_path):
    # Cold: <= 2 training items (lower quartile of 1, 2, 3, 3, 4): users 1, 3. Tail: the one
    # item (of six, 20 %) with fewest training users: item 5 ("电影").
    slices = tiny.slices(SliceConfig())
    assert slices.cold_users.tolist() == [False, True, False, True, False]
    assert np.flatnonzero(slices.tail_items).tolist() == [5]
    text = "user,item,score\n7,01,1\n7,电影,2\n007,01,1\n007,1,2\n"
    coverage = import_scores(tiny, csv_file(tmp_path, text), "t").coverage
    assert coverage == pytest.approx(
        {"users": 2 / 5, "items": 3 / 6, "cold_users": 1 / 2, "tail_items": 1.0}
    )


def test_unlisted_below_makes_single_and_tied_answers_useful(tiny, tmp_path):
    text = "user,item,score\n007,01,1\n7,1,3\n7,10,3\n"
    for unlisted, users, items in (("unknown", 0.0, 0.0), ("below", 2 / 5, 3 / 6)):
        manifest = import_scores(
            tiny, csv_file(tmp_path, text), unlisted, provenance=Provenance(unlisted=unlisted)
        )
        assert manifest.coverage["users"] == pytest.approx(users)
        assert manifest.coverage["items"] == pytest.approx(items)


def test_answered_interactions_are_counted_per_part(tiny, tmp_path):
    # (007, 01) is train, (007, café) valid, (007, 10) test; (7, 电影) is none.
    text = "user,item,score\n007,01,1\n007,café,2\n007,10,3\n7,电影,1\n"
    counts = import_scores(tiny, csv_file(tmp_path, text), "t").counts
    assert (counts["train_pairs"], counts["valid_pairs"], counts["test_pairs"]) == (1, 1, 1)


ENCODINGS = ("csv", "tsv", "parquet", "file", "stream", "dictionary", "large")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_same_product(tiny, tmp_path, encoding):
    users, items = ["u,5", "ann lee", "007", "Ωμέγα"], [" x", "café", "01", "电影"]
    scores = [0.5, -1.0, None, 3.0]
    table = pa.table({"user": users, "item": items, "score": scores, "raw": [1, 2, 3, 4]})
    path, delimiter = tmp_path / "answers", ","
    if encoding == "csv":
        text = '\ufeffscore,raw,user,item\n0.5,1,"u,5", x\n-1,2,ann lee,café\n,3,007,01\n'
        path.write_text(text + "3e0,4,Ωμέγα,电影\n", encoding="utf-8")
    elif encoding == "tsv":
        rows = zip(users, items, ["0.5", "-1.0", "", "3.0"], strict=True)
        path.write_text("user\titem\tscore\n" + "".join("\t".join(r) + "\n" for r in rows))
        delimiter = "\\t"
    elif encoding == "parquet":
        pq.write_table(table, path)
    elif encoding == "dictionary":
        for name in ("user", "item"):
            column = table[name].dictionary_encode()
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, path)
    elif encoding == "large":
        names = {"user": pa.large_string(), "item": pa.string_view(), "score": pa.string()}
        table = pa.table({n: pa.array(table[n].to_pylist()).cast(t) for n, t in names.items()})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        make = pa.ipc.new_file if encoding == "file" else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    import_scores(tiny, path, "t", delimiter=delimiter)
    teacher = preferences.load(tiny, "t")
    assert lists(teacher) == {2: [(-1.0, 3)], 3: [(3.0, 5)], 4: [(0.5, 2)]}
    assert teacher.manifest.counts["unanswered"] == 1


def test_integer_ids_are_decimal_text(tiny, tmp_path):
    # 7 is the user "7", not "007"; 1 and 10 are items "1" and "10", not "01".
    columns = {"user": pa.array([7, 7], pa.int16()), "item": [1, 10], "score": [1, 2]}
    import_scores(tiny, parquet_file(tmp_path, columns), "t")
    assert lists(preferences.load(tiny, "t")) == {1: [(1.0, 1), (2.0, 4)]}


def test_preferences_come_back_with_margins(tiny, tmp_path):
    text = "user,preferred,other,margin\nann lee,10,01,2.5\n007,1,01,0.5\n007,1,10,1\n"
    manifest = import_scores(tiny, csv_file(tmp_path, text), "p")
    teacher = preferences.load(tiny, "p")
    assert teacher.users.tolist() == [0, 0, 2]
    assert teacher.preferred.tolist() == [1, 1, 4]
    assert teacher.other.tolist() == [0, 4, 0]
    assert teacher.margin.tolist() == [0.5, 1.0, 2.5]
    assert teacher.offsets.tolist() == [0, 2, 2, 3, 3, 3]
    assert preferences.usable_pairs(teacher).tolist() == [2, 0, 1, 0, 0]
    assert preferences.usable_pairs(teacher, min_gap=0.75).tolist() == [1, 0, 1, 0, 0]
    assert manifest.kind == "preferences"
    assert manifest.coverage["items"] == pytest.approx(3 / 6)


def test_margin_defaults_to_one(tiny, tmp_path):
    text = "user,preferred,other\n007,1,01\n"
    import_scores(tiny, csv_file(tmp_path, text), "p")
    assert preferences.load(tiny, "p").margin.tolist() == [1.0]


REFUSED = {
    "no bytes": ("", r"is empty: a teacher needs"),
    "header only": ("user,item,score\n", r"has no rows"),
    "missing column": (
        "user,item\n007,01\n",
        r"has columns user, item; expected user, item, score",
    ),
    "column of another name": (
        "user,movie,score\n007,01,1\n",
        r"has columns user, movie, score; expected user, item, score",
    ),
    "column twice": ("user,item,score,item\n007,01,1,1\n", r"names a column twice"),
    "nan": ("user,item,score\n007,01,1\n007,1,nan\n", r"row 2 has score nan; .*finite"),
    "inf": ("user,item,score\n007,01,-inf\n", r"row 1 has score -inf"),
    "beyond float32": ("user,item,score\n007,01,1\n007,1,1e39\n", r"row 2 has score 1e39"),
    "text score": ("user,item,score\n7,1,1\n7,01,2\n7,10,good\n", r"row 3 has score 'good', not a"),
    "all empty": ("user,item,score\n007,01,\n007,1, \n", r"all 2 scores are empty"),
    "no user id": ("user,item,score\n007,01,1\n,1,1\n", r"row 2 has no user id"),
    "unknown ids": (
        "user,item,score\n07,01,1\n007,1.0,1\n007,x,1\n007,x,2\n7,1,1\n",
        r"4 of 5 rows name ids .*: 1 user \('07'\) and 2 items \('1.0', 'x'\);.*--unknown=drop",
    ),
    "conflict": (
        "user,item,score\n7,1,1\n007,01,1\n007,01,2\n",
        r"rows 2 and 3 are two different scores .*--duplicates=mean",
    ),
    "answered and not": ("user,item,score\n007,01,1\n007,01,\n", r"rows 1 and 2 are two different"),
    "itself": ("user,preferred,other\n007,1,01\n007,1,1\n", r"row 2 prefers item '1' over itself"),
    "margin 0": ("user,preferred,other,margin\n007,1,01,0\n", r"row 1 has margin 0; .*greater"),
    "no margin": ("user,preferred,other,margin\n7,1,01,1\n007,1,01,\n", r"row 2 has margin None"),
    "opposite": (
        "user,preferred,other\n007,1,01\n007,01,1\n",
        r"rows 1 and 2 are contradicting preferences",
    ),
    "ragged": ("user,item,score\n007,01\n", r"cannot be read as CSV"),
    "bad utf-8": (b"user,item,score\n\xff\xfe,01,1\n", r"cannot be read as CSV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_by_name(tiny, tmp_path, case):
    text, message = REFUSED[case]
    path = tmp_path / "answers.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        import_scores(tiny, path, "t")
    assert preferences.products(tiny.path) == []
    assert not list((tiny.path).glob("teacher/*"))


def test_bad_parquet_columns_are_refused(tiny, tmp_path):
    floats = parquet_file(tmp_path, {"user": [7.0], "item": ["1"], "score": [1.0]})
    with pytest.raises(InputError, match=r"column user is double; ids must be text or integers"):
        import_scores(tiny, floats, "t")
    nan = parquet_file(tmp_path, {"user": ["7"], "item": ["1"], "score": [float("nan")]})
    with pytest.raises(InputError, match=r"row 1 has score nan"):
        import_scores(tiny, nan, "t")
    lists_ = parquet_file(tmp_path, {"user": ["7"], "item": ["1"], "score": [[1.0]]})
    with pytest.raises(InputError, match=r"column score is list<.*, not a number"):
        import_scores(tiny, lists_, "t")


@pytest.mark.parametrize("encoding", ["parquet", "file", "stream"])
def test_a_file_short_of_one_byte_is_refused(tiny, tmp_path, encoding):
    table = pa.table({"user": ["7"], "item": ["1"], "score": [1.0]})
    path = tmp_path / "answers"
    if encoding == "parquet":
        pq.write_table(table, path)
    else:
        make = pa.ipc.new_file if encoding == "file" else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table)
    import_scores(tiny, path, "whole")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"answers"):
        import_scores(tiny, path, "cut")


def test_a_missing_file_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"nowhere.csv is not a file"):
        import_scores(tiny, tmp_path / "nowhere.csv", "t")


def test_unknown_ids_can_be_dropped_and_are_counted(tiny, tmp_path):
    text = "user,item,score\n07,01,1\n007,x,1\n007,y,1\n08,x,1\n7,1,1\n7,01,2\n"
    counts = import_scores(tiny, csv_file(tmp_path, text), "t", unknown="drop").counts
    assert counts["file_rows"] == 6
    assert counts["rows"] == 2
    assert counts["dropped_unknown_user_rows"] == 2
    assert counts["dropped_unknown_item_rows"] == 2
    assert (counts["unknown_users"], counts["unknown_items"]) == (2, 2)
    with pytest.raises(InputError, match=r"none of the 1 rows"):
        import_scores(tiny, csv_file(tmp_path, "user,item,score\n0,0,1\n"), "none", unknown="drop")


def test_equal_rows_count_once_and_conflicts_can_be_averaged(tiny, tmp_path):
    equal = csv_file(tmp_path, "user,item,score\n007,01,0.1\n7,1,\n007,01,0.1\n7,1,\n")
    manifest = import_scores(tiny, equal, "equal")
    assert manifest.counts["rows"] == 2
    assert manifest.counts["merged_rows"] == 2
    assert lists(preferences.load(tiny, "equal")) == {0: [(float(np.float32(0.1)), 0)]}
    conflict = csv_file(tmp_path, "user,item,score\n007,01,1\n7,1,3\n007,01,2\n7,1,\n007,01,6\n")
    import_scores(tiny, conflict, "mean", duplicates="mean")
    assert lists(preferences.load(tiny, "mean")) == {0: [(3.0, 0)], 1: [(3.0, 1)]}


def test_opposite_preferences_net_out(tiny, tmp_path):
    rows = ["007,1,01,1", "007,01,1,4", "7,1,01,2", "7,01,1,2", "7,10,01,1", "7,10,01,1"]
    text = "user,preferred,other,margin\n" + "\n".join(rows)
    import_scores(tiny, csv_file(tmp_path, text), "net", duplicates="mean")
    teacher = preferences.load(tiny, "net")
    found = zip(teacher.users, teacher.preferred, teacher.other, teacher.margin, strict=True)
    assert [tuple(map(float, row)) for row in found] == [(0, 0, 1, 1.5), (1, 4, 0, 1.0)]


def test_bad_choices_and_names(tiny, tmp_path):
    path = csv_file(tmp_path, SCORES)
    with pytest.raises(ConfigError, match=r"--built_from='all' is not one of: train_only"):
        Provenance(built_from="all")
    with pytest.raises(ConfigError, match=r"--unknown='skip'"):
        import_scores(tiny, path, "t", unknown="skip")
    with pytest.raises(ConfigError, match=r"--duplicates='last'"):
        import_scores(tiny, path, "t", duplicates="last")
    for name in ("", "../other", ".hidden", "a/b"):
        with pytest.raises(ConfigError, match=r"cannot name a teacher product"):
            import_scores(tiny, path, name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"files": [{"path": "x"}]}, r"damaged: \{.path.: .x.\} does not describe a shard"),
        ({"files": {}}, r"damaged: files is \{\}; make it again with slgr teach"),
        ({"split_hash": 7}, r"damaged: split_hash is 7; make it again"),
        ({"counts": None}, r"damaged: counts is null; make it again"),
    ],
)
def test_a_damaged_manifest_is_named(tiny, tmp_path, damage, message):
    import_scores(tiny, csv_file(tmp_path, SCORES), "t")
    path = tiny.path / "teacher" / "t" / schema.MANIFEST
    raw = json.loads(path.read_text())
    del raw["checksum"]
    path.write_text(json.dumps(raw | damage))
    with pytest.raises(ManifestError, match=message):
        preferences.load(tiny, "t")


def test_existing_product_is_kept_unless_overwritten(tiny, tmp_path):
    path = csv_file(tmp_path, SCORES)
    import_scores(tiny, path, "t")
    with pytest.raises(InputError, match=r"exists; .*--overwrite"):
        import_scores(tiny, path, "t")
    other = csv_file(tmp_path, "user,item,score\n007,01,9\n", "other.csv")
    import_scores(tiny, other, "t", overwrite=True)
    assert lists(preferences.load(tiny, "t")) == {0: [(9.0, 0)]}


def test_shards_are_sorted_and_sized(tiny, tmp_path):
    rows = [
        f"{u},{i},{k}" for k, (u, i) in enumerate(itertools.product(["7", "007"], ["10", "01"]))
    ]
    path = csv_file(tmp_path, "user,item,score\n" + "\n".join(rows))
    manifest = import_scores(tiny, path, "t", rows_per_shard=3)
    assert [file.rows for file in manifest.files] == [3, 1]
    root = preferences.product_path(tiny.path, "t")
    table = shards.read_shards(root, manifest.files, schema.TEACHER_SCORES)
    pairs = list(zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True))
    assert pairs == [(0, 4), (0, 0), (1, 4), (1, 0)]  # by user, then score
    assert table["score"].to_pylist() == [2.0, 3.0, 0.0, 1.0]


def rewrite(dataset, name, **changes):
    root = preferences.product_path(dataset.path, name)
    manifest = dataclasses.replace(schema.read_teacher_manifest(root), **changes)
    schema.write_manifest(root, manifest)


def test_refused_manifests(tiny, make_dataset, tmp_path):
    path = csv_file(tmp_path, SCORES)
    import_scores(tiny, path, "good")
    with pytest.raises(ManifestError, match=r"no teacher 'gone'; it has: good$"):
        preferences.load(tiny, "gone")
    seen = Provenance(built_from="includes_eval")
    manifest = import_scores(tiny, path, "seen", provenance=seen)
    assert manifest.built_from == "includes_eval"
    assert "will refuse" in preferences.report(manifest)
    with pytest.raises(ManifestError, match=r"built_from=includes_eval.*leak"):
        preferences.load(tiny, "seen")
    other = make_dataset("other", valid={1: [4]})
    shutil.copytree(tiny.path / "teacher", other.path / "teacher")
    built, found = tiny.manifest.split_hash[:8], other.manifest.split_hash[:8]
    assert built != found
    with pytest.raises(
        ManifestError,
        match=rf"for split {built}, .* has split {found}; rebuild it: slgr teach "
        r"import --data=.* --name=good --overwrite",
    ):
        preferences.load(other, "good")
    renamed = make_dataset("renamed", users=("7", "007", "ann lee", "Ωμέγα", "u,5"))
    shutil.copytree(tiny.path / "teacher", renamed.path / "teacher")
    with pytest.raises(ManifestError, match=r"was made for id map"):
        preferences.load(renamed, "good")
    for change, message in (
        ({"kind": "ranks"}, r"kind 'ranks' is not one of: scores, preferences"),
        ({"unlisted": "above"}, r"unlisted 'above'"),
        ({"built_from": "anything"}, r"built_from=anything"),
    ):
        shutil.rmtree(tiny.path / "teacher" / "good")
        import_scores(tiny, path, "good")
        rewrite(tiny, "good", **change)
        with pytest.raises(ManifestError, match=message):
            preferences.load(tiny, "good")


def test_a_directory_without_manifest_is_no_product(tiny, tmp_path):
    import_scores(tiny, csv_file(tmp_path, SCORES), "t")
    (tiny.path / "teacher" / "t" / schema.MANIFEST).unlink()
    with pytest.raises(ManifestError, match=r"no teacher 't'; it has: \(none\)"):
        preferences.load(tiny, "t")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone"])
def test_damaged_shards_are_refused(tiny, tmp_path, damage):
    manifest = import_scores(tiny, csv_file(tmp_path, SCORES), "t")
    shard = tiny.path / "teacher" / "t" / manifest.files[0].path
    whole = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        shard.write_bytes({"cut": whole[:-1], "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(ShardError, match=shard.name):
        preferences.load(tiny, "t")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3e38]), max_size=8), max_size=6),
    st.sampled_from([0.0, 0.25, 0.3, 2.0]),
)
def test_usable_pairs_equal_brute_force(rows, min_gap):
    rows = [sorted(row) for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    scores = np.array([score for row in rows for score in row], np.float32)
    expected = [[sum(a > b and a - b >= min_gap for b in row) for a in row] for row in rows]
    found = beaten(offsets, scores, min_gap)
    assert found.tolist() == [count for row in expected for count in row]
    for u, row in enumerate(rows):  # "the first entries of the user's slice"
        for k, count in enumerate(found[offsets[u] : offsets[u + 1]]):
            assert all(row[k] - low >= min_gap for low in row[:count])
            assert not any(row[k] - high > 0 and row[k] - high >= min_gap for high in row[count:])
    stub = types.SimpleNamespace(
        manifest=types.SimpleNamespace(kind="scores"), offsets=offsets, scores=scores
    )
    assert preferences.usable_pairs(stub, min_gap=min_gap).tolist() == [sum(r) for r in expected]


def test_report_states_the_assumption(tiny, tmp_path):
    made = Provenance(built_from="includes_label", model="some-llm", score_kind="rating")
    path = csv_file(tmp_path, "user,item,score\n007,01,1\n0,01,1\n")
    manifest = import_scores(tiny, path, "t", provenance=made, unknown="drop")
    text = preferences.report(manifest)
    assert "built_from=includes_label: the teacher may have seen the answers" in text
    assert "scores (rating) by some-llm" in text
    assert "dropped unknown user rows 1" in text
    assert "no usable preference" in text
    assert json.loads((tiny.path / "teacher/t/manifest.json").read_text())["model"] == "some-llm"
