"""LLM-ESR's two views of a history, against plain numpy: attention, steps, serving, refusals."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import begun_runs
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
from slgr_jax.models.backbones import dual_view
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads
from slgr_jax.models.scoring import Scoring, moments, query_vectors
from slgr_jax.sampling.context import Queries, recent
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, loop
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, DIM, LENGTH = 14, 12, 5, 4, 4
NO_TEXT = (3, 11)  # items without a vector
BACKBONES = ("sasrec", "gru4rec")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    price = worlds.feature("genre", "item", [[f"g{i % 3}"] for i in range(ITEMS)])
    dataset = worlds.random_dataset(
        path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True, features=[price]
    )
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


def _run(data: Dataset, workdir: pathlib.Path | str = "run", **knobs: Any) -> config.RunConfig:
    values = {"backbone": "sasrec", "dim": DIM, "batch_size": 8, "epochs": 1, "patience": 0}
    values |= {"item_vectors": "text", "init_item_vectors": "text", "dual_view": True}
    values |= {"init_std": 1.0, "vector_dtype": "float32", "kernels": "xla", "dropout": 0.0}
    values |= {"max_history": LENGTH, "hidden": 8, "layers": 1}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _begun(data: Dataset, **knobs: Any) -> tuple[Any, Any]:
    """A run after three steps."""
    return begun_runs.after_three_steps(_run(data, **knobs), data)


def _normed(x: np.ndarray, params: Any) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return normed * params["scale"] + params.get("bias", 0.0)


def _attended(params: Any, x: np.ndarray, y: np.ndarray, real: np.ndarray, heads: int) -> Any:
    """Cross-attention of sequences [N, L, D], in loops over places and heads."""
    out, width = np.zeros_like(x), x.shape[-1] // heads
    for n in range(len(x)):
        q = _normed(x[n], params["query_norm"]) @ params["query"]["kernel"]
        k = _normed(y[n], params["key_norm"]) @ params["key"]["kernel"]
        v = y[n] @ params["value"]["kernel"]
        for place in range(x.shape[1]):
            seen = [i for i in range(place + 1) if real[n, i]]
            mixed = np.zeros(x.shape[-1])
            for head in range(heads) if seen else ():
                part = slice(head * width, (head + 1) * width)
                logits = np.array([q[place, part] @ k[i, part] for i in seen]) / np.sqrt(width)
                weights = np.exp(logits - logits.max())
                mixed[part] = weights @ v[seen][:, part] / weights.sum()
            out[n, place] = mixed @ params["output"]["kernel"] + params["output"]["bias"]
    return out


def _host(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def test_cross_attention_is_that_of_plain_numpy_and_its_gradient_is_right():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, LENGTH, 6)).astype(np.float32)
    real = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
    attention = dual_view.CrossAttention(heads=2)
    params = attention.init(jax.random.key(0), x, y, real)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    got = attention.apply({"params": params}, x, y, jnp.asarray(real))
    expected = _attended(_host(params), x.astype(np.float64), y.astype(np.float64), real, 2)
    assert_allclose(np.asarray(got)[real], expected[real], rtol=1e-4, atol=1e-5)

    def of(params: Any, x: Any, y: Any) -> jax.Array:
        out = attention.apply({"params": params}, x, y, jnp.asarray(real))
        return jnp.where(real[..., None], out, 0.0)

    check_grads(of, (params, jnp.asarray(x), jnp.asarray(y)), 1, modes=("rev",), atol=3e-2)


def _views(data: Dataset, experiment: Any, state: Any) -> np.ndarray:
    """[I, 2 D] of all items: own rows, and mapped vectors, in plain numpy."""
    spec = experiment.trainer.backbone.tables["item"]
    own = np.asarray(embedding_table.values_of(state.tables["item"], spec), np.float64)
    vectors = embeddings.load(data, "text").items
    trained = vectors.values[vectors.has & (data.popularity > 0)].astype(np.float64)
    spread = np.sqrt(((trained - trained.mean(axis=0)) ** 2).mean())
    z = (vectors.values - trained.mean(axis=0)) / spread
    layer = _host(state.params["backbone"]["adapters"]["item"]["layer_0"])
    mapped = np.where(vectors.has[:, None], z @ layer["kernel"] + layer["bias"], 0.0)
    return np.concatenate([own, mapped], axis=1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_and_serving_see_both_views(data, backbone):
    experiment, state = _begun(data, backbone=backbone)
    trainer, context = experiment.trainer, experiment.arrays.context
    rows = _views(data, experiment, state)
    served = state_lib.make_serving_state(trainer)(state, context)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state_lib.abstract_serving(trainer).values)
    assert shapes == {"item": rows.shape}
    assert_allclose(served.values["item"], rows, rtol=1e-4, atol=1e-5)

    # The encoder reads what plain attention makes of a history's views, once each.
    moment = moments(context, "valid")
    queries = Queries(jnp.arange(USERS), moment)
    ids, real = (np.asarray(x) for x in recent(context.histories, queries, LENGTH))
    own, of_text = np.split(rows[ids], 2, axis=-1)
    cross = _host(state.params["backbone"][dual_view.CROSS])
    asked = (
        _attended(cross["of_ids"], of_text, own, real, 2),
        _attended(cross["of_texts"], own, of_text, real, 2),
    )
    encoder, params = trainer.backbone._encoder, state.params["backbone"]
    states = np.concatenate(
        [
            encoder.query_vectors(
                params, {"item": jnp.asarray(x, jnp.float32)}, context, queries, dropout=None
            )
            for x in asked
        ],
        axis=1,
    )
    scoring = Scoring(served, context, moment)
    got = query_vectors(trainer.backbone, scoring, queries)
    assert_allclose(got, states, rtol=1e-3, atol=1e-4)

    listed = np.array([[0, 3], [4, 11], [2, 2]], np.int32)
    some = jax.tree.map(lambda x: x[:3], queries)
    reads = Reads({"x": Candidates(some, jnp.asarray(listed))}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(params, leaves, context, reads, None)
    expected = np.einsum("nd,ncd->nc", states[:3], rows[listed])
    assert_allclose(view.scores("x", None), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_place_sees_what_it_predicts(data, backbone):
    """States of a window before an event are the same whatever the event, of either view; its last
    one is what serving asks with."""
    experiment, state = _begun(data, backbone=backbone)
    model, params = experiment.trainer.backbone, state.params["backbone"]
    rng = np.random.default_rng(2)
    events = rng.normal(size=(3, LENGTH + 1, 2 * DIM)).astype(np.float32)
    real = np.array([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]], bool)

    def states(events: np.ndarray) -> np.ndarray:
        window = model.window(params, jnp.asarray(events), jnp.asarray(real), key=jax.random.key(0))
        return np.asarray(window.states)

    before = states(events)
    for place in range(LENGTH + 1):
        for part in (slice(0, DIM), slice(DIM, 2 * DIM)):
            other = events.copy()
            other[:, place, part] = rng.normal(size=(3, DIM))
            after = states(other)
            assert_allclose(after[:, :place], before[:, :place], atol=1e-6)
            if 0 < place < LENGTH:  # both halves of a state read both views
                for half in (slice(0, DIM), slice(DIM, 2 * DIM)):
                    assert np.abs(after[1, place, half] - before[1, place, half]).max() > 1e-4


@pytest.mark.parametrize(
    "knobs", [{}, {"backbone": "gru4rec", "adapter_gate": True, "features": "all"}]
)
def test_a_run_is_served_goes_on_and_scores_new_items_by_their_texts(data, tmp_path, knobs):
    run = _run(data, tmp_path / "run", **knobs)
    loop.train(run)
    loop.train(dataclasses.replace(run, train=dataclasses.replace(run.train, epochs=2)))
    trained = serving.load(run.workdir)
    vectors = trained.vectors()
    assert vectors.items.shape == (ITEMS, 2 * DIM)
    scores = trained.scores(["u0", "u1", "u2"], ["i0", "i11", "i5"])
    products = np.einsum("nd,nd->n", vectors.users[:3], vectors.items[[0, 11, 5]])
    assert_allclose(products, scores, rtol=1e-4, atol=1e-5)

    # An item that is like a known one in text has its second view, and nothing of its first.
    of_text = embeddings.load(data, "text").items.values
    grown = trained.with_items(["new"], of_text[5:6])
    made = grown.vectors().items
    assert_allclose(made[:ITEMS], vectors.items)
    assert (made[ITEMS, :DIM] == 0).all()
    if not knobs:  # the gate of an item that nobody has is another
        assert_allclose(made[ITEMS, DIM:], vectors.items[5, DIM:], rtol=1e-4, atol=1e-5)
    assert np.abs(made[ITEMS, DIM:]).max() > 0

    if not knobs:
        folded = trained.fold_in({"new": ["i0", "i4", "i7"]})
        states = folded.vectors().users
        assert states.shape == (1, 2 * DIM)
        assert_allclose(folded.scores(["new"], ["i7"]), states @ vectors.items[7], rtol=1e-4)


def test_self_distillation_is_of_both_views(data):
    """LLM-ESR's two halves in one run: users are compared by all 2 D numbers."""
    knobs = {"guidance": "llm_esr", "teacher_vectors": "text", "llm_esr_neighbours": 3}
    experiment, _ = _begun(data, **knobs, **{"lambda": 1.0})
    arrays = experiment.arrays.guidance
    assert arrays.width == 2 * DIM


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"backbone": "bert4rec"}, r"--backbone=bert4rec does not; use sasrec or gru4rec"),
        ({"backbone": "mf"}, r"--backbone=mf does not; use sasrec or gru4rec, or drop it"),
        ({"item_vectors": ""}, r"items' vectors beside their rows: add --item_vectors=NAME"),
        (
            {"item_rows": False, "init_item_vectors": ""},
            r"rows for one of its views, and --noitem_rows leaves none; drop one",
        ),
        ({"adapter_experts": 2}, r"a row and its vector apart, and --adapter_experts=2 makes one"),
        ({"adapter_chunks": True}, r"and --adapter_chunks makes one of them"),
        (
            {"init_item_vectors": "", "train_only": "adapters", "init_from": "r"},
            r"leaves the network as it is, and --dual_view is one of its own",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _run(data, **knobs)


def test_heads_divide_a_view(data):
    with pytest.raises(ConfigError, match=r"--dim=4 is not a multiple of --dual_view_heads=3"):
        build.build(_run(data, dual_view_heads=3), data)


def test_a_run_without_views_is_no_beginning(data, tmp_path):
    knobs = {"dual_view": False, "init_item_vectors": ""}
    loop.train(_run(data, tmp_path / "plain", **knobs))
    run = _run(data, "run", init_item_vectors="", init_from=str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"dual_view"):
        build.build(run, data)
