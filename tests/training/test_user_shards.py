"""Runs whose users are split over the devices: the same numbers, and memory that falls."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.config import make_run
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset, load
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import UserShards, make_layout
from slgr_jax.training import build, loop, restore, state, step
from slgr_jax.training.validation import Validation

SMALL = {"dim": 8, "batch_size": 32, "patience": 0, "steps_per_dispatch": 3, "user_shards": 8}
GUIDED = {"guidance": "pairwise", "teacher": "t", "lambda": 0.5}
SEQUENCE = {"max_history": 4, "layers": 1, "hidden": 8, "table_optimizer": "adagrad"}
CLICK = {"max_history": 4, "mlp": (8,), "table_optimizer": "adagrad", "ranking": True}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"negatives": "popularity"},
    "calibrated": {**GUIDED, "gate": "calibrated", "item_bias": True},
    "budget": {**GUIDED, "gate": "budget", "table_dtype": "bfloat16"},
    "lists": {
        **GUIDED,
        "teacher": "below",
        "guidance": "list_kl",
        "list_kl_sample_weights": True,
        "list_kl_places": 3,
        "list_kl_samples": 3,
        "gate": "calibrated",
        "lists_per_step": 16,
        "labelled_per_step": 16,
        "loss": "softmax",
    },
    "softmax": {"loss": "sampled_softmax", "shared_negatives": 16},
    "sasrec": {**GUIDED, "backbone": "sasrec", "gate": "calibrated", **SEQUENCE},
    "gru4rec": {"backbone": "gru4rec", "loss": "bce", **SEQUENCE},
    "bert4rec": {"backbone": "bert4rec", **SEQUENCE},
    "features": {"features": "group,price", "item_bias": True},
    "lightgcn": {"backbone": "lightgcn", "layers": 2, "dropout": 0.2, **GUIDED},
    "deepfm": {**CLICK, **GUIDED, "backbone": "deepfm", "gate": "paper", "features": "all"},
    "din": {**CLICK, "backbone": "din", "rows": "rated", "rating_threshold": 3.0},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """43 users: shards do not have equally many."""
    groups = [[f"g{u % 3}"] for u in range(43)]
    hours = np.arange(430) % 5 / 2.0
    world = worlds.random_dataset(
        tmp_path_factory.mktemp("data") / "d",
        n_users=43,
        categories=3,
        ratings=True,
        features=[
            worlds.feature("group", "user", groups),
            features_lib.numeric("price", "item", np.arange(30) / 3.0, np.ones(30, bool)),
            features_lib.numeric("hour", "interaction", hours, np.arange(430) < 258),
        ],
    )
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(43), rng.integers(0, 3, 43) * 4)
    items = np.concatenate([np.sort(rng.permutation(30)[:n]) for n in np.bincount(users)])
    scores = rng.random(users.size).astype(np.float32)
    for name, unlisted in (("t", "unknown"), ("below", "below")):
        worlds.teach(
            world,
            users.astype(np.int32),
            items.astype(np.int32),
            scores,
            name=name,
            unlisted=unlisted,
        )
    return world


def _made(dataset, workdir, layout, **knobs):
    run = make_run(str(dataset.path), str(workdir), **{**SMALL, **knobs})
    made = build.build(run, dataset, layout)
    return made.trainer, made.arrays


def _trained(trainer, arrays, steps):
    begin = state.init_state(trainer, 0)
    key = jax.random.key_data(jax.random.key(1))
    end, sums, _ = step.make_run_steps(trainer)(begin, arrays, key, np.int32(steps))
    return state.make_serving_state(trainer)(end, arrays.context), sums


@pytest.mark.parametrize(
    ("name", "table_shards"),
    [
        ("plain", 1),
        ("calibrated", 2),
        ("budget", 1),
        ("lists", 2),
        ("softmax", 2),
        ("sasrec", 2),
        pytest.param("gru4rec", 1, marks=pytest.mark.slow),
        pytest.param("bert4rec", 1, marks=pytest.mark.slow),
        ("features", 2),
        ("lightgcn", 2),
        ("deepfm", 1),
        pytest.param("din", 2, marks=pytest.mark.slow),
    ],
)
def test_four_devices_have_the_numbers_of_one(dataset, tmp_path, name, table_shards):
    """What is drawn and what is learned, to rounding; with items split over two of them, too. A
    validation of users where they are has the metrics of all users on one device."""
    trainer, arrays = _made(dataset, tmp_path, worlds.one_device(), **RUNS[name])
    serving, sums = _trained(trainer, arrays, 10)
    expected = state.by_user(trainer, serving)
    assert expected.values.get("user", np.zeros(43)).shape[0] == 43
    rounding = 2**-6 if name == "budget" else 2e-4
    layout = make_layout(table_shards=table_shards, devices=jax.devices()[:4])
    on_four, on_each = _made(dataset, tmp_path, layout, **RUNS[name])
    split, other_sums = _trained(on_four, on_each, 10)
    got = state.by_user(on_four, split)
    for table, values in expected.values.items():
        np.testing.assert_allclose(got.values[table], values, rtol=rounding, atol=1e-3)
    for key, value in sums.items():
        assert float(other_sums[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-5)

    metrics = Validation(on_four, dataset, on_each.context)(split)
    whole = worlds.one_device()
    _, looked_up = restore.backbone_and_context(trainer.config, dataset, native=False)
    gathered = jax.device_put(jax.device_get(got), whole.replicated)
    alone = Validation(dataclasses.replace(trainer, layout=whole), dataset, whole.put(looked_up))
    assert metrics == pytest.approx(alone(gathered), rel=1e-6)


def _held(tree: Any) -> set[int]:
    """Bytes of a device, of each."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards:
            held[part.device] = held.get(part.device, 0) + part.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("name", ["calibrated", "sasrec", "lightgcn"])
