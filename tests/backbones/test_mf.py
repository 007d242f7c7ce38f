"""Matrix factorisation against plain numpy, and the worlds every recommender must solve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from jax.test_util import check_grads

from slgr_jax import evaluate, metrics, runs, train
from slgr_jax.backbones import make_backbone
from slgr_jax.config import BACKBONES, ModelConfig, OptimizerConfig, SamplerConfig, TrainConfig


def _rows(backbone, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(spec.rows, spec.width)), jnp.float32)
        for name, spec in backbone.tables.items()
    }


@pytest.mark.parametrize("item_bias", [True, False])
def test_scores_equal_numpy(item_bias):
    backbone = make_backbone(ModelConfig(dim=5, item_bias=item_bias), n_users=4, n_items=6)
    values = _rows(backbone)
    users, items = np.array([0, 3, 3]), np.array([[0, 1], [5, 5], [2, 4]])
    rows = {name: values[name][ids] for name, ids in backbone.ids(users, items).items()}
    got = backbone.score({}, rows, users, items)
    p, q = np.asarray(values["user"]), np.asarray(values["item"])
    for b, user in enumerate(users):
        for c, item in enumerate(items[b]):
            expected = p[user, :-1] @ q[item, :-1] + q[item, -1] if item_bias else p[user] @ q[item]
            assert float(got[b, c]) == pytest.approx(expected, rel=1e-5)
    user_vectors, item_vectors = backbone.factors({}, values)
    full = user_vectors @ item_vectors.T
    np.testing.assert_allclose(full[users[:, None], items], got, rtol=1e-5)


def test_score_gradients():
    backbone = make_backbone(ModelConfig(dim=4), n_users=3, n_items=5)
    users, items = np.array([0, 2]), np.array([[0, 1], [4, 4]])
    values = _rows(backbone)
    rows = {name: values[name][ids] for name, ids in backbone.ids(users, items).items()}
    check_grads(
        lambda rows: backbone.score({}, jax.tree.map(jnp.asarray, rows), users, items),
        (rows,),
        order=1,
        modes=("rev",),
        eps=1e-2,
        rtol=1e-2,
        atol=1e-2,
    )


def test_dropout_is_unbiased_and_only_on_request():
    backbone = make_backbone(ModelConfig(dim=16, item_bias=False), n_users=2, n_items=2)
    values = _rows(backbone)
    users, items = np.array([1]), np.array([[0, 1]])
    rows = {name: values[name][ids] for name, ids in backbone.ids(users, items).items()}
    plain = backbone.score({}, rows, users, items)
    keys = jax.random.split(jax.random.key(0), 4000)
    passes = jax.vmap(lambda key: backbone.score({}, rows, users, items, dropout=(0.2, key)))(keys)
    error = np.asarray(passes).std(axis=0) / np.sqrt(4000)
    assert (np.abs(np.asarray(passes).mean(axis=0) - np.asarray(plain)) < 4 * error).all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("table_optimizer", ["adagrad", "lazy_adam"])
def test_checkerboard_is_solved(tmp_path, backbone, table_optimizer):
    """Every user's withheld item of the right colour comes first among the unseen ones."""
    dataset = worlds.checkerboard(tmp_path / "d", size=24)
    lr = {"adagrad": 0.3, "lazy_adam": 0.02}[table_optimizer]
    run = worlds.run_config(
        dataset,
        tmp_path / "run",
        model=ModelConfig(backbone=backbone, dim=8),
        optimizer=OptimizerConfig(table_optimizer=table_optimizer, lr=lr, l2=0.001),
        sampler=SamplerConfig(batch_size=128),
        train=TrainConfig(epochs=60, patience=0, eval_every=60),
    )
    train.train(run)
    restored = runs.restore_run(run.workdir)
    ranking = evaluate.rank(
        restored.score_users,
        restored.state,
        dataset.positives(("test",)),
        dataset.positives(("train", "valid")),
        dataset.n_items,
    )
    assert metrics.summarize(metrics.per_user(ranking, (1,)))["recall@1"] == 1.0
