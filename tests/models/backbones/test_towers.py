"""PAD's towers against plain numpy: bins, shares, steps, serving, phases, refusals."""

from __future__ import annotations

import pathlib
from typing import Any

import begun_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose, assert_array_equal

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import tower_views
from slgr_jax.models.backbones.tower_views import ALIGNED, IDS, TEXTS, TOWERS
from slgr_jax.models.scoring import Scoring, catalogue_vectors, moments, query_vectors
from slgr_jax.sampling.context import recent
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, loop, programs, restore
from slgr_jax.training import state as state_lib
from slgr_jax.training.vector_products import frequency_bins

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, DIM, LENGTH = 14, 12, 5, 4, 4
NO_TEXT = (3, 11)  # items without a vector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True)
    rng = np.random.default_rng(0)
    has = ~np.isin(np.arange(ITEMS), NO_TEXT)
    items = Vectors(rng.normal(2.0, 3.0, (ITEMS, WIDTH)).astype(np.float32), has)
    nobody = Vectors(np.zeros((USERS, WIDTH), np.float32), np.zeros(USERS, bool))
    embeddings.write(dataset, "text", items, nobody, users_from="file")
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str = "run", **knobs: Any) -> config.RunConfig:
    values = {"backbone": "sasrec", "dim": DIM, "batch_size": 8, "epochs": 1, "patience": 0}
    values |= {"item_vectors": "text", "towers": "three", "dropout": 0.0, "kernels": "xla"}
    values |= {"init_std": 1.0, "vector_dtype": "float32", "max_history": LENGTH}
    values |= {"hidden": 8, "layers": 1}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _host(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def test_bins_are_tenths_of_the_interactions_and_one_of_items_without_any():
    # 100 interactions: 40 | 20 | 10 10 | 5 5 5 | 2 2 | 1 | 0.
    counts = np.array([5, 40, 0, 10, 2, 5, 20, 1, 10, 5, 2])
    expected = [8, 0, 10, 6, 9, 8, 4, 9, 6, 8, 9]
    assert_array_equal(frequency_bins(counts), expected)
    assert_array_equal(frequency_bins(np.zeros(2, np.int64)), [10, 10])


def test_shares_begin_as_the_authors_do():
    views = tower_views.ThreeViews("item", ITEMS, WIDTH, DIM, (), 1.0)
    begins = views.init(jax.random.key(0))["shares"]
    assert_allclose(begins[:, [0, 5, 10]], [[1, 0.5, 0], [-4, -4.5, -5], [0, 0.5, 1]], atol=1e-6)


def test_merged_rows_begin_as_long_as_drawn_ones():
    views = tower_views.MergedView("item", 2000, 32, 16, (), 0.5)
    params = views.init(jax.random.key(1))
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2000, 16)).astype(np.float32) * 0.5 / 4.0
    stored = np.concatenate([rng.normal(size=(2000, 32)), np.ones((2000, 1))], axis=1)
    x = np.asarray(views.apply(params, jnp.asarray(stored, jnp.float32), None, rows))[:, :16]
    assert np.sqrt((x**2).sum(axis=1).mean()) == pytest.approx(0.5, rel=0.2)


def _mapped(layer: Any, z: np.ndarray, has: np.ndarray) -> np.ndarray:
    return np.where(has[:, None], z @ layer["kernel"] + layer["bias"], 0.0)


def _merged(params: Any, rows: np.ndarray, mapped: np.ndarray) -> np.ndarray:
    inner, outer = params["merge"]["inner"], params["merge"]["outer"]
    hidden = np.concatenate([rows, mapped], axis=1) @ inner["kernel"] + inner["bias"]
    return np.maximum(hidden, 0.0) @ outer["kernel"] + outer["bias"]


