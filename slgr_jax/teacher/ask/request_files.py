"""The two forms of a file of requests, the same requests in the same order.

requests-00000.jsonl    {custom_id, method, url, body} a line: OpenAI's batch API, vLLM
requests-00000.parquet  these as columns, `body` as JSON: Ray Data, Spark
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "body")])
_ROW_GROUP = 1000  # rows of a Parquet file that are in memory at once


def to_line(request: dict[str, Any]) -> bytes:
    """A request as a line of JSON."""
    return _json(request).encode("utf-8", "replace") + b"\n"


@contextlib.contextmanager
def writer(path: pathlib.Path) -> Iterator[Callable[[bytes], object]]:
    """A new file at `path`, in the form that its ending says; yields what takes its lines."""
    if path.suffix == ".jsonl":
        with open(path, "wb") as file:
            yield file.write
        return
    waiting: list[bytes] = []
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as table:

        def write(line: bytes) -> None:
            waiting.append(line)
            if len(waiting) == _ROW_GROUP:
                table.write_table(_columns(waiting))
                waiting.clear()

        yield write
        if waiting:
            table.write_table(_columns(waiting))


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The requests of a file, in their order: custom_id, method, url, body."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as lines:
            yield from map(json.loads, lines)
        return
    with pq.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(_ROW_GROUP))
        for row in itertools.chain.from_iterable(batches):
            yield row | {"body": json.loads(row["body"])}


def _columns(lines: list[bytes]) -> pa.Table:
    requests = [json.loads(line) for line in lines]
    rows = [request | {"body": _json(request["body"])} for request in requests]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
