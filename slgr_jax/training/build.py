"""What a run is built of, how a trained one is loaded, and its evaluation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from slgr_jax import config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import click_metrics, full_ranking
from slgr_jax.evaluation.ranking_metrics import PartResult, Values
from slgr_jax.guidance.device_arrays import labelled_arrays, teacher_arrays
from slgr_jax.guidance.gates import make_gate
from slgr_jax.kernels import build as kernel_build
from slgr_jax.mesh import Layout, make_layout
from slgr_jax.models.backbones import AnyBackbone, SequenceBackbone, make_backbone, reads_of
from slgr_jax.models.scoring import Scoring, ServingState, moments, score_rows, score_users
from slgr_jax.reports import gate_evaluation, tables
from slgr_jax.reports.tables import EvaluatedRun
from slgr_jax.sampling import arrays, context, labelled_rows, negatives
from slgr_jax.sampling.context import HISTORY, Context
from slgr_jax.training import checkpoint, objectives, run_directory
from slgr_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to score.

    Attributes:
      config: as the run was started.
      dataset: what it was trained on.
      backbone: what was trained.
      score_users: (scoring, users [B]) -> scores [B, I].
      serving, context: what `scoring` puts together.
      mesh: devices to split users over; None on one device.
    """

    config: config.RunConfig
    dataset: Dataset
    backbone: AnyBackbone
    score_users: Callable[[Any, jax.Array], jax.Array]
    serving: ServingState
    context: Context
    mesh: Mesh | None

    def scoring(self, part: str) -> Scoring:
        """The argument of `score_users` as of the moment before `part` (valid or test)."""
        return Scoring(self.serving, self.context, moments(self.context, part))


def _reads(run: config.RunConfig, dataset: Dataset) -> frozenset[str]:
    """What of the context the run's backbone looks up.

    Raises:
      ConfigError: a history is wanted of a dataset without times.
    """
    reads = reads_of(run.model)
    if HISTORY in reads and dataset.train.timestamps is None:
        fix = "give them (--time_column of slgr prepare; any increasing number will do)"
        if run.model.backbone in config.CLICK_BACKBONES:
            fix += ", or train without history fields: --nohistory_fields"
        raise ConfigError(
            f"--backbone={run.model.backbone} reads histories, and {dataset.path} has no times; "
            f"{fix}"
        )
    return reads


def _backbone(
    run: config.RunConfig, dataset: Dataset, *, native: bool
) -> tuple[AnyBackbone, Context]:
    """The run's backbone, and the host arrays that it looks up."""
    reads, most = _reads(run, dataset), run.model.most_categories
    found = context.make_context(dataset, reads, most_categories=most)
    sizes = context.sizes(dataset, reads, most_categories=most)
    return make_backbone(run.model, sizes, native=native), found


def _targets(
    run: config.RunConfig, dataset: Dataset, backbone: AnyBackbone, left_out: Csr | None
) -> arrays.Targets | None:
    """What is drawn instead of training pairs, where their time, label or number counts, or
    where some are left out."""
    window = backbone.length if isinstance(backbone, SequenceBackbone) else 0
    loss, history = run.loss, HISTORY in backbone.reads
    pairs = not (history or loss.min_history or loss.rating_threshold)
    if pairs and left_out is None and objectives.negatives_of_lane(run, window) == 1:
        return None
    return arrays.targets(
        dataset,
        window=window,
        history=history,
        min_history=loss.min_history,
        threshold=loss.rating_threshold,
        left_out=left_out,
    )


