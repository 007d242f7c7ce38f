"""Counter words: uniform, uncorrelated, a function of the key, never the same twice in a step."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec
from scipy import stats

from slgr_jax.mesh import DATA, TABLE, make_layout
from slgr_jax.sampling import random_bits


def _words(steps=4, rows=2, size=1 << 16, seed=0):
    keys = jax.random.split(jax.random.key(seed), steps)
    return np.asarray(random_bits.words(random_bits.generators(keys), rows, size))


def test_every_bit_and_byte_is_uniform():
    found = _words()
    for shift in (0, 8, 16, 24):
        counts = np.bincount((found.ravel() >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    bits = (found.reshape(-1, 1) >> np.arange(32)) & 1
    assert (np.abs(bits.mean(0) - 0.5) < 5 * 0.5 / np.sqrt(bits.shape[0])).all()


def test_neighbours_rows_and_steps_are_uncorrelated():
    found = _words().astype(np.float64) / 2**32 - 0.5
    limit = 5 / np.sqrt(found.shape[2])
    pairs = [(found[0, 0, :-lag], found[0, 0, lag:]) for lag in (1, 2, 8, 64)]
    pairs += [(found[0, 0], found[1, 0]), (found[0, 0], found[0, 1]), (found[1, 2], found[0, 3])]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < limit


def test_pairs_of_neighbours_fill_the_square():
    found = _words(steps=1, rows=1, size=1 << 18)[0, 0]
    cells = (found[:-1:2] >> 28) * 16 + (found[1::2] >> 28)
    assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-4


def test_words_of_a_step_depend_on_its_key_alone_and_differ():
    whole = _words(steps=5)
    own = random_bits.generators(jax.random.split(jax.random.key(0), 5)[2:3])
    np.testing.assert_array_equal(random_bits.words(own, 2, 1 << 16)[:, 0], whole[:, 2])
    assert len(np.unique(whole[:, 0])) == whole[:, 0].size
    assert len(np.unique(whole)) > 0.999 * whole.size
    assert not np.array_equal(whole, _words(steps=5, seed=1))


def test_normal_numbers_are_normal_and_rows_differ():
    found = np.asarray(
        random_bits.normal(random_bits.of_rows(jax.random.key(3), np.arange(4000), 32))
    )
    assert np.isfinite(found).all()
    assert stats.kstest(found.ravel()[:100_000], "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(found.T) - np.eye(32)).max() < 5 / np.sqrt(4000)
    ends = np.asarray(random_bits.normal(np.array([0, 2**32 - 1], np.uint32)))
    assert np.isfinite(ends).all()
    assert ends[0] == -ends[1] < -5
    some = random_bits.of_rows(jax.random.key(3), np.array([7, 3999]), 32)
    np.testing.assert_array_equal(random_bits.normal(some), found[[7, 3999]])


def test_a_device_draws_for_its_lanes_what_one_device_draws_for_them():
    """Along the first axis and along the second, of which each of four devices has a quarter."""
    key, mesh = jax.random.key(5), make_layout(devices=jax.devices()[:4]).mesh

    def drawn(x, axis):
        return random_bits.words_of_lanes(key, x.shape, axis)

    def normal(x):
        return random_bits.of_lanes(lambda shape: jax.random.normal(key, shape), x.shape)

    split = PartitionSpec((DATA, TABLE)), PartitionSpec(None, (DATA, TABLE))
    draws = [(functools.partial(drawn, axis=axis), split[axis]) for axis in (0, 1)]
    for draw, spec in (*draws, (normal, split[0])):
        x = np.zeros((8, 12, 3), np.float32)
        over_devices = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=spec, out_specs=spec))
        np.testing.assert_array_equal(over_devices(x), draw(x))
