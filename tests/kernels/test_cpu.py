"""The CPU kernels against float64 NumPy, against the XLA programs they stand in for, and over
widths that fill no block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import (
    TABLE_DTYPES,
    TABLE_OPTIMIZERS,
    OptimizerConfig,
    SamplerConfig,
)
from slgr_jax.data.dataset import Csr
from slgr_jax.kernels import cpu
from slgr_jax.models import embedding_table, row_optimizers
from slgr_jax.sampling import arrays, batch, negatives, preferences
from slgr_jax.sampling.teacher_arrays import PreferenceRule, teacher_lists

WIDTHS = (1, 64, 77)  # a part of a block, two blocks, two and a part


@pytest.fixture(autouse=True)
def _kernels():
    worlds.need_native_kernels()


def _world(width, *, lanes=300, candidates=2, slots=0, seed=0):
    """Tables with few rows, so that most are touched often, and lanes of them."""
    rng = np.random.default_rng(seed)
    table = {
        name: np.concatenate(
            [rng.normal(size=(rows, width)), rng.uniform(0.1, 2, (rows, slots))], axis=1
        ).astype(np.float32)
        for name, rows in (("user", 40), ("item", 90))
    }
    users = rng.integers(0, 40, lanes).astype(np.int32)
    items = rng.integers(0, 90, (lanes, candidates)).astype(np.int32)
    return table, users, items


def _packed(rows, width, dtype):
    """Rows [values | slots] as a table of `dtype`, and what it holds of them."""
    packed = embedding_table.RowFormat(width, rows.shape[1] - width, dtype).pack(
        rows[:, :width], rows[:, width:]
    )
    return packed, _held(packed, width)


def _held(table, width):
    return np.concatenate(embedding_table.RowFormat.of(table, width).unpack(table), axis=1)


def _assert_same_update(got, wanted, width):
    """Sums are added in another order: to float32's rounding, and where that decides how a
    bfloat16 value is rounded, to the other neighbour."""
    packed, got, wanted = got.dtype == np.uint16, _held(got, width), _held(wanted, width)
    tolerance = 2.0**-7 if packed else 2e-4
    np.testing.assert_allclose(got[:, :width], wanted[:, :width], rtol=tolerance, atol=2e-4)
    np.testing.assert_allclose(got[:, width:], wanted[:, width:], rtol=2e-4, atol=2e-4)
    if packed:
        assert (got[:, :width] != wanted[:, :width]).mean() < 0.02


def _scores(p, q, unit):
    p = p.astype(np.float64).copy()
    if unit:
        p[:, -1] = 1.0
    return np.einsum("nd,ncd->nc", p, q.astype(np.float64))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("candidates", [1, 2, 3])
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_scores_are_dot_products_and_squared_norms(width, candidates, unit, dtype):
    table, users, items = _world(width, candidates=candidates, slots=3)
    packed, held = zip(*(_packed(table[k], width, dtype) for k in ("user", "item")), strict=True)
    run = jax.jit(lambda *args: cpu.factor_scores(*args, width=width, unit=unit))
    scores, squares, totals = run(*packed, users, items)
    p, q = held[0][users, :width], held[1][items, :width]
    np.testing.assert_allclose(scores, _scores(p, q, unit), rtol=1e-5, atol=1e-5)
    norms = np.stack([(p.astype(float) ** 2).sum(1), (q.astype(float) ** 2).sum((1, 2))], axis=1)
    np.testing.assert_allclose(squares, norms, rtol=1e-5)
    np.testing.assert_allclose(totals, norms.sum(0), rtol=1e-5)


def test_many_lanes_on_many_threads_give_the_bits_of_few_lanes():
    """Work is shared out by columns; a lane's result does not depend on who else is in the call."""
    table, users, items = _world(64, lanes=5000)
    run = jax.jit(lambda *args: cpu.factor_scores(*args, width=64, unit=True))
    together = run(table["user"], table["item"], users, items)
    for part in (slice(0, 9), slice(4990, 5000)):
        alone = run(table["user"], table["item"], users[part], items[part])
        for one, other in zip(alone[:2], together[:2], strict=True):
            np.testing.assert_array_equal(one, other[part])


