"""Topology distillation (HTD and FTD, KDD'21, arXiv 2106.08700): the cosines among vectors.

Of the users and items of a step, each counted once, with A_ij = cos(x_i, x_j), x = e or z:

    FTD   mean over pairs of (A^z_ij - A^e_ij)^2                             --htd_groups=0
    HTD   gamma T + (1 - gamma) mean over i of |z_i - W_k(i) e_i - b_k(i)|^2 / Z

    T     mean over the pairs of one group of (A^z_ij - A^e_ij)^2, and over pairs of a group k and a
          vector j of another one of (cos(P^z_k, z_j) - cos(P^e_k, e_j))^2
    k(i)  drawn by a softmax with Gumbel noise of a learned linear map of z_i, straight through
    P_k   the mean of the group's vectors

Vectors of users and items lie in one space, as a recommender's do: they come divided by one number.
A pair is weighed by alpha of both.

Needs: vectors of users and items, best another recommender's (slgr export). Fits every backbone
that scores by a dot product. Costs: 3 G times 3 G cosines, and K maps of 3 G vectors.

Shape letters: G lanes, n = 3 G vectors of this device, N of all devices, K groups, E width of the
recommender's vectors, Z of the product's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slgr_jax.config import HTDConfig, RunConfig
from slgr_jax.guidance.alignment import Alignment, Lanes, first_of_each
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.backbones.base import unit_rows
from slgr_jax.sampling import random_bits

_ITEMS = 1 << 30  # added to ids of items, which stand among users


class Entities(NamedTuple):
    """Users and items.

    Attributes:
      student: e; teacher: z.
      weights: alpha, 0 for what has no z or was there before.
      counted: 1 where it is not.
    """

    student: Float[Array, "N E"]
    teacher: Float[Array, "N Z"]
    weights: Float[Array, "N"]
    counted: Float[Array, "N"]


class Sums(NamedTuple):
    """What each of this device's vectors adds to a sum over pairs, and how many pairs that is."""

    errors: Float[Array, "n"]
    pairs: Float[Array, "n"]


def full_topology(local: Entities, everything: Entities, *, positive: bool) -> Sums:
    """FTD's pairs of one of `local` and one of `everything`.

    Args:
      positive: leave pairs out whose cosine in the product is not above 0.
    """
    counted = local.counted[:, None] * everything.counted[None, :]
    return _pairs(local, everything, counted, positive=positive)


def group_topology(
    local: Entities,
    everything: Entities,
    groups: tuple[Float[Array, "n K"], Float[Array, "N K"]],
    *,
    positive: bool,
) -> tuple[Sums, Sums]:
    """HTD's pairs within groups, and of groups with what is not in them.

    Args:
      groups: which one `local` and `everything` are in, one-hot.
    """
    of_local, of_all = groups
    counted = local.counted[:, None] * everything.counted[None, :]
    within = _pairs(local, everything, counted * (of_local @ of_all.T), positive=positive)

    members = of_all * everything.counted[:, None]
    size = jnp.sum(members, axis=0)
    means = [
        members.T @ x / jnp.maximum(size, 1.0)[:, None]
        for x in (everything.teacher, everything.student)
    ]
    cosines_z = unit_rows(local.teacher) @ unit_rows(means[0]).T
    cosines_e = unit_rows(local.student) @ unit_rows(means[1]).T
    outside = (1.0 - of_local) * (size > 0)[None, :] * local.counted[:, None]
    if positive:
        outside = outside * (cosines_z > 0)
    errors = outside * jnp.square(cosines_z - cosines_e)
    across = Sums(local.weights * jnp.sum(errors, axis=1), jnp.sum(outside, axis=1))
    return within, across


