"""Frozen vectors with an adapter: plain recomputation, no write, sharding, serving, refusals."""

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
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import make_layout
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import adapters, vector_maps
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads, RowAccess
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import (
    build,
    checkpoint,
    loop,
    multi_seed,
    programs,
    run_directory,
    step,
)
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH = 24, 20, 5
NO_TEXT = (3, 11)  # items without a vector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6)
    rng = np.random.default_rng(0)
    items, users = (
        Vectors(rng.normal(2.0, 3.0, (count, WIDTH)).astype(np.float32), has)
        for count, has in (
            (ITEMS, ~np.isin(np.arange(ITEMS), NO_TEXT)),
            (USERS, np.ones(USERS, bool)),
        )
    )
    embeddings.write(dataset, "text", items, users, users_from="file")
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str, **knobs) -> config.RunConfig:
    values = {"dim": 6, "batch_size": 16, "epochs": 1, "patience": 0, "init_std": 1.0}
    values |= {"item_vectors": "text", "vector_dtype": "float32", "kernels": "xla"}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _standard(data: Dataset, side: str) -> np.ndarray:
    """Vectors of a side as an adapter gets them, NaN without one; in plain numpy."""
    vectors = getattr(embeddings.load(data, "text"), f"{side}s")
    seen = {"item": data.popularity, "user": data.history}[side] > 0
    trained = vectors.values[vectors.has & seen].astype(np.float64)
    spread = np.sqrt(((trained - trained.mean(axis=0)) ** 2).mean())
    z = (vectors.values - trained.mean(axis=0)) / spread
    return np.where(vectors.has[:, None], z, np.nan)


def _adapted(data: Dataset, params, side: str, name: str) -> np.ndarray:
    """[R, D] what the adapter called `name` makes of vectors, in plain loops."""
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), params["adapters"][name])
    gate, out = layers.pop("gate", None), []
    counts = {"item": data.train.items, "user": data.train.users}[side].tolist()
    for row, z in enumerate(_standard(data, side)):
        for number in range(len(layers)):
            layer = layers[f"layer_{number}"]
            z = (np.maximum(z, 0) if number else z) @ layer["kernel"] + layer["bias"]
        if gate is not None:
            logit = gate["weight"] * np.log(1 + counts.count(row)) + gate["bias"]
            z = z / (1 + np.exp(-logit))
        out.append(np.nan_to_num(z))
    return np.array(out)


def _values(experiment, state):
    return {
        name: np.asarray(embedding_table.values_of(state.tables[name], spec), np.float64)
        for name, spec in experiment.trainer.backbone.tables.items()
    }


def _view(experiment, state, users, items):
    """Logits of candidates by the step's own access."""
    access, context = experiment.trainer.access, experiment.arrays.context
    assert isinstance(access, RowAccess)
    reads = Reads({"x": Candidates(Queries(jnp.asarray(users)), jnp.asarray(items))}, {})
    leaves = access.read(state.tables, context, reads)
    params = state.params["backbone"]
    return access.view(params, leaves, context, reads, None).scores("x", None)


def _squares(experiment, state):
    access, context = experiment.trainer.access, experiment.arrays.context
    queries = Queries(jnp.asarray(USER_IDS))
    reads = Reads({"x": Candidates(queries, jnp.asarray(ITEM_IDS))}, {})
    leaves = access.read(state.tables, context, reads)
    return access.squares(state.params["backbone"], leaves, context, reads)["x"]


