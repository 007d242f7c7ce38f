"""Matrix factorisation against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from slgr_jax.config import ModelConfig
from slgr_jax.models import candidates
from slgr_jax.models.backbones import make_backbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import Scoring, ServingState, score_users
from slgr_jax.sampling.context import Context, Queries, Sizes


def _rows(backbone, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(spec.rows, spec.width)), jnp.float32)
        for name, spec in backbone.tables.items()
    }


@pytest.mark.parametrize("item_bias", [True, False])
def test_scores_equal_numpy(item_bias):
    backbone = make_backbone(ModelConfig(dim=5, item_bias=item_bias), Sizes(4, 6))
    values = _rows(backbone)
    users, items = np.array([0, 3, 3]), np.array([[0, 1], [5, 5], [2, 4]])
    lanes, context = Candidates(Queries(users), items), Context()
    rows = {
        side: {name: values[name][ids] for name, ids in named.items()}
        for side, named in candidates.candidate_ids(backbone, context, lanes).items()
    }
    got = candidates.candidate_scores(backbone, {}, rows, context, lanes, None)
    p, q = np.asarray(values["user"]), np.asarray(values["item"])
    for b, user in enumerate(users):
        for c, item in enumerate(items[b]):
            expected = p[user, :-1] @ q[item, :-1] + q[item, -1] if item_bias else p[user] @ q[item]
            assert float(got[b, c]) == pytest.approx(expected, rel=1e-5)
    scoring = Scoring(ServingState({}, values), context, None)
    full = score_users(backbone)(scoring, users)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(full), items, axis=1), got, rtol=1e-5)


def test_score_gradients():
    backbone = make_backbone(ModelConfig(dim=4), Sizes(3, 5))
    users, items = np.array([0, 2]), np.array([[0, 1], [4, 4]])
    values = _rows(backbone)
    lanes, context = Candidates(Queries(users), items), Context()
    rows = {
        side: {name: values[name][ids] for name, ids in named.items()}
        for side, named in candidates.candidate_ids(backbone, context, lanes).items()
    }
    check_grads(
        lambda rows: candidates.candidate_scores(
            backbone, {}, jax.tree.map(jnp.asarray, rows), context, lanes, None
        ),
        (rows,),
        order=1,
        modes=("rev",),
        eps=1e-2,
        rtol=1e-2,
        atol=1e-2,
    )


def test_dropout_is_unbiased_and_only_on_request():
    backbone = make_backbone(ModelConfig(dim=16, item_bias=False), Sizes(2, 2))
    values = _rows(backbone)
    users, items = np.array([1]), np.array([[0, 1]])
    lanes, context = Candidates(Queries(users), items), Context()
    rows = {
        side: {name: values[name][ids] for name, ids in named.items()}
        for side, named in candidates.candidate_ids(backbone, context, lanes).items()
    }
    plain = candidates.candidate_scores(backbone, {}, rows, context, lanes, None)
    keys = jax.random.split(jax.random.key(0), 4000)
    passes = jax.vmap(
        lambda key: candidates.candidate_scores(backbone, {}, rows, context, lanes, (0.2, key))
    )(keys)
    error = np.asarray(passes).std(axis=0) / np.sqrt(4000)
    assert (np.abs(np.asarray(passes).mean(axis=0) - np.asarray(plain)) < 4 * error).all()
