"""What a backbone looks up of users, dealt out: on its device each finds what it had whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import make_run
from slgr_jax.data import features as features_lib
from slgr_jax.errors import InputError
from slgr_jax.mesh import Layout, UserShards, make_layout
from slgr_jax.sampling import arrays, user_context, user_shards
from slgr_jax.sampling import context as context_lib
from slgr_jax.sampling.context import Context, Histories, Queries, at_interactions, recent


def _layout(dataset, devices: int) -> Layout:
    layout = make_layout(devices=jax.devices()[:devices])
    return dataclasses.replace(layout, users=UserShards.deal(dataset.history, 8))


def _of_device(dealt: jax.Array, number: int) -> jax.Array:
    (part,) = (x.data for x in dealt.addressable_shards if x.device == jax.devices()[number])
    return jnp.asarray(np.asarray(part))


def _recent(context: Context, layout: Layout, as_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`recent` of every user, each on the device that has them."""
    assert layout.users is not None
    dealt = user_context.put(context, layout).histories
    rows = layout.users.table_rows // layout.devices
    items, real = np.empty((as_of.size, 4), np.int32), np.empty((as_of.size, 4), bool)
    for number in range(layout.devices):
        own = Histories(
            *(_of_device(leaf, number) for leaf in (dealt.offsets, dealt.items, dealt.trained))
        )
        users = np.flatnonzero(layout.users.row // rows == number)
        row = layout.users.row[users] % rows
        np.testing.assert_array_equal(own.trained[row], context.histories.trained[users])
        items[users], real[users] = recent(own, Queries(row, as_of[users]), 4)
    return items, real


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_histories_on_a_device_are_those_of_its_users(tmp_path, devices):
    """23 users in 8 shards. Who has no event looks at the same one on any devices."""
    pairs = worlds.random_pairs(0, 23, 30, 9)
    parts = pairs[:60], pairs[60:90], pairs[90:]
    dataset = worlds.write_dataset(tmp_path / "d", *parts, n_users=23, n_items=30)
    looked_up = context_lib.make_context(dataset, {context_lib.HISTORY}, most_categories=1)
    had = np.diff(looked_up.histories.offsets)
    assert {0, 9} <= set(had.tolist())
    whole = worlds.one_device().put(looked_up).histories
    for most in (1, 3, 9):
        as_of = np.minimum(most, had).astype(np.int32)
        items, real = _recent(looked_up, _layout(dataset, devices), as_of)
        expected, is_event = recent(whole, Queries(jnp.arange(23), jnp.asarray(as_of)), 4)
        np.testing.assert_array_equal(real, is_event)
        np.testing.assert_array_equal(items[real], np.asarray(expected)[real])
        alone, _ = _recent(looked_up, _layout(dataset, 1), as_of)
        np.testing.assert_array_equal(items, alone)


@pytest.mark.parametrize("devices", [1, 4])
def test_features_on_a_device_are_those_of_its_users(tmp_path, devices):
    """Those of users; of interactions that are given, in training and validation, of the last one
    before a moment, and of none."""
    dataset = worlds.random_dataset(
        tmp_path / "d",
        n_users=23,
        features=[
            worlds.feature("group", "user", [[f"g{u % 5}"] for u in range(23)]),
            features_lib.numeric("hour", "interaction", np.arange(230.0), np.arange(230) < 138),
        ],
    )
    reads = {context_lib.HISTORY, context_lib.FEATURES}
    chosen = context_lib.Chosen(dataset.features)
    context = context_lib.make_context(dataset, reads, most_categories=1, chosen=chosen)
    layout = _layout(dataset, devices)
    users = layout.users
    dealt, events = user_context.put(context, layout), user_context.events(context.histories, users)
    train = arrays.targets(
        dataset, window=0, history=True, min_history=0, threshold=0.0, features=True
    )
    cold, tail = np.zeros(23), np.zeros(30)
    every = arrays.interactions(dataset, make_run("d", "w").sampler, cold, tail)
    every = dataclasses.replace(every, targets=train)
    targets = user_shards.deal_interactions(every, users, events).targets
    of_targets = user_shards.ByUser(train.users, users)

    hours = np.asarray(context.features.interaction.weights)
    valid = context_lib.interaction_rows(dataset, "valid")
    asked = user_context.on_device(valid, dataset.valid.users, dataset, layout)
    rows, room = users.table_rows // devices, user_context.events_of_shard(events)
    for number in range(devices):
        own = jax.tree.map(lambda leaf, number=number: _of_device(leaf, number), dealt)
        members = np.flatnonzero(users.row // rows == number)
        row = users.row[members] % rows
        np.testing.assert_array_equal(
            own.features.user.rows[row], context.features.user.rows[members]
        )
        of_interactions = own.features.interaction.weights
        of_device = users.row[dataset.valid.users] // rows == number
        np.testing.assert_array_equal(of_interactions[asked[of_device]], hours[valid[of_device]])
        for as_of in (0, 2, 4):
            last = at_interactions(own, Queries(row, np.full(members.size, as_of))).interactions
            whole = (
                context.histories.offsets[members] + as_of - 1
                if as_of
                else np.full(members.size, -1)
            )
            np.testing.assert_array_equal(of_interactions[last], hours[whole])
        for place in range(layout.shards_here):
            shard = number * layout.shards_here + place
            expected = of_targets.entries(hours[train.interactions]).of_shard(shard)
            chosen_rows = targets.interactions.of_shard(shard) + place * room
            np.testing.assert_array_equal(of_interactions[chosen_rows], expected)


def test_more_events_than_a_device_counts_are_refused(tmp_path, monkeypatch):
    dataset = worlds.random_dataset(tmp_path / "d")
    looked_up = context_lib.make_context(dataset, {context_lib.HISTORY}, most_categories=1)

    class Longer(user_shards.ByUser):
        @property
        def longest(self) -> int:  # type: ignore[override]
            return 2**29

        @longest.setter
        def longest(self, _: int) -> None: ...

    monkeypatch.setattr(user_context, "ByUser", Longer)
    with pytest.raises(InputError, match=r"--user_shards=8: 4 shards of up to 536870913 events"):
        user_context.put(looked_up, _layout(dataset, 2))
