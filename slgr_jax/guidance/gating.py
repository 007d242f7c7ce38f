"""A gate at work in a step: what it reads of preferences, how far it believes, what supervises it.

Any guidance whose loss is a sum over (preferred, other) pairs weighs them by `Gating.believe`.

    budget        + budget_weight (mean alpha - rho)^2, times lambda
    supervised    + mean_K cross-entropy(alpha, the teacher is right) over labelled preferences, and
                  of the prior likewise (`gates.LogisticGate`); lambda does not weigh it

Supervised gates use the parameters of the other half of the users (`gates.LogisticGate`) and get no
gradient from the gated loss, which would only teach them to fall.

Shape letters: G preferences, K labelled preferences, M reference runs, N queries; the axis of
length 2 is (preferred, other).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.guidance import gates, teacher_knowledge, teacher_product
from slgr_jax.guidance.base import Frozen, Sources, mean_over_queries
from slgr_jax.guidance.teacher_knowledge import Knowledge, PairKnowledge
from slgr_jax.kernels import cpu
from slgr_jax.mesh import Layout
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import Scoring, reference_scores
from slgr_jax.sampling.arrays import Facts, PairFacts, host_array
from slgr_jax.sampling.context import Histories, Queries
from slgr_jax.sampling.labelled_preferences import LabelledPreferences, LabelSource, draw_labelled
from slgr_jax.sampling.preferences import Preferences
from slgr_jax.sampling.teacher_arrays import PreferenceRule, TeacherLists, TeacherPairs

# Entries of lists that reference runs score at once.
_ENTRIES_AT_ONCE = 1 << 18

Stochastic = Callable[[jax.Array, float], Float[Array, "G 2"]]


@struct.dataclass
class GateArrays:
    """What a gate learns from and looks up.

    Attributes:
      labels: what supervises it; None where nothing does.
      reference_runs: what the runs that it reads score with, as of the end of training; () where
        `entry_scores` has all that they would be asked.
      entry_scores: [M, E] their logits of the entries of the teacher's lists, where every
        preference is of two entries; None otherwise.
      knowledge: what the gate reads of how much the teacher knows; None where it does not.
    """

    labels: LabelSource | None
    reference_runs: tuple[Scoring, ...]
    entry_scores: Float[Array, "M E"] | None = None
    knowledge: Knowledge | None = None


@struct.dataclass
class Observed:
    """What a gate is told that carries no gradient.

    Attributes:
      margin_scale: a typical teacher margin, in which gates read them.
      labelled: a gate's inputs for the labelled preferences; None without any.
      reference_scores: [M, G, 2] logits of the preferences by the reference runs; None without any.
      knowledge: what the teacher knows of the preferences; None where the gate does not read it.
    """

    margin_scale: float = struct.field(pytree_node=False)
    labelled: gates.GateInputs | None = None
    reference_scores: Float[Array, "M G 2"] | None = None
    knowledge: PairKnowledge | None = None


@dataclasses.dataclass(frozen=True)
class Gating:
    """The gate of a run; see the module's docstring.

    Attributes:
      labelled: K, labelled preferences drawn a step; 0 without a supervised gate.
      reference_backbones: of the runs whose scores the gate reads.
      native: whether the CPU kernels draw and read rows.
    """

    run: RunConfig
    reference_backbones: tuple[AnyBackbone, ...] = ()
    native: bool = False

    @property
    def gate(self) -> gates.Gate:
        return gates.make_gate(self.run.gate)

    @property
    def labelled(self) -> int:
        return self.run.labelled_per_step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The gate's parameters."""
        return dict(self.gate.init(key, gates.empty_inputs()).get("params", {}))

    def arrays(
        self, sources: Sources, teacher: TeacherLists | TeacherPairs, *, entries: bool = False
    ) -> tuple[GateArrays, Csr | None]:
        """Host arrays, and the training interactions that the gate is supervised by.

        Args:
          entries: whether preferences say which entries of the lists they are of.
        """
        labels, left_out = teacher_product.labelled_arrays(sources, teacher)
        known = teacher_knowledge.arrays(sources.run, sources.dataset, teacher, entries=entries)
        if not self.reference_backbones:
            return GateArrays(labels, (), knowledge=known), left_out
        runs = tuple(scoring for _, scoring in sources.reference_runs)
        # A finished run scores the same all through training: what can be asked is asked once.
        if entries and isinstance(teacher, TeacherLists) and teacher.unlisted is None:
            return GateArrays(labels, (), self._entry_scores(runs, teacher), known), left_out
        return GateArrays(labels, runs, knowledge=known), left_out

    def _entry_scores(
        self, reference_runs: tuple[Scoring, ...], teacher: TeacherLists
    ) -> Float[Array, "M E"]:
        """Logits of every entry of the lists (a host array), in chunks of bounded memory."""

        @jax.jit
        def chunk(runs: tuple[Scoring, ...], users: jax.Array, items: jax.Array) -> jax.Array:
            backbones = self.reference_backbones
            scores = reference_scores(backbones, runs, users, items[:, None], native=self.native)
            return scores[..., 0]

        counts = np.diff(np.asarray(teacher.offsets))
        users = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
        items = np.asarray(teacher.items)
        size = min(_ENTRIES_AT_ONCE, items.size)
        scores = np.empty((len(reference_runs), items.size), np.float32)
        for end in range(size, items.size + size, size):
            # The last chunk repeats some of the one before: one program serves all.
            at = slice(min(end, items.size) - size, min(end, items.size))
            scores[:, at] = chunk(reference_runs, users[at], items[at])
        return host_array(scores, np.float32)

    def draw(
        self,
        words_of: UInt32[Array, "S 2"],
        arrays: GateArrays,
        teacher: TeacherLists | TeacherPairs,
        facts: Facts,
        histories: Histories | None,
        rule: PreferenceRule,
    ) -> LabelledPreferences | None:
        """The labelled preferences of S steps; None without any."""
        if arrays.labels is None:
            return None
        return draw_labelled(
            words_of,
            arrays.labels,
            teacher,
            facts,
            dataclasses.replace(rule, count=self.labelled),
            histories=histories is not None,
        )

    def observe(
        self,
        frozen: Frozen,
        pairs: Preferences,
        labelled: LabelledPreferences | None,
        margin_scale: float,
        arrays: GateArrays,
        key: jax.Array,
    ) -> Observed:
        """Score labelled preferences, and ask the reference runs; no gradient, nothing updated.

        Args:
          pairs: the preferences that the gate will weigh.
        """
        inputs = None
        if labelled is not None:
            scores = frozen.scorer(Candidates(labelled.queries, labelled.items))
            inputs = gate_inputs(
                self.run,
                scores(frozen.dropout),
                lambda key, rate: scores((rate, key)),
                labelled.queries.users,
                labelled.margins / margin_scale,
                labelled.facts,
                key,
                self._of_reference_runs(arrays, labelled),
                self._known(arrays, labelled),
            )
        return Observed(
            margin_scale,
            inputs,
            self._of_reference_runs(arrays, pairs),
            self._known(arrays, pairs),
        )

    def _known(
        self, arrays: GateArrays, pairs: Preferences | LabelledPreferences
    ) -> PairKnowledge | None:
        """What the teacher knows of both items."""
        return teacher_knowledge.at(
            arrays.knowledge, pairs.items, pairs.entries, native=self.native
        )

    def _of_reference_runs(
        self, arrays: GateArrays, pairs: Preferences | LabelledPreferences
    ) -> Float[Array, "M N 2"] | None:
        """Logits of both items by each reference run, looked up where they are known."""
        if arrays.entry_scores is None:
            return self.ask_reference_runs(arrays.reference_runs, pairs.queries, pairs.items)
        entries = pairs.entries
        assert entries is not None, "a guidance that says it draws entries gives them"
        if self.native:
            return jnp.stack([cpu.take(of_run, entries) for of_run in arrays.entry_scores])
        return arrays.entry_scores[:, entries]

    def ask_reference_runs(
        self, reference_runs: tuple[Scoring, ...], queries: Queries, items: Int[Array, "N 2"]
    ) -> Float[Array, "M N 2"] | None:
        """Logits of both items by each reference run; None without any."""
        if not self.reference_backbones:
            return None
        return reference_scores(
            self.reference_backbones, reference_runs, queries.users, items, native=self.native
        )

    def believe(
        self,
        params: Mapping[str, Any],
        preferences: Preferences,
        scores: Float[Array, "G 2"],
        stochastic: Stochastic,
        observed: Observed,
        key: jax.Array,
    ) -> tuple[Float[Array, "G"], Float[Array, "G"]]:
        """alpha and the prior of preferences; 1/2 where a gate has no prior.

        Args:
          scores: the recommender's logits of both items.
          stochastic: (key, dropout rate) -> the logits of one stochastic pass.
        """
        inputs = gate_inputs(
            self.run,
            scores,
            stochastic,
            preferences.queries.users,
            preferences.margins / observed.margin_scale,
            preferences.facts,
            key,
            observed.reference_scores,
            observed.knowledge,
        )
        return self.alpha_and_prior(params, inputs)

    def alpha_and_prior(
        self, params: Mapping[str, Any], inputs: gates.GateInputs
    ) -> tuple[Float[Array, "G"], Float[Array, "G"]]:
        """Of a supervised gate by the parameters of the other half of the users, and detached."""
        gate = self.gate
        if self.run.gate.supervised:
            if self.native and isinstance(gate, gates.LogisticGate):
                gate = gate.clone(native=True)
            variables = {"params": jax.lax.stop_gradient(params)}
            other_fold = inputs.replace(fold=1 - inputs.fold)  # type: ignore[attr-defined]
            logits = jnp.asarray(gate.apply(variables, other_fold, method="logits"))
            beliefs = jax.nn.sigmoid(logits)
        else:
            beliefs = jnp.asarray(gate.apply({"params": params}, inputs))[None]
        prior = beliefs[1] if beliefs.shape[0] > 1 else jnp.full_like(beliefs[0], 0.5)
        return beliefs[0], prior

    def penalty(
        self, alpha: Float[Array, "G"], layout: Layout, weights: Float[Array, "G"] | None = None
    ) -> Float[Array, ""] | None:
        """This device's share of what holds the mean of alpha at its budget; None without one.

        Args:
          weights: as of `Preferences`.
        """
        if self.run.gate.gate != "budget":
            return None
        detached = jax.lax.stop_gradient(alpha)
        mean = layout.sum_over_all(mean_over_queries(detached, layout, weights))
        penalties = gates.budget_penalty(alpha, mean, self.run.gate)
        return mean_over_queries(penalties, layout, weights)

    def supervise(
        self,
        params: Mapping[str, Any],
        labelled: LabelledPreferences | None,
        observed: Observed,
        layout: Layout,
    ) -> Float[Array, ""]:
        """This device's share of the cross-entropy over the labelled preferences of a step."""
        if labelled is None or observed.labelled is None:
            return jnp.float32(0.0)
        logits = self.gate.apply({"params": params}, observed.labelled, method="logits")
        total = layout.sum_over_all(jnp.sum(labelled.weights))
        each = gates.calibration_loss(jnp.asarray(logits), labelled.right)
        return losses.masked_sum(each, labelled.weights) / jnp.maximum(total, 1e-12)


