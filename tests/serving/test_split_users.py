"""Runs of --user_shards are served as they were trained: each device has its own users' rows."""

from __future__ import annotations

import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import worlds

import slgr_jax as sl
from slgr_jax import serving
from slgr_jax.config import make_run
from slgr_jax.evaluation import device_scoring
from slgr_jax.reports import run_evaluation
from slgr_jax.serving import stablehlo
from slgr_jax.training import loop

USERS, ITEMS, SHARDS = 43, 30, 8


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A guided run of 8 shards of users."""
    world = worlds.random_dataset(tmp_path_factory.mktemp("data") / "d", n_users=USERS)
    rng = np.random.default_rng(0)
    items = np.concatenate([np.sort(rng.permutation(ITEMS)[:6]) for _ in range(USERS)])
    users = np.repeat(np.arange(USERS, dtype=np.int32), 6)
    worlds.teach(world, users, items.astype(np.int32), rng.random(users.size).astype(np.float32))
    path = str(tmp_path_factory.mktemp("run"))
    knobs = {"dim": 8, "batch_size": 32, "patience": 0, "epochs": 2, "item_bias": True}
    knobs |= {"guidance": "pairwise", "teacher": "t", "lambda": 0.5, "gate": "calibrated"}
    with worlds.runs_on(1):
        loop.train(make_run(str(world.path), path, user_shards=SHARDS, **knobs))
    return path


@pytest.fixture(scope="module")
def whole(workdir):
    """On three devices, which do not divide the shards: users in their order, whole on each."""
    with worlds.runs_on(3):
        run = serving.load(workdir)
        assert run.restored.split is None
        assert {x.data.shape[0] for x in _user_table(run).addressable_shards} == {USERS}
        yield run


def _user_table(run) -> jax.Array:
    return run.restored.serving.values["user"]


def _ids(kind: str, indices) -> list[str]:
    return [f"{kind}{index}" for index in indices]


def test_a_device_has_its_own_users_alone(workdir):
    """Of users a device's bytes fall as 1 / devices, and no program makes them whole again."""
    held = {}
    for devices in (1, 2, 4):
        with worlds.runs_on(devices):
            run = serving.load(workdir)
        table = _user_table(run)
        held[devices] = {part.data.nbytes for part in table.addressable_shards}
        assert len(table.addressable_shards) == devices
        recommender = run.recommender(k=3)
        masked = recommender._lists._masked
        held[devices] |= {part.data.nbytes for part in masked.offsets.addressable_shards}
        pairs = run._pair_scores.lower(
            run.restored.scoring("test"), np.zeros(8, np.int32), np.zeros((8, 1), np.int32)
        )
        scorer, asked = recommender._lists._scorer, recommender._lists._asked
        users = jax.device_put(np.zeros(scorer.chunk, np.int32), scorer.at.by_user)
        how, columns = asked.score.keywords, asked.score.keywords["n_items"]
        room = device_scoring.score_room(users=scorer.chunk, n_items=columns, at=scorer.at)
        ranked = asked.score.func.lower(room, asked.state, users, **how)
        for program in (pairs, ranked):
            text = program.compile().as_text()
            assert "all-gather" not in text
            assert f"f32[{table.shape[0]},{table.shape[1]}]" not in text or devices == 1
        _check_vectors(run, table.shape[0])
    rows = SHARDS * (-(-USERS // SHARDS) + 1)
    assert held == {n: {rows * 8 * 4 // n, rows * 4 // n} for n in (1, 2, 4)}


def _check_vectors(run, rows: int) -> None:
    """Each device makes those of its own users; nothing but vectors is gathered."""
    vectors, scoring = run.run_vectors, run.restored.scoring("test")
    at = vectors._at
    specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(scoring)) if at.mesh else None
    asked = jax.device_put(np.zeros(16, np.int32), at.with_users)
    text = vectors._of_rows.lower(scoring, asked, specs=specs).compile().as_text()
    gathered = re.findall(r"= (f32\[.*?\])\S* all-gather", text)
    assert gathered == (["f32[16,8]"] if at.mesh else [])  # the bias's 1 is not sent
    assert f"f32[{rows}," not in text or at.mesh is None


def test_evaluation_and_its_gate_have_the_numbers_of_whole_tables(workdir):
    with worlds.runs_on(3):
        expected = run_evaluation.evaluate_run(workdir, "whole")
    with worlds.runs_on(4):
        got = run_evaluation.evaluate_run(workdir, "split")
    for part in ("valid", "test"):
        for name, metrics in expected.parts[part].slices.items():
            assert got.parts[part].slices[name] == pytest.approx(metrics, abs=1e-6), name
    assert expected.parts["test"].slices["overall"]["auc_pooled"] > 0
    assert got.gate["auc"] == pytest.approx(expected.gate["auc"], abs=1e-5)
    for name, group in expected.gate["slices"].items():
        assert got.gate["slices"][name] == pytest.approx(group, abs=1e-5), name


def test_lists_scores_and_vectors_are_those_of_whole_tables(workdir, whole, tmp_path):
    """As objects and as files; and what knows users by their number has them so."""
    asked = _ids("u", [7, 42, 7, 0, 19])
    only = {"u7": _ids("i", range(9)), "u0": _ids("i", [3])}
    lists, own = whole.recommend(asked, 5), whole.recommend(asked, 5, allow=only)
    vectors, pairs = whole.vectors(), (asked, _ids("i", range(5)))
    folded = whole.fold_in({"new": ["i1", "i2"]})
    weights = stablehlo.export_scorer(whole, 3).weights
    with worlds.runs_on(4):
        run = serving.load(workdir)
        assert run.restored.split is not None
        for got, expected in (
            (run.recommend(asked, 5), lists),
            (run.recommend(asked, 5, allow=only), own),
        ):
            assert got.items == expected.items
            np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-6)
        np.testing.assert_allclose(run.scores(*pairs), whole.scores(*pairs), rtol=1e-6)
        np.testing.assert_array_equal(run.vectors().users, vectors.users)
        np.testing.assert_array_equal(run.vectors().items, vectors.items)
        believed = [
            each.alpha(asked, _ids("i", range(5)), _ids("i", range(5, 10)), np.ones(5))
            for each in (run, whole)
        ]
        np.testing.assert_allclose(*believed, rtol=1e-6)
        again = run.fold_in({"new": ["i1", "i2"]})
        np.testing.assert_allclose(again.vectors().users, folded.vectors().users, rtol=1e-5)
        for name, values in stablehlo.export_scorer(run, 3).weights.items():
            np.testing.assert_array_equal(values, weights[name])

        sl.recommend(workdir, "all", tmp_path / "lists.parquet", k=4)
        for kind in ("parquet", "npy"):
            sl.export(workdir, tmp_path / kind, format=kind)
    rows = pq.read_table(tmp_path / "lists.parquet")
    everybody = whole.recommend(k=4)
    listed = [(user, x) for user, of in zip(*everybody[:2], strict=True) for x in of if x]
    assert list(zip(*(rows[name].to_pylist() for name in ("user", "item")), strict=True)) == listed
    table = pq.read_table(tmp_path / "parquet" / "users.parquet")
    assert table["user"].to_pylist() == whole.dataset.user_ids.to_pylist()
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), "f4"), vectors.users)
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "users.npy"), vectors.users)
