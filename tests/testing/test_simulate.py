"""Simulated worlds: laws of what is drawn, the teacher's reliability, files that load again."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr, ndtri

from slgr_jax import testing
from slgr_jax.config import SliceConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError
from slgr_jax.reports import calibration
from slgr_jax.teacher.products import preferences
from slgr_jax.testing import Constant, Logistic, Region, WorldConfig

SMALL = WorldConfig(n_users=300, n_items=120, history_max=40)


@pytest.fixture(scope="module")
def world():
    return testing.simulate(WorldConfig())


def events(world, *parts):
    """Plain sets of each user's items."""
    out = [set() for _ in range(world.config.n_users)]
    for name in parts:
        part = world.part(name)
        for user, item in zip(part.users.tolist(), part.items.tolist(), strict=True):
            out[user].add(item)
    return out


def stated(statements):
    return zip(statements.users.tolist(), statements.preferred.tolist(),
               statements.other.tolist(), strict=True)  # fmt: skip


def same(a, b):
    """Are all interactions of two worlds the same bytes?"""
    return all(
        getattr(a.part(name), field).tobytes() == getattr(b.part(name), field).tobytes()
        for name in ("train", "valid", "test")
        for field in ("users", "items", "timestamps")
    )


# ------------------------------------------------------------------ interactions


def test_history_lengths_follow_the_power_law():
    config = WorldConfig(n_users=20_000, n_items=40, history_max=16, history_exponent=1.7)
    history = testing.simulate(config).history
    length = np.arange(3, 17)
    weight = length**-1.7
    seen = np.bincount(history, minlength=17)
    assert seen[:3].sum() == 0
    assert len(seen) == 17
    assert stats.chisquare(seen[3:], 20_000 * weight / weight.sum()).pvalue > 1e-3


def test_items_are_drawn_without_replacement_by_their_utility():
    # Users without taste: ordered triples have Plackett-Luce probabilities, here enumerated.
    config = WorldConfig(
        n_users=30_000, n_items=6, taste=0.0, popularity_skew=1.0, history_min=1, history_max=1,
        valid_per_user=1, test_per_user=1,
    )  # fmt: skip
    world = testing.simulate(config)
    weight = np.exp(world.truth.item_bias)
    np.testing.assert_allclose(np.sort(1 / weight), np.arange(1, 7))
    inclusion = np.zeros(6)
    for triple in itertools.permutations(range(6), 3):
        left, chance = weight.sum(), 1.0
        for item in triple:
            chance *= weight[item] / left
            left -= weight[item]
        inclusion[list(triple)] += chance
    for name in ("train", "valid", "test"):  # random order: every part has the same law
        seen = np.bincount(world.part(name).items, minlength=6)
        assert stats.chisquare(seen, 30_000 * inclusion / 3).pvalue > 1e-3


def test_parts_are_disjoint_sorted_and_in_order_of_time(world):
    parts = [world.part(name) for name in ("train", "valid", "test")]
    for part, per_user in zip(parts, (world.history, 2, 2), strict=True):
        assert (np.bincount(part.users, minlength=2000) == per_user).all()
        assert (np.lexsort((part.items, part.timestamps, part.users)) == np.arange(len(part))).all()
    assert parts[0].timestamps.max() < parts[1].timestamps.min()
    assert parts[1].timestamps.max() < parts[2].timestamps.min()
    pairs = np.concatenate([part.users * 1000 + part.items for part in parts])
    assert np.unique(pairs).size == pairs.size


def test_counts_are_those_of_training(world):
    history, popularity = np.zeros(2000, int), np.zeros(1000, int)
    for user, item in zip(world.train.users.tolist(), world.train.items.tolist(), strict=True):
        history[user] += 1
        popularity[item] += 1
    assert (world.history == history).all()
    assert (world.popularity == popularity).all()


def test_blocks_of_users_do_not_change_the_laws(monkeypatch):
    whole = testing.simulate(SMALL)
    monkeypatch.setattr("slgr_jax.testing.world._CELLS", 7 * SMALL.n_items)
    parts = testing.simulate(SMALL)
    assert (parts.history == whole.history).all()
    # Gumbel noise is drawn row by row: the same items, whatever the block.
    assert events(parts, "train", "valid", "test") == events(whole, "train", "valid", "test")


