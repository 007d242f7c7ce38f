"""The composition root: the only place where a config becomes objects.

config + dataset -> backbone, context, guidance, sampling plan, device arrays, layout
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import gates, hard_negatives, make_guidance, with_edges
from slgr_jax.guidance.base import Sources
from slgr_jax.guidance.gated import Gated
from slgr_jax.kernels import build as kernel_build
from slgr_jax.mesh import Layout, put
from slgr_jax.models.backbones import AnyBackbone, SequenceBackbone
from slgr_jax.models.embedding_table import InitialRows
from slgr_jax.sampling import arrays as arrays_lib
from slgr_jax.sampling import user_context, user_shards
from slgr_jax.sampling.arrays import DeviceArrays, Interactions, Targets
from slgr_jax.sampling.context import HISTORY, Context, Histories
from slgr_jax.sampling.negatives import SamplingPlan
from slgr_jax.training import (
    checkpoint,
    dropping,
    edited,
    initial_values,
    objectives,
    refit,
    restore,
    vector_products,
    warm_start,
)
from slgr_jax.training.edited import Edited
from slgr_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run, ready to be trained.

    Attributes:
      trainer: what is compiled into its steps.
      arrays: what these draw from, on the devices.
      initial: table -> what its rows begin with, on the host; {} where all are drawn, and in a run
        that goes on.
      edited: what is learned in place of the training interactions; None: these.
      histories: those of the data, on the devices, where training looks up edited ones.
      counts: of interactions that were edited, or have a score, for run.json.
    """

    config: RunConfig
    dataset: Dataset
    trainer: Trainer
    arrays: DeviceArrays
    initial: Mapping[str, InitialRows]
    edited: Edited | None = None
    histories: Histories | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def validated(self) -> Context:
        """What validation looks up: histories as the data have them."""
        context = self.arrays.context
        if self.edited is None:
            return context
        return dataclasses.replace(context, histories=self.histories)


def build(run: RunConfig, dataset: Dataset, layout: Layout | None = None) -> Experiment:
    """Make a run's objects, and put its arrays on the devices.

    Args:
      layout: where it lives; None: on the devices that its config asks for.

    Raises:
      UserError: data, teacher, reference runs or knobs that do not go together.
    """
    layout = restore.with_users(layout or restore.layout_of(run), run, dataset)
    native = kernel_build.choose(
        "xla" if run.train.user_shards else run.train.kernels,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.devices,
        units=kernel_build.step_units(run),
    )
    backbone, context = restore.backbone_and_context(run, dataset, native=native)
    context = with_edges(run, dataset, backbone, context)
    context = dataclasses.replace(
        context,
        vectors=vector_products.frozen(run, dataset, layout),
        neighbours=vector_products.neighbours(run, dataset),
    )
    slices = dataset.slices(run.slices)
    learned = edited.edited(run, dataset, context)
    interactions = arrays_lib.interactions(
        dataset,
        run.sampler,
        slices.cold_users,
        slices.tail_items,
        None if learned is None else learned.more,
    )

    reference_runs = restore.as_of(restore.restore_reference_runs(run, dataset), "valid")
    if run.draws_hard_negatives:
        pools = hard_negatives.of_training(
            dataset, reference_runs, run.sampler.hard_pool, kernels=run.train.kernels
        )
        interactions = dataclasses.replace(interactions, hard=arrays_lib.hard_negatives(pools))
    counts, remembered = {} if learned is None else dict(learned.counts), 0
    if run.hardness.product:
        scores = dropping.Scores(run, dataset)
        scored = scores.arrays()
        interactions = dataclasses.replace(interactions, scored=scored)
        remembered = int(scored.items.size) if run.hardness.filters else 0
        counts["train_pairs_scored"] = scores.trained
        if run.sampler.negatives == "scored":
            of_scored = arrays_lib.hard_negatives(scores.pools())
            interactions = dataclasses.replace(interactions, hard=of_scored)
    reads = run.guided and run.gate.reads_reference_runs
    gate_backbones = tuple(backbone for backbone, _ in reference_runs) if reads else ()
    guidance = make_guidance(run, gate_backbones, native=native)
    guidance_arrays, left_out = None, None
    if guidance is not None:
        sources = Sources(run, dataset, backbone, reference_runs)
        guidance_arrays, left_out = guidance.arrays(sources)

    targets = _targets(run, dataset, learned, backbone, context, left_out)
    interactions = dataclasses.replace(interactions, targets=targets)
    drawn = user_shards.total(interactions.drawn, dataset)
    plan = _plan(run, dataset, backbone, interactions, drawn, native=native)
    trainer = Trainer(run, backbone, guidance, layout, plan, remembered=remembered)
    check_devices(trainer)
    begins = run.train.restart or not checkpoint.exists(run.workdir)
    if run.train.init_from and begins:
        warm_start.check(trainer, dataset)
    if run.train.refit and begins:
        refit.check(run)
    initial = initial_values.initial_rows(run, dataset, backbone, layout) if begins else {}
    # Vectors are split as tables are; everything else is whole on every device, or dealt out.
    placed = user_context.put(dataclasses.replace(context, vectors=None), layout)
    of_data = placed.histories
    if learned is not None and of_data is not None:
        placed = dataclasses.replace(placed, histories=layout.put(learned.histories()))
    if context.vectors is not None:
        vectors = put(context.vectors, layout.table_sharding)
        placed = dataclasses.replace(placed, vectors=vectors)
    arrays = _placed(trainer, interactions, guidance_arrays, context)
    arrays = dataclasses.replace(arrays, context=placed)
    return Experiment(run, dataset, trainer, arrays, initial, learned, of_data, counts)


