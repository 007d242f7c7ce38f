"""Products of pseudo-interactions: files, lists, nearest users, refusals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax import api
from slgr_jax.config import DeriveConfig, EmbedConfig, NearestConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.local import embeddings, nearest_users
from slgr_jax.teacher.products import preferences, pseudo_interactions

# Of conftest's TRAIN: user 007 (0) has items 01, 1 and " x" (0, 1, 2).
ROWS = "user,item,weight\n007,01,0.9\n007,café,0.5\n7,电影,1\n7,10,0.25\n"


def _file(tmp_path, text, name="taken.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def _rows(dataset, name):
    """{(user, item): weight} by index."""
    teacher = preferences.load(dataset, name)
    users = np.repeat(np.arange(dataset.n_users), np.diff(teacher.offsets))
    keys = zip(users.tolist(), teacher.items.tolist(), strict=True)
    return dict(zip(keys, teacher.scores.tolist(), strict=True))


# ------------------------------------------------------------------------------------------ files


def test_a_file_becomes_a_product_without_training_items(tiny, tmp_path):
    manifest = api.import_interactions(tiny, _file(tmp_path, ROWS), "t", model="m")
    assert _rows(tiny, "t") == {(0, 3): 0.5, (1, 5): 1.0, (1, 4): 0.25}
    stated = (manifest.score_kind, manifest.unlisted, manifest.built_from, manifest.model)
    assert stated == ("weight", "below", "train_only", "m")
    assert manifest.counts["dropped_training_item_rows"] == 1


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_without_weights_each_is_one(tiny, tmp_path, form):
    pairs = {"reader": ["007", "7", "7"], "item": ["café", "10", "10"]}  # a row twice is one
    path = tmp_path / f"taken.{form}"
    if form == "parquet":
        pq.write_table(pa.table(pairs), path)
    elif form == "csv":
        path.write_text("reader,item\n007,café\n7,10\n7,10\n", encoding="utf-8")
    else:
        lines = (dict(zip(pairs, row, strict=True)) for row in zip(*pairs.values(), strict=True))
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    manifest = api.import_interactions(tiny, path, "t", user_column="reader")
    assert _rows(tiny, "t") == {(0, 3): 1.0, (1, 4): 1.0}
    assert manifest.counts["merged_rows"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user,item,weight\n007,café,0\n", "'café' has weight 0"),
        ("user,item,weight\n007,café,1.5\n7,10,1\n", "1 of 2 weights are not above 0 and up to 1"),
        ("user,item,weight\n007,café,\n7,10,1\n", "'café' has no weight"),
        ("user,item,weight\n007,café,nan\n", "must be a finite float32"),
        ("user,item,weight\n007,café,much\n", "'much', not a number"),
        ("user,item,weight\n007,café,1\n007,café,0.5\n", "two different scores"),
        ("user,item\nnobody,café\n", "ids that .* does not have: 1 user"),
        ("user,item\n007,01\n", "all 1 answers are on training items"),
        ("user,score\n007,1\n", "expected user, item and optionally weight"),
        ("user;item\n007;01\n", "add --delimiter=';'"),
        ("user,item,label\n007,café,0\n", "has a column label.*--guidance=kd"),
        ("user,item\n", "no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tiny, tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        api.import_interactions(tiny, _file(tmp_path, text), "t")
    assert preferences.products(tiny.path) == []


def test_knobs_of_scores_are_refused(tiny, tmp_path):
    path = _file(tmp_path, ROWS)
    for knobs in ({"append": True}, {"unlisted": "below"}, {"scores": "x.csv"}):
        with pytest.raises(ConfigError, match="says nothing of what --interactions imports"):
            api.import_interactions(tiny, path, "t", **knobs)
    with pytest.raises(InputError, match="no column 'w', which --weight_column names"):
        api.import_interactions(tiny, path, "t", weight_column="w")


def test_another_split_is_refused(tiny, make_dataset, tmp_path):
    api.import_interactions(tiny, _file(tmp_path, ROWS), "t")
    other = make_dataset("other", valid={0: [4]})
    (tiny.path / schema.TEACHER_DIR).rename(other.path / schema.TEACHER_DIR)
    with pytest.raises(ManifestError, match="split"):
        preferences.load(other, "t")


# ------------------------------------------------------------------------------------------ lists


@pytest.fixture
def listing(make_dataset):
    """20 users with random lists of 8 of 15 items, items 12 to 14 without a training interaction;
    two datasets with the same training and another validation and test part."""
    rng = np.random.default_rng(0)
    users, items = ([f"{side}{k}" for k in range(n)] for side, n in (("u", 20), ("i", 15)))
    train = {u: rng.choice(12, 3, replace=False).tolist() for u in range(20)}
    lists = {u: rng.permutation(15)[:8].tolist() for u in range(20)}
    worlds = []
    for name, held in (("a", (3, 7)), ("b", (9, 1))):
        rest = {u: [i for i in range(15) if i not in train[u]] for u in range(20)}
        valid, test = ({u: [rest[u][k]] for u in range(20)} for k in held)
        dataset = make_dataset(name, users=users, items=items, train=train, valid=valid, test=test)
        pairs = [(u, i, -rank) for u, row in lists.items() for rank, i in enumerate(row)]
        table = pa.table(list(map(list, zip(*pairs, strict=True))), names=["user", "item", "score"])
        provenance = preferences.Provenance(unlisted="below", model="llm")
        preferences.write_product(
            dataset, "l", table.cast(schema.TEACHER_SCORES), provenance=provenance
        )
        worlds.append(dataset)
    return worlds, train, lists


@pytest.mark.parametrize(
    ("places", "rare", "most", "weights"),
    [(3, -1, 0, "one"), (0, 0, 0, "place"), (0, 2, 2, "one"), (4, -1, 3, "place")],
)
def test_lists_are_cut_as_plain_python_cuts_them(listing, places, rare, most, weights):
    """And what evaluation holds changes nothing: both datasets have the same rows."""
    (dataset, other), train, lists = listing
    counts = np.bincount(np.concatenate(list(train.values())), minlength=15)
    kept = []
    for user, row in lists.items():
        outside = [item for item in row if item not in train[user]]
        kept += [(place, user, item) for place, item in enumerate(outside, start=1)]
    kept = [row for row in kept if not places or row[0] <= places]
    kept = [row for row in kept if rare < 0 or counts[row[2]] <= rare]
    if most:
        kept = [
            row for row in kept
            if sorted(r for r in kept if r[2] == row[2]).index(row) < most
        ]  # fmt: skip
    expected = {
        (user, item): 1.0 if weights == "one" else 1 / np.log2(1 + place)
        for place, user, item in kept
    }
    assert expected

    options = DeriveConfig(
        lists="l", places=places, rare_items=rare, users_per_item=most, weights=weights
    )
    for each in (dataset, other):
        common = TeachConfig(data=str(each.path), name="d")
        manifest = pseudo_interactions.derive(each, common, options)
        assert _rows(each, "d") == pytest.approx(expected)
    assert manifest.model.startswith("interactions of l (answers ")


def test_lists_that_cannot_be_used_are_refused(listing):
    (dataset, _), *_ = listing
    common = TeachConfig(data=str(dataset.path), name="d")
    with pytest.raises(ManifestError, match="has no teacher 'x'"):
        pseudo_interactions.derive(dataset, common, DeriveConfig(lists="x"))
    pseudo_interactions.derive(dataset, common, DeriveConfig(lists="l"))
    with pytest.raises(InputError, match="add --overwrite"):
        pseudo_interactions.derive(dataset, common, DeriveConfig(lists="l"))
    table = pa.table({"user": [0], "preferred": [1], "other": [2], "margin": [1.0]})
    preferences.write_product(
        dataset, "p", table.cast(schema.TEACHER_PREFERENCES), provenance=preferences.Provenance()
    )
    again = TeachConfig(data=str(dataset.path), name="d2")
    with pytest.raises(InputError, match=r"'p' states preferences.*--guidance=pairwise"):
        pseudo_interactions.derive(dataset, again, DeriveConfig(lists="p"))


# ---------------------------------------------------------------------------------- nearest users


def test_the_nearest_users_of_items_that_training_never_saw(listing, tmp_path):
    (dataset, _), train, _ = listing
    rng = np.random.default_rng(2)
    items, users = rng.normal(size=(15, 4)), rng.normal(size=(20, 4))
    paths = {}
    for side, values in (("i", items), ("u", users)):
        paths[side] = tmp_path / f"{side}.npz"
        ids = np.array([f"{side}{k}" for k in range(len(values))])
        np.savez(paths[side], ids=ids, emb=values.astype(np.float32))
    common = TeachConfig(data=str(dataset.path), name="v")
    embed = EmbedConfig(vectors=str(paths["i"]), user_vectors=str(paths["u"]))
    embeddings.embed(dataset, common, embed)

    near = TeachConfig(data=str(dataset.path), name="near")
    by_texts = NearestConfig(embeddings="v", centre=False)
    options = DeriveConfig(rare_items=3, users_per_item=4, weights="place")
    nearest_users.write(dataset, near, options, by_texts)
    counts = np.bincount(np.concatenate(list(train.values())), minlength=15)
    cosine = (users @ items.T) / np.outer(
        np.linalg.norm(users, axis=1), np.linalg.norm(items, axis=1)
    )
    expected = {}
    for item in np.flatnonzero(counts <= 3):
        able = [u for u in np.argsort(-cosine[:, item]) if item not in train[u]]
        expected |= {(u, item): 1 / np.log2(2 + k) for k, u in enumerate(able[:4])}
    assert _rows(dataset, "near") == pytest.approx(expected)

    with pytest.raises(ConfigError, match="--places=3 is of --lists"):
        nearest_users.write(
            dataset,
            TeachConfig(data=str(dataset.path), name="n2"),
            DeriveConfig(places=3),
            by_texts,
        )