def test_nan_and_infinity_reach_the_scores_and_norms():
    table, users, items = _world(64)
    table["user"][users[0], 3], table["item"][items[5, 1], 40] = np.nan, np.inf
    scores, squares, _ = cpu.factor_scores(
        table["user"], table["item"], users, items, width=64, unit=True
    )
    assert np.isnan(scores[0]).all()
    assert np.isnan(squares[0, 0])
    assert not np.isfinite(scores[5, 1])
    assert np.isinf(squares[5, 1])


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
@pytest.mark.parametrize(
    ("width", "unit", "lanes", "together"),
    [
        *((1, True, 40, 1), (64, True, 300, 1), (64, True, 40, 1), (64, True, 40, 8)),
        *((64, True, 300, 8), (77, True, 300, 8), (77, False, 40, 3)),
    ],
)
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_factor_update_equals_autodiff_and_the_row_optimiser(
    name, width, unit, lanes, together, dtype
):
    """d/d rows of sum(ds * scores + dq * squares), then tables.update by XLA.

    Of 40 lanes some read an item that no other lane reads, of 300 next to none. A user has some
    lanes in a row, once or more often.
    """
    optimizer = row_optimizers.make_row_optimizer(
        OptimizerConfig(table_optimizer=name, lr=0.1, eps=1e-6)
    )
    table, users, items = _world(width, lanes=lanes, slots=optimizer.slots(width))
    users = np.repeat(users, together)[:lanes]
    once = np.unique(items, return_counts=True)[1] == 1
    assert (once.mean() > 0.2) == (lanes == 40)
    rng = np.random.default_rng(1)
    d_scores = rng.normal(size=items.shape).astype(np.float32)
    d_squares = rng.normal(size=(users.size, 2)).astype(np.float32)
    slots = {"user": jnp.full(40, 7, jnp.int32), "item": jnp.full(90, -3, jnp.int32)}

    def objective(p, q):
        inner = p.at[:, -1].set(1.0) if unit else p
        scores = jnp.einsum("nd,ncd->nc", inner, q)
        norms = jnp.stack([jnp.sum(p * p, 1), jnp.sum(q * q, (1, 2))], axis=1)
        return jnp.sum(scores * d_scores) + jnp.sum(norms * d_squares)

    packed, held = {}, {}
    for key, rows in table.items():
        packed[key], held[key] = _packed(rows, width, dtype)
    generators = embedding_table.rounding(jax.random.key(5), table)
    words = jnp.stack([generators["user"], generators["item"]]) if dtype == "bfloat16" else None
    p, q = jnp.asarray(held["user"][users, :width]), jnp.asarray(held["item"][items, :width])
    ids, layout = {"user": users, "item": items}, worlds.one_device()

    @jax.jit
    def update(packed, p, q):
        grads = dict(zip(("user", "item"), jax.grad(objective, (0, 1))(p, q), strict=True))
        return {
            key: embedding_table.update(
                packed[key], slots[key], ids[key], grads[key], optimizer, layout, generators[key]
            )[0]
            for key in ids
        }

    wanted = update(packed, p, q)
    run = jax.jit(lambda *args: cpu.factor_update(*args, optimizer.rule, width=width, unit=unit))
    got = run(
        packed["user"], packed["item"], slots["user"], slots["item"],
        users, items, d_scores, d_squares, words,
    )  # fmt: skip
    for new, key in zip(got[:2], ("user", "item"), strict=True):
        _assert_same_update(new, wanted[key], width)
        untouched = np.setdiff1d(np.arange(table[key].shape[0]), ids[key])
        np.testing.assert_array_equal(new[untouched], packed[key][untouched])


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_row_update_equals_the_xla_update(name, width, dtype):
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer=name, lr=0.1))
    table, _, items = _world(width, lanes=2000, slots=optimizer.slots(width))
    start, _ = _packed(table["item"], width, dtype)
    generator = embedding_table.rounding(jax.random.key(5), ["item"])["item"]
    grads = np.random.default_rng(2).normal(size=(*items.shape, width)).astype(np.float32)
    slot, layout = jnp.zeros(90, jnp.int32), worlds.one_device()
    by = {
        native: jax.jit(
            lambda *a, native=native: embedding_table.update(
                *a, optimizer, layout, generator, native=native
            )[0]
        )(start, slot, items, grads)
        for native in (False, True)
    }
    _assert_same_update(by[True], by[False], width)
    assert not np.allclose(_held(by[True], width), _held(start, width))


