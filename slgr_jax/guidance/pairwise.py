"""Gated pairwise guidance: alpha * pair(s_ua - s_ub) on the teacher's preferences.

S-LLMR (arXiv 2512.21526) sections 3.2 and 3.3: L_LLM = sum alpha_uab * max(0, m - (s_ua - s_ub)),
here a mean over preferences, so that lambda does not depend on how many are drawn.

Shape letters: G preferences; the axis of length 2 is (preferred item, other item).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from slgr_jax import gates, losses
from slgr_jax.config import GateConfig, GuidanceConfig
from slgr_jax.data.batches import Facts
from slgr_jax.data.draws import Batch


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
    batch: Batch,
    facts: Facts,
    key: jax.Array,
) -> gates.GateInputs:
    """What a gate may see of the batch's preferences, detached from the recommender.

    Args:
      scores: logits of both items.
      stochastic: (key, dropout rate) -> the logits of one stochastic pass.
    """
    if config.uncertainty == "dropout":
        keys = jax.random.split(key, config.dropout_samples)
        samples = jax.vmap(lambda one: stochastic(one, config.dropout_rate))(keys)
        uncertainty = gates.dropout_uncertainty(samples)
    elif config.uncertainty == "entropy":
        uncertainty = gates.entropy_uncertainty(scores)
    else:
        uncertainty = gates.confidence_uncertainty(scores)
    users, items = batch.pref_queries.users, batch.pref_items
    inputs = gates.GateInputs(
        history=facts.history[users],
        popularity=facts.popularity[items],
        cold=facts.cold[users],
        tail=facts.tail[items],
        uncertainty=uncertainty,
        score_margin=scores[:, 0] - scores[:, 1],
        teacher_margin=batch.pref_margins,
    )
    return jax.tree.map(jax.lax.stop_gradient, inputs)


def selective(
    gate: gates.Gate,
    gate_params: Mapping[str, Any],
    inputs: gates.GateInputs,
    difference: Float[Array, "G"],
    config: GuidanceConfig,
) -> Guided:
    """The gated loss of each preference, plus the gate's own objective.

    Args:
      difference: s_ua - s_ub, with its gradient.
    """
    alpha = gate.apply({"params": gate_params}, inputs)
    assert isinstance(alpha, jax.Array)
    loss = alpha * losses.guidance_pair_loss(config)(difference)
    agrees = (jax.lax.stop_gradient(difference) > 0).astype(jnp.float32)
    return Guided(loss + gate.objective(alpha, inputs), alpha, agrees)
