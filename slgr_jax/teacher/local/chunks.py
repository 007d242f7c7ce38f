"""Several vectors a row: chunks of a text, by field; how they are made, kept and read.

A row has up to `fields[f]` chunks of field f, which lie in S slots, a field behind the other in
the order of their names. `counts` says how many there are: those that are missing are zeros, and
no reader looks at them. Numbers are float16, on disk and in memory, which a product of many rows
need not fit in: values may be a memory map, and shards are read one by one.

Shape letters: U users, I items, R rows of either, F fields, S slots, Z width of a vector.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from slgr_jax import progress
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError, ShardError
from slgr_jax.teacher.local import scorers
from slgr_jax.teacher.local.vectors import Vectors, profiles

DTYPE = "float16"
# Rows whose chunks a model reads at once, and of a product a reader (in float64, perhaps).
_ROWS_AT_ONCE = 1 << 12
_ROWS_READ = 1 << 10


class Chunks(NamedTuple):
    """Chunks of R rows in index order.

    Attributes:
      values: [R, S, Z] float16; zeros where a slot is empty.
      counts: [R, F] int16, chunks of each field.
      fields: field -> how many slots it has, by name in alphabetical order.
    """

    values: np.ndarray
    counts: np.ndarray
    fields: Mapping[str, int]

    @property
    def has(self) -> np.ndarray:
        """[R] which rows have a chunk."""
        return np.asarray(self.counts.any(axis=1), bool)


class Block(NamedTuple):
    """Chunks of some rows, in index order: `values` [n, S, Z] float16, `real` [n, S] bool."""

    rows: slice
    values: np.ndarray
    real: np.ndarray


def slots(counts: np.ndarray, fields: Mapping[str, int]) -> np.ndarray:
    """[R, S] which slots hold a chunk, of `counts` [R, F]."""
    of_fields = [
        np.arange(count)[None] < counts[:, [number]] for number, count in enumerate(fields.values())
    ]
    return np.concatenate(of_fields, axis=1)


def empty(
    scratch: pathlib.Path, name: str, rows: int, fields: Mapping[str, int], width: int
) -> Chunks:
    """Chunks of zeros, in a file that is mapped."""
    shape = (rows, sum(fields.values()), width)
    values = np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", DTYPE, shape)
    return Chunks(values, np.zeros((rows, len(fields)), np.int16), fields)


def halves(values: np.ndarray, what: str) -> np.ndarray:
    """Vectors [n, Z] as float16.

    Raises:
      InputError: one is not finite, or no longer is.
    """
    with np.errstate(over="ignore"):  # told below
        out = values.astype(DTYPE)
    if not np.isfinite(out).all():
        row = int(np.argmin(np.isfinite(out).all(axis=1)))
        raise InputError(f"{what}: vector {row} is not finite as {DTYPE}; scale or leave it out")
    return out


# --- of texts ----------------------------------------------------------------------------------


def cut(text: str, most: int, words: int) -> list[str]:
    """A text in chunks of about `words` words, at most `most`: then of more, so that none is lost.

    Chunks of a text have the same number of words, or one more.
    """
    parts = text.split()
    count = min(most, math.ceil(len(parts) / words))
    edges = [len(parts) * number // max(count, 1) for number in range(count + 1)]
    return [" ".join(parts[begin:end]) for begin, end in itertools.pairwise(edges)]


def of_texts(
    model: scorers.Embedder,
    texts: Mapping[str, Sequence[str]],
    most: int,
    words: int,
    scratch: pathlib.Path,
    name: str,
) -> Chunks:
    """The chunks of R texts, by field; a chunk that a model knows no word of is left out.

    Args:
      texts: field -> [R] texts; empty where a row has none.
      most, words: as of `cut`.
      scratch, name: where the numbers are mapped.

    Raises:
      InputError: no row has a text.
    """
    cuts = {
        field: [cut(text, most, words) for text in of_field]
        for field, of_field in sorted(texts.items())
    }
    fields = {field: most_of for field, of in cuts.items() if (most_of := max(map(len, of)))}
    if not fields:
        raise InputError("there is no text to cut into chunks; prepare the data with texts")
    rows = len(next(iter(cuts.values())))
    out: Chunks | None = None
    blocks = range(0, rows, _ROWS_AT_ONCE)
    for begin in progress.over(blocks, "part", label=f"chunks of {name}"):
        for number, field in enumerate(fields):
            of_field = cuts[field][begin : begin + _ROWS_AT_ONCE]
            row = np.repeat(np.arange(len(of_field)), [len(pieces) for pieces in of_field])
            if not row.size:
                continue
            values = model.embed([piece for pieces in of_field for piece in pieces])
            known = (values != 0).any(axis=1)
            if out is None:
                out = empty(scratch, name, rows, fields, values.shape[1])
            of_chunks = halves(values[known], f"{field} of {name}")
            put(out, row[known] + begin, np.full(known.sum(), number), of_chunks)
    assert out is not None, "a field has a chunk"
    return out


def put(out: Chunks, rows: np.ndarray, fields: np.ndarray, values: np.ndarray) -> None:
    """Write vectors [n, Z] behind the chunks that rows [n] have of fields [n]."""
    first = np.cumsum([0, *out.fields.values()])[:-1]
    key = rows.astype(np.int64) * len(out.fields) + fields
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    place = np.empty(key.size, np.int64)
    place[order] = np.arange(key.size) - np.repeat(starts, np.diff(starts, append=key.size))
    out.values[rows, first[fields] + out.counts[rows, fields] + place] = values
    np.add.at(out.counts, (rows, fields), 1)


def of_histories(history: Csr, items: Chunks, scratch: pathlib.Path) -> Chunks:
    """Of each user, a chunk a field: the unit mean of its items' means of the field."""
    fields = dict.fromkeys(items.fields, 1)
    users = len(history.offsets) - 1
    out = empty(scratch, "users", users, fields, items.values.shape[2])
    begin = 0
    for number, count in enumerate(items.fields.values()):
        total = items.values[:, begin : begin + count].sum(axis=1, dtype=np.float32)
        means = total / np.maximum(items.counts[:, [number]], 1)
        begin += count
        values = profiles(history, means)
        out.counts[:, number] = (values != 0).any(axis=1)
        out.values[:, number] = halves(values, "users' means")
    return out


