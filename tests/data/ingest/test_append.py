"""`prepare --append`: indices, the split recomputed, every row accounted for, nothing half."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import slgr_jax
from slgr_jax.data import dataset, lineage, schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest import split
from slgr_jax.errors import ConfigError, InputError

START = 1_500_000_000
HEADER = "user,item,timestamp,rating"
Row = tuple[str, str, int, int]


def write_csv(path: pathlib.Path, rows: list[Any], header: str = HEADER) -> pathlib.Path:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def log(seed: int, n: int, first: int, *, users: int = 9, items: int = 12) -> list[Row]:
    """n rows, one a minute, pairs at random: some of them repeat."""
    rng = np.random.default_rng(seed)
    return [
        (f"u{rng.integers(users)}", f"i{rng.integers(items):02}", first + 60 * k, 1 + k % 5)
        for k in range(n)
    ]


OLD = log(0, 80, START)
# Users and items before, among and behind those that were there, in the order of their ids.
NEW = [
    *log(1, 30, START + 10_000),
    ("a", "i05", START + 20_000, 5),
    ("u1", "a_new", START + 20_001, 5),
    ("zz", "i03x", START + 20_002, 4),
]


def prepared(tmp: pathlib.Path, name: str, rows: list[Any], **knobs: Any) -> Dataset:
    header = knobs.pop("header", HEADER)
    source = write_csv(tmp / f"{name}.csv", rows, header)
    slgr_jax.prepare(source="csv", input=source, out=tmp / name, **knobs)
    return dataset.load(tmp / name)


def pair(tmp: pathlib.Path, old: list[Any], new: list[Any], **knobs: Any) -> tuple[Dataset, ...]:
    """The parent, the child, and a dataset of all rows at once."""
    header = knobs.pop("header", HEADER)
    parent = prepared(tmp, "old", old, header=header, **knobs)
    child = prepared(tmp, "new", new, header=header, append=parent.path)
    return parent, child, prepared(tmp, "both", [*old, *new], header=header, **knobs)


def external(data: Dataset, part: str) -> list[tuple[object, ...]]:
    """(user id, item id, microseconds, rating) of a part, sorted."""
    users, items = data.user_ids.to_pylist(), data.items["item_id"].to_pylist()
    rows = data.part(part)
    n = len(rows)
    times = [0] * n if rows.timestamps is None else rows.timestamps.tolist()
    ratings = [0] * n if rows.ratings is None else rows.ratings.tolist()
    ids = [(users[u], items[i]) for u, i in zip(rows.users, rows.items, strict=True)]
    return sorted((*x, t, r) for x, t, r in zip(ids, times, ratings, strict=True))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"split": "leave_last", "keep": "last"},
        {"keep": "highest", "min_rating": 2.0, "valid_fraction": 0.2, "test_fraction": 0.3},
        {"user_core": 2, "item_core": 2},
    ],
    ids=["global_time", "leave_last", "filters", "k_core"],
)
def test_split_is_that_of_all_rows_at_once(tmp_path, knobs):
    parent, child, both = pair(tmp_path, OLD, NEW, **knobs)
    if "user_core" in knobs:
        # The worlds agree where the parent's own core dropped nothing that is in the larger one.
        assert parent.manifest.filters["outside_k_core"] == 0
    for part in schema.PARTS:
        assert external(child, part) == external(both, part)

    n_users, n_items = parent.n_users, parent.n_items
    assert child.user_ids[:n_users].equals(parent.user_ids)
    assert child.items["item_id"][:n_items].equals(parent.items["item_id"])
    assert child.user_ids[n_users:].to_pylist() == sorted(child.user_ids[n_users:].to_pylist())
    new_items = {i for _, i, _, _ in NEW} - set(parent.items["item_id"].to_pylist())
    if not knobs:
        assert child.user_ids[n_users:].to_pylist() == ["a", "zz"]
        assert child.items["item_id"][n_items:].to_pylist() == sorted(new_items)


def test_yesterdays_test_becomes_training_and_every_row_is_accounted_for(tmp_path):
    parent, child, both = pair(tmp_path, OLD, NEW)
    assert set(external(child, "train")) & set(external(parent, "test"))
    (entry,) = child.manifest.parents
    assert (entry["split_hash"], entry["id_map_hash"]) == (
        parent.manifest.split_hash,
        parent.manifest.id_map_hash,
    )
    assert entry["counts"] == parent.manifest.counts
    moved = {}
    for a in schema.PARTS:
        for b in schema.PARTS:
            both_parts = {r[:2] for r in external(parent, a)} & {r[:2] for r in external(child, b)}
            if a != b and both_parts:
                moved[f"{a} to {b}"] = len(both_parts)
    assert entry["moved"] == moved
    assert not lineage.moved_backward(child.manifest.parents)

    filters = child.manifest.filters
    rows = sum(child.manifest.counts[part] for part in schema.PARTS)
    assert filters["rows_read"] == len(NEW)
    dropped = filters["already_there"] + filters["duplicates"]
    assert filters["parent_rows"] + filters["rows_read"] - dropped == rows
    old_pairs = {row[:2] for row in OLD}
    assert filters["already_there"] == sum(row[:2] in old_pairs for row in NEW) > 0
    assert filters["replaced_parent_rows"] == 0
    (line,) = child.manifest.source["lines"]
    assert line["lines"] == line["header"] + line["rows"] == len(NEW) + 1
    assert both.manifest.parents == ()


def test_newer_rows_replace_the_parents_where_its_rule_says_so(tmp_path):
    _, child, _ = pair(tmp_path, OLD, NEW, keep="last")
    old_pairs = {row[:2] for row in OLD}
    new_pairs = {row[:2] for row in NEW}
    assert child.manifest.filters["replaced_parent_rows"] == len(old_pairs & new_pairs) > 0


def test_counts_of_repeats_are_added_up(tmp_path):
    old, new = ([row[:3] for row in rows] for rows in (OLD, NEW))
    _, child, both = pair(tmp_path, old, new, count_repeats=True, header="user,item,timestamp")
    for part in schema.PARTS:
        assert external(child, part) == external(both, part)
    assert child.manifest.filters["most_repeats"] == both.manifest.filters["most_repeats"] > 1
    with pytest.raises(InputError, match="add --rating_column="):
        prepared(tmp_path, "rated", NEW, append=child.path)


@pytest.mark.parametrize("by", ["all", "user"])
def test_ratio_keeps_parts_and_draws_the_new_rows(tmp_path, by):
    distinct = [(f"u{k % 10}", f"i{k // 10}") for k in range(400)]
    old, new = distinct[:200], distinct[200:]
    parent, child, _ = pair(
        tmp_path, old, new, split="ratio", ratio_by=by, valid_fraction=0.1, test_fraction=0.2,
        header="user,item",
    )  # fmt: skip
    for part in schema.PARTS:
        assert set(external(parent, part)) <= set(external(child, part))
    assert child.manifest.counts["test"] == 80
    assert child.manifest.counts["valid"] == 40
    if by == "user":
        assert np.bincount(child.test.users).tolist() == [8] * 10
        assert np.bincount(child.valid.users).tolist() == [4] * 10
    assert not child.manifest.parents[0]["moved"]


def test_drawn_rows_by_hand():
    """Ten rows there (1 valid, 1 test), ten new: one more of each is missing; never more."""
    parts = np.array([0] * 8 + [1, 2] + [split.NEW] * 10, np.int8)
    out = split.more_by_ratio(parts, 0.1, 0.1, (0, 1))
    assert out[:10].tolist() == parts[:10].tolist()
    assert np.bincount(out[10:], minlength=3).tolist() == [8, 1, 1]
    assert (out != split.more_by_ratio(parts, 0.1, 0.1, (0, 2))).any()
    few = np.array([0] * 8 + [2, 2, split.NEW], np.int8)
    assert split.more_by_ratio(few, 0.1, 0.1, (0, 1))[-1] == 1

    # A user's only rows stay in training; who has no test row yet gets the one that is missing.
    users = np.array([0] * 9 + [1] + [0, 2, 2], np.int32)
    parts = np.array([0] * 10 + [split.NEW] * 3, np.int8)
    out = split.more_by_user_ratio(users, parts, 0.1, 0.1, (0, 1))
    assert out[10] == 2
    assert out[11:].tolist() == [0, 0]


def test_three_days_and_a_backfill(tmp_path):
    """The line goes back to the first day; late rows may push training rows back into test."""
    day1 = prepared(tmp_path, "d1", OLD)
    day2 = prepared(tmp_path, "d2", log(2, 20, START + 50_000), append=day1.path)
    early = log(3, 90, START - 100_000, items=40)
    day3 = prepared(tmp_path, "d3", early, append=day2.path)
    assert len(day3.manifest.parents) == 2
    hashes = {"split_hash": day1.manifest.split_hash, "id_map_hash": day1.manifest.id_map_hash}
    line = lineage.line_from(day3.manifest, hashes)
    assert line is not None
    assert len(line) == 2
    assert lineage.line_from(day1.manifest, hashes) == ()
    assert lineage.line_from(day1.manifest, {**hashes, "split_hash": "x"}) is None
    assert sum(lineage.moved_backward(line).values()) == len(
        {r[:2] for r in external(day2, "train")}
        & {r[:2] for p in ("valid", "test") for r in external(day3, p)}
    ) + len({r[:2] for r in external(day2, "valid")} & {r[:2] for r in external(day3, "test")})


def test_texts_newer_hold_and_categories_stay(tmp_path):
    tables = {
        "items.csv": ["i00,Old name,a|b", "i01,,", "i02,Same,c"],
        "catalogue.csv": ["i00,New name,b|z", "i01,Now named,y", "i02,Same,c", "fresh,Fresh,q|a"],
    }
    for name, rows in tables.items():
        (tmp_path / name).write_text("item,title,categories\n" + "\n".join(rows) + "\n")
    parent = prepared(tmp_path, "old", OLD, items_input=tmp_path / "items.csv")
    new = [*NEW, ("u1", "fresh", START + 30_000, 3)]
    child = prepared(
        tmp_path, "new", new, append=parent.path, items_input=tmp_path / "catalogue.csv"
    )
    rows = {row["item_id"]: row for row in child.items.to_pylist()}
    assert [rows[i]["title"] for i in ("i00", "i01", "i02", "fresh")] == [
        "New name", "Now named", "Same", "Fresh",
    ]  # fmt: skip
    assert rows["i00"]["categories"] == ["a", "b"]
    assert not rows["i01"]["categories"]
    assert rows["fresh"]["categories"] == ["q", "a"]
    assert child.manifest.source["texts_changed"] == {"title": 1, "categories": 2}
    without = prepared(tmp_path, "without", NEW, append=parent.path)
    assert without.items.slice(0, parent.n_items).equals(parent.items)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"keep": "last"}, "--keep=last contradicts .* prepared with --keep=first; drop it"),
        ({"split": "ratio"}, "prepared with --split=global_time"),
        ({"valid_fraction": 0.2}, "--valid_fraction=0.2 contradicts .*=0.1"),
        ({"user_core": 2}, "--user_core=2 contradicts .*=1"),
        ({"test_input": "x.csv"}, "--test_input is a pre-made split"),
        ({"source": "s3rec"}, "places in a line"),
        ({"out": "old"}, "choose another --out"),
        ({"out": "old/teacher/x"}, "choose another --out"),
        ({"time_column": ""}, "has times and .* has none"),
        ({"append": "nowhere"}, "not a directory"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, knobs, words):
    prepared(tmp_path, "old", OLD)
    write_csv(tmp_path / "new.csv", NEW)
    monkeypatch.chdir(tmp_path)
    places = {"source": "csv", "input": "new.csv", "out": "new", "append": "old"}
    with pytest.raises(slgr_jax.errors.UserError, match=words):
        slgr_jax.prepare(**{**places, **knobs})
    assert not (tmp_path / "new").exists()


def test_premade_and_ordinal_parents_are_refused(tmp_path):
    test = write_csv(tmp_path / "test.csv", [("u0", "x", START, 1)])
    premade = prepared(tmp_path, "premade", OLD, test_input=test)
    with pytest.raises(ConfigError, match="pre-made split"):
        prepared(tmp_path, "more", NEW, append=premade.path)
    placed = prepared(tmp_path, "placed", [(u, i, t - START, r) for u, i, t, r in OLD])
    with pytest.raises(InputError, match="do not compare with moments"):
        prepared(tmp_path, "more", NEW, append=placed.path)


# The process ends as by a kill once the first part is on disk.
KILLED = """
import os, sys
import slgr_jax
from slgr_jax.data import shards
write = shards.write_shard
def killed(root, relative, *args, **knobs):
    written = write(root, relative, *args, **knobs)
    if relative.startswith("train"):
        os._exit(9)
    return written
