"""Gates and uncertainties against closed forms, and the paper gate's proven one-way drift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as sps
from scipy.special import expit

from slgr_jax.config import GATE_INPUTS, GateConfig, RunConfig
from slgr_jax.guidance import gates, pair_losses
from slgr_jax.guidance.gating import Gating


def _inputs(count: int = 64, seed: int = 0) -> gates.GateInputs:
    rng = np.random.default_rng(seed)
    return gates.GateInputs(
        history=jnp.asarray(rng.normal(size=count), jnp.float32),
        popularity=jnp.asarray(rng.normal(size=(count, 2)), jnp.float32),
        cold=jnp.asarray(rng.integers(0, 2, count), jnp.float32),
        tail=jnp.asarray(rng.integers(0, 2, (count, 2)), jnp.float32),
        uncertainty=jnp.asarray(rng.uniform(size=(count, 2)), jnp.float32),
        score_margin=jnp.asarray(rng.normal(size=count), jnp.float32),
        teacher_margin=jnp.asarray(rng.uniform(size=count), jnp.float32),
        reference_margin=jnp.asarray(rng.normal(size=count), jnp.float32),
        votes=jnp.asarray(rng.uniform(size=(count, 2)), jnp.float32),
        confidence=jnp.asarray(rng.uniform(size=(count, 2)), jnp.float32),
        named=jnp.asarray(rng.normal(size=(count, 2)), jnp.float32),
        fold=jnp.asarray(rng.integers(0, 2, count), jnp.int32),
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
    """Each term of its gradient is >= 0, so descent never raises w or b."""
    gate, pair_loss = gates.PaperGate(), pair_losses.pair_loss("hinge", 1.0)

    def loss(params, inputs, difference):
        alpha = gate.apply({"params": params}, inputs)
        return jnp.sum(pair_loss(difference, alpha, alpha))

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
    np.testing.assert_allclose(gates.variance_uncertainty(samples), expected, rtol=1e-4)


def _columns(inputs, names):
    """z of a logistic gate, column by column, in the order of the knob's help."""
    found = {
        "margin": [inputs.score_margin],
        "history": [inputs.history],
        "popularity": list(inputs.popularity.T),
        "uncertainty": list(inputs.uncertainty.T),
        "teacher": [inputs.teacher_margin],
        "slices": [inputs.cold, *inputs.tail.T],
        "agreement": [np.sign(inputs.score_margin)],
        "reference": [inputs.reference_margin],
        "votes": list(inputs.votes.T),
        "confidence": list(inputs.confidence.T),
        "named": list(inputs.named.T),
        "named_gap": list((inputs.named - inputs.popularity).T),
    }
    return np.stack([column for name in names for column in found[name]], axis=1)


def _as_float64(inputs):
    """The numbers in float64; the folds as they are."""
    numbers = jax.tree.map(lambda x: np.asarray(x, np.float64), vars(inputs))
    return gates.GateInputs(**numbers | {"fold": np.asarray(inputs.fold)})


def _logit(params, fold, row):
    """w . z [+ v . tanh(V z)] of one row."""
    value = params["weight"][fold] @ row
    if "inner" in params:
        value += params["outer"][fold] @ np.tanh(np.asarray(params["inner"][fold]).T @ row)
    return float(value)


