"""The one fused train step: draw, look up, score once, differentiate rows, update rows.

    key     = fold_in(seed, step)
    batch   = draw(key)                        B triples (u, i, j), G preferences (u, a, b)
    rows    = lookup(tables, ids(batch))
    loss    = mean_B bpr(s_ui - s_uj) + l2/2 mean_B |rows of the triple|^2
              + lambda mean_G [alpha * pair(s_ua - s_ub) + gate objective]
    params  = optax Adam on the mean loss
    tables  = row optimiser on B times the mean loss, i.e. on the sum over the batch

The row gradients are those of the *sum* over the batch, so a row's learning rate does not
depend on how many other triples share its batch. Everything is a function of (state, seed):
resuming needs no iterator state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slgr_jax import gates, losses, tables
from slgr_jax.access import Access, Factors, Leaves, Rows
from slgr_jax.backbones import Backbone
from slgr_jax.config import RunConfig
from slgr_jax.data import batches, draws
from slgr_jax.distributed import Layout
from slgr_jax.guidance import pairwise

Sums = dict[str, jax.Array]
# What is folded into a step's key for the rounding of table rows; far above any device's number.
_ROUNDING = 1 << 31
# Lanes (triples and preferences) drawn at once: enough that XLA's overhead per operation is small,
# few enough that what was drawn is still in a CPU's cache when it is used.
LANES_DRAWN = 1 << 16
# Sums over the steps of a dispatch; the host divides by `steps` (means over steps).
SUM_NAMES = (
    "steps",
    "loss",
    "rec_loss",
    "guidance_loss",
    "triple_accuracy",
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
      tables: name -> [R', W] rows of values and optimiser slots (`tables.RowFormat`).
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
    """The compiled-in parts of a run: what is trained, how, and on which devices."""

    config: RunConfig
    backbone: Backbone
    gate: gates.Gate
    plan: draws.Plan
    layout: Layout

    @property
    def guided(self) -> bool:
        return self.plan.preferences > 0

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam for dense parameters; no weight decay, the gate least of all."""
        return optax.adam(self.config.optimizer.dense_lr)

    @property
    def row_optimizer(self) -> tables.RowOptimizer:
        return tables.make_row_optimizer(self.config.optimizer)

    @property
    def access(self) -> Access:
        """Dot products where the CPU kernels can serve them all, rows otherwise."""
        backbone, native = self.backbone, self.plan.native
        model, dtype = backbone.factor_model, self.config.optimizer.table_dtype
        stochastic = backbone.dropout > 0 or (
            self.guided and self.config.gate.uncertainty == "dropout"
        )
        if native and model is not None and dtype == "float32" and not stochastic:
            width = backbone.tables[model.user_table].width
            return Factors(model, width, tuple(backbone.tables), self.row_optimizer)
        return Rows(backbone, self.row_optimizer, self.layout, native)

    @property
    def drawn_together(self) -> int:
        """S: steps whose batches are drawn at once, by programs over long vectors."""
        return max(1, LANES_DRAWN // (self.plan.triples + self.plan.preferences))

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
        name: tables.init_table(
            keys[name], trainer.backbone.tables[name], optimizer, trainer.layout, dtype
        )
        for name in names
    }

    def dense(key: jax.Array) -> tuple[dict[str, Any], Any]:
        for_backbone, for_gate = jax.random.split(key)
        params: dict[str, Any] = {"backbone": trainer.backbone.init(for_backbone), "gate": {}}
        if trainer.guided:
            params["gate"] = trainer.gate.init(for_gate, gates.empty_inputs()).get("params", {})
        return params, trainer.optimizer.init(params)

    params, opt_state = jax.jit(dense, out_shardings=trainer.layout.replicated)(keys[""])
    zero = jax.device_put(np.int32(0), trainer.layout.replicated)
    return TrainState(zero, made, params, opt_state)


