"""Vectors of users beside histories (LANE, SLIM), against plain numpy: steps, serving, refusals."""

from __future__ import annotations

import pathlib
from typing import Any

import begun_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.experiments.arms import ARMS, VECTORS
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import user_fusion
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads
from slgr_jax.models.scoring import Scoring, moments, query_vectors
from slgr_jax.sampling.context import Queries
from slgr_jax.serving import stablehlo
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, loop, objectives, step
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, DIM, LENGTH, SLOTS = 14, 12, 5, 4, 4, 3
SILENT = (2, 9)  # users of whom nobody has written anything
LANE = {"user_vectors": "preferences", "user_fusion": "attention", "user_fusion_heads": 2}
SLIM = {"user_vectors": "rationale", "user_fusion": "concat"}
CASES = [
    LANE,
    {**LANE, "backbone": "gru4rec", "adapter_gate": True},
    {**SLIM, "backbone": "bert4rec", "layers": 1},
    {**SLIM, "adapter_gate": True, "adapter_hidden": (3,)},
    {**SLIM, "dual_view": True, "init_item_vectors": "rationale", "item_vectors": "rationale"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True)
    rng = np.random.default_rng(0)
    counts = rng.integers(1, SLOTS + 1, (USERS, 1)).astype(np.int16)
    counts[list(SILENT)] = 0
    fields = {"preference": SLOTS}
    of_users = rng.normal(2.0, 3.0, (USERS, SLOTS, WIDTH)).astype(np.float16)
    of_items = rng.normal(2.0, 3.0, (ITEMS, SLOTS, WIDTH)).astype(np.float16)
    items = Chunks(of_items, np.ones((ITEMS, 1), np.int16), fields)
    users = Chunks(of_users, counts, fields)
    embeddings.write(dataset, "preferences", items, users, users_from="file")
    one = (
        Vectors(rng.normal(2.0, 3.0, (rows, WIDTH)).astype(np.float32), has)
        for rows, has in ((ITEMS, np.ones(ITEMS, bool)), (USERS, counts[:, 0] > 0))
    )
    embeddings.write(dataset, "rationale", *one, users_from="file")
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str = "run", **knobs: Any) -> config.RunConfig:
    values = {"backbone": "sasrec", "dim": DIM, "batch_size": 8, "epochs": 1, "patience": 0}
    values |= {"init_std": 1.0, "vector_dtype": "float32", "kernels": "xla", "dropout": 0.0}
    values |= {"max_history": LENGTH, "hidden": 8, "layers": 1}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _begun(data: Dataset, **knobs: Any) -> tuple[Any, Any]:
    """A run after three steps."""
    return begun_runs.after_three_steps(_run(data, **knobs), data)


# --- the formulas in plain numpy ------------------------------------------------------------------


def _host(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _normed(x: np.ndarray, params: Any) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-6) * params["scale"] + params["bias"]


def _dense(x: np.ndarray, params: Any) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0.0)


def _fused(state: np.ndarray, own: list[np.ndarray], g: float, params: Any, heads: int) -> Any:
    """f of one state and the mapped vectors that its user has."""
    if not own:
        return state
    if "map" in params:
        (p,) = own
        return state + g * _dense(np.concatenate([p, state]), params["map"])
    asked, width, mixed = _dense(state, params["query"]), len(state) // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [asked[part] @ _dense(p, params["key"])[part] / np.sqrt(width) for p in own]
        weights = np.exp(np.array(logits) - max(logits))
        of_head = [_dense(p, params["value"])[part] for p in own]
        mixed.append(weights @ np.array(of_head) / weights.sum())
    attended = _dense(np.concatenate(mixed), params["attended"])
    a = state + _normed(attended, params["attention_norm"])
    outer = _dense(np.maximum(_dense(a, params["inner"]), 0), params["outer"])
    return state + g * (a + _normed(outer, params["forward_norm"]) - state)


def _mapped(x: np.ndarray, layers: Any) -> np.ndarray:
    for number in range(sum(name.startswith("layer") for name in layers)):
        x = _dense(np.maximum(x, 0) if number else x, layers[f"layer_{number}"])
    return x


def _of_users(data: Dataset, run: config.RunConfig, params: Any) -> list[tuple[list[Any], float]]:
    """Of each user the mapped vectors, standardised, and g."""
    if run.vectors.user_fusion == "attention":
        (block,) = embeddings.load_chunks(data, "preferences", "users")
        own = [z[real].astype(np.float64) for z, real in zip(block.values, block.real, strict=True)]
    else:
        vectors = embeddings.load(data, "rationale").users
        pairs = zip(vectors.values, vectors.has, strict=True)
        own = [z[None][has[None]].astype(np.float64) for z, has in pairs]
    known = np.concatenate([z for z, n in zip(own, data.history, strict=True) if n])
    centre, spread = known.mean(axis=0), np.sqrt(((known - known.mean(axis=0)) ** 2).mean())
    layers = _host(params["adapters"]["user"])
    out = []
    for z, n in zip(own, data.history, strict=True):
        g = 1.0
        if run.vectors.adapter_gate:
            gate = layers["gate"]
            g = 1 / (1 + np.exp(-gate["weight"] * np.log1p(n) - gate["bias"]))
        out.append((list(_mapped((z - centre) / spread, layers)), float(g)))
    return out


