"""Teachers that cost nothing: lists of runs and baselines as products, mixed with an LLM's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.config import BaselineConfig, CombineConfig, TeachConfig
from slgr_jax.data.dataset import Dataset, Part
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.evaluation import baselines, teacher_lists
from slgr_jax.serving import load, run_teacher
from slgr_jax.teacher.products import combine, preferences
from slgr_jax.training import loop

N_ITEMS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    dataset = worlds.random_dataset(tmp_path_factory.mktemp("world") / "data", n_items=N_ITEMS)
    drawn = np.random.default_rng(0).random((dataset.n_users, N_ITEMS)).argsort(axis=1)[:, :6]
    users = np.repeat(np.arange(dataset.n_users), 6)
    scores = np.tile(np.arange(6), dataset.n_users).astype(np.float32)
    stated = {"built_from": "includes_label", "unlisted": "below"}
    worlds.teach(dataset, users, drawn.reshape(-1), scores, name="llm", **stated)
    return dataset


def common(dataset, name):
    return TeachConfig(data=str(dataset.path), name=name)


def listed(dataset, name):
    """user -> items, best first."""
    teacher = preferences.load(dataset, name)
    return {
        user: teacher.items[teacher.offsets[user] : teacher.offsets[user + 1]][::-1].tolist()
        for user in range(dataset.n_users)
    }


def best(scores, dataset, length):
    """user -> the best items outside training, in plain Python."""
    train = dataset.positives(("train",))
    return {
        user: sorted(
            set(range(N_ITEMS)) - set(train.row(user).tolist()), key=lambda i: (-scores[user, i], i)
        )[:length]
        for user in range(dataset.n_users)
    }


@pytest.mark.parametrize("name", ["popular", "item_item", "ease"])
def test_lists_of_a_baseline(dataset, name):
    options = BaselineConfig(ease_lambdas=(5, 100))
    manifest = teacher_lists.from_baseline(dataset, common(dataset, name), name, 4, options)
    tuned = baselines.tune(baselines.make_baseline(name, options), dataset)
    users = np.arange(dataset.n_users, dtype=np.int32)
    scores = np.asarray(tuned.fitted.score_users(tuned.fitted.state, users))
    expected, lists = best(scores, dataset, 4), listed(dataset, name)
    for user, items in lists.items():  # popular items tie: any order of these
        assert [scores[user, i] for i in items] == pytest.approx(
            [scores[user, i] for i in expected[user]]
        )
        assert set(items) == set(expected[user])
    said = (manifest.built_from, manifest.unlisted, manifest.training_items)
    assert said == ("train_only", "below", "none")
    model = f"baseline ease (lambda {tuned.settings['lambda']})" if name == "ease" else name
    assert manifest.model.endswith(model)
    assert manifest.counts["train_pairs"] == 0
    with pytest.raises(InputError, match="--overwrite"):
        teacher_lists.from_baseline(dataset, common(dataset, name), name, 4, options)


def test_lists_of_equal_scores_are_left_out(dataset):
    """EASE knows nothing of a user without a history."""
    keep = dataset.train.users != 3
    train = Part(dataset.train.users[keep], dataset.train.items[keep], None, None)
    silent = dataclasses.replace(dataset, train=train)
    options = BaselineConfig(ease_lambdas=(5,))
    teacher_lists.from_baseline(silent, common(dataset, "silent"), "ease", 4, options)
    lengths = {user: len(items) for user, items in listed(dataset, "silent").items()}
    assert lengths.pop(3) == 0
    assert set(lengths.values()) == {4}


def trained(dataset, workdir, **knobs):
    run = config.make_run(str(dataset.path), str(workdir), epochs=1, batch_size=64, dim=4, **knobs)
    loop.train(run)
    return str(workdir)


def test_lists_of_a_run_and_what_they_were_built_from(dataset, tmp_path):
    """A run has seen what its teacher saw, and a mixture what its parts did."""
    guided = trained(dataset, tmp_path / "guided", guidance="pairwise", teacher="llm",
                     gate="constant")  # fmt: skip
    manifest = run_teacher.from_run(dataset, common(dataset, "guided"), guided, 5)
    run = load(guided)
    users = np.arange(dataset.n_users, dtype=np.int32)
    scores = np.asarray(run.score_users(run.restored.scoring("valid"), users))
    assert listed(dataset, "guided") == best(scores, dataset, 5)
    said = (manifest.built_from, manifest.training_items, manifest.model)
    assert said == ("includes_label", "none", "run guided (mf, guided by llm)")
    teacher_lists.from_baseline(dataset, common(dataset, "free"), "popular", 9, BaselineConfig())
    options = CombineConfig(names="free,guided")
    mixed = combine.combine(dataset, common(dataset, "mixed"), options)
    assert (mixed.built_from, mixed.unlisted) == ("includes_label", "below")


def test_a_run_of_other_data_is_refused(dataset, tmp_path):
    other = worlds.random_dataset(tmp_path / "other", seed=1, n_items=N_ITEMS)
    plain = trained(other, tmp_path / "run")
    manifest = run_teacher.from_run(other, common(other, "plain"), plain, 5)
    assert (manifest.built_from, manifest.model) == ("train_only", "run run (mf)")
    with pytest.raises(ConfigError, match="another split or id map"):
        run_teacher.from_run(dataset, common(dataset, "x"), plain, 5)
    with pytest.raises(ConfigError, match="nowhere"):
        run_teacher.from_run(dataset, common(dataset, "x"), str(tmp_path / "nowhere"), 5)