USER_IDS, ITEM_IDS = np.array([0, 7, 23]), np.array([[0, 1], [14, 3], [11, 11]], np.int32)


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [
        ({"kernels": "native"}, {"user": 1, "item": 1}),
        ({"adapter_hidden": (4,), "user_vectors": "text"}, {"user": 1, "item": 1}),
        ({"item_rows": False}, {"user": 1, "item": 0}),
        ({"item_rows": False, "user_vectors": "text", "user_rows": False}, {"user": 0, "item": 0}),
        ({"vector_l2": 0.25}, {"user": 1, "item": 1}),
        ({"adapter_gate": True, "user_vectors": "text"}, {"user": 1, "item": 1}),
    ],
)
def test_mf_scores_and_serves_rows_with_what_vectors_come_to(data, knobs, rows):
    if knobs.get("kernels") == "native":
        worlds.need_native_kernels()
    experiment = build.build(_run(data, "run", **knobs), data)
    state = state_lib.init_state(experiment.trainer, 0)
    for params in state.params["backbone"]["adapters"].values():
        if "gate" in params:  # begins at 1/2, whatever the count
            assert params["gate"] == {"weight": 0.0, "bias": 0.0}
            params["gate"] = {"weight": jnp.float32(0.7), "bias": jnp.float32(-1.1)}
    values = _values(experiment, state)
    assert set(values) == {name for name, kept in rows.items() if kept}
    backbone_params = state.params["backbone"]
    sums = {}
    for side, count in (("user", USERS), ("item", ITEMS)):
        sums[side] = values.get(side, np.zeros((count, 6)))
        if side in backbone_params["adapters"]:
            sums[side] = sums[side] + _adapted(data, backbone_params, side, side)
    seen = sums["user"].copy()
    seen[:, -1] = 1.0  # meets the item's bias
    expected = np.einsum("nd,ncd->nc", seen[USER_IDS], sums["item"][ITEM_IDS])
    np.testing.assert_allclose(
        _view(experiment, state, USER_IDS, ITEM_IDS), expected, rtol=1e-4, atol=1e-5
    )
    # The penalty is on rows and on what vectors come to, each by itself.
    parts = {side: [values[side]] if side in values else [] for side in sums}
    for side in backbone_params["adapters"]:
        share = experiment.config.vectors.vector_l2
        parts[side].append(np.sqrt(share) * _adapted(data, backbone_params, side, side))
    norms = {side: sum((x**2).sum(axis=1) for x in of_side) for side, of_side in parts.items()}
    expected = norms["user"][USER_IDS] + norms["item"][ITEM_IDS].sum(axis=1)
    np.testing.assert_allclose(_squares(experiment, state), expected, rtol=1e-4)

    served = state_lib.make_serving_state(experiment.trainer)(state, experiment.arrays.context)
    for side, table in sums.items():
        np.testing.assert_allclose(served.values[side], table, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_makes_rows_as_long_as_drawn_ones():
    for hidden in ((), (64,)):
        adapter = vector_maps.Adapter("item", 1, 128, 32, hidden, init_std=0.5)
        z = np.random.default_rng(0).normal(size=(500, 128)).astype(np.float32)
        made = adapter.apply(
            adapter.init(jax.random.key(0)), np.pad(z, ((0, 0), (0, 1)), constant_values=1)
        )
        length = np.sqrt(np.square(made).sum(axis=1).mean())
        assert length == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize(
    "knobs",
    [
        {"backbone": "lightgcn"},
        {"backbone": "lightgcn", "item_rows": False},
        {"backbone": "sasrec", "heads": 1, "max_history": 4},
        {"backbone": "gru4rec", "item_rows": False, "loss": "bce", "max_history": 4},
        {"backbone": "bert4rec", "heads": 1, "max_history": 4},
        {"backbone": "deepfm", "max_history": 4, "user_vectors": "text"},
        {"backbone": "din", "max_history": 4, "item_rows": False},
        {"loss": "softmax"},
        {"loss": "sampled_softmax", "shared_negatives": 8, "item_rows": False},
    ],
)
def test_steps_agree_with_serving_and_train_the_adapter_alone(data, knobs):
    """The step's scores are those of whole served tables; vectors stay to the bit; A learns."""
    experiment = build.build(_run(data, "run", **knobs), data)
    trainer, arrays = experiment.trainer, experiment.arrays
    state = state_lib.init_state(trainer, 0)
    before = jax.tree.map(
        np.asarray, (state.params["backbone"]["adapters"], arrays.context.vectors)
    )
    run_steps = step.make_run_steps(trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, sums, health = run_steps(state, arrays, key, np.int32(3))
    assert int(health.step) == -1
    assert np.isfinite(float(sums["loss"]))
    moved = jax.tree.map(
        lambda new, old: bool(np.any(new != old)),
        state.params["backbone"]["adapters"],
        before[0],
    )
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, arrays.context.vectors, before[1])
    assert not [name for name in trainer.backbone.tables if "vector" in name]

    served = state_lib.make_serving_state(trainer)(state, arrays.context)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state_lib.abstract_serving(trainer).values)
    assert shapes == {name: value.shape for name, value in served.values.items()}
    for name, adapter in adapters.of(trainer.backbone).items():
        if name not in trainer.backbone.tables and not getattr(trainer.backbone, "whole", False):
            made = _adapted(data, state.params["backbone"], adapter.side, name)
            np.testing.assert_allclose(served.values[name], made, rtol=1e-3, atol=1e-4)


def test_eight_devices_and_shards_of_the_vectors_equal_one(data, eight_devices):
    results = []
    for layout in (worlds.one_device(), make_layout(table_shards=4)):
        run = _run(data, "run", table_shards=layout.table_shards, max_history=4, backbone="deepfm")
        experiment = build.build(run, data, layout)
        trainer, arrays = experiment.trainer, experiment.arrays
        if layout.table_shards > 1:
            assert arrays.context.vectors.item.sharding.spec == layout.table_spec
        state = state_lib.init_state(trainer, 0)
        state = jax.device_put(
            state, jax.tree.map(lambda x: x.sharding, state_lib.abstract_state(trainer))
        )
        key = jax.random.key_data(jax.random.key(1))
        state, sums, _ = step.make_run_steps(trainer)(state, arrays, key, np.int32(2))
        served = state_lib.make_serving_state(trainer)(state, arrays.context)
        results.append((float(sums["loss"]), jax.tree.map(np.asarray, served.values)))
    (loss, values), (other_loss, other_values) = results
    assert loss == pytest.approx(other_loss, rel=1e-4)
    for name, table in values.items():
        np.testing.assert_allclose(table, other_values[name], rtol=1e-3, atol=1e-4)


