"""Ranking by products of vectors: against the kernels that rank a matrix of scores (which
`test_ranks` holds against XLA), and against sums that NumPy adds up in the stated order."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import worlds
from ranked_worlds import device_rows, random_masks

from slgr_jax.evaluation import ranking_metrics
from slgr_jax.kernels import ranks


@pytest.fixture(autouse=True)
def _kernels():
    worlds.need_native_kernels()


def _whole_numbers(seed, n_users, n_items, width):
    """Vectors of few whole numbers: any order of sums is exact, and many scores tie."""
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(-2, 3, (n, width)).astype(np.float32) for n in (n_users, n_items))


def _vectors(queries, items):
    return ranks.Vectors(jax.device_put(queries), jax.jit(ranks.Items.of)(jax.device_put(items)))


def _ranked(scores, users, seen, relevant, *, k):
    room = max(int(relevant.sum(axis=1).max()), 1)
    rows = (device_rows(seen), device_rows(relevant))
    users = jax.device_put(np.asarray(users, np.int32))
    return jax.device_get(ranks.rank_rows(scores, users, *rows, width=room, k=k))


def _same(a, b):
    for name in ranks.Ranked._fields:
        left, right = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("width", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("n_items", [1, 31, 33, 512, 1100])
def test_equals_a_matrix_of_exact_scores(n_items, width):
    """Parts of a panel, of a block and of a tile of users; nobody's rows among them."""
    queries, items = _whole_numbers(n_items + width, 40, n_items, width)
    rng = np.random.default_rng(0)
    seen, relevant = random_masks(rng, (40, n_items), seen=0.2, relevant=7 / (n_items + 7))
    seen[1], seen[2], relevant[3] = True, False, False
    users = rng.permutation([*range(40), -1, -1, 5])
    asked = queries[np.maximum(users, 0)]
    matrix = jax.device_put(asked @ items.T)
    for k in (0, min(20, n_items), n_items):
        got = _ranked(_vectors(asked, items), users, seen, relevant, k=k)
        _same(got, _ranked(matrix, users, seen, relevant, k=k))


def test_many_users_and_long_lists_equal_the_matrix():
    """Several tasks, and lists that are too long to be kept for all users of a task at once."""
    queries, items = _whole_numbers(3, 700, 3000, 8)
    seen, relevant = random_masks(np.random.default_rng(1), (700, 3000), seen=0.01, relevant=0.002)
    matrix = jax.device_put(queries @ items.T)
    for k in (20, 2900):
        got = _ranked(_vectors(queries, items), np.arange(700), seen, relevant, k=k)
        _same(got, _ranked(matrix, np.arange(700), seen, relevant, k=k))


def _in_order(queries, items):
    """Sums over even and over odd columns, in order; one rounding a column."""
    halves = []
    for parity in (0, 1):
        total = np.zeros((queries.shape[0], items.shape[0]), np.float32)
        for d in range(parity, queries.shape[1], 2):
            product = np.multiply.outer(
                queries[:, d].astype(np.longdouble), items[:, d].astype(np.longdouble)
            )
            total = (product + total).astype(np.float32)
        halves.append(total)
    return halves[0] + halves[1] + np.float32(0)


@pytest.mark.parametrize("width", [3, 64])
def test_a_score_is_the_sum_in_the_stated_order(width):
    """So it does not matter who is ranked beside a user, nor over how many items."""
    rng = np.random.default_rng(2)
    queries, items = (rng.normal(size=(n, width)).astype(np.float32) for n in (31, 700))
    nothing = np.zeros((31, 700), bool)
    relevant = rng.random(nothing.shape) < 0.02
    got = _ranked(_vectors(queries, items), np.arange(31), nothing, relevant, k=700)
    scores = np.empty(nothing.shape, np.float32)
    np.put_along_axis(scores, got.items, got.values, axis=1)
    np.testing.assert_allclose(scores, queries @ items.T, rtol=1e-4, atol=1e-5)
    if "fma" in _processor_flags():
        np.testing.assert_array_equal(scores, _in_order(queries, items))
    for u in range(31):
        for p, item in enumerate(np.flatnonzero(relevant[u])):
            assert got.score[u, p] == scores[u, item]
            assert got.greater[u, p] == (scores[u] > scores[u, item]).sum()
            assert got.tied[u, p] == (scores[u] == scores[u, item]).sum() - 1
    few = _ranked(_vectors(queries[7:9], items[:40]), [7, 8], nothing, relevant & False, k=40)
    alone = np.empty((2, 40), np.float32)
    np.put_along_axis(alone, few.items, few.values, axis=1)
    np.testing.assert_array_equal(alone, scores[7:9, :40])