def make_run_steps(
    trainer: Trainer,
) -> Callable[
    [TrainState, batches.Resident, jax.Array, jax.Array], tuple[TrainState, Sums, Health]
]:
    """The jitted train program: (state, resident, seed key, K) -> (state', sums, health).

    K is a traced number, so one compilation serves every dispatch length. The state is donated.
    """

    def program(
        state: TrainState, resident: batches.Resident, key: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Sums, Health]:
        slots = {
            name: jnp.zeros(trainer.layout.padded_rows(spec.rows), jnp.int32)
            for name, spec in trainer.backbone.tables.items()
        }
        slots = jax.lax.with_sharding_constraint(slots, trainer.layout.table_sharding)
        sums = {name: jnp.zeros((), jnp.float32) for name in SUM_NAMES}
        health = Health(jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32))

        def body(batch: draws.Batch, keys: jax.Array, at: jax.Array, carry: Any) -> Any:
            state, slots, sums, health = carry
            mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, 0, False), batch)
            facts = resident.interactions.facts
            state, slots, new, bad = train_step(trainer, state, slots, mine, facts, keys[at])
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
            batch = draws.draw(keys[:, 0], resident, trainer.plan)
            if trainer.layout.devices > 1:
                batch = jax.lax.with_sharding_constraint(batch, trainer.layout.batches_sharding)
            left = jnp.minimum(together, count - number * together)
            return jax.lax.fori_loop(0, left, functools.partial(body, batch, keys[:, 1]), carry)

        state, _, sums, health = jax.lax.fori_loop(
            0, -(-count // together), some, (state, slots, sums, health)
        )
        return state, sums, health

    # Stated, so that a dispatch's output is laid out as its input: otherwise the second call
    # would compile the program again.
    everywhere = trainer.layout.replicated
    like_input = TrainState(everywhere, trainer.layout.table_sharding, everywhere, everywhere)  # type: ignore[arg-type]
    return jax.jit(program, donate_argnums=0, out_shardings=(like_input, everywhere, everywhere))


def train_step(
    trainer: Trainer,
    state: TrainState,
    slots: dict[str, jax.Array],
    batch: draws.Batch,
    facts: batches.Facts,
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
            in_specs=(rows, rows, whole, whole, layout.batch_spec, whole, whole),
            out_specs=(rows, rows, whole, whole, whole, whole),
            check_vma=False,  # replicas of a table see the same gathered updates
        )
    new_tables, slots, params, opt_state, sums, bad = local(
        state.tables, slots, state.params, state.opt_state, batch, facts, key
    )
    return TrainState(state.step + 1, new_tables, params, opt_state), slots, sums, bad


def _local_step(
    trainer: Trainer,
    state_tables: dict[str, jax.Array],
    slots: dict[str, jax.Array],
    params: dict[str, Any],
    opt_state: Any,
    batch: draws.Batch,
    facts: batches.Facts,
    key: jax.Array,
) -> tuple[Any, ...]:
    """The step of one device on its part of the batch."""
    layout, access = trainer.layout, trainer.access
    for_rounding = jax.random.fold_in(key, _ROUNDING)
    if layout.devices > 1:
        key = jax.random.fold_in(key, layout.device_index())
    users = jnp.concatenate([batch.users, batch.pref_users])
    items = jnp.concatenate([batch.items, batch.pref_items])
    leaves = access.read(state_tables, users, items)
    counts = layout.sum_over_all(
        {"triples": jnp.sum(batch.weights), "preferences": jnp.sum(batch.pref_weights)}
    )

    def objective(params: dict[str, Any], leaves: Leaves) -> tuple[jax.Array, Sums]:
        return _objective(trainer, params, leaves, users, items, batch, facts, counts, key)

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, sums), (params_grad, leaves_grad) = grad(params, leaves)
    loss, sums, params_grad = layout.sum_over_all((loss, sums, params_grad))
    finite = [_everywhere(layout, flag) for flag in access.finite(leaves)]
    finite.append(_all_finite(params))
    finite.append(jnp.isfinite(loss))
    bad = sum(jnp.where(flag, 0, 1 << bit) for bit, flag in enumerate(finite))

    summed = jax.tree.map(lambda g: g * jnp.maximum(counts["triples"], 1.0), leaves_grad)
    new_tables, new_slots = access.write(state_tables, slots, users, items, summed, for_rounding)
    updates, opt_state = trainer.optimizer.update(params_grad, opt_state, params)
    params = optax.apply_updates(params, updates)
    sums = {"steps": jnp.float32(1.0), "loss": loss, **counts, **sums}
    return new_tables, new_slots, params, opt_state, sums, bad