def test_what_belongs_to_users_falls_with_the_devices(dataset, tmp_path, name):
    knobs = {**RUNS[name], "unlisted_share": 0.5}
    one = None
    for devices in (1, 2, 4, 8):
        layout = make_layout(devices=jax.devices()[:devices])
        trainer, arrays = _made(dataset, tmp_path, layout, **knobs)
        of_users = [arrays.interactions.own, arrays.guidance.own]
        if name == "lightgcn":
            of_users += [arrays.context.graph.offsets, arrays.context.graph.items]
        if name == "sasrec":
            of_users.append(arrays.context.histories)
        else:
            begin = state.init_state(trainer, 0)
            serving = state.make_serving_state(trainer)(begin, arrays.context)
            of_users += [begin.tables["user"], serving.values["user"]]
        sizes = [_held(part) for part in of_users]
        assert all(len(size) == 1 for size in sizes), "each device has as much"
        held = [size.pop() for size in sizes]
        one = one or held
        assert held == [size // devices for size in one]
        # What is left whole is of items, or a number.
        assert max(x.size for x in (*arrays.interactions.whole, *arrays.guidance.whole)) <= 30


def test_a_run_goes_on_elsewhere_and_is_served_whole(dataset, tmp_path):
    """Begun on four devices with two table shards, finished on two, restored on three."""
    knobs = {**SMALL, **RUNS["calibrated"], "epochs": 4}

    def run(name: str, **more: Any):
        return make_run(str(dataset.path), str(tmp_path / name), **{**knobs, **more})

    with worlds.runs_on(4):
        loop.train(run("split", epochs=2, table_shards=2))
    with worlds.runs_on(3), pytest.raises(ConfigError, match=r"user_shards=8 is not a multiple of"):
        loop.train(run("split"))
    with worlds.runs_on(4), pytest.raises(ConfigError, match=r"--user_shards: 8 -> 4"):
        loop.train(run("split", user_shards=4))
    with worlds.runs_on(2):
        resumed = loop.train(run("split"))
    with worlds.runs_on(1):
        whole = loop.train(run("whole"))
        expected = restore.restore_run(str(tmp_path / "whole"))
    assert resumed.best_metric == pytest.approx(whole.best_metric, rel=1e-3)
    for devices, which in ((3, "best"), (4, "best"), (2, "last")):
        with worlds.runs_on(devices):
            got = restore.restore_run(str(tmp_path / "split"), which)
            if which == "last":
                expected = restore.restore_run(str(tmp_path / "whole"), which)
        for name, values in got.serving.values.items():
            assert values.shape == expected.serving.values[name].shape
            np.testing.assert_allclose(values, expected.serving.values[name], rtol=1e-3, atol=1e-4)


REFUSED = {
    "--interactions_edges": {
        "backbone": "lightgcn",
        "guidance": "interactions",
        "teacher": "t",
        "interactions_edges": True,
    },
    "--guidance=hint": {"guidance": "hint", "teacher_vectors": "v"},
    "--negatives=in_batch": {"negatives": "in_batch"},
    "--pair_selection=largest_gap": {**GUIDED, "pair_selection": "largest_gap"},
    "--reference_runs": {**GUIDED, "uncertainty": "ensemble", "reference_runs": "a,b"},
    "--init_from": {"init_from": "other"},
    "--kernels=native": {"kernels": "native"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_would_be_whole_on_a_device_is_refused(named):
    with pytest.raises(ConfigError, match=rf"^--user_shards=8: {named}.*; drop one of them$"):
        make_run("data", "run", user_shards=8, **REFUSED[named])


def test_a_backbone_of_ones_own_may_read_anything_and_is_refused(monkeypatch):
    monkeypatch.setitem(config.LOSSES_OF, "theirs", ("bpr",))
    with pytest.raises(ConfigError, match=r"^--user_shards=8: --backbone=theirs reads what is on"):
        make_run("data", "run", user_shards=8, backbone="theirs")


@pytest.mark.parametrize(
    ("knobs", "own"),
    [
        ({"backbone": "sasrec", "user_shards": 8}, True),
        ({"backbone": "sasrec"}, False),
        ({"backbone": "deepfm", "user_shards": 8}, False),  # rows drawn outside the test part too
        ({"backbone": "din", "user_shards": 8, "rows": "rated", "rating_threshold": 3.0}, True),
        ({"user_shards": 8, "features": "group"}, False),
    ],
)
def test_who_reads_own_users_alone(knobs, own):
    assert make_run("data", "run", **knobs).reads_own_users is own


def test_sizes_that_shards_cannot_share_are_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"--batch_size=20 is not a multiple of the 8 shards of"):
        _made(dataset, tmp_path, worlds.one_device(), batch_size=20)
    with pytest.raises(ConfigError, match=r"--labelled_per_step=12 is not a multiple of the 8"):
        _made(dataset, tmp_path, worlds.one_device(), **RUNS["calibrated"], labelled_per_step=12)


def test_layouts_know_their_users(dataset, tmp_path):
    trainer, _ = _made(dataset, tmp_path, worlds.one_device())
    users = trainer.layout.users
    np.testing.assert_array_equal(users.by_row.ravel()[users.row], np.arange(43))
    assert users.row.max() < users.table_rows
    assert dataclasses.replace(trainer.layout, users=None).table_rows(43, of_users=True) == 128
    assert pathlib.Path(trainer.config.workdir) == tmp_path


def test_shards_are_those_that_users_are_numbered_by(tmp_path, caplog):
    """Or as many of them together; dealt, and all read, where that cannot be: a line says so."""
    by_shard = worlds.dataset_by_shard(tmp_path, 6)
    bounds = by_shard.user_bounds
    caplog.set_level(logging.INFO, "slgr_jax")

    def layout(dataset: Dataset, count: int) -> UserShards:
        run = make_run(str(dataset.path), "run", **{**SMALL, "user_shards": count})
        with worlds.runs_on(1):
            own = restore.load_own_users(run)
            np.testing.assert_array_equal(own.train.items, dataset.train.items)
            users = restore.with_users(restore.layout_of(run), run, dataset).users
            read = restore.with_users(restore.layout_of(run), run, own).users
        assert users is not None
        np.testing.assert_array_equal(read.row, users.row)
        return users

    for count in (6, 3, 1):
        users = layout(by_shard, count)
        shards = [users.of_shard(shard) for shard in range(count)]
        ends = bounds[:: 6 // count]
        assert [shard.tolist() for shard in shards] == [
            list(range(*pair)) for pair in itertools.pairwise(ends.tolist())
        ]
    assert caplog.messages == []

    for dataset, count, how in (
        (by_shard, 4, "with --user_shards=6, which is no multiple of 4; slgr prepare"),
        (load(tmp_path / "by_id"), 4, "without --user_shards; slgr prepare --user_shards=4 (all"),
    ):
        users = layout(dataset, count)
        np.testing.assert_array_equal(users.row, UserShards.deal(dataset.history, count).row)
        (line,) = caplog.messages
        assert how in line
        caplog.clear()
