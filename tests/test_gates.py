"""Gates and uncertainties against closed forms, and the paper gate's proven one-way drift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as sps
from scipy.special import expit

from slgr_jax import gates
from slgr_jax.config import GateConfig, GuidanceConfig
from slgr_jax.guidance import pairwise


def _inputs(count: int = 64, seed: int = 0) -> gates.GateInputs:
    rng = np.random.default_rng(seed)
    return gates.GateInputs(
        history=jnp.asarray(rng.integers(0, 50, count), jnp.int32),
        popularity=jnp.asarray(rng.integers(0, 50, (count, 2)), jnp.int32),
        cold=jnp.asarray(rng.integers(0, 2, count), jnp.float32),
        tail=jnp.asarray(rng.integers(0, 2, (count, 2)), jnp.float32),
        uncertainty=jnp.asarray(rng.uniform(size=(count, 2)), jnp.float32),
        score_margin=jnp.asarray(rng.normal(size=count), jnp.float32),
        teacher_margin=jnp.asarray(rng.uniform(size=count), jnp.float32),
    )


def test_paper_gate_is_the_mean_of_two_sigmoids():
    inputs = _inputs()
    weight, bias = np.array([0.3, -0.7, 1.1], np.float32), np.float32(0.2)
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    alpha = gates.PaperGate().apply({"params": params}, inputs)
    for row in range(alpha.size):
        each = [
            expit(
                weight[0] * inputs.cold[row]
                + weight[1] * inputs.tail[row, side]
                + weight[2] * inputs.uncertainty[row, side]
                + bias
            )
            for side in (0, 1)
        ]
        assert float(alpha[row]) == pytest.approx(np.mean(each), rel=1e-5)


def test_paper_gate_starts_at_one_half_with_four_parameters():
    variables = gates.PaperGate().init(jax.random.key(0), gates.empty_inputs())
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == 4
    np.testing.assert_array_equal(gates.PaperGate().apply(variables, _inputs()), 0.5)


def test_paper_gate_can_only_fall():
    """PAPER 4.3: each term of its gradient is >= 0, so descent never raises w or b."""
    gate, config = gates.PaperGate(), GuidanceConfig()

    def loss(params, inputs, difference):
        return jnp.sum(pairwise.selective(gate, params, inputs, difference, config).loss)

    for seed in range(20):
        rng = np.random.default_rng(seed)
        params = {
            "weight": jnp.asarray(rng.normal(size=3), jnp.float32),
            "bias": jnp.asarray(rng.normal(), jnp.float32),
        }
        grad = jax.grad(loss)(
            params, _inputs(seed=seed), jnp.asarray(rng.normal(size=64), jnp.float32)
        )
        assert (np.asarray(grad["weight"]) >= 0).all()
        assert float(grad["bias"]) > 0


def test_controls():
    inputs = _inputs()
    constant = gates.make_gate(GateConfig(gate="constant", alpha=0.25))
    np.testing.assert_array_equal(constant.apply({}, inputs), 0.25)
    rule = gates.make_gate(GateConfig(gate="rule")).apply({}, inputs)
    expected = (
        (np.asarray(inputs.cold) == 1)
        | (np.asarray(inputs.tail)[:, 0] == 1)
        | (np.asarray(inputs.tail)[:, 1] == 1)
    )
    np.testing.assert_array_equal(rule, expected.astype(np.float32))
    assert 0 < expected.mean() < 1


def test_uncertainties_match_their_formulas():
    scores = np.array([-200.0, -3.0, -0.5, 0.0, 0.5, 3.0, 200.0], np.float32)
    p = expit(scores.astype(np.float64))
    np.testing.assert_allclose(
        gates.confidence_uncertainty(scores), 2 * (1 - np.maximum(p, 1 - p)), rtol=1e-5, atol=1e-7
    )
    entropy = [sps.entropy([x, 1 - x]) / np.log(2) for x in p]
    np.testing.assert_allclose(gates.entropy_uncertainty(scores), entropy, rtol=1e-5, atol=1e-6)
    samples = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    expected = 4 * expit(samples.astype(np.float64)).var(axis=0)
    np.testing.assert_allclose(gates.dropout_uncertainty(samples), expected, rtol=1e-4)