def build(run: config.RunConfig, dataset: Dataset) -> tuple[Trainer, arrays.DeviceArrays]:
    """The compiled-in parts of a run and its resident arrays, on the devices."""
    slices = dataset.slices(run.slices)
    layout = make_layout(table_shards=run.train.table_shards, min_devices=run.train.min_devices)
    native = _native(run, layout)
    backbone, found = _backbone(run, dataset, native=native)
    made = arrays.interactions(dataset, run.sampler, slices.cold_users, slices.tail_items)
    members = _members(restore_reference_runs(run, dataset), "valid")
    teacher = teacher_arrays(run, dataset, members)
    answers, left_out = labelled_arrays(run, dataset, teacher, backbone)
    made = dataclasses.replace(made, targets=_targets(run, dataset, backbone, left_out))
    read = members if run.gate.reads_reference_runs else []
    resident = arrays.DeviceArrays(made, teacher, found, answers, tuple(one for _, one in read))
    backbones = tuple(member for member, _ in read)
    trainer = make_trainer(run, dataset, resident, layout, backbone, backbones)
    return trainer, jax.device_put(resident, layout.replicated)


def _native(run: config.RunConfig, layout: Layout) -> bool:
    return kernel_build.choose(
        run.train.kernels,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.devices,
        units=kernel_build.step_units(run),
    )


def make_trainer(
    run: config.RunConfig,
    dataset: Dataset,
    resident: arrays.DeviceArrays,
    layout: Layout,
    backbone: AnyBackbone | None = None,
    reference_runs: tuple[AnyBackbone, ...] = (),
) -> Trainer:
    """What is compiled into the steps that draw from `resident` on the devices of `layout`.

    Args:
      ensemble: the backbones of `device_arrays.ensemble`.
    """
    native = _native(run, layout)
    if backbone is None:
        backbone, _ = _backbone(run, dataset, native=native)
    shared = run.loss.shared_negatives if run.loss_name == "sampled_softmax" else 0
    for name, size in (
        ("batch_size", run.sampler.batch_size),
        ("preferences_per_step", run.preferences_per_step),
        ("labelled_per_step", run.labelled_per_step),
        ("shared_negatives", shared),
    ):
        if size % layout.devices:
            raise ConfigError(f"--{name}={size} is not a multiple of the {layout.devices} devices")
    window = backbone.length if isinstance(backbone, SequenceBackbone) else 0
    longest = arrays.longest_row(resident)
    plan = negatives.Plan(
        n_items=dataset.n_items,
        drawn=resident.drawn,
        triples=run.sampler.batch_size,
        preferences=run.preferences_per_step,
        sampler=run.sampler,
        guidance=run.guidance,
        search_steps=longest.bit_length(),
        native=native,
        certain=arrays.every_lane_drawn(resident, run.sampler),
        negatives=objectives.negatives_of_lane(run, window),
        shared=shared,
        known=run.labelled_per_step,
        held_out=run.gated and run.gate.gate == "meta",
        margin_scale=arrays.margin_scale(resident.teacher),
    )
    return Trainer(run, backbone, make_gate(run.gate), plan, layout, reference_runs)


def restore_run(workdir: str, which: str = "best") -> Run:
    """A run's dataset and its `best` or `last` state, for evaluation and export."""
    run = run_directory.read_config(workdir)
    if not os.path.isdir(run.data):
        raise ConfigError(
            f"{workdir} was trained on {run.data}, which is not there; put it back, or give the "
            "run its new place: slgr train with the same flags and --data=NEW"
        )
    dataset = dataset_lib.load(run.data, verify=run.train.verify_checksums)
    if run_directory.trained_on(workdir, dataset) is False:
        raise ConfigError(
            f"{workdir} was trained on another split or id map than {dataset.path} now holds "
            f"(split {dataset.manifest.split_hash[:8]}); point --data back or train again"
        )
    return _restored(workdir, run, dataset, which)


def _restored(workdir: str, run: config.RunConfig, dataset: Dataset, which: str) -> Run:
    """A state of the run in `workdir`, which was trained on `dataset`."""
    backbone, found = _backbone(run, dataset, native=False)
    # Restoring needs no more than the sizes: one table shard, whatever the run had.
    layout = make_layout()
    plan = negatives.Plan(
        dataset.n_items, 1, 1, run.preferences_per_step, run.sampler, run.guidance, 1
    )
    trainer = Trainer(run, backbone, make_gate(run.gate), plan, layout)
    placed = jax.device_put(found, layout.replicated)
    saved = checkpoint.Checkpoints(workdir, trainer, writable=False)
    try:
        serving = saved.restore_best() if which == "best" else saved.restore_last(placed)
    finally:
        saved.close()
    mesh = layout.mesh if layout.devices > 1 else None
    return Run(run, dataset, backbone, score_users(backbone), serving, placed, mesh)


