"""LLMEmb's alignment: golden values, plain numpy, learning, selective, refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose

from slgr_jax import config
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import alignment, llmemb_rat
from slgr_jax.guidance.base import make_guidance
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import step
from slgr_jax.training.build import Experiment, build
from slgr_jax.training.state import init_state

USERS, ITEMS, Z, E = 24, 30, 5, 4
NO_TEXT, UNKNOWN = (3, 11), (4, 7)  # items without a text, and those that the run does not know

X = [[0.429864, 0.696043, -1.184118, -0.661703], [-0.436435, -1.169802, 1.739368, -0.495911],
     [0.32897, -0.258573, 1.583473, 1.320361]]  # fmt: skip
Y = [[0.633353, -2.20351, 0.052029, 0.683686], [1.003962, -0.617907, 1.822011, -1.320431],
     [-0.661528, 0.93505, 0.049055, 2.002393]]  # fmt: skip


def _vectors(seed: int, rows: int, width: int, missing: tuple[int, ...] = ()) -> Vectors:
    values = np.random.default_rng(seed).normal(0.1, 0.7, (rows, width)).astype(np.float32)
    has = ~np.isin(np.arange(rows), missing)
    return Vectors(np.where(has[:, None], values, 0), has)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("aligned") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, timed=True, per_user=6)
    nobody = {width: Vectors(np.zeros((USERS, width)), np.zeros(USERS, bool)) for width in (Z, E)}
    items = {"text": _vectors(0, ITEMS, Z, NO_TEXT), "run": _vectors(1, ITEMS, E, UNKNOWN)}
    for name, of_items in items.items():
        users = nobody[of_items.values.shape[1]]
        embeddings.write(dataset, name, of_items, users, users_from="file")
    users = _vectors(2, USERS, E)
    embeddings.write(dataset, "run_and_users", items["run"], users, users_from="file")
    return dataset


def _run(data: Dataset, **knobs: Any) -> config.RunConfig:
    values = {"guidance": "llmemb_rat", "teacher_vectors": "run", "batch_size": 16, "dim": E}
    values |= {"backbone": "sasrec", "max_history": 3, "layers": 1, "hidden": 8, "kernels": "xla"}
    values |= {"item_vectors": "text", "item_rows": False, "adapter_hidden": (8,), "dropout": 0.0}
    return make_run(str(data.path), "w", **values | knobs)


def _experiment(data: Dataset, **knobs: Any) -> Experiment:
    return build(_run(data, **knobs), data, worlds.one_device())


# --- against plain numpy --------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.169774), (2.0, 0.964921)])
def test_golden_values(temperature, expected):
    every = jnp.arange(3, dtype=jnp.int32)
    there = jnp.ones(3, bool)
    terms = llmemb_rat.contrasts(jnp.array(X), jnp.array(Y), there, every, temperature)
    assert float(jnp.mean(terms)) == pytest.approx(expected, abs=2e-6)


def _log_softmax(row: np.ndarray) -> np.ndarray:
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def _expected(lanes: alignment.Lanes, temperature: float) -> float:
    """sum of alpha (CE + CE') / 2 over the lanes with a vector, over how many there are."""
    there = np.flatnonzero(lanes.has[:, 1])
    x, y, weights = (
        np.asarray(part[:, 1], np.float64)[there]
        for part in (lanes.teacher, lanes.student, lanes.weights)
    )
    total, count = 0.0, len(there)
    targets = np.exp([_log_softmax(row) for row in (x @ x.T + y @ y.T) * temperature / 2])
    scores = x @ y.T / temperature
    for i in range(count):
        terms = -targets[i] @ _log_softmax(scores[i]) - targets[:, i] @ _log_softmax(scores[:, i])
        total += weights[i] * terms / 2
    return total / count


def _lanes(lanes: int = 7) -> alignment.Lanes:
    rng = np.random.default_rng(3)
    has = np.ones((lanes, 3), np.float32)
    has[:, 0], has[[2, 5], 1] = 0, 0
    return alignment.Lanes(
        ids=jnp.asarray(rng.integers(0, 5, (lanes, 3)), jnp.int32),
        student=jnp.asarray(rng.normal(size=(lanes, 3, E)), jnp.float32),
        teacher=jnp.asarray(rng.normal(size=(lanes, 3, E)) * has[..., None], jnp.float32),
        has=jnp.asarray(has),
        weights=jnp.asarray(has * rng.random((lanes, 1)), jnp.float32),
    )


def test_the_loss_of_lanes_is_that_of_plain_numpy_and_its_gradient_is_right(data):
    method = make_guidance(_run(data, llmemb_rat_temperature=1.5))
    assert isinstance(method, llmemb_rat.FrozenTexts)
    lanes = _lanes()

    def loss(student: jax.Array) -> jax.Array:
        of_lanes = lanes.replace(student=student)
        args = (of_lanes, worlds.one_device(), jax.random.key(0))
        return jnp.mean(method.lane_losses({}, *args))

    assert float(loss(lanes.student)) == pytest.approx(_expected(lanes, 1.5), rel=1e-5)
    gradient = np.asarray(jax.grad(loss)(lanes.student))
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=lanes.student.shape)
        ends = [
            _expected(lanes.replace(student=lanes.student + sign * 1e-3 * direction), 1.5)
            for sign in (1, -1)
        ]
        assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)
    assert (gradient[:, [0, 2]] == 0).all()
    assert (gradient[[2, 5]] == 0).all()
    nothing = lanes.replace(has=jnp.zeros((7, 3)), weights=jnp.zeros((7, 3)))
    args = (nothing, worlds.one_device(), jax.random.key(0))
    assert float(jnp.sum(method.lane_losses({}, *args))) == 0.0


# --- arrays, steps --------------------------------------------------------------------------------


def test_vectors_are_taken_as_they_are(data):
    arrays = _experiment(data).arrays.guidance
    assert_allclose(arrays.items.values, embeddings.load(data, "run").items.values, atol=1e-3)
    assert np.flatnonzero(~np.asarray(arrays.items.has)).tolist() == list(UNKNOWN)
    assert not np.asarray(arrays.users.has).any()


@pytest.mark.parametrize("knobs", [{}, {"teacher_vectors": "run_and_users", "gate": "calibrated"}])
def test_items_made_of_texts_become_alike_as_the_runs_are(data, knobs):
    experiment = _experiment(data, **{"lambda": 10.0, **knobs})
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(experiment.trainer, 0), []
    for _ in range(2):
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(60))
        assert int(health.step) == -1
        losses.append(float(sums["guidance_loss"]) / float(sums["alpha"]))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"item_vectors": "", "item_rows": True, "adapter_hidden": ()},
            r"what texts of items come to: add --item_vectors=NAME .* or use --guidance=hint",
        ),
        ({"dim": 2 * E}, r"this run's have 8 numbers, those 4; give both runs the same --dim"),
        (
            {"gate": "calibrated"},
            r"--teacher_vectors=run has no vectors of users; add some",
        ),
        (
            {"backbone": "dcnv2", "mlp": (6,), "adapter_hidden": ()},
            r"--backbone=dcnv2 has none that its scores are products of",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _experiment(data, **knobs)
