"""Vectors in files with the ids of the raw data: Parquet, Arrow, npz, or batch-API results.

Shape letters: R items or users, n ids of a file, D width of a vector.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest.archive import reading
from slgr_jax.errors import InputError, listing
from slgr_jax.teacher.local.vectors import Vectors

PathLike = str | os.PathLike[str]

PREFIXES = {"item": "item-", "user": "user-"}  # of a custom_id


def read_vectors(
    path: PathLike, dataset: Dataset, entity: str, *, unknown: str = "error"
) -> tuple[Vectors, dict[str, int]]:
    """Vectors with the ids of the raw data, brought into index order; counts of what was left out.

    Args:
      path: Parquet or Arrow with columns `item` (or `user`) and `vector`; npz with `ids` and
        `vectors`; or batch-API results, lines with `custom_id` item-ID (user-ID) and
        `data[0].embedding`, of which the last with an id counts.
      dataset: whose ids they are.
      entity: item or user.
      unknown: an id that `dataset` does not have: error, or drop.

    Raises:
      InputError: no such file or columns, vectors of several widths or that are not finite, an
        unknown id, one id with two vectors.
      ShardError: the file is damaged.
    """
    path = pathlib.Path(path)
    ids, values, counts = read_ids(path, entity)
    known = dataset.items.column("item_id").combine_chunks()
    known = known if entity == "item" else dataset.user_ids
    rows = pc.fill_null(pc.index_in(pa.array(ids, pa.string()), value_set=known), -1).to_numpy()
    foreign = rows < 0
    _check_known(ids, foreign, f"{entity} of {dataset.path}", path, unknown)
    counts["dropped_unknown"] = int(foreign.sum())
    rows, values = rows[~foreign], values[~foreign]

    out = np.zeros((len(known), values.shape[1]), np.float32)
    out[rows] = values
    if path.suffix != ".jsonl" and not (out[rows] == values).all():
        row = rows[int(np.argmin((out[rows] == values).all(axis=1)))]
        raise InputError(f"{path}: {entity} {known[int(row)].as_py()!r} has two different vectors")
    has = np.zeros(len(known), bool)
    has[rows] = True
    return Vectors(out, has), counts


def read_ids(path: PathLike, entity: str) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Ids of a file, their vectors [n, D], and counts of what was left out; see `read_vectors`.

    Raises:
      InputError: no such file or columns, vectors of several widths or that are not finite.
      ShardError: the file is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give Parquet, Arrow, npz or .jsonl with vectors")

    counts: dict[str, int] = {}
    if path.suffix == ".jsonl":
        ids, values, counts = _read_results(path, PREFIXES[entity])
    elif path.suffix == ".npz":
        ids, values = _read_npz(path)
    else:
        ids, values = _read_table(path, entity)
    if values.ndim != 2 or not values.size or len(ids) != len(values):
        raise InputError(
            f"{path} has {len(ids)} ids and vectors of shape {values.shape}; expected one vector "
            f"an id, at least one of them for {entity}s"
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}: the vector of {entity} {ids[int(np.argmin(finite))]!r} is not finite; leave "
            "out what has no vector"
        )
    return ids, values, counts


def _check_known(
    ids: list[str], foreign: np.ndarray, meant: str, path: pathlib.Path, unknown: str
) -> None:
    if foreign.any() and unknown == "error":
        raise InputError(
            f"{path}: {int(foreign.sum())} of {len(ids)} ids are no {meant}, e.g. "
            f"{ids[int(np.argmax(foreign))]!r}; add --unknown=drop to leave them out"
        )
    if foreign.all():
        raise InputError(f"{path}: none of its {len(ids)} ids is a {meant}")


def _read_table(path: pathlib.Path, entity: str) -> tuple[list[str], np.ndarray]:
    table = shards.read_table(path)
    missing = {entity, "vector"} - set(table.column_names)
    if missing:
        raise InputError(
            f"{path} has columns {listing(table.column_names)}; expected {entity} and vector"
        )
    table = table.select([entity, "vector"]).drop_null()
    values = vectors_of(table.column("vector"), path)
    return pc.cast(table.column(entity), pa.string()).to_pylist(), values


def vectors_of(column: pa.ChunkedArray, path: pathlib.Path) -> np.ndarray:
    """[n, D] float32 of a column of lists of numbers, without nulls; `InputError` for any other."""
    one = column.combine_chunks()
    one = pa.concat_arrays(one.chunks) if isinstance(one, pa.ChunkedArray) else one
    if not (pa.types.is_list(one.type) or pa.types.is_fixed_size_list(one.type)):
        raise InputError(f"{path}: column vector is {one.type}, expected a list of numbers")
    widths = np.unique(pc.list_value_length(one).to_numpy(zero_copy_only=False))
    if widths.size != 1:
        raise InputError(f"{path} has vectors of {widths.size} widths: {listing(map(str, widths))}")
    flat = pc.cast(pc.list_flatten(one), pa.float32()).to_numpy(zero_copy_only=False)
    return flat.reshape(len(one), -1)


def _read_npz(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    with reading(str(path)):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
        except ValueError as error:  # pickled objects
            raise InputError(f"{path} cannot be read: {error}") from error
    others = [name for name in arrays if name != "ids"]
    name = "vectors" if "vectors" in arrays else others[0] if len(others) == 1 else ""
    if "ids" not in arrays or not name or arrays["ids"].ndim != 1:
        raise InputError(
            f"{path} has arrays {listing(arrays)}; expected ids [n] and vectors [n, D]"
        )
    return [str(raw_id) for raw_id in arrays["ids"].tolist()], arrays[name].astype(np.float32)


def _read_results(path: pathlib.Path, prefix: str) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Ids and vectors of batch-API results whose custom_id begins with `prefix`."""
    vectors: dict[str, np.ndarray] = {}
    counts = {"dropped_lines": 0, "repeated_lines": 0}
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            custom_id, vector = _result(line)
            if vector is None:
                counts["dropped_lines"] += 1
            elif custom_id.startswith(prefix):
                counts["repeated_lines"] += custom_id in vectors
                vectors[custom_id] = vector

    widths = sorted({vector.size for vector in vectors.values()})
    if len(widths) != 1:
        raise InputError(
            f"{path} has {len(vectors)} vectors with a custom_id {prefix}ID, of widths: "
            f"{listing(map(str, widths))}; {counts['dropped_lines']} lines hold no vector"
        )

    return [key[len(prefix) :] for key in vectors], np.stack(list(vectors.values())), counts


def _result(line: bytes) -> tuple[str, np.ndarray | None]:
    """custom_id and the vector of one line; None where it holds none."""
    try:
        raw = json.loads(line)
        response = raw["response"]
        body = response.get("body", response)
        value: Any = body["data"][0]["embedding"]
        if isinstance(value, str):
            vector = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        else:
            vector = np.array(value, np.float32)
        usable = vector.ndim == 1 and vector.size and np.isfinite(vector).all()
        return str(raw["custom_id"]), vector if usable else None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, binascii.Error):
        return "", None
    except RecursionError:  # brackets without end
        return "", None
