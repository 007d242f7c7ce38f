"""What items take from those with the nearest texts, by an attention of CoLaKG (SIGIR'25).

    w_ij  = LeakyReLU(a' [W' z_j ; W' z_i])           slope .2; j: the k items with the nearest z
    h'_i  = 1/2 (h_i + ELU(sum_j softmax_j(w_ij) h_j))

h are rows that have taken up their own vector (`vector_maps.Neighbourhood`), z vectors. W' maps to
32 numbers without a bias.

Shape letters: I items, k neighbours of one, Z numbers of a vector, H of W', D width of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

HIDDEN = 32
_SLOPE = 0.2
_NONE = -1e30


def init_attention(key: jax.Array, vectors: int) -> dict[str, Any]:
    """Fresh W' [Z, H] ~ N(0, 1 / Z) and a [2, H] ~ N(0, 1 / 2H): of the neighbour, of the item."""
    for_map, for_weights = jax.random.split(key)
    mapped = jax.random.normal(for_map, (vectors, HIDDEN)) / np.sqrt(vectors)
    weights = jax.random.normal(for_weights, (2, HIDDEN)) / np.sqrt(2 * HIDDEN)
    return {"map": mapped, "weights": weights}


def smoothed(
    params: Mapping[str, Any],
    rows: Float[Array, "I D"],
    vectors: Float[Array, "I Z"],
    neighbours: Int[Array, "I k"],
) -> Float[Array, "I D"]:
    """h' of the module's docstring; h where an item has no neighbour.

    Args:
      neighbours: -1 past the last.
    """
    of_neighbour, of_item = jnp.dot(jnp.dot(vectors, params["map"]), params["weights"].T).T
    there = neighbours >= 0
    others = jnp.maximum(neighbours, 0)
    logits = jax.nn.leaky_relu(of_neighbour[others] + of_item[:, None], _SLOPE)
    alpha = jax.nn.softmax(jnp.where(there, logits, _NONE), axis=1) * there

    def add(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        of_place, weight = at  # one neighbour of each item: [I, k, D] would be large
        return total + weight[:, None] * rows[of_place], None

    taken, _ = jax.lax.scan(add, jnp.zeros_like(rows), (others.T, alpha.T))
    some = jnp.any(there, axis=1, keepdims=True)
    return jnp.where(some, 0.5 * (rows + jax.nn.elu(taken)), rows)
