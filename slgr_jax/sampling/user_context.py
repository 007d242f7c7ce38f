"""What a backbone looks up of users, where they are split: each device has that of its own users.

A `Context` stays what it is. A device has its shards one behind the other, and counts their users
and their events in that order; as it knows users by their row among its own, in a step and in a
ranking, it looks them up as if nobody else were there. Of users are their histories, the features
of users and those of their interactions; everything else is whole on every device.

Shape letters: V shards, U users, n events, S slots of features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.sampling.context import Context, Histories
from slgr_jax.sampling.features import Features, FeatureSlots
from slgr_jax.sampling.user_shards import ByUser, ShardRows


def put(context: Context, layout: Layout) -> Context:
    """Host arrays on the devices, without vectors: whole on each, those of users with the users.

    Raises:
      InputError: more events on a device than an int32 counts.
    """
    if layout.users is None:
        return layout.put(context)
    histories, features = context.histories, context.features
    by_user = events(histories, layout.users)
    parts = layout.put(dataclasses.replace(context, histories=None, features=None))
    if histories is not None and by_user is not None:
        parts = dataclasses.replace(parts, histories=_histories(histories, by_user, layout))
    if features is not None:
        parts = dataclasses.replace(parts, features=_features(features, by_user, layout))
    return parts


def events(histories: Histories | None, shards: UserShards) -> ByUser | None:
    """The events of histories (host arrays) by user; None without any."""
    if histories is None:
        return None
    users = Csr(np.asarray(histories.offsets), np.asarray(histories.items)).owners()
    return ByUser(users, shards)


def events_of_shard(by_user: ByUser) -> int:
    """Room for the events of a shard, and one: what somebody without an event looks at, on however
    many devices; and the last interaction of a device is the one of which nothing is known."""
    return by_user.longest + 1


def on_device(
    interactions: np.ndarray, users: np.ndarray, dataset: Dataset, layout: Layout
) -> np.ndarray:
    """[n] what `context.interaction_rows` says of interactions before the test part, as the device
    counts them that has their user.

    Args:
      users: [n] whose each is.
    """
    assert layout.users is not None, "users are split"
    owners = np.sort(np.concatenate([dataset.train.users, dataset.valid.users]))
    by_user = ByUser(owners, layout.users)
    shard = layout.users.row[users] // layout.users.rows
    begins = shard % layout.shards_here * events_of_shard(by_user)
    return by_user.local(interactions, users) + begins


def _histories(histories: Histories, by_user: ByUser, layout: Layout) -> Histories:
    assert layout.users is not None, "users are split"
    shards, own, sharding = layout.users, layout.shards_here, layout.users_sharding
    longest, bounds = events_of_shard(by_user), by_user.bounds()
    if own * longest >= 2**31:
        raise InputError(
            f"--user_shards={shards.count}: {own} shards of up to {longest} events are one "
            f"device's, which counts fewer than {2**31}; train on more devices"
        )

    def begins(shard: int) -> np.ndarray:
        return bounds.of_shard(shard) + shard % own * longest

    items = by_user.entries(np.asarray(histories.items))
    return Histories(
        offsets=dataclasses.replace(bounds, of_shard=begins).put_flat(sharding),
        items=dataclasses.replace(items, shape=(shards.count, longest)).put_flat(sharding),
        trained=ShardRows.of_users(np.asarray(histories.trained), shards).put_flat(sharding),
    )


def _features(features: Features, by_user: ByUser | None, layout: Layout) -> Features:
    assert layout.users is not None, "users are split"
    shards, sharding = layout.users, layout.users_sharding
    user, interaction = features.user, features.interaction
    if user is not None:
        rows, weights = (
            ShardRows.of_users(np.asarray(x), shards).put_flat(sharding)
            for x in (user.rows, user.weights)
        )
        user = FeatureSlots(rows, weights, user.widths)
    if interaction is not None:
        assert by_user is not None, "the moment says which was the last interaction"
        rows, weights = (
            _with_unknown(np.asarray(x), by_user).put_flat(sharding)
            for x in (interaction.rows, interaction.weights)
        )
        interaction = FeatureSlots(rows, weights, interaction.widths)
    return Features(user, layout.put(features.item), interaction)


def _with_unknown(values: np.ndarray, by_user: ByUser) -> ShardRows:
    """[V, n_v + 1, S] those of each shard's events, and at its end what is said of no interaction.

    Args:
      values: [n + ..., S] of events, in the order of histories, and others; of none last.
    """
    of_events, longest = by_user.entries(values), events_of_shard(by_user)

    def of_shard(shard: int) -> np.ndarray:
        rows = np.repeat(values[-1:], longest, axis=0)
        known = of_events.of_shard(shard)
        rows[: len(known)] = known
        return rows

    return ShardRows((of_events.shape[0], longest, *values.shape[1:]), values.dtype, of_shard)


def specs(context: Context, layout: Layout) -> Any:
    """How a context lies on the devices; a prefix of it."""
    whole: Any = PartitionSpec()
    of_user: Any = whole if layout.users is None else layout.batch_spec
    parts: dict[str, Any] = {field.name: whole for field in dataclasses.fields(Context)}
    if context.features is not None:
        parts["features"] = Features(of_user, whole, of_user)
    return Context(**parts | {"histories": of_user, "vectors": layout.table_spec})


def by_shard(histories: Histories, layout: Layout) -> tuple[jax.Array, ...]:
    """A device's histories as those of each of its shards: the fields, [shards, ...] each."""
    shards = layout.shards_here
    items = histories.items.reshape(shards, -1)
    begins = jnp.arange(shards, dtype=jnp.int32)[:, None] * items.shape[1]
    offsets = histories.offsets.reshape(shards, -1) - begins
    return offsets, items, histories.trained.reshape(shards, -1)
