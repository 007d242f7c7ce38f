"""A run's directory: what it was started with, and what that resolved to.

config.json    every knob (config.RunConfig); a file for --config
run.json       versions, devices, hashes, sizes and thresholds that the knobs resolved to
log.jsonl      one object a validation (training_log.py)
tracking.json  which runs of trackers are this run's (tracking.py)
.lock          held while a run trains; names its process, the first of a job
checkpoints/   state, best state, progress (checkpoint.py)
metrics.json, per_user.parquet, metrics.png    slgr evaluate
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from slgr_jax import __version__, cluster, config, files, json_files, locks
from slgr_jax.config import knobs
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, listing
from slgr_jax.evaluation.results import METRICS, PER_USER, PICTURE
from slgr_jax.models.embedding_table import InitialRows
from slgr_jax.sampling.context import choose_features
from slgr_jax.teacher.products import preferences
from slgr_jax.training import (
    checkpoint,
    checkpoint_manifest,
    edited,
    example_products,
    initial_values,
    tracking,
    vector_products,
)
from slgr_jax.training.step import Trainer

CONFIG, RECORD, LOCK = "config.json", "run.json", ".lock"
# How long a file that another process has made may take to be seen.
_SHARED_S = 5.0
_RECORDED = ("split_hash", "id_map_hash", "teacher_hash")
# Knobs that may change when a run is resumed: none of them changes what a step computes.
RESUMABLE = frozenset(
    {
        "epochs",
        "patience",
        "track",
        "verify_checksums",
        "checkpoint_every_s",
        "steps_per_dispatch",
        "table_shards",
        "min_devices",
        "eval_users_per_chunk",
        "restart",
        "kernels",
        # Reference runs may have moved: what they hold is compared (`reference_checkpoints`).
        "reference_runs",
    }
)


def read_config(workdir: str) -> config.RunConfig:
    """The config a run was started with."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{workdir} is not a run: it holds no {CONFIG} (see slgr train)")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return knobs.from_json(config.RunConfig, text, str(path), upgrade=config.upgrade)
    except ConfigError as error:
        raise ConfigError(f"{error}; restore it, or train anew with --restart") from error


def reference_checkpoints(run: config.RunConfig) -> list[dict[str, Any]]:
    """Where each reference run lies, and which checkpoint it holds.

    `checkpoint` is the checksum of its manifest, which has those of all files: a copy of a run has
    the same.
    """
    return [_checkpoint_of(workdir, "--reference_runs") for workdir in run.reference_runs]


def _checkpoint_of(workdir: str, knob: str) -> dict[str, Any]:
    root = pathlib.Path(workdir) / checkpoint_manifest.DIRECTORY
    manifest = checkpoint_manifest.newest(root, checkpoint_manifest.read)
    if manifest is None:
        raise ConfigError(f"{knob}: {workdir} holds no finished checkpoint; train it first")
    return {
        "run": os.path.abspath(workdir),
        "step": manifest.progress.step,
        "checkpoint": manifest.checksum,
    }


def origin(run: config.RunConfig, knob: str) -> dict[str, Any] | None:
    """Which checkpoint a run with --init_from or --refit began with, as `reference_checkpoints`
    has it.

    A run that has a checkpoint of its own began before: what its record says holds. None without
    that knob, or where that record is gone.

    Args:
      knob: init_from, init_ids_from or refit.
    """
    source = getattr(run.train, knob)
    if not source:
        return None
    if checkpoint.exists(run.workdir):
        return (read_record(run.workdir) or {}).get(knob)
    return _checkpoint_of(source, f"--{knob}")


def other_refit(workdir: str, run: config.RunConfig) -> str | None:
    """How the run that `run` refits differs from the one that the run in `workdir` began with."""
    was, source = (read_record(workdir) or {}).get("refit"), run.train.refit
    if not (source and was and checkpoint.exists(source)):
        return None  # what is needed of it is in the refit's own checkpoint
    now = _checkpoint_of(source, "--refit")
    if now["checkpoint"] == was["checkpoint"]:
        return None
    return f"{source} was at step {was['step']}, is at step {now['step']}, another checkpoint"


def other_reference_runs(workdir: str, run: config.RunConfig) -> str | None:
    """How the reference runs of `run` differ from those that the run in `workdir` had, if so."""
    record, now = read_record(workdir), reference_checkpoints(run)
    if record is None:
        names = [read_config(workdir).gate.reference_runs, run.gate.reference_runs]
        return None if names[0] == names[1] else " -> ".join(names)
    was = record.get("reference_runs", [])
    if [x["checkpoint"] for x in was] == [x["checkpoint"] for x in now]:
        return None
    old, new = (", ".join(f"{x['run']} at step {x['step']}" for x in y) for y in (was, now))
    return f"{old} -> {new}, other checkpoints"


