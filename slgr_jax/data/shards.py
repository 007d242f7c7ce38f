"""Sharded Arrow: written whole or not at all, read by mapping memory, checked on the way in.

Three encodings are read, told apart by their first bytes and not by their names: the Arrow
IPC file format (what this project writes), the IPC stream format (what Hugging Face
`datasets` writes) and Parquet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from slgr_jax.data.schema import MANIFEST, ShardFile
from slgr_jax.errors import InputError, ShardError, listing, printable
from slgr_jax.files import PathLike
from slgr_jax.files import sync as sync
from slgr_jax.locks import LockHeldError, LockLostError, hold

# Temporary directories that were not touched for so long, and that nobody holds, are leftovers.
_LEFTOVER_S = 60.0
ROWS_STREAMED = 1 << 20
# Of a row of interactions in an Arrow stream: two ids and their offsets.
_STREAM_ROW_BYTES = 16
Job = TypeVar("Job")
Result = TypeVar("Result")


def on_all_cores(work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    """`work` of each job, in threads; the error of the first job that has one is raised.

    For work that leaves Python for long: hashing, files, numpy on more than a few thousand values.
    """
    todo = list(jobs)
    if len(todo) < 2:
        return [work(job) for job in todo]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, todo))


@contextlib.contextmanager
def atomic_directory(
    out: PathLike, *, overwrite: bool = False, manifest: str = MANIFEST
) -> Iterator[pathlib.Path]:
    """A new directory that appears at `out` only when the block ends without an error.

    Yields a temporary directory beside `out`; on success it is renamed to `out`, on failure
    it is removed, with any parent that was made for it. An existing `out` is an `InputError`
    unless `overwrite` and it has a `manifest` (see `check_target`); it is removed only once the new
    one is in place.
    What a process that was killed left beside `out` is removed by the next that writes there.
    """
    target = pathlib.Path(out).absolute()
    check_target(target, overwrite=overwrite, manifest=manifest)
    created = [parent for parent in target.parents if not parent.exists()]
    staging = retired = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            name = tempfile.mkdtemp(prefix=_staging_prefix(target), dir=target.parent)
        except OSError as error:
            raise InputError(f"{out} cannot be made: {error.strerror}") from error
        staging = pathlib.Path(name)
        with hold(staging):
            yield staging
        staging.chmod(0o755)
        if target.exists():
            retired = staging.with_name(staging.name + "-old")
            target.rename(retired)
        staging.rename(target)
        sync(target.parent)
    except BaseException:
        if retired is not None:
            if target.exists():
                shutil.rmtree(retired, ignore_errors=True)
            else:
                retired.rename(target)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    if retired is not None:
        shutil.rmtree(retired)


@contextlib.contextmanager
def scratch_directory(target: PathLike) -> Iterator[pathlib.Path]:
    """A directory beside `target` for temporary files, that is gone after the block.

    What a process that was killed left there is removed by the next (`remove_leftovers`).

    Raises:
      InputError: it cannot be made.
    """
    path = pathlib.Path(target).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=_staging_prefix(path), dir=path.parent))
    except OSError as error:
        raise InputError(
            f"temporary files cannot be written in {path.parent}: {error.strerror}; name another "
            "directory with --temp_dir"
        ) from error
    try:
        with hold(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _staging_prefix(target: pathlib.Path) -> str:
    return f".{target.name}.partial-"


def remove_leftovers(target: pathlib.Path) -> None:
    """Remove temporary directories of `target` that no process holds any more.

    A process that is about to take its lock could lose its empty directory: only old ones go.
    """
    for path in target.parent.glob(f"{glob.escape(_staging_prefix(target))}*"):
        # The heartbeat's file of a lock goes with its directory.
        with contextlib.suppress(OSError, LockHeldError, LockLostError):
            if time.time() - path.stat().st_mtime < _LEFTOVER_S:
                continue
            if path.name.endswith("-old") and not target.exists():
                continue  # what `target` held until the process that replaced it was killed
            with hold(path):
                shutil.rmtree(path, ignore_errors=True)


def check_target(out: PathLike, *, overwrite: bool, manifest: str = MANIFEST) -> None:
    """Raise `InputError` where `atomic_directory` could not put a directory at `out`.

    What `overwrite` may remove is an empty directory or one with a manifest: a slip of the
    hand must not delete a folder that this project did not write.
    """
    target = pathlib.Path(out).absolute()
    if not target.exists():
        parent = next(parent for parent in target.parents if parent.exists())
        if not parent.is_dir():
            raise InputError(f"{out} cannot be made: {parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{out} cannot be made: no permission to write in {parent}")
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another path or add --overwrite")
    if not target.is_dir() or (any(target.iterdir()) and not (target / manifest).is_file()):
        raise InputError(f"{out} holds no {manifest}, so --overwrite leaves it alone; remove it")


@contextlib.contextmanager
def locked(directory: PathLike) -> Iterator[None]:
    """Hold a directory against other writers, as `locks.hold` does.

    Raises:
      InputError: another process holds it, or took it over meanwhile.
    """
    try:
        with hold(directory):
            yield
    except LockHeldError as error:
        holder = f" ({error.holder})" if error.holder else ""
        raise InputError(
            f"{directory} is being written by another process{holder}; wait for it"
        ) from error
    except LockLostError as error:
        raise InputError(
            f"{directory} was taken over by {error.holder or 'another process'}, because this "
            "process was not heard of; wait for that one, then give the same command again"
        ) from error


def sha256_of(path: PathLike) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lengths_of(parts: Sequence[int], rows_per_shard: int) -> list[int]:
    """Rows of each shard, where none has rows of two parts; of no rows one empty shard.

    Args:
      parts: rows of each part.
    """
    lengths = [
        min(rows_per_shard, rows - begin)
        for rows in parts
        for begin in range(0, rows, rows_per_shard)
    ]
    return lengths or [0]


def write_shards(
    root: PathLike,
    prefix: str,
    table: pa.Table,
    *,
    rows_per_shard: int,
    rows_per_batch: int = 65_536,
    parts: Sequence[int] | None = None,
) -> tuple[ShardFile, ...]:
    """Write `table` as `root/prefix-00000-of-0000N.arrow` (IPC file format) and describe it.

    At least one shard is written, so an empty table keeps its schema. Each file is flushed
    to disk before the function returns.

    Args:
      parts: rows that follow one another and share no shard with others; None: all are one part.
    """
    lengths = lengths_of([table.num_rows] if parts is None else parts, rows_per_shard)
    begins = np.cumsum([0, *lengths])
    assert begins[-1] == table.num_rows
    (pathlib.Path(root) / prefix).parent.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> ShardFile:
        rows = table.slice(int(begins[index]), lengths[index])
        relative = f"{prefix}-{index:05d}-of-{len(lengths):05d}.arrow"
        return write_shard(root, relative, rows, rows_per_batch=rows_per_batch)

    return tuple(on_all_cores(write, range(len(lengths))))


def write_shard(
    root: PathLike, relative: str, table: pa.Table, *, rows_per_batch: int = 65_536
) -> ShardFile:
    """Write one Arrow IPC file at `root/relative`, flushed to disk, and describe it."""
    path = pathlib.Path(root) / relative
    with open(path, "wb") as raw:
        with pa.ipc.new_file(raw, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_per_batch)
        raw.flush()
        os.fsync(raw.fileno())
    return ShardFile(relative, table.num_rows, path.stat().st_size, sha256_of(path))


def read_shards(
    root: PathLike,
    files: Sequence[ShardFile],
    schema: pa.Schema,
    *,
    verify: bool = True,
) -> pa.Table:
    """The concatenation of `files` as one table of `schema`, memory-mapped where possible.

    Size and row count are always compared with the manifest, the SHA-256 when `verify`. A
    missing, truncated, altered or foreign shard is a `ShardError` that names it.
    """
    tables = open_shards(root, files, schema, verify=verify)
    return pa.concat_tables(tables) if tables else schema.empty_table()


def open_shards(
    root: PathLike, files: Sequence[ShardFile], schema: pa.Schema, *, verify: bool = True
) -> list[pa.Table]:
    """One table per file; else as `read_shards`."""

    def open_one(file: ShardFile) -> pa.Table:
        path = pathlib.Path(root) / file.path
        if not path.is_file():
            raise ShardError(f"{path} is missing; the manifest lists it with {file.rows} rows")
        size = path.stat().st_size
        if size != file.bytes:
            raise ShardError(
                f"{path} has {size} bytes, the manifest says {file.bytes}: it is truncated or was "
                "replaced; copy or build it again"
            )
        if verify:
            check_bytes(root, file)
        table = read_table(path)
        _check_schema(table.schema, schema, str(path))
        if table.num_rows != file.rows:
            raise ShardError(f"{path} has {table.num_rows} rows, the manifest says {file.rows}")
        for name in schema.names:
            missing = table.column(name).null_count
            if missing and not schema.field(name).nullable:
                raise ShardError(f"{path}: column {name} must not be null; {missing} rows are")
        return table.cast(schema)

    return on_all_cores(open_one, files)


def _check_schema(actual: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise `ShardError` unless `actual` has exactly the columns and types of `expected`."""
    if actual.names != expected.names:
        raise ShardError(
            f"{where} has columns {listing(actual.names)}; expected {listing(expected.names)}"
        )
    for name in expected.names:
        if actual.field(name).type != expected.field(name).type:
            raise ShardError(
                f"{where}: column {name} is {actual.field(name).type}, "
                f"expected {expected.field(name).type}"
            )


