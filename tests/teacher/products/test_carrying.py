"""Yesterday's teacher on today's dataset, and a teacher as a file and back."""

from __future__ import annotations

import csv
import json
import shlex

import numpy as np
import pyarrow as pa
import pytest
from cli import test_teach
from teacher import written_world
from teacher.collect import asked_world

import slgr_jax
from slgr_jax.config import CandidateConfig
from slgr_jax.data import dataset, schema
from slgr_jax.errors import InputError, ManifestError, UserError
from slgr_jax.teacher.ask import candidates, prompts, requests
from slgr_jax.teacher.collect import answer_log, carry_answers, open_requests
from slgr_jax.teacher.products import carry, export, preferences, texts
from slgr_jax.teacher.products.preferences import Provenance

START = 1_500_000_000
USERS, ITEMS = 12, 40


def written(path, rows):
    lines = ["user,item,timestamp", *(f"u{u:02},i{i:02},{t}" for u, i, t in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def days(tmp_path):
    """A dataset, and the one after a day that brings a user and two items."""
    rng = np.random.default_rng(0)
    pairs = [(u, i) for u in range(USERS) for i in rng.permutation(ITEMS)[:10]]
    pairs = [pairs[k] for k in rng.permutation(len(pairs))]
    rows = [(u, i, START + 60 * k) for k, (u, i) in enumerate(pairs)]
    titles = tmp_path / "items.csv"
    names = [f"i{i:02},Film {i}" for i in range(ITEMS + 2)]
    titles.write_text("\n".join(["item,title", *names]) + "\n")
    old = written(tmp_path / "old.csv", rows)
    later = START + 10**6
    new = [(u, (u * 7 + k) % ITEMS, later + 60 * (u + 20 * k)) for u in range(12) for k in range(3)]
    new += [(12, 40, later + 5000), (12, 41, later + 5060), (0, 41, later + 5120)]
    common = {"source": "csv", "items_input": titles}
    slgr_jax.prepare(input=old, out=tmp_path / "day1", **common)
    slgr_jax.prepare(
        input=written(tmp_path / "new.csv", new), out=tmp_path / "day2", append=tmp_path / "day1",
        **common,
    )  # fmt: skip
    return dataset.load(tmp_path / "day1"), dataset.load(tmp_path / "day2")


def all_pairs(data):
    """Every pair that is no training pair: (users, items)."""
    users, items = np.divmod(np.arange(data.n_users * data.n_items), data.n_items)
    fresh = ~data.positives(("train",)).contains(users, items)
    return users[fresh], items[fresh]


def teach(data, name="t", **provenance):
    users, items = all_pairs(data)
    scores = np.where((users + items) % 11 == 0, np.nan, np.sin(users * 50.0 + items))
    columns = [pa.array(x.astype(np.int32)) for x in (users, items)]
    columns.append(pa.array(scores.astype(np.float32), mask=np.isnan(scores)))
    table = pa.table(columns, schema=schema.TEACHER_SCORES)
    return preferences.write_product(data, name, table, provenance=Provenance(**provenance))


def rows_of(data, name="t"):
    return {tuple(row.values()) for row in preferences.stored(data, name)[0].to_pylist()}


def test_rows_stay_and_what_is_training_now_is_dropped(days):
    day1, day2 = days
    teach(day1, model="m", training_items="none", score_kind="prob")
    manifest = carry.carry(day2, day1, "t")
    trained = {*zip(day2.train.users.tolist(), day2.train.items.tolist(), strict=True)}
    before = rows_of(day1)
    kept = {row for row in before if row[:2] not in trained}
    assert rows_of(day2) == kept != before
    assert manifest.counts["dropped_now_training_rows"] == len(before) - len(kept)
    assert manifest.counts["carried_rows"] == manifest.counts["rows"] == len(kept)
    assert manifest.counts["train_pairs"] == 0
    assert (manifest.split_hash, manifest.carried_from) == (
        day2.manifest.split_hash,
        day1.manifest.split_hash,
    )
    assert (manifest.model, manifest.score_kind) == ("m", "prob")
    # Every row still names the same user and item.
    ids = [data.user_ids.to_pylist() for data in days]
    assert all(ids[0][user] == ids[1][user] for user, *_ in kept)


def test_hidden_training_items_and_preferences(days):
    day1, day2 = days
    teach(day1, training_items="hidden")
    assert rows_of(day1) == (carry.carry(day2, day1, "t"), rows_of(day2))[1]

    users, items = all_pairs(day1)
    same = users[1:] == users[:-1]
    columns = [users[1:][same], items[1:][same], items[:-1][same]]
    arrays = [pa.array(column.astype(np.int32)) for column in columns]
    margins = pa.array(np.full(len(columns[0]), 0.5, np.float32))
    table = pa.table([*arrays, margins], schema=schema.TEACHER_PREFERENCES)
    preferences.write_product(day1, "p", table, provenance=Provenance())
    carry.carry(day2, day1, "p")
    trained = {*zip(day2.train.users.tolist(), day2.train.items.tolist(), strict=True)}
    expected = {r for r in rows_of(day1, "p") if not {(r[0], r[1]), (r[0], r[2])} & trained}
    assert rows_of(day2, "p") == expected != rows_of(day1, "p")


def test_lists_say_nothing_of_items_that_were_not_there(days):
    day1, day2 = days
    teach(day1, unlisted="below")
    added = day2.n_items - day1.n_items
    assert added >= 2
    with pytest.raises(InputError, match=f"has {added} items that it could not name: --new_items="):
        carry.carry(day2, day1, "t")
    assert carry.carry(day2, day1, "t", new_items="below").unlisted == "below"
    manifest = carry.carry(day2, day1, "t", new_items="unknown", overwrite=True)
    assert manifest.unlisted == "unknown"


def test_what_the_teacher_saw_must_still_be_training(days, tmp_path):
    day1, day2 = days
    teach(day1)
    # Late rows from before everything push training rows back into the evaluated parts.
    early = [
        (u, (u + k) % ITEMS, START - 10**6 + 60 * (u + 20 * k))
        for u in range(12)
        for k in range(30)
    ]
    slgr_jax.prepare(
        source="csv", input=written(tmp_path / "early.csv", early), append=day1.path,
        out=tmp_path / "back",
    )  # fmt: skip
    back = dataset.load(tmp_path / "back")
    lost = {*zip(day1.train.users.tolist(), day1.train.items.tolist(), strict=True)} - {
        *zip(back.train.users.tolist(), back.train.items.tolist(), strict=True)
    }
    assert lost
    with pytest.raises(ManifestError, match=f"^{len(lost)} of {len(day1.train)} training inter"):
        carry.carry(back, day1, "t")
    with pytest.raises(ManifestError, match="hold the same split"):
        carry.carry(day1, day1, "t")
    with pytest.raises(ManifestError, match="was not made from"):
        carry.carry(day1, day2, "t")
    with pytest.raises(ManifestError, match="has no teacher 'no'"):
        carry.carry(day2, day1, "no")
    teach(day1, "leak", built_from="includes_eval")
    with pytest.raises(ManifestError, match="includes_eval"):
        carry.carry(day2, day1, "leak")


@pytest.fixture
def asked(days):
    """Day 1 with requests, of which all but two are answered and collected."""
    day1, _ = days
    options = CandidateConfig(candidates=9, cold_candidates=0, tail_users=2, calibration_users=0)
    drawn = candidates.draw(day1, prompts.item_lines(day1), options, seed=0)
    candidates.write(day1, "c", drawn, options, seed=0, diversity="popularity")
    root = asked_world.ask(day1)
    lines = asked_world.answered(root)
    asked_world.gather(day1, asked_world.put(root / "results.jsonl", lines[:-2]))
    return lines


def test_paid_answers_stay_usable(days, asked, tmp_path):
    day1, day2 = days
    carry.carry(day2, day1, "t")
    written_to = carry_answers.carry_answers(day2, day1, "t")
    assert written_to == [
        answer_log.log_path(day2.path, "t"),
        requests.directory(day2.path, "t"),
    ]
    assert asked_world.log_rows(day2) == asked_world.log_rows(day1)
    carried = rows_of(day2)
    still_open = open_requests.open_requests(day2, "t")
    assert [request.state for request in still_open] == ["missing", "missing"]

    # Collecting the rest tells what collecting and then carrying would have told.
    more = asked_world.put(tmp_path / "more.jsonl", asked[-2:])
    manifest, _ = asked_world.gather(day2, more)
    asked_world.gather(day1, more)
    assert manifest.counts["complete_requests"] == len(asked)
    assert rows_of(day2) > carried
    assert rows_of(day2) == {
        row for row in rows_of(day1)
        if not day2.positives(("train",)).contains(np.array([row[0]]), np.array([row[1]]))[0]
    }  # fmt: skip
    with pytest.raises(InputError, match="add --overwrite"):
        carry_answers.carry_answers(day2, day1, "t")
    assert carry_answers.carry_answers(day2, day1, "t", overwrite=True) == written_to
    assert asked_world.log_rows(day2) == asked_world.log_rows(day1)


# --- a file and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("kind", ["scores", "ranks", "preferences", "echoes"])
def test_export_and_import_give_the_same_product(days, tmp_path, ending, kind):
    day1, _ = days
    if kind == "scores":
        teach(day1, model="some llm", prompt_hash="x'y", unlisted="below", score_kind="prob")
    else:
        source = tmp_path / "answers.csv"
        u, i = day1.train.users[0], day1.train.items[0]
        known = f"{day1.user_ids[u]},{day1.items['item_id'][int(i)]}"
        texts = {
            "ranks": "user,item,rank\nu00,i01,2\nu00,i02,1\nu01,i03,7\nu01,i04,\n",
            "preferences": "user,preferred,other,margin\nu00,i01,i02,0.1\nu01,i03,i02,1e-20\n",
            "echoes": f"user,item,score\n{known},0.3\nu00,i01,0.7\n",
        }
        source.write_text(texts[kind])
        slgr_jax.import_teacher(day1, source, "t", keep_training_items=True)
    before, table = preferences.stored(day1, "t")[1], rows_of(day1)

    out = tmp_path / f"exported{ending}"
    manifest, exported = export.export(day1, "t", out)
    words = shlex.split(export.command(manifest, exported, out, str(day1.path)))
    assert words[:3] == ["slgr", "teach", "import"]
    given = dict(w[2:].split("=", 1) if "=" in w else (w[2:], True) for w in words[3:])
    after = slgr_jax.import_teacher(given.pop("data"), given.pop("scores"), "again", **{
        key: value for key, value in given.items() if key != "name"
    })  # fmt: skip
    assert rows_of(day1, "again") == table
    same = (
        "kind",
        "built_from",
        "unlisted",
        "training_items",
        "model",
        "prompt_hash",
        "score_kind",
    )
    assert [getattr(after, key) for key in same] == [getattr(before, key) for key in same]
    assert after.files[0].sha256 == before.files[0].sha256
    with pytest.raises(InputError, match="add --overwrite"):
        export.export(day1, "t", out)


def test_an_exported_file_by_hand(days, tmp_path):
    day1, _ = days
    (tmp_path / "a.csv").write_text("user,item,rank\nu01,i03,2\nu01,i04,1\nu00,i02,\nu00,i01,1\n")
    slgr_jax.import_teacher(day1, tmp_path / "a.csv", "t", keep_training_items=True)
    export.export(day1, "t", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["user", "item", "rank"],
            ["u00", "i01", "1"],
            ["u00", "i02", ""],
            ["u01", "i03", "2"],
            ["u01", "i04", "1"],
        ]
    export.export(day1, "t", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"user": "u00", "item": "i02", "rank": None}
    with pytest.raises(UserError, match=r"must end in one of: .csv, .parquet, .jsonl"):
        export.export(day1, "t", tmp_path / "out.xlsx")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"user": 1.5, "item": "i01", "score": 1}', "row 2 has user 1.5; give text or a whole"),
        ('{"user": "u00", "item": true, "score": 1}', "row 2 has item true"),
        ('{"user": "u00", "item": "i02", "score": [1]}', r"row 2 has score \[1\]; give a number"),
        ('{"user": "u00", "item": "i02", "score": NaN}', "finite"),
        ('{"item": "i02", "score": 1}', "row 2 has no user id"),
        ("[1, 2]", "row 2 is no JSON object"),
        ('{"user": ', "row 2 is not JSON"),
    ],
)
def test_json_lines_that_cannot_be_read(days, tmp_path, line, words):
    day1, _ = days
    path = tmp_path / "bad.jsonl"
    path.write_text('{"user": "u00", "item": "i01", "score": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=words):
        slgr_jax.import_teacher(day1, path, "t", keep_training_items=True)


def test_texts_are_carried_and_who_is_new_has_none(days, tmp_path):
    day1, day2 = days
    for name, prompt in (("p", "user_profile"), ("f", "kar_item")):
        root = written_world.ask(day1, name, prompt=prompt, factors="a,b" if name == "f" else "")
        answers = written_world.put(tmp_path / "a.jsonl", written_world.answered(root))
        before, _ = written_world.gather(day1, answers, name=name)
        after = texts.carry(day2, day1, name)
        carry_answers.carry_answers(day2, day1, name)
        assert written_world.held(after) == written_world.held(before)
        assert after.table.equals(before.table)
        assert texts.load(day2, name).manifest == after.manifest
        rows = {"p": USERS + 1, "f": ITEMS + 2}[name]
        assert after.manifest.counts == before.manifest.counts | {"rows": rows}
        assert after.manifest.split_hash == day2.manifest.split_hash
        # The answers go on where they were.
        again, told = written_world.gather(day2, answers, name=name)
        assert "0 accepted" in told
        assert again.table.equals(after.table)
    with pytest.raises(ManifestError, match="was not made from"):
        texts.carry(day1, day2, "p")


def test_the_command_carries_texts_with_their_answers_and_requests(days, tmp_path):
    day1, day2 = days
    root = written_world.ask(day1, "p")
    written_world.gather(
        day1, written_world.put(tmp_path / "a.jsonl", written_world.answered(root)), name="p"
    )
    told = test_teach.teach("carry", f"--data={day2.path}", f"--from={day1.path}", "--name=p")
    assert told.returncode == 0, told.stderr
    assert f"texts p: {USERS} of {USERS} of {USERS + 1} users by fake" in told.stdout
    for kind in ("answers", "requests"):
        assert f"carried: {day2.path / kind / 'p'}" in told.stdout
