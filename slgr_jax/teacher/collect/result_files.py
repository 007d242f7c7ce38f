"""Files of results -> their records, one JSON object each, as bytes.

JSON lines, a JSON array or object, Parquet or Arrow; gzip, Zstandard, bzip2 or LZ4 around the first
two; UTF-8, UTF-16, or UTF-32 with a byte order mark. The content decides, not the name.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax.config import REQUEST_FORMATS
from slgr_jax.data import shards
from slgr_jax.errors import InputError, ShardError, listing
from slgr_jax.teacher.collect.quarantine import QUARANTINE

# Of the files of a folder; a file that is named itself may have any.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".lz4")
_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2",
             b"\x04\x22\x4d\x18": "lz4"}  # fmt: skip
_NOT_READ = {b"PK": "a zip file: unpack it", b"\xfd7zX": "packed with xz: unpack it",
             b"7z\xbc\xaf": "a 7z file: unpack it", b"SQLi": "an SQLite file: write its table as "
             "Parquet with custom_id and text"}  # fmt: skip
_BATCH = 4096  # rows of a Parquet file that are in memory at once
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, which begins alike
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"{\0", "utf-16-le"),  # without a mark: JSON begins with ASCII
    (b"[\0", "utf-16-le"),
    (b"\0{", "utf-16-be"),
    (b"\0[", "utf-16-be"),
)


@dataclasses.dataclass(frozen=True)
class ResultFiles:
    """What `--results` names.

    Attributes:
      paths: files to read, in order.
      passed_over: (file, why) of the others in the folders named.
    """

    paths: tuple[pathlib.Path, ...]
    passed_over: tuple[tuple[pathlib.Path, str], ...]

    def report(self) -> str:
        """A line for people about what was passed over; empty where nothing was."""
        if not self.passed_over:
            return ""
        reasons: dict[str, list[str]] = {}
        for path, why in self.passed_over:
            reasons.setdefault(why, []).append(path.name)
        told = "; ".join(f"{listing(names, 4)} ({why})" for why, names in reasons.items())
        return f"  passed over {len(self.passed_over):,} files: {told}"


class Record(NamedTuple):
    """A record of a file: `source` says where it stands, for people."""

    source: str
    line: bytes


def choose(given: str, asked: pathlib.Path) -> ResultFiles:
    """The files that `--results` names: each a file, or a folder of result files at any depth.

    Args:
      given: paths, separated by commas.
      asked: the folder of the requests, whose own files are no results.

    Raises:
      InputError: a path does not exist, or there is no file to read.
    """
    paths: list[pathlib.Path] = []
    passed: list[tuple[pathlib.Path, str]] = []
    requested = {
        path.resolve() for form in REQUEST_FORMATS for path in asked.glob(f"requests-*.{form}")
    }
    for part in filter(None, map(str.strip, given.split(","))):
        path = pathlib.Path(part)
        if not path.exists():
            raise InputError(f"--results={part} does not exist")
        folder = path.is_dir()
        for file in sorted(path.rglob("*")) if folder else [path]:
            if file.is_dir():
                continue
            why = _passed_over(file, requested, folder=folder)
            if why:
                passed.append((file, why))
            elif file not in paths:
                paths.append(file)
    if not paths:
        others = ResultFiles((), tuple(passed)).report().strip()
        raise InputError(
            f"--results={given} names no file of results ({', '.join(SUFFIXES)}, also with "
            f"{' or '.join(PACKED[:2])})" + (f"; {others}" if others else "")
        )
    return ResultFiles(tuple(paths), tuple(passed))


def _passed_over(file: pathlib.Path, requested: set[pathlib.Path], *, folder: bool) -> str:
    if file.resolve() in requested:
        return "requests"
    if file.name == QUARANTINE:
        return "a quarantine"
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    if folder and (file.name.startswith(".") or not name.endswith(SUFFIXES)):
        return "not " + ", ".join(SUFFIXES)
    if folder and name in ("manifest.json", "requests.json", "ledger.json"):
        return "a manifest"
    return ""


def records(path: pathlib.Path) -> Iterator[Record]:
    """The records of a file, in order; blank lines are none.

    Raises:
      InputError: the file is packed or encoded in a way that cannot be read, or is cut off.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        _refuse_other_formats(path, head)
        if head == b"PAR1":
            yield from _parquet(path)
            return
        if head in (b"ARRO", b"\xff\xff\xff\xff"):
            yield from _rows(path, shards.read_table(path).to_batches(_BATCH))
            return
        with _unpacked(path, head) as stream:
            yield from _json_records(path, stream)
    except (OSError, EOFError, UnicodeError, pa.ArrowException, ShardError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path} cannot be read to its end ({reason}): copy it again, or leave it out"
        ) from error


