"""The one fused train step: draw, look up, score, differentiate rows, update rows.

    key     = fold_in(seed, step)
    batch   = draw(key)                        B triples (u, i, j), G preferences (u, a, b)
    rows    = lookup(tables, ids(batch))
    loss    = mean_B rec(s_ui, s_uj) + l2/2 mean_B |rows of the triple|^2
              + lambda mean_G pair(s_ua - s_ub, alpha) + what teaches the gate (supervision.py)
    params  = optax Adam on the mean loss
    tables  = row optimiser on B times the mean loss, i.e. on the sum over the batch

What is learned from interactions, and from which rows, is the objective's (objectives.py): a
triple for matrix factorisation and graphs, labelled rows for click prediction, whole windows of a
history for sequence models. The row gradients are those of the *sum* over the batch, so a row's
learning rate does not depend on how many other triples share its batch. Everything is a function of
(state, seed): resuming needs no iterator state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.guidance import gates
from slgr_jax.guidance.supervision import Seen, Supervision
from slgr_jax.mesh import Layout
from slgr_jax.models import embedding_table, losses
from slgr_jax.models.backbones import AnyBackbone, DotBackbone
from slgr_jax.models.row_access import Access, DotAccess, Leaves, Reads, Rows
from slgr_jax.models.scoring import Scoring, ServingState
from slgr_jax.sampling import arrays, negatives
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling.context import Context
from slgr_jax.training import objectives

Sums = dict[str, jax.Array]
# What is folded into a step's key for what teaches a gate; far above any device's number.
_FOR_ANSWERS = (1 << 31) + 1
# The number of the pass whose dropout all lanes share (a graph's edges).
_SHARED_PASS = 2
# Lanes (triples and preferences) drawn at once: enough that XLA's overhead per operation is small,
# few enough that what was drawn is still in a CPU's cache when it is used.
LANES_DRAWN = 1 << 16
# Sums over the steps of a dispatch; the host divides by `steps` (means over steps).
SUM_NAMES = (
    "steps",
    "loss",
    "rec_loss",
    "guidance_loss",
    "gate_loss",
    "accuracy",
    "alpha",
    "agreement",
    "triples",
    "preferences",
)


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: [] int32, steps done.
      tables: name -> [R', W] rows of values and optimiser slots (`embedding_table.RowFormat`).
      params: {"backbone": ..., "gate": ...} dense parameters.
      opt_state: optax state of `params`.
    """

    step: Int[Array, ""]
    tables: dict[str, jax.Array]
    params: dict[str, Any]
    opt_state: Any


