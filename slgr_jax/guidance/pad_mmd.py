"""Texts and ids of items towards one distribution: PAD's alignment (SIGIR 2025).

    L = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(a, b) = sum over the scales c = 1/8, 1/4, 1/2, 1, 2 of exp(-|a - b|^2 / (2 c m))

the unbiased square of a multi-kernel maximum mean discrepancy (Gretton et al. 2012), over the
items of a step's interactions, each once, those of all devices, that have a text. x = A(z) is an
item's text view, y = e its row: what PAD's network makes one of (`--towers=aligned`), or what are
read side by side (`--dual_view`). m, without a gradient, is the mean of |a - b|^2 over all pairs of
both, an item with itself too. Both are trained. It asks that the two clouds look alike, not that
an item's text is where its row is. It may fall below 0.

With a gate an item's terms are weighed by alpha of the first lane that drew it:

    L = 1/n sum_i alpha_i (mean_{j != i} k(x_i, x_j) + mean_{j != i} k(y_i, y_j)
                           - mean_j k(x_i, y_j) - mean_j k(x_j, y_i))

Its authors' program counts padding and repeated items, too.

Needs: the product of --item_vectors; users for a gate alone. Fits what these two do. Costs: four
products of G x N D.

Shape letters: G lanes, N of all devices, n items, D width of a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.alignment import Alignment, Lanes, first_of_each
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone, adapters
from slgr_jax.models.backbones.tower_views import MergedView
from slgr_jax.models.backbones.vector_maps import SecondView

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the mean squared distance


def squared_distances(x: Float[Array, "G D"], y: Float[Array, "N D"]) -> Float[Array, "G N"]:
    """|x_i - y_j|^2, at least 0."""
    squares = jnp.sum(jnp.square(x), axis=1)[:, None] + jnp.sum(jnp.square(y), axis=1)[None, :]
    return jnp.maximum(squares - 2.0 * x @ y.T, 0.0)


def discrepancies(
    x: Float[Array, "N D"],
    y: Float[Array, "N D"],
    counted: Float[Array, "N"],
    begin: int | jax.Array,
    size: int,
) -> Float[Array, "G"]:
    """Of each of `size` items from `begin` on what alpha_i multiplies in the module's docstring.

    Args:
      counted: 1 of items that there are, 0 of others: these add nothing.
    """

    def own(of_all: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(of_all, begin, size)

    # m: the mean of |a - b|^2 is twice that of |a - mean|^2. Where the mean lies changes nothing.
    count = jnp.sum(counted)
    both, there = jnp.concatenate([x, y]), jnp.concatenate([counted, counted])[:, None]
    points = jnp.maximum(2.0 * count, 1.0)
    mean = jax.lax.stop_gradient(jnp.sum(there * both, axis=0, keepdims=True) / points)
    x, y = x - mean, y - mean
    spread = jnp.sum(there * jnp.square(both - mean)) / points
    width = 4.0 * jax.lax.stop_gradient(jnp.maximum(spread, 1e-12))  # 2 m

    among_x, among_y, between, back = (
        squared_distances(own(a), b) for a, b in ((x, x), (y, y), (x, y), (y, x))
    )
    place = begin + jnp.arange(size, dtype=jnp.int32)
    others = counted[None, :] * (place[:, None] != jnp.arange(x.shape[0], dtype=jnp.int32)[None, :])

    def total(distances: Float[Array, "G N"], weights: Float[Array, "#G N"]) -> Float[Array, "G"]:
        kernel = sum(jnp.exp(-distances / (scale * width)) for scale in SCALES)
        return jnp.sum(weights * kernel, axis=1)

    alike = (total(among_x, others) + total(among_y, others)) / jnp.maximum(count - 1.0, 1.0)
    across = total(between, counted[None, :]) + total(back, counted[None, :])
    return own(counted) * (alike - across / jnp.maximum(count, 1.0))


class ViewsAlike(Alignment):
    """See the module's docstring."""

    users_optional = True

    def check(self, backbone: AnyBackbone) -> None:
        super().check(backbone)
        if not isinstance(adapters.of(backbone).get("item"), SecondView | MergedView):
            raise ConfigError(
                "--guidance=pad_mmd aligns two views of items, rows and what texts come to: add "
                "--item_vectors=NAME with --towers=aligned or --dual_view (sasrec, gru4rec), or "
                "use --guidance=rlmrec_con"
            )
        name, beside = self.run.guidance.teacher_vectors, self.run.vectors.item_vectors
        if name != beside:
            raise ConfigError(
                f"--guidance=pad_mmd aligns what --item_vectors={beside} come to, and "
                f"--teacher_vectors={name} names others; give both the same"
            )

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        return {}

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        assert lanes.rows is not None
        views = lanes.rows[:, -2 * self.run.model.dim :]  # a row ends with them, dual or merged
        of_items = (lanes.ids[:, 1], lanes.has[:, 1], views)
        ids, has, both = (layout.gather_over_all(part) for part in of_items)
        rows, texts = jnp.split(both, 2, axis=-1)
        size = lanes.has.shape[0]
        begin = 0 if layout.devices == 1 else layout.device_index() * size
        counted = first_of_each(ids, has)
        terms = discrepancies(texts, rows, counted, begin, size)
        share = ids.shape[0] / jnp.maximum(jnp.sum(counted), 1.0)
        return lanes.weights[:, 1] * terms * share


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> ViewsAlike:
    """PAD's alignment of a run."""
    return ViewsAlike(run, Gating(run, reference_backbones, native), native)
