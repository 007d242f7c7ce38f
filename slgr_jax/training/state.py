"""What training changes, and what it takes to make or restore it: no batch, no draw.

A `Learner` is everything about a run that its state depends on; `step.Trainer` adds what a step
draws. Restoring needs a `Learner` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from slgr_jax.config import RunConfig
from slgr_jax.guidance.base import METHOD, Guidance
from slgr_jax.mesh import Layout
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import AnyBackbone, DotBackbone, adapters
from slgr_jax.models.backbones.base import with_features_added
from slgr_jax.models.embedding_table import InitialRows, TableSpec
from slgr_jax.models.row_optimizers import RowOptimizer, make_row_optimizer
from slgr_jax.models.scoring import ServingState
from slgr_jax.sampling import user_context
from slgr_jax.sampling.context import Context
from slgr_jax.training import score_rings
from slgr_jax.training.score_rings import Rings

# Rows whose chunks are float32 at once.
_CHUNKED_ROWS = 2048


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: [] int32, steps done; [N] of N stacked seeds, as the leaves of everything else.
      tables: name -> [R', W] rows of values and optimiser slots (`embedding_table.RowFormat`).
      params: {"backbone": ..., "guidance": ...} dense parameters.
      opt_state: optax state of `params`.
    """

    step: Int[Array, "*N"]
    tables: dict[str, jax.Array]
    params: dict[str, Any]
    opt_state: Any


@struct.dataclass
class RememberingState(TrainState):
    """That of a run which remembers scores; a class of its own, so that a checkpoint of others has
    no such part.

    Attributes:
      rings: of `Learner.remembered` pairs.
    """

    rings: Rings


def rings_of(state: TrainState) -> Rings | None:
    """The scores that a state remembers; None for none."""
    return state.rings if isinstance(state, RememberingState) else None


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, how, and on which devices.

    Attributes:
      guidance: the use of an LLM product; None without one.
      remembered: pairs whose last scores are remembered (--hard_variance_share).
    """

    config: RunConfig
    backbone: AnyBackbone
    guidance: Guidance | None
    layout: Layout
    remembered: int = dataclasses.field(default=0, kw_only=True)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam for dense parameters; no weight decay, a gate least of all. A refit's gate stays as
        it is; what a method learns beside a gate (`METHOD`) it learns again."""
        dense = optax.adam(self.config.optimizer.dense_lr)
        if self.config.adapters_alone:
            return optax.multi_transform({True: dense, False: optax.set_to_zero()}, _is_of_adapters)
        if self.guidance is None:
            return dense
        of_guidance = optax.adam(self.guidance.learning_rate)
        if self.config.train.refit:
            of_guidance = optax.set_to_zero()
        by_part = {"backbone": dense, "guidance": of_guidance}

        def labels(params: dict[str, Any]) -> dict[str, Any]:
            parts: dict[str, Any] = {name: name for name in by_part}
            if METHOD in params["guidance"]:
                of_method = {METHOD: "backbone"}
                parts["guidance"] = dict.fromkeys(params["guidance"], "guidance") | of_method
            return parts

        return optax.multi_transform(by_part, labels)

    def updated(
        self, params: dict[str, Any], gradient: dict[str, Any], opt_state: Any
    ) -> tuple[dict[str, Any], Any]:
        """Dense parameters after one update, and the optimiser's state; what --train_only leaves
        out is as it was, to the bit."""
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        updated = optax.apply_updates(params, updates)
        if self.config.adapters_alone:  # -0 plus an update of 0 would be 0
            trained = _is_of_adapters(params)
            updated = jax.tree.map(
                lambda is_trained, new, old: new if is_trained else old, trained, updated, params
            )
        return updated, opt_state

    @property
    def row_optimizer(self) -> RowOptimizer:
        return make_row_optimizer(self.config.optimizer)

    @property
    def table_shardings(self) -> dict[str, NamedSharding]:
        """Where the rows of each table are."""
        return {
            name: self.layout.rows_sharding(of_users=spec.of_users)
            for name, spec in self.backbone.tables.items()
        }

    @property
    def state_layout(self) -> TrainState:
        """Where the parts of a train state are, as a prefix of its tree."""
        everywhere: Any = self.layout.replicated
        tables: Any = self.table_shardings
        if self.remembered:
            return RememberingState(everywhere, tables, everywhere, everywhere, everywhere)
        return TrainState(everywhere, tables, everywhere, everywhere)

    @property
    def serves_blocks(self) -> bool:
        """Whether a serving state has its tables split over the table shards, filled up as in
        training.

        So it is where scores are inner products, whose items can be ranked block by block; a
        network that sees both sides reads whole tables.
        """
        return self.layout.table_shards > 1 and isinstance(self.backbone, DotBackbone)

    def served_rows(self, spec: TableSpec) -> int:
        """How many rows a serving state has of a table; those that fill it up among them, where it
        is split."""
        if self.serves_blocks or self.layout.splits(of_users=spec.of_users):
            return self.layout.table_rows(spec.rows, of_users=spec.of_users)
        return spec.rows

    @property
    def leaf_names(self) -> list[str]:
        """What `step.Health.leaves` refers to, bit by bit."""
        return [f"tables/{name}" for name in self.backbone.tables] + ["params", "loss"]