def _everywhere(layout: Layout, flag: jax.Array) -> jax.Array:
    return layout.sum_over_all(jnp.where(flag, 0.0, 1.0)) == 0.0


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def _objective(
    trainer: Trainer,
    params: dict[str, Any],
    leaves: Leaves,
    users: Int[Array, "N"],
    items: Int[Array, "N 2"],
    batch: draws.Batch,
    facts: batches.Facts,
    counts: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[Float[Array, ""], Sums]:
    """This device's share of the loss: the sum over devices is the loss of the batch."""
    config, access, rate = trainer.config, trainer.access, trainer.backbone.dropout
    for_pass, for_gate = jax.random.split(key)
    dropout = (rate, for_pass) if rate > 0 else None
    scores = access.score(params["backbone"], leaves, users, items, dropout=dropout)
    difference = scores[:, 0] - scores[:, 1]
    triples = batch.users.shape[0]
    per_triple = 1.0 / jnp.maximum(counts["triples"], 1.0)
    rec = losses.masked_sum(losses.bpr(difference[:triples]), batch.weights) * per_triple
    penalty = jnp.float32(0.0)
    if config.optimizer.l2 > 0:
        squares = access.squares(leaves)[:triples]
        penalty = losses.masked_sum(squares, batch.weights) * per_triple
        penalty = 0.5 * config.optimizer.l2 * penalty
    sums = {
        "rec_loss": rec,
        "triple_accuracy": losses.masked_sum(
            (difference[:triples] > 0).astype(jnp.float32), batch.weights
        )
        * per_triple,
        "guidance_loss": jnp.float32(0.0),
        "alpha": jnp.float32(0.0),
        "agreement": jnp.float32(0.0),
    }
    if not trainer.guided:
        return rec + penalty, sums
    own = {name: leaf[triples:] for name, leaf in leaves.items()}

    def stochastic(key: jax.Array, rate: float) -> jax.Array:
        return access.score(
            params["backbone"], own, batch.pref_users, batch.pref_items, dropout=(rate, key)
        )

    inputs = pairwise.gate_inputs(config.gate, scores[triples:], stochastic, batch, facts, for_gate)
    found = pairwise.selective(
        trainer.gate, params["gate"], inputs, difference[triples:], config.guidance
    )
    weights = batch.pref_weights
    per_preference = 1.0 / jnp.maximum(counts["preferences"], 1.0)
    guidance = losses.masked_sum(found.loss, weights) * per_preference
    sums["guidance_loss"] = guidance
    sums["alpha"] = losses.masked_sum(found.alpha, weights) * per_preference
    sums["agreement"] = losses.masked_sum(found.agrees, weights) * per_preference
    return rec + penalty + config.guidance.weight * guidance, sums


@struct.dataclass
class ServingState:
    """What scoring needs: values without optimiser slots, and the backbone's parameters."""

    params: dict[str, Any]
    values: dict[str, jax.Array]


def make_serving_state(trainer: Trainer) -> Callable[[TrainState], ServingState]:
    """Jitted copy of what serving needs out of a train state."""

    def pick(state: TrainState) -> ServingState:
        return ServingState(
            state.params["backbone"],
            {
                name: tables.values_of(state.tables[name], spec)
                for name, spec in trainer.backbone.tables.items()
            },
        )

    return jax.jit(pick)


def score_users(
    backbone: Backbone,
) -> Callable[[ServingState, Int[Array, "B"]], Float[Array, "B I"]]:
    """(serving state, users) -> scores of all items, for full ranking."""

    def score(serving: ServingState, users: jax.Array) -> jax.Array:
        user_vectors, item_vectors = backbone.factors(serving.params, serving.values)
        return user_vectors[users] @ item_vectors.T

    return score
