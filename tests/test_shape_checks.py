"""Annotations of shapes are checked while tests run, and cost a user nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shape_checks
from jaxtyping import TypeCheckError

from slgr_jax.models import losses
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.context import Queries


@pytest.mark.parametrize("package", shape_checks.PACKAGES)
def test_a_listed_package_is_there_and_hooked(package):
    assert type(importlib.import_module(package).__spec__.loader).__name__ == "_JaxtypingLoader"


def test_a_wrong_shape_is_refused_and_named():
    assert losses.difference(jnp.array([[3.0, 1.0]])).tolist() == [2.0]
    with pytest.raises(TypeCheckError, match=r"slgr_jax.models.losses.difference(.|\n)*'scores'"):
        losses.difference(jnp.zeros((4, 3)))
    with pytest.raises(TypeCheckError, match=r"random_bits.of_rows(.|\n)*'ids'"):
        random_bits.of_rows(jax.random.key(0), jnp.zeros((2, 2), jnp.int32), 3)


def test_a_wrong_type_is_refused_whatever_kind_of_array_it_is():
    for ids in (jnp.zeros(3), np.zeros(3)):
        with pytest.raises(TypeCheckError, match="'ids'"):
            random_bits.of_rows(jax.random.key(0), ids, 3)
    assert random_bits.of_rows(jax.random.key(0), np.zeros(3, np.int32), 3).shape == (3, 3)


def test_what_is_returned_is_checked_too(monkeypatch):
    assert float(losses.masked_sum(jnp.ones(3), jnp.ones(3))) == 3.0
    monkeypatch.setattr(losses.jnp, "sum", lambda x: x)
    with pytest.raises(TypeCheckError, match=r"return value (.|\n)*losses.masked_sum"):
        losses.masked_sum(jnp.ones(3), jnp.ones(3))


def test_dataclasses_of_arrays_are_checked_unless_jax_rebuilds_them_around_something_else():
    users = jnp.arange(3, dtype=jnp.int32)
    queries = Queries(users, users)
    with pytest.raises(TypeCheckError, match="'as_of'"):
        Queries(users, users[:2])
    with pytest.raises(TypeCheckError, match="'users'"):
        Queries(users.astype(jnp.float32))
    with pytest.raises(TypeCheckError, match="'as_of'"):
        jax.tree.map(lambda x: x[: x[-1]], Queries(users, users - 1))
    assert jax.tree.map(lambda x: x.shape, queries) == Queries((3,), (3,))  # type: ignore[arg-type]
    assert jax.eval_shape(lambda: queries).users.shape == (3,)
    assert jax.vmap(lambda query: query.users + query.as_of)(queries).tolist() == [0, 2, 4]


def test_a_user_pays_nothing():
    code = (
        "import sys, slgr_jax.models.losses as losses, jax.numpy as jnp\n"
        "assert 'beartype' not in sys.modules\n"
        "assert losses.difference(jnp.zeros((4, 3))).shape == (4,)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
