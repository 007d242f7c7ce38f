"""The one fused train step: draw, look up, score, differentiate rows, update rows.

    key     = fold_in(seed, step)
    batch   = draw(key)                        B triples (u, i, j)
    drawn   = guidance.draw(key)               G queries with C candidates
    rows    = lookup(tables, ids(batch, drawn))
    loss    = mean_B rec(s_ui, s_uj) + l2/2 mean_B |rows of the triple|^2
              + lambda guidance.loss + what supervises its gate
              + what a backbone loses by itself (`LosesBeside`)
    params  = optax Adam on the mean loss
    tables  = row optimiser on B times the mean loss, i.e. on the sum over the batch

What is learned from interactions, and from which rows, is the objective's (objectives.py): a
triple for matrix factorisation and graphs, labelled rows for click prediction, whole windows of a
history for sequence models. What is learned from an LLM product is the guidance's
(guidance/base.py). The row gradients are those of the *sum* over the batch, so a row's learning
rate does not depend on how many other triples share its batch. Everything is a function of
(state, seed): resuming needs no iterator state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slgr_jax.guidance.base import Frozen, Scored
from slgr_jax.mesh import Layout
from slgr_jax.models import losses
from slgr_jax.models.backbones.base import LosesBeside
from slgr_jax.models.candidates import Candidates, Vectors
from slgr_jax.models.dot_access import BroadcastDotAccess, DotAccess
from slgr_jax.models.row_access import Access, Leaves, Masked, Reads, RowAccess
from slgr_jax.sampling import user_context
from slgr_jax.sampling.arrays import DeviceArrays, Interactions
from slgr_jax.sampling.batch import Batch, draw
from slgr_jax.sampling.negatives import SamplingPlan, generators
from slgr_jax.training import objectives, score_rings, shard_draws
from slgr_jax.training.score_rings import NewScores, Rings
from slgr_jax.training.state import Learner, TrainState, rings_of

Sums = dict[str, jax.Array]
# What a loss comes with: sums, and what is to be remembered of its scores.
Aside = tuple[Sums, NewScores | None]
# Salt of the key of what supervises a gate.
_FOR_OBSERVING = (1 << 31) + 1
# The number of the pass whose dropout all candidates share (a graph's edges).
_SHARED_PASS = 2
# Triples and guidance's pairs drawn at once: enough that XLA's overhead per operation is small,
# few enough that what was drawn is still in a CPU's cache when it is used.
DRAWN_AT_ONCE = 1 << 16
# Sums over the steps of a dispatch; the host divides by `steps` (means over steps).
LOST = "reconstruction_loss"
SUM_NAMES = ("steps", "loss", "rec_loss", "accuracy", "triples")


@struct.dataclass
class Health:
    """Where training first went wrong.

    Attributes:
      step: [] int32, the first step whose rows, parameters or loss were not finite; -1: none.
      leaves: [] int32, bit k set if leaf k of `Learner.leaf_names` was not finite at that step.
    """

    step: Int[Array, "*N"]
    leaves: Int[Array, "*N"]


@dataclasses.dataclass(frozen=True)
class Trainer(Learner):
    """The compiled-in parts of a run: a `Learner`, and what its steps draw."""

    plan: SamplingPlan

    @functools.cached_property
    def objective(self) -> objectives.Objective:
        """What is learned from interactions."""
        return objectives.make_objective(
            self.config, self.backbone, self.guidance, self.plan, self.layout
        )

    @property
    def access(self) -> Access:
        """Dot products where they are all that is needed and the CPU kernels can serve them, or
        spare several devices the gradients of rows; rows otherwise."""
        objective, layout = self.objective, self.layout
        merged = isinstance(objective, objectives.Triples) and objective.merged
        model, native = objectives.dot_model(self.backbone), self.plan.native
        if merged and model is not None:
            width = self.backbone.tables[model.user_table].width
            if native:
                return DotAccess(model, width, self.row_optimizer)
            if layout.devices > 1 and layout.table_shards == 1:
                return BroadcastDotAccess(model, width, self.row_optimizer, layout)
        vector_l2 = self.config.vectors.vector_l2
        return RowAccess(self.backbone, self.row_optimizer, layout, native, vector_l2)

    @property
    def guidance_pairs(self) -> int:
        """Pairs of candidates that a step scores for its guidance."""
        guidance = self.guidance
        return 0 if guidance is None else guidance.queries * -(-guidance.width // 2)

    @property
    def drawn_together(self) -> int:
        """S: steps whose batches are drawn at once, by programs over long vectors."""
        plan = self.plan
        drawn = plan.triples * max(plan.negatives, 1) + self.guidance_pairs
        return max(1, DRAWN_AT_ONCE // drawn)

    @property
    def sum_names(self) -> tuple[str, ...]:
        """What a step reports."""
        backbone = self.backbone
        loses = isinstance(backbone, LosesBeside) and backbone.lost_weight
        of_rows = (*SUM_NAMES, *self.objective.metrics, *((LOST,) if loses else ()))
        if self.guidance is None:
            return of_rows
        return (
            *of_rows,
            "guidance_loss",
            "gate_loss",
            *self.guidance.metrics,
        )


RunSteps = Callable[
    [TrainState, DeviceArrays, jax.Array, jax.Array], tuple[TrainState, Sums, Health]
]


def by_rows(arrays: DeviceArrays, layout: Layout) -> DeviceArrays:
    """The specs of the device arrays: vectors as tables are, what is dealt out as users are,
    everything else whole."""
    specs_of = shard_draws.specs_of
    return DeviceArrays(
        specs_of(arrays.interactions, layout),
        user_context.specs(arrays.context, layout),
        specs_of(arrays.guidance, layout),
    )


def make_run_steps(trainer: Trainer) -> RunSteps:
    """The jitted train program: (state, device arrays, seed key, K) -> (state', sums, health).

    K is a traced number, so one compilation serves every dispatch length. The state is donated.
    """
    # Stated, so that a dispatch's output is laid out as its input: otherwise the second call
    # would compile the program again.
    everywhere = trainer.layout.replicated
    return jax.jit(
        make_program(trainer),
        donate_argnums=0,
        out_shardings=(trainer.state_layout, everywhere, everywhere),
        compiler_options=trainer.layout.compiler_options,
    )


def make_program(trainer: Trainer) -> RunSteps:
    """What `make_run_steps` compiles, un-jitted: `multi_seed.py` maps it over seeds."""

    def program(
        state: TrainState, arrays: DeviceArrays, key: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Sums, Health]:
        layout = trainer.layout
        slots = {
            name: jnp.zeros(layout.table_rows(spec.rows, of_users=spec.of_users), jnp.int32)
            for name, spec in trainer.backbone.tables.items()
        }
        slots = jax.lax.with_sharding_constraint(slots, trainer.table_shardings)
        sums = {name: jnp.zeros((), jnp.float32) for name in trainer.sum_names}
        health = Health(jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32))

        def body(drawn: Any, keys: jax.Array, at: jax.Array, carry: Any) -> Any:
            state, slots, sums, health = carry
            batch, guided = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, at, 0, False), drawn
            )
            if trainer.plan.every_negative:  # a constant, so that nothing is masked or counted
                batch = batch.replace(weights=jnp.ones_like(batch.weights))
            state, slots, new, bad = train_step(
                trainer, state, slots, batch, guided, arrays, keys[at]
            )
            sums = {name: sums[name] + new[name] for name in sums}
            first = (health.step < 0) & (bad > 0)
            health = Health(
                jnp.where(first, state.step - 1, health.step),
                jnp.where(first, bad, health.leaves),
            )
            return state, slots, sums, health

        together = trainer.drawn_together

        def some_steps(number: jax.Array, carry: Any) -> Any:
            steps = carry[0].step + jnp.arange(together)
            keys = jax.vmap(lambda step: jax.random.split(jax.random.fold_in(key, step)))(steps)
            drawn = draw_steps(trainer, keys[:, 0], arrays)
            if layout.devices > 1:
                drawn = jax.lax.with_sharding_constraint(drawn, layout.batches_sharding)
            left = jnp.minimum(together, count - number * together)
            return jax.lax.fori_loop(0, left, functools.partial(body, drawn, keys[:, 1]), carry)

        state, _, sums, health = jax.lax.fori_loop(
            0, -(-count // together), some_steps, (state, slots, sums, health)
        )
        return state, sums, health

    return program


def draw_steps(trainer: Trainer, keys: jax.Array, arrays: DeviceArrays) -> tuple[Batch, Any]:
    """The batches of S steps, and what the guidance draws for them; each step by its own key."""
    if trainer.layout.users is not None:
        return shard_draws.draw_own(trainer.layout, trainer.plan, trainer.guidance, keys, arrays)
    of_triples, of_guidance = generators(keys)
    interactions = arrays.interactions
    assert isinstance(interactions, Interactions)
    batch = draw(of_triples, interactions, trainer.plan)
    if trainer.guidance is None:
        return batch, None
    histories = arrays.context.histories
    return batch, trainer.guidance.draw(of_guidance, arrays.guidance, interactions, histories)


def train_step(
    trainer: Trainer,
    state: TrainState,
    slots: dict[str, jax.Array],
    batch: Batch,
    guided: Any,
    arrays: DeviceArrays,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array], Sums, Int[Array, ""]]:
    """One step on one batch, pure and un-jitted; see the module's docstring."""
    layout = trainer.layout

    def local(*args: Any) -> Any:
        return _local_step(trainer, *args)

    if layout.devices > 1:
        whole, lanes = PartitionSpec(), layout.batch_spec
        rows = {name: each.spec for name, each in trainer.table_shardings.items()}
        read = by_rows(arrays, layout)
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(rows, rows, whole, whole, whole, lanes, lanes, read, whole, whole),
            out_specs=(rows, rows, whole, whole, whole, whole, whole),
            check_vma=False,  # replicas of a table see the same gathered updates
        )
    of_state = (state.params, state.opt_state, rings_of(state))
    new_tables, slots, params, opt_state, rings, sums, bad = local(
        state.tables, slots, *of_state, batch, guided, arrays, key, state.step
    )
    new = state.replace(  # type: ignore[attr-defined]
        step=state.step + 1, tables=new_tables, params=params, opt_state=opt_state
    )
    return new if rings is None else new.replace(rings=rings), slots, sums, bad


