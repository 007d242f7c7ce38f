"""Batches where users are split over the devices: each device draws the lanes of its own shards.

    lanes of shard v   B / V triples, G / V preferences, K / V labelled ones, from v's arrays
    words              a function of (seed, step, v)

So neither the number of devices nor of processes changes a draw, and nothing that is drawn from is
on a device that has no use for it. Lanes weigh their shard's `Share`. Users are known by their row
on the device, by which its block of a table and its histories are looked up.

Shape letters: S steps drawn at once, V shards, B lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from slgr_jax.guidance.base import Guidance
from slgr_jax.guidance.gated import Gated
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.sampling import random_bits, user_context
from slgr_jax.sampling.arrays import Dealt, DeviceArrays, Interactions
from slgr_jax.sampling.batch import Batch, draw
from slgr_jax.sampling.context import Histories, Queries
from slgr_jax.sampling.negatives import Generators, SamplingPlan, generators


def draw_own(
    layout: Layout,
    plan: SamplingPlan,
    guidance: Guidance | None,
    keys: jax.Array,
    arrays: DeviceArrays,
) -> tuple[Batch, Any]:
    """The batches of S steps, and what the guidance draws for them, split over the devices.

    Args:
      plan, guidance: of all shards.
      keys: of each step.
    """
    users = layout.users
    assert users is not None, "users are split"
    assert guidance is None or isinstance(guidance, Gated), "config.RunConfig refuses others"
    of_shard = dataclasses.replace(
        plan, triples=plan.triples // users.count, shared=plan.shared // users.count
    )
    one = functools.partial(
        _draw_shard,
        users,
        of_shard,
        None if guidance is None else guidance.of_shard(users.count),
    )

    def of_device(
        keys: jax.Array, interactions: Dealt, guided: Dealt | None, histories: Histories | None
    ) -> tuple[Batch, Any]:
        places = jnp.arange(layout.shards_here, dtype=jnp.int32)
        own = (
            interactions.own,
            () if guided is None else guided.own,
            () if histories is None else user_context.by_shard(histories, layout),
        )

        def of_shard(place: jax.Array, own: tuple[Any, Any, Any], words_of: Any) -> Any:
            of_guidance = None if guided is None else guided.of_shard(own[1])
            of_interactions = interactions.of_shard(own[0])
            numbers = place, layout.first_shard() + place
            of_users = Histories(*own[2]) if own[2] else None
            return one(numbers, words_of, of_interactions, of_guidance, of_users)

        drawn = jax.vmap(of_shard, in_axes=(0, 0, None))(places, own, generators(keys))
        lanes: tuple[Batch, Any] = jax.tree.map(_lanes, drawn)
        return lanes

    assert isinstance(arrays.interactions, Dealt)
    dealt = arrays.interactions, arrays.guidance, arrays.context.histories
    if layout.devices == 1:
        return of_device(keys, *dealt)
    specs = (
        specs_of(arrays.interactions, layout),
        specs_of(arrays.guidance, layout),
        layout.batch_spec,
    )
    split = jax.shard_map(
        of_device,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), *specs),
        out_specs=PartitionSpec(None, *layout.batch_spec),
        check_vma=False,
    )
    lanes: tuple[Batch, Any] = split(keys, *dealt)
    return lanes


def specs_of(arrays: Any, layout: Layout) -> Any:
    """How what may be dealt out lies on the devices: whole where it is not."""
    if not isinstance(arrays, Dealt):
        return PartitionSpec()
    return dataclasses.replace(
        arrays,
        own=(layout.batch_spec,) * len(arrays.own),
        whole=(PartitionSpec(),) * len(arrays.whole),
    )


def in_step(arrays: DeviceArrays) -> DeviceArrays:
    """A device's arrays as a step's loss reads them: nothing of users, whom a draw looks up."""

    def read(arrays: Any) -> Any:
        return arrays.of_first() if isinstance(arrays, Dealt) else arrays

    return dataclasses.replace(
        arrays, interactions=read(arrays.interactions), guidance=read(arrays.guidance)
    )


def _lanes(drawn: jax.Array) -> jax.Array:
    """[shards, S, lanes, ...] as [S, shards * lanes, ...]."""
    by_step = jnp.moveaxis(drawn, 0, 1)
    return by_step.reshape(by_step.shape[0], -1, *by_step.shape[3:])


def _draw_shard(
    users: UserShards,
    plan: SamplingPlan,
    guidance: Guidance | None,
    numbers: tuple[jax.Array, jax.Array],
    words_of: tuple[Generators, Generators],
    interactions: Interactions,
    of_teacher: Any,
    histories: Histories | None,
) -> tuple[Batch, Any]:
    """The lanes of a shard, of S steps.

    Args:
      numbers: of the shard among those of its device, and among all.
    """
    place, number = numbers
    of_triples, of_guidance = jax.tree.map(
        lambda words: random_bits.of_part(words, number), words_of
    )
    drawn: Any = (draw(of_triples, interactions, plan), None)
    if guidance is not None:
        drawn = drawn[0], guidance.draw(of_guidance, of_teacher, interactions, histories)

    def named(queries: Queries) -> Queries:
        asked = queries.interactions
        if asked is not None and histories is not None:
            asked = place * histories.items.shape[0] + asked
        return dataclasses.replace(
            queries, users=place * users.rows + queries.users, interactions=asked
        )

    of_shard: tuple[Batch, Any] = jax.tree.map(
        lambda x: named(x) if isinstance(x, Queries) else x,
        drawn,
        is_leaf=lambda x: isinstance(x, Queries),
    )
    return of_shard
