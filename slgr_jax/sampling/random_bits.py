"""Random words by hashing counters: a tenth of the cost of `jax.random.bits` on CPU.

A generator is keyed by words that JAX's own generator makes (Threefry, once a step); the many
words of a step are MurmurHash3's finaliser (Appleby) of a Weyl sequence of counters, as in
SplitMix (Steele, Lea & Flood 2014), applied twice with a key word before each. What they are
used for, drawing samples and rounding, asks for uniform and uncorrelated words, not for secrets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt32

from slgr_jax.mesh import part_of_lanes

WEYL = 0x9E3779B9  # 2^32 / golden ratio


def mixed(x: UInt32[Array, "*N"]) -> UInt32[Array, "*N"]:
    """MurmurHash3's finaliser: a permutation of the 32-bit words in which every bit of x counts."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def generators(keys: jax.Array) -> UInt32[Array, "S 2"]:
    """The two words that key the generator of each of S JAX keys."""
    return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)


def of_part(generators: UInt32[Array, "S 2"], number: Int[Array, ""]) -> UInt32[Array, "S 2"]:
    """The generators of part `number` of a draw, which depend on nothing else of how it is cut."""
    salt = mixed((number.astype(jnp.uint32) + 1) * jnp.uint32(WEYL))
    return mixed(generators ^ salt) + salt


def words(generators: UInt32[Array, "S 2"], rows: int, size: int) -> UInt32[Array, "rows S size"]:
    """[rows, size] uniform words of each of S generators, a function of it alone."""
    counter = jnp.arange(rows * size, dtype=jnp.uint32).reshape(rows, 1, size)
    return _hashed(counter, generators)


def words_of_lanes(key: jax.Array, shape: tuple[int, ...], axis: int = 0) -> UInt32[Array, "..."]:
    """Uniform words of a device's lanes, which lie along `axis`: those that one device draws for
    them among all lanes."""
    generator, (part, parts) = generators(key[None]), part_of_lanes()
    if parts == 1:
        return words(generator, 1, math.prod(shape)).reshape(shape)
    before, lanes, each = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    lane = jnp.asarray(part, jnp.uint32) * lanes + jnp.arange(lanes, dtype=jnp.uint32)
    first = jnp.arange(before, dtype=jnp.uint32)[:, None] * (parts * lanes) + lane[None, :]
    counter = first[..., None] * each + jnp.arange(each, dtype=jnp.uint32)[None, None, :]
    return _hashed(counter.reshape(1, 1, -1), generator).reshape(shape)


def of_lanes(
    draw: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """draw(shape of all lanes), of which a device keeps its own `shape[0]`: for few numbers."""
    part, parts = part_of_lanes()
    if parts == 1:
        return draw(shape)
    every = draw((parts * shape[0], *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(every, part * shape[0], shape[0])


def _hashed(
    counter: UInt32[Array, "rows 1 size"], generators: UInt32[Array, "S 2"]
) -> UInt32[Array, "rows S size"]:
    first, second = generators[None, :, :1], generators[None, :, 1:]
    return mixed(mixed(counter * jnp.uint32(WEYL) + first) ^ second)


def of_rows(key: jax.Array, ids: Int[Array, "N"], width: int) -> UInt32[Array, "N D"]:
    """Uniform words, a function of (key, row id, column) alone: the same on any mesh."""
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    start = mixed(mixed(ids.astype(jnp.uint32) ^ first) + second)
    column = jnp.arange(1, width + 1, dtype=jnp.uint32) * jnp.uint32(WEYL)
    return mixed(start[:, None] + column[None, :])


def halves_of_rows(
    generator: UInt32[Array, "2"], ids: Int[Array, "N"], width: int
) -> UInt32[Array, "N D"]:
    """Uniform in [0, 2^16), a function of (generator, row id, column) alone.

    The columns of each 32 share 16 words: upper halves, then lower ones. The CPU kernels compute
    the same (`Noise` of kernels/block.h).
    """
    first, second = generator[0], generator[1]
    start = mixed(mixed(ids.astype(jnp.uint32) ^ first) + second)
    step = jnp.arange(1, 16 * -(-width // 32) + 1, dtype=jnp.uint32) * jnp.uint32(WEYL)
    both = mixed(start[:, None] + step[None, :]).reshape(ids.size, -1, 16)
    return jnp.concatenate([both >> 16, both & 0xFFFF], axis=2).reshape(ids.size, -1)[:, :width]


def normal(words: UInt32[Array, "*N"]) -> Float[Array, "*N"]:
    """Standard normal numbers from words: sqrt(2) erfinv(u), u uniform in (-1, 1) in 2^23 steps."""
    # 23 bits and a half are exact in float32: neither end of the range is ever reached.
    uniform = ((words >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0
    return jnp.sqrt(2.0) * jax.lax.erf_inv(uniform)
