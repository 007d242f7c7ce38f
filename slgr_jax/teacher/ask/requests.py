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

from slgr_jax.config import TOKEN_LIMITS, RequestConfig
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, ShardError
from slgr_jax.files import atomically
from slgr_jax.teacher.ask import candidates, prompts, request_files, request_writing
from slgr_jax.teacher.ask.asking import Asker, AskingPlan, shown_history
from slgr_jax.teacher.ask.request_writing import (
    NOT_ASKED,
    OPEN,
    Requests,
    first_number,
    make_body,
    request,
)
from slgr_jax.teacher.products import preferences

PathLike = str | os.PathLike[str]


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
    make_body(asker.options, "", "", 0, None)  # a bad --body is refused before anything is done
    if not model:
        raise ConfigError("missing --model: the LLM that is to answer, as its server calls it")

    _refuse_repeats(asker.options)
    options = dataclasses.asdict(asker.options)
    unused = NOT_ASKED if asker.options.prompt == "free_list" else NOT_ASKED | {"catalogue"}
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

    def stream(manifest: schema.RequestManifest, skip: int) -> Requests:
        return _stream(asker, planned, manifest, skip=skip)

    return request_writing.write(root, manifest, stream, overwrite=overwrite)


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


def _stream(
    asker: Asker, planned: AskingPlan, manifest: schema.RequestManifest, *, skip: int
) -> Requests:
    """A line and its row of the index per request, after the first `skip`."""
    options = asker.options
    labelled = options.prompt in prompts.LABELLED
    base, more = asker.answer_tokens()
    offsets, history = shown_history(asker)
    number, position = first_number(manifest.fingerprint), 0

    for user in np.flatnonzero(planned.users):
        lists = asker.of_user(int(user))
        if position + len(lists) <= skip:
            position += len(lists)
            continue
        past = [asker.lines[item] for item in history[offsets[user] : offsets[user + 1]]]
        for permutation, items in lists:
            if position >= skip:
                shown = [asker.lines[item] for item in items]
                text = asker.template.render(past, shown, labelled=labelled)
                limit = options.answer_tokens or 2 * (base + more * items.size) + 16
                form = asker.response_format(items.size)
                body = make_body(options, manifest.model, text, limit, form)
                yield request(number + position, body, int(user), permutation, items)
            position += 1


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
