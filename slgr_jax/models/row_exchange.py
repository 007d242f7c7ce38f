"""How table rows reach the devices that need them, where a table is split over several.

A device needs n rows (with repeats), and wants to add to the same n rows. Each row has one owner
among the T devices of a copy of the table:

    need     = the distinct rows of my ids, by owner: [T, c], c of each at most
    asked    = all_to_all(need)             which of my rows each device needs
    rows     = all_to_all(table[asked])     and mine are here
    gradient = all_to_all(sums by need)     the same way back, repeats summed before

c is `capacity(n, T)`, 1.5 times a fair share. Where somebody needs more rows of one owner, all
take several rounds, of the rows with number mod rounds = 0, 1, ...: as many as it takes for
everybody, which all agree on. A row's gradients travel in one round, so that they are summed before
the optimiser sees them.

Bytes into (or out of) the collectives of a device, of which a ring sends (T - 1) / T, with rows of
D float32 numbers: 2 c T (4 D + 4) ~ 3 n (4 D + 4) a round. The floor, each row in once and each
gradient out once, is 2 n (4 D). For matrix factorisation of B = 8,192 on 8 devices, D = 64,
n = 3 B / 8 in two tables: floor 1.57 MB, here 2.5 MB; giving every device the rows of all, for it
to take its own, took 12.7 MB.

Shape letters: n ids of this device, T devices of a copy of the tables, c rows of one owner at most,
Rs rows of a device's block, m rows that are asked for, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.mesh import Layout

# Rows of one owner that there is room for: times a fair share, and more where shares are small.
ROOM, LEAST_ROOM = 1.5, 16
Carry = TypeVar("Carry")


class Needs(NamedTuple):
    """Which rows a device needs of whom, by ascending id.

    Attributes:
      order: which of the device's ids each is.
      owner: the device whose row it is; of the T that share a copy.
      local: the row's number in its owner's block.
      first: whether the id is the first of its row.
      rounds: how many exchanges it takes, the same on all devices; None: one, whatever the ids.
    """

    order: Int[Array, "n"]
    owner: Int[Array, "n"]
    local: Int[Array, "n"]
    first: Bool[Array, "n"]
    rounds: Int[Array, ""] | None


class Round(NamedTuple):
    """One exchange.

    Attributes:
      need: rows of each owner's block; Rs where there are fewer than c.
      place: where an id's row is in `need`, flat; T c where it is of another round.
    """

    need: Int[Array, "T c"]
    place: Int[Array, "n"]


def capacity(n: int, shards: int) -> int:
    """c: how many distinct rows of one owner a device with n ids has room for."""
    return min(n, int(ROOM * n / shards) + LEAST_ROOM)


def needs_of(ids: Int[Array, "n"], block: int, layout: Layout) -> Needs:
    """What this device needs.

    Args:
      ids: each in [0, T Rs).
      block: Rs.
    """
    order = jnp.argsort(ids)
    ascending = ids[order]
    first = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]])
    needs = Needs(order, ascending // block, ascending % block, first, None)
    room = capacity(ids.size, layout.table_shards)
    if room == ids.size:
        return needs

    def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rounds = jnp.minimum(2 * carry[0], block)  # at last a row a round
        return rounds, _most(needs, rounds)

    most = jnp.max(_distinct(needs, first, layout.table_shards))
    rounds, _ = jax.lax.while_loop(lambda carry: carry[1] > room, more, (jnp.int32(1), most))
    # Twice as many rounds divide each: what is enough for one is enough where others need more.
    return needs._replace(rounds=layout.max_over_all(rounds))


def _distinct(needs: Needs, first: Bool[Array, "n"], shards: int) -> Int[Array, "T"]:
    """How many rows of each owner."""
    return jnp.zeros(shards, jnp.int32).at[needs.owner].add(first.astype(jnp.int32))


def _most(needs: Needs, rounds: Int[Array, ""]) -> Int[Array, ""]:
    """The most distinct rows of one owner in one of so many rounds."""
    nobody = np.iinfo(np.int32).max
    bucket = needs.owner * rounds + needs.local % rounds
    bucket = jnp.sort(jnp.where(needs.first, bucket, nobody))
    number = jnp.arange(bucket.size, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones(1, bool), bucket[1:] != bucket[:-1]])
    begin = jax.lax.cummax(jnp.where(begins, number, 0))
    return 1 + jnp.max(jnp.where(bucket < nobody, number - begin, 0))


def _round(needs: Needs, number: Int[Array, ""] | int, block: int, shards: int) -> Round:
    room = capacity(needs.order.size, shards)
    rounds = 1 if needs.rounds is None else needs.rounds
    now = needs.local % rounds == number
    first = needs.first & now
    distinct = _distinct(needs, first, shards)
    before = jnp.cumsum(distinct) - distinct  # of the owners before
    of_owner = jnp.cumsum(first.astype(jnp.int32)) - 1 - before[needs.owner]
    place = jnp.where(now, needs.owner * room + of_owner, shards * room)
    need = jnp.full(shards * room, block, jnp.int32).at[place].set(needs.local, mode="drop")
    return Round(need.reshape(shards, room), jnp.zeros_like(place).at[needs.order].set(place))


def _in_rounds(
    needs: Needs, block: int, layout: Layout, once: Callable[[Round, Carry], Carry], carry: Carry
) -> Carry:
    """`once` for each exchange, one after the other."""
    if needs.rounds is None:
        return once(_round(needs, 0, block, layout.table_shards), carry)

    def body(number: jax.Array, carry: Carry) -> Carry:
        return once(_round(needs, number, block, layout.table_shards), carry)

    done: Carry = jax.lax.fori_loop(0, needs.rounds, body, carry)
    return done


def fetch(
    ids: Int[Array, "n"],
    block: int,
    width: int,
    layout: Layout,
    read: Callable[[Int[Array, "m"]], Float[Array, "m D"]],
) -> Float[Array, "n D"]:
    """Rows `ids` of the whole table.

    Args:
      ids: each in [0, T Rs).
      block, width: Rs, D.
      read: rows of this device's block, by their number there.
    """

    def once(now: Round, rows: jax.Array) -> jax.Array:
        asked = layout.exchange_over_table(now.need).reshape(-1)
        values = read(jnp.minimum(asked, block - 1))
        back = layout.exchange_over_table(values.reshape(*now.need.shape, width))
        arrived = back.reshape(-1, width).at[now.place].get(mode="clip")
        return jnp.where((now.place < now.need.size)[:, None], arrived, rows)

    nothing = jnp.zeros((ids.size, width), jnp.float32)
    return _in_rounds(needs_of(ids, block, layout), block, layout, once, nothing)


def deliver(
    ids: Int[Array, "n"],
    grads: Float[Array, "n D"],
    block: int,
    layout: Layout,
    apply: Callable[[Carry, Int[Array, "m"], Float[Array, "m D"]], Carry],
    carry: Carry,
) -> Carry:
    """The gradients of all devices to the owners of the rows.

    Args:
      ids, grads: this device's; each id in [0, T Rs).
      block: Rs.
      apply: to what is carried, of each round: rows of this device's block with repeats, Rs for
        none, and their gradients. All of a row's come in one round.
    """
    width = grads.shape[1]

    def once(now: Round, carry: Carry) -> Carry:
        sums = jnp.zeros((now.need.size, width), grads.dtype)
        sums = sums.at[now.place].add(grads, mode="drop")
        local = layout.exchange_over_table(now.need).reshape(-1)
        sums = layout.exchange_over_table(sums.reshape(*now.need.shape, width))
        everywhere = layout.gather_over_data(sums.reshape(-1, width))
        return apply(carry, layout.gather_over_data(local), everywhere)

    return _in_rounds(needs_of(ids, block, layout), block, layout, once, carry)
