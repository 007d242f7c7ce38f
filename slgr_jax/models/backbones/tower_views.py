"""What PAD's towers read of an item (SIGIR 2025): its row, its vector mapped, and both as one.

    x   = W_2 relu(W_1 [e ; A(z)] + b_1) + b_2           one view of both (`MergedView`)
    v   = [e_1 ; x of e_2 ; B(z)]                        a view for each tower (`ThreeViews`)
    w_m = sigmoid(a_m[b]) / sum over the towers k of sigmoid(a_k[b])     what each tower weighs

A, B are maps of the frozen vector z, B of a tower of its own. b is the item's bin of training
frequency (`training.vector_products.frequency_bins`): 0 of the most popular items, which have a
tenth of the interactions together, to 9, and 10 of items without any. The authors' initial values:
a = 1 to 0 of rows, -4 to -5 of both, 0 to 1 of texts, evenly from bin 0 to bin 10. An item without
a vector has A = B = 0 and its bin all the same.

The recommenders that read these views are in `towers`.

Shape letters: Z numbers of a vector, D width of a view, M = 3 towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slgr_jax.models.backbones.vector_maps import Adapter
from slgr_jax.models.embedding_table import TableSpec

BINS = 11
TOWERS = IDS, ALIGNED, TEXTS = ("ids", "aligned", "texts")
_BEGINS = {IDS: (1.0, 0.0), ALIGNED: (-4.0, -5.0), TEXTS: (0.0, 1.0)}  # a of the first and last bin
MERGE, SHARES = "merge", "shares"  # of an adapter's parameters, what is no map of vectors


class MergedView(Adapter):
    """[x ; e ; A(z)] of a row e: x is what items and events are, e and A(z) what is aligned."""

    @property
    def spec(self) -> TableSpec:
        return TableSpec(self.rows, 3 * self.width, self.init_std, scalars=2 * self.width)

    @property
    def penalised(self) -> bool:
        """No: x is no part of a sum, and --l2 is on rows."""
        return False

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, such that x begins as long as drawn rows are."""
        for_map, for_inner, for_outer = jax.random.split(key, 3)
        both = 2 * self.width
        inner = jax.random.normal(for_inner, (both, both)) * np.float32(np.sqrt(2.0 / both))
        outer = jax.random.normal(for_outer, (both, self.width)) / np.float32(np.sqrt(both))
        merge = {
            "inner": {"kernel": inner, "bias": jnp.zeros(both)},
            "outer": {"kernel": outer, "bias": jnp.zeros(self.width)},
        }
        return {**super().init(for_map), MERGE: merge}

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z1"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... D3"]:
        mapped = super().apply(params, stored, shared)
        nothing = jnp.zeros_like(mapped)
        x = jnp.concatenate([nothing if row is None else row, mapped], axis=-1)
        for name in ("inner", "outer"):
            layer = params[MERGE][name]
            x = jnp.dot(x if name == "inner" else jax.nn.relu(x), layer["kernel"])
            x = x + jnp.expand_dims(layer["bias"], tuple(range(x.ndim - 1)))
        return jnp.concatenate([x, nothing, mapped], axis=-1)

    def widened(self, row: Float[Array, "... D"]) -> Float[Array, "... D3"]:
        nothing = jnp.zeros_like(row)
        return jnp.concatenate([nothing, row, nothing], axis=-1)


class ThreeViews(Adapter):
    """[e_1 ; x ; B(z) ; w_1, w_2, w_3] of a row [e_1 ; e_2]."""

    @property
    def stored(self) -> TableSpec:
        """Z numbers, then the bin, then 1 (0 where a row has no vector)."""
        return TableSpec(self.rows, self.vectors + 2, 0.0)

    @property
    def spec(self) -> TableSpec:
        towers = len(TOWERS)
        width = towers * (self.width + 1)
        return TableSpec(self.rows, width, self.init_std, scalars=towers)

    @property
    def penalised(self) -> bool:
        """No: see `MergedView`."""
        return False

    @property
    def aligned(self) -> MergedView:
        """What makes x."""
        sizes = (self.side, self.rows, self.vectors, self.width, self.hidden)
        return MergedView(*sizes, self.init_std)

    def init(self, key: jax.Array) -> dict[str, Any]:
        for_aligned, for_texts = jax.random.split(key)
        begins = np.stack([np.linspace(*_BEGINS[tower], BINS) for tower in TOWERS])
        return {
            ALIGNED: self.aligned.init(for_aligned),
            TEXTS: super().init(for_texts),
            SHARES: jnp.asarray(begins, jnp.float32),
        }

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z2"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D2"] | None = None,
    ) -> Float[Array, "... D33"]:
        of_aligned = None if row is None else row[..., self.width :]
        merged = self.aligned.apply(params[ALIGNED], stored, shared, of_aligned)[..., : self.width]
        text = super().apply(params[TEXTS], stored, shared)
        believed = jax.nn.sigmoid(params[SHARES])
        weights = (believed / jnp.sum(believed, axis=0, keepdims=True)).T
        of_bin = weights[stored[..., self.vectors].astype(jnp.int32)]
        return jnp.concatenate([jnp.zeros_like(text), merged, text, of_bin], axis=-1)

    def widened(self, row: Float[Array, "... D2"]) -> Float[Array, "... D33"]:
        behind = jnp.zeros((*row.shape[:-1], self.spec.width - self.width), row.dtype)
        return jnp.concatenate([row[..., : self.width], behind], axis=-1)