@pytest.mark.parametrize(
    ("names", "hidden"), [(GATE_INPUTS, 0), (("history", "popularity", "teacher"), 3)]
)
def test_logistic_gate_is_a_sigmoid_of_its_inputs_by_fold(names, hidden):
    inputs = _inputs()
    gate = gates.LogisticGate(names, hidden)
    params = gate.init(jax.random.key(0), gates.empty_inputs())["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    z = _columns(_as_float64(inputs), names)
    logit = []
    for row, fold in zip(z, inputs.fold, strict=True):
        logit.append(_logit(params["alpha"], fold, row) + float(params["alpha"]["bias"][fold]))
    found = gate.apply({"params": params}, inputs)
    np.testing.assert_allclose(found, expit(logit), rtol=1e-4)


def test_a_supervised_gate_starts_at_the_recommenders_own_belief():
    inputs = _inputs()
    for names, expected in (
        (("margin", "history"), expit(np.asarray(inputs.score_margin))),
        (("popularity", "reference"), expit(np.asarray(inputs.reference_margin))),
        (("margin", "reference"), expit(np.asarray(inputs.score_margin))),
        (("history", "teacher"), np.full(64, 0.5)),
    ):
        gate = gates.LogisticGate(names, 4)
        variables = gate.init(jax.random.key(0), gates.empty_inputs())
        np.testing.assert_allclose(gate.apply(variables, inputs), expected, rtol=1e-5)


def _gating(**knobs):
    return Gating(RunConfig("d", "w", gate=GateConfig(**knobs)))


def test_what_is_believed_without_the_teacher_does_not_know_whom_it_prefers():
    """The prior by hand, of the other half's parameters; exchanging the items exchanges it too; it
    starts at what the reference believes, and is 1/2 without one."""
    inputs = _inputs()
    names = ("margin", "history", "popularity", "teacher", "slices", "reference")
    names += ("votes", "confidence", "named", "named_gap")
    gating = _gating(
        gate="calibrated", gate_inputs=",".join(names), gate_hidden=4, reference_runs="a"
    )
    params = gating.init(jax.random.key(0))
    start = gating.alpha_and_prior(params, inputs)[1]
    np.testing.assert_allclose(start, expit(np.asarray(inputs.score_margin)), rtol=1e-5)

    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    alpha, prior = gating.alpha_and_prior(params, inputs)
    turned = inputs.replace(
        popularity=inputs.popularity[:, ::-1], tail=inputs.tail[:, ::-1],
        score_margin=-inputs.score_margin, reference_margin=-inputs.reference_margin,
    )  # fmt: skip
    without_teacher = ("margin", "history", "popularity", "slices", "reference")
    rows, turned_rows = (_columns(_as_float64(each), without_teacher) for each in (inputs, turned))
    logit = [
        0.5 * (_logit(params["prior"], 1 - fold, z) - _logit(params["prior"], 1 - fold, other))
        for z, other, fold in zip(rows, turned_rows, np.asarray(inputs.fold), strict=True)
    ]
    np.testing.assert_allclose(prior, expit(logit), rtol=1e-3)
    turned_alpha, turned_prior = gating.alpha_and_prior(params, turned)
    np.testing.assert_allclose(turned_prior, 1 - prior, rtol=1e-4, atol=1e-6)
    assert np.abs(turned_alpha - (1 - alpha)).max() > 0.1
    for blind in (_gating(gate="calibrated", gate_inputs="history"), _gating(gate="rule")):
        params = blind.init(jax.random.key(0))
        np.testing.assert_array_equal(blind.alpha_and_prior(params, inputs)[1], 0.5)


def test_folds_are_two_halves_that_do_not_follow_the_index():
    fold = np.asarray(gates.folds(jnp.arange(10_000)))
    assert set(fold.tolist()) == {0, 1}
    assert abs(fold.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(fold[1:], fold[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(fold, np.arange(10_000))[0, 1]) < 0.03


def test_budget_penalty_has_the_value_and_the_gradient_of_the_squared_gap():
    config = GateConfig(gate="budget", budget=0.3, budget_weight=2.0)
    alpha = jnp.asarray(np.random.default_rng(0).uniform(size=50), jnp.float32)

    def plain(alpha):
        return 2.0 * (jnp.mean(alpha) - 0.3) ** 2

    def ours(alpha):
        mean = jax.lax.stop_gradient(jnp.mean(alpha))
        return jnp.mean(gates.budget_penalty(alpha, mean, config))

    assert float(ours(alpha)) == pytest.approx(float(plain(alpha)), rel=1e-4)
    np.testing.assert_allclose(jax.grad(ours)(alpha), jax.grad(plain)(alpha), rtol=1e-4)


def test_calibration_loss_is_cross_entropy():
    logit, right = np.array([-3.0, 0.0, 2.0]), np.array([1.0, 0.0, 1.0])
    p = expit(logit)
    expected = -right * np.log(p) - (1 - right) * np.log(1 - p)
    np.testing.assert_allclose(gates.calibration_loss(logit[None], right), expected, rtol=1e-5)
    both = np.stack([logit, np.zeros(3)])  # of alpha, and of a prior of 1/2
    expected += np.log(2)
    np.testing.assert_allclose(gates.calibration_loss(both, right), expected, rtol=1e-5)
