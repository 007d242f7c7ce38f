"""Which requests of a directory are still open, and why."""

from __future__ import annotations

import os
from typing import NamedTuple

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.ask import candidates, requests
from slgr_jax.teacher.collect import answer_log, quarantine
from slgr_jax.teacher.collect.request_index import RequestIndex


class OpenRequest(NamedTuple):
    """A request that wants another answer.

    Attributes:
      custom_id: of its line in the request files.
      request: its number (schema.REQUESTS).
      state: cut (an answer that ended too early), refused (an answer that cannot be used), failed
        (at the service) or missing (no result).
      reason: why, for people; empty where it is missing.
    """

    custom_id: str
    request: int
    state: str
    reason: str


def open_requests(
    dataset: Dataset, name: str, directory: str | os.PathLike[str] = ""
) -> list[OpenRequest]:
    """The requests that have no whole answer yet, in the order of the request files.

    A later whole answer with the same `custom_id` closes a request, whatever came before. Cut ones
    want more tokens than they had (`state == "cut"`, or a reason that begins with `cut off` or
    `empty answer`).

    Args:
      dataset: what the requests are about.
      name: of the answer log, DATA/answers/NAME. Without a log every request is missing.
      directory: where the requests are; empty: DATA/requests/NAME.

    Raises:
      ManifestError: no requests, or requests or log of another split or id map, or damaged.
      ShardError: a file of theirs is missing or damaged.
    """
    asked = requests.directory(dataset.path, name, os.fspath(directory))
    source = schema.read_request_manifest(asked)
    candidates.refuse_other_split(dataset, source, f"{asked}")
    table = requests.load_index(asked, source)
    index = RequestIndex(table)

    refusals: dict[int, tuple[str, str]] = {}
    root = answer_log.log_path(dataset.path, name)
    if (root / schema.MANIFEST).is_file():
        manifest = answer_log.read_manifest(dataset, name)
        index.remember(shards.read_shards(root, manifest.files["answered"], schema.ANSWERED))
        refusals = quarantine.states(quarantine.read(root, manifest.files["quarantine"]))
    return _open(index, table.column("custom_id").to_pylist(), refusals)


def _open(
    index: RequestIndex, custom_ids: list[str], refusals: dict[int, tuple[str, str]]
) -> list[OpenRequest]:
    still_open = []
    for row, (custom_id, request) in enumerate(zip(custom_ids, index.requests, strict=True)):
        if index.cut[row]:
            state, reason = "cut", "the answer ended before its end"
        elif index.answered[row]:
            continue
        else:
            state, reason = refusals.get(int(request), ("missing", ""))
        still_open.append(OpenRequest(custom_id, int(request), state, reason))
    return still_open
