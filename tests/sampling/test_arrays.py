"""Draws against enumeration: supports exact, frequencies by chi-square, nothing rejected."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slgr_jax.config import SamplerConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError
from slgr_jax.sampling import arrays as arrays_lib
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling import negatives, preferences
from slgr_jax.sampling.teacher_arrays import PreferenceRule, teacher_lists


def _plan(arrays, *, triples, n_items, sampler=None):
    return negatives.SamplingPlan(
        n_items=n_items,
        drawn=int(np.asarray(arrays.interactions.items).size),
        triples=triples,
        sampler=sampler or SamplerConfig(),
    )


def _arrays(dataset, sampler=None):
    cold, tail = np.zeros(dataset.n_users, bool), np.zeros(dataset.n_items, bool)
    return arrays_lib.DeviceArrays(
        arrays_lib.interactions(dataset, sampler or SamplerConfig(), cold, tail)
    )


def _draw(arrays, plan, steps=1, seed=0):
    placed = jax.device_put(arrays.interactions)
    draw = jax.jit(lambda keys: batch_lib.draw(negatives.generators(keys)[0], placed, plan))
    return jax.device_get(draw(jax.random.split(jax.random.key(seed), steps)))


@given(bits=st.integers(0, 2**32 - 1), bound=st.integers(0, 2**31 - 1))
@settings(max_examples=300, deadline=None)
def test_below_is_the_high_word_of_the_product(bits, bound):
    got = negatives.below(jnp.asarray(bits, jnp.uint32), jnp.asarray(bound, jnp.int32))
    assert int(got) == bits * bound >> 32


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(),
        SamplerConfig(negatives="popularity"),
        SamplerConfig(negatives="in_batch"),
        SamplerConfig(allow_positive_negatives=True),
    ],
    ids=["uniform", "popularity", "in_batch", "anything"],
)
def test_every_negative_is_drawn_where_each_user_has_one(tmp_path, sampler, everything):
    """One user has every item, or lacks one of them."""
    items = [list(range(12 if everything else 11)), [0, 11], [3, 4, 5]]
    pairs = [(user, item) for user, row in enumerate(items) for item in row]
    none = np.zeros((0, 2), np.int64)
    dataset = worlds.write_dataset(
        tmp_path / "d", np.array(pairs), none, none, n_users=3, n_items=12
    )
    arrays = _arrays(dataset, sampler)
    certain = arrays_lib.every_negative_drawn(arrays.interactions, sampler)
    free = sampler.negatives != "in_batch"
    assert certain == (free and (sampler.allow_positive_negatives or not everything))
    plan = _plan(arrays, triples=512, n_items=12, sampler=sampler)
    weights = _draw(arrays, plan, steps=4).weights
    always = certain or (free and not everything)
    assert set(np.unique(weights)) == ({1.0} if always else {0.0, 1.0})


@pytest.mark.parametrize("together", [1, 8, 5])
def test_triples_are_training_pairs_and_negatives_never_positives(tmp_path, together):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=7, n_items=12, per_user=9)
    arrays = _arrays(dataset)
    sampler = SamplerConfig(triples_per_user=together)
    plan = _plan(arrays, triples=4096, n_items=12, sampler=sampler)
    batch = _draw(arrays, plan, steps=8)
    positives = worlds.pairs_of(dataset.train.users, dataset.train.items)
    users, items = batch.queries.users.ravel(), batch.items.reshape(-1, 2)
    assert worlds.pairs_of(users, items[:, 0]) == positives
    every = {(u, i) for u in range(7) for i in range(12)}
    assert worlds.pairs_of(users, items[:, 1]) == every - positives
    assert (batch.weights == 1).all()
    # Users follow their number of pairs, positives and negatives are uniform within each user:
    # every training pair is as likely as any other, however many triples a user gets at once.
    drawn = batch.queries.users[:, ::together]
    assert (np.repeat(drawn, together, axis=1)[:, :4096] == batch.queries.users).all()
    history = np.bincount(dataset.train.users, minlength=7)
    counts = np.bincount(drawn.ravel(), minlength=7)
    assert stats.chisquare(counts, history * counts.sum() / history.sum()).pvalue > 1e-4
    for user in range(7):
        for column in range(2):
            seen = np.bincount(items[users == user, column], minlength=12)
            assert stats.chisquare(seen[seen > 0]).pvalue > 1e-4


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_popularity_negatives_follow_the_masses_outside_the_positives(tmp_path, power):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=9, n_items=15, per_user=8)
    sampler = SamplerConfig(negatives="popularity", popularity_power=power)
    arrays = _arrays(dataset, sampler)
    plan = _plan(arrays, triples=4096, n_items=15, sampler=sampler)
    batch = _draw(arrays, plan, steps=16)
    users, negative = batch.queries.users.ravel(), batch.items.reshape(-1, 2)[:, 1]
    positives = dataset.positives(("train",))
    for user in range(9):
        mass = dataset.popularity.astype(float) ** power * (dataset.popularity > 0)
        mass[positives.row(user)] = 0
        got = np.bincount(negative[users == user], minlength=15)
        assert (got[mass == 0] == 0).all()
        expected = mass / mass.sum() * got.sum()
        assert stats.chisquare(got[mass > 0], expected[mass > 0]).pvalue > 1e-4


def test_in_batch_negatives_are_other_rows_positives(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=9, n_items=15, per_user=8)
    sampler = SamplerConfig(negatives="in_batch", triples_per_user=1)
    arrays = _arrays(dataset, sampler)
    plan = _plan(arrays, triples=256, n_items=15, sampler=sampler)
    batch = jax.tree.map(lambda x: x[0], _draw(arrays, plan))
    positives = worlds.pairs_of(dataset.train.users, dataset.train.items)
    kept = batch.weights > 0
    assert kept.mean() > 0.95
    assert not worlds.pairs_of(batch.queries.users[kept], batch.items[kept, 1]) & positives
    assert np.isin(batch.items[kept, 1], batch.items[:, 0]).all()


def test_positives_as_negatives_only_on_request(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=7, n_items=12, per_user=9)
    sampler = SamplerConfig(allow_positive_negatives=True)
    arrays = _arrays(dataset, sampler)
    plan = _plan(arrays, triples=4096, n_items=12, sampler=sampler)
    batch = _draw(arrays, plan, steps=4)
    codes = batch.queries.users.ravel() * 12 + batch.items.reshape(-1, 2)[:, 1]
    counts = np.bincount(codes, minlength=84).reshape(7, 12)
    for row in counts:
        assert stats.chisquare(row).pvalue > 1e-4


def test_a_user_who_has_everything_gets_weight_zero(tmp_path):
    full = np.array([(0, i) for i in range(5)] + [(1, 0)])
    one = np.array([(1, 1)])
    dataset = worlds.write_dataset(tmp_path / "d", full, one, one, n_users=2, n_items=5)
    arrays = _arrays(dataset)
    batch = _draw(arrays, _plan(arrays, triples=512, n_items=5))
    np.testing.assert_array_equal(batch.weights, (batch.queries.users == 1).astype(np.float32))
    assert (batch.items >= 0).all()
    assert (batch.items < 5).all()


def _lists(rows: list[list[tuple[int, float]]]):
    """Offsets, items, scores of per-user lists, each sorted by score."""
    ordered = [sorted(row, key=lambda pair: pair[1]) for row in rows]
    offsets = np.cumsum([0, *map(len, ordered)])
    flat = [pair for row in ordered for pair in row]
    items = np.array([pair[0] for pair in flat], np.int32)
    return offsets, items, np.array([pair[1] for pair in flat], np.float32)


def _no_positives(n_users: int) -> Csr:
    return Csr(np.zeros(n_users + 1, np.int64), np.zeros(0, np.int32))


ROWS = [
    [(0, 0.1), (1, 0.5), (2, 0.5), (3, 0.9)],
    [(4, 0.3)],
    [(5, 0.2), (6, 0.2)],
    [(0, 1), (9, 2)],
]


def _preferences(
    *, rows=ROWS, unlisted=False, positives=None, size=4096, steps=4, **rule
) -> preferences.Preferences:
    offsets, items, scores = _lists(rows)
    chosen = PreferenceRule(count=size, together=SamplerConfig().triples_per_user, **rule)
    teacher = teacher_lists(
        offsets,
        items,
        scores,
        min_gap=chosen.min_gap,
        unlisted_share=chosen.unlisted_share,
        unlisted_below=unlisted,
        positives=positives or _no_positives(len(rows)),
        n_items=10,
    )
    users, catalogue = np.zeros(len(rows), np.float32), np.zeros(10, np.float32)
    facts = arrays_lib.Facts(users, catalogue, users, catalogue)
    placed, placed_facts = jax.device_put((teacher, facts))

    @jax.jit
    def draw(keys):
        _, words_of = negatives.generators(keys)
        return preferences.draw_preferences(words_of, placed, placed_facts, None, chosen)

    drawn = jax.device_get(draw(jax.random.split(jax.random.key(0), steps)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)


def _stated(rows=ROWS, min_gap=0.0):
    return {
        (user, a, b)
        for user, row in enumerate(rows)
        for a, x in row
        for b, y in row
        if x > y and np.float32(x) - np.float32(y) >= min_gap
    }


@pytest.mark.parametrize("min_gap", [0.0, 0.45])
def test_preferences_are_exactly_the_stated_ones(min_gap):
    drawn = _preferences(min_gap=min_gap)
    got = set(zip(drawn.queries.users.tolist(), *drawn.items.T.tolist(), strict=True))
    assert got == _stated(min_gap=min_gap)
    score = {(u, i): x for u, row in enumerate(ROWS) for i, x in row}
    expected = [
        score[u, a] - score[u, b]
        for u, (a, b) in zip(drawn.queries.users.tolist(), drawn.items.tolist(), strict=True)
    ]
    np.testing.assert_allclose(drawn.margins, expected, rtol=1e-5)


def test_largest_gap_keeps_the_greatest_margins():
    greedy = _preferences(candidates=8, size=64)
    plain = _preferences(size=64)
    assert greedy.margins.mean() > plain.margins.mean() + 0.2
    assert set(np.round(greedy.margins, 4)) <= set(np.round(plain.margins, 4))


def test_unlisted_items_rank_below_and_are_neither_listed_nor_positives():
    positives = Csr.from_pairs(np.array([0, 1, 1]), np.array([7, 8, 9]), len(ROWS))
    drawn = _preferences(unlisted=True, positives=positives)
    got = set(zip(drawn.queries.users.tolist(), *drawn.items.T.tolist(), strict=True))
    expected = {
        (user, a, b)
        for user, row in enumerate(ROWS)
        for a, _ in row
        for b in set(range(10)) - {i for i, _ in row} - set(positives.row(user).tolist())
    }
    assert got == expected


def test_unlisted_share_mixes_both_kinds():
    drawn = _preferences(unlisted_share=0.25, unlisted=True, size=8192)
    listed = [{i for i, _ in row} for row in ROWS]
    pairs = zip(drawn.queries.users.tolist(), drawn.items[:, 1].tolist(), strict=True)
    outside = np.array([b not in listed[u] for u, b in pairs])
    able = np.isin(drawn.queries.users, [0, 3])  # users with a stated pair of their own
    assert outside[~able].all()
    assert outside[able].mean() == pytest.approx(0.25, abs=0.02)
    inside = set(
        zip(
            drawn.queries.users[~outside].tolist(),
            *drawn.items[~outside].T.tolist(),
            strict=True,
        )
    )
    assert inside == _stated()


def test_the_draw_is_a_function_of_the_key(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    arrays = _arrays(dataset)
    plan = _plan(arrays, triples=64, n_items=30)
    first, again = _draw(arrays, plan, seed=3), _draw(arrays, plan, seed=3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = _draw(arrays, plan, seed=4)
    assert (first.items != other.items).any()


@given(
    rows=st.lists(
        st.lists(st.integers(0, 8).map(lambda x: x / 4), min_size=0, max_size=6),
        min_size=1,
        max_size=5,
    ),
    min_gap=st.sampled_from([0.0, 0.3, 0.5]),
)
@settings(max_examples=100, deadline=None)
def test_tie_runs_match_a_plain_count(rows, min_gap):
    listed = [list(enumerate(row)) for row in rows]
    offsets, items, scores = _lists(listed)
    teacher = teacher_lists(
        offsets,
        items,
        scores,
        min_gap=min_gap,
        unlisted_share=1.0,
        unlisted_below=False,
        positives=_no_positives(len(rows)),
        n_items=8,
    )
    expected = sum(
        len({*range(len(row))} - {k for k, y in enumerate(row) if x == y or abs(x - y) < min_gap})
        for row in rows
        for x in row
    )
    _, users, low, high = teacher.starts.T
    assert int((np.diff(offsets)[users] - (high - low)).sum()) == expected


def test_masses_fit_32_bits_and_keep_unseen_items_out():
    popularity = np.array([0, 1, 10, 10_000_000], np.int64)
    masses = arrays_lib.item_masses(popularity, SamplerConfig(negatives="popularity"))
    np.testing.assert_array_equal(masses, popularity)
    config = SamplerConfig(negatives="popularity", popularity_power=0.75)
    masses = arrays_lib.item_masses(popularity, config)
    assert masses.sum() < 2**31
    assert masses[0] == 0
    assert masses[3] / masses[2] == pytest.approx((10_000_000 / 10) ** 0.75, rel=1e-3)


# --- interactions drawn by their rating -----------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_an_interaction_is_drawn_as_often_as_its_rating_says(tmp_path, power):
    dataset = worlds.random_dataset(tmp_path / "d", ratings=True)
    train = dataset.train
    targets = arrays_lib.targets(
        dataset, window=0, history=False, min_history=0, threshold=0.0, power=power
    )
    drawn = np.bincount(targets.users * dataset.n_items + targets.items)
    expected = np.zeros_like(drawn)
    expected[train.users * dataset.n_items + train.items] = [
        max(1, round(float(rating) ** power)) for rating in train.ratings
    ]
    np.testing.assert_array_equal(drawn, expected)
    labelled = arrays_lib.targets(
        dataset, window=0, history=False, min_history=0, threshold=3.0, power=power
    )
    rating = dict(zip(zip(train.users, train.items, strict=True), train.ratings, strict=True))
    rows = zip(labelled.users, labelled.items, strict=True)
    np.testing.assert_array_equal(labelled.labels, [rating[row] >= 3.0 for row in rows])

    # Frequencies of what a step draws, by chi-square.
    arrays = _arrays(dataset)
    arrays = arrays.replace(interactions=arrays.interactions.replace(targets=targets))
    plan = _plan(arrays, triples=4096, n_items=dataset.n_items)
    plan = dataclasses.replace(plan, drawn=arrays.interactions.drawn)
    batch = _draw(arrays, plan, steps=8)
    users, items = np.asarray(batch.queries.users), np.asarray(batch.items)[..., 0]
    counts = np.bincount((users * dataset.n_items + items).ravel(), minlength=drawn.size)
    there = drawn > 0
    wanted = counts.sum() * drawn[there] / drawn.sum()
    assert stats.chisquare(counts[there], wanted).pvalue > 1e-3
    assert counts[~there].sum() == 0


def test_drawing_by_rating_needs_ratings_that_can_be_counts(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", ratings=True)
    chosen = {"window": 0, "history": False, "min_history": 0, "threshold": 0.0}
    train, low = dataset.train, dataset.train.ratings.copy()
    low[3] = -1
    for ratings, power, message in (
        (train.ratings * 100, 10.0, "--rating_power=10 makes .* fewer than 2147483648"),
        (low, 1.0, "go from -1 to .*cannot be negative"),
    ):
        other = dataclasses.replace(dataset, train=dataclasses.replace(train, ratings=ratings))
        with pytest.raises(InputError, match=message):
            arrays_lib.targets(other, **chosen, power=power)
    unrated = worlds.random_dataset(tmp_path / "unrated")
    with pytest.raises(InputError, match="has no ratings; slgr prepare --rating_c"):
        arrays_lib.targets(unrated, **chosen, power=1.0)