def test_what_is_held_out_can_be_learned(world):
    """Utilities rank test items above others, and so does a linear model of training alone."""
    rng = np.random.default_rng(0)
    train = np.zeros((2000, 1000))
    train[world.train.users, world.train.items] = 1
    gram = train.T @ train + 100 * np.eye(1000)
    inverse = np.linalg.inv(gram)
    ease = train @ (np.eye(1000) - inverse / np.diag(inverse)[None, :])
    seen = train > 0
    seen[world.valid.users, world.valid.items] = True
    truth = world.truth.rows(slice(None))
    ranks = {}
    for name, scores in {"truth": truth, "ease": ease, "noise": rng.random(truth.shape)}.items():
        scores = np.where(seen, -np.inf, scores)
        of_test = scores[world.test.users, world.test.items]
        below = (scores[world.test.users] < of_test[:, None]).sum(axis=1)
        hidden = seen.sum(axis=1)[world.test.users]
        ranks[name] = np.mean((below - hidden) / (999 - hidden))
    assert ranks["truth"] > 0.85
    assert ranks["ease"] > 0.75
    assert ranks["noise"] == pytest.approx(0.5, abs=0.02)


def test_two_thousand_by_one_thousand_is_quick():
    begin = time.process_time()
    assert len(testing.simulate(WorldConfig(seed=1)).pairs) > 40_000
    assert time.process_time() - begin < 2.0  # 0.3 s on an idle machine


# ----------------------------------------------------------------------- teacher


def test_the_formulas_of_reliability_by_hand():
    history, popularity = np.array([0, 7, 8, 9, 500]), np.array([[0, 0], [3, 50]])[[0, 1, 1, 1, 0]]
    reliability = Logistic(0.4, 0.9, 1.5, 7.0, 0.5, 20.0)(history, popularity)
    for r, h, (p, q) in zip(reliability, history.tolist(), popularity.tolist(), strict=True):
        logit = 1.5 * math.log(8 / (1 + h)) + 0.5 * math.log(21 / math.sqrt((1 + p) * (1 + q)))
        assert r == pytest.approx(0.4 + 0.5 / (1 + math.exp(-logit)), rel=1e-12)
    assert Region(history=8)(history, popularity).tolist() == [0.95, 0.95, 0.95, 0.5, 0.5]
    small = Region(popularity=26.0, inside=0.8, outside=0.1)(history, popularity)
    assert small.tolist() == [0.8, 0.1, 0.1, 0.1, 0.8]
    assert Constant(0.25)(history, popularity).tolist() == [0.25] * 5


def test_the_teacher_is_right_as_often_as_reliability_says_in_every_cell():
    config = WorldConfig(seed=3, reliability=Logistic(0.3, 0.95, 2.0, 12.0, 1.0, 40.0))
    world = testing.simulate(config)
    log = np.log1p(world.popularity)
    checked = 0
    for statements in (world.pairs, world.judge(np.random.default_rng(0), "test", 5)):
        pair = log[statements.preferred] + log[statements.other]
        expected = world.config.reliability(
            world.history[statements.users], world.popularity[statements.items]
        )
        np.testing.assert_array_equal(statements.reliability, expected)
        np.testing.assert_array_equal(
            world.true_reliability(statements.users, statements.items), expected
        )
        h, p = world.history[statements.users], pair
        h_cell = np.searchsorted(np.quantile(h, [0.25, 0.5, 0.75]), h)
        p_cell = np.searchsorted(np.quantile(p, [0.25, 0.5, 0.75]), p)
        for cell in itertools.product(range(4), range(4), (False, True)):
            rows = (h_cell == cell[0]) & (p_cell == cell[1]) & (statements.known == cell[2])
            if rows.sum() < 100:
                continue
            r = statements.reliability[rows]
            error = math.sqrt((r * (1 - r)).sum())
            assert abs(statements.right[rows].sum() - r.sum()) < 4 * error, cell
            checked += 1
    assert checked >= 40
    assert world.pairs.reliability.std() > 0.15


def test_open_statements_are_about_utility_and_known_ones_about_validation_items(world):
    seen, valid = events(world, "train", "valid"), events(world, "valid")
    ever, test = events(world, "train", "valid", "test"), events(world, "test")
    pairs, keys, about_test = world.pairs, set(), 0
    assert pairs.known.sum() > 7900
    assert (~pairs.known).sum() > 39_000
    assert (np.diff(pairs.users) >= 0).all()
    s = world.truth.rows(slice(None))
    for (u, a, b), known, right in zip(stated(pairs), pairs.known, pairs.right, strict=True):
        assert a != b
        keys.add((u, min(a, b), max(a, b)))
        first, second = (a, b) if right else (b, a)
        if known:
            assert first in valid[u]
            assert second not in ever[u]
        else:
            assert not {a, b} & seen[u]
            about_test += len({a, b} & test[u])
            assert s[u, first] > s[u, second]
    assert len(keys) == len(pairs)
    assert 50 < about_test < 500  # as often as by chance: 2 of about 950 items, 80,000 times


