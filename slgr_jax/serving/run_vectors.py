"""Vectors of a run's users and items whose inner product is the score, biases folded in.

Shape letters: U users, I items, n that are asked about, E width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from slgr_jax import progress
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.device_scoring import own_queries
from slgr_jax.evaluation.placement import Placement
from slgr_jax.mesh import put
from slgr_jax.models.backbones import DotBackbone
from slgr_jax.models.scoring import DotScores, Scoring, by_device, rows_of
from slgr_jax.training.restore import RestoredRun

# Most users, and items, whose vectors are made at once.
_USERS, _ITEMS = 1 << 10, 1 << 14


class Vectors(NamedTuple):
    """Vectors whose inner product is the score, biases folded in."""

    users: Float[np.ndarray, "U E"]
    items: Float[np.ndarray, "I E"]


class RunVectors:
    """The vectors of a run as of the end of validation, of as many users and items as are asked
    for. Where users or items are split, nothing of a table goes anywhere but these.

    The processes of a job ask all for the same, and all get it.
    """

    def __init__(self, restored: RestoredRun) -> None:
        """Raises:
        ConfigError: a backbone whose score is no inner product.
        """
        backbone = restored.backbone
        if not isinstance(backbone, DotBackbone):
            raise ConfigError(
                f"--backbone={restored.config.model.backbone} scores a user and an item together: "
                "it has no vectors; use scores() or recommend(), or export its scorer (slgr export "
                "--format=none --scorer)"
            )
        self._restored, self._scoring = restored, restored.scoring("test")
        self._at = at = Placement(restored.mesh, restored.split)
        whole = None if restored.mesh is None else restored.learner.layout.replicated
        by_vectors = DotScores(backbone)

        @functools.partial(jax.jit, static_argnames="specs", out_shardings=whole)
        def of_rows(
            scoring: Scoring, rows: jax.Array, *, specs: tuple[PartitionSpec, ...] | None
        ) -> jax.Array:
            if specs is None:
                return by_vectors.queries(scoring, jnp.maximum(rows, 0))
            return own_queries(by_vectors, scoring, rows, at, specs)

        @functools.partial(jax.jit, out_shardings=whole)
        def of_items(scoring: Scoring, items: jax.Array) -> jax.Array:
            rows = rows_of(scoring.serving.values, backbone.item_ids(scoring.context, items))
            return backbone.item_vectors(scoring.serving.params, rows)

        self._of_rows, self._of_items = of_rows, of_items

    def of_users(self, users: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n E"]:
        """Of users by index, on the host; where users are split each device makes its own's."""
        restored, at, specs = self._restored, self._at, None
        device, rows = restored.device_of(users), restored.rows_of(users)
        if device is not None:
            specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(self._scoring))
        vectors = np.empty((users.size, self.width), np.float32)
        with progress.bar(users.size, "user", label="vectors") as bar:
            spread = np.zeros(users.size, np.int32) if device is None else device
            parts = 1 if device is None else at.devices
            for places in by_device(spread, parts, _USERS // parts):
                real = places >= 0
                asked = np.where(real, rows[places], -1).astype(np.int32)
                chunk = put(asked, at.everywhere if specs is None else at.with_users)
                of_chunk = jax.device_get(self._of_rows(self._scoring, chunk, specs=specs))
                vectors[places[real]] = of_chunk[real]
                bar.update(int(real.sum()))
        return vectors

    def of_items(self, items: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n E"]:
        """Of items by index, on the host."""
        vectors = np.empty((items.size, self.width), np.float32)
        size = min(_ITEMS, 1 << max(items.size - 1, 0).bit_length())
        for begin in range(0, items.size, size):
            some = items[begin : begin + size]
            padded = np.pad(some, (0, size - some.size), mode="edge")
            asked = put(padded, self._at.everywhere)
            of_chunk = jax.device_get(self._of_items(self._scoring, asked))
            vectors[begin : begin + size] = of_chunk[: some.size]
        return vectors

    @functools.cached_property
    def width(self) -> int:
        """E."""
        asked = jax.ShapeDtypeStruct((1,), np.int32)
        return int(jax.eval_shape(self._of_items, self._scoring, asked).shape[1])