def _is_of_adapters(params: dict[str, Any]) -> dict[str, Any]:
    """Parameter -> whether it is an adapter's."""
    no_leaf = functools.partial(jax.tree.map, lambda _: False)
    of_backbone = {
        name: jax.tree.map(lambda _: True, part) if name == adapters.PARAMS else no_leaf(part)
        for name, part in params["backbone"].items()
    }
    return {**no_leaf(params), "backbone": of_backbone}


def init_state(
    learner: Learner,
    seed: int | Int[Array, ""],
    initial: Mapping[str, InitialRows] = types.MappingProxyType({}),
) -> TrainState:
    """A fresh state on the devices of the layout; the same values on any number of devices.

    Args:
      initial: table -> what its rows begin with, where they are not drawn.
    """
    key = jax.random.key(seed)
    names = sorted(learner.backbone.tables)
    keys = dict(zip(["", *names], jax.random.split(key, len(names) + 1), strict=True))
    optimizer, dtype = learner.row_optimizer, learner.config.optimizer.table_dtype
    tables = {
        name: embedding_table.init_table(
            keys[name],
            learner.backbone.tables[name],
            optimizer,
            learner.layout,
            dtype,
            initial.get(name),
        )
        for name in names
    }

    def dense(key: jax.Array) -> tuple[dict[str, Any], Any]:
        for_backbone, for_guidance = jax.random.split(key)
        params: dict[str, Any] = {
            "backbone": adapters.init_params(learner.backbone, for_backbone),
            "guidance": {},
        }
        if learner.guidance is not None:
            params["guidance"] = learner.guidance.init(for_guidance, learner.backbone)
        return params, learner.optimizer.init(params)

    params, opt_state = jax.jit(dense, out_shardings=learner.layout.replicated)(keys[""])
    zero = jax.device_put(np.int32(0), learner.layout.replicated)
    if not learner.remembered:
        return TrainState(zero, tables, params, opt_state)
    size = learner.config.hardness.variance_scores
    rings = jax.jit(
        functools.partial(score_rings.empty, learner.remembered, size),
        out_shardings=learner.layout.replicated,
    )()
    return RememberingState(zero, tables, params, opt_state, rings)


def make_serving_state(learner: Learner) -> Callable[[TrainState, Context], ServingState]:
    """Jitted: what serving needs out of a train state, laid out as `abstract_serving`."""
    backbone = learner.backbone

    def pick(state: TrainState, context: Context) -> ServingState:
        params = state.params["backbone"]
        values = {
            name: embedding_table.values_of(state.tables[name], spec, learner.served_rows(spec))
            for name, spec in backbone.tables.items()
        }
        values = _filled_up(learner, with_features_added(backbone, values, context))
        values |= _of_chunks(learner, params, values, context)
        stored = _stored(learner, context)
        values = adapters.added_to_all(backbone, params, values, stored, context.neighbours)
        if isinstance(backbone, DotBackbone) and backbone.whole:
            values = _propagated(backbone, learner.layout, params, values, context)
        return ServingState(params, _filled_up(learner, values), state.params["guidance"])

    if learner.layout.users is None and not learner.serves_blocks:
        return jax.jit(pick)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_serving(learner))
    return jax.jit(pick, out_shardings=shardings)


