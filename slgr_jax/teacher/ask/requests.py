"""Candidate sets -> batch-API request files.

    DATA/requests/NAME/requests.json           manifest: replaced after every file
    DATA/requests/NAME/requests-00000.jsonl    {custom_id, method, url, body} a line, or .parquet
    DATA/requests/NAME/index-00000.arrow       what each of them shows: schema.REQUESTS

The layout is OpenAI's batch API, which `vllm run-batch` takes as it is. The bytes are a function of
what is asked (`asking.py`), and a write that was killed goes on after its last whole file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax import progress
from slgr_jax.config import REQUEST_FORMATS, TOKEN_LIMITS, RequestConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.schema import ShardFile
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.files import atomically
from slgr_jax.teacher.ask import candidates, prompts, request_files
from slgr_jax.teacher.ask.asking import Asker, AskingPlan, shown_history
from slgr_jax.teacher.products import preferences

PathLike = str | os.PathLike[str]
Row = tuple[int, str, int, int, np.ndarray]  # of schema.REQUESTS

OPEN = "requests-open-"  # what `write_open` names its files with
URL = "/v1/chat/completions"
# Options that change nothing in a request; what the budget cuts is in the planned users.
_NOT_ASKED = frozenset(
    {
        *("candidate_set", "out", "dry_run", "open", "more_tokens", "price_in", "price_out"),
        "file_format",
        *("max_requests", "max_tokens", "max_cost", "catalogue_tokens"),
    }
)
_INDEX_BITS = 36  # of a request's number; the rest, up to 63, is of the fingerprint


def directory(data: PathLike, name: str, out: str = "") -> pathlib.Path:
    """`out`, or DATA/requests/NAME."""
    path = pathlib.Path(data) / schema.REQUESTS_DIR / preferences.product_path(data, name).name
    return pathlib.Path(out) if out else path


def write(
    asker: Asker,
    planned: AskingPlan,
    source: schema.CandidateManifest,
    root: pathlib.Path,
    *,
    model: str,
    overwrite: bool = False,
) -> schema.RequestManifest:
    """Write the request files of the planned users at `root`, or what is missing of them.

    Raises:
      ConfigError: no model.
      InputError: `root` holds other requests, or is no directory of requests.
    """
    _body(asker, "", "", 1, 0)  # a bad --body is refused before anything is done
    if not model:
        raise ConfigError("missing --model: the LLM that is to answer, as its server calls it")

    _refuse_repeats(asker.options)
    options = dataclasses.asdict(asker.options)
    unused = _NOT_ASKED if asker.options.prompt == "free_list" else _NOT_ASKED | {"catalogue"}
    decides: dict[str, Any] = {
        "options": {name: value for name, value in options.items() if name not in unused},
        "users": hashlib.sha256(np.packbits(planned.users).tobytes()).hexdigest(),
        "template": asker.template.text,
        "lines": hashlib.sha256("\n".join(asker.lines).encode()).hexdigest(),
        "history": hashlib.sha256(shown_history(asker)[1].tobytes()).hexdigest(),
        "candidates": candidates.content_hash(source),
        "split": (source.split_hash, source.id_map_hash),
        "model": model,
        "seed": asker.seed,
        "score_range": asker.score_range,
    }
    fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    manifest = schema.RequestManifest(
        fingerprint=fingerprint,
        complete=False,
        dataset=source.dataset,
        id_map_hash=source.id_map_hash,
        split_hash=source.split_hash,
        candidates=source.name,
        candidates_hash=decides["candidates"],
        training_items="hidden" if asker.drawn.hidden.indices.size else "none",
        prompt=asker.options.prompt,
        template_hash=asker.template.hash,
        model=model,
        options=options,
        plan={
            **planned.facts,
            "tokens_by": planned.tokens_by,
            "score_range": list(asker.score_range),
        },
        files={"requests": (), "index": ()},
    )

    _refuse_foreign(root, fingerprint, overwrite=overwrite)
    root.mkdir(parents=True, exist_ok=True)
    with shards.locked(root):
        manifest = _resume(root, manifest, overwrite=overwrite)
        return manifest if manifest.complete else _write_rest(asker, planned, manifest, root)


def _refuse_repeats(options: RequestConfig) -> None:
    """Refuse to pay several times for one answer: the same prompt at temperature 0."""
    if options.prompt != "free_list" or options.catalogue != "none":
        return
    if options.permutations > 1 and not options.temperature:
        raise ConfigError(
            f"--permutations={options.permutations} asks the same prompt as often, which has one "
            "answer at --temperature=0: add --temperature=0.7, or --catalogue=all to show the "
            "catalogue in another order each time"
        )


def _write_rest(
    asker: Asker, planned: AskingPlan, manifest: schema.RequestManifest, root: pathlib.Path
) -> schema.RequestManifest:
    written = sum(file.rows for file in manifest.files["index"])
    stream = _stream(asker, planned, manifest, skip=written)
    total = int(planned.facts["requests"])
    with progress.bar(total, "request", initial=written) as bar:
        for lines, index in _shards(stream, asker.options, root, len(manifest.files["index"])):
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


def _stream(
    asker: Asker, planned: AskingPlan, manifest: schema.RequestManifest, *, skip: int
) -> Iterator[tuple[bytes, Row]]:
    """A line and its row of the index per request, after the first `skip`."""
    labelled = asker.options.prompt in prompts.LABELLED
    base, more = asker.answer_tokens()
    offsets, history = shown_history(asker)
    number = (int(manifest.fingerprint[:16], 16) >> (1 + _INDEX_BITS)) << _INDEX_BITS
    position = 0

    for user in np.flatnonzero(planned.users):
        lists = asker.of_user(int(user))
        if position + len(lists) <= skip:
            position += len(lists)
            continue
        past = [asker.lines[item] for item in history[offsets[user] : offsets[user + 1]]]
        for permutation, items in lists:
            if position >= skip:
                custom_id = f"{number + position:016x}"
                shown = [asker.lines[item] for item in items]
                text = asker.template.render(past, shown, labelled=labelled)
                limit = asker.options.answer_tokens or 2 * (base + more * items.size) + 16
                line = {
                    "custom_id": custom_id,
                    "method": "POST",
                    "url": URL,
                    "body": _body(asker, manifest.model, text, items.size, limit),
                }
                row = (number + position, custom_id, int(user), permutation, items)
                yield request_files.to_line(line), row
            position += 1


def _body(asker: Asker, model: str, text: str, shown: int, limit: int) -> dict[str, Any]:
    options = asker.options
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": options.temperature,
        options.token_limit: limit,
        "response_format": asker.response_format(shown),
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


def _shards(
    stream: Iterator[tuple[bytes, Row]],
    options: RequestConfig,
    root: pathlib.Path,
    number: int,
) -> Iterator[tuple[ShardFile, ShardFile]]:
    """Write whole files, and describe each pair (lines, index) once both are in place."""
    waiting = next(stream, None)
    while waiting is not None:
        path = root / f"requests-{number:05d}.{options.file_format}"
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
    stream: Iterator[tuple[bytes, Row]],
    options: RequestConfig,
) -> tuple[list[Row], tuple[bytes, Row] | None]:
    """Write one file of requests: its rows of the index, and the request after it."""
    most = int(options.megabytes_per_file * 1e6)
    rows: list[Row] = []
    waiting: tuple[bytes, Row] | None = first

    def write(partial: pathlib.Path) -> None:
        nonlocal waiting
        size = 0
        with request_files.writer(partial) as write_line:
            while waiting is not None and len(rows) < options.requests_per_file:
                line, row = waiting
                if rows and size + len(line) > most:
                    break
                write_line(line)
                size += len(line)
                rows.append(row)
                waiting = next(stream, None)

    atomically(path, write, durable=True)
    return rows, waiting


def read_lines(root: pathlib.Path, manifest: schema.RequestManifest) -> Iterator[dict[str, Any]]:
    """Every request that is written: custom_id, method, url, body; in their order.

    Raises:
      ShardError: a file is missing or is not what was written.
    """
    for file in manifest.files["requests"]:
        if not (root / file.path).is_file():
            raise ShardError(f"{root / file.path} is missing; run slgr teach requests again")
        shards.check_bytes(root, file)
        yield from request_files.read(root / file.path)


def with_more_tokens(body: Mapping[str, Any], factor: int) -> tuple[dict[str, Any], int]:
    """The body with so many times the tokens of its answer, and the most that is (0: no limit)."""
    wider = dict(body)
    limits = [name for name in TOKEN_LIMITS if isinstance(body.get(name), int)]
    for name in limits:
        wider[name] = int(body[name]) * factor
    return wider, max((wider[name] for name in limits), default=0)


def write_open(
    root: pathlib.Path, manifest: schema.RequestManifest, factors: Mapping[str, int]
) -> list[pathlib.Path]:
    """Write the requests that are still open at `root` once more, in place of an earlier such set.

    They keep their custom_ids, so that `collect` knows the answers.

    Args:
      root: directory that `write` wrote.
      manifest: its manifest.
      factors: custom_ids of the open requests, and how many times the tokens their answers get.

    Returns:
      The files, requests-open-00000.jsonl (or .parquet) and so on; none where nothing is open.

    Raises:
      ShardError: a file of requests is missing or damaged.
    """
    most_bytes = int(manifest.options["megabytes_per_file"] * 1e6)
    most_lines = int(manifest.options["requests_per_file"])
    ending = manifest.options.get("file_format", "jsonl")
    with shards.locked(root):
        for path in root.glob(f"{OPEN}*"):
            path.unlink()

        files: list[pathlib.Path] = []
        lines: list[bytes] = []
        size = 0
        for request in read_lines(root, manifest):
            if request["custom_id"] not in factors:
                continue
            body, _ = with_more_tokens(request["body"], factors[request["custom_id"]])
            line = request_files.to_line(request | {"body": body})
            if lines and (len(lines) == most_lines or size + len(line) > most_bytes):
                files.append(_write_lines(root / f"{OPEN}{len(files):05d}.{ending}", lines))
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            files.append(_write_lines(root / f"{OPEN}{len(files):05d}.{ending}", lines))
    return files


def _write_lines(path: pathlib.Path, lines: list[bytes]) -> pathlib.Path:
    def write(partial: pathlib.Path) -> None:
        with request_files.writer(partial) as write_line:
            for line in lines:
                write_line(line)

    return atomically(path, write, durable=True)


def load_index(root: pathlib.Path, manifest: schema.RequestManifest) -> pa.Table:
    """The index of every request that is written, in their order: schema.REQUESTS."""
    return shards.read_shards(root, manifest.files["index"], schema.REQUESTS)


def report(manifest: schema.RequestManifest, root: pathlib.Path) -> str:
    """Two lines for people: what was written, and what to do with it."""
    files = manifest.files["requests"]
    size = sum(file.bytes for file in files) / 1e6
    answer = (
        f"vllm run-batch -i {root}/requests-00000.jsonl -o results-00000.jsonl --model "
        f"{manifest.model} (or a hosted batch service)"
        if manifest.options.get("file_format", "jsonl") == "jsonl"
        else f"launch/cluster/score_ray.py {root} RESULTS {manifest.model} (docs/cluster.md)"
    )
    return (
        f"{manifest.plan['requests']:,} {manifest.prompt} requests to {manifest.model} in "
        f"{len(files)} files, {size:,.1f} MB: {root}\n  next: {answer}, then slgr teach collect"
    )


def report_open(files: list[pathlib.Path], count: int) -> str:
    """A line for people: what `write_open` wrote."""
    if not files:
        return "no request is open: all have whole answers"
    return (
        f"{count:,} requests are still open, written to {len(files)} files, {files[0]} first; "
        "next: ask for them like for the others, then slgr teach collect"
    )
