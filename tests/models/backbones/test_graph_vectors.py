"""Vectors where a graph smooths rows, as CoLaKG and LLMRec have them, against plain numpy."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from jax.test_util import check_grads
from numpy.testing import assert_allclose

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import semantic_neighbours
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, loop, step
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, NEIGHBOURS = 14, 12, 5, 3
NO_TEXT = (3, 11)  # items without a vector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=5)
    rng = np.random.default_rng(0)
    items, users = (
        Vectors(rng.normal(2.0, 3.0, (count, WIDTH)).astype(np.float32), has)
        for count, has in (
            (ITEMS, ~np.isin(np.arange(ITEMS), NO_TEXT)),
            (USERS, np.arange(USERS) != 5),
        )
    )
    embeddings.write(dataset, "text", items, users, users_from="file")
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str = "run", **knobs: Any) -> config.RunConfig:
    values = {"backbone": "lightgcn", "dim": 4, "batch_size": 16, "epochs": 1, "patience": 0}
    values |= {"item_vectors": "text", "user_vectors": "text", "adapter_neighbours": NEIGHBOURS}
    values |= {"init_std": 1.0, "vector_dtype": "float32", "kernels": "xla", "layers": 2}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def _standardised(data: Dataset, side: str) -> np.ndarray:
    """[R, Z], NaN without a vector."""
    vectors = getattr(embeddings.load(data, "text"), f"{side}s")
    counts = {"item": data.popularity, "user": data.history}[side]
    trained = vectors.values[vectors.has & (counts > 0)].astype(np.float64)
    spread = np.sqrt(((trained - trained.mean(axis=0)) ** 2).mean())
    z = (vectors.values - trained.mean(axis=0)) / spread
    return np.where(vectors.has[:, None], z, np.nan)


def _nearest(z: np.ndarray, item: int, count: int) -> list[int]:
    if np.isnan(z[item]).any():
        return []
    cosines = {
        j: z[item] @ z[j] / np.linalg.norm(z[item]) / np.linalg.norm(z[j])
        for j in range(len(z))
        if j != item and not np.isnan(z[j]).any()
    }
    return sorted(cosines, key=lambda j: -cosines[j])[:count]


def _taken(h: np.ndarray, z: np.ndarray, neighbours: list[list[int]], params: Any) -> np.ndarray:
    """h' of every item, in loops."""
    of_neighbour, of_item = np.asarray(params["weights"], np.float64)
    mapped = np.nan_to_num(z) @ np.asarray(params["map"], np.float64)
    out = h.copy()
    for item, others in enumerate(neighbours):
        if not others:
            continue
        logits = np.array([of_neighbour @ mapped[j] + of_item @ mapped[item] for j in others])
        logits = np.where(logits > 0, logits, 0.2 * logits)
        alpha = np.exp(logits) / np.exp(logits).sum()
        out[item] = (h[item] + _elu(alpha @ h[others])) / 2
    return out


def _tables(experiment: Any, state: Any) -> dict[str, np.ndarray]:
    specs = experiment.trainer.backbone.tables
    return {
        side: np.asarray(embedding_table.values_of(state.tables[side], specs[side]), np.float64)
        for side in ("user", "item")
    }


def _params(state: Any) -> Any:
    of_adapters = state.params["backbone"]["adapters"]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), of_adapters)


def _smoothed(data: Dataset, user: np.ndarray, item: np.ndarray) -> dict[str, np.ndarray]:
    """What LightGCN of two layers makes of rows, by a whole adjacency matrix."""
    edges = np.zeros((USERS, ITEMS))
    edges[data.train.users, data.train.items] = 1
    degrees = [np.maximum(edges.sum(axis), 1) for axis in (1, 0)]
    scaled = edges / np.sqrt(np.outer(*degrees))
    layer, total = (user, item), [user, item]
    for _ in range(2):
        layer = (scaled @ layer[1], scaled.T @ layer[0])
        total = [a + b for a, b in zip(total, layer, strict=True)]
    return {"user": total[0] / 3, "item": total[1] / 3}


