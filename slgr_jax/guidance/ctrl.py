"""CTRL (arXiv 2306.02841): a click model's rows contrasted with an LLM's text of the same row.

    z = [z_u ; z_i]                      the text of a row, of the vectors of its user and its item
    a = P_z z / |P_z z|,  b = P_r r / |P_r r|,    r: what the row's logit is a linear function of
    s(z, r) = sum_m max_n <a_m, b_n>     over the M parts of P / M numbers that a and b consist of
    l(row) = 1/2 (-log softmax over r' of s(z, r') / tau  -  log softmax over z' of s(z', r) / tau)

over the rows of the step, of all devices: each lane's (user, item) and (user, other item). L is the
mean over the rows whose item has a vector; a row of the same texts is no negative of another. A
user without a vector is zeros, and so are all where the product has none of users. M = 1 is the
instance contrast of FLIP (RecSys'24, ITA).

Needs: vectors of items, better of users too. Fits click models. Costs: 2 G rows through the network
and twice 4 G^2 P M products.

Shape letters: G lanes, A rows of this device (2 G), N of all, E width of a row's vector, Z of the
product's, P width of the projections, M parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slgr_jax.config import CTRLConfig, RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.alignment import (
    Alignment,
    AlignmentDraw,
    AlignmentObserved,
    Perceptron,
    info_nce,
)
from slgr_jax.guidance.base import Scored
from slgr_jax.guidance.gating import Gating
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.backbones.base import PairBackbone, unit_rows

_TEXTS, _ROWS = "texts", "rows"  # of the method's parameters, its two projections


def similarities(
    texts: Float[Array, "A P"], rows: Float[Array, "N P"], parts: int
) -> Float[Array, "A N"]:
    """s(z, r) of the module's docstring, of projected vectors of any length."""
    width = texts.shape[1] // parts
    of_rows = unit_rows(rows).reshape(rows.shape[0], parts, width)
    total = jnp.zeros((texts.shape[0], rows.shape[0]))
    for part in jnp.split(unit_rows(texts), parts, axis=1):  # one at a time: [A, N, M] is large
        total += jnp.max(jnp.einsum("ap,nmp->anm", part, of_rows), axis=-1)
    return total


class TextContrast(Alignment):
    """--guidance=ctrl."""

    users_optional = True

    @property
    def knobs(self) -> CTRLConfig:
        """Its section."""
        return self.run.ctrl

    def check(self, backbone: AnyBackbone) -> None:
        if not isinstance(backbone, PairBackbone):
            raise ConfigError(
                f"--guidance=ctrl contrasts the rows of a click model with their texts, and "
                f"--backbone={self.run.model.backbone} makes no vector of a row; use dcnv2 or "
                "another click model, or --guidance=rlmrec_con"
            )

        if self.knobs.width % self.knobs.subspaces:
            raise ConfigError(
                f"--ctrl_width={self.knobs.width} is not a multiple of --ctrl_subspaces="
                f"{self.knobs.subspaces}: each part has as many numbers; change one of them"
            )

    def student_width(self, backbone: AnyBackbone) -> int:
        assert isinstance(backbone, PairBackbone), "`check` refuses others"
        return backbone.pair_width()

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        keys = jax.random.split(key)
        inputs = {_TEXTS: 2 * vectors, _ROWS: width}
        return {
            name: dict(self._projection.init(each, jnp.zeros((1, inputs[name])))["params"])
            for name, each in zip((_TEXTS, _ROWS), keys, strict=True)
        }

    @property
    def _projection(self) -> Perceptron:
        return Perceptron(0, self.knobs.width)

    def losses(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: AlignmentDraw,
        observed: AlignmentObserved,
        alpha: Float[Array, "G"],
        layout: Layout,
        key: jax.Array,
    ) -> Float[Array, "G"]:
        vectors, has = observed.vectors, observed.has
        assert scored.pair_vectors is not None
        assert vectors is not None
        assert has is not None
        of_users = jnp.broadcast_to(vectors[:, :1], vectors[:, 1:].shape)
        z = jnp.concatenate([of_users, vectors[:, 1:]], axis=-1)
        # Users without a text are one and the same.
        users = jnp.where(has[:, 0] > 0, drawn.queries.users, -1)
        ids = jnp.stack([jnp.broadcast_to(users[:, None], drawn.items.shape), drawn.items], axis=-1)
        terms = self.row_losses(
            params,
            z.reshape(-1, z.shape[-1]),
            scored.pair_vectors().reshape(-1, observed.width),
            ids.reshape(-1, 2),
            has[:, 1:].reshape(-1),
            layout,
        )
        weights = alpha[:, None] * has[:, 1:]
        count = layout.sum_over_all(jnp.sum(has[:, 1:]))
        lanes = weights.shape[0] * layout.devices
        summed = jnp.sum(weights * terms.reshape(weights.shape), axis=1)
        return summed * (lanes / jnp.maximum(count, 1.0))

    def row_losses(
        self,
        params: Mapping[str, Any],
        texts: Float[Array, "A Z2"],
        rows: Float[Array, "A E"],
        ids: Int[Array, "A 2"],
        has: Float[Array, "A"],
        layout: Layout,
    ) -> Float[Array, "A"]:
        """l of each row of this device.

        Args:
          texts: z; rows: r.
          ids: (user, item) whose texts they are.
          has: 1 where there is a text; the others are negatives of nobody.
        """
        parts, temperature = self.knobs.subspaces, self.knobs.temperature
        texts, rows = (
            jnp.asarray(self._projection.apply({"params": params[name]}, of_row))
            for name, of_row in ((_TEXTS, texts), (_ROWS, rows))
        )
        all_texts, all_rows, all_ids, there = map(layout.gather_over_all, (texts, rows, ids, has))
        others = jnp.any(ids[:, None] != all_ids[None, :], axis=-1) & (there[None, :] > 0)
        by_text = similarities(texts, all_rows, parts) / temperature
        by_row = similarities(all_texts, rows, parts).T / temperature
        first = 0 if layout.devices == 1 else layout.device_index() * texts.shape[0]
        at = first + jnp.arange(texts.shape[0])
        positive = jnp.take_along_axis(by_text, at[:, None], axis=1)[:, 0]
        return 0.5 * (info_nce(positive, by_text, others) + info_nce(positive, by_row, others))


def make(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool
) -> TextContrast:
    """The contrast of a run."""
    return TextContrast(run, Gating(run, reference_backbones, native), native)
