"""RLMRec (WWW'24, arXiv 2310.15950): contrast with vectors of an LLM's texts of users and items.

    c(a, b) = -cos(a, b) / tau + log sum over b' of exp(cos(a, b') / tau)

    con   l(e, z) = c(e, f(z)),    f: Z -> (Z + E) / 2 -> E with a leaky ReLU between
    gen   l(e, z) = c(f(e), z),    f: E -> (E + Z) / 2 -> Z

The b' are b itself and those of the other lanes of the step (of all devices) that are another's:
of con users among users, items among items, other items among other items; of gen all together.

gen masks what it reconstructs: the lanes' users and items, drawn uniformly, begin a step's pass
over the graph as one learned vector, of which the graph makes e by what their neighbours are. The
recommender learns from the same pass. Only a graph has neighbours: other backbones are refused.

Vectors come less the mean of users' (items') and divided by one number: sentence vectors share a
large mean, which says nothing of anybody.

Needs: vectors of users and items. Fits: con every backbone that scores by a dot product (of
sequence models a user is the state that training leaves), gen lightgcn. Costs: 3 G vectors through
f, and G times G cosines, three times (gen: nine).

Shape letters: G lanes, N of all devices, A vectors of this device, E width of the recommender's
vectors, Z of the product's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slgr_jax.config import RLMRecConConfig, RLMRecGenConfig, RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.alignment import Alignment, Lanes, Perceptron, info_nce, mean_over_lanes
from slgr_jax.guidance.base import METHOD
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone, DotBackbone
from slgr_jax.models.backbones.base import unit_rows
from slgr_jax.models.row_access import Masked
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.negatives import Generators, below

_TOKENS = "tokens"  # of gen's parameters, what masked rows begin as
_ITEMS = 1 << 30  # added to ids of items where they stand among users


def contrast(
    anchors: Float[Array, "A D"],
    own: Float[Array, "A D"],
    ids: Int[Array, "A"],
    others: Float[Array, "N D"],
    other_ids: Int[Array, "N"],
    there: Float[Array, "N"],
    temperature: float,
) -> Float[Array, "A"]:
    """c of the module's docstring.

    Args:
      own: b of each anchor.
      others: b' of all; those of the anchor's own id, or not `there`, are left out.
    """
    anchors = unit_rows(anchors) / temperature
    positive = jnp.sum(anchors * unit_rows(own), axis=-1)
    cosines = anchors @ unit_rows(others).T
    return info_nce(positive, cosines, (ids[:, None] != other_ids[None, :]) & (there[None, :] > 0))


def _hidden(asked: int, width: int, vectors: int) -> int:
    return asked or (width + vectors) // 2


class Contrastive(Alignment):
    """--guidance=rlmrec_con."""

    @property
    def knobs(self) -> RLMRecConConfig:
        """Its section."""
        return self.run.rlmrec_con

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        model = Perceptron(_hidden(self.knobs.hidden, width, vectors), width)
        return dict(model.init(key, jnp.zeros((1, vectors)))["params"])

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        width, vectors = lanes.student.shape[-1], lanes.teacher.shape[-1]
        model = Perceptron(_hidden(self.knobs.hidden, width, vectors), width)
        mapped = jnp.asarray(model.apply({"params": params}, lanes.teacher))
        others, ids, there = (layout.gather_over_all(x) for x in (mapped, lanes.ids, lanes.has))
        terms = [
            contrast(
                lanes.student[:, side],
                mapped[:, side],
                lanes.ids[:, side],
                others[:, side],
                ids[:, side],
                there[:, side],
                self.knobs.temperature,
            )
            for side in range(3)
        ]
        return mean_over_lanes(jnp.stack(terms, axis=1), lanes, layout)


class Generative(Alignment):
    """--guidance=rlmrec_gen."""

    @property
    def knobs(self) -> RLMRecGenConfig:
        """Its section."""
        return self.run.rlmrec_gen

    def check(self, backbone: AnyBackbone) -> None:
        super().check(backbone)
        whole = isinstance(backbone, DotBackbone) and backbone.whole
        if not (whole and {"user", "item"} <= set(backbone.tables)):
            raise ConfigError(
                "--guidance=rlmrec_gen masks the rows of users and items that a graph smooths, and "
                f"--backbone={self.run.model.backbone} has no such rows in this run; use lightgcn "
                "without --noitem_rows and --nouser_rows, or --guidance=rlmrec_con"
            )

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        model = Perceptron(_hidden(self.knobs.hidden, width, vectors), vectors)
        params = dict(model.init(key, jnp.zeros((1, width)))["params"])
        return params | {_TOKENS: {side: jnp.zeros(width) for side in ("user", "item")}}

    def lanes(
        self, words_of: Generators, interactions: Interactions
    ) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"]]:
        words = random_bits.words(words_of.own, 3, self.queries)
        n_users, n_items = (x.shape[0] for x in (interactions.facts.cold, interactions.facts.tail))
        users, items = below(words[0], n_users), below(words[1:], n_items)
        return users, jnp.moveaxis(items, 0, -1), jnp.ones(users.shape)

    def masked(self, params: Mapping[str, Any], drawn: Any, layout: Layout) -> Masked:
        tokens = params[METHOD][_TOKENS]
        ids = {"user": drawn.queries.users, "item": drawn.items.reshape(-1)}
        return {side: (layout.gather_over_all(ids[side]), tokens[side]) for side in ids}

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        width, vectors = lanes.student.shape[-1], lanes.teacher.shape[-1]
        model = Perceptron(_hidden(self.knobs.hidden, width, vectors), vectors)
        of_model = {name: value for name, value in params.items() if name != _TOKENS}
        mapped = jnp.asarray(model.apply({"params": of_model}, lanes.student))
        ids = lanes.ids + jnp.array([[0, _ITEMS, _ITEMS]])
        flat = [x.reshape(-1, *x.shape[2:]) for x in (mapped, lanes.teacher, ids, lanes.has)]
        anchors, own, own_ids, has = flat
        others, other_ids, there = (layout.gather_over_all(x) for x in (own, own_ids, has))
        terms = contrast(anchors, own, own_ids, others, other_ids, there, self.knobs.temperature)
        return mean_over_lanes(terms.reshape(lanes.has.shape), lanes, layout)


def make_con(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> Contrastive:
    """The contrastive alignment of a run."""
    return Contrastive(run, Gating(run, reference_backbones, native), native)


def make_gen(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> Generative:
    """The generative alignment of a run."""
    return Generative(run, Gating(run, reference_backbones, native), native)