def gate_inputs(
    run: RunConfig,
    scores: Float[Array, "G 2"],
    stochastic: Stochastic,
    users: Int[Array, "G"],
    margins: Float[Array, "G"],
    facts: PairFacts,
    key: jax.Array,
    reference_scores: Float[Array, "M G 2"] | None = None,
    knowledge: PairKnowledge | None = None,
) -> gates.GateInputs:
    """What a gate may see of preferences, detached from the recommender.

    Args:
      scores: logits of both items.
      stochastic: (key, dropout rate) -> the logits of one stochastic pass.
      margins: the teacher's, over a typical one.
      reference_scores: logits of both items by each reference run, where there are any.
      knowledge: what the teacher knows of both items, where the gate reads it.
    """
    config = run.gate
    if config.uncertainty == "ensemble":
        assert reference_scores is not None, "the spread is that of the reference runs"
        uncertainty = gates.variance_uncertainty(reference_scores)
    elif config.uncertainty == "dropout":
        keys = jax.random.split(key, config.dropout_samples)
        samples = jax.vmap(lambda sample: stochastic(sample, config.dropout_rate))(keys)
        uncertainty = gates.variance_uncertainty(samples)
    elif config.uncertainty == "entropy":
        uncertainty = gates.entropy_uncertainty(scores)
    else:
        uncertainty = gates.confidence_uncertainty(scores)

    reference_margin = jnp.zeros_like(margins)
    if reference_scores is not None:
        reference_margin = jnp.mean(reference_scores[..., 0] - reference_scores[..., 1], axis=0)
    if knowledge is None:
        unread = jnp.zeros_like(scores)
        knowledge = PairKnowledge(unread, unread, unread)
    inputs = gates.GateInputs(
        history=facts.log_history,
        popularity=facts.log_popularity,
        cold=facts.cold,
        tail=facts.tail,
        uncertainty=uncertainty,
        score_margin=scores[:, 0] - scores[:, 1],
        teacher_margin=margins,
        reference_margin=reference_margin,
        votes=knowledge.votes,
        confidence=knowledge.confidence,
        named=knowledge.named,
        fold=gates.folds(users) if facts.fold is None else facts.fold,
    )
    return jax.tree.map(jax.lax.stop_gradient, inputs)
