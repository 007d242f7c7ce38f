"""Items made of texts, aligned with a finished recommender's: LLMEmb's second stage (AAAI 2025).

    S = X Y' / tau                          X: a run's vectors of items, Y: the recommender's
    P = softmax over each row of tau (X X' + Y Y') / 2
    L = 1/2 (CE(P, S) + CE(P', S')),        CE(P, S) = mean over i of -sum_j P_ij log softmax(S_i)_j

over the items of a step's interactions, those of all devices, that have an x; an item that was
drawn twice counts twice. Vectors are taken as they are: their products are scores, of the run and
of this one. x gets no gradient; P does, as in the authors' program. alpha weighs a lane's terms.

What the recommender has of an item is A(z), of a frozen text vector alone (`--noitem_rows`) or
beside a row: without texts it would be taught what another run's rows are, which `hint` is for.
LLMEmb's first stage trains the LLM that gives z.

Needs: vectors of items as wide as the recommender's; users for a gate alone. Fits every backbone
that scores by a dot product; LLMEmb has it for sequence models. Costs: three products of N x N E.

Shape letters: G lanes, N of all devices, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.alignment import Alignment, Lanes, vector_width
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone, adapters
from slgr_jax.teacher.local import embeddings

_NOTHING = -1e30  # a logit of what is not there


def contrasts(
    x: Float[Array, "N E"],
    y: Float[Array, "N E"],
    there: Bool[Array, "N"],
    at: Int[Array, "G"],
    temperature: float,
) -> Float[Array, "G"]:
    """1/2 (CE_i + CE'_i) of the items `at` among those `there`: CE_i of row i of S, CE'_i of its
    column i."""
    logits = x @ y.T / temperature
    alike = (x @ x.T + y @ y.T) * (temperature / 2)
    targets = jax.nn.softmax(jnp.where(there[None, :], alike, _NOTHING), axis=1)

    def of_rows(logits: Float[Array, "N N"], targets: Float[Array, "N N"]) -> Float[Array, "G"]:
        chosen = jnp.where(there[None, :], logits[at], _NOTHING)
        log_shares = jnp.where(there[None, :], jax.nn.log_softmax(chosen, axis=1), 0.0)
        return -jnp.sum(jnp.where(there[None, :], targets[at], 0.0) * log_shares, axis=1)

    return 0.5 * (of_rows(logits, targets) + of_rows(logits.T, targets.T))


class FrozenTexts(Alignment):
    """See the module's docstring."""

    scaled = False
    users_optional = True

    def check(self, backbone: AnyBackbone) -> None:
        super().check(backbone)
        made = {adapter.side for adapter in adapters.of(backbone).values()}
        if "item" not in made:
            raise ConfigError(
                "--guidance=llmemb_rat aligns what texts of items come to: add --item_vectors=NAME "
                "(slgr teach embed) with --noitem_rows, or use --guidance=hint for a run's vectors "
                "alone"
            )
        name = self.run.guidance.teacher_vectors
        width, vectors = vector_width(backbone), embeddings.width_of(self.run.data, name)
        if width != vectors:
            raise ConfigError(
                f"--guidance=llmemb_rat multiplies vectors of items by those of "
                f"--teacher_vectors={name}: this run's have {width} numbers, those {vectors}; give "
                "both runs the same --dim, or use --guidance=hint, which maps them"
            )

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        return {}

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        own = (lanes.teacher[:, 1], lanes.student[:, 1], lanes.has[:, 1])
        x, y, has = (layout.gather_over_all(part) for part in own)
        count = lanes.has.shape[0]
        first = 0 if layout.devices == 1 else layout.device_index() * count
        at = first + jnp.arange(count, dtype=jnp.int32)
        terms = contrasts(x, y, has > 0, at, self.run.llmemb_rat.temperature)
        share = x.shape[0] / jnp.maximum(jnp.sum(has), 1.0)
        return lanes.weights[:, 1] * terms * share


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> FrozenTexts:
    """LLMEmb's alignment of a run."""
    return FrozenTexts(run, Gating(run, reference_backbones, native), native)
