"""What the CPU kernel of graphs computes, as a function of JAX arrays (graph.cc does it).

A row is summed by one thread in the order of its edges: results do not depend on the number of
threads. Ids are trusted to be in bounds.

Shape letters: U users, I items, D width, n edges.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Float, UInt32

from slgr_jax.kernels.build import ffi_call

Ragged = tuple[jax.Array, jax.Array]  # offsets [rows + 1], indices [n]
LANE = 16  # columns of a vector; the kernel's scratch rows are whole vectors


def propagate(
    user: Float[Array, "U D"],
    item: Float[Array, "I D"],
    by_user: Ragged,
    by_item: Ragged,
    words: tuple[UInt32[Array, "U"], UInt32[Array, "I"]] | None,
    *,
    layers: int,
    threshold: int,
    weight: float,
) -> tuple[Float[Array, "U D"], Float[Array, "I D"]]:
    """mean_k (w S M S)^k E, k = 0 .. K: all layers of LightGCN in one call.

    E are both tables, S = diag(1 / sqrt(degree)) of the whole graph, M the kept edges.

    Args:
      by_user, by_item: the edges in both orders: items of each user, users of each item.
      words: edge (u, i) is kept where `random_bits.mixed(words_u + words_i)` is at least
        `threshold`; None keeps all.
      layers: K, at least 1.
      weight: w.
    """
    (n_users, width), n_items, n = user.shape, item.shape[0], by_user[1].size
    lanes = -(-width // LANE) * LANE
    none = np.zeros(0, np.uint32)
    sizes = [(n_users, width), (n_items, width), (2 * (n_users + n_items) * lanes,)]
    out = [jax.ShapeDtypeStruct(shape, np.float32) for shape in sizes]
    kept = 0 if words is None else 2 * n + n_users + n_items
    out.append(jax.ShapeDtypeStruct((kept,), np.int32))
    # Uncertainty takes several stochastic passes under vmap.
    call = ffi_call("slgr_graph_propagate", out, vmap_method="sequential")
    outputs = call(
        user, item, *by_user, *by_item, *((none, none) if words is None else words),
        layers=np.int64(layers), drops=words is not None, threshold=np.int64(threshold),
        weight=np.float32(weight),
    )  # fmt: skip
    return outputs[0], outputs[1]
