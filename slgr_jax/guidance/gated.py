"""What guidances have in common whose loss is a sum over (preferred, other) pairs under a gate.

A subclass draws pairs and states the loss of each; the gate, what supervises it, and the means over
devices are here. Global distillation is a subclass with --gate=constant.

Shape letters: G queries, P pairs (G where a query is one pair); the axis of length 2 is (preferred,
other).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import teacher_product
from slgr_jax.guidance.base import Frozen, GuidanceLoss, Sources, mean_over_queries
from slgr_jax.guidance.gating import GateArrays, Gating, Observed, Stochastic
from slgr_jax.mesh import Layout, UserShards
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.row_access import Masked
from slgr_jax.sampling import user_shards
from slgr_jax.sampling.arrays import Facts
from slgr_jax.sampling.context import Histories
from slgr_jax.sampling.labelled_preferences import LabelledPreferences
from slgr_jax.sampling.negatives import Generators
from slgr_jax.sampling.preferences import Preferences
from slgr_jax.sampling.teacher_arrays import PreferenceRule, TeacherLists, TeacherPairs

Pairs = TypeVar("Pairs", Preferences, LabelledPreferences)
Method = TypeVar("Method", bound="Gated")


@struct.dataclass
class GatedArrays:
    """The teacher's preferences, and what the gate learns from."""

    teacher: TeacherLists | TeacherPairs
    gate: GateArrays


@struct.dataclass
class GatedDraw:
    """What S steps train on.

    Attributes:
      pairs: what the gate weighs, and what is known of each.
      labelled: what supervises it; None where nothing does.
    """

    pairs: Preferences
    labelled: LabelledPreferences | None


@dataclasses.dataclass(frozen=True)
class Gated:
    """The shared half of a `Guidance`; a subclass has `queries`, `width`, `draw`, `candidates` and
    `loss`.

    Attributes:
      draws_entries: its preferences say where in the teacher's lists their items are.
    """

    run: RunConfig
    gating: Gating
    native: bool = False

    draws_entries = False
    reads_vectors = False
    metrics = ("alpha", "agreement")
    queries_knob = "--preferences_per_step"

    @property
    def learning_rate(self) -> float:
        return self.run.gate_lr

    @property
    def reads_stochastic(self) -> bool:
        return self.run.gate.uncertainty == "dropout"

    @property
    def rule(self) -> PreferenceRule:
        """How preferences are drawn."""
        return teacher_product.preference_rule(self.run, native=self.native)

    def teacher_arrays(self, sources: Sources) -> TeacherLists | TeacherPairs:
        """The teacher as this guidance reads it (host arrays)."""
        return teacher_product.teacher_arrays(sources)

    def scored_lists(self, sources: Sources) -> TeacherLists:
        """The product of a guidance that learns scores, or the order of a list.

        Raises:
          ConfigError: the teacher states pairs.
        """
        teacher = teacher_product.teacher_arrays(sources)
        if not isinstance(teacher, TeacherLists):
            raise ConfigError(
                f"--guidance={self.run.guidance.guidance} learns scores, and teacher "
                f"{self.run.guidance.teacher} states pairs; use --guidance=pairwise"
            )
        return teacher

    def arrays(self, sources: Sources) -> tuple[Any, Csr | None]:
        teacher = self.teacher_arrays(sources)
        gate, left_out = self.gating.arrays(sources, teacher, entries=self.draws_entries)
        return GatedArrays(teacher, gate), left_out

    def deal(self, arrays: GatedArrays, shards: UserShards) -> GatedArrays:
        """Its host arrays, dealt out to shards of users."""
        assert not arrays.gate.reference_runs, "config.RunConfig refuses them"
        labels = arrays.gate.labels
        if labels is not None:
            labels = user_shards.deal_labels(labels, arrays.teacher, shards)
        teacher = user_shards.deal_teacher(arrays.teacher, shards)
        return dataclasses.replace(arrays, teacher=teacher, gate=GateArrays(labels, ()))

    def of_shard(self: Method, count: int) -> Method:
        """What draws the lanes of one of so many shards of users."""
        run, gate = self.run, self.run.gate
        labelled = run.labelled_per_step // count
        run = dataclasses.replace(
            run,
            guidance=dataclasses.replace(
                run.guidance, preferences_per_step=run.preferences_per_step // count
            ),
            gate=dataclasses.replace(gate, labelled_per_step=labelled) if labelled else gate,
        )
        return dataclasses.replace(self, run=run, gating=dataclasses.replace(self.gating, run=run))

    def init(self, key: jax.Array, backbone: AnyBackbone) -> dict[str, Any]:
        return self.gating.init(key)

    def masked(self, params: Mapping[str, Any], drawn: Any, layout: Layout) -> Masked:
        return {}

    def draw_labelled(
        self,
        words_of: Generators,
        arrays: GatedArrays,
        facts: Facts,
        histories: Histories | None,
    ) -> LabelledPreferences | None:
        """The labelled preferences of S steps."""
        labelled = self.gating.draw(
            words_of.third, arrays.gate, arrays.teacher, facts, histories, self.rule
        )
        return None if labelled is None else self.as_asked(labelled, arrays)

    def as_asked(self, pairs: Pairs, arrays: GatedArrays) -> Pairs:
        """Drawn pairs without their entries, where the gate looks nothing up by them."""
        asked = arrays.gate.entry_scores is not None or arrays.gate.knowledge is not None
        return pairs if asked else pairs.replace(entries=None)  # type: ignore[attr-defined]

    def gate_pairs(self, drawn: Any) -> Preferences:
        """The [P] pairs of one step that the gate weighs."""
        pairs: Preferences = drawn.pairs
        return pairs

    def observe(self, frozen: Frozen, drawn: Any, arrays: Any, key: jax.Array) -> Observed:
        pairs = self.gate_pairs(drawn)
        return self.gating.observe(
            frozen,
            pairs,
            drawn.labelled,
            arrays.teacher.margin_scale,
            arrays.gate,
            key,
        )

    def believe(
        self,
        params: Mapping[str, Any],
        scores: Float[Array, "P 2"],
        stochastic: Stochastic,
        drawn: Any,
        observed: Observed,
        key: jax.Array,
    ) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
        """alpha and the prior of a step's pairs, from the recommender's logits of both items."""
        return self.gating.believe(
            params, self.gate_pairs(drawn), scores, stochastic, observed, key
        )

    def added(
        self,
        params: Mapping[str, Any],
        pair_loss: Float[Array, "P"],
        alpha: Float[Array, "P"],
        agrees: Bool[Array, "P"],
        drawn: Any,
        observed: Observed,
        layout: Layout,
    ) -> GuidanceLoss:
        """The means over all devices' pairs, with a budget's penalty and the gate's own loss."""
        weights = self.gate_pairs(drawn).weights
        loss = mean_over_queries(pair_loss, layout, weights)
        penalty = self.gating.penalty(alpha, layout, weights)
        if penalty is not None:
            loss += penalty
        return GuidanceLoss(
            loss,
            self.gating.supervise(params, drawn.labelled, observed, layout),
            {
                "alpha": mean_over_queries(alpha, layout, weights),
                "agreement": mean_over_queries(agrees.astype(jnp.float32), layout, weights),
            },
        )