@struct.dataclass
class Health:
    """Where training first went wrong.

    Attributes:
      step: [] int32, the first step whose rows, parameters or loss were not finite; -1: none.
      leaves: [] int32, bit k set if leaf k of `leaf_names` was not finite at that step.
    """

    step: Int[Array, ""]
    leaves: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled-in parts of a run: what is trained, how, and on which devices.

    `ensemble` holds the backbones of `Resident.ensemble`.
    """

    config: RunConfig
    backbone: AnyBackbone
    gate: gates.Gate
    plan: negatives.Plan
    layout: Layout
    reference_runs: tuple[AnyBackbone, ...] = ()

    @property
    def guided(self) -> bool:
        return self.plan.preferences > 0

    @property
    def gated(self) -> bool:
        return self.guided and self.config.gated

    @property
    def supervision(self) -> Supervision:
        """What guidance adds to the loss."""
        return Supervision(
            *(self.config, self.gate, self.access, self.layout, self.plan.margin_scale),
            *(self.reference_runs, self.plan.native),
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam for dense parameters; no weight decay, the gate least of all."""
        dense = optax.adam(self.config.optimizer.dense_lr)
        if not self.gated:
            return dense
        each = {"backbone": dense, "gate": optax.adam(self.config.gate_lr)}
        return optax.multi_transform(each, {name: name for name in each})

    @property
    def row_optimizer(self) -> embedding_table.RowOptimizer:
        return embedding_table.make_row_optimizer(self.config.optimizer)

    @functools.cached_property
    def objective(self) -> objectives.Objective:
        """What is learned from interactions."""
        return objectives.make_objective(self.config, self.backbone, self.plan)

    @property
    def access(self) -> Access:
        """Dot products where the CPU kernels can serve them all, rows otherwise."""
        backbone, objective, plan = self.backbone, self.objective, self.plan
        simple = isinstance(objective, objectives.Pairs) and objective.merged
        if (
            plan.native
            and simple
            and isinstance(backbone, DotBackbone)
            and backbone.factor_model is not None
            and backbone.dropout == 0
            and not plan.held_out  # a look-ahead step needs the rows
        ):
            width = backbone.tables[backbone.factor_model.user_table].width
            return DotAccess(backbone.factor_model, width, self.row_optimizer)
        return Rows(backbone, self.row_optimizer, self.layout, plan.native)

    @property
    def drawn_together(self) -> int:
        """S: steps whose batches are drawn at once, by programs over long vectors."""
        plan = self.plan
        return max(1, LANES_DRAWN // (plan.triples * max(plan.negatives, 1) + plan.preferences))

    @property
    def leaf_names(self) -> list[str]:
        """What `Health.leaves` refers to, bit by bit."""
        return [f"tables/{name}" for name in self.backbone.tables] + ["params", "loss"]


def init_state(trainer: Trainer, seed: int) -> TrainState:
    """A fresh state on the devices of the layout; the same values on any number of devices."""
    key = jax.random.key(seed)
    names = sorted(trainer.backbone.tables)
    keys = dict(zip(["", *names], jax.random.split(key, len(names) + 1), strict=True))
    optimizer, dtype = trainer.row_optimizer, trainer.config.optimizer.table_dtype
    made = {
        name: embedding_table.init_table(
            keys[name], trainer.backbone.tables[name], optimizer, trainer.layout, dtype
        )
        for name in names
    }

    def dense(key: jax.Array) -> tuple[dict[str, Any], Any]:
        for_backbone, for_gate = jax.random.split(key)
        params: dict[str, Any] = {"backbone": trainer.backbone.init(for_backbone), "gate": {}}
        if trainer.gated:
            params["gate"] = trainer.gate.init(for_gate, gates.empty_inputs()).get("params", {})
        return params, trainer.optimizer.init(params)

    params, opt_state = jax.jit(dense, out_shardings=trainer.layout.replicated)(keys[""])
    zero = jax.device_put(np.int32(0), trainer.layout.replicated)
    return TrainState(zero, made, params, opt_state)


RunSteps = Callable[
    [TrainState, arrays.DeviceArrays, jax.Array, jax.Array], tuple[TrainState, Sums, Health]
]


def make_run_steps(trainer: Trainer) -> RunSteps:
    """The jitted train program: (state, resident, seed key, K) -> (state', sums, health).

    K is a traced number, so one compilation serves every dispatch length. The state is donated.
    """
    # Stated, so that a dispatch's output is laid out as its input: otherwise the second call
    # would compile the program again.
    everywhere = trainer.layout.replicated
    like_input = TrainState(everywhere, trainer.layout.table_sharding, everywhere, everywhere)  # type: ignore[arg-type]
    return jax.jit(
        make_program(trainer),
        donate_argnums=0,
        out_shardings=(like_input, everywhere, everywhere),
        compiler_options=trainer.layout.compiler_options,
    )


def make_program(trainer: Trainer) -> RunSteps:
    """What `make_run_steps` compiles, un-jitted: `many.py` maps it over seeds."""

    def program(
        state: TrainState, resident: arrays.DeviceArrays, key: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Sums, Health]:
        slots = {
            name: jnp.zeros(trainer.layout.padded_rows(spec.rows), jnp.int32)
            for name, spec in trainer.backbone.tables.items()
        }
        slots = jax.lax.with_sharding_constraint(slots, trainer.layout.table_sharding)
        sums = {name: jnp.zeros((), jnp.float32) for name in SUM_NAMES}
        health = Health(jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32))

        def body(batch: batch_lib.Batch, keys: jax.Array, at: jax.Array, carry: Any) -> Any:
            state, slots, sums, health = carry
            mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, 0, False), batch)
            if trainer.plan.certain:  # a constant, so that nothing is masked or counted
                mine = mine.replace(weights=jnp.ones_like(mine.weights))
            state, slots, new, bad = train_step(trainer, state, slots, mine, resident, keys[at])
            sums = {name: sums[name] + new[name] for name in SUM_NAMES}
            first = (health.step < 0) & (bad > 0)
            health = Health(
                jnp.where(first, state.step - 1, health.step),
                jnp.where(first, bad, health.leaves),
            )
            return state, slots, sums, health

        together = trainer.drawn_together

        def some(number: jax.Array, carry: Any) -> Any:
            steps = carry[0].step + jnp.arange(together)
            keys = jax.vmap(lambda step: jax.random.split(jax.random.fold_in(key, step)))(steps)
            batch = batch_lib.draw(keys[:, 0], resident, trainer.plan)
            if trainer.layout.devices > 1:
                batch = jax.lax.with_sharding_constraint(batch, trainer.layout.batches_sharding)
            left = jnp.minimum(together, count - number * together)
            return jax.lax.fori_loop(0, left, functools.partial(body, batch, keys[:, 1]), carry)

        state, _, sums, health = jax.lax.fori_loop(
            0, -(-count // together), some, (state, slots, sums, health)
        )
        return state, sums, health

    return program


def train_step(
    trainer: Trainer,
    state: TrainState,
    slots: dict[str, jax.Array],
    batch: batch_lib.Batch,
    resident: arrays.DeviceArrays,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array], Sums, Int[Array, ""]]:
    """One step on one batch, pure and un-jitted; see the module's docstring."""
    layout = trainer.layout

    def local(*args: Any) -> Any:
        return _local_step(trainer, *args)

    if layout.devices > 1:
        whole = PartitionSpec()
        rows = layout.table_spec
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(rows, rows, whole, whole, layout.batch_spec, whole, whole, whole, whole),
            out_specs=(rows, rows, whole, whole, whole, whole),
            check_vma=False,  # replicas of a table see the same gathered updates
        )
    new_tables, slots, params, opt_state, sums, bad = local(
        *(state.tables, slots, state.params, state.opt_state),
        *(batch, resident.interactions, resident.context, resident.reference_runs, key),
    )
    return TrainState(state.step + 1, new_tables, params, opt_state), slots, sums, bad


