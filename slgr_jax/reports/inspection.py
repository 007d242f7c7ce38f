"""What a directory is, and whether every byte of it is still what was written: `slgr inspect`.

A run is its config, what that resolved to, its checkpoint and its results; a dataset directory is
its parts, and what teachers left under it. Nothing is written, trained or evaluated. Whatever does
not agree with its checksum, or cannot be read, is a fault; the rest is told all the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from slgr_jax import json_files
from slgr_jax.config import TEXT_PROMPTS, RunConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import edit_schema, example_schema, fingerprints, schema, shards, user_ranges
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, ShardError, UserError
from slgr_jax.evaluation.results import METRICS, PER_USER
from slgr_jax.teacher.ask import candidates, requests
from slgr_jax.teacher.collect import answer_log, quarantine
from slgr_jax.teacher.local import embeddings, examples
from slgr_jax.teacher.products import edits, preferences, texts, votes
from slgr_jax.training import checkpoint_manifest, epochs, run_directory
from slgr_jax.training.checkpoint_manifest import CheckpointManifest

# Of a train state and of a serving state, the fields with a row per user or item.
_TABLES = ("tables", "values")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found; `print` shows it.

    Attributes:
      path: the directory.
      facts: what it is, ready for JSON.
      lines: the same for people.
      faults: what is damaged or missing, a line each; empty: every checksum agrees.
    """

    path: str
    facts: dict[str, Any]
    lines: list[str]
    faults: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"  DAMAGED: {fault}" for fault in self.faults)])

    def to_json(self) -> str:
        """Facts and faults as a JSON object, on one line."""
        return json.dumps({"path": self.path, **self.facts, "faults": self.faults})


@contextlib.contextmanager
def _noted(faults: list[str], where: str = "") -> Iterator[None]:
    """An error of the block is a fault, also what a manifest of another shape leads to."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))
    except (TypeError, LookupError) as error:
        faults.append(
            f"{where}: {type(error).__name__}: {error}; put back a copy, or make it again"
        )


# ------------------------------------------------------------------------------------------- a run


def inspect_run(workdir: str) -> Inspection:
    """A run's settings, progress, checkpoint and results.

    Raises:
      ConfigError: `workdir` is not a run, or its config.json is damaged.
    """
    run = run_directory.read_config(workdir)
    facts: dict[str, Any] = {"kind": "run", **_settings(run)}
    lines, faults = [f"{workdir}: {_what(run)}"], []  # type: list[str], list[str]

    with _noted(faults):
        facts["resolved"] = run_directory.read_record(workdir)
    lines.append(f"  data: {_where_data_are(workdir, run, facts)}")
    if run.reference_runs:
        with _noted(faults):
            other = run_directory.other_reference_runs(workdir, run)
            facts["reference_runs"] = list(run.reference_runs)
            said = f"not as trained: {other}" if other else "as trained"
            lines.append(f"  reference runs: {', '.join(run.reference_runs)} ({said})")

    root = pathlib.Path(workdir) / checkpoint_manifest.DIRECTORY
    with _noted(faults):
        manifest = checkpoint_manifest.newest(root, checkpoint_manifest.read)
        if manifest is None:
            lines.append("  no finished checkpoint")
        else:
            lines += _checkpoint(root, run, manifest, facts)
            # Of a later one where a run that trains has replaced it meanwhile.
            checkpoint_manifest.newest(root, checkpoint_manifest.verify)
            lines.append("  every file of the checkpoint agrees with its checksum")

    for name, read in ((METRICS, _read_json), (PER_USER, shards.read_table)):
        path = pathlib.Path(workdir) / name
        if path.is_file():
            with _noted(faults):
                read(path)
    facts["evaluated"] = (pathlib.Path(workdir) / METRICS).is_file()
    lines.append("  evaluated: " + ("yes" if facts["evaluated"] else "no (slgr evaluate)"))
    return Inspection(workdir, facts, lines, _once(faults))


def _settings(run: RunConfig) -> dict[str, Any]:
    return {
        "data": run.data,
        "backbone": run.model.backbone,
        "loss": run.loss_name,
        "guidance": run.guidance.guidance,
        "teacher": run.guided_by,
        "gate": run.gate.gate if run.guided else "",
        "seed": run.train.seed,
        "refit": run.train.refit,
    }


def _what(run: RunConfig) -> str:
    guidance = "no guidance"
    if run.guided:
        guidance = (
            f"guidance {run.guidance.guidance} of {run.guided_by} through gate "
            f"{run.gate.gate}, lambda {run.guidance.weight:g}"
        )
    refit = f", refit of {run.train.refit}" if run.train.refit else ""
    return f"{run.model.backbone} ({run.loss_name}), {guidance}, seed {run.train.seed}{refit}"


def _where_data_are(workdir: str, run: RunConfig, facts: Mapping[str, Any]) -> str:
    """The run's dataset, and whether it is there still."""
    resolved = facts.get("resolved") or {}
    about = run.data
    if resolved:
        about += (
            f" ({resolved.get('dataset')}), {resolved.get('users')} users x "
            f"{resolved.get('items')} items, {resolved.get('train_pairs')} training interactions"
        )
    if not os.path.isdir(run.data):
        return f"{about}; not there now"
    try:
        manifest = schema.read_dataset_manifest(run.data)
    except UserError as error:
        return f"{about}; unreadable now ({error})"
    same = all(
        resolved.get(name) in (None, getattr(manifest, name))
        for name in ("split_hash", "id_map_hash")
    )
    return about if same else f"{about}; another split or id map is there now"