def test_a_nan_is_not_rounded_to_a_number():
    """One whose bits noise would carry over the sign, into zero."""
    table, _ = _packed(np.zeros((200, 64), np.float32), 64, "bfloat16")
    ids, slot = np.arange(200, dtype=np.int32), jnp.zeros(200, jnp.int32)
    grads = np.full((200, 64), 0xFFFF_FFFF, np.uint32).view(np.float32)
    words = jnp.array([3, 4], jnp.uint32)
    new, _ = cpu.row_update(table, slot, ids, grads, words, cpu.Rule("sgd", 1.0))
    assert np.isnan(_held(new, 64)).all()


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS[:3])
def test_nothing_to_learn_leaves_every_bit_of_a_packed_row(name):
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer=name, lr=0.1))
    rows, _, _ = _world(77, slots=optimizer.slots(77))
    table, _ = _packed(rows["item"], 77, "bfloat16")
    ids, slot = np.arange(90, dtype=np.int32), jnp.zeros(90, jnp.int32)
    grads, words = np.zeros((90, 77), np.float32), jnp.array([3, 4], jnp.uint32)
    new, _ = cpu.row_update(table, slot, ids, grads, words, optimizer.rule)
    np.testing.assert_array_equal(new, table)


def test_no_lanes_change_nothing():
    table, _, _ = _world(8)
    slots = jnp.zeros(40, jnp.int32), jnp.zeros(90, jnp.int32)
    none, pairs = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
    scores, squares, _ = cpu.factor_scores(
        table["user"], table["item"], none, pairs, width=8, unit=True
    )
    assert scores.shape == squares.shape == (0, 2)
    floats = np.zeros((0, 2), np.float32)
    rule = cpu.Rule("sgd", 1.0)
    lanes = (none, pairs, floats, floats, None)
    got = cpu.factor_update(table["user"], table["item"], *slots, *lanes, rule, width=8, unit=True)
    np.testing.assert_array_equal(got[0], table["user"])
    np.testing.assert_array_equal(got[1], table["item"])


@pytest.mark.parametrize("popularity", [False, True])
@pytest.mark.parametrize(
    ("n_items", "sizes"),
    [
        (50, (0, 1, 49, 50, *range(4, 30))),
        (3000, (0, 15, 16, 17, 1, 271, 272, 273, 500, 2999, 3000, 1024, 0)),
    ],
)
def test_draws_outside_are_those_of_xla_to_the_bit(popularity, n_items, sizes):
    """Users with nothing, with some and with everything excluded; rows of few and of many marks."""
    rng = np.random.default_rng(3)
    n_users = len(sizes)
    rows = [rng.choice(n_items, size, replace=False) for size in sizes]
    users = np.repeat(np.arange(n_users), [len(row) for row in rows])
    sets = Csr.from_pairs(users, np.concatenate(rows), n_users)
    masses = rng.integers(0, 9, n_items) if popularity else None
    cut = jax.device_put(arrays.excluded(sets, masses, n_items))
    cumulative = None
    if masses is not None:
        cumulative = jnp.asarray(np.concatenate([[0], np.cumsum(masses)]), jnp.int32)
    bits = jax.random.bits(jax.random.key(0), (4, 5000), jnp.uint32)
    who = jnp.asarray(rng.integers(0, n_users, (4, 5000)), jnp.int32)
    found = [
        negatives.draw_outside(bits, who, cut, cumulative, native=native)
        for native in (False, True)
    ]
    for by_xla, by_kernel in zip(*found, strict=True):
        np.testing.assert_array_equal(by_xla, by_kernel)
    assert set(np.asarray(found[0][1]).ravel()) == {0.0, 1.0}


