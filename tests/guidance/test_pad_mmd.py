"""PAD's alignment of two views: golden value, plain numpy, learning, selective, refusals."""

from __future__ import annotations

import itertools
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
from slgr_jax.guidance import alignment, pad_mmd
from slgr_jax.guidance.base import make_guidance
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import step
from slgr_jax.training.build import Experiment, build
from slgr_jax.training.state import init_state

USERS, ITEMS, Z, D = 24, 30, 5, 4
NO_TEXT = (3, 11)

X = [[0.429864, 0.696043, -1.184118, -0.661703], [-0.436435, -1.169802, 1.739368, -0.495911],
     [0.32897, -0.258573, 1.583473, 1.320361]]  # fmt: skip
Y = [[0.633353, -2.20351, 0.052029, 0.683686], [1.003962, -0.617907, 1.822011, -1.320431],
     [-0.661528, 0.93505, 0.049055, 2.002393]]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("aligned") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, timed=True, per_user=6)
    rng = np.random.default_rng(0)
    has = ~np.isin(np.arange(ITEMS), NO_TEXT)
    for name, known in (("text", False), ("others", False), ("profiles", True)):
        of_items = Vectors(rng.normal(0.1, 0.7, (ITEMS, Z)).astype(np.float32), has)
        of_users = Vectors(rng.normal(size=(USERS, Z)) * known, np.full(USERS, known))
        embeddings.write(dataset, name, of_items, of_users, users_from="file")
    return dataset


def _run(data: Dataset, **knobs: Any) -> config.RunConfig:
    values = {"guidance": "pad_mmd", "teacher_vectors": "text", "batch_size": 16, "dim": D}
    values |= {"backbone": "sasrec", "max_history": 3, "layers": 1, "hidden": 8, "kernels": "xla"}
    values |= {"item_vectors": "text", "dual_view": True, "dropout": 0.0, "init_std": 1.0}
    return make_run(str(data.path), "w", **values | knobs)


def _experiment(data: Dataset, **knobs: Any) -> Experiment:
    return build(_run(data, **knobs), data, worlds.one_device())


# --- against plain numpy --------------------------------------------------------------------------


def _kernel(a: np.ndarray, b: np.ndarray, m: float) -> float:
    square = ((a - b) ** 2).sum()
    return sum(np.exp(-square / (2 * 2.0**power * m)) for power in range(-3, 2))


def _by_pairs(x: np.ndarray, y: np.ndarray, alpha: np.ndarray, m: float) -> float:
    """The weighed discrepancy, a pair at a time."""
    count, total = len(x), 0.0
    for i in range(count):
        others = [j for j in range(count) if j != i]
        within = sum(_kernel(v[i], v[j], m) for v in (x, y) for j in others) / (count - 1)
        across = sum(_kernel(x[i], y[j], m) + _kernel(x[j], y[i], m) for j in range(count))
        total += alpha[i] * (within - across / count)
    return total / count


def _mean_square(x: np.ndarray, y: np.ndarray) -> float:
    both = np.concatenate([x, y])
    return float(np.mean([((a - b) ** 2).sum() for a, b in itertools.product(both, both)]))


def test_golden_value():
    terms = pad_mmd.discrepancies(jnp.array(X), jnp.array(Y), jnp.ones(3), 0, 3)
    assert float(jnp.mean(terms)) == pytest.approx(-0.856847, abs=2e-6)


def test_wherever_the_clouds_lie_only_their_difference_counts():
    x, y = jnp.array(X), jnp.array(Y)
    far = pad_mmd.discrepancies(x + 100.0, y + 100.0, jnp.ones(3), 0, 3)
    assert_allclose(far, pad_mmd.discrepancies(x, y, jnp.ones(3), 0, 3), rtol=1e-3)
    # Rows that are not there change nothing, and one row alone is finite.
    more = (jnp.concatenate([v, 50.0 + v]) for v in (x, y))
    with_others = pad_mmd.discrepancies(*more, jnp.array([1.0, 1, 1, 0, 0, 0]), 0, 6)
    assert_allclose(with_others[:3], pad_mmd.discrepancies(x, y, jnp.ones(3), 0, 3), rtol=1e-4)
    assert_allclose(with_others[3:], 0.0)
    assert np.isfinite(pad_mmd.discrepancies(x, x, jnp.array([0.0, 1, 0]), 0, 3)).all()


