"""Vectors of a run's users and items whose inner product is the score, biases folded in.

Shape letters: U users, I items, n users that are asked about, E width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from slgr_jax import progress
from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import DotBackbone
from slgr_jax.models.scoring import Scoring, catalogue_vectors, query_vectors
from slgr_jax.training.restore import RestoredRun

# Users whose vectors are fetched at once.
_CHUNK = 1024


class Vectors(NamedTuple):
    """Vectors whose inner product is the score, biases folded in."""

    users: Float[np.ndarray, "U E"]
    items: Float[np.ndarray, "I E"]


class RunVectors:
    """The vectors of a run as of the end of validation, of as many users as are asked for."""

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
        self._backbone, self._restored = backbone, restored
        self._scoring = restored.scoring("test")

        @jax.jit
        def of_rows(scoring: Scoring, rows: jax.Array) -> jax.Array:
            return query_vectors(backbone, scoring, scoring.queries(rows))

        self._of_rows = of_rows

    def of_users(self, users: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n E"]:
        """Of users by index, on the host."""
        width = jax.eval_shape(self._of_rows, self._scoring, np.zeros(1, np.int32)).shape[1]
        vectors = np.empty((users.size, width), np.float32)
        with progress.bar(users.size, "user", label="vectors") as bar:
            for begin in range(0, users.size, _CHUNK):
                some = users[begin : begin + _CHUNK]
                padded = np.pad(some, (0, _CHUNK - some.size), mode="edge")
                of_chunk = np.asarray(self._of_rows(*self._restored.asking(padded, "test")))
                vectors[begin : begin + _CHUNK] = of_chunk[: some.size]
                bar.update(some.size)
        return vectors

    def of_items(self) -> Float[np.ndarray, "I E"]:
        """Of all items, on the host."""
        vectors = np.asarray(catalogue_vectors(self._backbone, self._scoring))
        return vectors[: self._restored.dataset.n_items]
