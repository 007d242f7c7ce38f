"""Gates: for one preference, is the teacher to be believed? alpha in [0, 1].

A gate is a Flax module from `GateInputs` to alpha [G]. Everything a gate reads of the recommender
is detached: a gate must not move the recommender in order to move itself. How a gate learns:

  paper, budget     from the gated guidance loss itself, as S-LLMR prints it
  constant, rule    not at all
  calibrated        as P(the teacher is right), by cross-entropy on labelled preferences

Shape letters: G preferences; the axis of length 2 is (preferred item, other item).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import GATE_INPUTS, NAMED_INPUTS, WORD_INPUTS, GateConfig, register_gate
from slgr_jax.kernels import gates as kernel
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.random_bits import WEYL

# Inputs that a prior does not have: they are the teacher's.
_OF_TEACHER = ("teacher", *WORD_INPUTS, *NAMED_INPUTS)


@struct.dataclass
class GateInputs:
    """What a gate may know of G preferences; nothing in it carries a gradient.

    Attributes:
      history: log(1 + training interactions of the user), standardised over users.
      popularity: log(1 + training interactions of each item), standardised over items.
      cold: 1 where the user is cold.
      tail: 1 where an item is tail.
      uncertainty: q of the recommender for (user, item), in [0, 1].
      score_margin: the recommender's own s_ua - s_ub.
      teacher_margin: the teacher's score difference, > 0, over a typical one.
      reference_margin: the mean of s_ua - s_ub over the reference runs; 0 without any.
      votes, confidence, named: what the teacher knows of each item (`teacher_knowledge`); 0 where
        the gate does not read it.
      fold: 0 or 1, the half of the users that the user is in (`folds`).
    """

    history: Float[Array, "G"]
    popularity: Float[Array, "G 2"]
    cold: Float[Array, "G"]
    tail: Float[Array, "G 2"]
    uncertainty: Float[Array, "G 2"]
    score_margin: Float[Array, "G"]
    teacher_margin: Float[Array, "G"]
    reference_margin: Float[Array, "G"]
    votes: Float[Array, "G 2"]
    confidence: Float[Array, "G 2"]
    named: Float[Array, "G 2"]
    fold: Int[Array, "G"]


def folds(users: Int[Array, "*G"]) -> Int[Array, "*G"]:
    """0 or 1: which half of the users each is in, by a hash of the index."""
    return (random_bits.mixed(users.astype(jnp.uint32) + np.uint32(WEYL)) & 1).astype(jnp.int32)


# In float32 on accelerators too: a gate's products are small.
_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


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
        # Item by item, since XLA's CPU works on vectors and not on a last axis of two; weights as
        # vectors that both share, so that their gradients are one sum each.
        w_cold, w_tail, w_uncertainty, offset = (
            jnp.broadcast_to(part, inputs.cold.shape) for part in (*weight, bias)
        )

        def alpha(item: int) -> jax.Array:
            logit = w_cold * inputs.cold + w_tail * inputs.tail[:, item]
            logit += w_uncertainty * inputs.uncertainty[:, item]
            return jax.nn.sigmoid(logit + offset)

        return 0.5 * (alpha(0) + alpha(1))


class ConstantGate(nn.Module):
    """alpha_uij = c. c = 1 is global pairwise distillation, c = 0 is no guidance."""

    alpha: float

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jnp.full_like(inputs.cold, self.alpha)


class RuleGate(nn.Module):
    """alpha_uij = 1 if the user is cold or either item is tail, else 0: the hand-made gate."""

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jnp.maximum(inputs.cold, jnp.max(inputs.tail, axis=1))


class LogisticGate(nn.Module):
    """alpha = sigmoid(w_f . z + b_f [+ v_f . tanh(V_f z)]), one set of parameters for each fold f.

    z are the named inputs. Two folds, because what teaches a gate (validation interactions) also
    chooses the best epoch: the parameters of a fold are taught by its own users and used for those
    of the other. With the margin (or a reference) among its inputs it starts at sigmoid of it, what
    the recommender (or the reference) believes, otherwise at 1/2: a teacher adds nothing until it
    has been seen to.

    With a reference it also learns the prior, what one would believe of two items without knowing
    which of them the teacher prefers: with g of the same form, of the same inputs but those that
    are the teacher's (its margin, what it knows), and z' those with the items exchanged,
    sigmoid((g_f(z) - g_f(z')) / 2). Exchanging the items exchanges the prior p and 1 - p, so that
    alpha - p is what the teacher adds.

    Attributes:
      native: by the CPU kernel, which has no gradient.
    """

    names: tuple[str, ...]
    hidden: int = 0
    native: bool = False

    def features(self, inputs: GateInputs) -> Float[Array, "F G"]:
        """z, in the order of `config.GATE_INPUTS`."""
        return _features(self.names, inputs)

    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jax.nn.sigmoid(self.logits(inputs)[0])

    @nn.compact
    def logits(self, inputs: GateInputs) -> Float[Array, "P G"]:
        """log(p / (1 - p)) of p = alpha and, with a reference, of p = the prior."""
        hidden, native = self.hidden, self.native
        alpha = _ByFold(_first_belief(self.names), hidden, True, native, name="alpha")
        alpha_logits = alpha(self.features(inputs), inputs.fold)
        if "reference" not in self.names:
            return alpha_logits[None]

        names = tuple(name for name in self.names if name not in _OF_TEACHER)
        prior = _ByFold(_first_belief(names), hidden, False, native, name="prior")
        difference = prior(_features(names, inputs), inputs.fold) - prior(
            _features(names, exchanged(inputs)), inputs.fold
        )
        return jnp.stack([alpha_logits, 0.5 * difference])


class _ByFold(nn.Module):
    """w_f . z [+ b_f] [+ v_f . tanh(V_f z)] of columns z, one set of parameters for each fold f."""

    start: tuple[float, ...]
    hidden: int
    bias: bool = False
    native: bool = False

    @nn.compact
    def __call__(self, z: Float[Array, "F G"], fold: Int[Array, "G"]) -> Float[Array, "G"]:
        width, zeros = len(self.start), nn.initializers.zeros
        weight = self.param("weight", lambda *_: jnp.tile(jnp.array(self.start), (2, 1)))
        bias = self.param("bias", zeros, (2,)) if self.bias else jnp.zeros(2)
        if self.hidden:
            inner = self.param("inner", nn.initializers.lecun_normal(), (2, width, self.hidden))
            outer = self.param("outer", zeros, (2, self.hidden))
        else:
            inner, outer = jnp.zeros((2, width, 0)), jnp.zeros((2, 0))
        if self.native:
            return kernel.logistic_gate(z, fold, weight, bias, inner, outer)

        # The inputs of each fold's parameters, 0 for the other fold's users: what would be a
        # lookup of parameters is a matrix product, and its gradient another.
        second = fold.astype(jnp.float32)
        in_fold = jnp.stack([1.0 - second, second])
        both = (in_fold[:, None] * z[None]).reshape(2 * width, -1)
        logits = _exact(weight.reshape(-1), both)
        if self.bias:
            logits += _exact(bias, in_fold)
        if self.hidden:
            states = jnp.tanh(_exact(inner.reshape(-1, self.hidden).T, both))
            logits += jnp.sum(in_fold * _exact(outer, states), axis=0)
        return logits


def _columns(inputs: GateInputs) -> dict[str, list[jax.Array]]:
    """What each of `config.GATE_INPUTS` names."""
    return {
        "margin": [inputs.score_margin],
        "history": [inputs.history],
        "popularity": [*inputs.popularity.T],
        "uncertainty": [*inputs.uncertainty.T],
        "teacher": [inputs.teacher_margin],
        "slices": [inputs.cold, *inputs.tail.T],
        "agreement": [jnp.sign(inputs.score_margin)],
        "reference": [inputs.reference_margin],
        "votes": [*inputs.votes.T],
        "confidence": [*inputs.confidence.T],
        "named": [*inputs.named.T],
        "named_gap": [*(inputs.named - inputs.popularity).T],
    }


def _features(names: tuple[str, ...], inputs: GateInputs) -> Float[Array, "F G"]:
    columns = _columns(inputs)
    return jnp.stack([z for name in GATE_INPUTS if name in names for z in columns[name]])


def _first_belief(names: tuple[str, ...]) -> tuple[float, ...]:
    """1 at the column of the margin, or of the reference's where it is not read; 0 elsewhere."""
    believed = "margin" if "margin" in names else "reference"
    columns = _columns(empty_inputs())
    return tuple(
        float(name == believed) for name in GATE_INPUTS if name in names for _ in columns[name]
    )


def exchanged(inputs: GateInputs) -> GateInputs:
    """The same preferences with their items exchanged; the teacher's margin says nothing then."""
    return inputs.replace(  # type: ignore[attr-defined]
        popularity=inputs.popularity[:, ::-1],
        tail=inputs.tail[:, ::-1],
        uncertainty=inputs.uncertainty[:, ::-1],
        score_margin=-inputs.score_margin,
        reference_margin=-inputs.reference_margin,
        votes=inputs.votes[:, ::-1],
        confidence=inputs.confidence[:, ::-1],
        named=inputs.named[:, ::-1],
    )


# A Flax module from `GateInputs` of G preferences to alpha [G]. A supervised gate also has a method
# `logits`: [P, G] log(p / (1 - p)) of p = alpha and, where it has one, of p = the prior.
Gate = nn.Module

_MAKERS: dict[str, Callable[[GateConfig], Gate]] = {
    "paper": lambda config: PaperGate(),
    "budget": lambda config: PaperGate(),
    "constant": lambda config: ConstantGate(config.alpha),
    "rule": lambda config: RuleGate(),
    "calibrated": lambda config: LogisticGate(config.input_names, config.gate_hidden),
}


def make_gate(config: GateConfig) -> Gate:
    """The gate that `config.gate` names."""
    return _MAKERS[config.gate](config)


def register(name: str, maker: Callable[[GateConfig], Gate], *, supervised: bool = False) -> None:
    """Let --gate=NAME be a gate of one's own.

    Args:
      maker: from the gate's section to a Flax module (see `Gate`).
      supervised: it learns from labelled preferences, and has `logits`; otherwise it learns from
        the guidance loss, or not at all.

    Raises:
      ConfigError: the name is taken.
    """
    register_gate(name, supervised=supervised)
    _MAKERS[name] = maker


def budget_penalty(
    alpha: Float[Array, "G"], mean: Float[Array, ""], config: GateConfig
) -> Float[Array, "G"]:
    """Of mean (mean alpha - rho)^2, with its gradient: what holds the mean of alpha at rho.

    Per preference, so that it can be averaged over devices with everything else:
    (m - rho)^2 + 2 (m - rho) (alpha_g - m), m = `mean` of alpha over the whole batch, detached.
    """
    off = jax.lax.stop_gradient(mean) - config.budget
    return config.budget_weight * (off**2 + 2.0 * off * (alpha - jax.lax.stop_gradient(mean)))


def calibration_loss(logits: Float[Array, "P K"], right: Float[Array, "K"]) -> Float[Array, "K"]:
    """Cross-entropy of alpha with whether the teacher is right, and of the prior where there is
    one.

    They share no parameter: each is learned as if alone.
    """
    return jnp.sum(jax.nn.softplus(logits) - right[None] * logits, axis=0)


def empty_inputs() -> GateInputs:
    """Inputs for zero preferences, to initialise a gate's parameters."""
    of_pair, of_item = jnp.zeros((0,)), jnp.zeros((0, 2))
    return GateInputs(
        history=of_pair,
        popularity=of_item,
        cold=of_pair,
        tail=of_item,
        uncertainty=of_item,
        score_margin=of_pair,
        teacher_margin=of_pair,
        reference_margin=of_pair,
        votes=of_item,
        confidence=of_item,
        named=of_item,
        fold=jnp.zeros((0,), jnp.int32),
    )


def confidence_uncertainty(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """q = 2 (1 - max(p, 1 - p)), p = sigmoid(score): 1 at p = 1/2, 0 where p is sure.

    S-LLMR section 3.3 (a), 1 - max_y p(y), scaled from [0, 1/2] to [0, 1].
    """
    return 2.0 * jax.nn.sigmoid(-jnp.abs(scores))


def entropy_uncertainty(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """q = H(p) / ln 2 with p = sigmoid(score) (S-LLMR section 3.3 (b)), finite for any finite
    score."""
    # With e = exp(-|s|), H(p) = log(1 + e) + |s| e / (1 + e): no 0 * log 0, and one exponential.
    # Next to 1 the digits that log1p would keep do not count, and XLA's CPU computes log faster.
    size = jnp.abs(scores)
    odds = jnp.exp(-size)
    entropy = jnp.log(1.0 + odds) + size * odds / (1.0 + odds)
    return jnp.clip(entropy / np.float32(np.log(2.0)), 0.0, 1.0)


def variance_uncertainty(samples: Float[Array, "T ..."]) -> Float[Array, "..."]:
    """q = 4 Var_t(p_t), p_t = sigmoid(score t) (S-LLMR section 3.3 (c)).

    Over stochastic passes (dropout), or over runs that were trained apart: a deep ensemble
    (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation").
    The variance of a number in [0, 1] is at most 1/4, hence the scale.
    """
    return 4.0 * jnp.var(jax.nn.sigmoid(samples), axis=0)
