"""Models with features: closed forms in a step, cold users, restoring, refusals."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.models import embedding_table
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads, RowAccess
from slgr_jax.sampling.context import Queries
from slgr_jax.serving import trained_run
from slgr_jax.training import build, loop, multi_seed, restore, run_directory, step
from slgr_jax.training import state as state_lib

WARM, COLD, ITEMS = 40, 20, 20


def _groups(path: pathlib.Path, *, named: bool = True) -> Dataset:
    """Users of even number like the first half of the items, odd ones the other half.

    The last `COLD` users have no training interaction: only `group` tells them apart. Items have
    two tags each and a number, of which some are missing.
    """
    rng, rows = np.random.default_rng(0), {"train": [], "valid": [], "test": []}
    half = ITEMS // 2
    for user in range(WARM + COLD):
        liked = rng.permutation(half)[:7] + half * (user % 2)
        parts = (
            ["train"] * 5 + ["valid"] + ["test"] if user < WARM else ["valid"] * 3 + ["test"] * 4
        )
        for part, item in zip(parts, liked, strict=True):
            rows[part].append((user, item))
    users = WARM + COLD
    features = [
        worlds.feature("group", "user", [["even", "odd"][u % 2 : u % 2 + 1] for u in range(users)]),
        worlds.feature(
            "tags", "item", [[f"t{i % 3}", f"t{3 + i % 2}"][: i % 3] for i in range(ITEMS)]
        ),
        features_lib.numeric(
            "price",
            "item",
            np.where(np.arange(ITEMS) % 7, np.arange(ITEMS) / 3.0, np.nan),
            np.ones(ITEMS, bool),
        ),
    ]
    parts = [np.array(rows[name]) for name in ("train", "valid", "test")]
    return worlds.write_dataset(
        path, *parts, n_users=users, n_items=ITEMS, features=features if named else ()
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return _groups(tmp_path_factory.mktemp("world") / "d")


def _run(data: Dataset, workdir: pathlib.Path | str, **knobs) -> config.RunConfig:
    values = {"dim": 8, "batch_size": 32, "epochs": 2, "patience": 0, "kernels": "xla"} | knobs
    return make_run(str(data.path), str(workdir), **values)


def _composed(values, slots, side):
    """Plain loops: each row with its features added."""
    table = np.asarray(values[f"{side}_feature"], np.float64)
    rows = [
        row + sum(w * table[r] for r, w in zip(*of, strict=True))
        for row, *of in zip(
            np.asarray(values[side], np.float64), slots.rows, slots.weights, strict=True
        )
    ]
    return np.array(rows)


def _access(experiment) -> RowAccess:
    access = experiment.trainer.access
    assert isinstance(access, RowAccess)
    return access


def _values(experiment, state):
    return {
        name: np.asarray(embedding_table.values_of(state.tables[name], spec))
        for name, spec in experiment.trainer.backbone.tables.items()
    }


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_mf_scores_and_serves_sums_of_rows(data, kernels):
    if kernels == "native":
        worlds.need_native_kernels()
    experiment = build.build(
        _run(data, "run", features="all", init_std=2.0, kernels=kernels), data, worlds.one_device()
    )
    trainer, context = experiment.trainer, experiment.arrays.context
    state = state_lib.init_state(trainer, 0)
    values = _values(experiment, state)
    assert values["user_feature"].shape == (3, 8)  # even, odd, missing
    assert values["item_feature"].shape == (5 + 2, 8)  # four tags, missing; price, missing
    users, items = np.array([0, 7, 59]), np.array([[0, 1], [14, 3], [6, 6]], np.int32)
    p = _composed(values, context.features.user, "user")
    q = _composed(values, context.features.item, "item")
    p[:, -1] = 1.0  # meets the item's bias, features' biases too
    expected = np.einsum("nd,ncd->nc", p[users], q[items])

    reads = Reads({"x": Candidates(Queries(jnp.asarray(users)), jnp.asarray(items))}, {})
    leaves = _access(experiment).read(state.tables, context, reads)
    view = _access(experiment).view({}, leaves, context, reads, None)
    np.testing.assert_allclose(view.scores("x", None), expected, rtol=1e-4, atol=1e-5)

    served = state_lib.make_serving_state(trainer)(state, context)
    np.testing.assert_allclose(served.values["item"], q, rtol=1e-4, atol=1e-5)


def test_one_hot_groups_are_group_vectors(data):
    """With id rows of 0, every user of a group is the group's vector."""
    experiment = build.build(_run(data, "run", features="group"), data, worlds.one_device())
    state = state_lib.init_state(experiment.trainer, 0)
    state.tables["user"] = jnp.zeros_like(state.tables["user"])
    served = state_lib.make_serving_state(experiment.trainer)(state, experiment.arrays.context)
    groups = _values(experiment, state)["user_feature"]
    np.testing.assert_array_equal(served.values["user"], groups[np.arange(WARM + COLD) % 2])