def _checkpoint(
    root: pathlib.Path, run: RunConfig, manifest: CheckpointManifest, facts: dict[str, Any]
) -> list[str]:
    progress = manifest.progress
    finished = epochs.over(run.train, progress)
    facts |= {
        "finished": finished,
        "step": progress.step,
        "epoch": progress.epoch,
        "epochs": run.train.epochs,
        "metric": run.train.early_stop_metric,
        "best_metric": progress.best_metric,
        "best_epoch": progress.best_epoch,
        "checkpoint": {
            "bytes": manifest.bytes,
            "files": len(manifest.files),
            "arrays": [dataclasses.asdict(array) for array in manifest.arrays],
        },
    }
    state = "finished" if finished else "not finished (the same slgr train goes on)"
    best = "nothing is validated" if run.train.refit else "no validation yet"
    if progress.best_metric is not None:
        best = (
            f"best {run.train.early_stop_metric} {progress.best_metric:.4f} in epoch "
            f"{progress.best_epoch}"
        )
    lines = [
        f"  {state}: epoch {progress.epoch} of {run.train.epochs}, step {progress.step}, {best}",
        f"  checkpoint: {root / str(progress.step)}, {_size(manifest.bytes)} in "
        f"{len(manifest.files)} files",
    ]
    tables = [array for array in manifest.arrays if array.name.split("/")[1] in _TABLES]
    dense = [array for array in manifest.arrays if array not in tables]
    for array in sorted(tables, key=lambda array: array.name):
        shape = " x ".join(map(str, array.shape))
        lines.append(f"    {array.name:24} {shape:>18} {array.dtype:>8} {array.bytes:>14,} bytes")
    size = sum(array.bytes for array in dense)
    lines.append(f"    {f'{len(dense)} other arrays':24} {size:>42,} bytes")
    return lines


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json_files.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); run slgr evaluate again") from error


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes:,} bytes"


def _once(faults: list[str]) -> list[str]:
    return list(dict.fromkeys(faults))


# --------------------------------------------------------------------------------------- a dataset


def inspect_data(path: str) -> Inspection:
    """A dataset directory's counts and shards, and the products, requests and answers under it.

    Raises:
      ManifestError: `path` is not a dataset directory, or its manifest is damaged.
    """
    manifest = schema.read_dataset_manifest(path)
    faults: list[str] = []
    files = [file for listed in manifest.files.values() for file in listed]
    facts: dict[str, Any] = {
        "kind": "dataset",
        "name": manifest.name,
        "created": manifest.created,
        "source": manifest.source,
        "split": manifest.split,
        "filters": manifest.filters,
        "counts": manifest.counts,
        "split_hash": manifest.split_hash,
        "id_map_hash": manifest.id_map_hash,
        "bytes": sum(file.bytes for file in files),
    }
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items() if count)
    split = ", ".join(f"{name} {value}" for name, value in manifest.split.items())
    lines = [
        f"{path}: dataset {manifest.name}, made {manifest.created}",
        f"  {counts}",
        f"  split: {split}; split hash {manifest.split_hash[:8]}, ids {manifest.id_map_hash[:8]}",
    ]
    dataset = None
    for part, columns in _columns().items():
        with _noted(faults):
            shards.read_shards(path, manifest.files[part], columns)
    if not faults:
        with _noted(faults):
            dataset = dataset_lib.load(path)
            _refuse_other_hashes(dataset)
            _refuse_other_counts(dataset)
    if not faults:
        size = _size(facts["bytes"])
        lines.append(f"  every one of {len(files)} shards agrees with its checksum, {size}")

    if dataset is None:
        lines.append("  products are not looked at: their dataset is damaged")
        return Inspection(path, facts, lines, faults)
    for kind, inspect in _PRODUCTS.items():
        for directory in sorted((pathlib.Path(path) / kind).glob("*")):
            if directory.is_dir() and not directory.name.startswith("."):
                with _noted(faults, str(directory)):
                    about = inspect(dataset, directory.name)
                    facts.setdefault(kind, {})[directory.name] = about
                    lines += [f"  {line}" for line in about.splitlines()]
    return Inspection(path, facts, lines, _once(faults))


