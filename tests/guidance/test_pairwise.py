"""Gated guidance by pairs: golden value, closed forms, detached inputs, what a loss reports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy.special import expit

from slgr_jax.config import GateConfig, GuidanceConfig, PairwiseConfig, RunConfig
from slgr_jax.guidance import gates, pair_losses, pointwise
from slgr_jax.guidance.base import Scored
from slgr_jax.guidance.gated import GatedDraw
from slgr_jax.guidance.gating import Gating, Observed, gate_inputs
from slgr_jax.guidance.pairwise import Pairwise
from slgr_jax.guidance.pointwise import Pointwise, PointwiseDraw
from slgr_jax.sampling.arrays import Facts
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.preferences import Preferences, pair_facts


def _preferences(count: int = 16, seed: int = 0) -> tuple[Preferences, Facts]:
    rng = np.random.default_rng(seed)
    facts = Facts(
        log_history=jnp.asarray(rng.normal(size=6), jnp.float32),
        log_popularity=jnp.asarray(rng.normal(size=8), jnp.float32),
        cold=jnp.asarray(rng.integers(0, 2, 6), jnp.float32),
        tail=jnp.asarray(rng.integers(0, 2, 8), jnp.float32),
    )
    users = jnp.asarray(rng.integers(0, 6, count), jnp.int32)
    items = jnp.asarray(rng.integers(0, 8, (count, 2)), jnp.int32)
    margins = jnp.asarray(rng.uniform(size=count), jnp.float32)
    return Preferences(Queries(users), items, margins, pair_facts(facts, users, items)), facts


def _noisy(scores):
    """Stochastic passes around `scores`."""
    return lambda key, rate: scores + rate * jax.random.normal(key, scores.shape)


def _inputs(scores, config=None):
    pairs, _ = _preferences(len(scores))
    return gate_inputs(
        RunConfig("d", "w", gate=config or GateConfig()),
        scores,
        _noisy(scores),
        pairs.queries.users,
        pairs.margins,
        pairs.facts,
        jax.random.key(0),
    )


def test_inputs_are_the_facts_of_each_preference():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    pairs, facts = _preferences()
    inputs = _inputs(scores)
    for g in range(16):
        user, (a, b) = int(pairs.queries.users[g]), pairs.items[g].tolist()
        assert float(inputs.history[g]) == float(facts.log_history[user])
        assert float(inputs.cold[g]) == float(facts.cold[user])
        assert inputs.popularity[g].tolist() == facts.log_popularity[jnp.array([a, b])].tolist()
        assert inputs.tail[g].tolist() == [float(facts.tail[i]) for i in (a, b)]
    np.testing.assert_allclose(inputs.score_margin, scores[:, 0] - scores[:, 1])
    np.testing.assert_array_equal(inputs.teacher_margin, pairs.margins)
    np.testing.assert_array_equal(inputs.fold, gates.folds(pairs.queries.users))


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
    loss = 0.56 * pair_losses.hinge(jnp.float32(0.3 + 0.1), 1.0)
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
        pair_loss = pair_losses.pair_loss(name, 1.5)
        terms = pair_loss(*map(jnp.asarray, (x, alpha, prior)))
        np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-6)


def _scored(scores):
    return Scored(scores, scores[:, 0] - scores[:, 1], _noisy(scores))


@pytest.mark.parametrize("name", ["hinge", "soft", "confidence"])
def test_a_step_adds_the_mean_of_its_pairs_and_says_how_often_they_agree(name):
    """Of the paper's gate, which reads the scores: they move the loss by its pairs alone."""
    run = RunConfig(
        "d",
        "w",
        guidance=GuidanceConfig(guidance="pairwise", teacher="t"),
        pairwise=PairwiseConfig(guidance_loss=name, margin=1.5),
        gate=GateConfig(gate="paper"),
    )
    guidance = Pairwise(run, Gating(run))
    params = {"weight": jnp.array([0.5, -0.5, 2.0]), "bias": jnp.float32(0.1)}
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    drawn = GatedDraw(_preferences()[0], None)

    def added(scores):
        return guidance.loss(
            params,
            _scored(scores),
            drawn,
            Observed(1.0),
            worlds.one_device(),
            jax.random.key(0),
        )

    alpha = np.asarray(gates.PaperGate().apply({"params": params}, _inputs(scores)), np.float64)
    x = np.asarray(scores[:, 0] - scores[:, 1], np.float64)
    if name == "hinge":
        terms, slope = alpha * np.maximum(0, 1.5 - x), -alpha * (x < 1.5)
    else:
        weight = (2 * alpha - 1) ** 2 if name == "confidence" else np.ones(16)
        terms = weight * (-alpha * np.log(expit(x)) - (1 - alpha) * np.log(expit(-x)))
        slope = weight * (expit(x) - alpha)
    step = added(scores)
    assert float(step.loss) == pytest.approx(terms.mean(), rel=1e-5)
    assert float(step.gate) == 0.0
    assert float(step.metrics["alpha"]) == pytest.approx(alpha.mean(), rel=1e-5)
    assert float(step.metrics["agreement"]) == (x > 0).mean()
    assert tuple(step.metrics) == guidance.metrics
    if name == "confidence":  # what a pair counts by is not alpha, and is told
        assert float(step.metrics["weight"]) == pytest.approx(weight.mean(), rel=1e-5)
    gradient = jax.grad(lambda scores: added(scores).loss)(scores)
    expected = np.stack([slope, -slope], axis=1) / 16
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_soft_loss_is_least_where_the_recommender_believes_as_the_gate_does():
    alpha = jnp.array([0.1, 0.5, 0.9])
    slope = jax.vmap(jax.grad(pair_losses.soft))(jnp.log(alpha / (1 - alpha)), alpha)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_pointwise_is_the_squared_error_of_both_probabilities():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(16, 2)), rng.uniform(size=(16, 2))
    targets = np.sort(targets, axis=1)[:, ::-1]  # the greater first, as they are drawn
    errors = ((expit(scores) - targets) ** 2).mean(1)
    squared = pointwise.squared_errors(*map(jnp.asarray, (scores, targets)))
    np.testing.assert_allclose(squared, errors, rtol=1e-5)

    run = RunConfig(
        "d",
        "w",
        guidance=GuidanceConfig(guidance="pointwise", teacher="t"),
        gate=GateConfig(gate="constant", alpha=0.7),
    )
    added = Pointwise(run, Gating(run)).loss(
        {},
        _scored(jnp.asarray(scores, jnp.float32)),
        PointwiseDraw(_preferences()[0], jnp.asarray(targets, jnp.float32), None),
        Observed(1.0),
        worlds.one_device(),
        jax.random.key(0),
    )
    assert float(added.loss) == pytest.approx(0.7 * errors.mean(), rel=1e-5)
    same = np.sign(scores[:, 0] - scores[:, 1]) == np.sign(targets[:, 0] - targets[:, 1])
    assert float(added.metrics["agreement"]) == same.mean()
