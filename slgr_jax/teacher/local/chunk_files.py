"""Several vectors an id in files, as `vector_files` reads one: chunks in the order of the file.

Parquet and Arrow are read twice, some rows at a time, so that they need not fit in memory.

Shape letters: R items or users, n lines of a file, Z width of a vector.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest.archive import reading
from slgr_jax.errors import InputError, listing
from slgr_jax.teacher.local import chunks, vector_files
from slgr_jax.teacher.local.chunks import Chunks

PathLike = str | os.PathLike[str]

FIELD = "text"  # of chunks whose field is not said


class Lines(NamedTuple):
    """Some chunks of a file: ids and fields [n], vectors [n, Z] or None where not asked for."""

    ids: pa.Array
    fields: pa.Array
    values: np.ndarray | None


def read_chunks(
    path: PathLike,
    dataset: Dataset,
    entity: str,
    *,
    most: int,
    scratch: pathlib.Path,
    unknown: str = "error",
) -> tuple[Chunks, dict[str, int]]:
    """Chunks with the ids of the raw data, in index order; counts of what was left out.

    Args:
      path: Parquet or Arrow with columns `item` (or `user`), `vector` and, if there are several
        fields, `field`, a line a chunk; npz with `ids`, `vectors` and `fields` likewise; or
        batch-API results with `data[k].embedding` of the k-th chunk.
      dataset: whose ids they are.
      entity: item or user.
      most: chunks that a field of a row may have.
      scratch: directory where numbers are mapped.
      unknown: an id that `dataset` does not have: error, or drop.

    Raises:
      InputError: no such file or columns, vectors of several widths or that are not finite, an
        unknown id, more chunks than `most`.
      ShardError: the file is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give Parquet, Arrow, npz or .jsonl with vectors")
    known = dataset.items.column("item_id").combine_chunks()
    known = known if entity == "item" else dataset.user_ids
    known = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known

    kinds: dict[str, int] = {}
    row_parts, field_parts, width, lines = [], [], 0, 0
    for part in _lines(path, entity):
        row_parts.append(_rows(part, known, f"{entity} of {dataset.path}", path, unknown))
        names = part.fields.to_pylist()
        field_parts.append(np.array([kinds.setdefault(f, len(kinds)) for f in names], np.int64))
        lines += len(names)
    if not lines:
        raise InputError(f"{path} has no vector of a chunk of {entity}s; give one line a chunk")
    rows, of_field = np.concatenate(row_parts), np.concatenate(field_parts)
    kept = rows >= 0
    if not kept.any():
        raise InputError(f"{path}: none of its {lines} ids is a {entity} of {dataset.path}")

    names = sorted(kinds)
    of_field = np.array([names.index(kind) for kind in kinds])[of_field]
    fields = _fields(rows[kept], of_field[kept], names, known, most, f"{path}: {entity}")
    out, begin = None, 0
    for part in _lines(path, entity, vectors=True):
        values = part.values
        assert values is not None
        if out is None:
            width = values.shape[1]
            out = chunks.empty(scratch, f"{entity}s", len(known), fields, width)
        if values.shape[1] != width:
            raise InputError(f"{path} has vectors of widths {width} and {values.shape[1]}")
        span = slice(begin, begin + len(values))
        begin = span.stop
        use = kept[span]
        where = f"{path}, from line {span.start}"
        chunks.put(out, rows[span][use], of_field[span][use], chunks.halves(values[use], where))
    assert out is not None, "it has lines"
    return out, {"dropped_unknown": int((~kept).sum())}


def _rows(part: Lines, known: pa.Array, meant: str, path: pathlib.Path, unknown: str) -> np.ndarray:
    """[n] the row of each id; -1 of one that there is not."""
    rows = pc.fill_null(pc.index_in(part.ids, value_set=known), -1).to_numpy()
    foreign = rows < 0
    if foreign.any() and unknown == "error":
        example = part.ids[int(np.argmax(foreign))].as_py()
        raise InputError(
            f"{path}: {example!r} and {int(foreign.sum()) - 1} more ids are no {meant}; add "
            "--unknown=drop to leave them out"
        )
    return np.asarray(rows)


