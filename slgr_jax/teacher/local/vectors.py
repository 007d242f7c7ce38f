"""Arithmetic of text vectors."""

from __future__ import annotations

import numpy as np

from slgr_jax.data.dataset import Csr


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows over their length, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 1e-12, lengths, np.inf)).astype(np.float32)


def profiles(history: Csr, vectors: np.ndarray) -> np.ndarray:
    """[U, D]: unit mean of the vectors [I, D] of each user's items; zero without any."""
    return unit(np.asarray(history.matrix(vectors.shape[0]) @ vectors))