def _processor_flags():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split() for line in file if line.startswith("flags")), [])


def test_items_with_the_same_vector_tie():
    rng = np.random.default_rng(4)
    items = np.repeat(rng.normal(size=(50, 16)), 2, axis=0).astype(np.float32)[
        np.argsort(rng.random(100))
    ]
    queries = rng.normal(size=(20, 16)).astype(np.float32)
    relevant = np.ones((20, 100), bool)
    got = _ranked(_vectors(queries, items), np.arange(20), relevant & False, relevant, k=0)
    np.testing.assert_array_equal(got.tied, 1)
    np.testing.assert_array_equal(got.tied_before.sum(axis=1), 50)  # of each two the second


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", ["user", "item"])
def test_rows_that_are_not_finite_are_told(bad, where):
    """3e38 is finite, twice that is not; what is 0 times an infinity is a NaN."""
    queries, items = _whole_numbers(5, 30, 600, 6)
    queries[:, 2], items[:, 2] = 2, 0
    items[:, 3], queries[:, 3] = 2, 0
    if where == "user":
        queries[[4, 17], 3] = bad
    else:
        items[599, 2] = bad
    seen, relevant = random_masks(np.random.default_rng(6), (30, 600), seen=0.1, relevant=0.01)
    with np.errstate(all="ignore"):
        scores = queries @ items.T
    got = _ranked(_vectors(queries, items), np.arange(30), seen, relevant, k=5)
    np.testing.assert_array_equal(got.bad, ~np.isfinite(scores).all(axis=1))
    assert got.bad.any()
    matrix = _ranked(jax.device_put(scores), np.arange(30), seen, relevant, k=5)
    fine = ~got.bad
    np.testing.assert_array_equal(got.items[fine], matrix.items[fine])


def test_large_numbers_that_are_finite_are_ranked():
    """Whether sums may overflow is first told from the greatest numbers; here they do not."""
    queries = np.array([[3e38, 1], [1, 1]], np.float32)
    items = np.array([[0.5, 0], [1, 5], [0, -7], [-1, 2]], np.float32)
    nothing = np.zeros((2, 4), bool)
    got = _ranked(_vectors(queries, items), [0, 1], nothing, nothing, k=4)
    assert not got.bad.any()
    assert got.items.tolist() == [[1, 0, 2, 3], [1, 3, 0, 2]]


def test_pooled_counts_equal_those_of_the_matrix():
    queries, items = _whole_numbers(7, 300, 800, 5)
    seen, relevant = random_masks(np.random.default_rng(8), (300, 800), seen=0.2, relevant=0.01)
    scores = queries @ items.T
    tables = ranking_metrics.pool_tables(scores[relevant & ~seen])
    users = jax.device_put(np.where(np.arange(300) % 7 == 3, -1, np.arange(300)).astype(np.int32))
    order = ("scores", "above2", "ties", "base", "low", "scale", "steps")
    rest = (
        users,
        device_rows(seen),
        device_rows(relevant),
        jax.device_put([tables[n] for n in order]),
    )
    got, expected = (
        jax.device_get(ranks.pool_rows(source, *rest))
        for source in (_vectors(queries, items), jax.device_put(scores))
    )
    np.testing.assert_array_equal(got, expected)
    assert got.any()
