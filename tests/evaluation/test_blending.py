"""Lists at scoring time: the pool of few items against the whole catalogue, weights, halves."""

from __future__ import annotations

import jax
import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax.config import SliceConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.evaluation import blending, full_ranking
from slgr_jax.evaluation.ranking_metrics import per_user
from slgr_jax.teacher.products import preferences

N_USERS, N_ITEMS = 50, 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "data"
    return worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS)


def score_users(state, users):
    return state[users]


@pytest.fixture(scope="module")
def state(dataset) -> np.ndarray:
    """[U, I] scores with many ties."""
    drawn = np.random.default_rng(0).integers(0, 6, (N_USERS, N_ITEMS)).astype(np.float32)
    return drawn + 2 * dataset.positives(("valid",)).matrix(N_ITEMS).toarray()


@pytest.fixture(scope="module")
def lists(dataset) -> blending.Lists:
    """Of most users, of several lengths, with ties and with own training items."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 25, N_USERS)
    users = np.repeat(np.arange(N_USERS), lengths)
    items = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in lengths])
    scores = rng.integers(0, 9, users.size).astype(np.float32)
    worlds.teach(dataset, users, items, scores, name="llm", unlisted="below")
    return blending.lists_of(dataset, preferences.load(dataset, "llm"))


def boosts(dataset) -> np.ndarray:
    """[U, I] 1 / rank in plain Python."""
    teacher, out = preferences.load(dataset, "llm"), np.zeros((N_USERS, N_ITEMS))
    train = dataset.positives(("train",))
    for user in range(N_USERS):
        span = slice(teacher.offsets[user], teacher.offsets[user + 1])
        listed = dict(zip(teacher.items[span].tolist(), teacher.scores[span], strict=True))
        listed = {item: x for item, x in listed.items() if item not in train.row(user)}
        for item, score in listed.items():
            above = sum(x > score for x in listed.values())
            ties = sum(x == score for x in listed.values())
            out[user, item] = 1 / (above + (ties + 1) / 2)
    return out


def test_a_blend_adds_the_weight_over_the_rank(dataset, state, lists):
    weight = 1.5
    users = np.array([3, 0, 49, 3], np.int32)
    score = jax.jit(blending.blended(score_users))
    scores = score(blending.blend_state(state, lists, weight), users)
    expected = state + weight * boosts(dataset)
    np.testing.assert_allclose(scores, expected[users], rtol=1e-6)
    assert lists.rows.counts.max() > blending._LIST_STEP
    nothing = blending.Lists("none", Csr.empty(N_USERS), np.zeros(0, np.float32))
    plain = score(blending.blend_state(state, nothing, weight), users)
    np.testing.assert_array_equal(plain, state[users])


def test_the_pool_of_few_items_gives_the_ndcg_of_the_whole_catalogue(
    dataset, state, lists, monkeypatch
):
    monkeypatch.setattr(blending, "_CHUNK", 7 * N_ITEMS)  # several chunks, the last not full
    (tried,) = blending.try_weights(score_users, state, [lists], dataset)
    assert tried.weights[0] == 0
    spread = state.astype(np.float64).std(axis=1)
    assert tried.weights[-1] / blending.STEPS[-1] == pytest.approx(spread.mean(), rel=0.2)
    tail = dataset.slices(SliceConfig()).tail_items
    valid, train = dataset.positives(("valid",)), dataset.positives(("train",))
    for weight, values, of_tail in zip(tried.weights, tried.values, tried.tail, strict=True):
        ranked = full_ranking.rank(
            blending.blended(score_users), blending.blend_state(state, lists, weight), valid, train,
            N_ITEMS, top_k=0, pooled_auc=False,
        )  # fmt: skip
        expected = per_user(ranked, (10,))
        assert tried.users.tolist() == expected.users.tolist()
        np.testing.assert_allclose(values, expected.values["ndcg@10"], atol=1e-12)
        expected = per_user(ranked, (10,), tail)
        has = ~np.isnan(of_tail)
        assert tried.users[has].tolist() == expected.users.tolist()
        np.testing.assert_allclose(of_tail[has], expected.values["ndcg@10"], atol=1e-12)
    assert len({round(row.mean(), 6) for row in tried.values}) > 4  # weights differ


def test_a_list_alone_is_ranked_by_its_scores(dataset, lists):
    listed = blending.alone(lists, dataset)
    score = boosts(dataset).astype(np.float32)
    valid = dataset.positives(("valid",))
    for user, value in zip(listed.users, listed.values[0], strict=True):
        named = np.flatnonzero(score[user])
        first = sorted(named, key=lambda i: (-score[user, i], i))[:10]
        wanted = set(valid.row(user).tolist())
        gained = sum((i in wanted) / np.log2(k + 2) for k, i in enumerate(first))
        ideal = sum(1 / np.log2(k + 2) for k in range(min(10, len(wanted))))
        assert value == pytest.approx(gained / ideal)


def test_each_half_is_measured_at_the_weight_of_the_other():
    values = np.zeros((3, 40))
    half = np.random.default_rng(0).permutation(40) % 2 == 0
    values[1, half], values[2, ~half] = 1.0, 1.0
    tried = blending.Tried(np.array([0.0, 1.0, 2.0]), np.arange(40), values, values)
    assert tried.values[tried.best].mean() == 0.5
    # The first half prefers weight 1, at which the other half has 0, and the reverse.
    assert tried.cross_fitted()[0].tolist() == [0.0] * 40
    same = blending.Tried(tried.weights, tried.users, values * 0 + [[0], [1], [0]], values)
    assert same.cross_fitted()[0].tolist() == [1.0] * 40
    assert same.weight == 1.0


def test_random_lists_gain_nothing_and_a_list_of_what_is_chosen_gains(dataset):
    """The choice of the weight is no gain of its own: over random lists the mean is 0."""
    rng, n = np.random.default_rng(4), 8
    state = rng.random((N_USERS, N_ITEMS)).astype(np.float32)
    users = np.repeat(np.arange(N_USERS), n)
    gains, optimistic = [], []
    for trial in range(20):
        items = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for _ in range(N_USERS)])
        rows = Csr.from_pairs(users, items, N_USERS)
        drawn = blending.Lists("random", rows, (1 / rng.integers(1, n, users.size)).astype("f4"))
        (tried,) = blending.try_weights(score_users, state, [drawn], dataset)
        gains.append(np.mean(tried.cross_fitted(trial)[0] - tried.values[0]))
        optimistic.append(np.mean(tried.values[tried.best] - tried.values[0]))
    assert np.mean(gains) < 2 * np.std(gains) / np.sqrt(20)
    assert np.mean(optimistic) > np.mean(gains)
    valid = dataset.positives(("valid",))
    right = blending.Lists("right", valid, np.ones(valid.indices.size, np.float32))
    (tried,) = blending.try_weights(score_users, state, [right], dataset)
    assert np.mean(tried.cross_fitted()[0]) > 0.95


def test_lists_of_some_users(lists):
    kept = np.arange(N_USERS) % 2 == 0
    some = blending.keep_users(lists, kept)
    assert some.rows.counts[kept].tolist() == lists.rows.counts[kept].tolist()
    assert not some.rows.counts[~kept].any()
    assert some.boosts.tolist() == lists.boosts[kept[lists.rows.owners()]].tolist()


def test_what_has_no_ranks_or_no_validation_is_refused(dataset, tmp_path):
    table = pa.table([[0], [1], [2], [1.0]], names=schema.TEACHER_PREFERENCES.names)
    table = table.cast(schema.TEACHER_PREFERENCES)
    preferences.write_product(dataset, "p", table, provenance=preferences.Provenance())
    with pytest.raises(InputError, match=r"'p' holds preferences.*--pairs_to=scores"):
        blending.lists_of(dataset, preferences.load(dataset, "p"))
    pairs = worlds.random_pairs(0, 5, 9, 4)
    unjudged = worlds.write_dataset(
        tmp_path / "data", pairs[::2], pairs[:0], pairs[1::2], n_users=5, n_items=9
    )
    with pytest.raises(ConfigError, match="no validation part"):
        blending.try_weights(score_users, np.zeros((5, 9), np.float32), [], unjudged)
