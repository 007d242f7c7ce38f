"""A run's directory: what it was started with, what that resolved to, and how to load it.

config.json    every knob (config.RunConfig)
run.json       versions, devices, hashes, sizes and thresholds that the knobs resolved to
log.jsonl      one object a validation (journal.py)
.lock          held while a process trains; names it
checkpoints/   state, best state, progress (checkpoint.py)
metrics.json, per_user.parquet, metrics.png    launch/evaluate.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from slgr_jax import (
    __version__,
    checkpoint,
    click_metrics,
    config,
    evaluate,
    judging,
    knobs,
    objectives,
    report,
)
from slgr_jax.backbones import AnyBackbone, SequenceBackbone, make_backbone, reads_of
from slgr_jax.data import batches, context, labelled, sampling, schema
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data.context import HISTORY, Context
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.distributed import Layout, make_layout
from slgr_jax.errors import ConfigError, listing
from slgr_jax.gates import make_gate
from slgr_jax.kernels import build as kernel_build
from slgr_jax.metrics import PartResult, Values
from slgr_jax.report import EvaluatedRun
from slgr_jax.resident import resident_known, resident_teacher
from slgr_jax.scoring import Scoring, ServingState, moments, score_rows, score_users
from slgr_jax.step import Trainer
from slgr_jax.teacher import preferences

CONFIG, RECORD, LOCK = "config.json", "run.json", ".lock"
_RECORDED = ("split_hash", "id_map_hash", "teacher_hash")
# Knobs that may change when a run is resumed: none of them changes what a step computes.
RESUMABLE = frozenset(
    {
        *("epochs", "patience", "tensorboard", "verify_checksums", "checkpoint_every_s"),
        *("steps_per_dispatch", "table_shards", "min_devices", "eval_users_per_chunk", "restart"),
        # The ensemble's runs may have moved: what they hold is compared (`members`).
        *("kernels", "ensemble"),
    }
)


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
        fix = "give them (--time_column of launch/prepare.py; any increasing number will do)"
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
) -> batches.Targets | None:
    """What is drawn instead of training pairs, where their time, label or number counts, or
    where some are left out."""
    window = backbone.length if isinstance(backbone, SequenceBackbone) else 0
    loss, history = run.loss, HISTORY in backbone.reads
    pairs = not (history or loss.min_history or loss.rating_threshold)
    if pairs and left_out is None and objectives.negatives_of_lane(run, window) == 1:
        return None
    return batches.targets(
        dataset,
        window=window,
        history=history,
        min_history=loss.min_history,
        threshold=loss.rating_threshold,
        left_out=left_out,
    )


def build(run: config.RunConfig, dataset: Dataset) -> tuple[Trainer, batches.Resident]:
    """The compiled-in parts of a run and its resident arrays, on the devices."""
    slices = dataset.slices(run.slices)
    layout = make_layout(table_shards=run.train.table_shards, min_devices=run.train.min_devices)
    native = _native(run, layout)
    backbone, found = _backbone(run, dataset, native=native)
    made = batches.interactions(dataset, run.sampler, slices.cold_users, slices.tail_items)
    teacher = resident_teacher(run, dataset)
    answers, left_out = resident_known(run, dataset, teacher, backbone)
    made = dataclasses.replace(made, targets=_targets(run, dataset, backbone, left_out))
    frozen = restore_ensemble(run, dataset)
    scorings = tuple(member.scoring("valid") for member in frozen)
    resident = batches.Resident(made, teacher, found, answers, scorings)
    backbones = tuple(member.backbone for member in frozen)
    trainer = make_trainer(run, dataset, resident, layout, backbone, backbones)
    return trainer, jax.device_put(resident, layout.replicated)


def _native(run: config.RunConfig, layout: Layout) -> bool:
    return kernel_build.choose(
        run.train.kernels,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.devices,
    )


def make_trainer(
    run: config.RunConfig,
    dataset: Dataset,
    resident: batches.Resident,
    layout: Layout,
    backbone: AnyBackbone | None = None,
    ensemble: tuple[AnyBackbone, ...] = (),
) -> Trainer:
    """What is compiled into the steps that draw from `resident` on the devices of `layout`.

    Args:
      ensemble: the backbones of `resident.ensemble`.
    """
    native = _native(run, layout)
    if backbone is None:
        backbone, _ = _backbone(run, dataset, native=native)
    shared = run.loss.shared_negatives if run.loss_name == "sampled_softmax" else 0
    for name, size in (
        ("batch_size", run.sampler.batch_size),
        ("preferences_per_step", run.preferences_per_step),
        ("known_per_step", run.known_per_step),
        ("shared_negatives", shared),
    ):
        if size % layout.devices:
            raise ConfigError(f"--{name}={size} is not a multiple of the {layout.devices} devices")
    window = backbone.length if isinstance(backbone, SequenceBackbone) else 0
    longest = batches.longest_row(resident)
    plan = sampling.Plan(
        n_items=dataset.n_items,
        drawn=resident.drawn,
        triples=run.sampler.batch_size,
        preferences=run.preferences_per_step,
        sampler=run.sampler,
        guidance=run.guidance,
        search_steps=longest.bit_length(),
        native=native,
        certain=batches.every_lane_drawn(resident, run.sampler),
        negatives=objectives.negatives_of_lane(run, window),
        shared=shared,
        known=run.known_per_step,
        held_out=run.gated and run.gate.gate == "meta",
        margin_scale=batches.margin_scale(resident.teacher),
    )
    return Trainer(run, backbone, make_gate(run.gate), plan, layout, ensemble)


def read_config(workdir: str) -> config.RunConfig:
    """The config a run was started with."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{workdir} is not a run: it holds no {CONFIG} (see launch/train.py)")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return knobs.from_json(config.RunConfig, text, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; restore it, or train anew with --restart") from error


def restore_run(workdir: str, which: str = "best") -> Run:
    """A run's dataset and its `best` or `last` state, for evaluation and export."""
    run = read_config(workdir)
    if not os.path.isdir(run.data):
        raise ConfigError(
            f"{workdir} was trained on {run.data}, which is not there; put it back, or give the "
            "run its new place: launch/train.py with the same flags and --data=NEW"
        )
    dataset = dataset_lib.load(run.data, verify=run.train.verify_checksums)
    if trained_on(workdir, dataset) is False:
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
    plan = sampling.Plan(
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


def restore_ensemble(run: config.RunConfig, dataset: Dataset) -> list[Run]:
    """The best states of the runs whose spread the gate of `run` reads; [] where it reads none.

    Raises:
      ConfigError: one is not there, or was trained on another dataset than `dataset`.
      ManifestError: one has no checkpoint yet, or a damaged one.
    """
    found: list[Run] = []
    shared: dict[Any, Context] = {}  # what members of a kind look up is there once
    for member in run.ensemble:
        trained, was = read_config(member), recorded(member)
        if was is None:
            raise ConfigError(f"--ensemble: {member} holds no {RECORD}; train it first")
        for name, what in (("split_hash", "split"), ("id_map_hash", "id map")):
            mine = getattr(dataset.manifest, name)
            if was[name] != mine:
                raise ConfigError(
                    f"--ensemble: {member} was trained on {what} {was[name][:8]}, {dataset.path} "
                    f"has {what} {mine[:8]}; name runs that were trained on this dataset"
                )
        one = _restored(member, trained, dataset, "best")
        kind = (one.backbone.reads, trained.model.most_categories)
        looked_up = shared.setdefault(kind, dataclasses.replace(one.context, graph=None))
        found.append(dataclasses.replace(one, context=looked_up))
    return found


def members(run: config.RunConfig) -> list[dict[str, Any]]:
    """What the record says of the ensemble's runs: where each lies, and which checkpoint it holds.

    `checkpoint` is the SHA-256 of Orbax's notes: how far the loop was, its best metric, and when it
    was written, to the nanosecond. A copy of a run has the same.
    """
    found = []
    for member in run.ensemble:
        root = pathlib.Path(member) / checkpoint.DIRECTORY
        steps = [int(path.name) for path in root.glob("*") if path.name.isdigit()]
        if not steps:
            raise ConfigError(f"--ensemble: {member} holds no finished checkpoint; train it first")
        notes = root / str(max(steps)) / "_CHECKPOINT_METADATA"
        sha256 = hashlib.sha256(notes.read_bytes()).hexdigest()
        found.append({"run": os.path.abspath(member), "step": max(steps), "checkpoint": sha256})
    return found


def other_members(workdir: str, run: config.RunConfig) -> str | None:
    """How the ensemble of `run` differs from what the run in `workdir` was trained with, if so."""
    record, now = _record(workdir), members(run)
    if record is None:
        names = [read_config(workdir).gate.ensemble, run.gate.ensemble]
        return None if names[0] == names[1] else " -> ".join(names)
    was = record.get("ensemble", [])
    if [x["checkpoint"] for x in was] == [x["checkpoint"] for x in now]:
        return None
    old, new = (", ".join(f"{x['run']} at step {x['step']}" for x in y) for y in (was, now))
    return f"{old} -> {new}, other checkpoints"


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
            parts |= evaluate.evaluate_dataset(
                *(run.score_users, scoring, run.dataset, run.config.slices, evaluation),
                parts=(part,),
                mesh=run.mesh,
                kernels=run.config.train.kernels,
            )
        if evaluation.rows != "none" and len(run.dataset.part(part)):
            made = labelled.make_rows(run.dataset, part, evaluation, run.config.loss)
            rows[part] = click_metrics.summarize_rows(made, score(scoring, made), slices)
    found = EvaluatedRun(*(workdir, label, run.config, run.dataset, which, parts, rows), gate=gate)
    report.write_run(found)
    return found


def _judged(workdir: str, run: Run) -> dict[str, Any] | None:
    """How well the run's gate tells where the teacher is right; None without a gate."""
    ensemble = restore_ensemble(run.config, run.dataset)
    if ensemble and (other := other_members(workdir, run.config)):
        raise ConfigError(
            f"{workdir} was trained with another --ensemble ({other}); put it back or train again"
        )
    teacher = resident_teacher(run.config, run.dataset) if run.config.gated else None
    if teacher is None:
        return None
    path = preferences.product_path(run.config.data, run.config.guidance.teacher)
    return judging.judge(
        *(run.config, run.dataset, run.backbone, make_gate(run.config.gate)),
        *(run.scoring("test"), teacher),
        unlisted_below=schema.read_teacher_manifest(path).unlisted == "below",
        ensemble=[(member.backbone, member.scoring("test")) for member in ensemble],
    )


def recorded(workdir: str) -> dict[str, Any] | None:
    """The hashes that `run.json` names; None if there is none."""
    found = _record(workdir)
    return None if found is None else {key: found[key] for key in _RECORDED}


def _record(workdir: str) -> dict[str, Any] | None:
    """What `run.json` says; None if there is none."""
    path = pathlib.Path(workdir) / RECORD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return found | {key: found[key] for key in _RECORDED}
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged; restore it, or remove it: training writes it again"
        ) from error


def trained_on(workdir: str, dataset: Dataset) -> bool | None:
    """Whether a run's record names this split and these ids; None if there is no record."""
    was = recorded(workdir)
    if was is None:
        return None
    return all(was[key] == getattr(dataset.manifest, key) for key in ("split_hash", "id_map_hash"))


def teacher_hash(run: config.RunConfig) -> str:
    """SHA-256 over the checksums of the teacher's shards; empty without guidance."""
    if run.guidance.guidance == "none":
        return ""
    path = preferences.product_path(run.data, run.guidance.teacher)
    return schema.files_hash(schema.read_teacher_manifest(path).files)


@contextlib.contextmanager
def opened(run: config.RunConfig, dataset: Dataset) -> Iterator[None]:
    """Hold a run's directory, with its config written, against other processes.

    Raises:
      ConfigError: it cannot be made, is not a run's, is held, or holds a run that computes
        something else.
    """
    root = pathlib.Path(run.workdir)
    if (root / schema.MANIFEST).is_file():
        raise ConfigError(f"{root} is a dataset or a teacher product; choose another --workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"--workdir={root} cannot be made: {error.strerror}") from error
    with lock:
        _hold(lock, root)
        if run.train.restart:
            checkpoint.clear(run.workdir)
            for name in (CONFIG, RECORD, report.METRICS, report.PER_USER, report.PICTURE):
                (root / name).unlink(missing_ok=True)
        elif (root / CONFIG).is_file():
            _refuse_changes(read_config(run.workdir), run, trained_on(run.workdir, dataset))
        write_text(root / CONFIG, knobs.to_json(run))
        yield


def _hold(lock: TextIO, root: pathlib.Path) -> None:
    """Lock the file until it is closed; the system unlocks it however the process ends."""
    if jax.process_index():
        return  # the processes of one job share the run; the first speaks for all
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise ConfigError(
            f"{root} is being trained by another process ({lock.read().strip()}); stop that one "
            "or choose another --workdir"
        ) from error
    except OSError:
        return  # a file system without locks
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()


def _refuse_changes(old: config.RunConfig, run: config.RunConfig, same: bool | None) -> None:
    changed = config.differences(old, run)
    changed = [text for text in changed if text[2:].split(":")[0] not in RESUMABLE]
    moved = os.path.abspath(old.data) != os.path.abspath(run.data)
    if same is False or (same is None and moved):
        what = f"{old.data} -> {run.data}" if moved else f"{run.data} holds another split"
        changed.append(f"--data: {what}")
    was = recorded(run.workdir)
    if was is not None and was["teacher_hash"] != teacher_hash(run) and not changed:
        changed.append(f"--teacher: {run.guidance.teacher} holds other answers now")
    if not changed and (other := other_members(run.workdir, run)):
        changed.append(f"--ensemble: {other}")
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with other settings ({listing(changed)}); "
            "choose another --workdir, or --restart to delete it"
        )


def write_text(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def record(run: config.RunConfig, dataset: Dataset, trainer: Trainer, **resolved: int) -> str:
    """`run.json`: what the config resolved to on this machine."""
    slices = dataset.slices(run.slices)
    devices = trainer.layout.mesh.devices.ravel()
    facts = {
        "slgr_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "devices": [str(device) for device in devices],
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "kernels": "native" if trainer.plan.native else "xla",
        "dataset": dataset.manifest.name,
        "split_hash": dataset.manifest.split_hash,
        "id_map_hash": dataset.manifest.id_map_hash,
        "teacher_hash": teacher_hash(run),
        "ensemble": members(run),
        "users": dataset.n_users,
        "items": dataset.n_items,
        "train_pairs": int(dataset.history.sum()),
        "drawn_an_epoch": trainer.plan.drawn,
        "preferences_per_step": trainer.plan.preferences,
        "cold_user_history": slices.cold_user_history,
        "tail_item_popularity": slices.tail_item_popularity,
        "cold_users": int(slices.cold_users.sum()),
        "tail_items": int(slices.tail_items.sum()),
        "tables": {
            name: {"rows": spec.rows, "width": spec.width}
            for name, spec in trainer.backbone.tables.items()
        },
    }
    return json.dumps(facts | resolved, indent=2) + "\n"
