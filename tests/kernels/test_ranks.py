"""The ranking kernels against XLA's programs, number for number, and against plain NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked_worlds import device_rows, random_masks

from slgr_jax.evaluation import device_ranking, ranking_metrics
from slgr_jax.evaluation.placement import Placement

INF = np.float32(np.inf)


@pytest.fixture(autouse=True)
def _kernels():
    worlds.need_native_kernels()


def _both(scores, seen, relevant, *, users=None, k, width=None):
    """What the kernel and XLA's program give, checked to be equal where anything is told."""
    users = np.arange(len(scores), dtype=np.int32) if users is None else np.asarray(users, np.int32)
    whole = (jax.device_put(scores[np.maximum(users, 0)]), jax.device_put(users), device_rows(seen))
    counts = np.zeros(len(scores), int) if relevant is None else relevant.sum(axis=1)
    room = scores.shape[1] if width is None else width  # one shape, one program
    wanted = None if relevant is None else device_rows(relevant)
    native, xla = (
        jax.device_get(
            device_ranking.rank_chunk(
                *whole, wanted, width=room, k=k, at=Placement(), native=native
            )
        )
        for native in (True, False)
    )
    np.testing.assert_array_equal(native["bad"], xla["bad"])
    told = (users >= 0) & ~native["bad"]
    assert native.keys() == xla.keys()
    if k:
        for name in ("items", "scores"):
            _same(native["top"][name][told], xla["top"][name][told], name)
    if relevant is not None:
        there = told[:, None] & (np.arange(room) < counts[np.maximum(users, 0)][:, None])
        for name in device_ranking.PAIR_DTYPES:
            _same(native["pairs"][name][there], xla["pairs"][name][there], name)
    return native