def _lanes(seed: int = 3) -> alignment.Lanes:
    """Seven lanes of six items, of which one was drawn twice and one has no text."""
    rng = np.random.default_rng(seed)
    has = np.ones((7, 3), np.float32)
    has[:, 0], has[2, 1] = 0, 0
    ids = np.stack([np.arange(7), [4, 0, 5, 1, 4, 2, 3], np.arange(7)], axis=1)
    student = rng.normal(size=(7, 3, 2 * D))
    student[4, 1] = student[0, 1]
    before = rng.normal(size=(7, D))  # what a merged view has before both
    return alignment.Lanes(
        ids=jnp.asarray(ids, jnp.int32),
        student=jnp.asarray(student, jnp.float32),
        teacher=jnp.asarray(rng.normal(size=(7, 3, Z)), jnp.float32),
        has=jnp.asarray(has),
        weights=jnp.asarray(has * rng.random((7, 1)), jnp.float32),
        rows=jnp.asarray(np.concatenate([before, student[:, 1]], axis=1), jnp.float32),
    )


def test_the_loss_of_lanes_is_that_of_plain_numpy_and_its_gradient_is_right(data):
    method = make_guidance(_run(data))
    assert isinstance(method, pad_mmd.ViewsAlike)
    lanes, kept = _lanes(), [0, 1, 3, 5, 6]

    def loss(rows: jax.Array) -> jax.Array:
        of_lanes = lanes.replace(rows=rows)
        args = (of_lanes, worlds.one_device(), jax.random.key(0))
        return jnp.mean(method.lane_losses({}, *args))

    def expected(rows: np.ndarray, m: float) -> float:
        e, text = np.split(rows[kept, D:], 2, axis=-1)
        return _by_pairs(text, e, np.asarray(lanes.weights)[kept, 1], m)

    assert lanes.rows is not None
    rows = np.asarray(lanes.rows, np.float64)
    m = _mean_square(*np.split(rows[kept, D:], 2, axis=-1))
    assert float(loss(lanes.rows)) == pytest.approx(expected(rows, m), rel=1e-5)
    gradient = np.asarray(jax.grad(loss)(lanes.rows))
    for seed in range(3):  # m has no gradient
        direction = np.random.default_rng(seed).normal(size=rows.shape)
        ends = [expected(rows + sign * 1e-4 * direction, m) for sign in (1, -1)]
        assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)
    assert np.abs(gradient[kept, D:]).min(axis=0).max() > 0
    assert (gradient[:, :D] == 0).all()
    assert (gradient[[2, 4]] == 0).all()
    nothing = lanes.replace(has=jnp.zeros((7, 3)), weights=jnp.zeros((7, 3)))
    args = (nothing, worlds.one_device(), jax.random.key(0))
    assert float(jnp.sum(method.lane_losses({}, *args))) == 0.0


def test_views_that_are_one_have_a_gradient():
    def of(x: jax.Array, y: jax.Array) -> jax.Array:
        return pad_mmd.discrepancies(x, y, jnp.ones(3), 0, 3)

    assert np.isfinite(jax.jacobian(of)(jnp.array(X), jnp.array(X))).all()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"teacher_vectors": "profiles", "item_vectors": "profiles", "gate": "calibrated"},
        {"backbone": "gru4rec", "gate": "rule", "dual_view": False, "towers": "aligned"},
    ],
)
def test_the_two_views_become_alike(data, knobs):
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
        ({"dual_view": False}, r"with --towers=aligned or --dual_view .* or use --guidance=rlm"),
        ({"dual_view": False, "towers": "three"}, r"with --towers=aligned or --dual_view"),
        ({"teacher_vectors": "others"}, r"--item_vectors=text come to, .* others; give both the"),
        ({"gate": "calibrated"}, r"--teacher_vectors=text has no vectors of users; add some"),
        ({"teacher_vectors": ""}, r"--guidance=pad_mmd needs --teacher_vectors=NAME"),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _experiment(data, **knobs)
