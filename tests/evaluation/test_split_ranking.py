"""Full ranking where users or items are split over devices: as where one device has them all."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from ranked_worlds import check, make_world, split_by_user, table

from slgr_jax.data.dataset import Csr
from slgr_jax.errors import NonFiniteError
from slgr_jax.evaluation import full_ranking
from slgr_jax.mesh import UserShards, make_layout


@pytest.mark.parametrize("devices", [1, 4])
def test_users_that_are_split_have_the_same_ranks_and_lists(devices):
    """Also the pooled AUC, and lists of users who ask in any order, twice, with filters by user."""
    world = make_world(11, 37, 90, ties=True, overlap=True)
    of_split = split_by_user(world, devices)
    relevant, seen = world.csr
    state = of_split.pop("state")
    ranked = full_ranking.rank(
        table, state, relevant, seen, 90, users_per_chunk=16, top_k=7, **of_split
    )
    check(world, ranked, 7)

    asked = np.array([3, 36, 3, 0, 17, 1, 30, 2], np.int32)
    allowed = np.arange(90) % 3 > 0
    only = Csr.from_pairs(*np.nonzero(np.random.default_rng(0).random((37, 90)) < 0.3), 37)
    lists = [
        full_ranking.TopLists(table, of, seen, 90, k=5, users_per_chunk=8, **how)
        for of, how in ((state, of_split), (jax.device_put(world.scores), {}))
    ]
    for filters in ((None, None), (allowed, None), (allowed, only)):
        got, expected = (each(asked, each.put(*filters)) for each in lists)
        np.testing.assert_array_equal(got.items, expected.items)
        np.testing.assert_array_equal(got.scores, expected.scores)
    assert lists[0](np.zeros(0, np.int32)).items.shape == (0, 5)


class Products:
    """Scores that are inner products of the rows of two tables."""

    def __call__(self, state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
        raise AssertionError("would score over all items at once")

    def queries(self, state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
        return state[0][users]

    def own_queries(
        self, state: tuple[jax.Array, jax.Array], users: jax.Array, layout: object
    ) -> jax.Array:
        return state[0][users]

    def items(self, state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[1]


@pytest.mark.parametrize("split_users", [False, True])
def test_items_that_are_split_are_ranked_where_they_are(split_users):
    """Ranks, lists with filters and pooled AUC over blocks of items, ties between blocks among
    them; rows that fill a table up are no items."""
    world, n_users, n_items = make_world(4, 37, 300, ties=True, overlap=True), 37, 300
    rng = np.random.default_rng(0)
    user_rows, item_rows = (rng.integers(-2, 3, (n, 3)) for n in (n_users, n_items))
    user_rows, item_rows = (x.astype(np.float32) for x in (user_rows, item_rows))
    world = dataclasses.replace(world, scores=user_rows @ item_rows.T)
    relevant, seen = world.csr
    layout = make_layout(table_shards=4, devices=jax.devices()[:8])
    padded = np.full((layout.padded_rows(n_items), 3), 100, np.float32)  # would be everybody's best
    padded[:n_items] = item_rows
    where, shards = layout.replicated, None
    if split_users:
        shards = UserShards.deal(seen.counts, 8)
        dealt = np.zeros((shards.table_rows, 3), np.float32)
        dealt[shards.row] = user_rows
        user_rows, where = dealt, layout.users_sharding
    state = jax.device_put((user_rows, padded), (where, layout.table_sharding))
    how = {"mesh": layout.mesh, "split": shards, "split_items": True}

    model = Products()
    ranked = full_ranking.rank(
        model, state, relevant, seen, n_items, users_per_chunk=16, top_k=7, **how
    )
    check(world, ranked, 7)
    allowed = np.arange(n_items) % 5 > 0
    only = Csr.from_pairs(*np.nonzero(rng.random(world.scores.shape) < 0.1), n_users)
    asked = np.array([5, 36, 5, 1, 20], np.int32)
    lists = [
        full_ranking.TopLists(table, jax.device_put(world.scores), seen, n_items, k=140),
        full_ranking.TopLists(model, state, seen, n_items, k=140, **how),
    ]
    for filters in ((None, None), (allowed, only)):
        expected, got = (each(asked, each.put(*filters)) for each in lists)
        np.testing.assert_array_equal(got.items, expected.items)
        np.testing.assert_array_equal(got.scores, expected.scores)
    padded[:n_items] = np.nan
    bad = jax.device_put((user_rows, padded), (where, layout.table_sharding))
    with pytest.raises(NonFiniteError, match="NaN or infinite score"):
        full_ranking.rank(model, bad, relevant, seen, n_items, **how)
