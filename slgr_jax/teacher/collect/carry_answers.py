"""What was paid for stays usable: an answer log, and its requests, for the next day's dataset.

Requests, users and items keep their numbers, so that a log is as true as it was: `slgr teach
collect` goes on with it, `--open` asks what is still open, `slgr teach report` shows its cost. A
prompt that was written shows the history of its day. Candidates are not carried: they would ask
about what is a training item by now; draw them anew, under another name.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.ask import requests
from slgr_jax.teacher.collect import answer_log
from slgr_jax.teacher.products import carry
from slgr_jax.teacher.products.same_split import refuse_other_split

# Locks and what a killed write left.
_NOT_COPIED = shutil.ignore_patterns("*.lock", "*.partial*")


def carry_answers(
    dataset: Dataset, parent: Dataset, name: str, *, overwrite: bool = False
) -> list[pathlib.Path]:
    """Copy PARENT/answers/NAME and PARENT/requests/NAME, where there are any, into `dataset`.

    Returns:
      What was written.

    Raises:
      ManifestError: as `carry.check_seen`, or one of them is damaged or of another split.
      InputError: one is there already and `overwrite` is not set.
    """
    carry.check_seen(dataset, parent)
    stamp: dict[str, Any] = {
        "dataset": dataset.manifest.name,
        "id_map_hash": dataset.manifest.id_map_hash,
        "split_hash": dataset.manifest.split_hash,
    }
    written = []
    log = answer_log.log_path(parent.path, name)
    if (log / schema.MANIFEST).is_file():
        answers = answer_log.read_manifest(parent, name)
        # Every shard is read once, so that no damage is carried on.
        answer_log.load_log(parent, name)
        stamped = dataclasses.replace(answers, **stamp)
        target = answer_log.log_path(dataset.path, name)
        written.append(
            _copied(log, target, lambda root: schema.write_manifest(root, stamped), overwrite)
        )
    asked = requests.directory(parent.path, name)
    if (asked / schema.REQUESTS_MANIFEST).is_file():
        source = schema.read_request_manifest(asked)
        refuse_other_split(parent, source, f"{asked}")
        requests.load_index(asked, source)
        restamped = dataclasses.replace(source, **stamp)
        target = requests.directory(dataset.path, name)
        written.append(
            _copied(
                asked, target, lambda root: schema.write_manifest(root, restamped), overwrite,
                manifest=schema.REQUESTS_MANIFEST,
            )
        )  # fmt: skip
    return written


def _copied(
    source: pathlib.Path,
    target: pathlib.Path,
    write: Callable[[pathlib.Path], object],
    overwrite: bool,
    manifest: str = schema.MANIFEST,
) -> pathlib.Path:
    """`target`, with the files of `source` and another manifest; it appears whole."""
    with shards.atomic_directory(target, overwrite=overwrite, manifest=manifest) as staging:
        shutil.copytree(source, staging, ignore=_NOT_COPIED, dirs_exist_ok=True)
        (staging / manifest).unlink()
        write(staging)
    return target