def _local_step(
    trainer: Trainer,
    state_tables: dict[str, jax.Array],
    slots: dict[str, jax.Array],
    params: dict[str, Any],
    opt_state: Any,
    batch: batch_lib.Batch,
    interactions: arrays.Interactions,
    context: Context,
    reference_runs: tuple[Scoring, ...],
    key: jax.Array,
) -> tuple[Any, ...]:
    """The step of one device on its part of the batch."""
    layout, access = trainer.layout, trainer.access
    for_rounding = key
    if layout.devices > 1:
        key = jax.random.fold_in(key, layout.device_index())
    if batch.shared is not None:
        batch = batch.replace(shared=layout.gather_over_all(batch.shared))  # type: ignore[attr-defined]
    reads = trainer.objective.reads(batch, context)
    leaves = access.read(state_tables, context, reads)
    for_pass, for_gate = jax.random.split(key)
    for_answers = jax.random.fold_in(key, _FOR_ANSWERS)
    seen = Seen()
    if trainer.gated:
        rate = trainer.backbone.dropout
        dropout = (rate, jax.random.fold_in(for_answers, 1)) if rate > 0 else None
        seen = trainer.supervision.see(
            *(state_tables, params["backbone"], batch, context),
            *(dropout, for_answers, reference_runs),
        )
    part = _Part(batch, reads, interactions, context, seen, for_pass, for_gate)

    def objective(params: dict[str, Any], leaves: Leaves) -> tuple[jax.Array, Sums]:
        return _objective(trainer, params, leaves, part)

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, sums), (params_grad, leaves_grad) = grad(params, leaves)
    counts = {name: sums.pop(name) for name in ("triples", "preferences")}
    loss, sums, params_grad = layout.sum_over_all((loss, sums, params_grad))
    found = access.finite(leaves)
    finite = [_everywhere(layout, found[name]) for name in trainer.backbone.tables]
    finite.append(_all_finite(params))
    finite.append(jnp.isfinite(loss))
    bad = sum(jnp.where(flag, 0, 1 << bit) for bit, flag in enumerate(finite))

    summed = jax.tree.map(lambda g: g * jnp.maximum(counts["triples"], 1.0), leaves_grad)
    new_tables, new_slots = access.write(state_tables, slots, context, reads, summed, for_rounding)
    updates, opt_state = trainer.optimizer.update(params_grad, opt_state, params)
    params = optax.apply_updates(params, updates)
    sums = {"steps": jnp.float32(1.0), "loss": loss, **counts, **sums}
    return new_tables, new_slots, params, opt_state, sums, bad