def _columns() -> dict[str, Any]:
    return {
        **dict.fromkeys(schema.PARTS, schema.INTERACTIONS),
        "users": schema.USERS,
        "items": schema.ITEMS,
    }


def _refuse_other_hashes(dataset: Dataset) -> None:
    """Raise `ShardError` where the ids or the split are not those that the manifest states."""
    computed = {
        "id_map_hash": fingerprints.id_map_hash(
            dataset.user_ids, dataset.items.column("item_id").combine_chunks()
        ),
        "split_hash": fingerprints.split_hash(
            {name: (dataset.part(name).users, dataset.part(name).items) for name in schema.PARTS}
        ),
    }
    for name, value in computed.items():
        stated = getattr(dataset.manifest, name)
        if value != stated:
            raise ShardError(
                f"{dataset.path / schema.MANIFEST} states {name} {stated[:12]}, its shards have "
                f"{value[:12]}: put back a copy, or prepare again with --overwrite"
            )


def _refuse_other_counts(dataset: Dataset) -> None:
    """Raise `ShardError` where users numbered by shard do not have the interactions counted."""
    if dataset.user_bounds is None:
        return
    stated = user_ranges.read_counts(
        dataset.path, dataset.manifest, dataset.n_users, dataset.n_items, verify=True
    )
    for name, counts in zip(("history", "popularity"), stated, strict=True):
        other = np.flatnonzero(counts != getattr(dataset, name))
        if other.size:
            raise ShardError(
                f"{dataset.path}/{name} has {counts[other[0]]} in row {other[0]}, the training "
                f"interactions {getattr(dataset, name)[other[0]]}: prepare again with --overwrite"
            )


def _teacher(dataset: Dataset, name: str) -> str:
    manifest = preferences.checked(dataset, name)
    if manifest.votes:
        votes.load(dataset, name)
    return preferences.report(manifest)


def _embeddings(dataset: Dataset, name: str) -> str:
    return embeddings.report(embeddings.load(dataset, name).manifest)


def _candidates(dataset: Dataset, name: str) -> str:
    return candidates.report(candidates.load(dataset, name)[1])


def _requests(dataset: Dataset, name: str) -> str:
    root = requests.directory(dataset.path, name)
    manifest = schema.read_request_manifest(root)
    requests.load_index(root, manifest)
    written = sum(1 for _ in requests.read_lines(root, manifest))
    state = "complete" if manifest.complete else "not complete (slgr teach requests goes on)"
    return f"requests {name}: {written:,} {manifest.prompt} to {manifest.model}, {state}"


def _answers(dataset: Dataset, name: str) -> str:
    root = answer_log.log_path(dataset.path, name)
    rows, manifest = answer_log.load_log(dataset, name)
    refused = sum(1 for _ in quarantine.read(root, manifest.files["quarantine"]))
    prompt = manifest.sources[0]["prompt"]
    what = {"free_list": "titles", **dict.fromkeys(TEXT_PROMPTS, "texts")}.get(prompt, "scores")
    return f"answers {name}: {rows.num_rows:,} {what} that hold, {refused:,} results in quarantine"


def _texts(dataset: Dataset, name: str) -> str:
    return texts.report(texts.load(dataset, name))


def _edits(dataset: Dataset, name: str) -> str:
    return edits.report(edits.load(dataset, name))


def _examples(dataset: Dataset, name: str) -> str:
    return examples.report(examples.load(dataset, name))


# By the directory under DATA: what checks a product and says what it is.
_PRODUCTS: Mapping[str, Callable[[Dataset, str], str]] = {
    schema.TEACHER_DIR: _teacher,
    schema.EMBEDDINGS_DIR: _embeddings,
    schema.CANDIDATES_DIR: _candidates,
    schema.REQUESTS_DIR: _requests,
    schema.ANSWERS_DIR: _answers,
    schema.TEXTS_DIR: _texts,
    edit_schema.EDITS_DIR: _edits,
    example_schema.EXAMPLES_DIR: _examples,
}
