"""What every set of request files shares: their bodies, and how they come to disk.

A set is a manifest and a stream of its requests, a function of what is asked. Whole files are
listed by the manifest, which is replaced after each; a write that was killed goes on behind them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax import progress
from slgr_jax.config import REQUEST_FORMATS, RequestConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.schema import ShardFile
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.files import atomically
from slgr_jax.teacher.ask import request_files

Row = tuple[int, str, int, int, np.ndarray]  # of schema.REQUESTS
Requests = Iterator[tuple[bytes, Row]]

OPEN = "requests-open-"  # what `requests.write_open` names its files with
_URL = "/v1/chat/completions"
# Options that change nothing in a request; what the budget cuts is in the planned users.
NOT_ASKED = frozenset(
    {
        *("candidate_set", "out", "dry_run", "open", "more_tokens", "price_in", "price_out"),
        "file_format",
        *("max_requests", "max_tokens", "max_cost", "catalogue_tokens"),
    }
)
_INDEX_BITS = 36  # of a request's number; the rest, up to 63, is of the fingerprint


def first_number(fingerprint: str) -> int:
    """The number of the first request of a set; the others follow it."""
    return (int(fingerprint[:16], 16) >> (1 + _INDEX_BITS)) << _INDEX_BITS


def request(
    number: int, body: dict[str, Any], user: int, permutation: int, items: np.ndarray
) -> tuple[bytes, Row]:
    """A request as a line of its file, and its row of the index; its custom_id is its number."""
    custom_id = f"{number:016x}"
    line = {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}
    return request_files.to_line(line), (number, custom_id, user, permutation, items)


def make_body(
    options: RequestConfig,
    model: str,
    text: str,
    limit: int,
    response_format: dict[str, Any] | None,
) -> dict[str, Any]:
    """The body of a request: a chat of one message, `text`.

    Args:
      limit: most tokens of the answer; response_format: its form (`answer_form`), if any.

    Raises:
      ConfigError: --body is no JSON object, or --logprobs is not of one token.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": options.temperature,
        options.token_limit: limit,
        "response_format": response_format,
    }

    if options.logprobs:
        if options.prompt not in ("pairwise", "pointwise", "rating"):
            raise ConfigError(
                f"--logprobs is of one token, and --prompt={options.prompt} asks for many; use "
                "pairwise, pointwise or rating"
            )
        body |= {"logprobs": True, "top_logprobs": options.top_logprobs}

    if options.body:
        try:
            more = json.loads(options.body)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--body={options.body!r} is not JSON: {error}") from error
        if not isinstance(more, dict):
            raise ConfigError(f"--body={options.body!r} is not a JSON object")
        body |= more

    return {key: value for key, value in body.items() if value is not None}


def write(
    root: pathlib.Path,
    manifest: schema.RequestManifest,
    stream: Callable[[schema.RequestManifest, int], Requests],
    *,
    overwrite: bool = False,
) -> schema.RequestManifest:
    """Write the files of a set at `root`, or what is missing of them; returns its manifest.

    Args:
      manifest: of the set, without files.
      stream: (manifest, how many to skip) -> its requests, after those skipped.

    Raises:
      InputError: `root` holds other requests, or is no directory of requests.
      ManifestError: what it holds is damaged.
    """
    _refuse_foreign(root, manifest.fingerprint, overwrite=overwrite)
    root.mkdir(parents=True, exist_ok=True)
    with shards.locked(root):
        manifest = _resume(root, manifest, overwrite=overwrite)
        return manifest if manifest.complete else _write_rest(stream, manifest, root)


def _write_rest(
    stream: Callable[[schema.RequestManifest, int], Requests],
    manifest: schema.RequestManifest,
    root: pathlib.Path,
) -> schema.RequestManifest:
    written = sum(file.rows for file in manifest.files["index"])
    total = int(manifest.plan["requests"])
    left, done = stream(manifest, written), len(manifest.files["index"])
    with progress.bar(total, "request", initial=written) as bar:
        for lines, index in _shards(left, manifest.options, root, done):
            files = manifest.files
            manifest = dataclasses.replace(
                manifest,
                files={
                    "requests": (*files["requests"], lines),
                    "index": (*files["index"], index),
                },
            )
            manifest = schema.write_manifest(root, manifest)
            bar.update(index.rows)
    return schema.write_manifest(root, dataclasses.replace(manifest, complete=True))