def _all_fused(data: Dataset, experiment: Any, params: Any, states: np.ndarray, users: Any) -> Any:
    """[N, T, D] states of users, fused one by one."""
    of_users = _of_users(data, experiment.config, params)
    fusion, out = _host(params[user_fusion.FUSION]), np.zeros(states.shape)
    for n, user in enumerate(users):
        for t, state in enumerate(states[n].astype(np.float64)):
            out[n, t] = _fused(
                state, *of_users[user], fusion, experiment.config.vectors.user_fusion_heads
            )
    return out


def test_attention_to_preferences_is_that_of_plain_numpy_and_its_gradient_is_right():
    rng = np.random.default_rng(1)
    states = rng.normal(size=(2, 3, 6)).astype(np.float32)
    preferences = rng.normal(size=(2, SLOTS, 6)).astype(np.float32)
    real = jnp.asarray([[1, 0, 1], [1, 1, 1]], bool)
    attention = user_fusion.PreferenceAttention(heads=2)
    params = attention.init(jax.random.key(0), states, preferences, real, 0.0)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    got = attention.apply({"params": params}, states, preferences, real, 0.0)
    for n in range(2):
        own = [
            p.astype(np.float64)
            for p, is_real in zip(preferences[n], real[n], strict=True)
            if is_real
        ]
        for t in range(3):
            expected = _fused(states[n, t].astype(np.float64), own, 1.0, _host(params), 2)
            assert_allclose(got[n, t] + states[n, t], expected, rtol=1e-4, atol=1e-5)

    def of(params: Any, states: Any, preferences: Any) -> jax.Array:
        return attention.apply({"params": params}, states, preferences, real, 0.0)

    args = (params, jnp.asarray(states), jnp.asarray(preferences))
    check_grads(of, args, 1, modes=("rev",), atol=3e-2, rtol=3e-2)


