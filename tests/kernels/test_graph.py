"""The graph kernel against the XLA program, over widths that fill no vector, and over tasks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.data.dataset import Csr
from slgr_jax.models.backbones import lightgcn
from slgr_jax.sampling.context import Graph


@pytest.fixture(autouse=True)
def _kernels():
    worlds.need_native_kernels()


def _graph(pairs, n_users, n_items):
    by_user = Csr.from_pairs(pairs[:, 0], pairs[:, 1], n_users)
    by_item = Csr.from_pairs(pairs[:, 1], pairs[:, 0], n_items)
    arrays = (by_user.offsets, by_user.indices, by_item.offsets, by_item.indices)
    return Graph(*(jnp.asarray(x, jnp.int32) for x in arrays))


def _tables(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(n, width)), jnp.float32) for n in rows)


@functools.partial(jax.jit, static_argnums=0)
def _run(how, tables, graph, words):
    """The result and a gradient."""
    out, back = jax.vjp(lambda tables: lightgcn.propagate(how, tables, graph, words), tables)
    return out, back(out)[0]


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_equals_xla(rate):
    """Thousands of edges, so that several threads share them; degrees of a power law."""
    rows = (300, 200)
    pairs = worlds.random_pairs(0, 290, 190, 20)
    graph, tables = _graph(pairs, *rows), _tables(rows, 110)
    words = lightgcn.edge_words(jax.random.key(0), *rows) if rate else None
    wanted = _run(lightgcn.Propagation(3, False, rate), tables, graph, words)
    # A part of a vector; one; one and a part; all that is summed at once; that, three and a part.
    for width in (1, 16, 30, 64, 110):
        some = tuple(x[:, :width] for x in tables)
        got = _run(lightgcn.Propagation(3, True, rate), some, graph, words)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other[:, :width], rtol=2e-5, atol=2e-6)


def test_many_tasks_on_many_threads_give_the_bits_of_one():
    """A component's result does not depend on what else is in the graph, and so on how its rows
    fall into tasks."""
    rows, copies = (60, 50), 40
    pairs = worlds.random_pairs(1, *rows, 12)
    tables = _tables(rows, 64)
    words = lightgcn.edge_words(jax.random.key(1), *rows)
    how = lightgcn.Propagation(2, True, 0.3)
    alone = _run(how, tables, _graph(pairs, *rows), words)
    many = np.concatenate([pairs + k * np.array(rows) for k in range(copies)])
    together = _run(
        how,
        tuple(jnp.tile(x, (copies, 1)) for x in tables),
        _graph(many, *(copies * n for n in rows)),
        tuple(jnp.tile(x, copies) for x in words),
    )
    jax.tree.map(
        lambda one, all_: np.testing.assert_array_equal(np.tile(one, (copies, 1)), all_),
        alone,
        together,
    )


def test_nan_reaches_the_neighbours_and_nobody_else():
    """User 0 - item 0 - user 1, and user 2 - item 1."""
    graph = _graph(np.array([[0, 0], [1, 0], [2, 1]]), 3, 2)
    user, item = _tables((3, 2), 20)
    tables = user.at[1, 3].set(jnp.nan), item
    out, _ = _run(lightgcn.Propagation(2, True), tables, graph, None)
    assert np.isnan(out[0][:, 3]).tolist() == [True, True, False]
    assert np.isnan(out[1][:, 3]).tolist() == [True, False]
    assert np.isnan(np.concatenate(out)).sum() == 3
