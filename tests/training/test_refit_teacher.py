"""Teachers made anew of training and validation: what refits, and nothing else, learn from."""

from __future__ import annotations

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds

import slgr_jax
from slgr_jax.cli.teach import inspect as inspect_command
from slgr_jax.config import (
    BaselineConfig,
    CombineConfig,
    ImportConfig,
    NearestConfig,
    SimilarConfig,
    TeachConfig,
)
from slgr_jax.errors import ConfigError, ManifestError
from slgr_jax.evaluation import teacher_lists
from slgr_jax.teacher.local import embeddings, nearest, similar
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import combine, preferences
from slgr_jax.training import refit, restore

USERS, ITEMS, LISTED = 24, 20, 5
SMALL = {"dim": 8, "batch_size": 32, "epochs": 6, "patience": 0, "kernels": "xla", "lr": 0.3}
GUIDED = {"guidance": "pairwise", "gate": "constant", "alpha": 0.7, "lambda": 0.5}
CONTROLS = ("shuffled", "consensus", "popularity", "item_item")


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with worlds.runs_on(1):
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A split, the data set whose training part is its first two, and items beside an item. Vectors
    of items are the same in both."""
    root = tmp_path_factory.mktemp("split")
    pairs = np.random.default_rng(1).permutation(worlds.random_pairs(0, USERS, ITEMS, 8))
    held = len(pairs) // 4
    parts = pairs[2 * held :], pairs[:held], pairs[held : 2 * held]
    sizes = {"n_users": USERS, "n_items": ITEMS, "parts_in_time": True}
    once = worlds.write_dataset(root / "split", *parts, **sizes)
    both, nothing = np.concatenate(parts[:2]), np.zeros((0, 2), np.int64)
    union = worlds.write_dataset(root / "union", both, nothing, parts[2], **sizes)
    values = np.random.default_rng(2).normal(size=(ITEMS, 4)).astype(np.float32) + 1
    items = Vectors(values, np.ones(ITEMS, bool))
    for data in (once, union):
        users = embeddings.mean_of_history(data.positives(("train",)), items)
        embeddings.write(data, "vectors", items, users, users_from="history")
    beside = root / "beside.csv"
    pairs = [(i, (3 * i + k) % ITEMS) for i in range(ITEMS) for k in (1, 2, 4)]
    rows = [f"i{i},i{j},{k % 7}" for k, (i, j) in enumerate(pairs) if i != j]
    beside.write_text("item,other,score\n" + "\n".join(rows) + "\n")
    return once, union, beside


def _nearest(data, name, **options):
    common = TeachConfig(data=str(data.path), name=name)
    return nearest.write(
        data, common, NearestConfig(listed=LISTED, embeddings="vectors", **options)
    )


def _lists(data, name):
    teacher = preferences.load(data, name)
    return teacher.offsets.tolist(), teacher.items.tolist(), teacher.scores.tolist()


def test_a_product_of_both_parts_is_that_of_the_union(split):
    """Whoever makes it; and so are its controls, and what was combined of it."""
    once, union, beside = split
    both = once.with_validation()
    made = {
        "near": _nearest,
        "near_as_they_are": lambda data, name: _nearest(data, name, centre=False),
        "beside": lambda data, name: similar.write(
            data,
            TeachConfig(data=str(data.path), name=name),
            SimilarConfig(similar=str(beside)),
            ImportConfig(),
            NearestConfig(listed=LISTED),
        ),
        "items": lambda data, name: teacher_lists.from_baseline(
            data,
            TeachConfig(data=str(data.path), name=name),
            "item_item",
            LISTED,
            BaselineConfig(),
        ),
        "mixed": lambda data, name: combine.combine(
            data,
            TeachConfig(data=str(data.path), name=name),
            CombineConfig(names="near{0},items{0}".format(name.removeprefix("mixed"))),
        ),
    }
    for name, make in made.items():
        assert make(both, name).built_from == "includes_valid"
        assert make(union, name).built_from == "train_only"
        assert _lists(both, name) == _lists(union, name), name
        with pytest.raises(ManifestError, match=r"only a refit learns from it, slgr train --refit"):
            preferences.load(once, name)
        assert preferences.checked(once, name).built_from == "includes_valid"
        make(once, f"{name}_of_training")
        assert _lists(once, f"{name}_of_training") != _lists(both, name)
    for control in CONTROLS:
        of_both, of_union = (
            teacher_lists.ensure_control(data, "near", control) for data in (both, union)
        )
        assert of_both == of_union == f"near.{control}"
        assert _lists(both, of_both) == _lists(union, of_union)
        assert preferences.checked(once, of_both).built_from == "includes_valid"


def test_a_refit_with_it_is_training_on_the_union(split, tmp_path, capsys):
    once, union, _ = split
    for data, name in ((once, "t"), (once.with_validation(), "t_anew"), (union, "t")):
        _nearest(data, name)
    run = tmp_path / "tuned"
    slgr_jax.train(once.path, run, teacher="t", **GUIDED, **SMALL)
    slgr_jax.train(None, tmp_path / "refit", refit=run, teacher="t_anew")
    count = json.loads((tmp_path / "refit/config.json").read_text())["train"]["epochs"]
    slgr_jax.train(
        union.path, tmp_path / "union", teacher="t", **GUIDED, **{**SMALL, "epochs": count}
    )
    ours, theirs = (
        restore.restore_run(str(tmp_path / name)).serving for name in ("refit", "union")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    slgr_jax.train(None, tmp_path / "old", refit=run)
    old = restore.restore_run(str(tmp_path / "old")).serving
    assert not np.array_equal(*(np.asarray(jax.tree.leaves(state)[0]) for state in (ours, old)))
    # It is shown and evaluated like any other; the product is shown, too.
    slgr_jax.evaluate(tmp_path / "refit")
    slgr_jax.inspect(data=once.path)
    inspect_command.work(once, TeachConfig(data=str(once.path), name="t_anew"))
    assert "has seen validation: for refits alone" in capsys.readouterr().out


def test_what_is_not_the_teacher_made_anew_is_refused(split, tmp_path):
    once, _, _ = split
    both = once.with_validation()
    for data, name in ((once, "a"), (once, "b"), (both, "b_anew")):
        _nearest(data, name)
    users = np.repeat(np.arange(USERS), 3)
    items = np.tile(np.arange(3), USERS)
    worlds.teach(both, users, items, items / 3, name="rated", built_from="includes_valid")
    run, plain = tmp_path / "run", tmp_path / "plain"
    slgr_jax.train(once.path, run, teacher="a", **GUIDED, **SMALL)
    slgr_jax.train(once.path, plain, **SMALL)
    for source, teacher, words in (
        (run, "b", r"built_from=train_only; a refit has the teacher of its run, a, or the same"),
        (run, "rated", r"its unlisted is unknown, that of a below: it is not the same teacher"),
        (plain, "b_anew", r"--teacher=b_anew is not used with --guidance=none"),
    ):
        with pytest.raises(ConfigError, match=words):
            refit.config_of(str(source), str(tmp_path / "x"), {"teacher": teacher})
    with pytest.raises(ManifestError, match="only a refit learns from it"):
        slgr_jax.train(once.path, tmp_path / "y", teacher="b_anew", **GUIDED, **SMALL)


def test_vectors_and_answers_that_saw_validation_are_refused_likewise(split, tmp_path):
    once, _, _ = split
    items = Vectors(np.eye(ITEMS, dtype=np.float32), np.ones(ITEMS, bool))
    embeddings.write(once, "late", items, Vectors(np.ones((USERS, ITEMS), np.float32),
        np.ones(USERS, bool)), users_from="file", built_from="includes_valid")  # fmt: skip
    with pytest.raises(ManifestError, match="only a refit learns from it"):
        embeddings.load(once, "late")
    assert embeddings.load(once.with_validation(), "late").manifest.built_from == "includes_valid"
    path = tmp_path / "answers.parquet"
    pq.write_table(
        pa.table({"user": ["u0", "u0"], "item": ["i1", "i2"], "score": [1.0, 2.0]}), path
    )
    slgr_jax.import_teacher(once.path, path, "imported", built_from="includes_valid")
    with pytest.raises(ManifestError, match="only a refit learns from it"):
        preferences.load(once, "imported")