def _filled_up(learner: Learner, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Tables with all the rows that a serving state has of them; those that fill up are 0."""
    specs, out = adapters.row_specs(learner.backbone), dict(values)
    for name, rows in values.items():
        spec, (count, _) = specs[name], rows.shape
        if not learner.serves_blocks or learner.layout.splits(of_users=spec.of_users):
            continue  # none, or spare rows of users, between those that are somebody's
        missing = learner.served_rows(spec) - count
        is_row = jnp.arange(count + missing)[:, None] < spec.rows
        out[name] = jnp.where(is_row, jnp.pad(rows, ((0, missing), (0, 0))), 0.0)
    return out


def _propagated(
    backbone: DotBackbone,
    layout: Layout,
    params: Mapping[str, Any],
    values: Mapping[str, jax.Array],
    context: Context,
) -> dict[str, jax.Array]:
    """What whole tables become on the graph; of users that are split, where these are."""
    specs = {name: adapter.spec for name, adapter in adapters.of(backbone).items()}
    specs |= backbone.tables
    values = {
        name: rows
        if layout.splits(of_users=specs[name].of_users)
        else jax.lax.with_sharding_constraint(rows[: specs[name].rows], layout.replicated)
        for name, rows in values.items()
    }

    def propagated(params: Any, values: Any, context: Context) -> dict[str, jax.Array]:
        smoothed = {**values, **backbone.propagate(params, values, context)}
        return {name: smoothed[name] for name in adapters.row_specs(backbone)}

    if layout.users is None or layout.devices == 1:
        return propagated(params, values, context)
    of_tables = {
        name: layout.batch_spec if spec.of_users else PartitionSpec()
        for name, spec in backbone.tables.items()
    }
    on_each = jax.shard_map(
        propagated,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), of_tables, user_context.specs(context, layout)),
        out_specs=of_tables,
        check_vma=False,
    )
    out: dict[str, jax.Array] = on_each(params, dict(values), context)
    return out


def _stored(learner: Learner, context: Context) -> dict[str, jax.Array]:
    """Name -> the stored vectors of every row; of chunks see `_of_chunks`."""
    return {
        name: embedding_table.values_of(
            context.vectors_of(adapter.side), adapter.stored, learner.served_rows(adapter.spec)
        )
        for name, adapter in adapters.of(learner.backbone).items()
        if not adapter.chunked
    }


def _of_chunks(
    learner: Learner,
    params: Mapping[str, Any],
    values: Mapping[str, jax.Array],
    context: Context,
) -> dict[str, jax.Array]:
    """Name -> rows with what their chunks come to.

    A block of rows at a time: in float32 all chunks take twice the memory of what is stored.
    """
    out = {}
    for name, adapter in adapters.of(learner.backbone).items():
        if not adapter.chunked:
            continue
        table, rows = context.vectors_of(adapter.side), learner.served_rows(adapter.spec)
        row_format = embedding_table.RowFormat.of(table, adapter.stored.width)
        size = rows if learner.layout.table_shards > 1 else min(_CHUNKED_ROWS, rows)

        def block(
            begin: jax.Array,
            name: str = name,
            table: jax.Array = table,
            row_format: embedding_table.RowFormat = row_format,
            size: int = size,
        ) -> jax.Array:
            packed = jax.lax.dynamic_slice_in_dim(table, begin, size)
            known = {
                table_name: jax.lax.dynamic_slice_in_dim(table_rows, begin, size)
                for table_name, table_rows in values.items()
                if table_name == name
            }
            stored = {name: row_format.unpack(packed)[0]}
            return adapters.added(learner.backbone, params, known, stored)[name]

        begins = np.minimum(np.arange(0, rows, size), rows - size)  # the last one overlaps
        blocks = jax.lax.map(block, jnp.asarray(begins))
        last = blocks[-1, size * len(begins) - rows :]
        out[name] = jnp.concatenate([blocks[:-1].reshape(-1, last.shape[1]), last])
    return out


def abstract_state(learner: Learner) -> TrainState:
    """Shapes, types and shardings of a train state on the learner's devices."""
    shapes = jax.eval_shape(lambda: init_state(learner, 0))
    everywhere = jax.tree.map(lambda _: learner.layout.replicated, shapes)
    return _abstract(shapes, everywhere.replace(tables=learner.table_shardings))


def abstract_serving(learner: Learner) -> ServingState:
    """Shapes, types and shardings of a serving state: tables are whole everywhere, but for users
    that are split, and where it `serves_blocks`."""
    state, layout = abstract_state(learner), learner.layout
    specs = adapters.row_specs(learner.backbone)
    values = {
        name: jax.ShapeDtypeStruct((learner.served_rows(spec), spec.width), jnp.float32)
        for name, spec in specs.items()
    }
    shapes = ServingState(state.params["backbone"], values, state.params["guidance"])  # type: ignore[arg-type]
    everywhere = jax.tree.map(lambda _: layout.replicated, shapes)
    split = {
        name: layout.rows_sharding(of_users=spec.of_users)
        for name, spec in specs.items()
        if learner.serves_blocks or layout.splits(of_users=spec.of_users)
    }
    return _abstract(shapes, everywhere.replace(values=everywhere.values | split))


def by_user(learner: Learner, serving: ServingState) -> ServingState:
    """A serving state that is split, with row u of user u and row i of item i: whole everywhere."""
    layout = learner.layout
    users = layout.users
    if users is None and layout.table_shards == 1:
        return serving

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def dealt_back(values: jax.Array, row: jax.Array) -> jax.Array:
        return values[row]

    values = dict(serving.values)
    for name, spec in adapters.row_specs(learner.backbone).items():
        if users is not None and spec.of_users:
            values[name] = dealt_back(values[name], layout.put(users.row))
        elif layout.table_shards > 1:
            row = np.arange(spec.rows, dtype=np.int32)
            values[name] = dealt_back(values[name], layout.put(row))
    return dataclasses.replace(serving, values=values)


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
