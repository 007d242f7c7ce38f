"""Products of edits: files, what they name, refusals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax import api
from slgr_jax.data import edit_schema, schema
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.reports import inspection
from slgr_jax.teacher.products import edits

# Of conftest's TRAIN: user 007 (0) has items 01, 1, " x" (0, 1, 2), ann lee (2) 01, café, 10.
ROWS = "user,item,noise,replacement\n007,1,0.9,café\nann lee,10,0.25,\n007,01,0.5,10\n"


def _file(tmp_path, text, name="noise.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def _said(dataset, name="n"):
    """{(user, item): (noise, replacement)} by index."""
    held = edits.load(dataset, name)
    keys = zip(dataset.train.users[held.rows], dataset.train.items[held.rows], strict=True)
    values = zip(held.noise.tolist(), held.replacements.tolist(), strict=True)
    return {(int(u), int(i)): value for (u, i), value in zip(keys, values, strict=True)}


def test_a_file_becomes_a_product_of_training_interactions(tiny, tmp_path):
    manifest = api.import_edits(tiny, _file(tmp_path, ROWS), "n", model="m")
    assert _said(tiny) == {(0, 0): (0.5, 4), (0, 1): (pytest.approx(0.9), 3), (2, 4): (0.25, -1)}
    assert (manifest.model, manifest.built_from) == ("m", "train_only")
    assert {k: manifest.counts[k] for k in ("rows", "users", "replacements")} == {
        "rows": 3,
        "users": 2,
        "replacements": 2,
    }
    report = edits.report(edits.load(tiny, "n"))
    assert "3 training interactions of 2 users, 2 with a replacement" in report
    assert not inspection.inspect_data(str(tiny.path)).faults


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_positions_name_interactions_too(tiny, tmp_path, form):
    rows = {"who": ["007", "ann lee", "007"], "position": [2, 1, 2], "noise": [0.75, 1.0, 0.75]}
    path = tmp_path / f"noise.{form}"
    if form == "parquet":
        pq.write_table(pa.table(rows), path)
    elif form == "csv":
        lines = [",".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(["who,position,noise", *lines]), encoding="utf-8")
    else:
        lines = [
            json.dumps(dict(zip(rows, row, strict=True)))
            for row in zip(*rows.values(), strict=True)
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
    manifest = api.import_edits(tiny, path, "n", user_column="who")
    assert _said(tiny) == {(0, 2): (0.75, -1), (2, 3): (1.0, -1)}
    assert manifest.counts["merged_rows"] == 1


def test_an_item_names_every_interaction_with_it(make_dataset, tmp_path):
    data = make_dataset(train={0: [1, 1, 2], 1: [0]})
    api.import_edits(data, _file(tmp_path, "user,item,noise\n007,1,0.5\n"), "n")
    assert edits.load(data, "n").rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user,item,noise\n007,1,1.5\n", "row 1 has no noise between 0 and 1"),
        ("user,item,noise\n007,1,\n", "row 1 has no noise between 0 and 1"),
        ("user,item,noise\n007,1,much\n", "'much', not a number"),
        ("user,item,noise\nnobody,1,1\n", "ids that .* does not have: 1 user"),
        ("user,item,noise,replacement\n007,1,1,no\n", "does not have: 1 item .'no'"),
        ("user,item,noise\n007,1,1\n007,café,1\n", "row 2 names no training interaction .1 of 2"),
        ("user,position,noise\n007,3,1\n007,0,1\n", "row 1 names no training interaction"),
        ("user,position,noise\n007,-1,1\n", "row 1 has no position"),
        ("user,position,noise\n007,0.5,1\n", "row 1 has no position"),
        ("user,item,position,noise\n007,1,0,1\n", "row 1 says item '1', and training has '01'"),
        ("user,item,noise,replacement\n007,1,1,1\n", "row 1 replaces an item by itself"),
        ("user,item,noise\n007,1,1\n7,1,1\n007,1,0.5\n", "rows 1 and 3 say two things"),
        ("user,noise\n007,1\n", "expected user, item or position"),
        ("user;item;noise\n007;1;1\n", "add --delimiter=';'"),
        ("user,item,noise\n", "no rows"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tiny, tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        api.import_edits(tiny, _file(tmp_path, text), "n")
    assert not (tiny.path / edit_schema.EDITS_DIR / "n").exists()


def test_what_is_unknown_can_be_dropped_and_is_counted(tiny, tmp_path):
    text = "user,item,noise\nnobody,1,1\n007,no,1\n007,café,1\n007,1,1\n"
    manifest = api.import_edits(tiny, _file(tmp_path, text), "n", unknown="drop")
    assert _said(tiny) == {(0, 1): (1.0, -1)}
    dropped = {k: v for k, v in manifest.counts.items() if k.startswith("dropped_")}
    assert dropped == {
        "dropped_unknown_user_rows": 1,
        "dropped_unknown_item_rows": 1,
        "dropped_rows_outside_training": 1,
    }
    path = _file(tmp_path, "user,item,noise\n007,café,1\n")
    with pytest.raises(InputError, match="none of the 1 rows names a training interaction"):
        api.import_edits(tiny, path, "other", unknown="drop")


@pytest.mark.parametrize("knob", [{"unlisted": "below"}, {"items_as": "titles"}, {"append": True}])
def test_knobs_of_scores_are_refused(tiny, tmp_path, knob):
    with pytest.raises(ConfigError, match=f"--{next(iter(knob))}=.* says nothing of what --edits"):
        api.import_edits(tiny, _file(tmp_path, ROWS), "n", **knob)


def test_products_that_do_not_fit_are_refused(tiny, make_dataset, tmp_path):
    path = _file(tmp_path, ROWS)
    with pytest.raises(
        ManifestError, match=r"has no edits 'n'; it has: .none.; make them with slgr"
    ):
        edits.load(tiny, "n")
    api.import_edits(tiny, path, "n")
    other = make_dataset("other", test={0: [5]})
    (tiny.path / "edits").rename(other.path / "edits")
    with pytest.raises(ManifestError, match=r"made for split .* make them again"):
        edits.load(other, "n")
    for seen, said in (
        ("includes_eval", "says built_from=includes_eval"),
        ("includes_valid", "was made of training and validation"),
    ):
        with pytest.raises(ManifestError, match=said):
            api.import_edits(tiny, path, "leaked", built_from=seen)
        assert not (tiny.path / "edits" / "leaked").exists()
        # Nor is one read that says so.
        api.import_edits(tiny, path, "n", overwrite=True)
        stated = dataclasses.replace(edits.read_manifest(tiny, "n"), built_from=seen)
        schema.write_manifest(tiny.path / "edits" / "n", stated)
        with pytest.raises(ManifestError, match=said):
            edits.load(tiny, "n")


def test_another_order_of_the_same_split_is_refused(make_dataset, tmp_path):
    """Times are no part of a split's hash, and say which interaction a position is."""
    train = {0: [0, 1, 2], 1: [0, 1]}
    data = make_dataset(train=train)
    api.import_edits(data, _file(tmp_path, "user,position,noise\n007,0,1\n"), "n")
    turned = make_dataset("turned", train=train | {0: [2, 1, 0]})
    (data.path / "edits").rename(turned.path / "edits")
    with pytest.raises(ShardError, match="user 0 has no training interaction with item 0 at pos"):
        edits.load(turned, "n")


def test_the_likeliest_noise_of_each_user_is_chosen():
    noise = np.array([0.7, 0.9, 0.7, 0.2, 0.6, 0.95])
    users = np.array([0, 0, 0, 1, 1, 2])
    held = edits.Edits(None, np.arange(6), noise, np.full(6, -1))
    for most, above, places in (
        (2, 0.6, [0, 1, 5]),  # of equals the older; 0.6 is not above 0.6
        (1, 0.1, [1, 4, 5]),
        (0, 0.6, [0, 1, 2, 5]),
        (2, 0.95, []),
    ):
        assert edits.chosen(held, users, above=above, most=most).tolist() == places