# --- steps, serving -------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", CASES)
def test_queries_take_up_their_users_vectors_in_steps_and_in_serving(data, knobs):
    experiment, state = _begun(data, **knobs)
    trainer, context = experiment.trainer, experiment.arrays.context
    params, encoder = state.params["backbone"], trainer.backbone._encoder
    served = state_lib.make_serving_state(trainer)(state, context)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state_lib.abstract_serving(trainer).values)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, served.values)
    queries = Queries(jnp.arange(USERS), moments(context, "valid"))
    without = {name: values for name, values in served.values.items() if name != "user"}
    ids = encoder.query_ids(context, queries)
    rows = {"item": without["item"][ids["item"]]}
    plain = np.asarray(encoder.query_vectors(params, rows, context, queries, dropout=None))
    expected = _all_fused(data, experiment, params, plain[:, None], range(USERS))[:, 0]

    scoring = Scoring(served, context, queries.as_of)
    got = np.asarray(query_vectors(trainer.backbone, scoring, queries))
    assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert_array_equal(got[list(SILENT)], plain[list(SILENT)])
    assert (
        np.abs(got - plain)[[u for u in range(USERS) if u not in SILENT]].max(axis=1).min() > 1e-3
    )

    listed = np.arange(2 * USERS).reshape(USERS, 2).astype(np.int32) % ITEMS
    reads = Reads({"x": Candidates(queries, jnp.asarray(listed))}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(params, leaves, context, reads, None)
    products = np.einsum("nd,ncd->nc", expected, np.asarray(served.values["item"])[listed])
    assert_allclose(view.scores("x", None), products, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("knobs", CASES[:1] + CASES[3:4])
def test_every_place_of_a_window_learns_beside_its_own_users_vectors(data, knobs):
    """The loss of a batch is the softmax of states that were fused one by one."""
    experiment, state = _begun(data, **knobs)
    trainer, arrays = experiment.trainer, experiment.arrays
    params, context = state.params["backbone"], arrays.context
    keys = jax.random.split(jax.random.key(5), 1)
    batch = jax.tree.map(lambda x: x[0], step.draw_steps(trainer, keys, arrays)[0])
    reads = trainer.objective.reads(batch, context, None)
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(params, leaves, context, reads, None)
    key = jax.random.key(0)
    inputs = objectives.Inputs(
        batch, context, arrays.interactions, params, 0.0, 1, key, jnp.int32(0)
    )
    learned = trainer.objective.learn(view, inputs)

    ids, real = (np.asarray(x) for x in trainer.objective._events(batch, context))
    ids = np.concatenate([ids, np.asarray(batch.items[:, :1])], axis=1)
    real = np.concatenate([real, np.ones((len(ids), 1), bool)], axis=1)
    items = np.asarray(
        embedding_table.values_of(state.tables["item"], trainer.backbone.tables["item"])
    )
    window = trainer.backbone._encoder.window(
        params, jnp.asarray(items[ids]), jnp.asarray(real), key=key
    )
    users = np.asarray(batch.queries.users)
    states = _all_fused(data, experiment, params, np.asarray(window.states), users)
    assert len(set(users)) > 3
    scores = states @ items.T.astype(np.float64)
    log_shares = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    total = 0.0
    for n, t in zip(*np.nonzero(np.asarray(window.weights)), strict=True):
        total -= log_shares[n, t, ids[n, t + 1]] * float(batch.weights[n])
    assert float(learned.loss) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("knobs", [{**LANE, "item_vectors": "rationale"}, SLIM])
def test_a_run_is_served_and_new_users_are_their_histories_alone(data, tmp_path, knobs):
    run = _run(data, tmp_path / "run", **knobs)
    loop.train(run)
    trained = serving.load(run.workdir)
    vectors = trained.vectors()
    names, listed = [f"u{u}" for u in range(USERS)], [f"i{u % ITEMS}" for u in range(USERS)]
    scores = trained.scores(names, listed)
    products = np.einsum("nd,nd->n", vectors.users, vectors.items[np.arange(USERS) % ITEMS])
    assert_allclose(products, scores, rtol=1e-4, atol=1e-5)

    # Somebody new with the history of a user without vectors has that user's state.
    events = trained.restored.context.histories
    offsets, items = np.asarray(events.offsets), np.asarray(events.items)
    of = {u: [f"i{i}" for i in items[offsets[u] : offsets[u + 1]]] for u in (SILENT[0], 0)}
    folded = trained.fold_in({"like_silent": of[SILENT[0]], "like_0": of[0]}).vectors().users
    assert_allclose(folded[0], vectors.users[SILENT[0]], rtol=1e-5, atol=1e-6)
    assert np.abs(folded[1] - vectors.users[0]).max() > 1e-3

    if "item_vectors" in knobs:
        of_text = embeddings.load(data, "rationale").items.values
        grown = trained.with_items(["new"], of_text[5:6])
        assert_allclose(grown.scores(names[:3], listed[:3]), scores[:3], rtol=1e-5)

    # The exported programs take histories, and users or nobody.
    scoring, backbone = trained.restored.scoring("test"), trained.restored.backbone
    latest = [items[offsets[u] : offsets[u + 1]][-LENGTH:] for u in range(USERS)]
    rows = np.array([[*[-1] * (LENGTH - len(row)), *row] for row in latest], np.int32)
    places = np.arange(USERS, dtype=np.int32)
    asked = stablehlo.scores_of(backbone)(scoring, rows, places, places % ITEMS)
    assert_allclose(asked, scores, rtol=1e-4, atol=1e-5)
    asked = stablehlo.scores_of(backbone)(scoring, rows[:1], np.array([-1]), np.array([4]))
    assert_allclose(asked, folded[1] @ vectors.items[4], rtol=1e-4, atol=1e-5)
    exported = stablehlo.export_scorer(trained, 3)
    assert list(exported.signatures["top_k"]["inputs"]) == ["histories", "users", "exclude"]


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({**SLIM, "user_vectors": ""}, r"the states of their histories: add --user_vectors=NAME"),
        ({**SLIM, "backbone": "mf"}, r"a user is a history, sasrec, gru4rec, bert4rec; .* drop it"),
        (
            {**SLIM, "adapter_experts": 2},
            r"reads users' vectors by one map, --adapter_experts=2 by",
        ),
        ({**LANE, "adapter_chunks": True}, r"--user_fusion=attention and --adapter_chunks are two"),
        (
            {**SLIM, "user_rows": False},
            r"has no rows of users|no rows of users, which --nouser_rows",
        ),
        (
            {**SLIM, "train_only": "adapters", "init_from": "r"},
            r"leaves the network as it is, and --user_fusion=concat is one of its own",
        ),
        (
            {**LANE, "user_vectors": "rationale"},
            r"--user_fusion=attention chooses .* one vector a row; .* or take --user_fusion=concat",
        ),
        ({**LANE, "user_fusion_heads": 3}, r"states of 4 numbers .* --user_fusion_heads=3; change"),
        ({**SLIM, "user_fusion": "none"}, r"SASRec has no rows of users .* add --user_fusion"),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, **knobs), data)


def test_a_run_without_users_vectors_is_no_beginning(data, tmp_path):
    loop.train(_run(data, tmp_path / "plain"))
    run = _run(data, "run", **SLIM, init_from=str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"user_fusion: none -> concat"):
        build.build(run, data)


@pytest.mark.parametrize(("arm", "product"), [("lane", "preferences"), ("slim", "rationale")])
def test_arms_build(data, arm, product):
    knobs = {name: product if value == VECTORS else value for name, value in ARMS[arm].items()}
    build.build(_run(data, **knobs), data)