def _local_step(
    trainer: Trainer,
    state_tables: dict[str, jax.Array],
    slots: dict[str, jax.Array],
    params: dict[str, Any],
    opt_state: Any,
    rings: Rings | None,
    batch: Batch,
    guided: Any,
    arrays: DeviceArrays,
    key: jax.Array,
    step: Int[Array, ""],
) -> tuple[Any, ...]:
    """The step of one device on its part of the batch."""
    layout, access, context = trainer.layout, trainer.access, arrays.context
    guidance, arrays = trainer.guidance, shard_draws.in_step(arrays)
    if batch.shared is not None:
        batch = batch.replace(shared=layout.gather_over_all(batch.shared))  # type: ignore[attr-defined]

    candidates = None if guidance is None else guidance.candidates(guided)
    reads = trainer.objective.reads(batch, context, candidates)
    leaves = access.read(state_tables, context, reads)

    for_pass, for_guidance = jax.random.split(key)
    observed = None
    if guidance is not None:
        for_observing = jax.random.fold_in(key, _FOR_OBSERVING)
        rate = trainer.backbone.dropout
        dropout = (rate, jax.random.fold_in(for_observing, 1)) if rate > 0 else None
        frozen = Frozen(access, state_tables, params["backbone"], context, dropout)
        observed = guidance.observe(frozen, guided, arrays.guidance, for_observing)
    keys = (for_pass, for_guidance)
    part = _Part(batch, guided, candidates, observed, reads, arrays, *keys, step, rings)

    def loss_of(params: dict[str, Any], leaves: Leaves) -> tuple[jax.Array, Aside]:
        return _loss(trainer, params, leaves, part)

    grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (loss, (sums, new_scores)), (params_grad, leaves_grad) = grad(params, leaves)
    triples = sums.pop("triples")  # over all devices already
    loss, sums, params_grad = layout.sum_over_all((loss, sums, params_grad))

    rows_finite = access.finite(leaves)
    finite = [_everywhere(layout, rows_finite[name]) for name in trainer.backbone.tables]
    finite += [_all_finite(params), jnp.isfinite(loss)]
    bad = sum(jnp.where(flag, 0, 1 << bit) for bit, flag in enumerate(finite))

    new_tables, new_slots = state_tables, slots
    if not trainer.config.adapters_alone:
        summed = jax.tree.map(lambda g: g * jnp.maximum(triples, 1.0), leaves_grad)
        new_tables, new_slots = access.write(state_tables, slots, context, reads, summed, key)
    params, opt_state = trainer.updated(params, params_grad, opt_state)
    if rings is not None:
        assert new_scores is not None, "an objective that drops losses says what it scored"
        rings = score_rings.remember(rings, new_scores, layout)
    sums = {"steps": jnp.float32(1.0), "loss": loss, "triples": triples, **sums}
    return new_tables, new_slots, params, opt_state, rings, sums, bad


