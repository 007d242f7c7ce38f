"""Runs of --user_shards of every kind of backbone: what they look up stays with its users."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import serving
from slgr_jax.config import RunConfig, make_run
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import OfUsers
from slgr_jax.errors import ConfigError
from slgr_jax.reports import run_evaluation
from slgr_jax.training import loop, run_directory

USERS, ITEMS, SHARDS = 43, 30, 8
GUIDED = {"guidance": "pairwise", "teacher": "t", "lambda": 0.5, "gate": "calibrated"}
SMALL = {"layers": 1, "table_optimizer": "adagrad", "max_history": 4, "hidden": 8, "mlp": (8,)}
ROWS = {"rows": "rated", "rating_threshold": 3.0, "ranking": True}
RUNS: dict[str, dict[str, Any]] = {
    "mf": {"rows": "sampled", "features": "group,price"},
    "lightgcn": {"backbone": "lightgcn", "layers": 2},
    "sasrec": {"backbone": "sasrec", **SMALL, **GUIDED},
    "deepfm": {"backbone": "deepfm", "features": "all", **SMALL, **ROWS},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """43 users: shards do not have equally many."""
    hours = np.arange(10 * USERS) % 5 / 2.0
    world = worlds.random_dataset(
        tmp_path_factory.mktemp("data") / "d",
        n_users=USERS,
        ratings=True,
        features=[
            worlds.feature("group", "user", [[f"g{u % 3}"] for u in range(USERS)]),
            worlds.feature("price", "item", [[f"p{i % 4}"] for i in range(ITEMS)]),
            features_lib.numeric("hour", "interaction", hours, np.arange(10 * USERS) < 6 * USERS),
        ],
    )
    rng = np.random.default_rng(0)
    items = np.concatenate([np.sort(rng.permutation(ITEMS)[:6]) for _ in range(USERS)])
    users = np.repeat(np.arange(USERS, dtype=np.int32), 6)
    worlds.teach(world, users, items.astype(np.int32), rng.random(users.size).astype(np.float32))
    return world


@pytest.fixture(scope="module", params=RUNS)
def workdir(dataset, tmp_path_factory, request):
    """A run of 8 shards of users, trained on one device."""
    path = str(tmp_path_factory.mktemp(request.param))
    knobs = {"dim": 8, "batch_size": 32, "patience": 0, "epochs": 1, "pooled_auc": False}
    knobs |= RUNS[request.param]
    with worlds.runs_on(1):
        loop.train(make_run(str(dataset.path), path, user_shards=SHARDS, **knobs))
    return path


def _of_users(run) -> list[jax.Array]:
    """What a run holds of users: rows, histories and their moments, features."""
    restored, scoring = run.restored, run.restored.scoring("test")
    context, values = scoring.context, scoring.serving.values
    assert context.graph is None  # the table of users has been propagated on it
    rows = [values[name] for name in ("user",) if name in values]
    assert restored.split is not None
    looked_up = [context.histories, scoring.as_of]
    if context.features is not None:
        looked_up += [context.features.user, context.features.interaction]
    return [*rows, *jax.tree.leaves(looked_up)]


def test_a_device_has_what_belongs_to_its_own_users(workdir):
    held = {}
    for devices in (1, 2, 4, 8):
        with worlds.runs_on(devices):
            of_users = _of_users(serving.load(workdir))
        held[devices] = {
            sum(leaf.addressable_shards[at].data.nbytes for leaf in of_users)
            for at in range(devices)
        }
    assert held == {devices: {min(held[1]) // devices} for devices in (1, 2, 4, 8)}
    assert min(held[1]) > USERS * 4


def _with_table_shards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Runs have had table shards: their checkpoints are the same on any number of them."""
    read = run_directory.read_config

    def with_shards(workdir: str) -> RunConfig:
        run = read(workdir)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, table_shards=count))

    monkeypatch.setattr(run_directory, "read_config", with_shards)


@pytest.mark.parametrize("table_shards", [1, 2])
def test_numbers_are_those_of_a_run_that_is_whole_on_each_device(
    workdir, monkeypatch, table_shards
):
    """Metrics and the gate's, of labelled rows too; lists, scores and vectors. Also where tables
    of items are split beside the users."""
    asked = [f"u{user}" for user in (7, 42, 7, 0, 19)]
    pairs = asked, [f"i{item}" for item in range(5)]
    with worlds.runs_on(3):  # which do not divide the shards
        whole = serving.load(workdir)
        assert whole.restored.split is None
        expected = run_evaluation.evaluate_run(workdir, "whole")
    _with_table_shards(monkeypatch, table_shards)
    with worlds.runs_on(4):
        run = serving.load(workdir)
        for name, rows in run.restored.serving.values.items():
            parts = 4 if name == "user" else table_shards if run.restored.split_items else 1
            held = {part.data.shape[0] for part in rows.addressable_shards}
            assert held == {rows.shape[0] // parts}, name
        assert run.restored.split_items == (
            table_shards > 1 and run.config.model.backbone != "deepfm"
        )
        got = run_evaluation.evaluate_run(workdir, "split")
    for part in ("valid", "test"):
        for name, metrics in expected.parts[part].slices.items():
            assert got.parts[part].slices[name] == pytest.approx(metrics, abs=1e-5), name
        assert set(got.rows) == set(expected.rows)
        for name, metrics in expected.rows.get(part, {}).items():
            assert got.rows[part][name] == pytest.approx(metrics, abs=1e-5), name
    if expected.gate is not None:
        assert got.gate["auc"] == pytest.approx(expected.gate["auc"], abs=1e-5)

    lists = whole.recommend(asked, 5)
    assert run.recommend(asked, 5).items == lists.items
    np.testing.assert_allclose(run.scores(*pairs), whole.scores(*pairs), rtol=1e-5, atol=1e-6)
    best = [row[0] for row in lists.items]
    np.testing.assert_allclose(run.scores(asked, best), lists.scores[:, 0], rtol=1e-5, atol=1e-6)
    if run.config.model.backbone != "deepfm":
        np.testing.assert_allclose(run.vectors().users, whole.vectors().users, rtol=1e-5, atol=1e-6)
    if run.config.model.backbone == "deepfm":
        noon = [each.in_context({"hour": 1.5}) for each in (run, whole)]
        assert noon[0].recommend(asked, 5).items == noon[1].recommend(asked, 5).items
        believed = [each.scores(*pairs) for each in noon]
        np.testing.assert_allclose(*believed, rtol=1e-5, atol=1e-6)
        assert np.abs(believed[0] - run.scores(*pairs)).max() > 1e-3
    again = run.whole
    assert again.restored.split is None
    np.testing.assert_allclose(again.scores(*pairs), whole.scores(*pairs), rtol=1e-5, atol=1e-6)


def test_a_process_of_several_says_nothing_of_users_it_has_not_read(workdir):
    with worlds.runs_on(4):
        run = serving.load(workdir)
    read = np.arange(USERS) % 2 == 0
    of_users = OfUsers(read, run.dataset.history, run.dataset.popularity, len(run.dataset.train))
    dataset = dataclasses.replace(run.dataset, of_users=of_users)
    own = dataclasses.replace(run, restored=dataclasses.replace(run.restored, dataset=dataset))
    for ask in (lambda: own.scores(["u1"], ["i1"]), lambda: own.whole):
        with pytest.raises(ConfigError, match="has read what belongs to its own users alone"):
            ask()
