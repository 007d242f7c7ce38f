"""The gate kernel against what its docstring says, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import RunConfig, make_run
from slgr_jax.guidance.gates import LogisticGate, empty_inputs
from slgr_jax.guidance.gating import Gating
from slgr_jax.kernels import gates


@pytest.fixture(autouse=True)
def _kernels():
    worlds.need_native_kernels()


def _parameters(inputs: int, hidden: int, scale: float = 1.0):
    rng = np.random.default_rng(inputs)
    shapes = ((2, inputs), (2,), (2, inputs, hidden), (2, hidden))
    return [scale * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _columns(inputs: int, lanes: int):
    rng = np.random.default_rng(lanes)
    return (
        rng.normal(size=(inputs, lanes)).astype(np.float32),
        rng.integers(0, 2, lanes).astype(np.int32),
    )


def _expected(z, folds, weight, bias, inner, outer):
    z, weight, bias, inner, outer = (x.astype(np.float64) for x in (z, weight, bias, inner, outer))
    states = np.tanh(np.einsum("pfh,fp->ph", inner[folds], z))
    return (
        np.einsum("pf,fp->p", weight[folds], z)
        + bias[folds]
        + np.einsum("ph,ph->p", outer[folds], states)
    )


# Parts of a vector, whole ones, and none; lanes for one thread and for several.
@pytest.mark.parametrize(
    ("inputs", "hidden", "lanes"), [(1, 0, 3), (4, 16, 2048), (7, 5, 40), (3, 41, 1000), (2, 8, 1)]
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_equals_the_formula(inputs, hidden, lanes, scale):
    columns, parameters = _columns(inputs, lanes), _parameters(inputs, hidden, scale)
    got = gates.logistic_gate(*columns, *parameters)
    size = 1.0 + np.abs(parameters[3]).sum(axis=1).max(initial=0.0) + np.abs(got)
    assert np.max(np.abs(got - _expected(*columns, *parameters)) / size) < 1e-6


def test_what_is_not_finite_stays_in_its_lane_and_tanh_has_limits():
    z, folds = np.zeros((1, 6), np.float32), np.zeros(6, np.int32)
    z[0] = [np.nan, np.inf, -np.inf, 1e30, -0.0, 0.5]
    one = np.ones((2, 1), np.float32)
    got = gates.logistic_gate(z, folds, 0 * one, np.zeros(2, np.float32), one[..., None], one)
    # 0 * inf is not a number in w . z: so only what is finite is asked for.
    np.testing.assert_array_equal(np.isnan(got), [True, True, True, False, False, False])
    np.testing.assert_allclose(got[3:], [1.0, 0.0, np.tanh(0.5)], atol=1e-7)


def test_lanes_do_not_depend_on_threads():
    columns, parameters = _columns(4, 5000), _parameters(4, 16)
    whole = np.asarray(gates.logistic_gate(*columns, *parameters))
    parts = [
        gates.logistic_gate(columns[0][:, k : k + 100], columns[1][k : k + 100], *parameters)
        for k in range(0, 5000, 100)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("names", ["history,popularity,teacher", "history,teacher,reference"])
def test_a_gate_believes_the_same_by_the_kernel(names):
    """alpha, and the prior of a gate that has a reference."""
    knobs = {"guidance": "pairwise", "teacher": "t", "gate": "calibrated", "gate_inputs": names}
    if "reference" in names:
        knobs["reference_runs"] = "r"
    run: RunConfig = make_run("d", "w", **knobs)
    rng = np.random.default_rng(0)
    empty = empty_inputs()
    inputs = empty.replace(
        **{
            name: jnp.asarray(rng.normal(size=(300, *value.shape[1:])), jnp.float32)
            for name, value in vars(empty).items()
            if name != "fold"
        },
        fold=jnp.asarray(rng.integers(0, 2, 300), jnp.int32),
    )
    gate = LogisticGate(run.gate.input_names, run.gate.gate_hidden)
    variables = gate.init(np.zeros(2, np.uint32), empty)
    params = {
        part: {name: rng.normal(size=value.shape).astype(np.float32) for name, value in of.items()}
        for part, of in variables["params"].items()
    }
    wanted, got = (
        Gating(run, (), native).alpha_and_prior(params, inputs) for native in (False, True)
    )
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.ptp(np.asarray(got[0])) > 0.1