def _refuse_foreign(root: pathlib.Path, fingerprint: str, *, overwrite: bool) -> None:
    if (root / schema.REQUESTS_MANIFEST).is_file():
        written = _there(root, overwrite=overwrite)
        if written is not None and written.fingerprint != fingerprint and not overwrite:
            raise InputError(
                f"{root} holds other requests ({written.model}, {written.prompt}, "
                f"{written.plan['requests']} requests); choose another --name or --out, or add "
                "--overwrite"
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} holds no {schema.REQUESTS_MANIFEST}; choose another --out")


def _there(root: pathlib.Path, *, overwrite: bool) -> schema.RequestManifest | None:
    """The manifest at `root`; None without one, or where a damaged one is to be replaced.

    Raises:
      ManifestError: it is damaged, and not to be replaced.
    """
    if not (root / schema.REQUESTS_MANIFEST).is_file():
        return None
    try:
        return schema.read_request_manifest(root)
    except ManifestError:
        if not overwrite:
            raise
        return None


def _resume(
    root: pathlib.Path, manifest: schema.RequestManifest, *, overwrite: bool
) -> schema.RequestManifest:
    """`manifest` with the whole files that `root` already holds; what is of other requests goes."""
    written = _there(root, overwrite=overwrite)
    same = written is not None and written.fingerprint == manifest.fingerprint
    if written is not None and same:
        whole = 0
        ending = f".{manifest.options['file_format']}"  # files of the other form are written anew
        for pair in zip(written.files["requests"], written.files["index"], strict=True):
            if not (pair[0].path.endswith(ending) and all(_is_whole(root, file) for file in pair)):
                break
            whole += 1
        files = {key: listed[:whole] for key, listed in written.files.items()}
        complete = written.complete and whole == len(written.files["index"])
        manifest = dataclasses.replace(manifest, files=files, complete=complete)
    manifest = schema.write_manifest(root, manifest)

    listed = {file.path for key in manifest.files for file in manifest.files[key]}
    forms = (f"requests-*.{form}*" for form in REQUEST_FORMATS)
    for pattern in (*forms, "index-*.arrow*", ".requests-*.partial*"):
        for path in root.glob(pattern):
            of_these = path.name in listed or (same and path.name.startswith(OPEN))
            if not of_these:
                path.unlink()
    return manifest


def _is_whole(root: pathlib.Path, file: ShardFile) -> bool:
    path = root / file.path
    return (
        path.is_file()
        and path.stat().st_size == file.bytes
        and shards.sha256_of(path) == file.sha256
    )


def _shards(
    stream: Requests,
    options: Mapping[str, Any],
    root: pathlib.Path,
    number: int,
) -> Iterator[tuple[ShardFile, ShardFile]]:
    """Write whole files, and describe each pair (lines, index) once both are in place."""
    waiting = next(stream, None)
    while waiting is not None:
        path = root / f"requests-{number:05d}.{options['file_format']}"
        rows, waiting = _write_file(path, waiting, stream, options)

        columns = [list(column) for column in zip(*rows, strict=True)]
        table = pa.table(columns, schema=schema.REQUESTS)
        # Whoever reads it knows it from the manifest, which does not list it yet.
        index = shards.write_shard(root, f"index-{number:05d}.arrow", table)
        written = ShardFile(path.name, len(rows), path.stat().st_size, shards.sha256_of(path))
        yield written, index
        number += 1


def _write_file(
    path: pathlib.Path,
    first: tuple[bytes, Row],
    stream: Requests,
    options: Mapping[str, Any],
) -> tuple[list[Row], tuple[bytes, Row] | None]:
    """Write one file of requests: its rows of the index, and the request after it."""
    most = int(options["megabytes_per_file"] * 1e6)
    rows: list[Row] = []
    waiting: tuple[bytes, Row] | None = first

    def write(partial: pathlib.Path) -> None:
        nonlocal waiting
        size = 0
        with request_files.writer(partial) as write_line:
            while waiting is not None and len(rows) < options["requests_per_file"]:
                line, row = waiting
                if rows and size + len(line) > most:
                    break
                write_line(line)
                size += len(line)
                rows.append(row)
                waiting = next(stream, None)

    atomically(path, write, durable=True)
    return rows, waiting
