"""A file of answers as a table: Parquet, Arrow, JSON lines or CSV; the first bytes decide."""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.csv as pacsv

from slgr_jax.data import shards
from slgr_jax.errors import InputError, listing

# Columns of each kind: the user, the items, then the number.
ITEM_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "scores": ("item",),
    "interactions": ("item",),
    "edits": ("item", "replacement"),
    "preferences": ("preferred", "other"),
}
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "scores": ("score", "rank"),
    "interactions": ("weight", "label"),
    "edits": ("noise", "position"),
    "preferences": ("margin",),
}
# Columns of which a kind needs one of several sets, and how an error names them.
_OF_KIND: Mapping[str, tuple[tuple[frozenset[str], ...], str]] = {
    "interactions": (
        (frozenset({"user", "item"}),),
        "user, item and optionally weight",
    ),
    "edits": (
        (frozenset({"user", "item", "noise"}), frozenset({"user", "position", "noise"})),
        "user, item or position (0 the oldest), noise (a probability) and optionally replacement",
    ),
}
_ITEM_NAMES = frozenset(itertools.chain.from_iterable(ITEM_COLUMNS.values()))
_BINARY_HEADS = (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")


def read(
    path: pathlib.Path,
    delimiter: str,
    *,
    titled: bool,
    names: Mapping[str, str] | None = None,
    kind: str = "",
) -> pa.Table:
    """The table in a file: all columns, or of CSV those that are known.

    Args:
      path: the file; delimiter: CSV column separator.
      names: what its columns are called -> user, item or score, where that is something else.
      titled: a column title names the items, and is called item in what is returned.
      kind: see `kind_of`.

    Raises:
      InputError, ShardError: it cannot be read, or lacks columns.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a Parquet, Arrow or CSV file with answers")

    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise InputError(f"{path} is empty: a teacher needs at least one answer")
    names = {column: name for column, name in (names or {}).items() if column != name}
    if head in _BINARY_HEADS or head.startswith(b"{"):
        binary = head in _BINARY_HEADS
        table = shards.read_table(path) if binary else _read_json_lines(path, names)
        table = table.rename_columns(_renamed(table.column_names, names, path))
        return _with_items(table, titled=titled)

    separator = {"\\t": "\t"}.get(delimiter, delimiter)
    numbers = itertools.chain.from_iterable(NUMBERS.values())
    item_columns = itertools.chain.from_iterable(ITEM_COLUMNS.values())
    wanted = {"user", *numbers, *item_columns, *(("title",) if titled else ())}
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            header = next(csv.reader(text, delimiter=separator), [])
        if len(set(header)) != len(header):
            raise InputError(f"{path} names a column twice: {listing(header)}")
        header = _renamed(header, names, path)
        kind_of(header, path, titled=titled, kind=kind)
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=header, skip_rows=1) if names else None,
            parse_options=pacsv.ParseOptions(delimiter=separator),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()),
                include_columns=[name for name in header if name in wanted] or None,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        return _with_items(table, titled=titled)
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "; save it as UTF-8" if "utf-8" in reason.lower() else ""
        raise InputError(
            f"{path} cannot be read as CSV, Parquet or Arrow: {reason}{fix}"
        ) from error


def _renamed(columns: Sequence[str], names: Mapping[str, str], path: pathlib.Path) -> list[str]:
    """The columns as they are called here; others of these names give way.

    Raises:
      InputError: there is no such column.
    """
    for column, name in names.items():
        if column not in columns:
            raise InputError(
                f"{path} has no column {column!r}, which --{name}_column names; columns found: "
                f"{listing(columns)}"
            )
    taken = set(names.values())
    return [names.get(c, f"other {c}" if c in taken else c) for c in columns]


def _read_json_lines(path: pathlib.Path, names: Mapping[str, str]) -> pa.Table:
    """A JSON object a line; ids are text or whole numbers, numbers may be null."""
    number_names = {*itertools.chain.from_iterable(NUMBERS.values())}
    records: list[dict[str, object]] = []
    with open(path, encoding="utf-8") as lines:
        try:
            for line in lines:
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise InputError(f"{path}: row {len(records) + 1} is no JSON object")
                    records.append(record)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: row {len(records) + 1} is not JSON: {error}") from error

    columns = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(records)):
        values = [record.get(name) for record in records]
        known = names.get(name, name)
        is_id = known in ("user", "title") or known in _ITEM_NAMES
        texts = [_json_text(value, is_id=is_id) for value in values]
        for row, (value, text) in enumerate(zip(values, texts, strict=True), start=1):
            if text is None and value is not None and (is_id or known in number_names):
                wanted = "text or a whole number" if is_id else "a number"
                raise InputError(
                    f"{path}: row {row} has {name} {json.dumps(value)[:80]}; give {wanted}"
                )
        columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def _json_text(value: object, *, is_id: bool) -> str | None:
    """A JSON text or number as text, exactly; None for what is neither, or no id."""
    if isinstance(value, str):
        return value
    kinds = int if is_id else int | float
    return repr(value) if isinstance(value, kinds) and not isinstance(value, bool) else None


def _with_items(table: pa.Table, *, titled: bool) -> pa.Table:
    names = table.column_names
    if not titled or "title" not in names:
        return table
    if "item" in names:
        table = table.drop_columns(["item"])
    return table.rename_columns({"title": "item"})


def kind_of(columns: Sequence[str], path: pathlib.Path, *, titled: bool, kind: str = "") -> str:
    """Scores or preferences, by the names of columns; `InputError` where they are neither.

    Args:
      kind: what it must be: interactions (a user and an item, with or without a number) or edits
        (a user, an item or a position, a number); empty: scores or preferences.
    """
    names = {"item" if titled and name == "title" else name for name in columns}
    if kind:
        needed, expected = _OF_KIND[kind]
        if any(choice <= names for choice in needed):
            return kind
        raise InputError(
            f"{path} has columns {listing(columns)}; expected {expected}"
            + _other_delimiter(columns)
        )
    if {"user", "item"} <= names and names & set(NUMBERS["scores"]):
        return "scores"
    if {"user", "preferred", "other"} <= names:
        return "preferences"
    raise InputError(
        f"{path} has columns {listing(columns)}; expected user, item, score, or "
        "user, item, rank (1 the best), or user, preferred, other and optionally margin"
        + _other_delimiter(columns)
        + ("; the column title: add --items_as=titles" if "title" in columns else "")
    )


def _other_delimiter(columns: Sequence[str]) -> str:
    """What to add where one column holds the names of all; empty elsewhere."""
    for mark, flag in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'"), (",", ",")):
        if len(columns) == 1 and mark in columns[0]:
            return f"; the first line holds {mark!r}: add --delimiter={flag}"
    return ""