@pytest.mark.parametrize(("size", "together"), [(64, 8), (21, 8), (10, 3), (40, 17)])
@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_triples_are_those_of_xla_to_the_bit(tmp_path, sampler, size, together):
    """Groups that fill no search, a last group that is cut short, and a user without a negative."""
    rng = np.random.default_rng(5)
    n_users, n_items = 70, 40
    seen = [np.sort(rng.choice(n_items, k, replace=False)) for k in (40, *rng.integers(1, 39, 69))]
    users = np.repeat(np.arange(n_users), [len(row) for row in seen]).astype(np.int32)
    items = np.concatenate(seen).astype(np.int32)
    masses = rng.integers(1, 9, n_items) if sampler == "popularity" else None
    cut = arrays.excluded(Csr.from_pairs(users, items, n_users), masses, n_items)
    cumulative = None
    if masses is not None:
        cumulative = np.concatenate([[0], np.cumsum(masses)]).astype(np.int32)
    of_users, of_items = np.zeros(n_users, np.float32), np.zeros(n_items, np.float32)
    facts = arrays.Facts(of_users, of_items, of_users, of_items)
    data = jax.device_put(arrays.Interactions(users, items, cut, cumulative, facts))
    config = SamplerConfig(batch_size=size, triples_per_user=together, negatives=sampler)
    words_of, _ = negatives.generators(jax.random.split(jax.random.key(1), 37))
    found = []
    for native in (False, True):
        plan = negatives.SamplingPlan(n_items, len(users), size, config, native)
        found.append(jax.jit(batch.draw_triples, static_argnums=2)(words_of, data, plan))
    for by_xla, by_kernel in zip(*found, strict=True):
        np.testing.assert_array_equal(by_xla, by_kernel)
    drawn, chosen, weights = map(np.asarray, found[1])
    owned = np.zeros((n_users, n_items), bool)
    owned[users, items] = True
    assert owned[drawn, chosen[..., 0]].all()
    np.testing.assert_array_equal(owned[drawn, chosen[..., 1]], weights == 0)
    assert 0 < np.mean(weights) < 1


@pytest.mark.parametrize(("size", "together"), [(64, 8), (37, 5), (3, 8), (70, 64)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("selection", ["uniform", "largest_gap"])
def test_preferences_are_those_of_xla_to_the_bit(size, together, share, selection):
    """Users whose entries all tie, runs that go around, users with one entry, cut groups."""
    rng = np.random.default_rng(7)
    n_users, n_items = 60, 50
    counts = rng.integers(0, 12, n_users)
    counts[:3] = 1, 0, 5
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = [rng.choice(n_items, k, replace=False) for k in counts]
    scores = np.concatenate([np.sort(rng.integers(0, 4, k)) for k in counts]) / np.float32(4)
    scores[offsets[2] : offsets[3]] = 0.5
    bought = Csr.from_pairs(
        np.repeat(np.arange(n_users), 20), rng.integers(0, n_items, 20 * n_users), n_users
    )
    teacher = jax.device_put(
        teacher_lists(
            offsets,
            np.concatenate(rows),
            scores,
            min_gap=0.25,
            unlisted_share=share,
            unlisted_below=True,
            positives=bought,
            n_items=n_items,
        )
    )
    assert (teacher.unlisted is None) == (share == 0.0)
    _, words_of = negatives.generators(jax.random.split(jax.random.key(1), 29))
    pairs = []
    for native in (False, True):
        rule = PreferenceRule(
            count=size,
            min_gap=0.25,
            unlisted_share=share,
            candidates=3 if selection == "largest_gap" else 1,
            together=together,
            native=native,
        )
        pairs.append(jax.jit(preferences.draw_pairs, static_argnums=2)(words_of, teacher, rule))
    for by_xla, by_kernel in zip(*pairs, strict=True):
        np.testing.assert_array_equal(by_xla, by_kernel)
    users, items, margins, entries = map(np.asarray, pairs[1])
    assert users.shape == (29, size)
    listed = np.zeros((n_users, n_items), bool)
    listed[np.repeat(np.arange(n_users), counts), np.concatenate(rows)] = True
    assert listed[users, items[..., 0]].all()
    assert (margins >= 0.25).all() or share
    in_list = entries >= 0
    assert in_list[..., 0].all()
    np.testing.assert_array_equal(np.asarray(teacher.items)[entries[in_list]], items[in_list])
    owner = np.repeat(np.arange(n_users), counts)
    np.testing.assert_array_equal(owner[entries[..., 0]], users)
    unlisted = ~listed[users, items[..., 1]]
    np.testing.assert_array_equal(unlisted, ~in_list[..., 1])
    expected = {0.0: (0.0, 0.0), 0.3: (0.2, 0.9), 1.0: (1.0, 1.0)}[share]
    assert expected[0] <= unlisted.mean() <= expected[1]


@pytest.mark.parametrize("shape", [(7,), (5, 64, 2), (40, 4096)])
def test_what_is_taken_is_what_is_there(shape):
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.normal(size=900), jnp.float32)
    at = jnp.asarray(rng.integers(0, 900, shape), jnp.int32)
    np.testing.assert_array_equal(jax.jit(cpu.take)(values, at), values[at])
