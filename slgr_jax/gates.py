"""Gates: for one preference, is the teacher to be believed? alpha in [0, 1].

A gate is a Flax module from `GateInputs` to alpha [G], plus an objective that is added to
the training loss. Everything a gate reads of the recommender is detached: a gate must not
move the recommender in order to move itself.

Shape letters: G preferences; the axis of length 2 is (preferred item, other item).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import GateConfig


@struct.dataclass
class GateInputs:
    """What a gate may know of G preferences; nothing in it carries a gradient.

    Attributes:
      history: training interactions of the user.
      popularity: training interactions of each item.
      cold: 1 where the user is cold.
      tail: 1 where an item is tail.
      uncertainty: q of the recommender for (user, item), in [0, 1].
      score_margin: the recommender's own s_ua - s_ub.
      teacher_margin: the teacher's score difference, > 0.
    """

    history: Int[Array, "G"]
    popularity: Int[Array, "G 2"]
    cold: Float[Array, "G"]
    tail: Float[Array, "G 2"]
    uncertainty: Float[Array, "G 2"]
    score_margin: Float[Array, "G"]
    teacher_margin: Float[Array, "G"]


class PaperGate(nn.Module):
    """S-LLMR section 3.3, literally.

    z_ui = [Cold(u), Tail(i), q_ui];  alpha_ui = sigmoid(w.z_ui + b);
    alpha_uij = (alpha_ui + alpha_uj) / 2. Four parameters, all starting at 0 (alpha = 1/2).
    As every term of its gradient is non-negative, training can only lower w and b.
    """

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        weight = self.param("weight", nn.initializers.zeros, (3,))
        bias = self.param("bias", nn.initializers.zeros, ())
        cold = jnp.broadcast_to(inputs.cold[:, None], inputs.tail.shape)
        logit = weight[0] * cold + weight[1] * inputs.tail + weight[2] * inputs.uncertainty + bias
        return jnp.mean(jax.nn.sigmoid(logit), axis=1)

    def objective(self, alpha: Float[Array, "G"], inputs: GateInputs) -> Float[Array, "G"]:
        """None of its own: the gate learns through the gated loss alone."""
        return jnp.zeros_like(alpha)


class ConstantGate(nn.Module):
    """alpha_uij = c. c = 1 is global pairwise distillation, c = 0 is no guidance."""

    alpha: float

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jnp.full_like(inputs.cold, self.alpha)

    def objective(self, alpha: Float[Array, "G"], inputs: GateInputs) -> Float[Array, "G"]:
        """None: nothing to learn."""
        return jnp.zeros_like(alpha)


class RuleGate(nn.Module):
    """alpha_uij = 1 if the user is cold or either item is tail, else 0: the hand-made gate."""

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jnp.maximum(inputs.cold, jnp.max(inputs.tail, axis=1))

    def objective(self, alpha: Float[Array, "G"], inputs: GateInputs) -> Float[Array, "G"]:
        """None: nothing to learn."""
        return jnp.zeros_like(alpha)


Gate = PaperGate | ConstantGate | RuleGate


def make_gate(config: GateConfig) -> Gate:
    """The gate that `config.gate` names."""
    makers: dict[str, Callable[[], Gate]] = {
        "paper": PaperGate,
        "constant": lambda: ConstantGate(config.alpha),
        "rule": RuleGate,
    }
    return makers[config.gate]()


def empty_inputs() -> GateInputs:
    """Inputs for zero preferences, to initialise a gate's parameters."""
    shapes = {"history": (0,), "popularity": (0, 2), "cold": (0,), "tail": (0, 2)}
    shapes |= {"uncertainty": (0, 2), "score_margin": (0,), "teacher_margin": (0,)}
    integer = ("history", "popularity")
    return GateInputs(
        **{
            field.name: jnp.zeros(
                shapes[field.name], jnp.int32 if field.name in integer else jnp.float32
            )
            for field in dataclasses.fields(GateInputs)
        }
    )


def confidence_uncertainty(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """q = 2 (1 - max(p, 1 - p)), p = sigmoid(score): 1 at p = 1/2, 0 where p is sure.

    PAPER 1.3 (a), 1 - max_y p(y), scaled from [0, 1/2] to [0, 1].
    """
    return 2.0 * jax.nn.sigmoid(-jnp.abs(scores))


def entropy_uncertainty(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """q = H(p) / ln 2 with p = sigmoid(score) (PAPER 1.3 (b)), finite for any finite score."""
    # H(p) = softplus(|s|) - |s| sigmoid(|s|): no 0 * log 0.
    size = jnp.abs(scores)
    entropy = jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
    return jnp.clip(entropy / np.float32(np.log(2.0)), 0.0, 1.0)


def dropout_uncertainty(samples: Float[Array, "T ..."]) -> Float[Array, "..."]:
    """q = 4 Var_t(p_t), p_t = sigmoid(score of stochastic pass t) (PAPER 1.3 (c)).

    The variance of a number in [0, 1] is at most 1/4, hence the scale.
    """
    return 4.0 * jnp.var(jax.nn.sigmoid(samples), axis=0)