def _views(data: Dataset, experiment: Any, state: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """What each tower reads of every item, [I, D], and its weights, [I, 3], in plain numpy."""
    spec = experiment.trainer.backbone.tables["item"]
    rows = np.asarray(embedding_table.values_of(state.tables["item"], spec), np.float64)
    first, second = np.split(rows, 2, axis=1)
    vectors = embeddings.load(data, "text").items
    trained = vectors.values[vectors.has & (data.popularity > 0)].astype(np.float64)
    spread = np.sqrt(((trained - trained.mean(axis=0)) ** 2).mean())
    z = (vectors.values - trained.mean(axis=0)) / spread
    params = _host(state.params["backbone"]["adapters"]["item"])
    merged = _merged(params[ALIGNED], second, _mapped(params[ALIGNED]["layer_0"], z, vectors.has))
    texts = _mapped(params[TEXTS]["layer_0"], z, vectors.has)
    believed = 1 / (1 + np.exp(-params["shares"]))
    of_items = believed[:, frequency_bins(data.popularity).astype(int)].T
    return [first, merged, texts], of_items / of_items.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("backbone", ["sasrec", "gru4rec"])
def test_scores_are_the_towers_weighed_by_the_candidates_bin(data, backbone):
    experiment, state = begun_runs.after_three_steps(_run(data, backbone=backbone), data)
    trainer, context = experiment.trainer, experiment.arrays.context
    views, weights = _views(data, experiment, state)
    served = state_lib.make_serving_state(trainer)(state, context)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state_lib.abstract_serving(trainer).values)
    assert shapes == {"item": (ITEMS, 3 * DIM + 3)}
    assert_allclose(served.values["item"], np.concatenate([*views, weights], axis=1), atol=1e-5)

    # A tower by itself is the sequence backbone over its view, with parameters of its own.
    scoring = Scoring(served, context, moments(context, "valid"))
    queries = scoring.queries(jnp.arange(USERS))
    ids, _ = (np.asarray(x) for x in recent(context.histories, queries, LENGTH))
    encoder, params = trainer.backbone.alone(IDS), state.params["backbone"]
    total = 0.0
    for number, (tower, view) in enumerate(zip(TOWERS, views, strict=True)):
        events = {"item": jnp.asarray(view[ids], jnp.float32)}
        asked = encoder.query_vectors(params[tower], events, context, queries, dropout=None)
        total = total + np.asarray(asked) @ view.T * weights[:, number]
    got = query_vectors(trainer.backbone, scoring, queries)
    scores = got @ catalogue_vectors(trainer.backbone, scoring).T
    assert_allclose(scores, total, rtol=1e-3, atol=1e-4)

    # No place of training sees what it predicts, and the last one is what serving asks with.
    events = jnp.asarray(np.asarray(served.values["item"])[np.arange(5)[None] % ITEMS])
    real = jnp.ones((1, 5), bool)
    model = trainer.backbone

    def states(events: jax.Array) -> np.ndarray:
        return np.asarray(model.window(params, events, real, key=jax.random.key(0)).states)

    before, after = states(events), states(events.at[:, 2].set(1.0))
    assert before.shape == (1, 4, 3 * DIM)
    assert_allclose(after[:, :2], before[:, :2], atol=1e-6)
    for part in range(3):
        assert np.abs((after - before)[0, 2, part * DIM : (part + 1) * DIM]).max() > 1e-4


@pytest.fixture(scope="module")
def ids(data, tmp_path_factory):
    """The first phase: a run without vectors."""
    run = _run(data, tmp_path_factory.mktemp("ids") / "run", item_vectors="", towers="none")
    loop.train(run)
    return run


@pytest.fixture(scope="module")
def aligned(data, tmp_path_factory):
    """The second phase, for one epoch, so that its best is its last."""
    knobs = {"towers": "aligned", "guidance": "pad_mmd", "teacher_vectors": "text"}
    run = _run(data, tmp_path_factory.mktemp("aligned") / "run", **knobs)
    loop.train(run)
    return run


def _begun(data: Dataset, run: config.RunConfig) -> tuple[Any, Any]:
    """What a run with --init_from begins with, and what it would without."""
    experiment = build.build(run, data)
    state = programs.make_programs(experiment).init(np.int32(run.train.seed))
    return state, state_lib.init_state(experiment.trainer, run.train.seed)


