"""CTRL: its loss against plain numpy, the vectors of rows, learning, refusals."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from list_teachers import draws_of
from numpy.testing import assert_allclose

from slgr_jax.config import CLICK_BACKBONES, make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import ctrl
from slgr_jax.guidance.alignment import AlignmentObserved
from slgr_jax.guidance.base import METHOD, Scored
from slgr_jax.models.backbones.base import PairBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import step
from slgr_jax.training.build import Experiment, build
from slgr_jax.training.state import init_state

USERS, ITEMS, Z = 24, 30, 5
NO_TEXT, SILENT = (3, 11), (2, 7)  # items and users without a vector


def _vectors(seed: int, rows: int, missing: tuple[int, ...] = ()) -> Vectors:
    values = np.random.default_rng(seed).normal(0.5, 2.0, (rows, Z)).astype(np.float32)
    has = ~np.isin(np.arange(rows), missing)
    return Vectors(np.where(has[:, None], values, 0), has)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("contrasted") / "d"
    dataset = worlds.random_dataset(
        path, n_users=USERS, n_items=ITEMS, timed=True, categories=3, per_user=6
    )
    items = _vectors(0, ITEMS, NO_TEXT)
    nobody = Vectors(np.zeros((USERS, Z), np.float32), np.zeros(USERS, bool))
    for name, users in (("text", _vectors(1, USERS, SILENT)), ("items_only", nobody)):
        embeddings.write(dataset, name, items, users, users_from="file")
    return dataset


def _experiment(data: Dataset, **knobs: Any) -> Experiment:
    values = {"guidance": "ctrl", "teacher_vectors": "text", "batch_size": 16, "dim": 4}
    values |= {"backbone": "dcnv2", "mlp": (6,), "max_history": 3, "kernels": "xla"}
    values |= {"ctrl_width": 6, "ctrl_subspaces": 3, "init_std": 0.5, "dropout": 0.0}
    run = make_run(str(data.path), "w", **values | knobs)
    return build(run, data, worlds.one_device())


# ----------------------------------------------------------------------------- against plain numpy


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def _alike(text: np.ndarray, row: np.ndarray, parts: int) -> float:
    """sum over the text's parts of the largest product with one of the row's."""
    pieces = [np.split(_unit(x), parts) for x in (text, row)]
    return float(sum(max(a @ b for b in pieces[1]) for a in pieces[0]))


def _expected(
    params: Any, lanes: list[Any], table: Any, parts: int, temperature: float
) -> tuple[float, int]:
    """3 loops: of each row with a text, what it is told from, in both directions."""
    projected, keys = [], []
    for lane in lanes:
        for side in range(2):
            item = int(lane.items[side])
            if not table.items_have[item] or (side and not lane.drawn):
                continue
            z = np.concatenate([table.users[lane.user], table.items[item]])
            pair = (
                z @ params["texts"]["kernel"] + params["texts"]["bias"],
                lane.rows[side] @ params["rows"]["kernel"] + params["rows"]["bias"],
            )
            projected.append((*pair, lane.alpha))
            keys.append((lane.user if table.users_have[lane.user] else -1, item))
    total = 0.0
    for a, (text, row, alpha) in enumerate(projected):
        others = [b for b in range(len(keys)) if keys[b] != keys[a]]
        own = _alike(text, row, parts) / temperature
        by_text = [_alike(text, projected[b][1], parts) / temperature for b in others]
        by_row = [_alike(projected[b][0], row, parts) / temperature for b in others]
        for negatives in (by_text, by_row):
            total += 0.5 * alpha * (np.log(np.exp([own, *negatives]).sum()) - own)
    return total / len(keys), len(keys)


@pytest.mark.parametrize("product", ["text", "items_only"])
@pytest.mark.parametrize(("parts", "temperature"), [(3, 0.7), (1, 0.2)])
def test_the_loss_is_that_of_plain_numpy(data, product, parts, temperature):
    experiment = _experiment(
        data, teacher_vectors=product, ctrl_subspaces=parts, ctrl_temperature=temperature
    )
    guidance, arrays = experiment.trainer.guidance, experiment.arrays.guidance
    assert isinstance(guidance, ctrl.TextContrast)
    state, rng = init_state(experiment.trainer, 0), np.random.default_rng(5)
    drawn = jax.tree.map(lambda x: jnp.asarray(x[0]), draws_of(experiment, steps=1))
    lanes = drawn.items.shape[0]
    rows = rng.normal(size=(lanes, 2, arrays.width)).astype(np.float32)
    alpha = rng.random(lanes).astype(np.float32)
    (of_users, has_user), (of_items, has_item) = (
        arrays.users.of(drawn.queries.users),
        arrays.items.of(drawn.items),
    )
    observed = AlignmentObserved(
        1.0,
        vectors=jnp.concatenate([of_users[:, None], of_items], axis=1),
        has=jnp.concatenate([has_user[:, None], has_item], axis=1),
        width=arrays.width,
    )
    scored = Scored(jnp.zeros((lanes, 2)), None, None, pair_vectors=lambda: jnp.asarray(rows))
    params = state.params["guidance"][METHOD]
    losses = guidance.losses(
        params, scored, drawn, observed, jnp.asarray(alpha), worlds.one_device(), jax.random.key(0)
    )
    table = types.SimpleNamespace(
        users=np.asarray(arrays.users.values, np.float64),
        users_have=np.asarray(arrays.users.has),
        items=np.asarray(arrays.items.values, np.float64),
        items_have=np.asarray(arrays.items.has),
    )
    by_lane = [
        types.SimpleNamespace(
            user=int(drawn.queries.users[g]),
            items=np.asarray(drawn.items[g]),
            drawn=float(drawn.drawn[g]),
            rows=rows[g],
            alpha=alpha[g],
        )
        for g in range(lanes)
    ]
    of_params = {
        name: jax.tree.map(lambda x: np.asarray(x, np.float64), part["Dense_0"])
        for name, part in params.items()
    }
    expected, count = _expected(of_params, by_lane, table, parts, temperature)
    assert count < 2 * lanes  # items without a text are among them
    assert float(jnp.mean(losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backbone", CLICK_BACKBONES)
def test_logits_are_a_linear_function_of_the_vectors_of_rows(data, backbone):
    """A least-squares fit of 400 logits has no error; of the vectors' squares it has."""
    knobs = {"cin": (4, 2), "attention_width": 4, "dim": 2, "mlp": (3,), "init_std": 1.0}
    if backbone == "dcnv2":
        knobs |= {"low_rank": 2, "experts": 2}
    experiment = _experiment(data, backbone=backbone, **knobs)
    trainer, context = experiment.trainer, experiment.arrays.context
    state, rng = init_state(trainer, 0), np.random.default_rng(0)
    candidates = Candidates(
        Queries(jnp.arange(USERS), context.histories.trained),
        jnp.asarray(rng.integers(0, ITEMS, (USERS, 16)), jnp.int32),
    )
    reads = Reads({"x": candidates}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    if backbone in ("deepfm", "xdeepfm"):  # first-order terms are no part of the vectors
        leaves = jax.tree.map(lambda rows: rows.at[..., -1].set(0.0), leaves)
    view = trainer.access.view(state.params["backbone"], leaves, context, reads, None)
    logits = np.asarray(view.scores("x", None), np.float64).ravel()
    vectors = np.asarray(view.pair_vectors("x", None), np.float64)
    assert isinstance(trainer.backbone, PairBackbone)
    assert vectors.shape == (USERS, 16, trainer.backbone.pair_width())

    def error(x: np.ndarray) -> float:
        x = np.concatenate([x.reshape(len(logits), -1), np.ones((len(logits), 1))], axis=1)
        return float(np.abs(x @ np.linalg.lstsq(x, logits)[0] - logits).max())

    assert error(vectors) < 1e-4 * np.abs(logits).max()
    assert error(vectors**2) > 1e-2 * logits.std()


def test_parts_meet_the_part_that_is_most_like_them():
    """By hand: parts (.6), (.8) of a text with parts (.8), (-.6) of a row."""
    texts, rows = jnp.array([[3.0, 4.0]]), jnp.array([[8.0, -6.0]])
    assert_allclose(ctrl.similarities(texts, rows, 2), [[0.6 * 0.8 + 0.8 * 0.8]], rtol=1e-6)
    assert_allclose(ctrl.similarities(texts, rows, 1), [[0.0]], atol=1e-6)
    assert_allclose(ctrl.similarities(rows, texts, 2), [[0.8 * 0.8 - 0.6 * 0.6]], rtol=1e-6)


# ---------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "knobs",
    [
        {"gate": "calibrated"},
        {"backbone": "din", "gate": "budget", "dropout": 0.2},
        {"backbone": "deepfm", "teacher_vectors": "items_only", "gate": "rule"},
    ],
)
def test_rows_and_texts_find_each_other(data, knobs):
    """The loss falls, by every table that a row is made of."""
    experiment = _experiment(data, **{"lambda": 10.0, **knobs})
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(experiment.trainer, 0), []
    begun = jax.tree.map(np.asarray, (state.params["guidance"][METHOD], state.tables))
    for _ in range(2):
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(60))
        assert int(health.step) == -1
        losses.append(float(sums["guidance_loss"]) / max(float(sums["alpha"]), 1e-6))
    assert losses[1] < losses[0]
    moved = jax.tree.map(
        lambda a, b: np.abs(a - np.asarray(b)).max(),
        begun,
        (state.params["guidance"][METHOD], state.tables),
    )
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"backbone": "mf", "mlp": (200, 80)}, r"--backbone=mf makes no vector of a row; use dcn"),
        ({"ctrl_subspaces": 4}, r"--ctrl_width=6 is not a multiple of --ctrl_subspaces=4"),
        (
            {"teacher_vectors": "items_only", "gate": "calibrated"},
            r"--teacher_vectors=items_only has no vectors of users; add some",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _experiment(data, **knobs)
