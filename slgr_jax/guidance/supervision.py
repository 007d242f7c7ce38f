"""What guidance adds to a step: gated preferences (or scores), and what teaches the gate.

    preferences   mean_G pair(s_ua - s_ub, alpha), times lambda
    budget        + budget_weight (mean alpha - rho)^2, times lambda too
    calibrated    + mean_K cross-entropy(alpha, the teacher is right) over labelled preferences,
                  and of alpha_0 likewise (`gates.LogisticGate`)
    meta          - mean_G alpha c_g: c_g is how fast a step along the gradient of preference g
                  lowers the BPR loss of an item that its user chose, held out of training,

    c_g = < d pair(x_g) / d rows, d bpr(s_u,chosen - s_u,other) / d rows >

over the rows that both read, the user's side: one look-ahead step of plain descent, to first order
in its length (as Ren et al. 2018, "Learning to Reweight Examples", eq. 12, with a gate in place of
free weights). Supervised gates use the parameters of the other half of the users
(`gates.LogisticGate`) and get no gradient from the gated loss, which would only teach them to fall.

Shape letters: G preferences, K labelled preferences, M runs of an ensemble, N lanes; the axis of
length 2 is (preferred, other).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.guidance import gates, pairwise
from slgr_jax.mesh import Layout
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.row_access import Access, Candidates, Dropout, Reads, Rows, candidate_scores
from slgr_jax.models.scoring import Scoring, reference_scores
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import Context, Queries
from slgr_jax.training.objectives import Preferred

_ANSWERS, _LOOK_AHEAD = "answers", "look_ahead"


@struct.dataclass
class Seen:
    """What a step sees of things that it does not train: what teaches a gate, an ensemble's word.

    Attributes:
      answers: a gate's inputs for the labelled preferences; None unless it is calibrated.
      gains: [G] c_g over its root mean square; None unless the gate looks ahead.
      members: [M, G, 2] logits of the preferences by the ensemble; None where there is none.
    """

    answers: gates.GateInputs | None = None
    gains: Float[Array, "G"] | None = None
    members: Float[Array, "M G 2"] | None = None


@struct.dataclass
class Added:
    """This device's share of what guidance adds, as sums over its lanes over the batch's count.

    Attributes:
      guidance: [] of preferences (and the budget); lambda is not in it.
      gate: [] what teaches the gate.
      alpha, agreement: [] mean alpha, and how often the recommender agrees.
    """

    guidance: Float[Array, ""]
    gate: Float[Array, ""]
    alpha: Float[Array, ""]
    agreement: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Supervision:
    """The guidance of a run; see the module's docstring.

    `ensemble` holds the backbones of the runs whose spread the gate reads; `native`: the CPU
    kernels read their rows where they can.
    """

    config: RunConfig
    gate: gates.Gate
    access: Access
    layout: Layout
    margin_scale: float
    reference_runs: tuple[AnyBackbone, ...] = ()
    native: bool = False

    def see(
        self,
        tables: Mapping[str, jax.Array],
        params: Mapping[str, Any],
        batch: Batch,
        context: Context,
        dropout: Dropout,
        key: jax.Array,
        reference_runs: Sequence[Scoring] = (),
    ) -> Seen:
        """Score what teaches the gate; nothing of it is differentiated or written back.

        Args:
          dropout: of a training pass, so that margins are those that preferences have.
          ensemble: what the backbones of `self.ensemble` score with.
        """
        answers = gains = None
        if batch.known is not None:
            answers = self._answers(tables, params, batch, context, dropout, key, reference_runs)
        if batch.held_out is not None:
            gains = self._gains(tables, params, batch, context, dropout)
        return Seen(
            answers, gains, self._members(reference_runs, batch.pref_queries, batch.pref_items)
        )

    def _members(
        self, reference_runs: Sequence[Scoring], queries: Queries, items: Int[Array, "N 2"]
    ) -> Float[Array, "M N 2"] | None:
        """What the ensemble says of lanes."""
        if not self.reference_runs:
            return None
        return reference_scores(
            self.reference_runs, reference_runs, queries.users, items, native=self.native
        )

    def _answers(
        self,
        tables: Mapping[str, jax.Array],
        params: Mapping[str, Any],
        batch: Batch,
        context: Context,
        dropout: Dropout,
        key: jax.Array,
        reference_runs: Sequence[Scoring],
    ) -> gates.GateInputs:
        known, access = batch.known, self.access
        assert known is not None
        assert known.facts is not None
        reads = Reads({_ANSWERS: Candidates(known.queries, known.items)}, {})
        leaves = access.read(tables, context, reads)

        def scores(dropout: Dropout) -> jax.Array:
            view = access.view(params, leaves, context, reads, dropout)
            return view.scores(_ANSWERS, dropout)

        return pairwise.gate_inputs(
            self.config.gate,
            scores(dropout),
            lambda key, rate: scores((rate, key)),
            known.queries.users,
            known.margins / self.margin_scale,
            known.facts,
            key,
            self._members(reference_runs, known.queries, known.items),
        )

    def _gains(
        self,
        tables: Mapping[str, jax.Array],
        params: Mapping[str, Any],
        batch: Batch,
        context: Context,
        dropout: Dropout,
    ) -> Float[Array, "G"]:
        access, held_out = self.access, batch.held_out
        assert isinstance(access, Rows)  # Trainer.access
        assert held_out is not None
        items = jnp.concatenate([batch.pref_items, held_out.items], axis=1)
        lanes = Candidates(batch.pref_queries, items)
        reads = Reads({_LOOK_AHEAD: lanes}, {})
        leaves = access.read(tables, context, reads)
        rows = access.sides(params, leaves, context, reads, dropout)[_LOOK_AHEAD]
        pair_loss = self._pair_loss

        def lane_sum(rows: Any, *, held_out: bool) -> jax.Array:
            scores = candidate_scores(access.backbone, params, rows, context, lanes, dropout)
            if held_out:
                return jnp.sum(losses.bpr(scores[:, 2] - scores[:, 3]))
            difference = scores[:, 0] - scores[:, 1]
            return jnp.sum(pair_loss(difference, *jnp.ones((2, difference.size))))

        of_pair = jax.grad(lambda rows: lane_sum(rows, held_out=False))(rows)
        of_held_out = jax.grad(lambda rows: lane_sum(rows, held_out=True))(rows)
        products = jax.tree.map(
            lambda a, b: jnp.sum((a * b).reshape(a.shape[0], -1), axis=1), of_pair, of_held_out
        )
        gains = sum(jax.tree.leaves(products)) * held_out.weights
        size = self.layout.sum_over_all(jnp.stack([jnp.sum(gains**2), jnp.sum(gains != 0)]))
        return gains / jnp.maximum(jnp.sqrt(size[0] / jnp.maximum(size[1], 1.0)), 1e-12)

    @property
    def _pair_loss(self) -> Any:
        run = self.config
        return losses.guidance_pair_loss(run.guidance_loss_name, run.guidance.margin)

    def add(
        self,
        gate_params: Mapping[str, Any],
        preferred: Preferred,
        stochastic: Any,
        batch: Batch,
        seen: Seen,
        key: jax.Array,
    ) -> Added:
        """The loss of the batch's preferences, and what teaches the gate.

        Args:
          preferred: with its gradient.
          stochastic: (key, dropout rate) -> the logits of one stochastic pass.
        """
        layout, zero = self.layout, jnp.float32(0.0)
        scores = preferred.scores
        per_preference = 1.0 / (scores.shape[0] * layout.devices)

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values) * per_preference

        if batch.pref_targets is not None:
            matched = pairwise.pointwise(scores, batch.pref_targets)
            return Added(mean(matched.loss), zero, mean(matched.alpha), mean(matched.agrees))
        assert batch.pref_facts is not None
        inputs = pairwise.gate_inputs(
            *(self.config.gate, scores, stochastic, batch.pref_queries.users),
            *(batch.pref_margins / self.margin_scale, batch.pref_facts, key),
            members=seen.members,
        )
        alpha, prior = believed(self.gate, gate_params, inputs)
        found = pairwise.guided(alpha, prior, preferred.differences, self._pair_loss)
        guidance, supervised = mean(found.loss), zero
        if self.config.gate.gate == "budget":
            share = layout.sum_over_all(mean(jax.lax.stop_gradient(alpha)))
            guidance += mean(gates.budget_penalty(alpha, share, self.config.gate))
        variables = {"params": gate_params}
        if seen.answers is not None:
            assert batch.known is not None
            logits = self.gate.apply(variables, seen.answers, method="logits")
            assert isinstance(logits, jax.Array)
            every = layout.sum_over_all(jnp.sum(batch.known.weights))
            each = gates.calibration_loss(logits, batch.known.right)
            supervised = losses.masked_sum(each, batch.known.weights) / jnp.maximum(every, 1e-12)
        if seen.gains is not None:
            own = self.gate.apply(variables, inputs)
            supervised = -mean(jnp.asarray(own) * jax.lax.stop_gradient(seen.gains))
        return Added(guidance, supervised, mean(alpha), mean(found.agrees))


def believed(
    gate: gates.Gate, params: Mapping[str, Any], inputs: gates.GateInputs
) -> tuple[Float[Array, "G"], Float[Array, "G"]]:
    """alpha and alpha_0 of preferences; of a supervised gate by the parameters of the other half
    of the users, and detached."""
    variables = {"params": params}
    if isinstance(gate, gates.LogisticGate):
        other = inputs.replace(fold=1 - inputs.fold)  # type: ignore[attr-defined]
        logits = jnp.asarray(gate.apply(variables, other, method="logits"))
        found = jax.lax.stop_gradient(jax.nn.sigmoid(logits))
    else:
        found = jnp.asarray(gate.apply(variables, inputs))[None]
    return found[0], found[1] if found.shape[0] > 1 else jnp.full_like(found[0], 0.5)
