"""Rows that travel between devices against NumPy, however unevenly they are spread over owners."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slgr_jax.mesh import make_layout
from slgr_jax.models import row_exchange

DEVICES, IDS, BLOCK, WIDTH = 8, 64, 1024, 3


def _even(rng, rows):
    return rng.integers(0, rows, (DEVICES, IDS))


def _of_one_owner(rng, rows):
    return np.stack([rng.permutation(BLOCK)[:IDS] for _ in range(DEVICES)])


def _of_one_device(rng, rows):
    """The last device wants rows of the last owner alone; the others are even."""
    ids = _even(rng, rows)
    ids[-1] = rows - 1 - rng.permutation(BLOCK)[:IDS]
    return ids


def _strides(rng, rows):
    """Rows that fall into one round for many numbers of rounds."""
    return np.stack([16 * rng.permutation(BLOCK // 16)[:IDS] for _ in range(DEVICES)])


def _popular(rng, rows):
    """Most ids are one row, more than there is room for if it were not one."""
    ids = _even(rng, rows)
    ids[:, 8:] = 7
    return ids


@functools.cache
def _programs(shards):
    layout = make_layout(table_shards=shards)

    def fetch(table, ids):
        read = lambda local: table.at[local].get(mode="promise_in_bounds")  # noqa: E731
        return row_exchange.fetch(ids, BLOCK, WIDTH, layout, read)

    def deliver(ids, grads):
        def apply(carry, local, grads):
            total, times = carry
            seen = jnp.zeros_like(times).at[local].set(1, mode="drop")
            return total.at[local].add(grads, mode="drop"), times + seen

        zeros = jnp.zeros((BLOCK, WIDTH)), jnp.zeros(BLOCK, jnp.int32)
        total, times = row_exchange.deliver(ids, grads, BLOCK, layout, apply, zeros)
        needs = row_exchange.needs_of(ids, BLOCK, layout)
        return total[None], times[None], needs.rounds

    lanes, rows = layout.batch_spec, layout.table_spec
    whole = jax.sharding.PartitionSpec()
    mapped = functools.partial(jax.shard_map, mesh=layout.mesh, check_vma=False)
    return (
        jax.jit(mapped(fetch, in_specs=(rows, lanes), out_specs=lanes)),
        jax.jit(mapped(deliver, in_specs=(lanes, lanes), out_specs=(lanes, lanes, whole))),
    )


def _rounds(ids, shards):
    """The least power of two for which no device needs more of one owner than there is room for."""
    room, rounds = row_exchange.capacity(IDS, shards), 1
    while True:
        wanted = [np.unique(each) for each in ids]
        buckets = [each // BLOCK * rounds + each % BLOCK % rounds for each in wanted]
        if max(np.bincount(each).max() for each in buckets) <= room:
            return rounds
        rounds *= 2


@pytest.mark.parametrize("shards", [4, 8])
@pytest.mark.parametrize(
    ("draw", "least"),
    [(_even, 1), (_of_one_owner, 2), (_of_one_device, 2), (_strides, 32), (_popular, 1)],
)
def test_every_row_arrives_and_every_gradient_is_summed_at_once(shards, draw, least):
    rows, rng = shards * BLOCK, np.random.default_rng(0)
    ids = draw(rng, rows).astype(np.int32)
    table = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    fetch, deliver = _programs(shards)
    np.testing.assert_array_equal(fetch(table, ids.reshape(-1)), table[ids.reshape(-1)])

    grads = rng.normal(size=(ids.size, WIDTH)).astype(np.float32)
    total, times, rounds = deliver(ids.reshape(-1), grads)
    expected = np.zeros((rows, WIDTH))
    np.add.at(expected, ids.reshape(-1), grads)
    for copy in range(DEVICES // shards):  # of the table
        own = slice(copy * shards, (copy + 1) * shards)
        got = np.asarray(total)[own].reshape(rows, WIDTH)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        touched = np.bincount(ids.reshape(-1), minlength=rows) > 0
        np.testing.assert_array_equal(np.asarray(times)[own].reshape(rows), touched)
    assert least <= int(rounds) == _rounds(ids, shards)


def test_few_ids_always_fit():
    """Where there is room for all ids, nobody has to ask for how many rounds."""
    assert row_exchange.capacity(16, 8) == 16
    assert row_exchange.capacity(1024, 8) == 208
    assert row_exchange.capacity(64, 2) == 64
