"""Each objective's step against a loss written plainly over whole tables, and jax.grad of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose

from slgr_jax.config import make_run
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.models import losses
from slgr_jax.sampling.context import recent
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib
from slgr_jax.training.dropping import Dropped

COMMON = {
    "dim": 8,
    "table_optimizer": "sgd",
    "lr": 0.5,
    "l2": 0.1,
    "init_std": 2.0,
    "batch_size": 16,
}


def _built(tmp_path, layout=None, **knobs):
    """A trainer, its device arrays, its first batch and its first state."""
    path = tmp_path / "d"
    dataset = (
        dataset_lib.load(path)
        if path.exists()
        else worlds.random_dataset(path, categories=4, ratings=True)
    )
    run = make_run(str(path), "run", **{**COMMON, **knobs})
    experiment = build.build(run, dataset, layout or worlds.one_device())
    trainer, arrays = experiment.trainer, experiment.arrays
    keys = jax.random.split(jax.random.fold_in(jax.random.key_data(jax.random.key(1)), 0))
    drawn, _ = step.draw_steps(trainer, keys[:1], arrays)
    batch = jax.tree.map(lambda x: x[0], drawn)
    return trainer, arrays, batch, state_lib.init_state(trainer, 0)


def _stepped(trainer, arrays, state, steps=1):
    key = jax.random.key_data(jax.random.key(1))
    return step.make_run_steps(trainer)(state, arrays, key, jnp.int32(steps))


def _values(trainer, state, context):
    return state_lib.make_serving_state(trainer)(state, context).values


def test_what_is_dropped_is_as_computed_elsewhere():
    """Means over what is left of 29 % of ten, hardest and easiest; padding is no part of it."""
    margins = np.array([2, -1, 0.5, 3, -2, 0, 1, 0.2, -0.4, 4, -9.0])
    loss, weights = jnp.asarray(np.log1p(np.exp(-margins))), jnp.ones(11).at[10].set(0.0)
    for which, mean in (("easiest", 1.720095), ("hardest", 0.033369)):
        left = Dropped(0.71, which, worlds.one_device()).left(loss, weights, jnp.int32(0))
        assert float(jnp.sum(left)) == 2
        assert float(jnp.sum(left * loss)) / 2 == pytest.approx(mean, abs=1e-6)
    nothing = Dropped(0.5, "easiest", worlds.one_device()).left(loss, jnp.zeros(11), jnp.int32(0))
    assert float(jnp.sum(nothing)) == 0


def test_dropped_triples_move_nothing(tmp_path):
    """One SGD step of what is left alone, on the fast path of dot products and by rows."""

    def left(scores, batch):
        loss = jax.nn.softplus(scores[:, 1] - scores[:, 0])
        return Dropped(0.75, "easiest", worlds.one_device()).left(loss, batch.weights, jnp.int32(0))

    for kernels in ("xla", "auto"):
        trainer, arrays, batch, state = _built(
            tmp_path, backbone="mf", item_bias=False, l2=0.0, drop_share=0.75, kernels=kernels
        )
        values = {n: np.asarray(state.tables[n])[:, :8] for n in ("user", "item")}
        users, items = np.asarray(batch.queries.users), np.asarray(batch.items)
        scores = np.einsum("bd,bcd->bc", values["user"][users], values["item"][items])
        weights = np.asarray(left(jnp.asarray(scores), batch))
        assert weights.sum() == 4
        slope = weights / (1 + np.exp(scores[:, 0] - scores[:, 1]))
        moved = {n: np.zeros_like(v) for n, v in values.items()}
        difference = values["item"][items[:, 0]] - values["item"][items[:, 1]]
        np.add.at(moved["user"], users, slope[:, None] * difference)
        np.add.at(moved["item"], items[:, 0], slope[:, None] * values["user"][users])
        np.add.at(moved["item"], items[:, 1], -slope[:, None] * values["user"][users])
        new = _stepped(trainer, arrays, state)[0]
        for name, value in values.items():
            after = np.asarray(new.tables[name])[:, :8]
            assert_allclose(after - value, 0.5 * moved[name], rtol=1e-3, atol=1e-5)


def _check(tmp_path, plain_loss, count, **knobs):
    """One SGD step moves every table by lr times the gradient of the summed plain loss."""
    trainer, arrays, batch, state = _built(tmp_path, **knobs)
    start = {n: state.tables[n][: s.rows, : s.width] for n, s in trainer.backbone.tables.items()}
    start, params = jax.device_get((start, state.params["backbone"]))
    value, grads = jax.jit(
        jax.value_and_grad(lambda t: plain_loss(trainer, arrays, batch, params, t))
    )(start)
    after, sums, _ = _stepped(trainer, arrays, state)
    n = count(trainer, arrays, batch)
    assert float(sums["loss"]) == pytest.approx(float(value) / n, rel=1e-4)
    assert float(sums["triples"]) == n
    for name, spec in trainer.backbone.tables.items():
        got = after.tables[name][: spec.rows, : spec.width]
        assert_allclose(got, start[name] - 0.5 * grads[name], rtol=2e-4, atol=2e-5)


def _mf(tables, users, items):
    p, q = tables["user"][users], tables["item"][items]
    while p.ndim < q.ndim:
        p = p[:, None]
    return jnp.sum(p[..., :-1] * q[..., :-1], axis=-1) + q[..., -1]


def _l2(*rows):
    return 0.05 * sum(jnp.sum(part**2) for part in rows)


def _triples(trainer, arrays, batch):
    return float(batch.weights.sum())


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_bce_of_triples_is_two_labelled_rows(tmp_path, kernels):
    def loss(trainer, arrays, batch, params, t):
        s = _mf(t, batch.queries.users, batch.items)
        rows = -jnp.log(jax.nn.sigmoid(s[:, 0])) - jnp.log(jax.nn.sigmoid(-s[:, 1]))
        return jnp.sum(rows) / 2 + _l2(t["user"][batch.queries.users], t["item"][batch.items])

    _check(tmp_path, loss, _triples, loss="bce", kernels=kernels)


@pytest.mark.parametrize("name", ["bpr", "bce"])
def test_several_negatives_are_averaged(tmp_path, name):
    def loss(trainer, arrays, batch, params, t):
        assert batch.items.shape == (16, 4)
        s = _mf(t, batch.queries.users, batch.items)
        if name == "bpr":
            each = jnp.mean(jnp.log1p(jnp.exp(s[:, 1:] - s[:, :1])), axis=1)
        else:
            each = (jnp.log1p(jnp.exp(-s[:, 0])) + jnp.log1p(jnp.exp(s[:, 1:])).sum(1)) / 4
        return jnp.sum(each) + _l2(t["user"][batch.queries.users], t["item"][batch.items])

    _check(tmp_path, loss, _triples, loss=name, negatives_per_positive=3)


def test_bce_on_rated_rows(tmp_path):
    def loss(trainer, arrays, batch, params, t):
        users, items = batch.queries.users, batch.items[:, 0]
        p = jax.nn.sigmoid(_mf(t, users, items))
        each = -batch.labels * jnp.log(p) - (1 - batch.labels) * jnp.log(1 - p)
        return jnp.sum(each) + _l2(t["user"][users], t["item"][items])

    _check(tmp_path, loss, _triples, loss="bce", rating_threshold=4.0)


def test_softmax_over_the_catalogue(tmp_path):
    def loss(trainer, arrays, batch, params, t):
        users, items = batch.queries.users, batch.items[:, 0]
        everything = jnp.tile(jnp.arange(30), (16, 1))
        log_p = jax.nn.log_softmax(_mf(t, users, everything))
        picked = jnp.take_along_axis(log_p, items[:, None], axis=1)
        return -jnp.sum(picked) + _l2(t["user"][users], t["item"][items])

    _check(tmp_path, loss, _triples, loss="softmax")


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_sampled_softmax_takes_the_drawing_out(tmp_path, negatives):
    def loss(trainer, arrays, batch, params, t):
        users, items, shared = batch.queries.users, batch.items[:, 0], batch.shared
        mass = np.ones(30)
        if negatives == "popularity":
            mass = np.bincount(np.asarray(arrays.interactions.items), minlength=30) * 1.0
        expected = jnp.asarray(40 * mass / mass.sum(), jnp.float32)
        own = _mf(t, users, items)
        others = _mf(t, users, jnp.tile(shared, (16, 1)))
        each = jnp.exp(others) / expected[shared][None, :]
        each = jnp.where(items[:, None] == shared[None, :], 0.0, each)
        return jnp.sum(jnp.log(jnp.exp(own) + each.sum(1)) - own) + _l2(
            t["user"][users], t["item"][items]
        )

    _check(
        tmp_path,
        loss,
        _triples,
        loss="sampled_softmax",
        shared_negatives=40,
        negatives=negatives,
    )


def _window(trainer, arrays, batch, params, t, key):
    backbone = trainer.backbone
    ids, there = recent(arrays.context.histories, batch.queries, backbone.length)
    ids = jnp.concatenate([ids, batch.items[:, :1]], axis=1)
    there = jnp.pad(there, ((0, 0), (0, 1)), constant_values=True)
    found = backbone.window(params, t["item"][ids], there, key=key)
    place = jnp.broadcast_to(found.place, found.weights.shape)
    return ids, found, jnp.take_along_axis(ids, place, axis=1)


@pytest.mark.parametrize("name", ["softmax", "bpr", "bce"])
def test_windows_learn_at_every_place(tmp_path, name):
    def key():
        keys = jax.random.split(jax.random.fold_in(jax.random.key_data(jax.random.key(1)), 0))
        return jax.random.split(keys[1])[0]

    def loss(trainer, arrays, batch, params, t):
        ids, found, targets = _window(trainer, arrays, batch, params, t, key())
        penalty = _l2(t["item"][ids[:, :-1]], t["item"][batch.items])
        if name == "softmax":
            log_p = jax.nn.log_softmax(found.states @ t["item"].T)
            each = -jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
        else:
            others = batch.items[:, 1:].reshape(*targets.shape, 2)
            own = jnp.sum(found.states * t["item"][targets], axis=-1)[..., None]
            other = jnp.einsum("wte,wtne->wtn", found.states, t["item"][others])
            if name == "bpr":
                each = jnp.mean(jnp.log1p(jnp.exp(other - own)), axis=-1)
            else:
                total = jnp.log1p(jnp.exp(-own))[..., 0] + jnp.log1p(jnp.exp(other)).sum(-1)
                each = total / 3
        return jnp.sum(found.weights * each) + penalty

    def places(trainer, arrays, batch):
        # A window's places are the events before its last one, at most L of them.
        return float(np.minimum(np.asarray(batch.queries.as_of), trainer.backbone.length).sum())

    knobs = {"backbone": "sasrec", "dropout": 0.0, "max_history": 4, "hidden": 8, "layers": 1}
    _check(tmp_path, loss, places, loss=name, negatives_per_positive=2, **knobs)


# --- the losses themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 8])
def test_softmax_cross_entropy_equals_log_softmax(chunk):
    rng = np.random.default_rng(0)
    states, vectors = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 4), (9, 4)))
    targets = jnp.asarray(rng.integers(0, 9, 7))
    weights = jnp.asarray([1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0])

    def plain(states, vectors):
        log_p = jax.nn.log_softmax(states @ vectors.T)
        return -3.0 * jnp.sum(weights * log_p[jnp.arange(7), targets])

    def ours(states, vectors):
        return 3.0 * losses.softmax_cross_entropy(states, vectors, targets, weights, chunk)[0]

    got, d_got = jax.value_and_grad(ours, argnums=(0, 1))(states, vectors)
    want, d_want = jax.value_and_grad(plain, argnums=(0, 1))(states, vectors)
    assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(d_got, d_want, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    first = jnp.argmax(states @ vectors.T, axis=1) == targets
    found = losses.softmax_cross_entropy(states, vectors, targets, weights, chunk)[1]
    assert float(found) == float(jnp.sum(weights * first))


def test_a_silent_place_may_hold_anything():
    states = jnp.asarray([[1.0, 0.0], [np.nan, np.inf]])
    vectors, targets = jnp.eye(2), jnp.asarray([0, 1])

    def loss(s):
        return losses.softmax_cross_entropy(s, vectors, targets, jnp.asarray([1.0, 0.0]), 1)[0]

    value, grad = jax.value_and_grad(loss)(states)
    assert float(value) == pytest.approx(np.log(1 + np.exp(-1.0)), rel=1e-6)
    assert np.isfinite(np.asarray(grad)).all()


def test_sampled_softmax_of_every_item_once_is_the_softmax():
    rng = np.random.default_rng(0)
    states, vectors = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 4), (9, 4)))
    targets = jnp.asarray(rng.integers(0, 9, 7))
    loss, first = losses.sampled_softmax_cross_entropy(
        states, vectors[targets], vectors, targets, jnp.arange(9), jnp.zeros(9)
    )
    log_p = jax.nn.log_softmax(states @ vectors.T)
    assert_allclose(loss, -log_p[jnp.arange(7), targets], rtol=1e-5)
    assert_allclose(first, jnp.argmax(log_p, axis=1) == targets)
