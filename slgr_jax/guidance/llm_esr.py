"""Self-distillation towards users that an LLM finds alike: half of LLM-ESR (NeurIPS 2024).

    l(u) = |e_u - sg(1 / n sum_v e_v)|^2 / E,     v: the n users whose vectors are nearest to u's

with e the vector that the recommender scores with, all users' as they are in this step, and no
gradient to v. So a user of few events borrows from users whose texts are like hers. Nearest is by
cosine of the product's vectors, less their mean, among users with training interactions; they are
found once, when a run begins, by comparing all users with all. A step draws users with their
interactions as the other guidances of vectors do (alignment.py), which is how a gate weighs them.

With --llm_esr_views=b, of a run with both views of items (`--dual_view`), it is b times LLM-ESR's
term between these, x = A(z) and y = e, over the items of the step's lanes that have a text, added:

    S = X Y',   P = softmax over each row of (X X' + Y Y') / 2,   1/2 (CE(P, S) + CE(P', S'))

(`llmemb_rat.contrasts` at temperature 1), with a gradient to both; alpha weighs an item's terms.
LLM-ESR has it over the items of a batch's sequences, once for every event.

Needs: vectors of users and items (items for a gate or views alone). Fits every backbone that scores
by a dot product; LLM-ESR has it for sequence models. Costs: 1 + n users' vectors a lane, each with
the rows of the lane's two items; of a sequence model these are 1 + n encoded sequences.

Shape letters: G lanes, N neighbours, E width of the recommender's vectors, U users, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.alignment import (
    Alignment,
    AlignmentArrays,
    AlignmentDraw,
    Lanes,
    SideVectors,
)
from slgr_jax.guidance.base import Sources
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.llmemb_rat import contrasts
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone, adapters
from slgr_jax.models.backbones.vector_maps import SecondView
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling.arrays import Interactions, host_array
from slgr_jax.sampling.context import Histories, Queries
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.preferences import at_the_end_of_training
from slgr_jax.teacher.local import nearest
from slgr_jax.teacher.local.vectors import Vectors


@struct.dataclass
class NeighbourArrays(AlignmentArrays):
    """`neighbours` [U, N] are the nearest users of each, the best first; -1 past the last."""

    neighbours: Int[Array, "U N"]


@struct.dataclass
class NeighbourDraw(AlignmentDraw):
    """Lanes with their user's neighbours.

    Attributes:
      others: [G, N] queries of the neighbours.
      known: [G, N] 1 where there is one.
    """

    others: Queries
    known: Float[Array, "*G N"]


def neighbours_of(dataset: Dataset, users: SideVectors, count: int) -> Int[np.ndarray, "U N"]:
    """The `count` users of training with the largest cosine to each; -1 past the last."""
    vectors, has = np.asarray(users.values, np.float32), np.asarray(users.has)
    trained = Vectors(vectors, has & (dataset.history > 0))
    return nearest.table(trained, Vectors(vectors, has), count)


class SelfDistillation(Alignment):
    """See the module's docstring."""

    def check(self, backbone: AnyBackbone) -> None:
        super().check(backbone)
        share = self.run.llm_esr.views
        if not share:
            return
        if not isinstance(adapters.of(backbone).get("item"), SecondView):
            raise ConfigError(
                f"--llm_esr_views={share:g} contrasts two views of items, rows and what texts come "
                "to: add --item_vectors=NAME --dual_view (sasrec, gru4rec), or drop it"
            )
        name, beside = self.run.guidance.teacher_vectors, self.run.vectors.item_vectors
        if name != beside:
            raise ConfigError(
                f"--llm_esr_views={share:g} contrasts what --item_vectors={beside} come to, and "
                f"--teacher_vectors={name} names others; give both the same"
            )

    def arrays(self, sources: Sources) -> tuple[NeighbourArrays, Csr | None]:
        arrays, left_out = super().arrays(sources)
        count = self.run.llm_esr.neighbours
        table = neighbours_of(sources.dataset, arrays.users, count)
        return NeighbourArrays(**vars(arrays), neighbours=host_array(table, np.int32)), left_out

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        return {}

    def draw(
        self,
        words_of: Generators,
        arrays: AlignmentArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> NeighbourDraw:
        assert isinstance(arrays, NeighbourArrays)
        drawn = super().draw(words_of, arrays, interactions, histories)
        neighbours = arrays.neighbours[drawn.queries.users]
        others = at_the_end_of_training(jnp.maximum(neighbours, 0), histories)
        known = (neighbours >= 0).astype(jnp.float32)
        return NeighbourDraw(**vars(drawn), others=others, known=known)

    def candidates(self, drawn: AlignmentDraw) -> Candidates:
        """Each lane, then its neighbours with its items, whose scores nobody reads: so a query has
        the same number, and dropout, on however many devices lanes are."""
        assert isinstance(drawn, NeighbourDraw)
        queries = jax.tree.map(
            lambda own, others: jnp.concatenate([own[:, None], others], axis=1).reshape(-1),
            drawn.queries,
            drawn.others,
        )
        return Candidates(queries, jnp.repeat(drawn.items, 1 + drawn.known.shape[-1], axis=0))

    def with_others(
        self, lanes: Lanes, others: Float[Array, "G N E"], drawn: AlignmentDraw
    ) -> Lanes:
        assert isinstance(drawn, NeighbourDraw)
        return lanes.replace(others=others, known=drawn.known)  # type: ignore[attr-defined]

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        assert lanes.others is not None
        assert lanes.known is not None
        count = jnp.sum(lanes.known, axis=1)
        total = jnp.sum(lanes.known[..., None] * lanes.others, axis=1)
        mean = jax.lax.stop_gradient(total / jnp.maximum(count, 1.0)[:, None])
        errors = jnp.mean(jnp.square(lanes.student[:, 0] - mean), axis=-1)

        some = (count > 0).astype(jnp.float32)
        counted = layout.sum_over_all(jnp.sum(lanes.has[:, 0] * some))
        every = count.shape[0] * layout.devices
        losses = lanes.weights[:, 0] * some * errors * (every / jnp.maximum(counted, 1.0))
        share = self.run.llm_esr.views
        return losses + share * _between_views(lanes, layout) if share else losses


def _between_views(lanes: Lanes, layout: Layout) -> Float[Array, "G"]:
    """What each lane's item adds to the term between an item's two views."""
    assert lanes.rows is not None
    size = lanes.has.shape[0]
    rows, has = (layout.gather_over_all(part) for part in (lanes.rows, lanes.has[:, 1]))
    own, text = jnp.split(rows, 2, axis=-1)
    begin = 0 if layout.devices == 1 else layout.device_index() * size
    at = begin + jnp.arange(size, dtype=jnp.int32)
    terms = contrasts(text, own, has > 0, at, 1.0)
    return lanes.weights[:, 1] * terms * (rows.shape[0] / jnp.maximum(jnp.sum(has), 1.0))


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> SelfDistillation:
    """The self-distillation of a run."""
    return SelfDistillation(run, Gating(run, reference_backbones, native), native)
