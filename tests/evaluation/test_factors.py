"""Factors of a recommender's scores: the singular value decomposition, written as a product."""

from __future__ import annotations

import numpy as np
import pytest
import worlds

from slgr_jax.config import BaselineConfig, TeachConfig
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines, factors, teacher_lists
from slgr_jax.teacher.local import embeddings


def scores_of(matrix):
    return lambda users: matrix[users]


def test_factors_are_the_best_of_their_width():
    rng = np.random.default_rng(0)
    values = 0.8 ** np.arange(40)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (120, 70))
    matrix = (left * values @ right.T).astype(np.float32)
    users, items = factors.factorise(scores_of(matrix), 120, 70, 12)
    assert users.dtype == items.dtype == np.float32
    # Eckart and Young: what is left has the other singular values.
    for width in (3, 12):
        gap = np.linalg.norm(matrix - users[:, :width] @ items[:, :width].T)
        assert gap == pytest.approx(np.linalg.norm(values[width:]), rel=1e-3)
    lengths = np.square(items).sum(axis=0)
    np.testing.assert_allclose(lengths, values[:12], rtol=1e-3)
    np.testing.assert_allclose(np.square(users).sum(axis=0), lengths, rtol=1e-4)
    largest = np.abs(items).argmax(axis=0)
    assert (items[largest, np.arange(12)] > 0).all()
    again = factors.factorise(scores_of(matrix), 120, 70, 12)
    np.testing.assert_array_equal(again[0], users)
    # As many as there are: nothing is left.
    users, items = factors.factorise(scores_of(matrix[:20]), 20, 70, 20)
    np.testing.assert_allclose(users @ items.T, matrix[:20], atol=2e-6)


def test_a_product_holds_those_of_the_tuned_baseline(tmp_path):
    data = worlds.random_dataset(tmp_path / "data")
    width = min(data.n_users, data.n_items)
    common = TeachConfig(data=str(data.path), name="ease")
    manifest = factors.from_baseline(data, common, "ease", BaselineConfig(), width=width)
    assert manifest.users_from == "factors"
    assert manifest.model.startswith("factors of ease (lambda ")
    product = embeddings.load(data, "ease")
    assert product.items.has.all()
    assert product.users.has.all()
    fitted = baselines.tune(baselines.make_baseline("ease", BaselineConfig()), data).fitted
    expected = teacher_lists.host_scores(fitted)(np.arange(data.n_users))
    np.testing.assert_allclose(product.users.values @ product.items.values.T, expected, atol=1e-5)

    with pytest.raises(ConfigError, match=rf"at most {width} factors; set --width to {width} or"):
        factors.ensure(data, "wide", width + 1)
    created = manifest.created
    factors.ensure(data, "ease", width - 1)  # wide enough
    assert embeddings.read_manifest(data, "ease").created == created
    assert embeddings.read_manifest(data, "ease").dim == width
    factors.ensure(data, "narrow", 2)
    factors.ensure(data, "narrow", 3)
    assert embeddings.read_manifest(data, "narrow").dim == 3