def test_a_shared_rows_gradient_is_the_sum_over_users(data):
    """One SGD step: the group's row moves by the sum of what its users' rows move by."""
    knobs = {"table_optimizer": "sgd", "lr": 0.1, "l2": 0.0, "features": "group"}
    experiment = build.build(_run(data, "run", **knobs), data, worlds.one_device())
    trainer = experiment.trainer
    before = state_lib.init_state(trainer, 0)
    old = _values(experiment, before)
    after, _, _ = step.make_run_steps(trainer)(
        before, experiment.arrays, jax.random.key(0), jnp.int32(1)
    )
    new = _values(experiment, after)
    moved = {name: new[name].astype(np.float64) - old[name] for name in new}
    assert np.abs(moved["user"]).sum() > 0.01
    for group in range(2):
        expected = moved["user"][group::2].sum(axis=0)
        np.testing.assert_allclose(moved["user_feature"][group], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(moved["user_feature"][2], 0)  # nobody lacks a group


def test_the_penalty_does_not_depend_on_unused_slots(data):
    """|rows|^2 of a triple: each value once, whatever longest row the table is padded for."""
    experiment = build.build(_run(data, "run", features="tags"), data, worlds.one_device())
    context, access = experiment.arrays.context, _access(experiment)
    state = state_lib.init_state(experiment.trainer, 0)
    values = _values(experiment, state)
    users, items = np.array([4, 5]), np.array([[0, 1], [4, 2]], np.int32)
    reads = Reads({"x": Candidates(Queries(jnp.asarray(users)), jnp.asarray(items))}, {})
    squares = access.squares({}, access.read(state.tables, context, reads), context, reads)["x"]
    slots = context.features.item
    expected = [
        (values["user"][u] ** 2).sum()
        + sum(
            (values["item"][i] ** 2).sum()
            + sum(
                (values["item_feature"][r] ** 2).sum()
                for r in set(np.asarray(slots.rows[i]).tolist())
            )
            for i in row
        )
        for u, row in zip(users, items, strict=True)
    ]
    np.testing.assert_allclose(squares, expected, rtol=1e-5)


def test_lightgcn_propagates_sums(data):
    run = _run(data, "run", backbone="lightgcn", features="all")
    experiment = build.build(run, data, worlds.one_device())
    trainer, context = experiment.trainer, experiment.arrays.context
    state = state_lib.init_state(trainer, 0)
    values = _values(experiment, state)
    summed = {
        side: jnp.asarray(_composed(values, slots, side), jnp.float32)
        for side, slots in (("user", context.features.user), ("item", context.features.item))
    }
    expected = trainer.backbone.propagate({}, summed, context)
    served = state_lib.make_serving_state(trainer)(state, context)
    for side in summed:
        np.testing.assert_allclose(served.values[side], expected[side], rtol=1e-4, atol=1e-6)
    after, sums, health = step.make_run_steps(trainer)(
        state, experiment.arrays, jax.random.key(0), jnp.int32(2)
    )
    assert int(health.step) == -1
    assert np.isfinite(float(sums["loss"]))
    moved = _values(experiment, after)["user_feature"] - values["user_feature"]
    assert (np.abs(moved[:2]).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize(
    ("backbone", "loss"), [("mf", "softmax"), ("mf", "sampled_softmax"), ("sasrec", "bpr")]
)
def test_every_loss_reads_and_writes_features(data, backbone, loss):
    knobs = {"backbone": backbone, "loss": loss, "features": "tags,price", "layers": 1}
    experiment = build.build(_run(data, "run", **knobs), data, worlds.one_device())
    state = state_lib.init_state(experiment.trainer, 0)
    old = _values(experiment, state)["item_feature"]
    after, _, health = step.make_run_steps(experiment.trainer)(
        state, experiment.arrays, jax.random.key(0), jnp.int32(2)
    )
    assert int(health.step) == -1
    moved = np.abs(_values(experiment, after)["item_feature"] - old).max(axis=1)
    assert (moved > 0).all()


def _cold_auc(workdir: pathlib.Path) -> float:
    """Mean over cold users of P(a liked item scores above one of the other half)."""
    scored = serving.trained_run.load(str(workdir))
    names = [f"u{u}" for u in range(WARM, WARM + COLD)]
    out = []
    for user, name in enumerate(names, WARM):
        scores = scored.scores([name] * ITEMS, [f"i{i}" for i in range(ITEMS)])
        halves = scores.reshape(2, -1)
        liked, other = halves[user % 2], halves[1 - user % 2]
        out.append(np.mean(liked[:, None] > other[None, :]))
    return float(np.mean(out))


@pytest.mark.parametrize(
    "backbone",
    [
        "mf",
        pytest.param("lightgcn", marks=pytest.mark.slow),
        pytest.param("deepfm", marks=pytest.mark.slow),
    ],
)
def test_features_tell_cold_users_apart(data, tmp_path, backbone):
    knobs = {"backbone": backbone, "epochs": 25, "eval_every": 25, "lr": 0.05}
    if backbone == "deepfm":
        knobs |= {"history_fields": False, "lr": 0.02, "dense_lr": 0.01, "mlp": (8,)}
    auc = {}
    for features in ("none", "group"):
        workdir = tmp_path / features
        loop.train(_run(data, workdir, features=features, **knobs))
        auc[features] = _cold_auc(workdir)
    assert auc["group"] > 0.95
    assert auc["none"] < 0.7


def test_a_run_is_restored_and_ranks_as_it_scores(data, tmp_path):
    run = _run(data, tmp_path / "run", features="all", epochs=3)
    loop.train(run)
    restored = trained_run.load(str(tmp_path / "run"))
    vectors = restored.vectors()
    scores = restored.scores(["u3", "u50", "u50"], ["i1", "i1", "i14"])
    for score, user, item in zip(scores, (3, 50, 50), (1, 1, 14), strict=True):
        assert score == pytest.approx(vectors.users[user] @ vectors.items[item], rel=1e-4, abs=1e-6)
    top = restored.recommend(["u50"], k=3)
    expected = np.argsort(-(vectors.items @ vectors.users[50]))
    seen = set(data.positives(("train", "valid")).row(50).tolist())
    assert top.items[0] == [f"i{i}" for i in expected if i not in seen][:3]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["features_hash"] == features_lib.digest(data.known_features)
    # The last state composes on reading, the best as it was written.
    last = restore.restore_run(str(tmp_path / "run"), "last").serving.values["user"]
    assert np.isfinite(np.asarray(last)).all()


def test_resuming_is_exact_and_refuses_other_features(tmp_path):
    data = _groups(tmp_path / "d")
    knobs = {"features": "group,price"}
    loop.train(_run(data, tmp_path / "whole", epochs=4, **knobs))
    loop.train(_run(data, tmp_path / "halves", epochs=2, **knobs))
    loop.train(_run(data, tmp_path / "halves", epochs=4, **knobs))
    for which in ("best", "last"):
        left, right = (
            restore.restore_run(str(tmp_path / name), which).serving.values
            for name in ("whole", "halves")
        )
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    with pytest.raises(ConfigError, match="--features: group,price -> group"):
        loop.train(_run(data, tmp_path / "whole", epochs=5, features="group"))

    # The same split and ids, another price: neither goes on, nor is it read back.
    other = _groups(tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    del manifest["checksum"]  # what an earlier version wrote has none
    (price,) = (f for f in manifest["features"]["item"] if f["name"] == "price")
    price["mean"] += 1
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    assert other.manifest.split_hash == data.manifest.split_hash
    with pytest.raises(ConfigError, match="--features: group,price are others in"):
        loop.train(_run(other, tmp_path / "whole", epochs=5, **knobs))
    with pytest.raises(ConfigError, match="was trained with --features=group,price"):
        restore.restore_run(str(tmp_path / "whole"), data=str(other.path))
    loop.train(_run(other, tmp_path / "group", features="group"))  # does not read it


def test_records_without_features_are_of_runs_without(data, tmp_path):
    run = _run(data, tmp_path / "run")
    loop.train(run)
    path = tmp_path / "run" / run_directory.RECORD
    record = json.loads(path.read_text())
    del record["checksum"]
    assert record.pop("features_hash") == ""
    path.write_text(json.dumps(record))
    assert run_directory.same_features(run.workdir, run, data)
    assert run_directory.same_features(run.workdir, _run(data, "x", features="all"), data) is False


@pytest.mark.slow
def test_many_seeds_train_with_features(data, tmp_path):
    runs = [_run(data, tmp_path / f"{s}", features="all", seed=s, epochs=1) for s in (0, 1)]
    multi_seed.train_seeds(runs)
    loop.train(_run(data, tmp_path / "alone", features="all", seed=1, epochs=1))
    left, right = (
        restore.restore_run(str(tmp_path / name), "last").serving.values for name in ("1", "alone")
    )
    np.testing.assert_allclose(left["user"], right["user"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"features": "gruop"}, "has no feature 'gruop'; it has group, tags, price"),
        ({"features": "group", "backbone": "sasrec"}, "sasrec reads no features of users"),
    ],
)
def test_refusals(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, "run", **knobs), data, worlds.one_device())


def test_a_cap_without_features_is_refused(data):
    run = _run(data, "run", most_feature_values=3)
    with pytest.raises(ConfigError, match="is not used with --features=none; add --features=all"):
        config.check_used(run, ["most_feature_values"])
    config.check_used(_run(data, "run", features="all"), ["most_feature_values"])
