"""Gated pairwise guidance: golden value, closed forms, detached inputs, silence at zero weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from slgr_jax.config import GateConfig
from slgr_jax.guidance import gates, pairwise
from slgr_jax.models import losses
from slgr_jax.sampling.arrays import Facts
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.preferences import pair_facts


def _batch(count: int = 16, seed: int = 0) -> tuple[Batch, Facts]:
    rng = np.random.default_rng(seed)
    facts = Facts(
        log_history=jnp.asarray(rng.normal(size=6), jnp.float32),
        log_popularity=jnp.asarray(rng.normal(size=8), jnp.float32),
        cold=jnp.asarray(rng.integers(0, 2, 6), jnp.float32),
        tail=jnp.asarray(rng.integers(0, 2, 8), jnp.float32),
    )
    none = jnp.zeros(0)
    batch = Batch(
        queries=Queries(none),
        items=none,
        weights=none,
        labels=None,
        shared=None,
        pref_queries=Queries(jnp.asarray(rng.integers(0, 6, count), jnp.int32)),
        pref_items=jnp.asarray(rng.integers(0, 8, (count, 2)), jnp.int32),
        pref_margins=jnp.asarray(rng.uniform(size=count), jnp.float32),
    )
    return batch, facts


def _inputs(scores, config=None):
    batch, facts = _batch(len(scores))
    return pairwise.gate_inputs(
        config or GateConfig(),
        scores,
        lambda key, rate: scores + rate * jax.random.normal(key, scores.shape),
        batch.pref_queries.users,
        batch.pref_margins,
        pair_facts(facts, batch.pref_queries.users, batch.pref_items),
        jax.random.key(0),
    )


def test_inputs_are_the_facts_of_each_preference():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    batch, facts = _batch()
    found = _inputs(scores)
    for g in range(16):
        user, (a, b) = int(batch.pref_queries.users[g]), batch.pref_items[g].tolist()
        assert float(found.history[g]) == float(facts.log_history[user])
        assert float(found.cold[g]) == float(facts.cold[user])
        assert found.popularity[g].tolist() == facts.log_popularity[jnp.array([a, b])].tolist()
        assert found.tail[g].tolist() == [float(facts.tail[i]) for i in (a, b)]
    np.testing.assert_allclose(found.score_margin, scores[:, 0] - scores[:, 1])
    np.testing.assert_array_equal(found.teacher_margin, batch.pref_margins)
    np.testing.assert_array_equal(found.fold, gates.folds(batch.pref_queries.users))


@pytest.mark.parametrize("uncertainty", ["confidence", "entropy", "dropout"])
def test_nothing_a_gate_reads_moves_the_recommender(uncertainty):
    """The gradient of alpha with respect to the scores is zero, whichever q is used."""
    config = GateConfig(uncertainty=uncertainty)
    params = {"weight": jnp.array([0.5, -0.5, 2.0]), "bias": jnp.float32(0.1)}

    def alpha(scores):
        return jnp.sum(gates.PaperGate().apply({"params": params}, _inputs(scores, config)))

    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    np.testing.assert_array_equal(jax.grad(alpha)(scores), 0.0)
    assert float(alpha(scores)) != float(alpha(3.0 * scores))  # it does read them


def test_dropout_uncertainty_is_the_variance_over_passes():
    config = GateConfig(uncertainty="dropout", dropout_samples=4, dropout_rate=0.3)
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    passes = [scores + 0.3 * jax.random.normal(key, scores.shape) for key in keys]
    expected = 4 * np.var([expit(np.asarray(one, np.float64)) for one in passes], axis=0)
    np.testing.assert_allclose(_inputs(scores, config).uncertainty, expected, rtol=1e-4, atol=1e-6)


def test_gated_hinge_golden_value():
    """alpha = (.62 + .5) / 2, m = 1, s = (.3, -.1): .56 * .6 = .336."""
    loss = 0.56 * losses.pairwise_hinge(jnp.float32(0.3 + 0.1), 1.0)
    assert float(loss) == pytest.approx(0.336, abs=1e-6)


def test_guidance_losses_match_their_formulas():
    x = np.linspace(-2.0, 2.0, 64)
    alpha, prior = np.random.default_rng(0).uniform(size=(2, 64))
    soft = -alpha * np.log(expit(x)) - (1 - alpha) * np.log(expit(-x))
    for name, expected in (
        ("hinge", alpha * np.maximum(0, 1.5 - x)),
        ("logistic", alpha * np.log1p(np.exp(-x))),
        ("soft", soft),
        ("confidence", (2 * alpha - 1) ** 2 * soft),
        ("gain", np.abs(alpha - prior) * soft),
    ):
        pair_loss = losses.guidance_pair_loss(name, 1.5)
        found = pairwise.guided(*map(jnp.asarray, (alpha, prior, x)), pair_loss)
        np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.agrees, x > 0)


def test_the_soft_loss_is_least_where_the_recommender_believes_as_the_gate_does():
    alpha = jnp.array([0.1, 0.5, 0.9])
    slope = jax.vmap(jax.grad(losses.pairwise_soft))(jnp.log(alpha / (1 - alpha)), alpha)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_pointwise_is_the_squared_error_of_both_probabilities():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(9, 2)), rng.uniform(size=(9, 2))
    found = pairwise.pointwise(jnp.asarray(scores), jnp.asarray(targets))
    np.testing.assert_allclose(found.loss, ((expit(scores) - targets) ** 2).mean(1), rtol=1e-5)
    same = np.sign(scores[:, 0] - scores[:, 1]) == np.sign(targets[:, 0] - targets[:, 1])
    np.testing.assert_array_equal(found.agrees, same)
