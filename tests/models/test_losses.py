"""Losses against closed forms and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from slgr_jax.guidance import pair_losses
from slgr_jax.models import losses


def test_bpr_is_minus_log_sigmoid_and_never_overflows():
    x = np.array([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4])
    expected = np.logaddexp(0.0, -x)
    np.testing.assert_allclose(losses.bpr(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)
    assert float(losses.bpr(jnp.float32(0.0))) == pytest.approx(np.log(2.0))


def test_hinge_is_zero_past_the_margin():
    x = jnp.array([-1.0, 0.0, 0.4, 0.5, 2.0])
    np.testing.assert_allclose(pair_losses.hinge(x, 0.5), [1.5, 0.5, 0.1, 0.0, 0.0], atol=1e-7)


@pytest.mark.parametrize(
    "loss", [losses.bpr, pair_losses.logistic, lambda x: pair_losses.hinge(x, 1.0)]
)
def test_gradients(loss):
    check_grads(loss, (jnp.array([-1.3, 0.2, 0.7]),), order=1, modes=("rev",), eps=1e-3)


def test_a_difference_and_its_gradient():
    scores = jnp.array([[1.5, -0.25], [2.0, 2.0], [-3.0, 1.0]])
    np.testing.assert_allclose(losses.difference(scores), [1.75, 0.0, -4.0])
    check_grads(losses.difference, (scores,), order=1, modes=("rev",))
    grad = jax.grad(lambda s: jnp.sum(losses.bpr(losses.difference(s))))(scores)
    plain = jax.grad(lambda s: jnp.sum(losses.bpr(s[:, 0] - s[:, 1])))(scores)
    np.testing.assert_array_equal(grad, plain)


def test_masked_sum_silences_masked_nans():
    values, weights = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([0.5, 0.0, 2.0])
    assert float(losses.masked_sum(values, weights)) == pytest.approx(6.5)
    grad = jax.grad(lambda v: losses.masked_sum(v, weights))(values)
    np.testing.assert_allclose(grad, [0.5, 0.0, 2.0])
