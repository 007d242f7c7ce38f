"""Synthetic interactions, their teacher, times and categories: shapes and distributions."""

from __future__ import annotations

import pathlib

import cases
import numpy as np
import pytest
import synthetic
import synthetic_dataset

from slgr_jax.training import build

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"


TINY = synthetic.Size(users=60, items=40, interactions=600, fewest=2)


@pytest.mark.parametrize("size", [TINY, synthetic.SIZES["ml100k"]])
def test_pairs_are_distinct_sorted_and_as_many_as_asked_for(size):
    pairs = synthetic.make(size)
    keys = pairs.users.astype(np.int64) * size.items + pairs.items
    assert len(pairs) == size.interactions
    assert (np.diff(keys) > 0).all()
    assert pairs.items.max() < size.items
    assert pairs.counts.size == size.users
    assert pairs.counts.min() >= size.fewest


def test_the_seed_decides_the_pairs():
    other = synthetic.Size(**{**vars(TINY), "seed": 124})
    first, again, changed = (synthetic.make(size) for size in (TINY, TINY, other))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, changed.items)


def test_pairs_survive_saving(tmp_path):
    pairs = synthetic.make(TINY)
    pairs.save(tmp_path)
    loaded = synthetic.Pairs.load(tmp_path)
    assert (loaded.n_users, loaded.n_items) == (60, 40)
    assert np.array_equal(loaded.users, pairs.users)
    assert np.array_equal(loaded.items, pairs.items)


def test_activity_is_log_normal():
    size = synthetic.Size(users=50_000, items=1_000_000, interactions=50_000 * 1000, fewest=1)
    logs = np.log(synthetic.activity(np.random.default_rng(0), size))
    assert np.std(logs) == pytest.approx(1.15, rel=0.02)


def test_too_few_interactions_are_refused():
    with pytest.raises(ValueError, match="between 2 and 20"):
        synthetic.make(synthetic.Size(users=60, items=40, interactions=100, fewest=2))


def test_items_follow_the_power_law():
    ranks = np.arange(1000)
    weights = synthetic.weights(1000)
    np.testing.assert_allclose(weights, 1 / (ranks + 20), rtol=3e-4)
    drawn = synthetic._draw(np.random.default_rng(0), 2_000_000, 1000)
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=1000)[:100] / 2e6, (weights / weights.sum())[:100], rtol=0.05
    )


def test_both_ways_to_draw_without_replacement_are_that():
    # P(first a, then b) = w_a / W * w_b / (W - w_a); what counts is the set {a, b}.
    w = synthetic.weights(3) / synthetic.weights(3).sum()
    sets = {(a, b): w[a] * w[b] * (1 / (1 - w[a]) + 1 / (1 - w[b])) for a, b in [(0, 1), (0, 2)]}
    rng, users = np.random.default_rng(0), 40_000
    rejected = np.sort(synthetic._by_rejection(rng, np.full(users, 2), 3)).reshape(users, 2) % 3
    sorted_ = [np.sort(synthetic._by_sorting(rng, 0, 2, 3)) for _ in range(users)]
    for drawn in (rejected, np.array(sorted_)):
        for pair, chance in sets.items():
            assert (drawn == pair).all(axis=1).mean() == pytest.approx(chance, abs=0.01)


def test_the_teacher_is_one_that_training_accepts(tmp_path):
    dataset = synthetic_dataset.from_pairs(synthetic.make(TINY), tmp_path)
    synthetic_dataset.write_teachers(dataset)
    run = cases.Case("tiny", "mf", "pairwise", "float32", 64)
    experiment = build.build(run.config({}, str(tmp_path)), dataset)
    assert experiment.trainer.guidance.queries == 64
    assert experiment.arrays.guidance.teacher.items.size == 60 * 20


def test_histories_are_a_shuffle_of_each_users_pairs():
    pairs = synthetic.make(TINY)
    moments = synthetic.moments(pairs)
    for user in range(60):
        of_user = moments[pairs.users == user]
        assert sorted(of_user) == list(range(of_user.size))
    assert not np.array_equal(moments, synthetic.moments(pairs, seed=2))
    # The item of a user's first event is any of theirs: its rank in the row is uniform.
    counts = pairs.counts[pairs.users]
    row = np.arange(600) - np.searchsorted(pairs.users, pairs.users)
    assert (row / counts)[moments == 0].mean() == pytest.approx(0.45, abs=0.12)


def test_items_have_one_to_three_distinct_categories():
    offsets, codes = synthetic.categories(3000)
    owners = np.repeat(np.arange(3000), np.diff(offsets))
    assert np.bincount(np.diff(offsets)).tolist() == pytest.approx([0, 1000, 1000, 1000], abs=100)
    assert len(set(zip(owners.tolist(), codes.tolist(), strict=True))) == codes.size
    assert np.bincount(codes).tolist() == pytest.approx([codes.size / 18] * 18, rel=0.25)