def _everywhere(layout: Layout, flag: jax.Array) -> jax.Array:
    return layout.sum_over_all(jnp.where(flag, 0.0, 1.0)) == 0.0


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the loss of one device's part of a batch is computed from, besides what is trained."""

    batch: batch_lib.Batch
    reads: Reads
    interactions: arrays.Interactions
    context: Context
    seen: Seen
    for_pass: jax.Array
    for_gate: jax.Array


def _objective(
    trainer: Trainer, params: dict[str, Any], leaves: Leaves, part: _Part
) -> tuple[Float[Array, ""], Sums]:
    """This device's share of the loss: the sum over devices is the loss of the batch.

    The sums also hold `triples` and `preferences`, over all devices.
    """
    config, access, objective = trainer.config, trainer.access, trainer.objective
    batch, rate, layout = part.batch, trainer.backbone.dropout, trainer.layout
    own = params["backbone"]
    inputs = objectives.Inputs(
        *(batch, part.context, part.interactions, own),
        *(rate, config.loss.negatives_per_positive, part.for_pass),
    )
    view = access.view(own, leaves, part.context, part.reads, inputs.pass_(_SHARED_PASS))
    learned = objective.learn(view, inputs)
    preferences = jnp.float32(batch.pref_items.shape[0])
    counts = {"triples": learned.count, "preferences": preferences}
    counts = layout.sum_over_all(jax.lax.stop_gradient(counts))
    per_triple = 1.0 / jnp.maximum(counts["triples"], 1.0)
    rec = learned.loss * per_triple
    penalty = jnp.float32(0.0)
    if config.optimizer.l2 > 0:
        squares = access.squares(leaves, part.context, part.reads)
        for name in objective.penalised:
            lanes = squares[name][: batch.weights.shape[0]]
            penalty += losses.masked_sum(lanes, batch.weights) * per_triple
        penalty = 0.5 * config.optimizer.l2 * penalty
    sums = {
        **counts,
        "rec_loss": rec,
        "accuracy": learned.right * per_triple,
        **dict.fromkeys(("guidance_loss", "gate_loss", "alpha", "agreement"), jnp.float32(0.0)),
    }
    if not trainer.guided:
        return rec + penalty, sums
    preferred = objective.preferences(view, inputs)

    def stochastic(key: jax.Array, rate: float) -> jax.Array:
        again = access.view(own, leaves, part.context, part.reads, (rate, key))
        return again.scores(objectives.PREFERENCES, (rate, key))

    added = trainer.supervision.add(
        *(params["gate"], preferred, stochastic, batch, part.seen, part.for_gate),
    )
    sums |= {"guidance_loss": added.guidance, "gate_loss": added.gate}
    sums |= {"alpha": added.alpha, "agreement": added.agreement}
    return rec + penalty + config.guidance.weight * added.guidance + added.gate, sums


def make_serving_state(trainer: Trainer) -> Callable[[TrainState, Context], ServingState]:
    """Jitted: what serving needs out of a train state."""
    backbone = trainer.backbone

    def pick(state: TrainState, context: Context) -> ServingState:
        params = state.params["backbone"]
        values = {
            name: embedding_table.values_of(state.tables[name], spec)
            for name, spec in backbone.tables.items()
        }
        if isinstance(backbone, DotBackbone) and backbone.whole:
            values = backbone.propagate(params, values, context)
        return ServingState(params, values, state.params["gate"])

    return jax.jit(pick)