shards.write_shard = killed
slgr_jax.prepare(source="csv", input=sys.argv[1], out=sys.argv[3], append=sys.argv[2])
"""


def test_a_kill_leaves_nothing_half(tmp_path):
    parent = prepared(tmp_path, "old", OLD)
    before = {path: path.read_bytes() for path in parent.path.rglob("*") if path.is_file()}
    new = write_csv(tmp_path / "new.csv", NEW)
    command = [sys.executable, "-c", KILLED, str(new), str(parent.path), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in before} == before
    child = prepared(tmp_path, "out", NEW, append=parent.path)
    assert json.loads((child.path / "manifest.json").read_text())["parents"]


def users_table(path: pathlib.Path, rows: list[tuple[str, str, str]]) -> pathlib.Path:
    return write_csv(path, rows, "user,age,gender")


OLD_USERS = [(f"u{u}", str(20 + u), "fm"[u % 2]) for u in range(9)]


def test_features_stay_and_users_without_a_table_have_none(tmp_path):
    table = users_table(tmp_path / "users.csv", OLD_USERS)
    knobs = {"users_input": table, "user_features": "age:numeric,gender"}
    parent = prepared(tmp_path, "old", OLD, **knobs)
    child = prepared(tmp_path, "new", NEW, append=parent.path)
    assert [feature.name for feature in child.features] == ["age", "gender"]
    for before, after in zip(parent.features, child.features, strict=True):
        old_rows = len(before.column)
        assert len(after.column) == child.n_users > old_rows
        assert after.column.slice(0, old_rows).to_pylist() == before.column.to_pylist()
        assert after.column.slice(old_rows).null_count == child.n_users - old_rows
        assert (after.values, after.mean, after.deviation) == (
            before.values, before.mean, before.deviation,
        )  # fmt: skip


def test_new_users_get_their_features_by_the_parents_codes(tmp_path):
    """Codes, means and deviations are the parent's; a new value comes behind; what is new holds."""
    table = users_table(tmp_path / "users.csv", OLD_USERS)
    knobs = {"users_input": table, "user_features": "age:numeric,gender"}
    parent = prepared(tmp_path, "old", OLD, **knobs)
    more = users_table(
        tmp_path / "more.csv",
        [("a", "70", "d"), ("zz", "", "m"), ("u1", "33", ""), ("u2", "", "d"), ("u3", "23", "m")],
    )
    rows = [*NEW, *[(user, f"i{k:02}", START + 9_000 + k, 3) for k, user in enumerate(("a", "zz"))]]
    child = prepared(tmp_path, "new", rows, append=parent.path, users_input=more)
    age, gender = child.features
    assert (age.mean, age.deviation) == (parent.features[0].mean, parent.features[0].deviation)
    assert gender.values == ("f", "m", "d")  # in code order: d, before f in the alphabet, is last
    stated = {user: (float(old), sex) for user, old, sex in OLD_USERS}
    stated |= {"a": (70.0, "d"), "zz": (None, "m"), "u1": (33.0, "m"), "u2": (22.0, "d")}
    ids = child.user_ids.to_pylist()
    assert age.column.to_pylist() == [stated[user][0] for user in ids]
    assert [gender.values[code] for code in gender.column.to_pylist()] == [
        stated[user][1] for user in ids
    ]
    changed = child.manifest.source["texts_changed"]
    assert (changed["user feature age"], changed["user feature gender"]) == (1, 1)
    assert (
        json.loads((child.path / "manifest.json").read_text())["features"]["user"][1]["values"] == 3
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"user_features": "shoe"}, "has no user feature shoe .it has age, gender."),
        ({"user_features": "gender:multi"}, "say gender:categorical, or prepare all rows anew"),
        ({"item_features": "price"}, "has no item feature price"),
    ],
)
def test_features_that_the_parent_has_not_are_refused(tmp_path, knobs, message):
    table = users_table(tmp_path / "users.csv", OLD_USERS)
    parent = prepared(
        tmp_path, "old", OLD, users_input=table, user_features="age:numeric,gender"
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, "new", NEW, append=parent.path, users_input=table, **knobs)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("split", ["global_time", "ratio"])
def test_rows_keep_and_get_their_own_features(tmp_path, split):
    """Each row of the child says what its line says, by plain loops; codes are the parent's."""
    header = f"{HEADER},device"

    def on(rows: list[Row], devices: str) -> list[Any]:
        return [(*row, devices[k % len(devices)]) for k, row in enumerate(rows)]

    old, new = on(OLD, "mt"), on(NEW, "tam")
    parent = prepared(
        tmp_path, "old", old, header=header, split=split, interaction_features="device"
    )
    child = prepared(tmp_path, "new", new, header=header, append=parent.path)
    (before,), (after,) = parent.features, child.features
    assert before.values == ("m", "t")
    # Where the new rows are the latest they are evaluated: what they alone say is never learned.
    assert after.values == (("m", "t", "a") if split == "ratio" else ("m", "t"))
    line: dict[tuple[str, str], str] = {}
    for user, item, *_, device in [*old, *new]:
        line.setdefault((user, item), device)
    users, items = child.user_ids.to_pylist(), child.items["item_id"].to_pylist()
    pairs = [
        (users[u], items[i])
        for part in schema.PARTS
        for u, i in zip(child.part(part).users, child.part(part).items, strict=True)
    ]
    expected = [line[p] if line[p] in after.values else None for p in pairs]
    codes = after.column.to_pylist()
    assert [None if code is None else after.values[code] for code in codes] == expected
    none = prepared(
        tmp_path, "none", new, header=header, append=parent.path, interaction_features="none"
    )
    assert none.features[0].missing == len(pairs) - len(before.column)
