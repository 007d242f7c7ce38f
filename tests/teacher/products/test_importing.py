"""Import: a user's own training items, ranks, and titles where ids are expected."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax import api
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.preferences import Provenance

# Of conftest's TRAIN: user 007 (0) has items 01, 1 and " x" (0, 1, 2); user 7 (1) has 01 and 1.
ECHOES = "user,item,score\n007,01,0.9\n007,café,0.5\n007,10,0.25\n7,1,0.5\n7,电影,\n7,10,1\n"


def csv_file(tmp_path, text):
    path = tmp_path / "answers.csv"
    path.write_text(text, encoding="utf-8")
    return path


def answers(teacher):
    """(user, item) -> score, by index."""
    return {
        (user, int(teacher.items[row])): float(teacher.scores[row])
        for user in range(teacher.offsets.size - 1)
        for row in range(teacher.offsets[user], teacher.offsets[user + 1])
    }


def test_a_users_own_training_items_are_dropped_and_counted(tiny, tmp_path):
    path = csv_file(tmp_path, ECHOES)
    manifest = preferences.import_scores(tiny, path, "t")
    assert answers(preferences.load(tiny, "t")) == {(0, 3): 0.5, (0, 4): 0.25, (1, 4): 1.0}
    assert manifest.counts["dropped_training_item_rows"] == 2
    assert manifest.counts["train_pairs"] == 0
    assert manifest.counts["unanswered"] == 1  # an empty score is no echo
    assert "2 answers of 2 users on their own training items were dropped" in preferences.report(
        manifest
    )
    kept = preferences.import_scores(tiny, path, "kept", keep_training_items=True)
    assert answers(preferences.load(tiny, "kept"))[0, 0] == pytest.approx(0.9)
    assert (kept.counts["answered"], kept.counts["train_pairs"]) == (5, 2)
    assert "own training items" not in preferences.report(kept)


def test_hidden_training_items_test_the_teacher_and_stay(tiny, tmp_path):
    hidden = Provenance(training_items="hidden")
    manifest = preferences.import_scores(tiny, csv_file(tmp_path, ECHOES), "t", provenance=hidden)
    assert manifest.counts["train_pairs"] == 2
    more = csv_file(tmp_path, "user,item,score\nu,5,1,1\n".replace("u,5", '"u,5"'))
    again = preferences.import_scores(tiny, more, "t", to_existing=True)
    assert again.counts["train_pairs"] == 3  # what the product says, holds for what is added


def test_training_items_are_dropped_from_what_is_appended_too(tiny, tmp_path):
    preferences.import_scores(tiny, csv_file(tmp_path, ECHOES), "t")
    more = csv_file(tmp_path, "user,item,score\nann lee,01,1\nann lee,1,0.5\nΩμέγα,01,3\n")
    manifest = preferences.import_scores(tiny, more, "t", to_existing=True)
    assert manifest.counts["dropped_training_item_rows"] == 2 + 1  # ann lee (2) has 01
    assert answers(preferences.load(tiny, "t"))[3, 0] == 3


def test_preferences_that_name_a_training_item_are_dropped(tiny, tmp_path):
    rows = "user,preferred,other\n007,01,café\n007,café,1\n007,café,电影\nΩμέγα,01,1\n"
    manifest = preferences.import_scores(tiny, csv_file(tmp_path, rows), "t")
    teacher = preferences.load(tiny, "t")
    assert [teacher.users.tolist(), teacher.preferred.tolist(), teacher.other.tolist()] == [
        [0, 3],
        [3, 0],
        [5, 1],
    ]
    assert manifest.counts["dropped_training_item_rows"] == 2


def test_a_teacher_of_training_items_only_is_refused(tiny, tmp_path):
    path = csv_file(tmp_path, "user,item,score\n007,01,1\n7,1,0\n7,电影,\n")
    words = r"all 2 answers are on training items .*'007' first.*--training_items=hidden"
    with pytest.raises(InputError, match=words):
        preferences.import_scores(tiny, path, "t")
    assert preferences.products(tiny.path) == []


@pytest.mark.parametrize(
    ("header", "kind"), [("rank", "score"), ("rank", "rank"), ("score", "rank")]
)
def test_ranks_are_turned_so_that_one_is_the_best(tiny, tmp_path, header, kind):
    rows = f"user,item,{header}\n007,café,1\n007,10,2\n007,电影,\nΩμέγα,01,7\nΩμέγα,1,3\n"
    provenance = Provenance(score_kind=kind)
    manifest = preferences.import_scores(tiny, csv_file(tmp_path, rows), "t", provenance=provenance)
    assert manifest.score_kind == "rank"
    scores = answers(preferences.load(tiny, "t"))
    assert scores == {(0, 3): -1, (0, 4): -2, (3, 0): -7, (3, 1): -3}


def test_a_score_beside_a_rank_is_the_score_unless_ranks_are_meant(tiny, tmp_path):
    path = tmp_path / "answers.parquet"
    columns = {"user": ["007", "007"], "item": ["café", "10"], "score": [0.9, 0.1], "rank": [2, 1]}
    pq.write_table(pa.table(columns), path)
    preferences.import_scores(tiny, path, "scores")
    assert answers(preferences.load(tiny, "scores"))[0, 3] == pytest.approx(0.9)
    preferences.import_scores(tiny, path, "ranks", provenance=Provenance(score_kind="rank"))
    assert answers(preferences.load(tiny, "ranks")) == {(0, 3): -2, (0, 4): -1}


def test_ranks_below_zero_are_no_ranks(tiny, tmp_path):
    path = csv_file(tmp_path, "user,item,rank\n007,café,1\n007,10,-2\n")
    with pytest.raises(InputError, match=r"row 2 has rank -2; ranks count up from 1"):
        preferences.import_scores(tiny, path, "t")


@pytest.mark.parametrize("unknown", ["error", "drop"])
def test_titles_in_place_of_ids_get_a_hint(make_dataset, tmp_path, unknown):
    titles = ["Alien", "Heat (1995)", None, "The  Net", "Se7en", "Amélie"]
    data = make_dataset(titles=titles)
    path = csv_file(tmp_path, "user,item,score\n007,the net,1\n007,Amélie,0.5\n")
    with pytest.raises(
        InputError,
        match=r"2 of these are titles \('the net' is item 'café'\): add "
        r"--items_as=titles",
    ):
        preferences.import_scores(data, path, "t", unknown=unknown)
    neither = csv_file(tmp_path, "user,item,score\n007,Nothing,1\n")
    with pytest.raises(InputError, match=r"correct the file|external ids, not indices"):
        preferences.import_scores(data, neither, "t", unknown=unknown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user;item;score\n007;01;0.5\n", r"first line holds ';': add --delimiter=';'"),
        ("user\titem\tscore\n007\t01\t0.5\n", re.escape(r"add --delimiter='\t'")),
    ],
)
def test_another_delimiter_is_named(tiny, tmp_path, text, words):
    path = tmp_path / "llm.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=words):
        preferences.import_scores(tiny, path, "t")


def test_utf_16_is_refused_with_the_way_out(tiny, tmp_path):
    path = tmp_path / "llm.csv"
    path.write_bytes("user,item,score\n007,01,0.5\n".encode("utf-16"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        preferences.import_scores(tiny, path, "t")


THEIRS = {"user_id": "user", "movie_id": "item", "simulated": "score"}


@pytest.mark.parametrize("form", ["csv", "json lines", "parquet"])
def test_columns_may_be_called_otherwise(tiny, tmp_path, form):
    """What other columns have our names gives way."""
    rows = [("007", "café", 4.0, 1.0), ("7", "10", 2.5, 5.0)]
    columns = dict(zip(("user_id", "movie_id", "simulated", "score"), zip(*rows, strict=True),
                       strict=True))  # fmt: skip
    path = tmp_path / "theirs"
    if form == "parquet":
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    elif form == "csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    preferences.import_scores(tiny, path, "t", names=THEIRS)
    assert answers(preferences.load(tiny, "t")) == {(0, 3): 4.0, (1, 4): 2.5}


def test_a_column_that_is_not_there_is_named(tiny, tmp_path):
    path = csv_file(tmp_path, "user_id,item,score\n007,café,1\n")
    words = "has no column 'movie_id', which --item_column names; columns found: user_id, item"
    with pytest.raises(InputError, match=words):
        preferences.import_scores(tiny, path, "t", names={"user_id": "user", "movie_id": "item"})
    with pytest.raises(ConfigError, match="must be three columns"):
        api.import_teacher(tiny, path, "t", user_column="a", item_column="a")
    manifest = api.import_teacher(tiny, path, "t", user_column="user_id")
    assert manifest.counts["answered"] == 1