def check_bytes(root: PathLike, file: ShardFile) -> None:
    """Refuse a shard whose bytes are not those of the manifest (`ShardError`)."""
    path = pathlib.Path(root) / file.path
    if sha256_of(path) != file.sha256:
        raise ShardError(
            f"{path} does not match its SHA-256 {file.sha256[:12]}... in the manifest: it is "
            "corrupt or was replaced; copy or build it again"
        )


def read_table(path: PathLike, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Arrow IPC file, IPC stream or Parquet file; the content decides which.

    Args:
      path: the file.
      columns: names of the columns to keep, all if None. Parquet reads no others.

    Raises:
      ShardError: the file is empty, truncated, or none of the three.
    """
    head = _head(path)
    with _refusing(path):
        if head[:4] == b"PAR1":
            table = pq.read_table(path, columns=columns, partitioning=None)
        else:
            source = pa.memory_map(os.fspath(path), "r")
            if head[:6] == b"ARROW1":
                table = pa.ipc.open_file(source).read_all()
            else:
                table = _read_stream(source, path)
            table = table if columns is None else table.select(columns)
        # Arrow trusts offsets and lengths in a file: one that lies would end this process later.
        table.validate(full=True)
    return table


def stream_table(path: PathLike, *, columns: Sequence[str]) -> Iterator[pa.Table]:
    """`read_table`, some rows at a time: what is read of the file is not mapped.

    A batch has at most `ROWS_STREAMED` rows of a Parquet file, and as many as it was written with
    of an Arrow file.
    """
    head = _head(path)
    with _refusing(path):
        if head[:4] == b"PAR1":
            # A row group may be all of the file: pages are read as they are needed.
            file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            batches = file.iter_batches(ROWS_STREAMED, columns=list(columns))
        else:
            batches = _batches(pa.OSFile(os.fspath(path)), head, path)
        for batch in batches:
            table = pa.Table.from_batches([batch]).select(list(columns))
            table.validate(full=True)
            yield table


def _batches(source: pa.OSFile, head: bytes, path: PathLike) -> Iterator[pa.RecordBatch]:
    if head[:6] == b"ARROW1":
        reader = pa.ipc.open_file(source)
        for k in range(reader.num_record_batches):
            yield reader.get_batch(k)
        return
    with pa.ipc.open_stream(source) as reader:
        _check_end(pa.OSFile(os.fspath(path)), path)
        yield from reader


def schema_of(path: PathLike) -> pa.Schema:
    """The columns of an Arrow or Parquet file and their types, without reading its data.

    Raises:
      ShardError: the file is empty, truncated, or neither.
    """
    head = _head(path)
    with _refusing(path):
        if head[:4] == b"PAR1":
            return pq.read_schema(path)
        opener = pa.ipc.open_file if head[:6] == b"ARROW1" else pa.ipc.open_stream
        with opener(pa.memory_map(os.fspath(path), "r")) as reader:
            return reader.schema


def column_names(path: PathLike) -> list[str]:
    """The columns of an Arrow or Parquet file; errors as of `schema_of`."""
    return list(schema_of(path).names)


def rows_in(path: PathLike) -> int:
    """How many rows a Parquet or Arrow file has; of an Arrow stream, by its size, at most about.

    Raises:
      ShardError: the file is empty, truncated, or neither.
    """
    head = _head(path)
    with _refusing(path):
        if head[:4] == b"PAR1":
            return int(pq.read_metadata(path).num_rows)
        if head[:6] != b"ARROW1":
            return os.path.getsize(path) // _STREAM_ROW_BYTES
        import pyarrow.dataset  # not at the top: training never needs it

        return int(pyarrow.dataset.dataset(os.fspath(path), format="ipc").count_rows())


def _head(path: PathLike) -> bytes:
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        raise ShardError(f"{path} is empty")
    return head


@contextlib.contextmanager
def _refusing(path: PathLike) -> Iterator[None]:
    """Turn what Arrow raises on a damaged file into a `ShardError`."""
    try:
        yield
    except ShardError:
        raise
    # Lengths that no memory holds are those of a damaged file too (ArrowMemoryError).
    except (pa.ArrowException, OSError, EOFError, KeyError, ValueError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise ShardError(
            f"{path} cannot be read as an Arrow file, an Arrow stream or Parquet: {reason}"
        ) from error


def _read_stream(source: pa.MemoryMappedFile, path: PathLike) -> pa.Table:
    with pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    _check_end(source, path)
    return table


def _check_end(source: pa.NativeFile, path: PathLike) -> None:
    # A stream ends with a marker (continuation, length 0). Without it the writer was cut off
    # between two batches, which the reader takes for a normal end.
    size = source.size()
    source.seek(max(0, size - 8))
    if source.read(8) != b"\xff\xff\xff\xff\x00\x00\x00\x00":
        raise ShardError(f"{path} is an Arrow stream without its end marker: it is truncated")