def _of_neighbours(data: Dataset, experiment: Any, state: Any) -> dict[str, np.ndarray]:
    """CoLaKG's rows, smoothed."""
    params, rows = _params(state), _tables(experiment, state)
    for side in params:
        z = _standardised(data, side)
        h = (rows[side] + _elu(np.nan_to_num(z) @ params[side]["kernel"])) / 2
        rows[side] = np.where(np.isnan(z[:, :1]), rows[side], h)
    z = _standardised(data, "item")
    neighbours = [_nearest(z, item, NEIGHBOURS) for item in range(ITEMS)]
    rows["item"] = _taken(rows["item"], z, neighbours, params["item"]["attention"])
    return _smoothed(data, rows["user"], rows["item"])


def _with_sides(
    data: Dataset, experiment: Any, state: Any, weights: dict[str, float]
) -> dict[str, np.ndarray]:
    """LLMRec's sum: rows smoothed, and what vectors come to smoothed apart, each of one length."""
    params, rows = _params(state), _tables(experiment, state)
    total = _smoothed(data, rows["user"], rows["item"])
    for side, weight in weights.items():
        z, layer = _standardised(data, side), params[f"{side}_side"]["layer_0"]
        features = {name: np.zeros_like(table) for name, table in rows.items()}
        mapped = z @ layer["kernel"] + layer["bias"]
        features[side] = np.where(np.isnan(z[:, :1]), 0.0, mapped)
        for name, table in _smoothed(data, features["user"], features["item"]).items():
            length = np.linalg.norm(table, axis=1, keepdims=True)
            total[name] = total[name] + weight * table / np.where(length > 0, length, 1.0)
    return total


