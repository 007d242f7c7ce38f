"""Histories, fields and graph against plain loops over the dataset."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.errors import InputError
from slgr_jax.sampling import arrays, context
from slgr_jax.sampling.context import FIELDS, GRAPH, HISTORY, Queries

ALL = (HISTORY, FIELDS, GRAPH)


@pytest.fixture
def dataset(tmp_path):
    return worlds.random_dataset(
        tmp_path / "d", n_users=6, n_items=11, per_user=5, categories=4, ratings=True
    )


def _events(dataset, user):
    """Training events in time order, then those of validation; the world's order is its time."""
    parts = (dataset.train, dataset.valid)
    return [
        int(i) for part in parts for u, i in zip(part.users, part.items, strict=True) if u == user
    ]


def test_only_what_is_read_is_made(dataset):
    found = context.make_context(dataset, (GRAPH,), most_categories=8)
    assert found.histories is None
    assert found.fields is None
    assert found.graph is not None
    sizes = context.sizes(dataset, (), most_categories=8)
    assert (sizes.users, sizes.items) == (6, 11)
    assert (sizes.categories, sizes.longest_history) == (0, 0)


def test_recent_is_the_end_of_the_history_before_the_moment(dataset):
    histories = context.make_context(dataset, ALL, most_categories=8).histories
    longest = 0
    for user in range(6):
        events = _events(dataset, user)
        longest = max(longest, len(events))
        trained = int((dataset.train.users == user).sum())
        assert int(histories.trained[user]) == trained
        for as_of in range(len(events) + 1):
            queries = Queries(jnp.array([user]), jnp.array([as_of]))
            items, there = context.recent(jax.tree.map(jnp.asarray, histories), queries, 4)
            past = events[max(0, as_of - 4) : as_of]
            assert there[0].tolist() == [False] * (4 - len(past)) + [True] * len(past)
            assert items[0, 4 - len(past) :].tolist() == past
            if events:  # places before the first event touch the user's own rows
                assert set(items[0].tolist()) <= set(events)
    assert context.sizes(dataset, ALL, most_categories=8).longest_history == longest


@pytest.mark.parametrize("most", [1, 8])
def test_fields_are_the_categories_of_each_item(dataset, most):
    found = context.make_context(dataset, ALL, most_categories=most).fields
    names = dataset.items.column("categories").to_pylist()
    code: dict[str, int] = {}
    for name in (name for listed in names for name in listed):
        code.setdefault(name, len(code))
    sizes = context.sizes(dataset, ALL, most_categories=most)
    assert (sizes.categories, sizes.categories_per_item) == (len(code), min(most, 2))
    for item, listed in enumerate(names):
        count = int(found.counts[item])
        assert count == min(len(listed), most)
        assert found.categories[item, :count].tolist() == [code[n] for n in listed[:count]]
        ids, there = context.categories_of(
            context.Fields(jnp.asarray(found.categories), jnp.asarray(found.counts)),
            jnp.array([[item]]),
        )
        assert there[0, 0].tolist() == [k < count for k in range(ids.shape[-1])]


def test_items_without_categories(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=4, n_items=5, per_user=3)
    found = context.make_context(dataset, (FIELDS,), most_categories=8).fields
    assert not np.any(found.counts)
    assert context.sizes(dataset, (FIELDS,), most_categories=8).categories == 0


def test_graph_holds_each_training_pair_in_both_orders(dataset):
    graph = context.make_context(dataset, ALL, most_categories=8).graph
    pairs = worlds.pairs_of(dataset.train.users, dataset.train.items)
    users = np.repeat(np.arange(6), np.diff(graph.user_offsets))
    items = np.repeat(np.arange(11), np.diff(graph.item_offsets))
    assert worlds.pairs_of(users, graph.items) == pairs
    assert worlds.pairs_of(graph.users, items) == pairs
    assert graph.items.size == graph.users.size == len(pairs)


# --- what is drawn from instead of pairs ----------------------------------------------------------


def _targets(dataset, **options):
    chosen = {"window": 0, "history": True, "min_history": 0, "threshold": 0.0} | options
    return arrays.targets(dataset, **chosen)


@pytest.mark.parametrize("min_history", [0, 2])
def test_targets_are_training_events_at_their_place(dataset, min_history):
    found = _targets(dataset, min_history=min_history)
    expected = []
    for user in range(6):
        own = [int(i) for i in dataset.train.items[dataset.train.users == user]]
        expected += [(user, item, k) for k, item in enumerate(own) if k >= min_history]
    got = list(zip(found.users.tolist(), found.items.tolist(), found.as_of.tolist(), strict=True))
    assert got == expected
    assert found.labels is None


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_windows_cover_every_event_but_the_first_once(dataset, window):
    found = _targets(dataset, window=window)
    covered = [
        (user, place)
        for user, as_of in zip(found.users.tolist(), found.as_of.tolist(), strict=True)
        for place in range(max(1, as_of - window + 1), as_of + 1)
    ]
    counts = np.bincount(dataset.train.users, minlength=6)
    assert sorted(covered) == [(u, k) for u in range(6) for k in range(1, counts[u])]


def test_labels_are_ratings_from_the_threshold_on(dataset):
    found = _targets(dataset, history=False, threshold=4.0)
    assert found.as_of is None
    assert found.labels.tolist() == (dataset.train.ratings >= 4).astype(float).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 9.0}, "all .* label 0; ratings go from 1 to 5"),
        ({"min_history": 99}, "no user has a training interaction with 99 earlier ones"),
    ],
)
def test_nothing_to_learn_from_is_an_error(dataset, options, message):
    with pytest.raises(InputError, match=message):
        _targets(dataset, **options)
