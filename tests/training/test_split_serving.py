"""What a run of --table_shards validates and keeps as its best lies in blocks, one on each device:
the numbers of whole tables, on any devices that go on with it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
import worlds

from slgr_jax.config import RunConfig, make_run
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ManifestError
from slgr_jax.evaluation import device_scoring
from slgr_jax.mesh import Layout, make_layout
from slgr_jax.models.embedding_table import values_of
from slgr_jax.models.scoring import ServingState
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, checkpoint, loop, restore, state
from slgr_jax.training.programs import make_programs
from slgr_jax.training.validation import Validation

USERS, ITEMS, PADDED = 40, 150, 256  # the third of four blocks is part of the catalogue's end
SMALL: dict[str, Any] = {"dim": 8, "batch_size": 32, "patience": 0, "steps_per_dispatch": 3}
SEQUENCE = {"max_history": 4, "layers": 1, "hidden": 8}
ROWS = {"rows": "rated", "rating_threshold": 3.0, "loss": "bce"}

MOVES = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    world = worlds.random_dataset(
        tmp_path_factory.mktemp("data") / "d",
        n_users=USERS,
        n_items=ITEMS,
        ratings=True,
        features=[
            worlds.feature("group", "user", [[f"g{u % 3}"] for u in range(USERS)]),
            features_lib.numeric("price", "item", np.arange(ITEMS) / 9.0, np.ones(ITEMS, bool)),
        ],
    )
    rng = np.random.default_rng(0)
    items, users = (
        Vectors(rng.normal(0.5, 2.0, (rows, 5)).astype(np.float32), np.arange(rows) != 3)
        for rows in (ITEMS, USERS)
    )
    embeddings.write(world, "text", items, users, users_from="file")
    return world


def _learner(dataset: Dataset, layout: Layout, **knobs: Any) -> build.Experiment:
    return build.build(make_run(str(dataset.path), "run", **SMALL, **knobs), dataset, layout)


def _split(devices: int, table_shards: int) -> Layout:
    return make_layout(table_shards=table_shards, devices=jax.devices()[:devices])


@pytest.mark.parametrize(
    "knobs",
    [
        {"item_bias": True, **ROWS},
        {"features": "group,price", "item_vectors": "text"},
        {"item_vectors": "text", "item_rows": False},
        {"backbone": "lightgcn", "layers": 2},
        {"backbone": "sasrec", **SEQUENCE},
        {"backbone": "sasrec", "user_shards": 8, **SEQUENCE, "rows": "sampled"},
        {"backbone": "lightgcn", "layers": 2, "user_shards": 8},
        pytest.param({"backbone": "gru4rec", **SEQUENCE}, marks=pytest.mark.slow),
        pytest.param({"backbone": "bert4rec", **SEQUENCE}, marks=pytest.mark.slow),
    ],
    ids=lambda knobs: "-".join(str(x) for x in knobs.values() if isinstance(x, str)),
)
def test_blocks_are_validated_with_the_numbers_of_whole_tables(dataset, knobs):
    whole, split = (
        _learner(dataset, layout, **knobs) for layout in (worlds.one_device(), _split(4, 2))
    )
    metrics, served = [], []
    for experiment in (whole, split):
        trainer, context = experiment.trainer, experiment.arrays.context
        pick = state.make_serving_state(trainer)
        serving = pick(state.init_state(trainer, 0), context)
        wanted = state.abstract_serving(trainer)
        for got, of_state in zip(jax.tree.leaves(serving), jax.tree.leaves(wanted), strict=True):
            assert got.shape == of_state.shape
            assert got.sharding.is_equivalent_to(of_state.sharding, got.ndim)
        metrics.append(Validation(trainer, dataset, context)(serving))
        served.append(state.by_user(trainer, serving).values)
        assert trainer.serves_blocks == (trainer is split.trainer)
        if trainer.serves_blocks:
            item = serving.values["item"]
            assert {part.data.shape[0] for part in item.addressable_shards} == {PADDED // 2}
            np.testing.assert_array_equal(item[ITEMS:], 0.0)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    for name, values in served[0].items():
        np.testing.assert_allclose(served[1][name], values, rtol=1e-5, atol=1e-6)


def _compiled_scoring(monkeypatch, trainer, dataset, context, serving) -> list[str]:
    """What the program that scores a chunk of a validation sends between devices."""
    programs: list[str] = []
    score = device_scoring.score_chunk

    def noted(*args: Any, **named: Any) -> jax.Array:
        programs.append(score.lower(*args, **named).compile().as_text())
        return score(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(device_scoring, "score_chunk", noted)
        Validation(trainer, dataset, context)(serving)
    return [line for line in programs[0].splitlines() if re.search(rf" ({MOVES})\(", line)]


def test_no_device_has_more_than_its_blocks_of_a_validated_state(dataset, monkeypatch):
    """Bytes fall with the table shards, making it moves nothing between devices, and ranking with
    it moves no table."""
    held = {}
    for shards in (1, 2, 4):
        experiment = _learner(dataset, _split(4, shards), table_dtype="bfloat16")
        trainer, context = experiment.trainer, experiment.arrays.context
        begin = state.init_state(trainer, 0)
        pick: Any = state.make_serving_state(trainer)
        served = pick(begin, context)
        values = served.values
        held[shards] = sum(part.addressable_shards[0].data.nbytes for part in values.values())
        if shards > 1:
            text = pick.lower(begin, context).compile().as_text()
            assert not re.search(MOVES, text)
            name, spec = next(iter(trainer.backbone.tables.items()))
            expected = values_of(begin.tables[name], spec)
            np.testing.assert_array_equal(values[name][: spec.rows], expected)
            compiled = _compiled_scoring(monkeypatch, trainer, dataset, context, served)
            assert not [line for line in compiled if re.search(rf"\[({PADDED}|128),", line)]
    assert held[2] == 2 * held[4] == (PADDED + 128) * 8 * 4 // 2
    assert held[1] == (ITEMS + USERS) * 8 * 4


def test_click_models_serve_whole_tables(dataset):
    layout = _split(4, 2)
    trainer = _learner(dataset, layout, backbone="deepfm", mlp=(8,), max_history=4).trainer
    assert not trainer.serves_blocks
    wanted = state.abstract_serving(trainer).values["item"]
    assert wanted.shape[0] == ITEMS
    assert wanted.sharding == layout.replicated


LAYOUTS = {"one": (1, 1), "whole": (2, 1), "two": (4, 2), "three": (3, 3), "four": (4, 4)}


@pytest.mark.parametrize("wrote", [*LAYOUTS, "before"])
def test_a_best_state_restores_on_any_devices(dataset, tmp_path, monkeypatch, wrote):
    """To the bit; what was kept whole beside split tables, as it was before, too."""
    trainer = _learner(dataset, worlds.one_device(), features="group,price").trainer
    learners = {
        name: dataclasses.replace(trainer, layout=_split(*mesh)) for name, mesh in LAYOUTS.items()
    }
    writer = learners["two" if wrote == "before" else wrote]
    with monkeypatch.context() as patch:
        if wrote == "before":
            patch.setattr(state.Learner, "serves_blocks", False)
        shapes = state.abstract_serving(writer)
    rng = np.random.default_rng(0)
    known = {
        name: rng.random((spec.rows, spec.width)).astype(np.float32)
        for name, spec in writer.backbone.tables.items()
    }

    def laid_out(shape: jax.ShapeDtypeStruct, values: np.ndarray) -> jax.Array:
        filled = np.pad(values, ((0, shape.shape[0] - len(values)), (0, 0)))
        return jax.device_put(filled, shape.sharding)

    begin = state.init_state(writer, 0)
    values = {name: laid_out(shapes.values[name], rows) for name, rows in known.items()}
    best = ServingState(begin.params["backbone"], values)
    saved = checkpoint.Checkpoints(str(tmp_path), writable=True)
    saved.save(begin, best, checkpoint.Progress(step=1))
    saved.wait()
    for name, learner in learners.items():
        wanted = state.abstract_serving(learner)
        if "three" in (name, wrote):  # its padding is another, of trained tables as well
            restored = saved.restore_best(wanted)
        else:
            _, restored = saved.restore(state.abstract_state(learner), wanted)
        for table, rows in restored.values.items():
            assert rows.sharding == wanted.values[table].sharding
            assert rows.shape == wanted.values[table].shape
            expected = np.pad(known[table], ((0, len(rows) - len(known[table])), (0, 0)))
            np.testing.assert_array_equal(rows, expected)
    wide = dataclasses.replace(wanted, values={"item": jax.ShapeDtypeStruct((150, 9), np.float32)})
    with pytest.raises(ManifestError, match=r"best/values/item is \[.*8\], expected \[150, 9\]"):
        saved.restore_best(wide)
    saved.close()


def test_a_run_goes_on_elsewhere_and_others_begin_with_it(dataset, tmp_path):
    """Begun in two blocks, finished whole on other devices; what begins with its rows takes none
    that fill a table up."""

    def run(name: str, **more: Any) -> RunConfig:
        return make_run(str(dataset.path), str(tmp_path / name), **SMALL, kernels="xla", **more)

    with worlds.runs_on(1):
        whole = loop.train(run("whole", epochs=2))
        expected = restore.restore_run(str(tmp_path / "whole"))
    with worlds.runs_on(4):
        loop.train(run("split", epochs=1, table_shards=2))
        began = run("more", init_from=str(tmp_path / "split"), table_shards=4)
        in_blocks = make_programs(build.build(began, dataset, _split(4, 4))).init(np.int32(0))
    with worlds.runs_on(1):
        best = restore.restore_run(str(tmp_path / "split"))
    for name, values in best.serving.values.items():
        np.testing.assert_array_equal(in_blocks.tables[name][: len(values), :8], values)
    with worlds.runs_on(2):
        resumed = loop.train(run("split", epochs=2))
        got = restore.restore_run(str(tmp_path / "split"))
    assert resumed.best_metric == pytest.approx(whole.best_metric, rel=1e-3)
    for name, values in expected.serving.values.items():
        np.testing.assert_allclose(got.serving.values[name], values, rtol=1e-3, atol=1e-4)
