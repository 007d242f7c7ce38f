"""Losses of a teacher's preference, element by element, weighed by how far it is believed.

x = s_ua - s_ub is the score of the preferred item minus that of the other one, in logits; alpha is
P(the teacher is right), the prior what would be believed without it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slgr_jax.models import losses


def hinge(x: Float[Array, "..."], margin: float) -> Float[Array, "..."]:
    """max(0, margin - x) (S-LLMR, arXiv 2512.21526, section 3.2)."""
    return jnp.maximum(0.0, margin - x)


def logistic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(-x)): the same loss as BPR, on a preference of the teacher."""
    return losses.bpr(x)


def soft(x: Float[Array, "..."], alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """-alpha log sigmoid(x) - (1 - alpha) log sigmoid(-x): least where sigmoid(x) = alpha."""
    return jax.nn.softplus(x) - alpha * x


def confidence(x: Float[Array, "..."], alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """(2 alpha - 1)^2 times the soft loss: 0 where the teacher is right half the time.

    The soft loss alone pulls sigmoid(x) to 1/2 there, and so unlearns what interactions taught.
    """
    return weight("confidence", alpha, alpha) * soft(x, alpha)


def gain(
    x: Float[Array, "..."], alpha: Float[Array, "..."], prior: Float[Array, "..."]
) -> Float[Array, "..."]:
    """|alpha - prior| times the soft loss: 0 where the teacher adds nothing to a reference run."""
    return weight("gain", alpha, prior) * soft(x, alpha)


def weight(
    name: str, alpha: Float[Array, "..."], prior: Float[Array, "..."]
) -> Float[Array, "..."]:
    """How much a preference counts with a loss: the factor before its hinge, logistic or soft one.

    (2 alpha - 1)^2 of confidence, |alpha - prior| of gain, else alpha.
    """
    if name == "confidence":
        return jnp.square(2.0 * alpha - 1.0)
    return jnp.abs(alpha - prior) if name == "gain" else alpha


# (x, alpha, prior) -> the loss of a preference.
PairLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def pair_loss(name: str, margin: float) -> PairLoss:
    """The loss of a preference that is believed by alpha, as --guidance_loss names it."""
    by_name: dict[str, PairLoss] = {
        "hinge": lambda x, alpha, _: alpha * hinge(x, margin),
        "logistic": lambda x, alpha, _: alpha * logistic(x),
        "soft": lambda x, alpha, _: soft(x, alpha),
        "confidence": lambda x, alpha, _: confidence(x, alpha),
        "gain": gain,
    }
    return by_name[name]
