"""Texts of items and users: tables of them by id, free of HTML, and how many ids they meet."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import schema
from slgr_jax.data.ingest import columns, json_lines
from slgr_jax.data.ingest.bad_rows import LineCount, Sieve
from slgr_jax.data.ingest.delimited import FileRows
from slgr_jax.errors import InputError

Row = Mapping[str, object]

# Tags of HTML that catalogues hold; other words in angle brackets are text, as <untitled>.
_INLINE = "a|abbr|b|big|cite|code|em|font|i|img|q|s|small|span|strike|strong|sub|sup|tt|u|wbr"
_BLOCK = (
    "blockquote|body|br|center|dd|div|dl|dt|h[1-6]|head|hr|html|li|ol|p|pre|section|table|tbody|"
    "td|th|thead|tr|ul"
)
_HIDDEN = re.compile(r"<(script|style)\b[^>]*>.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")


def plain(text: str) -> str:
    """A text without the HTML in it.

    Entities are decoded, twice where they were encoded twice; tags are left out, those that
    begin a line or a cell leave a space; scripts, styles and comments go with what they hold.
    A text without HTML is returned as it is, its spaces too.
    """
    stripped = _without_tags(text)
    for _ in range(2):
        stripped = _ENTITY.sub(lambda match: html.unescape(match.group()), stripped)
    if stripped == text:
        return text
    # Tags that were themselves written as entities.
    return " ".join(_without_tags(stripped).split())


def _without_tags(text: str) -> str:
    return _BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", _HIDDEN.sub(" ", text)))


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`plain` of each text of a column; empty becomes null."""
    suspects = pc.fill_null(pc.match_substring_regex(column, "[&<]"), False)
    if pc.any(suspects).as_py():
        cleaned = pa.array(
            [plain(text) for text in column.filter(suspects).to_pylist()], pa.string()
        )
        column = pc.replace_with_mask(column.combine_chunks(), _flat(suspects), cleaned)
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _flat(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


# --- tables -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of `schema.ITEMS` or `schema.USERS` of a file, and what its lines were.

    Attributes:
      table: the rows, ids distinct; at least those of the ids that were asked for.
      where: the file, for messages.
      count: its lines.
      example: some id of the file; empty if it has none.
    """

    table: pa.Table
    where: str
    count: LineCount
    example: str


def item_table(raw: Mapping[str, pa.ChunkedArray], label: str, *, separator: str) -> pa.Table:
    """Rows of `schema.ITEMS` from raw columns `item` and, where present, title, text, categories.

    Text categories are split at `separator`; empty text becomes null, HTML plain text. Of
    several rows with the same id the first counts.

    Raises:
      InputError: ids without exact text, or a column of a type that is no text.
    """
    (codes,), ids = columns.encode_ids([raw["item"]], [label])
    _, first = np.unique(codes, return_index=True)
    out: list[pa.ChunkedArray | pa.Array] = [ids]
    for field in list(schema.ITEMS)[1:]:
        if field.name not in raw:
            out.append(pa.nulls(len(ids), field.type))
            continue
        column = columns.decoded(raw[field.name]).take(first)
        where = f"{label.rsplit(': ', 1)[0]}: {field.name}"
        if field.name == "categories":
            out.append(_categories(column, where, separator))
        else:
            out.append(_plain_column(_as_text(column, where)))
    return pa.table([_flat(column) for column in out], schema=schema.ITEMS)


def _as_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if columns.is_list(kind) and columns.is_text(kind.value_type):
        # Amazon's descriptions: paragraphs.
        values = column.cast(pa.list_(pa.string()))
        return pc.binary_join(values, " ")
    simple = columns.is_text(kind) or pa.types.is_primitive(kind) or pa.types.is_decimal(kind)
    if not simple:
        raise InputError(f"{where} has type {kind}; it must be text, or lists of text")
    return column.cast(pa.string())


def _categories(column: pa.ChunkedArray, where: str, separator: str) -> pa.ChunkedArray:
    if not columns.is_list(column.type):
        text = _as_text(column, where)
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        column = pc.split_pattern(text, separator)
    elif not columns.is_text(column.type.value_type) and not pa.types.is_primitive(
        column.type.value_type
    ):
        raise InputError(f"{where} has type {column.type}; it must be text, or lists of text")
    lists = column.cast(pa.list_(pa.string()))
    suspects = [pc.match_substring_regex(chunk.flatten(), "[&<]") for chunk in lists.chunks]
    if not any(pc.any(suspect).as_py() for suspect in suspects):
        return lists
    cleaned = [
        None if names is None else [plain(name) if name else name for name in names]
        for names in lists.to_pylist()
    ]
    return pa.chunked_array([pa.array(cleaned, pa.list_(pa.string()))])


def of_rows(rows: FileRows, label: str, *, separator: str, drop: bool) -> Texts:
    """The item table of a file that was read as columns; rows without an id are bad rows."""
    sieve = Sieve(
        len(rows.columns["item"]), count=rows.count if drop else None, numbers=rows.numbers
    )
    columns.check_ids(rows.columns["item"], label, sieve)
    raw = rows.columns
    if not sieve.keep.all():
        raw = {role: column.filter(pa.array(sieve.keep)) for role, column in raw.items()}
    table = item_table(raw, label, separator=separator)
    example = str(raw["item"][0].as_py()) if len(raw["item"]) else ""
    return Texts(table, rows.count.where, rows.count, example)


def users_of_rows(rows: FileRows, label: str, *, drop: bool) -> Texts:
    """The user table of a file that was read as columns; of several rows with an id, the first."""
    raw = rows.columns
    sieve = Sieve(len(raw["user"]), count=rows.count if drop else None, numbers=rows.numbers)
    columns.check_ids(raw["user"], label, sieve)
    kept = pa.array(sieve.keep)
    (codes,), ids = columns.encode_ids([raw["user"].filter(kept)], [label])
    _, first = np.unique(codes, return_index=True)
    told = pa.nulls(len(ids), pa.string())
    if "text" in raw:
        column = columns.decoded(raw["text"]).filter(kept).take(first)
        told = _flat(_plain_column(_as_text(column, f"{label.rsplit(': ', 1)[0]}: text")))
    example = ids[0].as_py() if len(ids) else ""
    return Texts(pa.table([ids, told], schema=schema.USERS), rows.count.where, rows.count, example)


def of_records(
    records: Iterable[tuple[int, Row]],
    fields: Mapping[str, Sequence[str]],
    count: LineCount,
    *,
    wanted: Collection[str] | None,
    separator: str | None,
    drop: bool,
) -> Texts:
    """The item table of JSON lines; only rows of the wanted ids are kept, or all (None).

    Args:
      records: (row number, record).
      fields: column of `schema.ITEMS` -> names of its field; the first that is filled counts.
      separator: at which categories that are one text are split.
    """
    rows: list[Row] = []
    example = ""
    for number, record in records:
        values = {
            column: next((record[name] for name in names if _is_filled(record.get(name))), None)
            for column, names in fields.items()
        }
        try:
            item = json_lines.as_text(values["item_id"], "the item id", is_id=True)
            if not item:
                raise ValueError(f"the id is missing ({' or '.join(fields['item_id'])})")
        except ValueError as error:
            message = f"{count.where}, row {number}: {error}"
            if not drop:
                raise InputError(
                    f"{message}; --bad_rows=drop leaves out rows that cannot be used"
                ) from error
            count.rows -= 1
            count.drop(message)
            continue
        example = example or item
        if wanted is not None and item not in wanted:
            continue
        categories = json_lines.texts_in(values.get("categories"))
        if separator and isinstance(values.get("categories"), str):
            categories = categories[0].split(separator) if categories else []
        rows.append(
            {
                "item_id": item,
                "title": " ".join(json_lines.texts_in(values.get("title"))) or None,
                "text": " ".join(json_lines.texts_in(values.get("text"))) or None,
                "categories": categories,
            }
        )
    return Texts(from_rows(rows, schema.ITEMS), count.where, count, example)


def _is_filled(value: object) -> bool:
    """Whether a field says something: an id may be 0."""
    return value is not None and value != "" and value != []


def beside(rows: Sequence[Row], layout: pa.Schema, count: LineCount) -> Texts | None:
    """The texts of a file that lies beside the interactions; None where it holds none."""
    count.rows = count.rows or len(rows)
    if not rows:
        return None
    return Texts(from_rows(rows, layout), count.where, count, str(rows[0][layout.names[0]]))


def from_rows(rows: Iterable[Row], layout: pa.Schema) -> pa.Table:
    """Rows as dictionaries to a table of `schema.ITEMS` or `schema.USERS`; of an id, the first."""
    by_id: dict[str, Row] = {}
    key = layout.names[0]
    for row in rows:
        by_id.setdefault(str(row[key]), row)
    table = pa.Table.from_pylist(list(by_id.values()), schema=layout)
    if layout.names == schema.USERS.names:
        return table
    raw = {"item": table["item_id"], **{name: table[name] for name in layout.names[1:]}}
    return item_table(raw, "item texts: item id", separator="|")


def attach(ids: pa.Array, texts: Texts | None, layout: pa.Schema) -> tuple[pa.Table, int]:
    """The table of `layout` with row k for id k, texts where there are any, and how many met.

    Raises:
      InputError: there is an item table, and no item is in it.
    """
    if texts is None:
        empty = [pa.nulls(len(ids), field.type) for field in list(layout)[1:]]
        return pa.table([ids, *empty], schema=layout), 0
    rows = pc.index_in(ids, value_set=_flat(texts.table.column(0)))
    met = len(ids) - rows.null_count
    if not met and layout.names == schema.ITEMS.names:
        raise _strangers(ids[0].as_py(), texts)
    joined = [_flat(texts.table.column(name)).take(rows) for name in layout.names[1:]]
    return pa.table([ids, *joined], schema=layout), met


def with_table_ids(ids: pa.Array, texts: Texts) -> pa.Array:
    """`ids`, then those of a table that are not among them, in the order of their text."""
    of_table = _flat(texts.table.column(0))
    others = of_table.filter(pc.invert(pc.is_in(of_table, value_set=ids)))
    return pa.concat_arrays([ids, others.take(pc.sort_indices(others))])


def merged(old: pa.Table, new: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """`new`, whose first rows are those of `old`, with what only `old` says; and what differs.

    A newer text holds where there is one. The categories of the rows of `old` stay as they are,
    none included: categories are numbered by where they come first, and keep their numbers so.

    Returns:
      The table, and by column how many rows of `old` say something else in `new`.
    """
    changed: dict[str, int] = {}
    columns: list[pa.ChunkedArray | pa.Array] = [new.column(0)]
    for name in new.column_names[1:]:
        before, now = _flat(old.column(name)), _flat(new.column(name))
        known, rest = now.slice(0, len(before)), now.slice(len(before))
        says = known.is_valid()
        if name == "categories":
            says = pc.fill_null(pc.greater(pc.list_value_length(known), 0), False)
            differs = [a != b for a, b in zip(before.to_pylist(), known.to_pylist(), strict=True)]
            changed[name] = int(np.count_nonzero(differs & says.to_numpy(zero_copy_only=False)))
            known = before
        else:
            both = pc.and_(says, before.is_valid())
            changed[name] = int(pc.sum(pc.and_(both, pc.not_equal(known, before))).as_py() or 0)
            known = pc.coalesce(known, before)
        columns.append(pa.concat_arrays([_flat(known), rest]))
    return pa.table(columns, schema=new.schema), changed


def _strangers(log_id: str, texts: Texts) -> InputError:
    """What to say when no id of the interactions is in the item table."""
    table_id = texts.example
    if not table_id:
        return InputError(f"{texts.where} has no items; leave it out or name another --items_input")
    hint = "name the right --item_column, or write both alike"
    if table_id != table_id.strip():
        hint = "the spaces around them belong to the id: take them out"
    elif re.fullmatch(r"-?\d+\.0+", table_id) and "." not in log_id:
        hint = "write whole numbers without a fraction, as astype('int64') in pandas"
    elif table_id.lstrip("0") == log_id.lstrip("0") or table_id.lower() == log_id.lower():
        hint = "ids are exact text, with leading zeros and case: write both alike"
    return InputError(
        f"no item of the interactions is in {texts.where}: their ids are as {log_id!r}, those of "
        f"the item table as {table_id!r}; {hint}, or leave the table out"
    )
