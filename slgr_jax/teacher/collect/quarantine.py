"""What could not be used, a JSON object a line: DATA/answers/NAME/quarantine.jsonl.

    {"custom_id": ..., "request": ..., "reason": ..., "detail": ..., "todo": ..., "source": ...,
     "digest": ..., "line": ..., "prompt_tokens": ..., "completion_tokens": ...}

The log's manifest lists how much of the file is whole, with its checksum. What stands behind that
was written by a run that was killed before it wrote a manifest, and is dropped: its results come
again with the next run.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from slgr_jax.data.schema import ShardFile
from slgr_jax.errors import ShardError
from slgr_jax.teacher.collect.refusals import KINDS, Refused, state_of

QUARANTINE = "quarantine.jsonl"
_MOST_SHOWN = 2000  # characters of a line that the quarantine keeps
_TOKENS = ("prompt_tokens", "completion_tokens")


def read(root: pathlib.Path, listed: tuple[ShardFile, ...]) -> Iterator[dict[str, Any]]:
    """The entries that the manifest lists, oldest first.

    Raises:
      ShardError: the file is missing, shorter than listed, or was changed.
    """
    if not listed:
        return
    data = _listed_bytes(root, listed[0])
    lines = data.splitlines()
    if len(lines) != listed[0].rows:
        raise ShardError(_damaged(root, f"{len(lines)} lines, the manifest says {listed[0].rows}"))

    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ShardError(_damaged(root, str(error)[:80])) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise ShardError(_damaged(root, f"a line that is no entry: {line[:40]!r}"))
        yield entry


def _listed_bytes(root: pathlib.Path, listed: ShardFile) -> bytes:
    path = root / listed.path
    if not path.is_file():
        raise ShardError(_damaged(root, f"the file is missing; the manifest lists {listed.rows}"))
    with open(path, "rb") as file:
        data = file.read(listed.bytes)
    if len(data) < listed.bytes:
        raise ShardError(_damaged(root, f"{len(data)} bytes, the manifest says {listed.bytes}"))
    if hashlib.sha256(data).hexdigest() != listed.sha256:
        raise ShardError(_damaged(root, f"no match for SHA-256 {listed.sha256[:12]}..."))
    return data


def _damaged(root: pathlib.Path, why: str) -> str:
    return (
        f"{root / QUARANTINE} is damaged ({why}): put back a copy, or remove {root} and run slgr "
        "teach collect again over all results"
    )


def states(entries: Iterator[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """request -> (failed or refused, reason) of the last entry about it."""
    last = {}
    for entry in entries:
        state, request = state_of(entry["reason"]), entry.get("request")
        if state and isinstance(request, int):
            detail = str(entry.get("detail") or "")
            last[request] = state, entry["reason"] + (f": {detail}" if detail else "")
    return last


class Quarantine:
    """The file, open for more entries."""

    def __init__(self, root: pathlib.Path, listed: tuple[ShardFile, ...]) -> None:
        """Open it behind what the manifest lists.

        Raises:
          ShardError: what is listed is damaged.
        """
        self._known: set[str] = set()
        self.tokens: collections.Counter[str] = collections.Counter(dict.fromkeys(_TOKENS, 0))
        self._hash = hashlib.sha256()
        self._rows = self._bytes = 0

        for entry in read(root, listed):
            self._known.add(str(entry.get("digest")))
            self._count(entry)
        if listed:
            self._hash.update(_listed_bytes(root, listed[0]))
            self._rows, self._bytes = listed[0].rows, listed[0].bytes

        self._file = open(root / QUARANTINE, "ab")  # noqa: SIM115 - closed by close()
        os.truncate(root / QUARANTINE, self._bytes)

    @property
    def rows(self) -> int:
        """Entries, old and new."""
        return self._rows

    def add(
        self,
        line: bytes,
        refused: Refused,
        *,
        source: str,
        request: int | None,
        sample: int,
        paid: Mapping[str, int | None],
    ) -> None:
        """Keep a result that cannot be used, once.

        Args:
          line: the result; source: the file and line it is from.
          request: number of the request it answers; None where it is none of ours.
          sample: which of its answers.
          paid: prompt_tokens and completion_tokens, where told.
        """
        digest = hashlib.blake2b(line, digest_size=8, salt=b"%d" % sample).hexdigest()
        if digest in self._known:
            return
        self._known.add(digest)
        kind = KINDS.get(refused.kind)
        entry: dict[str, Any] = {
            "custom_id": refused.custom_id,
            "request": request,
            "reason": refused.kind,
            "detail": refused.detail,
            "todo": kind.advice if kind else "",
            "source": source,
            "digest": digest,
            "line": line.decode("utf-8", "replace")[:_MOST_SHOWN],
            **paid,
        }
        self._count(entry)
        written = json.dumps(entry).encode() + b"\n"
        self._file.write(written)
        self._hash.update(written)
        self._rows, self._bytes = self._rows + 1, self._bytes + len(written)

    def _count(self, entry: Mapping[str, Any]) -> None:
        for key in _TOKENS:
            value = entry.get(key)
            self.tokens[key] += value if isinstance(value, int) else 0

    def flush(self) -> tuple[ShardFile, ...]:
        """Put the entries on disk, and describe the file for the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return (ShardFile(QUARANTINE, self._rows, self._bytes, self._hash.hexdigest()),)

    def close(self) -> None:
        """Close the file; what was not flushed is not listed, and dropped by the next run."""
        self._file.close()