def _everywhere(layout: Layout, flag: jax.Array) -> jax.Array:
    return layout.sum_over_all(jnp.where(flag, 0.0, 1.0)) == 0.0


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the loss of one device's part of a batch is computed from, besides what is trained."""

    batch: Batch
    guided: Any
    candidates: Candidates | None
    observed: Any
    reads: Reads
    arrays: DeviceArrays
    for_pass: jax.Array
    for_guidance: jax.Array
    step: Int[Array, ""]
    rings: Rings | None


def _loss(
    trainer: Trainer, params: dict[str, Any], leaves: Leaves, part: _Part
) -> tuple[Float[Array, ""], Aside]:
    """This device's share of the loss: the sum over devices is the loss of the batch.

    The sums also hold `triples`, over all devices; beside them what is to be remembered.
    """
    config, access, objective = trainer.config, trainer.access, trainer.objective
    batch, context, interactions = part.batch, part.arrays.context, part.arrays.interactions
    assert isinstance(interactions, Interactions)
    backbone_params = params["backbone"]
    inputs = objectives.Inputs(
        batch,
        context,
        interactions,
        backbone_params,
        trainer.backbone.dropout,
        config.loss.negatives_per_positive,
        part.for_pass,
        part.step,
        part.candidates,
        part.rings,
    )
    guidance, shared = trainer.guidance, inputs.pass_(_SHARED_PASS)
    masked: Masked = {}
    if guidance is not None and guidance.reads_vectors:
        masked = guidance.masked(params["guidance"], part.guided, trainer.layout)
    view = access.view(backbone_params, leaves, context, part.reads, shared, masked)
    learned = objective.learn(view, inputs)

    triples = trainer.layout.sum_over_all(jax.lax.stop_gradient(learned.count))
    per_triple = 1.0 / jnp.maximum(triples, 1.0)
    rec = learned.loss * per_triple
    penalty = jnp.float32(0.0)
    if config.optimizer.l2 > 0:
        squares = access.squares(backbone_params, leaves, context, part.reads)
        for name in objective.penalised:
            of_triples = squares[name][: batch.weights.shape[0]]
            penalty += losses.masked_sum(of_triples, batch.weights) * per_triple
        penalty = 0.5 * config.optimizer.l2 * penalty
    sums = {"triples": triples, "rec_loss": rec, "accuracy": learned.right * per_triple}
    backbone, beside = trainer.backbone, jnp.float32(0.0)
    if isinstance(backbone, LosesBeside) and backbone.lost_weight:
        lost = jnp.mean(view.lost(objective.penalised[0]), axis=1)[: batch.weights.shape[0]]
        beside = losses.masked_sum(lost, batch.weights) * per_triple
        sums[LOST] = beside
        beside *= backbone.lost_weight
    sums |= jax.lax.stop_gradient(learned.counts)
    new_scores = jax.lax.stop_gradient(learned.new_scores)
    if guidance is None:
        return rec + penalty + beside, (sums, new_scores)

    def vectors() -> Vectors:
        return view.vectors(objectives.GUIDANCE, inputs.pass_(1))

    def pair_vectors() -> jax.Array:
        return view.pair_vectors(objectives.GUIDANCE, inputs.pass_(1))

    def item_rows() -> Mapping[str, jax.Array]:
        return view.rows(f"{objectives.GUIDANCE}/item")

    def stochastic(key: jax.Array, rate: float) -> jax.Array:
        again = access.view(backbone_params, leaves, context, part.reads, (rate, key))
        return again.scores(objectives.GUIDANCE, (rate, key))

    scores, differences = objective.guided(view, inputs)
    added = guidance.loss(
        params["guidance"],
        Scored(scores, differences, stochastic, vectors, pair_vectors, item_rows),
        part.guided,
        part.observed,
        trainer.layout,
        part.for_guidance,
    )
    sums |= {"guidance_loss": added.loss, "gate_loss": added.gate, **added.metrics}
    loss = rec + penalty + beside + config.guidance.weight * added.loss + added.gate
    return loss, (sums, new_scores)
