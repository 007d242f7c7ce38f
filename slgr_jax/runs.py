"""A run's directory: what it was started with, what that resolved to, and how to load it.

config.json    every knob (config.RunConfig)
run.json       versions, devices, hashes, sizes and thresholds that the knobs resolved to
log.jsonl      one object a validation (journal.py)
checkpoints/   state, best state, progress (checkpoint.py)
metrics.json, per_user.parquet, metrics.png    launch/evaluate.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slgr_jax import __version__, checkpoint, config, evaluate, report
from slgr_jax.backbones import make_backbone
from slgr_jax.data import batches
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.distributed import Layout, make_layout
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.gates import make_gate
from slgr_jax.report import EvaluatedRun
from slgr_jax.step import ServingState, Trainer, score_users
from slgr_jax.teacher import preferences

CONFIG, RECORD = "config.json", "run.json"
# Knobs that may change when a run is resumed: none of them changes what a step computes.
RESUMABLE = frozenset(
    {
        *("epochs", "patience", "tensorboard", "verify_checksums", "checkpoint_every_s"),
        *("steps_per_dispatch", "table_shards", "min_devices", "eval_users_per_chunk", "restart"),
    }
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to score.

    Attributes:
      config: as the run was started.
      dataset: what it was trained on.
      score_users: (state, users [B]) -> scores [B, I].
      state: its argument.
      mesh: devices to split users over; None on one device.
    """

    config: config.RunConfig
    dataset: Dataset
    score_users: Callable[[Any, jax.Array], jax.Array]
    state: ServingState
    mesh: Mesh | None


def resident_teacher(
    run: config.RunConfig, dataset: Dataset
) -> batches.TeacherLists | batches.TeacherPairs | None:
    """The teacher's preferences as host arrays to draw from; None without guidance.

    Raises:
      ManifestError, ShardError: the product does not fit or is damaged.
      InputError: it states no preference at all.
    """
    guidance = run.guidance
    if guidance.guidance == "none":
        return None
    teacher = preferences.load(dataset, guidance.teacher, verify=run.train.verify_checksums)
    found: batches.TeacherLists | batches.TeacherPairs
    if teacher.manifest.kind == "preferences":
        keep = teacher.margin >= guidance.min_gap
        found = batches.TeacherPairs(
            users=batches.host_array(teacher.users[keep], np.int32),
            items=batches.host_array(
                np.stack([teacher.preferred, teacher.other], axis=1)[keep], np.int32
            ),
            margins=batches.host_array(teacher.margin[keep], np.float32),
        )
    else:
        found = batches.teacher_lists(
            teacher.offsets,
            teacher.items,
            teacher.scores,
            guidance,
            unlisted_below=teacher.manifest.unlisted == "below",
            positives=dataset.positives(("train",)),
            n_items=dataset.n_items,
        )
    if found.users.size == 0:
        raise InputError(
            f"teacher {guidance.teacher} states no preference with a score gap over "
            f"{guidance.min_gap:g}: every user has fewer than two different scores"
        )
    return found


def build(run: config.RunConfig, dataset: Dataset) -> tuple[Trainer, batches.Resident]:
    """The compiled-in parts of a run and its resident arrays, on the devices."""
    slices = dataset.slices(run.slices)
    resident = batches.Resident(
        batches.interactions(dataset, run.sampler, slices.cold_users, slices.tail_items),
        resident_teacher(run, dataset),
    )
    layout = make_layout(table_shards=run.train.table_shards, min_devices=run.train.min_devices)
    trainer = make_trainer(run, dataset, resident, layout)
    return trainer, jax.device_put(resident, layout.replicated)


