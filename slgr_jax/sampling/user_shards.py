"""Users' arrays dealt out to shards of users, so that each device has those of its own users alone.

`mesh.UserShards` says whose user is whose. Here the host arrays of a dataset that follow users
become `ShardRows`, [V, longest, ...], padded with 0, among the others as they were (of items, or
numbers); `put` makes `arrays.Dealt` of that. Users and entries are counted within their shard, so
that whatever draws from the whole arrays draws from those of a shard.

A shard's lanes are drawn from its own n_v entries and weigh n_v V / n (`Share`): as many lanes for
each shard then give every entry the same expectation, 1 / n of the lanes.

A device's part is made when it is put there, by the process that the device belongs to.

Shape letters: V shards, U users, n entries, n_v of one shard.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slgr_jax import cluster
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.sampling.arrays import (
    MARKED,
    Dealt,
    Excluded,
    Facts,
    HardNegatives,
    Interactions,
    Share,
    Targets,
)
from slgr_jax.sampling.labelled_preferences import (
    ChosenItems,
    LabelSource,
    ListLabels,
    PairLabels,
)
from slgr_jax.sampling.teacher_arrays import TeacherLists, TeacherPairs

Teacher = TeacherLists | TeacherPairs


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """A host array [V, ...] of which a shard is made when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    of_shard: Callable[[int], np.ndarray]

    @classmethod
    def of_users(cls, values: np.ndarray, shards: UserShards) -> ShardRows:
        """[V, rows, ...] the [U, ...] values of each shard's users."""
        shape = shards.count, shards.rows, *values.shape[1:]
        return cls(shape, values.dtype, lambda shard: values[shards.of_shard(shard)])

    def block(self, first: int, last: int) -> np.ndarray:
        """Shards first to last - 1."""
        block = np.zeros((last - first, *self.shape[1:]), self.dtype)
        for shard in range(first, last):
            rows = self.of_shard(shard)
            of_shard = block[shard - first : shard - first + 1].reshape(-1, *self.shape[2:])
            of_shard[: len(rows)] = rows
        return block

    def put(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """On the devices that the shards belong to; a process makes those of its own."""

        def of_device(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(self.shape[0])
            return self.block(first, last)

        with jax.transfer_guard("allow"):  # as explicit as a device_put, which JAX does not know
            return jax.make_array_from_callback(self.shape, sharding, of_device)

    def put_flat(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """`put` as [V * longest, ...]: a device's shards one behind the other."""
        longest, *rest = self.shape[1:]
        shape = self.shape[0] * longest, *rest

        def of_device(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            return self.block(first // longest, last // longest).reshape(-1, *rest)

        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(shape, sharding, of_device)


def put(tree: Any, layout: Layout) -> Dealt:
    """A tree of host arrays and `ShardRows` on the devices."""
    leaves, structure = jax.tree.flatten(tree)
    is_own = tuple(isinstance(leaf, ShardRows) for leaf in leaves)
    own = tuple(leaf.put(layout.users_sharding) for leaf in leaves if isinstance(leaf, ShardRows))
    whole = layout.put(tuple(leaf for leaf in leaves if not isinstance(leaf, ShardRows)))
    return Dealt(own, whole, structure, is_own)


class ByUser:
    """n entries, each of one user, dealt out with their users; in the order of user numbers."""

    def __init__(self, owners: np.ndarray, shards: UserShards) -> None:
        """Args:
        owners: [n] the user of each entry.
        """
        self._shards = shards
        # Where each entry stands when they are ordered by user; None where they are.
        self._order = None
        if owners.size and (owners[1:] < owners[:-1]).any():
            self._order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=shards.users)
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        dealt = np.append(counts, 0)[shards.by_row]
        self._begins = np.cumsum(dealt, axis=1) - dealt
        self.counts = _of_all(dealt.sum(axis=1), shards)
        self.longest = max(int(self.counts.max()), 1)

    def bounds(self) -> ShardRows:
        """[V, rows] where the entries of each user begin in those of the shard."""
        shape = (self._shards.count, self._shards.rows)
        return ShardRows(shape, np.dtype(np.int32), lambda shard: self._begins[shard])

    def entries(self, values: np.ndarray) -> ShardRows:
        """[V, longest, ...] the [n, ...] values of each shard's entries."""
        shape = (self._shards.count, self.longest, *values.shape[1:])
        return ShardRows(shape, values.dtype, lambda shard: values[self._places(shard)])

    def every(self, values: np.ndarray, step: int) -> ShardRows:
        """[V, ...] every so many of `entries`."""
        shape = (self._shards.count, -(-self.longest // step))
        return ShardRows(shape, values.dtype, lambda shard: values[self._places(shard)[::step]])

    def local(self, entries: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """Which entry of its shard's each is; -1 stays.

        Args:
          entries: [m] numbers of entries; owners: [m] their users.
        """
        place = entries
        if self._order is not None:
            rank = np.empty_like(self._order)
            rank[self._order] = np.arange(rank.size)
            place = rank[entries]
        begins = self._begins.reshape(-1)[self._shards.row[owners]]
        local = place - self._offsets[owners] + begins
        return np.where(entries < 0, -1, local).astype(np.int32)

    def share(self) -> Share:
        """What a shard's lanes are drawn from, and what they weigh."""
        weights = self.counts * (self._shards.count / max(int(self.counts.sum()), 1))
        return Share(
            count=_numbers(self.counts.astype(np.int32)),  # type: ignore[arg-type]
            weight=_numbers(weights.astype(np.float32)),  # type: ignore[arg-type]
        )

    def _places(self, shard: int) -> np.ndarray:
        """[n_v] which of the n entries are the shard's, in its order."""
        users = self._shards.of_shard(shard)
        begins, counts = self._offsets[users], self._offsets[users + 1] - self._offsets[users]
        within = np.cumsum(counts) - counts
        places = np.repeat(begins - within, counts) + np.arange(counts.sum())
        return places if self._order is None else self._order[places]


def _of_all(counts: np.ndarray, shards: UserShards) -> np.ndarray:
    """[V] counts of every shard, from those that each process has of its own."""
    if shards.here is None:
        return counts
    return np.sum(over_processes(np.where(shards.here, counts, 0)), axis=0)


def over_processes(values: np.ndarray) -> np.ndarray:
    """[P, ...] few numbers of each process of the job, on all of them, who all call this.

    Raises:
      UserError: a process failed meanwhile.
    """
    return np.array([json.loads(text) for text in cluster.every(json.dumps(values.tolist()))])


def largest(count: int, dataset: Dataset) -> int:
    """The most that a process has of something, if each has its own users' alone."""
    return count if dataset.of_users is None else int(over_processes(np.array(count)).max())


def total(count: int, dataset: Dataset) -> int:
    """What all processes have of something of users, if this one has its own users' alone."""
    return count if dataset.of_users is None else int(over_processes(np.array(count)).sum())


def _numbers(of_shard: np.ndarray) -> ShardRows:
    """[V] a number of each shard."""
    return ShardRows(of_shard.shape, of_shard.dtype, lambda shard: of_shard[shard : shard + 1])


def _of_users(values: np.ndarray, shards: UserShards) -> Any:
    return ShardRows.of_users(values, shards)


def numbers_of(users: np.ndarray, shards: UserShards) -> np.ndarray:
    """The number that each user has in its shard."""
    return shards.row[users] % shards.rows


def owners_of(offsets: Any) -> np.ndarray:
    counts = np.diff(np.asarray(offsets))
    return np.repeat(np.arange(counts.size, dtype=np.int32), counts)


def _excluded(cut: Excluded, shards: UserShards) -> Excluded:
    by_user: Any = ByUser(owners_of(cut.offsets), shards)
    return Excluded(
        offsets=by_user.bounds(),
        keys=by_user.entries(cut.keys),
        marks=by_user.every(cut.keys, MARKED),
        shifts=None if cut.shifts is None else by_user.entries(cut.shifts),
        free=_of_users(np.asarray(cut.free), shards),
        search_steps=greatest(cut.search_steps, shards),
    )


def greatest(number: int, shards: UserShards) -> int:
    """Of every process's own, what is compiled in everywhere."""
    return number if shards.here is None else int(over_processes(np.array(number)).max())


def deal_interactions(
    data: Interactions, shards: UserShards, events: ByUser | None = None
) -> Interactions:
    """Host arrays of `arrays.interactions`, dealt out.

    Args:
      events: of the histories, as which targets count their interactions; None: they do not.
    """
    by_user: Any = ByUser(np.asarray(data.users), shards)
    facts, share = data.facts, by_user.share()
    targets = None
    if data.targets is not None:
        targets, share = _targets(data.targets, shards, events)
    return Interactions(
        users=by_user.entries(numbers_of(np.asarray(data.users), shards)),
        items=by_user.entries(data.items),
        negatives=_excluded(data.negatives, shards),
        cumulative=data.cumulative,
        facts=Facts(
            log_history=_of_users(np.asarray(facts.log_history), shards),
            log_popularity=facts.log_popularity,
            cold=_of_users(np.asarray(facts.cold), shards),
            tail=facts.tail,
            fold=None if facts.fold is None else _of_users(np.asarray(facts.fold), shards),
        ),
        targets=targets,
        hard=None if data.hard is None else _hard(data.hard, shards),
        share=share,
    )


def _targets(targets: Targets, shards: UserShards, events: ByUser | None) -> tuple[Targets, Share]:
    users = np.asarray(targets.users)
    by_user: Any = ByUser(users, shards)
    interactions = None
    if targets.interactions is not None:
        assert events is not None, "interactions are counted as events of histories"
        interactions = by_user.entries(events.local(np.asarray(targets.interactions), users))
    return Targets(
        users=by_user.entries(numbers_of(np.asarray(targets.users), shards)),
        items=by_user.entries(targets.items),
        as_of=None if targets.as_of is None else by_user.entries(targets.as_of),
        labels=None if targets.labels is None else by_user.entries(targets.labels),
        interactions=interactions,
    ), by_user.share()


def _hard(pools: HardNegatives, shards: UserShards) -> HardNegatives:
    by_user: Any = ByUser(owners_of(pools.offsets), shards)
    return HardNegatives(by_user.bounds(), by_user.entries(pools.items))


def deal_teacher(teacher: Teacher, shards: UserShards) -> Teacher:
    """A teacher's preferences (host arrays), dealt out."""
    dealt: Teacher
    if isinstance(teacher, TeacherPairs):
        users = np.asarray(teacher.users)
        by_user: Any = ByUser(users, shards)
        dealt = teacher.replace(  # type: ignore[attr-defined]
            users=by_user.entries(numbers_of(users, shards)),
            items=by_user.entries(teacher.items),
            margins=by_user.entries(teacher.margins),
            share=by_user.share(),
        )
        return dealt

    by_user = ByUser(owners_of(teacher.offsets), shards)
    starts = np.array(teacher.starts)
    of_starts: Any = ByUser(starts[:, 1], shards)
    starts[:, 0] = by_user.local(starts[:, 0], starts[:, 1])
    starts[:, 1] = numbers_of(starts[:, 1], shards)
    dealt = teacher.replace(  # type: ignore[attr-defined]
        offsets=by_user.bounds(),
        items=by_user.entries(teacher.items),
        scores=by_user.entries(teacher.scores),
        starts=of_starts.entries(starts),
        unlisted=None if teacher.unlisted is None else _excluded(teacher.unlisted, shards),
        share=of_starts.share(),
    )
    return dealt


def deal_labels(source: LabelSource, teacher: Teacher, shards: UserShards) -> LabelSource:
    """What labelled preferences are drawn from (host arrays), dealt out with the teacher's."""
    chosen, users = source.chosen, np.asarray(source.chosen.users)
    of_chosen: Any = ByUser(users, shards)
    labels: Any
    if isinstance(source.labels, PairLabels):
        pairs, of_pairs = np.asarray(source.labels.pairs), np.asarray(teacher.users)  # type: ignore[union-attr]
        by_user: Any = ByUser(of_pairs[pairs], shards)
        labels = PairLabels(
            pairs=by_user.entries(ByUser(of_pairs, shards).local(pairs, of_pairs[pairs])),
            right=by_user.entries(source.labels.right),
            as_of=by_user.entries(source.labels.as_of),
        )
    else:
        assert isinstance(teacher, TeacherLists)
        by_user = ByUser(users[np.asarray(source.labels.chosen)], shards)
        labels = _list_labels(source.labels, teacher, users, of_chosen, by_user, shards)
    return LabelSource(
        ChosenItems(
            offsets=of_chosen.bounds(),
            users=of_chosen.entries(numbers_of(users, shards)),
            items=of_chosen.entries(chosen.items),
            as_of=of_chosen.entries(chosen.as_of),
            negatives=_excluded(chosen.negatives, shards),
        ),
        labels,
        by_user.share(),
    )


def _list_labels(
    labels: ListLabels,
    teacher: TeacherLists,
    users: np.ndarray,
    of_chosen: ByUser,
    by_user: Any,
    shards: UserShards,
) -> ListLabels:
    places = np.asarray(labels.chosen)
    entries = ByUser(owners_of(teacher.offsets), shards)
    of_others = owners_of(labels.other_offsets)
    others: Any = ByUser(of_others, shards)
    return ListLabels(
        chosen=by_user.entries(of_chosen.local(places, users[places])),
        entry=by_user.entries(entries.local(np.asarray(labels.entry), users[places])),
        other_offsets=others.bounds(),
        others=others.entries(entries.local(np.asarray(labels.others), of_others)),
        outside=None if labels.outside is None else _excluded(labels.outside, shards),
    )


def refuse_empty_shards(dealt: Any, shards: UserShards) -> None:
    """Refuse arrays of which a shard has nothing to draw, for an optimiser that would notice.

    Such a shard's lanes weigh nothing, but are there, and read rows.

    Raises:
      InputError: as said.
    """
    shares = jax.tree.leaves(dealt, is_leaf=lambda x: isinstance(x, Share))
    for share in (x for x in shares if isinstance(x, Share)):
        counts: Any = share.count
        empty = int((counts.block(0, shards.count) == 0).sum())
        if empty:
            raise InputError(
                f"--user_shards={shards.count}: {empty} of them have nothing to draw, whose lanes "
                "--table_optimizer=lazy_adam would count as updates; give fewer, or another "
                "optimiser"
            )


def flat(own: jax.Array) -> jax.Array:
    """A device's [shards, longest, ...] as [shards * longest, ...]."""
    return own.reshape(-1, *own.shape[2:])


def flat_bounds(bounds: jax.Array, longest: int) -> jax.Array:
    """A device's `ByUser.bounds` [shards, rows] as bounds in `flat` entries, [shards * rows].

    Those of user row r are r and r + 1: no user is in a shard's last row.
    """
    first = jnp.arange(bounds.shape[0], dtype=bounds.dtype) * longest
    return (bounds + first[:, None]).reshape(-1)