def _refuse_other_formats(path: pathlib.Path, head: bytes) -> None:
    what = next((what for mark, what in _NOT_READ.items() if head.startswith(mark)), "")
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".txt") and head[:1] not in (b"{", b"["):
        what = what or "no JSON: write its table as Parquet or JSON lines with custom_id and text"
    if what:
        raise InputError(f"--results: {path} is {what}, or leave it out")


def _unpacked(path: pathlib.Path, head: bytes) -> IO[bytes]:
    kind = next((kind for mark, kind in _PACKINGS.items() if head.startswith(mark)), None)
    if kind is None:
        return open(path, "rb")
    stream: IO[bytes] = io.BufferedReader(pa.input_stream(str(path), compression=kind))
    return stream


def _json_records(path: pathlib.Path, stream: IO[bytes]) -> Iterator[Record]:
    head = stream.read(4)
    encoding = next((name for mark, name in _BOMS if head.startswith(mark)), None)
    lines: Iterator[bytes]
    if encoding is not None:
        text = (head + stream.read()).decode(encoding)
        lines = iter(text.encode("utf-8", "surrogatepass").splitlines(keepends=True))
    else:
        lines = _lines(head, stream)
    numbered = enumerate(lines, start=1)
    first = next((pair for pair in numbered if pair[1].strip()), None)
    if first is None:
        return
    if _begins_document(first[1]):
        yield from _document(path, first[0], first[1], lines)
        return
    for number, line in itertools.chain([first], numbered):
        if line.strip():
            yield Record(f"{path.name}:{number}", line)


def _lines(head: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of a stream of which `head` is read already."""
    line = head + stream.readline() if not head.endswith(b"\n") else head
    *first, last = line.split(b"\n")
    yield from (part + b"\n" for part in first)
    if last:
        yield last
    yield from stream


def _begins_document(line: bytes) -> bool:
    """Whether a file is one JSON value over several lines (or an array in one)."""
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    return start[:1] == b"[" or start == b"{"


def _document(
    path: pathlib.Path, number: int, line: bytes, lines: Iterator[bytes]
) -> Iterator[Record]:
    """An array of records, or indented objects one after the other; lines where it is neither."""
    data = line + b"".join(lines)
    text = data.decode("utf-8-sig", "replace")
    values = []
    position, decoder = 0, json.JSONDecoder()
    try:
        while (position := _next_value(text, position)) < len(text):
            value, position = decoder.raw_decode(text, position)
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        for offset, held in enumerate(data.splitlines(keepends=True)):
            if held.strip():
                yield Record(f"{path.name}:{number + offset}", held)
        return
    for count, value in enumerate(values, start=1):
        yield Record(f"{path.name}#{count}", json.dumps(value).encode())


def _next_value(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _parquet(path: pathlib.Path) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(_BATCH))


def _rows(path: pathlib.Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    count = 0
    for batch in batches:
        for row in batch.to_pylist():
            count += 1
            yield Record(f"{path.name}#{count}", json.dumps(row, default=_as_text).encode())


def _as_text(value: Any) -> str:
    """What JSON has no type for: bytes are text, a moment is as it is printed."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
