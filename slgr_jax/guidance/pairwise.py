"""Gated pairwise guidance: alpha * pair(s_ua - s_ub) on the teacher's preferences.

S-LLMR (arXiv 2512.21526) sections 3.2 and 3.3: L_LLM = sum alpha_uab * max(0, m - (s_ua - s_ub)),
here a mean over preferences, so that lambda does not depend on how many are drawn.

Shape letters: G preferences, M runs of an ensemble; the axis of length 2 is (preferred item, other
item).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import GateConfig
from slgr_jax.guidance import gates
from slgr_jax.models.losses import PairLoss
from slgr_jax.sampling.arrays import PairFacts


@struct.dataclass
class Guided:
    """Per preference: what it adds to the loss, how far it is believed, and if the model agrees."""

    loss: Float[Array, "G"]
    alpha: Float[Array, "G"]
    agrees: Float[Array, "G"]


def gate_inputs(
    config: GateConfig,
    scores: Float[Array, "G 2"],
    stochastic: Callable[[jax.Array, float], Float[Array, "G 2"]],
    users: Int[Array, "G"],
    margins: Float[Array, "G"],
    facts: PairFacts,
    key: jax.Array,
    members: Float[Array, "M G 2"] | None = None,
) -> gates.GateInputs:
    """What a gate may see of preferences, detached from the recommender.

    Args:
      scores: logits of both items.
      stochastic: (key, dropout rate) -> the logits of one stochastic pass.
      margins: the teacher's, over a typical one.
      members: logits of both items by each run of --reference_runs, where there are any.
    """
    if config.uncertainty == "ensemble":
        assert members is not None, "uncertainty of an ensemble is asked of its members"
        uncertainty = gates.variance_uncertainty(members)
    elif config.uncertainty == "dropout":
        keys = jax.random.split(key, config.dropout_samples)
        samples = jax.vmap(lambda one: stochastic(one, config.dropout_rate))(keys)
        uncertainty = gates.variance_uncertainty(samples)
    elif config.uncertainty == "entropy":
        uncertainty = gates.entropy_uncertainty(scores)
    else:
        uncertainty = gates.confidence_uncertainty(scores)
    inputs = gates.GateInputs(
        history=facts.log_history,
        popularity=facts.log_popularity,
        cold=facts.cold,
        tail=facts.tail,
        uncertainty=uncertainty,
        score_margin=scores[:, 0] - scores[:, 1],
        teacher_margin=margins,
        reference_margin=jnp.zeros_like(margins)
        if members is None
        else jnp.mean(members[..., 0] - members[..., 1], axis=0),
        fold=gates.folds(users),
    )
    return jax.tree.map(jax.lax.stop_gradient, inputs)


def guided(
    alpha: Float[Array, "G"],
    prior: Float[Array, "G"],
    difference: Float[Array, "G"],
    pair_loss: PairLoss,
) -> Guided:
    """The loss of each preference, believed by alpha.

    Args:
      prior: alpha_0, what would be believed without the teacher.
      difference: s_ua - s_ub, with its gradient.
      pair_loss: as of `losses.guidance_pair_loss`.
    """
    agrees = (jax.lax.stop_gradient(difference) > 0).astype(jnp.float32)
    return Guided(pair_loss(difference, alpha, prior), alpha, agrees)


def pointwise(scores: Float[Array, "G 2"], targets: Float[Array, "G 2"]) -> Guided:
    """(sigmoid(s) - t)^2, the mean of both items (S-LLMR, table 3, "LLM pointwise MSE").

    Args:
      targets: the teacher's scores in [0, 1].
    """
    errors = jnp.mean(jnp.square(jax.nn.sigmoid(scores) - targets), axis=1)
    detached = jax.lax.stop_gradient(scores)
    agrees = (detached[:, 0] - detached[:, 1]) * (targets[:, 0] - targets[:, 1]) > 0
    return Guided(errors, jnp.ones_like(errors), agrees.astype(jnp.float32))