def test_hidden_training_items_are_known_too():
    config = dataclasses.replace(SMALL, known_per_valid=0, hidden_per_user=4)
    world = testing.simulate(config)
    assert same(world, testing.simulate(SMALL))
    train, ever = events(world, "train"), events(world, "train", "valid", "test")
    known = world.pairs.where(world.pairs.known)
    asked = [set() for _ in range(300)]
    for (u, a, b), right in zip(stated(known), known.right, strict=True):
        first, second = (a, b) if right else (b, a)
        assert first in train[u]
        assert second not in ever[u]
        asked[u].add(first)
    assert all(len(row) == min(4, len(items)) for row, items in zip(asked, train, strict=True))
    # Any of a user's items: the mean place in time of those asked about is the middle.
    user, items = world.train.users, world.train.items
    place = np.arange(user.size) - np.searchsorted(user, user)
    share = (place + 0.5) / world.history[user]
    chosen = [i in asked[u] for u, i in zip(user.tolist(), items.tolist(), strict=True)]
    assert np.mean(share[chosen]) == pytest.approx(0.5, abs=0.03)
    assert 0.9 < known.right.mean() / known.reliability.mean() < 1.1


def test_judged_statements_are_about_test_items(world):
    test, ever = events(world, "test"), events(world, "train", "valid", "test")
    judged = world.judge(np.random.default_rng(5), "test", 2)
    assert len(judged) == 2 * len(world.test)
    assert judged.known.all()
    for (u, a, b), right in zip(stated(judged), judged.right, strict=True):
        first, second = (a, b) if right else (b, a)
        assert first in test[u]
        assert second not in ever[u]
    again = world.judge(np.random.default_rng(5), "test", 2)
    assert again.preferred.tobytes() == judged.preferred.tobytes()
    validated = world.judge(np.random.default_rng(5), "valid")
    known = validated.where(validated.right)
    assert all(a in row for row, a in zip(
        (events(world, "valid")[u] for u in known.users[:50]), known.preferred[:50], strict=True
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="judge valid or test"):
        world.judge(np.random.default_rng(5), "train")
    with pytest.raises(ConfigError, match="part 'tset' is not one of: train, valid, test"):
        world.judge(np.random.default_rng(5), "tset")


def test_the_extremes():
    def of(reliability):
        world = testing.simulate(dataclasses.replace(SMALL, reliability=reliability))
        return world, world.judge(np.random.default_rng(0), "test", 4)

    for right, expected in ((1.0, True), (0.0, False)):
        world, judged = of(Constant(right))
        assert (world.pairs.right == expected).all()
        assert (judged.right == expected).all()
        assert (judged.belief == right).all()
    world, judged = of(testing.TEACHERS["shuffled"])
    n = len(world.pairs)
    assert abs(world.pairs.right.sum() - n / 2) < 4 * math.sqrt(n) / 2
    world, judged = of(testing.TEACHERS["region"])
    cold = world.history[world.pairs.users] <= 8
    assert 0.2 < cold.mean() < 0.8
    assert world.pairs.right[cold].mean() == pytest.approx(0.95, abs=0.02)
    assert world.pairs.right[~cold].mean() == pytest.approx(0.5, abs=0.04)


def test_popularity_does_not_give_the_answer_away(world):
    judged = world.judge(np.random.default_rng(8), "test", 5)
    gap = (2 * judged.right - 1) * (
        world.popularity[judged.preferred] - world.popularity[judged.other]
    )
    assert np.mean((gap > 0) + 0.5 * (gap == 0)) == pytest.approx(0.5, abs=0.03)
    naive = testing.simulate(WorldConfig(known_skew=0.0)).judge(np.random.default_rng(8))
    gap = (2 * naive.right - 1) * (
        world.popularity[naive.preferred] - world.popularity[naive.other]
    )
    assert np.mean(gap > 0) > 0.7


def test_margins_tell_what_they_are_set_to_tell():
    silent = testing.simulate(WorldConfig(seed=4))
    pairs = silent.pairs
    log = np.log(pairs.margin.astype(float))
    assert stats.kstest(log[pairs.right], "norm").pvalue > 1e-3
    assert stats.kstest(log[~pairs.right], "norm").pvalue > 1e-3
    np.testing.assert_allclose(pairs.belief, pairs.reliability, rtol=1e-12)
    telling = testing.simulate(WorldConfig(seed=4, margin_signal=1.5)).pairs
    log = np.log(telling.margin.astype(float))
    assert stats.kstest(log[telling.right] - 0.75, "norm").pvalue > 1e-3
    assert stats.kstest(log[~telling.right] + 0.75, "norm").pvalue > 1e-3
    for row in range(20):  # Bayes, from the two densities
        r, x = telling.reliability[row], log[row]
        yes, no = r * stats.norm.pdf(x, 0.75), (1 - r) * stats.norm.pdf(x, -0.75)
        assert telling.belief[row] == pytest.approx(yes / (yes + no), rel=1e-6)
    assert calibration.calibration_error(telling.belief, telling.right) < 0.01
    gain = calibration.auc(telling.belief, telling.right)
    assert gain > calibration.auc(telling.reliability, telling.right) + 0.1


@pytest.mark.parametrize("teacher", ["smooth", "region", "shuffled"])
def test_the_oracle_is_calibrated_and_knows_more(teacher):
    config = WorldConfig(reliability=testing.TEACHERS[teacher], margin_signal=0.5)
    world = testing.simulate(config)
    judged = world.judge(np.random.default_rng(2), "test", 5)
    oracle = world.oracle(judged)
    assert calibration.calibration_error(oracle, judged.right) < 0.015
    assert calibration.calibration_error(judged.belief, judged.right) < 0.02
    assert calibration.auc(oracle, judged.right) > 0.9
    assert calibration.auc(oracle, judged.right) > calibration.auc(judged.belief, judged.right)
    free = world.pairs.where(~world.pairs.known)
    assert (world.oracle(free) == free.right).all()


def test_a_reliability_that_is_no_probability_is_refused():
    for function, message in (
        (lambda history, popularity: 0.0 * history + 1.5, "reliability gives 1.5"),
        (lambda history, popularity: 0.0 * history + math.nan, "reliability gives nan"),
        (lambda history, popularity: popularity / 1000, "reliability gives shape"),
    ):
        world = testing.simulate(dataclasses.replace(SMALL, reliability=function))
        with pytest.raises(ConfigError, match=message):
            _ = world.pairs


# ------------------------------------------------------------------------- seeds


def test_a_world_is_a_function_of_its_config():
    first, second = testing.simulate(SMALL), testing.simulate(SMALL)
    assert same(first, second)
    for field in dataclasses.fields(first.pairs):
        name = field.name
        assert getattr(first.pairs, name).tobytes() == getattr(second.pairs, name).tobytes(), name
    other = testing.simulate(dataclasses.replace(SMALL, seed=1))
    assert not same(first, other)
    assert np.intersect1d(first.pairs.margin, other.pairs.margin).size < 20


def test_worlds_that_differ_in_the_teacher_have_the_same_interactions_and_pairs():
    def unordered(world):
        pairs = world.pairs
        return pairs.users.tobytes(), np.sort(pairs.items, axis=1).tobytes()

    first = testing.simulate(SMALL)
    for change in ({"reliability": Constant(0.7)}, {"margin_signal": 2.0}):
        other = testing.simulate(dataclasses.replace(SMALL, **change))
        assert same(first, other)
        assert unordered(first) == unordered(other)
        assert first.pairs.belief.tobytes() != other.pairs.belief.tobytes()


# ------------------------------------------------------------------------- lists


@pytest.mark.parametrize("right", [0.5, 0.8, 0.95])
def test_scores_of_lists_have_the_reliability_that_is_set(right):
    config = WorldConfig(
        n_users=200, n_items=100, history_min=5, history_max=5, reliability=Constant(right)
    )
    world = testing.simulate(config)
    users, items, scores = world.lists(np.random.default_rng(0), 95)  # all but training
    train = events(world, "train")
    assert all(i not in train[u] for u, i in zip(users.tolist(), items.tolist(), strict=True))
    assert (np.bincount(users) == 95).all()
    s = world.truth.rows(slice(None))
    z = (s - s.mean(1, keepdims=True)) / s.std(1, keepdims=True)
    order = np.arange(users.size).reshape(200, 95)
    first, second = order[:, :47].ravel(), order[:, 47:94].ravel()
    gap = z[users[first], items[first]] - z[users[second], items[second]]
    agree = (gap > 0) == (scores[first] > scores[second])
    expected = ndtr(np.abs(gap) * ndtri(right))
    # Pairs share no item: they are independent.
    error = math.sqrt((expected * (1 - expected)).sum())
    assert abs(agree.sum() - expected.sum()) < 4 * error


def test_a_short_list_is_the_top_of_the_long_one():
    world = testing.simulate(SMALL)
    users, items, _ = world.lists(np.random.default_rng(0), 10)
    every = world.lists(np.random.default_rng(0), 80)
    for user in range(0, 300, 30):
        of_user = every[0] == user
        best = np.argsort(-every[2][of_user])[:10]
        assert set(every[1][of_user][best]) == set(items[users == user])
    assert (np.diff(users.astype(int) * 1000 + items) > 0).all()
    with pytest.raises(ConfigError, match=r"length=101; a user has between 1 and \d+ items"):
        world.lists(np.random.default_rng(0), 101)


# ----------------------------------------------------------------------- on disk


def test_what_is_written_loads_and_equals_the_arrays(tmp_path):
    world = testing.simulate(SMALL)
    dataset = testing.write(world, tmp_path / "world", lists=10)
    dataset = dataset_lib.load(dataset.path)
    for name in ("train", "valid", "test"):
        for field in ("users", "items", "timestamps"):
            expected = getattr(world.part(name), field)
            np.testing.assert_array_equal(getattr(dataset.part(name), field), expected)
    assert (dataset.n_users, dataset.n_items) == (300, 120)
    np.testing.assert_array_equal(dataset.history, world.history)
    np.testing.assert_array_equal(dataset.popularity, world.popularity)
    ids = dataset.user_ids.to_pylist()
    assert ids == sorted(ids)
    assert 0 < dataset.slices(SliceConfig()).cold_users.mean() < 1
    teacher = preferences.load(dataset, testing.PAIRS)
    for field in ("users", "preferred", "other", "margin"):
        np.testing.assert_array_equal(getattr(teacher, field), getattr(world.pairs, field))
    assert teacher.manifest.built_from == "train_only"
    assert teacher.manifest.training_items == "none"
    assert teacher.manifest.counts["train_pairs"] == 0
    assert "Logistic(low=0.5" in teacher.manifest.model
    assert teacher.manifest.coverage["users"] == 1.0
    lists = preferences.load(dataset, testing.LISTS)
    assert lists.manifest.unlisted == "below"
    assert (np.diff(lists.offsets) == 10).all()
    users, items, scores = world.lists(np.random.default_rng([0, 1]), 10)
    order = np.lexsort((scores, users))
    np.testing.assert_array_equal(lists.items, items[order])
    np.testing.assert_array_equal(lists.scores, scores[order])


def test_several_teachers_share_a_dataset_and_another_world_does_not(tmp_path):
    dataset = testing.write(testing.simulate(SMALL), tmp_path / "world")
    settings = {"reliability": Constant(0.0), "known_per_valid": 0, "hidden_per_user": 2}
    liar = testing.simulate(dataclasses.replace(SMALL, **settings))
    assert testing.write_pairs(liar, dataset, "liar").training_items == "hidden"
    assert preferences.products(dataset.path) == ["liar", "pairs"]
    loaded = preferences.load(dataset, "liar")
    np.testing.assert_array_equal(loaded.preferred, liar.pairs.preferred)
    other = testing.simulate(dataclasses.replace(SMALL, seed=9))
    with pytest.raises(ConfigError, match="differ in the teacher's settings alone"):
        testing.write_pairs(other, dataset, "other")


def test_the_same_world_has_the_same_shards(tmp_path):
    first, second = (
        testing.write(testing.simulate(SMALL), tmp_path / name).manifest for name in ("a", "b")
    )
    assert first.files == second.files  # with the SHA-256 of each
    assert (first.split_hash, first.id_map_hash) == (second.split_hash, second.id_map_hash)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_users": 0}, "n_users=0; need at least 1"),
        ({"taste": -1.0}, "taste=-1.0; need at least 0"),
        ({"history_max": 2}, "history_max=2; need at least 3"),
        ({"history_max": 60}, "64 events, more than half of n_items=120"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(SMALL, **change)
    assert message in str(error.value)
