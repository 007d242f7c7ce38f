"""Hints: the product's vectors as a map of the recommender's.

    l(e, z) = |W e + b - z|^2 / Z

FitNets (Romero et al. 2015, arXiv 1412.6550) for one layer, as works on distilled recommenders have
it as a baseline. Vectors come divided by one number, so that z has entries of root mean square 1,
and the error is a mean over the Z numbers: lambda depends on no width.

Needs: vectors of users and items. Fits every backbone that scores by a dot product. Costs: 3 G
products with a matrix of E Z numbers.

Shape letters: G lanes, E width of the recommender's vectors, Z of the product's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig
from slgr_jax.guidance.alignment import Alignment, Lanes, Perceptron, mean_over_lanes
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone


class Hint(Alignment):
    """See the module's docstring."""

    standardised = False

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        model = Perceptron(self.run.hint.hidden, vectors)
        return dict(model.init(key, jnp.zeros((1, width)))["params"])

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        model = Perceptron(self.run.hint.hidden, lanes.teacher.shape[-1])
        mapped = jnp.asarray(model.apply({"params": params}, lanes.student))
        errors = jnp.mean(jnp.square(mapped - lanes.teacher), axis=-1)
        return mean_over_lanes(errors, lanes, layout)


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> Hint:
    """The hints of a run."""
    return Hint(run, Gating(run, reference_backbones, native), native)