def make_trainer(
    run: config.RunConfig, dataset: Dataset, resident: batches.Resident, layout: Layout
) -> Trainer:
    """What is compiled into the steps that draw from `resident` on the devices of `layout`."""
    for name, size in (
        ("batch_size", run.sampler.batch_size),
        ("preferences_per_step", run.preferences_per_step),
    ):
        if size % layout.devices:
            raise ConfigError(f"--{name}={size} is not a multiple of the {layout.devices} devices")
    plan = batches.Plan(
        n_items=dataset.n_items,
        n_pairs=int(resident.interactions.items.size),
        triples=run.sampler.batch_size,
        preferences=run.preferences_per_step,
        sampler=run.sampler,
        guidance=run.guidance,
        search_steps=batches.longest_row(resident).bit_length(),
    )
    backbone = make_backbone(run.model, n_users=dataset.n_users, n_items=dataset.n_items)
    return Trainer(run, backbone, make_gate(run.gate), plan, layout)


def read_config(workdir: str) -> config.RunConfig:
    """The config a run was started with."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{workdir} is not a run: it holds no {CONFIG} (see launch/train.py)")
    try:
        return config.run_config_from_json(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it or use --restart") from error


def restore_run(workdir: str, which: str = "best") -> Run:
    """A run's dataset and its `best` or `last` state, for evaluation and export."""
    run = read_config(workdir)
    dataset = dataset_lib.load(run.data, verify=run.train.verify_checksums)
    _same_dataset(workdir, dataset)
    backbone = make_backbone(run.model, n_users=dataset.n_users, n_items=dataset.n_items)
    # Restoring needs no more than the sizes: one table shard, whatever the run had.
    layout = make_layout()
    plan = batches.Plan(
        dataset.n_items, 1, 1, run.preferences_per_step, run.sampler, run.guidance, 1
    )
    trainer = Trainer(run, backbone, make_gate(run.gate), plan, layout)
    saved = checkpoint.Checkpoints(workdir, trainer, writable=False)
    try:
        state = saved.restore_best() if which == "best" else saved.restore_last()
    finally:
        saved.close()
    mesh = layout.mesh if layout.devices > 1 else None
    return Run(run, dataset, score_users(backbone), state, mesh)


def evaluate_run(workdir: str, label: str, which: str = "best") -> EvaluatedRun:
    """Rank validation and test with a run's state; writes metrics.json and per_user.parquet."""
    run = restore_run(workdir, which)
    parts = evaluate.evaluate_dataset(
        *(run.score_users, run.state, run.dataset, run.config.slices, run.config.evaluation),
        mesh=run.mesh,
    )
    found = EvaluatedRun(workdir, label, run.config, run.dataset, which, parts)
    report.write_run(found)
    return found


def _same_dataset(workdir: str, dataset: Dataset) -> None:
    path = pathlib.Path(workdir) / RECORD
    if not path.is_file():
        return
    was = json.loads(path.read_text(encoding="utf-8"))["split_hash"]
    if was != dataset.manifest.split_hash:
        raise ConfigError(
            f"{workdir} was trained on split {was[:8]}, {dataset.path} now holds split "
            f"{dataset.manifest.split_hash[:8]}; point --data back or train again"
        )


def open_workdir(run: config.RunConfig) -> None:
    """Write the config of a new run; refuse to resume one that computes something else."""
    root = pathlib.Path(run.workdir)
    if run.train.restart:
        checkpoint.clear(run.workdir)
        for name in (CONFIG, RECORD):
            (root / name).unlink(missing_ok=True)
    elif (root / CONFIG).is_file():
        old = read_config(run.workdir)
        changed = config.differences(old, run)
        changed = [text for text in changed if text[2:].split(":")[0] not in RESUMABLE]
        if os.path.abspath(old.data) != os.path.abspath(run.data):
            changed.append(f"--data: {old.data} -> {run.data}")
        if changed:
            raise ConfigError(
                f"{run.workdir} holds a run with other settings ({listing(changed)}); "
                "choose another --workdir, or --restart to delete it"
            )
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / CONFIG, config.to_json(run))


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
        "dataset": dataset.manifest.name,
        "split_hash": dataset.manifest.split_hash,
        "id_map_hash": dataset.manifest.id_map_hash,
        "users": dataset.n_users,
        "items": dataset.n_items,
        "train_pairs": trainer.plan.n_pairs,
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