def restore_reference_runs(run: config.RunConfig, dataset: Dataset) -> list[Run]:
    """The best states of the runs that --reference_runs names; [] where it names none.

    Raises:
      ConfigError: one is not there, or was trained on another dataset than `dataset`.
      ManifestError: one has no checkpoint yet, or a damaged one.
    """
    found: list[Run] = []
    shared: dict[Any, Context] = {}  # what members of a kind look up is there once
    for member in run.reference_runs:
        trained, was = run_directory.read_config(member), run_directory.recorded(member)
        if was is None:
            raise ConfigError(
                f"--reference_runs: {member} holds no {run_directory.RECORD}; train it first"
            )
        for name, what in (("split_hash", "split"), ("id_map_hash", "id map")):
            mine = getattr(dataset.manifest, name)
            if was[name] != mine:
                raise ConfigError(
                    f"--reference_runs: {member} was trained on {what} {was[name][:8]}, "
                    f"{dataset.path} has {what} {mine[:8]}; name runs that were trained on this "
                    f"dataset"
                )
        one = _restored(member, trained, dataset, "best")
        kind = (one.backbone.reads, trained.model.most_categories)
        looked_up = shared.setdefault(kind, dataclasses.replace(one.context, graph=None))
        found.append(dataclasses.replace(one, context=looked_up))
    return found


def evaluate_run(workdir: str, label: str, which: str = "best") -> EvaluatedRun:
    """Rank validation and test with a run's state; writes metrics.json and per_user.parquet."""
    run = restore_run(workdir, which)
    gate = _judged(workdir, run)
    parts: dict[str, PartResult] = {}
    rows: dict[str, dict[str, Values]] = {}
    evaluation, slices = run.config.evaluation, run.dataset.slices(run.config.slices)
    score = score_rows(run.backbone)
    for part in ("valid", "test"):
        scoring = run.scoring(part)
        if evaluation.ranking:
            parts |= full_ranking.evaluate_dataset(
                *(run.score_users, scoring, run.dataset, run.config.slices, evaluation),
                parts=(part,),
                mesh=run.mesh,
                kernels=run.config.train.kernels,
            )
        if evaluation.rows != "none" and len(run.dataset.part(part)):
            made = labelled_rows.make_rows(run.dataset, part, evaluation, run.config.loss)
            rows[part] = click_metrics.summarize_rows(made, score(scoring, made), slices)
    found = EvaluatedRun(*(workdir, label, run.config, run.dataset, which, parts, rows), gate=gate)
    tables.write_run(found)
    return found


def _judged(workdir: str, run: Run) -> dict[str, Any] | None:
    """How well the run's gate tells where the teacher is right; None without a gate."""
    frozen = restore_reference_runs(run.config, run.dataset)
    if frozen and (other := run_directory.other_members(workdir, run.config)):
        raise ConfigError(
            f"{workdir} was trained with another --reference_runs ({other}); put it back or "
            f"train again"
        )
    if not run.config.gated:
        return None
    teacher = teacher_arrays(run.config, run.dataset, _members(frozen, "valid"))
    if teacher is None:
        return None
    return gate_evaluation.judge(
        *(run.config, run.dataset, run.backbone, make_gate(run.config.gate)),
        *(run.scoring("test"), teacher),
        reference_runs=_members(frozen, "test") if run.config.gate.reads_reference_runs else (),
    )


def _members(frozen: Sequence[Run], part: str) -> list[tuple[AnyBackbone, Scoring]]:
    """What runs of an ensemble score with, as of the moment before `part`."""
    return [(member.backbone, member.scoring(part)) for member in frozen]
