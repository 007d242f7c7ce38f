"""Files of ids that a user gives: text lines, CSV with a header, Parquet or Arrow.

The first bytes tell Parquet and Arrow, the ending `.csv` or `.tsv` a table of text; everything
else is one id a line, blank lines left out. Ids are exact text; integers count as their digits.
"""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from slgr_jax.data import shards
from slgr_jax.data.ingest.columns import decoded, is_text
from slgr_jax.errors import ConfigError, InputError, listing

PathLike = str | os.PathLike[str]
UNKNOWN = ("refuse", "skip")
_ARROW_HEADS = (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class IdFile(NamedTuple):
    """What a file of ids holds.

    Attributes:
      columns: role (user, item) -> [n] ids.
      has_columns: it is a table with named columns, not one id a line.
    """

    columns: dict[str, pa.Array]
    has_columns: bool


def read(path: PathLike, names: Mapping[str, str], required: str) -> IdFile:
    """The ids in a file.

    Args:
      names: role -> name of its column; a role whose column is not there is left out.
      required: the role that must be there, and whose ids the lines of a text file are.

    Raises:
      InputError, ShardError: the file cannot be read, or a row has no id.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give text lines, CSV or Parquet with {required}s")
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise InputError(f"{path} is empty; it names no {required}")

    if head in _ARROW_HEADS:
        chosen = _chosen(shards.column_names(path), names, required, path)
        table = shards.read_table(path, columns=list(chosen.values()))
    elif path.suffix.lower() in _DELIMITERS:
        header = _header(path)
        chosen = _chosen(header, names, required, path)
        table = _csv(path, list(chosen.values()))
    else:
        return IdFile({required: _lines(path, required)}, has_columns=False)
    columns = {role: _text(table.column(name), name, path) for role, name in chosen.items()}
    return IdFile(columns, has_columns=True)


def indices(
    ids: pa.Array, known: pa.Array, kind: str, where: str, *, unknown: str = "refuse"
) -> np.ndarray:
    """[n] int32 places of ids among the known ones, -1 where unknown.

    Args:
      unknown: refuse, or skip: an id that is not known is -1.

    Raises:
      ConfigError: `unknown` is none of its choices.
      InputError: an unknown id is refused, or no id is known at all.
    """
    if unknown not in UNKNOWN:
        raise ConfigError(f"--unknown={unknown!r} is not one of: {listing(UNKNOWN)}")
    index = pc.index_in(ids, value_set=known)
    if index.null_count and (unknown == "refuse" or index.null_count == len(ids)):
        strangers = pc.unique(ids.filter(index.is_null()))
        fix = "correct them"
        if index.null_count < len(ids):
            fix += ", or leave them out with --unknown=skip"
        raise InputError(
            f"{where}: unknown {kind} id {listing(map(repr, strangers.slice(0, 3).to_pylist()))} "
            f"({len(strangers)} unknown in {len(pc.unique(ids))} distinct); the run's data has "
            f"{len(known)} ids such as {known[0].as_py()!r}; {fix}"
        )
    return np.asarray(pc.fill_null(index, -1).to_numpy(zero_copy_only=False), np.int32)


def _chosen(
    found: Sequence[str], names: Mapping[str, str], required: str, path: pathlib.Path
) -> dict[str, str]:
    if names[required] not in found:
        raise InputError(
            f"{path} has no column {names[required]!r}; columns found: {listing(found)}; name it "
            f"with --{required}_column"
        )
    chosen = {role: name for role, name in names.items() if name in found}
    twice = [name for name in chosen.values() if list(found).count(name) > 1]
    if twice:
        raise InputError(f"{path} has column {listing(twice)} more than once; rename one of them")
    return chosen


def _header(path: pathlib.Path) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            return next(csv.reader(text, delimiter=_DELIMITERS[path.suffix.lower()]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error


def _csv(path: pathlib.Path, columns: list[str]) -> pa.Table:
    try:
        return pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter=_DELIMITERS[path.suffix.lower()]),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as CSV: {reason}") from error


def _lines(path: pathlib.Path, kind: str) -> pa.Array:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds a NUL; give text lines, CSV or Parquet")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    ids = [line for line in lines if line]
    if not ids:
        raise InputError(f"{path} holds blank lines only; it names no {kind}")
    return pa.array(ids, pa.string())


def _text(column: pa.ChunkedArray, name: str, path: pathlib.Path) -> pa.Array:
    """A column of ids as one array of text."""
    column = decoded(column)
    if not is_text(column.type) and not pa.types.is_integer(column.type):
        raise InputError(f"{path}: column {name} is {column.type}; ids must be text or integers")
    column = column.cast(pa.string())
    missing = np.asarray(pc.fill_null(pc.equal(column, ""), True))
    if missing.any():
        raise InputError(f"{path}: row {int(np.argmax(missing)) + 1} has no id in column {name}")
    if not len(column):
        raise InputError(f"{path} has no rows; it names nobody and nothing in column {name}")
    return column.combine_chunks()