def recorded(workdir: str) -> dict[str, Any] | None:
    """The hashes that `run.json` names; None if there is none."""
    hashes = read_record(workdir)
    return None if hashes is None else {key: hashes[key] for key in _RECORDED}


def read_record(workdir: str) -> dict[str, Any] | None:
    """What `run.json` says; None if there is none."""
    path = pathlib.Path(workdir) / RECORD
    if not path.is_file():
        return None
    try:
        resolved = json_files.unsealed(json_files.loads(path.read_bytes()))
        return resolved | {key: resolved[key] for key in _RECORDED}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged; restore it, or remove it: training writes it again"
        ) from error


def trained_on(workdir: str, dataset: Dataset) -> bool | None:
    """Whether a run's record names this split and these ids; None if there is no record."""
    was = recorded(workdir)
    if was is None:
        return None
    return all(was[key] == getattr(dataset.manifest, key) for key in ("split_hash", "id_map_hash"))


def same_features(workdir: str, run: config.RunConfig, dataset: Dataset) -> bool | None:
    """Whether the features that a run read are what `dataset` holds; None if there is no record."""
    record = read_record(workdir)
    if record is None:
        return None
    # Records of runs before there were features do not name them: these read none.
    return bool(record.get("features_hash", "") == choose_features(run.model, dataset).digest)


def teacher_hash(run: config.RunConfig) -> str:
    """SHA-256 over the checksums of the teacher's shards; empty without a teacher of lists."""
    if not run.guidance.teacher:
        return ""
    path = preferences.product_path(run.data, run.guidance.teacher)
    manifest = schema.read_teacher_manifest(path)
    return schema.files_hash((*manifest.files, *manifest.votes))


@contextlib.contextmanager
def opened(run: config.RunConfig, dataset: Dataset) -> Iterator[Callable[[], None]]:
    """Hold a run's directory, with its config written, against other processes.

    Yields:
      `may_write`, which raises a ConfigError once another process has taken the directory over.

    Raises:
      ConfigError: it cannot be made, is not a run's, is held, or holds a run that computes
        something else.
    """
    root = pathlib.Path(run.workdir)
    with contextlib.ExitStack() as stack:

        def open_() -> Callable[[], None]:
            if not cluster.is_first():
                return lambda: None
            may_write = stack.enter_context(held(root))
            _take(root, run, dataset)
            return may_write

        may_write = cluster.together(open_)
        _refuse_unshared(root)
        yield may_write


def _take(root: pathlib.Path, run: config.RunConfig, dataset: Dataset) -> None:
    """Make the directory that the caller holds this run's.

    Raises:
      ConfigError: it holds a run that computes something else.
    """
    if run.train.restart:
        clear(root)
    elif (root / CONFIG).is_file():
        _refuse_changes(read_config(run.workdir), run, dataset)
    # Who trains from this file (--config) does not ask to delete anything.
    settled = dataclasses.replace(run, train=dataclasses.replace(run.train, restart=False))
    files.write_atomically(root / CONFIG, knobs.to_json(settled))


def _refuse_unshared(root: pathlib.Path) -> None:
    """Refuse a directory that is another one on some process of the job.

    Raises:
      ConfigError: a process does not see what the first one writes there.
    """
    if cluster.processes() == 1:
        return
    # A name that nobody has asked for: no network file system remembers that it is missing.
    name = cluster.first(f".shared-{secrets.token_hex(8)}")
    if cluster.is_first():
        (root / name).touch()
    host = cluster.first(platform.node())

    def look() -> None:
        limit = time.monotonic() + _SHARED_S
        while not (root / name).exists():
            if time.monotonic() > limit:
                raise ConfigError(
                    f"--workdir={root} is not the directory that process 0 on {host} writes to: "
                    "all processes of a job need one, on a file system that they share"
                )
            time.sleep(0.05)

    try:
        cluster.together(look)
    finally:
        if cluster.is_first():
            (root / name).unlink()