def _values(state: Any, width: int) -> np.ndarray:
    spec = embedding_table.TableSpec(ITEMS, width, 1.0)
    return np.asarray(embedding_table.values_of(state.tables["item"], spec))


def test_the_second_phase_begins_as_the_first(data, ids, tmp_path):
    run = _run(data, tmp_path / "r", towers="aligned", init_from=ids.workdir)
    state, fresh = _begun(data, run)
    served = restore.restore_run(ids.workdir).serving
    assert_array_equal(_values(state, DIM), served.values["item"])
    params = dict(state.params["backbone"])
    maps = params.pop("adapters")
    jax.tree.map(assert_array_equal, params, served.params)
    jax.tree.map(assert_array_equal, maps, fresh.params["backbone"]["adapters"])


def test_a_new_item_is_merged_without_a_row(data, aligned):
    trained, served = serving.load(aligned.workdir), restore.restore_run(aligned.workdir).serving
    of_text = embeddings.load(data, "text").items.values
    made = trained.with_items(["new"], of_text[5:6]).vectors().items
    assert made.shape == (ITEMS + 1, DIM)
    mapped = np.asarray(served.values["item"])[5:6, 2 * DIM :]
    merged = _merged(_host(served.params["adapters"]["item"]), np.zeros((1, DIM)), mapped)
    assert_allclose(made[ITEMS:], merged, rtol=1e-4, atol=1e-5)


def test_towers_begin_as_the_runs_that_are_named(data, ids, aligned, tmp_path):
    """Rows and encoders of both; texts, shares and the optimiser's slots are fresh."""
    both = {"init_from": aligned.workdir, "init_ids_from": ids.workdir, "seed": 3}
    state, fresh = _begun(data, _run(data, tmp_path / "three", **both))
    of_ids, of_aligned = (restore.restore_run(run.workdir).serving for run in (ids, aligned))
    values = _values(state, 2 * DIM)
    assert_array_equal(values[:, :DIM], of_ids.values["item"])
    assert_array_equal(values[:, DIM:], np.asarray(of_aligned.values["item"])[:, DIM : 2 * DIM])
    slots = [np.asarray(each.tables["item"])[:, 2 * DIM :] for each in (state, fresh)]
    assert_array_equal(*slots)

    params, drawn = state.params["backbone"], fresh.params["backbone"]
    encoder = dict(of_aligned.params)
    maps = encoder.pop("adapters")["item"]
    expected = {IDS: of_ids.params, ALIGNED: encoder, TEXTS: drawn[TEXTS]}
    expected["adapters"] = {"item": {**drawn["adapters"]["item"], ALIGNED: maps}}
    assert params.keys() == expected.keys()
    jax.tree.map(assert_array_equal, dict(params), expected)

    message = r"--init_ids_from=.*run is beside a run with --towers=aligned, and --init_from=.*run"
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, init_from=ids.workdir, init_ids_from=ids.workdir), data)
    other = _run(data, **both | {"init_ids_from": aligned.workdir})
    with pytest.raises(ConfigError, match=r"--init_ids_from=.*run reads the vectors text, and"):
        build.build(other, data)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"backbone": "bert4rec"}, r"--towers=three .* --backbone=bert4rec does not; use sasrec"),
        ({"item_vectors": ""}, r"--towers=three reads items' vectors .*: add --item_vectors=NAME"),
        ({"item_rows": False}, r"--towers=three reads items' rows .*, and --noitem_rows leaves"),
        ({"init_item_vectors": "text"}, r"one row of an item begins with, and --towers=three has"),
        ({"dual_view": True}, r"--towers=three and --dual_view are two ways to read items' vec"),
        ({"adapter_gate": True}, r"by bins of its frequency, and --adapter_gate by its count"),
        ({"init_ids_from": "r"}, r"--init_ids_from=r is what one of --towers=three begins with"),
        (
            {"train_only": "adapters", "init_from": "r"},
            r"leaves the network as it is, and --towers=three is one of its own",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _run(data, **knobs)
