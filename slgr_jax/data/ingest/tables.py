"""What every reader of raw files shares, and the readers of CSV, Parquet and Arrow.

A reader finds the file, names its columns and hands them over as they are; `columns.py` turns
them into arrays. Item and user texts are read afterwards, for the ids that are left.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.columns import encode_ids
from slgr_jax.errors import ConfigError, InputError, ShardError, listing

ROLES = ("user", "item", "timestamp", "rating", "split")
_ID = pa.dictionary(pa.int32(), pa.string())
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """Interactions of one file, columns as they were found.

    Attributes:
      where: the file, for messages.
      part: train, valid or test where the file is one part; None where a rule decides.
      columns: role (`ROLES`) -> column; user and item always, the others where present.
      names: role -> the column's name in the file.
    """

    where: str
    part: str | None
    columns: Mapping[str, pa.ChunkedArray]
    names: Mapping[str, str]

    def label(self, role: str) -> str:
        return f"{self.where}: column {self.names[role]}"

    def __len__(self) -> int:
        return len(self.columns["user"])


@dataclasses.dataclass(frozen=True)
class Raw:
    """All interactions of an input, and how to read the texts that belong to them."""

    pieces: tuple[Piece, ...]
    files: tuple[Files, ...]
    items: Callable[[pa.Array], pa.Table | None]  # wanted ids -> rows of schema.ITEMS, any order
    users: Callable[[pa.Array], pa.Table | None]  # wanted ids -> rows of schema.USERS
    name: str = ""  # what the files call the data set; empty if nothing better than --input


def nothing(wanted: pa.Array) -> None:
    """No texts."""
    return None


def inputs(config: PrepareConfig) -> list[tuple[str | None, str]]:
    """(part, path) of each file that the command line names; part None: a rule decides."""
    if not config.test_input:
        if config.valid_input:
            raise ConfigError("--valid_input needs --test_input: a pre-made split has a test part")
        return [(None, config.input)]
    found: list[tuple[str | None, str]] = [("train", config.input), ("test", config.test_input)]
    return [*found, ("valid", config.valid_input)] if config.valid_input else found


# --- delimited text -----------------------------------------------------------------------


def header(files: Files, name: str, delimiter: str, *, quoting: bool = True) -> list[str]:
    """The column names in the first line of a delimited file."""
    head = files.head(name)
    if not head.strip():
        raise InputError(f"{files.where(name)} is empty")
    if b"\0" in head:
        raise InputError(f"{files.where(name)} is not text; is it of another --source?")
    with reading(files.where(name)):
        line = head.decode("utf-8-sig", errors="replace").split("\n")[0].rstrip("\r")
        if not quoting:
            return line.split(delimiter)
        return next(csv.reader(io.StringIO(line), delimiter=delimiter))


def delimited(
    files: Files,
    name: str,
    columns: Mapping[str, str],
    *,
    delimiter: str,
    names: Sequence[str] | None = None,
    quoting: bool = True,
    ids: Iterable[str] = ("user", "item", "split"),
) -> dict[str, pa.ChunkedArray]:
    """Columns of a delimited file as exact text.

    Args:
      columns: role -> column name in the file.
      names: column names where the file has no header line.
      quoting: whether `"` quotes a field.
      ids: roles that are dictionary-encoded while reading, which keeps large files small.
    """
    where = files.where(name)
    roles = {column: role for role, column in columns.items()}
    types = {c: _ID if roles[c] in set(ids) else pa.string() for c in roles}
    with files.open(name) as file, reading(where):
        table = pacsv.read_csv(
            file,
            read_options=pacsv.ReadOptions(column_names=names, block_size=_BLOCK),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoting else False,
                newlines_in_values=quoting,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=types, include_columns=list(types), strings_can_be_null=False
            ),
        )
    return {roles[column]: table.column(column) for column in types}


def pick(
    found: Sequence[str], wanted: Mapping[str, str], where: str, *, required: Iterable[str]
) -> dict[str, str]:
    """Role -> column for the roles whose column is in the file.

    Raises:
      InputError: a required column is missing, or a column is there twice.
    """
    missing = [wanted[role] or f"(--{role}_column is empty)" for role in required]
    missing = [column for column in missing if column not in found]
    if missing:
        raise InputError(
            f"{where} has no column {listing(missing)}; columns found: {listing(found)}; name "
            "them with --user_column, --item_column, ..."
        )
    chosen = {role: column for role, column in wanted.items() if column in found}
    twice = [column for column in chosen.values() if list(found).count(column) > 1]
    if twice:
        raise InputError(f"{where} has column {listing(twice)} more than once")
    return chosen


# --- csv and parquet with named columns ----------------------------------------------------


def _delimiter(config: PrepareConfig) -> str:
    text = {"\\t": "\t", "tab": "\t"}.get(config.delimiter, config.delimiter)
    if len(text) != 1 or not text.isascii():
        raise ConfigError(f"--delimiter={config.delimiter!r} must be one ASCII character or '\\t'")
    return text


def wanted_columns(config: PrepareConfig) -> dict[str, str]:
    """Role -> column name on the command line."""
    values = (
        config.user_column,
        config.item_column,
        config.time_column,
        config.rating_column,
        config.split_column,
    )
    return dict(zip(ROLES, values, strict=True))


def named_columns(config: PrepareConfig) -> Raw:
    """csv, parquet: one column per role, named on the command line."""
    wanted = wanted_columns(config)
    required = ["user", "item", *(["split"] if config.split_column else [])]
    default = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    # A column that the user named must be there; the default name is taken if it is.
    for role, knob in (("timestamp", "time_column"), ("rating", "rating_column")):
        value = getattr(config, knob)
        if value and value != default[knob]:
            required.append(role)
    pieces, opened = [], []
    for part, path in inputs(config):
        files = Files(path)
        opened.append(files)
        if config.source == "csv":
            name = files.choose(_is_csv, "csv or tsv file", config.name)
            delimiter = _delimiter(config)
            where = files.where(name)
            chosen = pick(header(files, name, delimiter), wanted, where, required=required)
            columns = delimited(files, name, chosen, delimiter=delimiter)
        else:
            where = path
            chosen, columns = _arrow(files, wanted, required)
        pieces.append(Piece(where, part, columns, chosen))
    table = _named_items(config)
    if table is None:
        return Raw(tuple(pieces), tuple(opened), nothing, nothing)
    items, source = table
    return Raw(tuple(pieces), (*opened, source), lambda wanted_ids: items, nothing)


def _is_csv(name: str) -> bool:
    return name.endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz"))


def _arrow_names(files: Files) -> list[str]:
    if files.single is not None:
        return [files.single]
    endings = (".parquet", ".arrow", ".feather", ".ipc")
    names = [name for name in files.names if name.endswith(endings)]
    if not names:
        raise InputError(f"{files.path} holds no file ending in {listing(endings)}")
    return names


def _arrow(
    files: Files, wanted: Mapping[str, str], required: Sequence[str]
) -> tuple[dict[str, str], dict[str, pa.ChunkedArray]]:
    """Role -> name and role -> column of a Parquet or Arrow file, or of a folder of them."""
    if files.path.is_file() and files.single is None:
        raise InputError(f"{files.path} is a zip archive; unpack it for --source=parquet")
    tables: list[pa.Table] = []
    chosen: dict[str, str] = {}
    for name in _arrow_names(files):
        where = files.where(name)
        if pathlib.Path(where).stat().st_size == 0:
            raise InputError(f"{where} is empty")
        files.open(name).close()
        try:
            names = column_names(where)
            chosen = pick(names, wanted, where, required=required)
            table = shards.read_table(where, columns=list(chosen.values()))
        except ShardError as error:
            raise InputError(str(error)) from error
        if tables and table.schema.names != tables[0].schema.names:
            raise InputError(f"{where} has other columns than the files before it")
        tables.append(table)
    with reading(str(files.path)):
        whole = pa.concat_tables(tables, promote_options="permissive")
    return chosen, {role: whole.column(column) for role, column in chosen.items()}


def column_names(path: str) -> list[str]:
    """The columns of a Parquet or Arrow file, without reading Parquet data."""
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if not is_parquet:
        return list(shards.read_table(path).schema.names)
    with reading(path):
        return list(pq.read_schema(path).names)


def _named_items(config: PrepareConfig) -> tuple[pa.Table, Files] | None:
    if not config.items_input:
        return None
    files = Files(config.items_input)
    wanted = {
        "item": config.item_column,
        "title": config.title_column,
        "text": config.text_column,
        "categories": config.categories_column,
    }
    name = files.single
    if name is not None and files.head(name, 4)[:4] != b"PAR1" and not _is_arrow(files, name):
        delimiter = _delimiter(config)
        found = header(files, name, delimiter)
        chosen = pick(found, wanted, files.where(name), required=["item"])
        columns = delimited(files, name, chosen, delimiter=delimiter, ids=())
    else:
        chosen, columns = _arrow(files, wanted, ["item"])
    label = f"{files.path}: column {chosen['item']}"
    return item_table(columns, label, separator="|"), files


def _is_arrow(files: Files, name: str) -> bool:
    head = files.head(name, 8)
    return head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff"


def item_table(columns: Mapping[str, pa.ChunkedArray], label: str, *, separator: str) -> pa.Table:
    """Rows of `schema.ITEMS` from raw columns `item` and, where present, title, text, categories.

    Text categories are split at `separator`; empty text becomes null. Of several rows with the
    same id the first counts.
    """
    (codes,), ids = encode_ids([columns["item"]], [label])
    _, first = np.unique(codes, return_index=True)
    out: list[pa.ChunkedArray | pa.Array] = [ids]
    for field in list(schema.ITEMS)[1:]:
        if field.name not in columns:
            out.append(pa.nulls(len(ids), field.type))
            continue
        column = columns[field.name].take(first)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if field.name != "categories" or not _is_list(column.type):
            column = column.cast(pa.string())
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
            if field.name == "categories":
                column = pc.split_pattern(column, separator)
        out.append(column.cast(field.type))
    return pa.table(out, schema=schema.ITEMS)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
