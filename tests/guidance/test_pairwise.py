"""Gated pairwise guidance: golden value, closed forms, detached inputs, silence at zero weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from slgr_jax import gates, losses
from slgr_jax.config import GateConfig, GuidanceConfig
from slgr_jax.data.batches import Facts
from slgr_jax.data.context import Queries
from slgr_jax.data.draws import Batch
from slgr_jax.guidance import pairwise


def _batch(count: int = 16, seed: int = 0) -> tuple[Batch, Facts]:
    rng = np.random.default_rng(seed)
    facts = Facts(
        history=jnp.asarray(rng.integers(0, 9, 6), jnp.int32),
        popularity=jnp.asarray(rng.integers(0, 9, 8), jnp.int32),
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
        pref_weights=jnp.ones(count),
    )
    return batch, facts


def _inputs(scores, config=None):
    batch, facts = _batch(len(scores))
    return pairwise.gate_inputs(
        config or GateConfig(),
        scores,
        lambda key, rate: scores + rate * jax.random.normal(key, scores.shape),
        batch,
        facts,
        jax.random.key(0),
    )


def test_inputs_are_the_facts_of_each_preference():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    batch, facts = _batch()
    found = _inputs(scores)
    for g in range(16):
        user, (a, b) = int(batch.pref_queries.users[g]), batch.pref_items[g].tolist()
        assert int(found.history[g]) == int(facts.history[user])
        assert float(found.cold[g]) == float(facts.cold[user])
        assert found.popularity[g].tolist() == [int(facts.popularity[i]) for i in (a, b)]
        assert found.tail[g].tolist() == [float(facts.tail[i]) for i in (a, b)]
    np.testing.assert_allclose(found.score_margin, scores[:, 0] - scores[:, 1])
    np.testing.assert_array_equal(found.teacher_margin, batch.pref_margins)


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


def test_guidance_loss_scales_with_alpha_and_follows_its_config():
    inputs, difference = _inputs(jnp.zeros((64, 2))), jnp.linspace(-2.0, 2.0, 64)
    for name, expected in (
        ("hinge", np.maximum(0, 1.5 - np.asarray(difference))),
        ("logistic", np.log1p(np.exp(-np.asarray(difference, np.float64)))),
    ):
        config = GuidanceConfig(guidance_loss=name, margin=1.5)
        found = pairwise.selective(gates.ConstantGate(0.3), {}, inputs, difference, config)
        np.testing.assert_allclose(found.loss, 0.3 * expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.agrees, np.asarray(difference) > 0)
