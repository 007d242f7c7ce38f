"""Text vectors and their arithmetic.

Shape letters: R items or users, U users, I items, D width of a vector.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slgr_jax.data.dataset import Csr


class Vectors(NamedTuple):
    """[R, D] vectors in index order and [R] bool, which rows have one; the others are zero."""

    values: np.ndarray
    has: np.ndarray


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows over their length, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 1e-12, lengths, np.inf)).astype(np.float32)


def profiles(history: Csr, vectors: np.ndarray) -> np.ndarray:
    """[U, D]: unit mean of the vectors [I, D] of each user's items; zero without any."""
    return unit(np.asarray(history.matrix(vectors.shape[0]) @ vectors))