@contextlib.contextmanager
def held(root: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Make a run's directory and hold it against other processes.

    Yields:
      `may_write`, as of `opened`.

    Raises:
      ConfigError: it cannot be made, is not a run's, or is held.
    """
    if (root / schema.MANIFEST).is_file():
        raise ConfigError(f"{root} is a dataset or a teacher product; choose another --workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir={root} cannot be made: {error.strerror}") from error
    with _lost(root), contextlib.ExitStack() as stack:
        yield _hold(stack, root)


def clear(root: pathlib.Path) -> None:
    """Delete the run in `root`, which the caller holds."""
    checkpoint.clear(str(root))
    for name in (CONFIG, RECORD, METRICS, PER_USER, PICTURE, tracking.STATE):
        (root / name).unlink(missing_ok=True)


def _hold(stack: contextlib.ExitStack, root: pathlib.Path) -> Callable[[], None]:
    """Lock the run until the stack is closed; what raises once the lock is lost."""
    try:
        lock = stack.enter_context(locks.hold(root / LOCK))
    except locks.LockHeldError as error:
        raise ConfigError(
            f"{root} is being trained by another process ({error.holder}); stop that one "
            "or choose another --workdir"
        ) from error
    except OSError as error:
        raise ConfigError(f"--workdir={root} cannot be made: {error.strerror}") from error

    def may_write() -> None:
        with _lost(root):
            lock.check()

    return may_write


@contextlib.contextmanager
def _lost(root: pathlib.Path) -> Iterator[None]:
    """Say a lost lock in our own way."""
    try:
        yield
    except locks.LockLostError as error:
        raise ConfigError(
            f"{root} was taken over by {error.holder or 'another process'}, because this process "
            "was not heard of; nothing more is written here, the checkpoint before is kept: let "
            "that one finish, or stop it and give the same command again"
        ) from error


def _refuse_changes(old: config.RunConfig, run: config.RunConfig, dataset: Dataset) -> None:
    same = trained_on(run.workdir, dataset)
    changed = config.differences(old, run)
    changed = [text for text in changed if text[2:].split(":")[0] not in RESUMABLE]
    moved = os.path.abspath(old.data) != os.path.abspath(run.data)
    if same is False or (same is None and moved):
        what = f"{old.data} -> {run.data}" if moved else f"{run.data} holds another split"
        changed.append(f"--data: {what}")
    was = recorded(run.workdir)
    if was is not None and was["teacher_hash"] != teacher_hash(run) and not changed:
        changed.append(f"--teacher: {run.guidance.teacher} holds other answers now")
    if not changed and same_features(run.workdir, run, dataset) is False:
        changed.append(f"--features: {run.model.features} are others in {run.data} now")
    if not changed and (vectors := vector_products.changed(run, dataset, read_record(run.workdir))):
        changed.append(vectors)
    if not changed and (shown := example_products.changed(run, dataset, read_record(run.workdir))):
        changed.append(shown)
    if not changed and (edits := edited.changed(run, dataset, read_record(run.workdir))):
        changed.append(edits)
    if not changed and (other := other_reference_runs(run.workdir, run)):
        changed.append(f"--reference_runs: {other}")
    if not changed and (other := other_refit(run.workdir, run)):
        changed.append(f"--refit: {other}")
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with other settings ({listing(changed)}); "
            "choose another --workdir, or --restart to delete it"
        )


def _initial_rows(
    run: config.RunConfig, dataset: Dataset, initial: Mapping[str, InitialRows]
) -> dict[str, dict[str, int]]:
    """By table: how many rows began with a vector, and how many as drawn.

    Of a run that has a checkpoint, what its record says holds, as of `origin`.
    """
    if not checkpoint.exists(run.workdir):
        return initial_values.counts(initial, dataset)
    recorded: dict[str, dict[str, int]] = (read_record(run.workdir) or {}).get("initial_rows", {})
    return recorded


def write_record(
    run: config.RunConfig,
    dataset: Dataset,
    trainer: Trainer,
    initial: Mapping[str, InitialRows],
    **resolved: int,
) -> None:
    """Write `run.json`: what the config resolved to on this machine.

    One process does for a job.
    """
    if not cluster.is_first():
        return
    slices, features = dataset.slices(run.slices), choose_features(run.model, dataset)
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
        "features_hash": features.digest,
        "features": [f"{feature.side}.{feature.name}" for feature in features.features],
        "feature_values_cut": features.cut,
        "vectors": vector_products.record(run, dataset),
        "examples_read": example_products.record(run, dataset),
        "edited_by": edited.record(run, dataset),
        "initial_rows": _initial_rows(run, dataset, initial),
        "reference_runs": reference_checkpoints(run),
        "init_from": origin(run, "init_from"),
        "init_ids_from": origin(run, "init_ids_from"),
        "refit": origin(run, "refit"),
        "users": dataset.n_users,
        "items": dataset.n_items,
        "train_pairs": dataset.train_pairs,
        "drawn_an_epoch": trainer.plan.drawn,
        "guidance_queries_per_step": trainer.guidance.queries if trainer.guidance else 0,
        "cold_user_history": slices.cold_user_history,
        "tail_item_popularity": slices.tail_item_popularity,
        "cold_users": int(slices.cold_users.sum()),
        "tail_items": int(slices.tail_items.sum()),
        "tables": {
            name: {"rows": spec.rows, "width": spec.width}
            for name, spec in trainer.backbone.tables.items()
        },
    }
    text = json.dumps(json_files.sealed(facts | resolved), indent=2) + "\n"
    files.write_atomically(pathlib.Path(run.workdir) / RECORD, text)