# --- on disk -----------------------------------------------------------------------------------


def write(
    root: pathlib.Path, prefix: str, chunks: Chunks, rows_per_shard: int
) -> tuple[schema.ShardFile, ...]:
    """Write chunks as shards root/prefix-..., one in memory at a time."""
    (root / prefix).parent.mkdir(parents=True, exist_ok=True)
    rows, of_slots, width = chunks.values.shape
    kind = schema.chunks(of_slots * width, len(chunks.fields))
    count = max(1, -(-rows // rows_per_shard))
    files = []
    for number in range(count):
        part = slice(number * rows_per_shard, min((number + 1) * rows_per_shard, rows))
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(array[part])), size)
            for array, size in (
                (chunks.values, of_slots * width),
                (chunks.counts, len(chunks.fields)),
            )
        ]
        relative = f"{prefix}-{number:05d}-of-{count:05d}.arrow"
        files.append(shards.write_shard(root, relative, pa.table(columns, schema=kind)))
    return tuple(files)


def read(
    root: pathlib.Path,
    manifest: schema.EmbeddingManifest,
    table_name: str,
    *,
    verify: bool = True,
) -> Iterator[Block]:
    """The chunks of a product, some rows at a time.

    Raises:
      ShardError: a shard is missing, truncated or corrupt, counts more chunks than there are slots,
        or holds a number that is not finite.
    """
    fields = manifest.fields[table_name]
    of_slots, most = sum(fields.values()), np.array(list(fields.values()))
    kind = schema.chunks(of_slots * manifest.dim, len(fields))
    begin = 0
    for file in manifest.files[table_name]:
        (table,) = shards.open_shards(root, [file], kind, verify=verify)
        for batch in table.to_batches(_ROWS_READ):
            counts = _flat(batch, "counts", len(fields))
            values = _flat(batch, "vector", of_slots * manifest.dim)
            values = values.reshape(len(counts), of_slots, manifest.dim)
            where = f"{root}/{file.path}"
            if ((counts < 0) | (counts > most)).any():
                row = begin + int(np.argmax(((counts < 0) | (counts > most)).any(axis=1)))
                raise ShardError(
                    f"{where}: row {row} counts {counts[row - begin].tolist()} chunks in fields of "
                    f"{most.tolist()} slots; make the product again"
                )
            if not np.isfinite(values).all():
                bad = begin + int(np.argmin(np.isfinite(values).all(axis=(1, 2))))
                raise ShardError(f"{where}: a chunk of row {bad} is not finite")
            yield Block(slice(begin, begin + len(counts)), values, slots(counts, fields))
            begin += len(counts)


def _flat(batch: pa.RecordBatch, name: str, size: int) -> np.ndarray:
    """A column of lists of one length as an array [n, size]."""
    column = batch.column(name)
    flat = column.values.slice(column.offset * size, len(column) * size)
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), size)


def means(blocks: Iterator[Block], rows: int, width: int) -> Vectors:
    """Of each row the mean of its chunks, float32: what readers of one vector a row see."""
    values, has = np.zeros((rows, width), np.float32), np.zeros(rows, bool)
    for block in blocks:
        total = np.where(block.real[..., None], block.values, 0).sum(axis=1, dtype=np.float32)
        values[block.rows] = total / np.maximum(block.real.sum(axis=1), 1)[:, None]
        has[block.rows] = block.real.any(axis=1)
    return Vectors(values, has)