def _fields(
    rows: np.ndarray, of_field: np.ndarray, names: list[str], known: pa.Array, most: int, where: str
) -> dict[str, int]:
    """Field -> how many slots it takes.

    Raises:
      InputError: a row has more chunks of a field than `most`.
    """
    keys, counts = np.unique(rows.astype(np.int64) * len(names) + of_field, return_counts=True)
    if counts.max() > most:
        row, field = divmod(int(keys[np.argmax(counts)]), len(names))
        raise InputError(
            f"{where} {known[row].as_py()!r} has {counts.max()} chunks of field {names[field]!r}, "
            f"and --chunks={most}; give --chunks={counts.max()}, or join some"
        )
    largest = np.ones(len(names), np.int64)  # of a field of dropped ids alone, too
    np.maximum.at(largest, keys % len(names), counts)
    return dict(zip(names, largest.tolist(), strict=True))


# --- the formats -------------------------------------------------------------------------------


def _lines(path: pathlib.Path, entity: str, *, vectors: bool = False) -> Iterator[Lines]:
    if path.suffix == ".jsonl":
        yield from _of_results(path, vector_files.PREFIXES[entity])
    elif path.suffix == ".npz":
        yield _of_npz(path)
    else:
        yield from _of_table(path, entity, vectors=vectors)


def _of_table(path: pathlib.Path, entity: str, *, vectors: bool) -> Iterator[Lines]:
    names = shards.column_names(path)
    if missing := {entity, "vector"} - set(names):
        raise InputError(
            f"{path} has columns {listing(names)}; expected {entity} and vector, and field where "
            f"there are several: {listing(sorted(missing))} missing"
        )
    said = "field" in names
    wanted = [entity, "vector", *(["field"] if said else [])]
    for table in shards.stream_table(path, columns=wanted):
        table = table.filter(
            pc.and_(pc.is_valid(table.column(entity)), pc.is_valid(table.column("vector")))
        ).combine_chunks()
        if not table.num_rows:
            continue
        ids = pc.cast(table.column(entity).combine_chunks(), pa.string())
        fields = pa.array([FIELD] * len(ids))
        if said:
            fields = pc.fill_null(pc.cast(table.column("field"), pa.string()), FIELD)
        yield Lines(ids, fields, _numbers(path, table) if vectors else None)


def _numbers(path: pathlib.Path, table: pa.Table) -> np.ndarray:
    (column,) = table.column("vector").chunks
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise InputError(f"{path}: column vector is {column.type}, expected a list of numbers")
    widths = np.unique(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    if widths.size != 1 or not widths[0]:
        raise InputError(f"{path} has vectors of widths: {listing(map(str, widths))}")
    flat = pc.cast(pc.list_flatten(column), pa.float32()).to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(column), -1))


def _of_npz(path: pathlib.Path) -> Lines:
    with reading(str(path)):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
        except ValueError as error:  # pickled objects
            raise InputError(f"{path} cannot be read: {error}") from error
    nothing = np.zeros(())
    ids, values = arrays.get("ids", nothing), arrays.get("vectors", nothing)
    fields = arrays.get("fields", np.full(ids.shape, FIELD))
    numbers = values.ndim == 2 and values.size and values.dtype.kind in "fiu"
    if not numbers or not ids.shape == fields.shape == values.shape[:1]:
        shapes = listing(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(
            f"{path} has arrays {shapes}; expected ids [n], vectors [n, Z] and, where there are "
            "several, fields [n]: a row a chunk"
        )
    names, kinds = ([str(x) for x in array.tolist()] for array in (ids, fields))
    return Lines(pa.array(names, pa.string()), pa.array(kinds, pa.string()), values)


def _of_results(path: pathlib.Path, prefix: str) -> Iterator[Lines]:
    """Of batch-API results whose custom_id begins with `prefix`; the last with an id counts."""
    last: dict[str, list[np.ndarray]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                body = raw["response"].get("body", raw["response"])
                data = sorted(body["data"], key=lambda entry: entry.get("index", 0))
                custom_id = str(raw["custom_id"])
                vectors = [np.array(entry["embedding"], np.float32) for entry in data]
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{path}: line {number + 1} is no result with vectors; ask for it again, or "
                    "leave it out"
                ) from error
            if custom_id.startswith(prefix):
                last[custom_id.removeprefix(prefix)] = vectors
    widths = collections.Counter(vector.shape for of_id in last.values() for vector in of_id)
    if len(widths) > 1:
        raise InputError(f"{path} has vectors of shapes: {listing(map(str, widths))}")
    if widths:
        ids = [name for name, of_id in last.items() for _ in of_id]
        values = np.stack([vector for of_id in last.values() for vector in of_id])
        yield Lines(pa.array(ids, pa.string()), pa.array([FIELD] * len(ids)), values)