def test_attention_is_that_of_plain_numpy_and_its_gradient_is_right():
    rng = np.random.default_rng(1)
    h, z = (rng.normal(size=(7, width)).astype(np.float32) for width in (4, 5))
    neighbours = [[1, 4, 6], [], [0, 3], [2, 1, 5], [5], [6, 0, 2], [3, 4, 1]]
    padded = np.array([(row + [-1] * 3)[:3] for row in neighbours], np.int32)
    params = semantic_neighbours.init_attention(jax.random.key(0), 5)
    got = semantic_neighbours.smoothed(params, jnp.asarray(h), jnp.asarray(z), jnp.asarray(padded))
    host = jax.tree.map(np.asarray, params)
    assert_allclose(got, _taken(h.astype(np.float64), z, neighbours, host), rtol=1e-5, atol=1e-6)

    def of(params: Any, h: Any) -> jax.Array:
        return semantic_neighbours.smoothed(params, *(jnp.asarray(x) for x in (h, z, padded)))

    check_grads(of, (params, jnp.asarray(h)), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


SIDES = {"adapter_neighbours": 0, "item_side_weight": 0.3, "user_side_weight": 1.7}
_with_both_sides = functools.partial(_with_sides, weights={"item": 0.3, "user": 1.7})
USERS_ALONE = {"adapter_neighbours": 0, "item_vectors": "", "user_side_weight": 1.7}


def _begun(data: Dataset, **knobs: Any) -> tuple[Any, Any]:
    """A run and its state after three steps, in which every parameter of its adapters moved."""
    experiment = build.build(_run(data, **knobs), data)
    state = state_lib.init_state(experiment.trainer, 0)
    begun = _params(state)
    key = jax.random.key_data(jax.random.key(1))
    run_steps = step.make_run_steps(experiment.trainer)
    state, _, health = run_steps(state, experiment.arrays, key, np.int32(3))
    assert int(health.step) == -1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), begun, _params(state))
    assert min(jax.tree.leaves(moved)) > 0
    return experiment, state


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, _of_neighbours),
        ({"user_vectors": ""}, _of_neighbours),
        (SIDES, _with_both_sides),
        ({**SIDES, "kernels": "native"}, _with_both_sides),
        (USERS_ALONE, functools.partial(_with_sides, weights={"user": 1.7})),
    ],
)
def test_a_step_and_serving_see_what_the_graph_makes_of_vectors(data, knobs, expected):
    if knobs.get("kernels") == "native":
        worlds.need_native_kernels()
    experiment, state = _begun(data, **knobs)
    trainer, context = experiment.trainer, experiment.arrays.context
    tables = expected(data, experiment, state)
    served = state_lib.make_serving_state(trainer)(state, context)
    assert set(served.values) == set(tables)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state_lib.abstract_serving(trainer).values)
    assert shapes == {side: table.shape for side, table in tables.items()}
    for side, table in tables.items():
        assert_allclose(served.values[side], table, rtol=1e-4, atol=1e-5)

    reads = Reads({"x": Candidates(Queries(jnp.asarray(SOME)), jnp.asarray(LISTED))}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(state.params["backbone"], leaves, context, reads, None)
    scores = np.einsum("nd,ncd->nc", tables["user"][SOME], tables["item"][LISTED])
    assert_allclose(view.scores("x", None), scores, rtol=1e-4, atol=1e-5)


SOME, LISTED = np.array([0, 7, 13]), np.array([[0, 1], [4, 3], [11, 11]], np.int32)


def test_neighbours_are_the_items_with_the_nearest_vectors(data):
    context = build.build(_run(data), data).arrays.context
    z = _standardised(data, "item")
    for item, row in enumerate(np.asarray(context.neighbours)):
        assert [j for j in row.tolist() if j >= 0] == _nearest(z, item, NEIGHBOURS)


@pytest.mark.parametrize("knobs", [{}, SIDES])
def test_the_penalty_is_on_rows_and_on_what_is_added_to_them(data, knobs):
    """Of CoLaKG what each vector is mapped to; side features have one length anyway."""
    experiment, state = _begun(data, **knobs)
    trainer, context = experiment.trainer, experiment.arrays.context
    reads = Reads({"x": Candidates(Queries(jnp.asarray(SOME)), jnp.asarray(LISTED))}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    squares, params = np.zeros(len(SOME)), _params(state)
    for side, ids in (("user", SOME), ("item", LISTED)):
        parts = [_tables(experiment, state)[side]]
        if side in params:
            parts.append(np.nan_to_num(_elu(_standardised(data, side) @ params[side]["kernel"])))
        norms = sum((part**2).sum(axis=1) for part in parts)
        squares += norms[ids].reshape(len(SOME), -1).sum(axis=1)
    got = trainer.access.squares(state.params["backbone"], leaves, context, reads)["x"]
    assert_allclose(got, squares, rtol=1e-4)


@pytest.mark.parametrize("knobs", [{"user_vectors": ""}, {**SIDES, "user_side_weight": 0.0}])
def test_a_run_is_served_and_goes_on_and_takes_no_new_items(data, tmp_path, knobs):
    """Serving needs neither vectors nor neighbours: it ranks by what it keeps."""
    knobs = knobs | {"user_vectors": ""}
    run = _run(data, tmp_path / "run", **knobs)
    loop.train(run)
    loop.train(_run(data, tmp_path / "run", **knobs, epochs=2))
    trained = serving.load(run.workdir)
    assert trained.restored.context.neighbours is None
    vectors, items = trained.vectors(), ["i0", "i11", "i5"]
    scores = trained.scores(["u0", "u1", "u2"], items)
    products = np.einsum("nd,nd->n", vectors.users[:3], vectors.items[[0, 11, 5]])
    assert_allclose(products, scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"lets items read their nei|adds texts of items behind"):
        trained.with_items(["new"], np.zeros((1, WIDTH), np.float32))
    if "item_side_weight" in knobs:
        with pytest.raises(ConfigError, match=r"folding in knows what a graph makes of rows alone"):
            trained.fold_in({"new": ["i0", "i4"]})
    else:
        folded = trained.fold_in({"new": ["i0", "i4"]})
        assert np.isfinite(folded.scores(["new"], ["i7"])).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"backbone": "mf"}, r"--backbone=mf has none; use lightgcn"),
        ({"item_rows": False}, r"takes the mean of a row and its vector, and --noitem_rows leaves"),
        ({"adapter_experts": 2}, r"=3 and --adapter_experts=2 are two ways to read vectors"),
        ({"adapter_chunks": True}, r"=3 and --adapter_chunks are two ways to read vectors"),
        ({"adapter_gate": True}, r"its vector, which --adapter_gate would weigh; drop one"),
        ({"adapter_hidden": (8, 4)}, r"one linear map, and --adapter_hidden=8,4 has layers"),
        ({"item_side_weight": 1.0}, r"--adapter_gate and --adapter_neighbours make rows of them"),
        ({**SIDES, "backbone": "mf"}, r"--backbone=mf has no graph; use lightgcn, or drop it: vec"),
        (
            {**SIDES, "item_rows": False},
            r"becomes of the items' rows, and --noitem_rows leaves no",
        ),
        ({**SIDES, "user_vectors": ""}, r"weighs what vectors come to: add --user_vectors=NAME"),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _run(data, **knobs)
