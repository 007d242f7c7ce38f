"""What a backbone looks up of users, where they are split: each device has that of its own users.

A `Context` stays what it is. A device has its shards one behind the other, and counts their users
and their events in that order; as it knows users by their row among its own, in a step and in a
ranking, it looks them up as if nobody else were there. Of users are their histories, the features
of users and those of their interactions, and their edges of the graph; everything else is whole on
every device.

Shape letters: V shards, U users, I items, n events, S slots of features.
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
from slgr_jax.sampling.context import Context, Graph, Histories, OwnGraph
from slgr_jax.sampling.features import Features, FeatureSlots
from slgr_jax.sampling.user_shards import ByUser, ShardRows, over_processes


def put(context: Context, layout: Layout) -> Context:
    """Host arrays on the devices, without vectors: whole on each, those of users with the users.

    Raises:
      InputError: more events on a device than an int32 counts.
    """
    if layout.users is None:
        return layout.put(context)
    histories, features, graph = context.histories, context.features, context.graph
    by_user = events(histories, layout.users)
    parts = layout.put(dataclasses.replace(context, histories=None, features=None, graph=None))
    if histories is not None and by_user is not None:
        parts = dataclasses.replace(parts, histories=_histories(histories, by_user, layout))
    if features is not None:
        parts = dataclasses.replace(parts, features=_features(features, by_user, layout))
    if isinstance(graph, Graph):
        parts = dataclasses.replace(parts, graph=_graph(graph, layout))
    return parts


def is_of_users(context: Context) -> bool:
    """Whether anything in a context is looked up by a user's number."""
    features = context.features
    of_users = features is not None and (features.user or features.interaction) is not None
    return context.histories is not None or context.graph is not None or of_users


def numbers(of_users: np.ndarray | None, layout: Layout) -> jax.Array | None:
    """A number of each user, [U], on the devices with their rows; None of none."""
    assert layout.users is not None, "users are split"
    if of_users is None:
        return None
    return ShardRows.of_users(np.asarray(of_users), layout.users).put_flat(layout.users_sharding)


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
    shards, sharding = layout.users, layout.users_sharding
    items, room = by_user.entries(np.asarray(histories.items)), events_of_shard(by_user)
    return Histories(
        offsets=_begins(by_user, layout).put_flat(sharding),
        items=dataclasses.replace(items, shape=(shards.count, room)).put_flat(sharding),
        trained=ShardRows.of_users(np.asarray(histories.trained), shards).put_flat(sharding),
    )


def _begins(by_user: ByUser, layout: Layout) -> ShardRows:
    """[V, rows] where the events of each user begin among those of the device."""
    own, room, bounds = layout.shards_here, events_of_shard(by_user), by_user.bounds()
    if own * room >= 2**31:
        raise InputError(
            f"--user_shards={bounds.shape[0]}: {own} shards of up to {room} events are one "
            f"device's, which counts fewer than {2**31}; train on more devices"
        )
    return dataclasses.replace(
        bounds, of_shard=lambda shard: bounds.of_shard(shard) + shard % own * room
    )


def _graph(graph: Graph, layout: Layout) -> OwnGraph:
    assert layout.users is not None, "users are split"
    sharding, items = layout.users_sharding, np.asarray(graph.items)
    by_user = ByUser(Csr(np.asarray(graph.user_offsets), items).owners(), layout.users)
    degrees = np.diff(np.asarray(graph.item_offsets))
    if layout.users.here is not None:  # this process has the edges of its own users alone
        degrees = over_processes(degrees).sum(axis=0).astype(np.int32)
    nobody = np.append(items, np.int32(degrees.size))
    return OwnGraph(
        offsets=_begins(by_user, layout).put_flat(sharding),
        items=_with_unknown(nobody, by_user).put_flat(sharding),
        degrees=layout.put(degrees),
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
    """[V, n_v + 1, ...] those of each shard's events, and at its end what is said of none.

    Args:
      values: [n + ..., ...] of events, in the order of users, and others; of none last.
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
    if isinstance(context.graph, OwnGraph):
        parts["graph"] = OwnGraph(of_user, of_user, whole)
    return Context(**parts | {"histories": of_user, "vectors": layout.table_spec})


def by_shard(histories: Histories, layout: Layout) -> tuple[jax.Array, ...]:
    """A device's histories as those of each of its shards: the fields, [shards, ...] each."""
    shards = layout.shards_here
    items = histories.items.reshape(shards, -1)
    begins = jnp.arange(shards, dtype=jnp.int32)[:, None] * items.shape[1]
    offsets = histories.offsets.reshape(shards, -1) - begins
    return offsets, items, histories.trained.reshape(shards, -1)