def _placed(
    trainer: Trainer, interactions: Interactions, guided: Any, context: Context
) -> DeviceArrays:
    """What is drawn from (host arrays) on the devices: whole on each, or dealt out by user."""
    users, guidance, layout = trainer.layout.users, trainer.guidance, trainer.layout
    if users is None:
        return DeviceArrays(layout.put(interactions), guidance=layout.put(guided))
    # A step knows users by their rows, and a gate by their number.
    fold = gates.folds(jnp.arange(users.users))
    facts = dataclasses.replace(interactions.facts, fold=fold)
    interactions = dataclasses.replace(interactions, facts=facts)
    events = user_context.events(context.histories, users)
    interactions = user_shards.deal_interactions(interactions, users, events)
    if guidance is not None:
        assert isinstance(guidance, Gated), "config.RunConfig refuses others"
        guided = guidance.deal(guided, users)
    if trainer.config.optimizer.table_optimizer == "lazy_adam":
        user_shards.refuse_empty_shards((interactions, guided), users)
    return DeviceArrays(
        user_shards.put(interactions, layout),
        guidance=None if guided is None else user_shards.put(guided, layout),
    )


def _window(backbone: AnyBackbone) -> int:
    return backbone.length if isinstance(backbone, SequenceBackbone) else 0


def _targets(
    run: RunConfig,
    dataset: Dataset,
    learned: Edited | None,
    backbone: AnyBackbone,
    context: Context,
    left_out: Csr | None,
) -> Targets | None:
    """What is drawn instead of training pairs, where their time, label, rating or number counts,
    or where some are left out, edited or weighed."""
    window = _window(backbone)
    loss, history, power = run.loss, HISTORY in backbone.reads, run.sampler.rating_power
    pairs = not (history or loss.min_history or loss.rating_threshold or power)
    pairs = pairs and learned is None and left_out is None
    if pairs and objectives.negatives_of_triple(run, window) == 1:
        return None
    return arrays_lib.targets(
        dataset if learned is None else learned.dataset,
        window=window,
        history=history,
        min_history=loss.min_history,
        threshold=loss.rating_threshold,
        power=power,
        left_out=left_out,
        features=context.features is not None and context.features.interaction is not None,
        weights=None if learned is None else learned.weights,
    )


def _plan(
    run: RunConfig,
    dataset: Dataset,
    backbone: AnyBackbone,
    interactions: Interactions,
    drawn: int,
    *,
    native: bool,
) -> SamplingPlan:
    shared = run.loss.shared_negatives if run.loss_name == "sampled_softmax" else 0
    every_negative = arrays_lib.every_negative_drawn(interactions, run.sampler)
    targets = interactions.targets
    weighed = targets is not None and targets.weights is not None
    return SamplingPlan(
        n_items=dataset.n_items,
        drawn=drawn,
        triples=run.sampler.batch_size,
        sampler=run.sampler,
        native=native,
        # The lanes of a shard of users have its weight.
        every_negative=every_negative and not (run.train.user_shards or weighed),
        negatives=objectives.negatives_of_triple(run, _window(backbone)),
        shared=shared,
    )


def check_devices(trainer: Trainer) -> None:
    """Refuse sizes that cannot be split over the devices, or over shards of users."""
    guidance, users = trainer.guidance, trainer.layout.users
    parts, what = trainer.layout.devices, "devices"
    if users is not None:
        parts, what = users.count, "shards of --user_shards"
    sizes = [("--batch_size", trainer.plan.triples), ("--shared_negatives", trainer.plan.shared)]
    if guidance is not None:
        sizes += [
            (guidance.queries_knob, guidance.queries),
            ("--labelled_per_step", guidance.gating.labelled),
        ]
    for name, size in sizes:
        if size % parts:
            raise ConfigError(f"{name}={size} is not a multiple of the {parts} {what}")