def _same(a, b, name):
    """Equal in kind and in every bit."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32), err_msg=name)


def _scores(kind, rng, shape):
    n = np.arange(shape[1], dtype=np.float32)
    line = {
        "ascending": n,
        "descending": -n,
        "equal": np.zeros_like(n),
        "zeros": np.where(n % 2, np.float32(-0.0), np.float32(0.0)),
        "saw": n % 7,
        "extreme": np.where(n % 2, np.float32(3e38), np.float32(-3e38)),
        "late": np.where(n == shape[1] - 1, np.nextafter(np.float32(1), INF), np.float32(1)),
        "tiny": np.float32(1e-44) * (n % 5 - 2),
    }
    if kind in line:
        return np.broadcast_to(line[kind], shape).astype(np.float32)
    scores = rng.normal(size=shape).astype(np.float32)
    return np.round(scores * 2) / 2 if kind == "quantised" else scores


KINDS = ("normal", "quantised", "ascending", "descending", "equal", "zeros", "saw", "extreme")


@pytest.mark.parametrize("kind", [*KINDS, "late", "tiny"])
def test_equals_xla(kind):
    rng = np.random.default_rng(0)
    shape = (9, 1500)
    scores = _scores(kind, rng, shape)
    seen, relevant = random_masks(rng, shape, seen=0.2, relevant=0.02)
    seen[1], seen[2], relevant[3], relevant[4] = True, False, False, True
    assert (seen & relevant).any()
    _both(scores, seen, relevant, k=20)


@pytest.mark.parametrize("n_items", [1, 15, 16, 65, 8200])
def test_any_catalogue(n_items):
    """Parts of a lane, of a step and of a tile."""
    rng = np.random.default_rng(n_items)
    scores = _scores("quantised", rng, (5, n_items))
    seen, relevant = random_masks(rng, scores.shape, seen=0.3, relevant=7 / (n_items + 7))
    _both(scores, seen, relevant, k=min(10, n_items))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 299, 300])
def test_lists_as_long_as_the_catalogue(kind, k):
    rng = np.random.default_rng(1)
    scores = _scores(kind, rng, (4, 300))
    seen, _ = random_masks(rng, scores.shape, seen=0.1, relevant=0)
    seen[0] = False
    _both(scores, seen, None, k=k, width=0)


def test_lists_longer_than_the_catalogue_run_out():
    scores = np.array([[3, 1, 2]], np.float32)
    found = jax.device_get(
        device_ranking.rank_chunk(
            *jax.device_put((scores, np.zeros(1, np.int32))),
            device_rows(np.array([[False, True, False]])),
            None, width=0, k=5, at=Placement(), native=True,
        )
    )["top"]  # fmt: skip
    assert found["items"].tolist() == [[0, 2, -1, -1, -1]]
    assert found["scores"].tolist() == [[3, 2, -INF, -INF, -INF]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 64, 99])
def test_rows_that_are_not_finite_are_told(bad, at):
    """Even where the item is masked; and never of padding."""
    rng = np.random.default_rng(2)
    scores = _scores("normal", rng, (6, 100)).copy()
    seen, relevant = random_masks(rng, scores.shape, seen=0.2, relevant=0.1)
    scores[2, at], scores[4, at] = bad, bad
    seen[4, at] = True
    native = _both(scores, seen, relevant, users=[0, -1, 2, 3, 4, 5, -7], k=5)
    assert np.flatnonzero(native["bad"]).tolist() == [2, 4]
    scores[0, at] = bad  # what padding is scored as
    native = _both(scores, seen, relevant, users=[1, -1, 3, 3, 3, 3, 3], k=5)
    assert not native["bad"].any()


def test_one_user_may_come_twice_and_rooms_may_be_larger():
    rng = np.random.default_rng(3)
    scores = _scores("quantised", rng, (40, 70))
    seen, relevant = random_masks(rng, scores.shape, seen=0.3, relevant=0.1)
    _both(scores, seen, relevant, users=rng.integers(-1, 40, 100), k=7, width=64)


def test_ranks_without_lists():
    rng = np.random.default_rng(4)
    scores = _scores("quantised", rng, (8, 200))
    seen, relevant = random_masks(rng, scores.shape, seen=0.1, relevant=0.5)
    assert "top" not in _both(scores, seen, relevant, k=0)


def test_many_rows_on_many_threads():
    rng = np.random.default_rng(5)
    scores = _scores("normal", rng, (300, 3000))
    seen, relevant = random_masks(rng, scores.shape, seen=0.01, relevant=0.003)
    _both(scores, seen, relevant, k=20)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.integers(1, 6),
)
def test_equals_xla_on_random_levels(seed, seen, relevant, levels):
    """Scores of a few values, and every share of masked and relevant items; two fixed shapes."""
    rng = np.random.default_rng(seed)
    values = rng.choice(np.array([-0.0, 0.0, 1, -1, 1e-38, 3e38], np.float32), levels)
    scores = rng.choice(values, (3, 90)).astype(np.float32)
    masks = random_masks(rng, scores.shape, seen=seen, relevant=relevant)
    _both(scores, *masks, k=10)


# ---- the pooled AUC


def _pooled(scores, seen, relevant, pool_scores, users=None):
    """Each user's sum from the kernel, from XLA's program and from NumPy: all the same."""
    users = np.arange(len(scores), dtype=np.int32) if users is None else np.asarray(users, np.int32)
    pool = device_ranking.Pool(**jax.device_put(ranking_metrics.pool_tables(pool_scores)))
    at = np.maximum(users, 0)
    whole = (
        jax.device_put(scores[at]),
        jax.device_put(users),
        device_rows(seen),
        device_rows(relevant),
        pool,
    )
    words = device_ranking.pool_chunk(*whole, pieces=2, bits=32, at=Placement(), native=True)
    digits = device_ranking.pool_chunk(*whole, pieces=8, bits=4, at=Placement(), native=False)
    totals = [
        sum(jax.device_get(found)[:, i].astype(object) << (bits * i) for i in range(pieces))
        for found, pieces, bits in ((words, 2, 32), (digits, 8, 4))
    ]
    np.testing.assert_array_equal(totals[0][users >= 0], totals[1][users >= 0])
    assert not totals[0][users < 0].any()
    for u, total in zip(users, totals[0], strict=True):
        x = scores[u, ~seen[u] & ~relevant[u], None]
        if u >= 0:
            assert total == 2 * (pool_scores > x).sum() + (pool_scores == x).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_counts_equal_xla(kind):
    rng = np.random.default_rng(6)
    scores = _scores(kind, rng, (7, 333))
    seen, relevant = random_masks(rng, scores.shape, seen=0.3, relevant=0.1)
    seen[0], relevant[1], seen[2] = True, True, False
    own = scores[relevant & ~seen]
    _pooled(scores, seen, relevant, own, users=[0, 1, -1, 2, 3, 4, 5, 6])
    _pooled(scores, seen, relevant, own[:1])
    _pooled(scores, seen, relevant, (own * np.float32(0.5)).astype(np.float32))


def test_pooled_counts_pass_32_bits():
    scores = np.zeros((2, 5000), np.float32)
    nothing = np.zeros(scores.shape, bool)
    pool = ranking_metrics.pool_tables(np.ones(3, np.float32))
    pool["above2"][0] = (1 << 31) - 2  # as if 2^30 - 1 pairs were scored 1
    tables = device_ranking.Pool(**jax.device_put(pool))
    users = jax.device_put(np.arange(2, dtype=np.int32))
    words = device_ranking.pool_chunk(
        jax.device_put(scores), users, device_rows(nothing), device_rows(nothing), tables,
        pieces=2, bits=32, at=Placement(), native=True,
    )  # fmt: skip
    low, high = jax.device_get(words).astype(object).T
    assert (low + (high << 32)).tolist() == [5000 * ((1 << 31) - 2)] * 2
