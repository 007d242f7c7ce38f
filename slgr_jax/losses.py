"""Losses on score differences, element by element; the caller masks and averages.

x is the score of the preferred item minus that of the other one, in logits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.config import GuidanceConfig


def bpr(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log sigmoid(x) = log(1 + exp(-x)), finite for any finite x (Rendle et al. 2009, eq. 4)."""
    return jax.nn.softplus(-x)


def pairwise_hinge(x: Float[Array, "..."], margin: float) -> Float[Array, "..."]:
    """max(0, margin - x) (S-LLMR, arXiv 2512.21526, section 3.2)."""
    return jnp.maximum(0.0, margin - x)


def pairwise_logistic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(-x)): the same loss as BPR, on a preference of the teacher."""
    return bpr(x)


def guidance_pair_loss(config: GuidanceConfig) -> Callable[[jax.Array], jax.Array]:
    """The loss on a preference's score difference that `config.guidance_loss` names."""
    losses: dict[str, Callable[[jax.Array], jax.Array]] = {
        "hinge": lambda x: pairwise_hinge(x, config.margin),
        "logistic": pairwise_logistic,
    }
    return losses[config.guidance_loss]


def masked_sum(values: Float[Array, "N"], weights: Float[Array, "N"]) -> Float[Array, ""]:
    """sum_n w_n v_n where a zero weight silences even a non-finite value."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0))