def test_no_step_costs_the_rows_of_the_vectors(data):
    """Vectors are gathered by id: nothing of their table's size but the table itself."""
    experiment = build.build(_run(data, "run"), data)
    trainer, arrays = experiment.trainer, experiment.arrays
    state = state_lib.init_state(trainer, 0)
    key = jax.random.key_data(jax.random.key(1))
    text = step.make_run_steps(trainer).lower(state, arrays, key, np.int32(1)).as_text()
    rows = experiment.trainer.layout.padded_rows(ITEMS)
    of_size = [line for line in text.splitlines() if f"tensor<{rows}x{WIDTH + 1}xf32>" in line]
    size = f"tensor<{rows}x{WIDTH + 1}xf32>"
    made = [line for line in of_size if line.split("->")[-1].strip() == size]
    gathered = [line for line in of_size if "stablehlo.gather" in line or "_take" in line]
    assert of_size  # an argument
    assert gathered, of_size
    assert made == []


def test_a_run_is_served_evaluated_resumed_and_folded_into(data, tmp_path):
    run = _run(data, tmp_path / "run", vector_dtype="bfloat16")
    loop.train(run)
    record = run_directory.read_record(run.workdir)
    assert record["vectors"]["item_vectors"]["without"] == len(NO_TEXT)
    loop.train(_run(data, tmp_path / "run", vector_dtype="bfloat16", epochs=2))

    trained, last = (serving.load(run.workdir, which=which) for which in ("best", "last"))
    assert trained.restored.context.vectors is None
    users = [f"u{user}" for user in range(4)]
    items = ["i0", "i11", "i5", "i3"]
    scores, vectors = trained.scores(users, items), trained.vectors()
    products = np.einsum("nd,nd->n", vectors.users[:4], vectors.items[[0, 11, 5, 3]])
    np.testing.assert_allclose(products, scores, rtol=1e-4, atol=1e-5)
    assert np.abs(last.scores(users, items) - scores).max() < 1.0  # the state after the best
    listed = trained.recommend(users, k=ITEMS, mask_seen=False)
    best = np.argsort(-(vectors.users[:4] @ vectors.items.T), axis=1, kind="stable")
    assert listed.items == [[f"i{item}" for item in row] for row in best]
    folded = trained.fold_in({"new": ["i0", "i4"]})
    assert np.isfinite(folded.scores(["new"], ["i7"])).all()


def test_seeds_trained_together_equal_each_alone(data, tmp_path):
    def runs(where: str) -> list[config.RunConfig]:
        return [_run(data, tmp_path / f"{where}{seed}", seed=seed) for seed in (0, 1)]

    multi_seed.train_seeds(runs("together"))
    for run in runs("alone"):
        loop.train(run)
    for seed in (0, 1):
        one, other = (
            json.loads((tmp_path / f"{where}{seed}/log.jsonl").read_text().splitlines()[-1])
            for where in ("together", "alone")
        )
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"item_rows": False}])
def test_a_run_begins_with_the_last_rows_of_another_not_with_sums(data, tmp_path, knobs):
    first = _run(data, tmp_path / "first", **knobs)
    loop.train(first)
    experiment = build.build(_run(data, tmp_path / "next", init_from=first.workdir, **knobs), data)
    begun = programs.make_programs(experiment).init(np.int32(9))
    saved = checkpoint.Checkpoints(first.workdir, writable=False)
    last = saved.restore_state(state_lib.abstract_state(experiment.trainer))
    saved.close()
    for name, spec in experiment.trainer.backbone.tables.items():
        np.testing.assert_array_equal(
            begun.tables[name][: spec.rows], last.tables[name][: spec.rows]
        )
    jax.tree.map(np.testing.assert_array_equal, begun.params, last.params)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"backbone": "sasrec", "user_vectors": "text"}, r"--user_vectors: SASRec has no rows of"),
        ({"user_rows": False}, r"--nouser_rows leaves users their vectors alone: add --user_vec"),
        ({"item_rows": False, "init_item_vectors": "text"}, r"is what rows begin with, and --noit"),
        (
            {"adapter_gate": True, "adapter_experts": 2},
            r"--adapter_gate weighs one map, and the 2 of",
        ),
        (
            {"adapter_gate": True, "adapter_chunks": True},
            r"and --adapter_chunks weighs each chunk; drop one",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, "run", **knobs), data)


def test_vectors_that_are_all_alike_are_refused(data):
    alike = Vectors(np.ones((ITEMS, 3), np.float32), np.ones(ITEMS, bool))
    users = Vectors(np.ones((USERS, 3), np.float32), np.zeros(USERS, bool))
    embeddings.write(data, "alike", alike, users, users_from="file")
    with pytest.raises(InputError, match=r"--item_vectors: .* all of these are alike"):
        build.build(_run(data, "run", item_vectors="alike"), data)