def _pairs(
    local: Entities, everything: Entities, counted: Float[Array, "n N"], *, positive: bool
) -> Sums:
    cosines_z = unit_rows(local.teacher) @ unit_rows(everything.teacher).T
    cosines_e = unit_rows(local.student) @ unit_rows(everything.student).T
    if positive:
        counted = counted * (cosines_z > 0)
    weights = counted * local.weights[:, None] * everything.weights[None, :]
    errors = weights * jnp.square(cosines_z - cosines_e)
    return Sums(jnp.sum(errors, axis=1), jnp.sum(counted, axis=1))


class Topology(Alignment):
    """See the module's docstring."""

    standardised = False

    @property
    def knobs(self) -> HTDConfig:
        """Its section."""
        return self.run.htd

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        groups = self.knobs.groups
        if not groups:
            return {}
        for_assigning, for_maps = jax.random.split(key)
        assign = jax.random.normal(for_assigning, (vectors, groups)) / np.sqrt(vectors)
        maps = jax.random.normal(for_maps, (groups, width, vectors)) / np.sqrt(width)
        return {"assign": assign, "maps": maps, "biases": jnp.zeros((groups, vectors))}

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        local, everything = self._entities(lanes, layout)
        positive, count = self.knobs.positive, local.counted.shape[0] * layout.devices // 3
        if not self.knobs.groups:
            terms = _mean(full_topology(local, everything, positive=positive), layout)
            return count * _by_lane(terms)
        groups = self._groups(params, local.teacher, key)
        of_all = layout.gather_over_all(groups)
        within, across = group_topology(local, everything, (groups, of_all), positive=positive)
        mapped = jnp.einsum("ne,kez,nk->nz", local.student, params["maps"], groups)
        mapped = mapped + groups @ params["biases"]
        errors = jnp.mean(jnp.square(local.teacher - mapped), axis=-1)
        rebuilt = _mean(Sums(local.weights * errors, local.counted), layout)
        topology = _mean(within, layout) + _mean(across, layout)
        gamma = self.knobs.topology
        return count * _by_lane(gamma * topology + (1.0 - gamma) * rebuilt)

    def _entities(self, lanes: Lanes, layout: Layout) -> tuple[Entities, Entities]:
        """This device's and all devices'."""
        ids = (lanes.ids + jnp.array([[0, _ITEMS, _ITEMS]])).reshape(-1)
        all_ids, has = (layout.gather_over_all(x) for x in (ids, lanes.has.reshape(-1)))
        counted = first_of_each(all_ids, has)
        begin = 0 if layout.devices == 1 else layout.device_index() * ids.shape[0]
        own = jax.lax.dynamic_slice_in_dim(counted, begin, ids.shape[0])
        student, teacher, weights = (
            x.reshape(-1, *x.shape[2:]) for x in (lanes.student, lanes.teacher, lanes.weights)
        )
        gathered = (layout.gather_over_all(x) for x in (student, teacher, weights))
        all_student, all_teacher, all_weights = gathered
        return (
            Entities(student, teacher, weights * own, own),
            Entities(all_student, all_teacher, all_weights * counted, counted),
        )

    def _groups(
        self, params: Mapping[str, Any], teacher: Float[Array, "n Z"], key: jax.Array
    ) -> Float[Array, "n K"]:
        """One-hot, with the gradient of the softmax."""
        logits = teacher @ params["assign"]
        noise = random_bits.of_lanes(lambda shape: jax.random.gumbel(key, shape), logits.shape)
        noisy = (logits + noise) / self.knobs.temperature
        soft = jax.nn.softmax(noisy)
        hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), logits.shape[-1])
        return hard + soft - jax.lax.stop_gradient(soft)


def _mean(sums: Sums, layout: Layout) -> Float[Array, "n"]:
    """What each vector adds to the mean over the pairs of all devices."""
    return sums.errors / jnp.maximum(layout.sum_over_all(jnp.sum(sums.pairs)), 1.0)


def _by_lane(terms: Float[Array, "n"]) -> Float[Array, "G"]:
    return jnp.sum(terms.reshape(-1, 3), axis=1)


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> Topology:
    """The topology distillation of a run."""
    return Topology(run, Gating(run, reference_backbones, native), native)
