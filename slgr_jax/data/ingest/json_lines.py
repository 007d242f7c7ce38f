"""JSON lines: one object a line, or a Python literal a line as in the Amazon files of 2014."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from slgr_jax.data.ingest import text_lines
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import ID_ROLES, FileRows
from slgr_jax.data.ingest.text_lines import CheckedLines, Dialect
from slgr_jax.errors import InputError, printable

_BLOCK = 1 << 25  # over the longest review
_LOOKED_AT = 100


def is_json(head: bytes) -> bool:
    """Whether a file begins as an object or a list of them."""
    for mark in (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"):
        head = head.removeprefix(mark)
    return head.replace(b"\0", b"").lstrip()[:1] in (b"{", b"[")


def field_names(files: Files, name: str, encoding: str) -> list[str]:
    """The fields of the first records that can be read, in the order of their first use.

    Raises:
      InputError: the file is empty, or holds no record.
    """
    tried = LineCount(files.where(name))
    names: dict[str, None] = {}
    for number, record in objects(files, name, encoding, tried, drop=True):
        names |= dict.fromkeys(record)
        if number >= _LOOKED_AT:
            break
    if not names and tried.examples:
        raise InputError(tried.examples[0])
    if not names:
        raise InputError(f"{tried.where} is empty")
    return list(names)


def objects(
    files: Files, name: str, encoding: str, count: LineCount, *, drop: bool
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(number of the row from 1, record) of each line that is not blank; counts the others.

    Args:
      count: of the file; lines, blank, rows and dropped are added to as the rows are read.
      drop: leave out lines that are no record instead of raising.

    Raises:
      InputError: a line is no record, or not text in the encoding.
    """
    where = files.where(name)
    chosen = text_lines.encoding_of(files.head(name, 4), encoding)
    with files.open(name) as file, reading(where):
        # Line ends are those of CSV: a record may hold U+2028, not a bare line end.
        lines = io.TextIOWrapper(file, encoding=chosen, errors="surrogateescape", newline=None)
        for line in lines:
            count.lines += 1
            if not line.strip():
                count.blank += 1
                continue
            number = count.rows + count.dropped + 1
            try:
                record = parse(line)
            except ValueError as error:
                message = f"{where}, line {count.lines} is no record: {error}"
                if not drop:
                    raise InputError(
                        f"{message}; --bad_rows=drop leaves out rows that cannot be used"
                    ) from error
                count.drop(message)
                continue
            count.rows += 1
            yield number, record


def parse(line: str) -> Mapping[str, object]:
    """The object of one line.

    Raises:
      ValueError: not an object, cut off, nested too deeply, or not text (with the reason).
    """
    stripped = line.strip()
    if not stripped.startswith("{"):
        if stripped.startswith("["):
            raise ValueError(
                "it begins a JSON array; write one object a line, as jq -c '.[]' FILE does"
            )
        raise ValueError("it is not one JSON object")
    try:
        stripped.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(stripped[error.start]) & 0xFF
        raise ValueError(
            f"byte 0x{byte:02x} is not UTF-8; state the encoding of the file, as --encoding=cp1252"
        ) from error
    try:
        record = json.loads(stripped)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        record = _literal(stripped, error)
    assert isinstance(record, dict)  # it begins with a brace
    return record


def _literal(line: str, error: ValueError) -> object:
    """A Python literal, where a line is one: keys in single quotes, None and True."""
    reason = " ".join(str(error).split())[:200]
    if line[1:].lstrip()[:1] not in ("'", "u"):
        raise ValueError(f"not one JSON object a line: {reason}") from error
    try:
        record = ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as failure:
        raise ValueError(f"neither a JSON object ({reason}) nor a Python literal") from failure
    if not isinstance(record, dict):
        raise ValueError("it is not one object")
    return {str(key): value for key, value in record.items()}


# --- columns ------------------------------------------------------------------------------


def read(
    files: Files,
    name: str,
    columns: Mapping[str, str],
    *,
    encoding: str = "auto",
    drop: bool = False,
    ids: Collection[str] = ID_ROLES,
) -> FileRows:
    """Fields of a JSON lines file as columns: ids as text; others numbers where all are, or text.

    Numbers and numbers as text mean the same. Arrow reads a file in which each field has one
    type; any other file is read line by line.

    Args:
      columns: role -> name of a field; a line without it has null there.
      drop: leave out lines that are no record, or hold a list where a value is due.

    Raises:
      InputError: a line is no record, or a value is none.
    """
    quick = _by_arrow(files, name, columns, encoding, ids)
    return quick or _line_by_line(files, name, columns, encoding, drop=drop, ids=ids)


def _by_arrow(
    files: Files, name: str, columns: Mapping[str, str], encoding: str, ids: Collection[str]
) -> FileRows | None:
    """All columns, where every line is one object with values of the expected types; else None."""
    if len(set(columns.values())) < len(columns):
        return None
    numeric = {"timestamp": pa.int64(), "rating": pa.float64()}
    layout = pa.schema(
        [
            (field, pa.string() if role in ids else numeric.get(role, pa.string()))
            for role, field in columns.items()
        ]
    )
    count = LineCount(files.where(name))
    chosen = text_lines.encoding_of(files.head(name, 4), encoding)
    with files.open(name) as file, reading(count.where):
        dialect = Dialect(quote="", encoding=chosen)
        lines = CheckedLines(file, count, dialect, has_header=False, drop=False, width=1)
        try:
            table = pajson.read_json(
                lines,
                read_options=pajson.ReadOptions(block_size=_BLOCK),
                parse_options=pajson.ParseOptions(
                    explicit_schema=layout, unexpected_field_behavior="ignore"
                ),
            )
            table.validate(full=True)
        except (pa.ArrowException, InputError):
            return None
    count.rows = table.num_rows
    if count.rows + count.blank != count.lines:
        return None  # an object over several lines, or several on one
    return FileRows({role: table.column(field) for role, field in columns.items()}, count)


def _line_by_line(
    files: Files,
    name: str,
    columns: Mapping[str, str],
    encoding: str,
    *,
    drop: bool,
    ids: Collection[str],
) -> FileRows:
    """All columns as text, and a bad line refused or dropped."""
    count = LineCount(files.where(name))
    cells: dict[str, list[str | None]] = {role: [] for role in columns}
    numbers: list[int] = []
    for number, record in objects(files, name, encoding, count, drop=drop):
        try:
            row = {
                role: as_text(record.get(field), printable(field), is_id=role in ids)
                for role, field in columns.items()
            }
        except ValueError as error:
            message = f"{count.where}, row {number}: {error}"
            if not drop:
                raise InputError(
                    f"{message}; --bad_rows=drop leaves out rows that cannot be used"
                ) from error
            count.rows -= 1
            count.drop(message)
            continue
        numbers.append(number)
        for role, value in row.items():
            cells[role].append(value)
    chosen = {role: pa.chunked_array([pa.array(cells[role], pa.string())]) for role in columns}
    return FileRows(chosen, count, np.array(numbers, np.int64) if count.dropped else None)


def as_text(value: object, field: str, *, is_id: bool) -> str | None:
    """A value as text, exactly; None where there is none.

    Raises:
      ValueError: it is a list, an object or true or false; or an id that is no whole number.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if not _is_unicode(value):
            raise ValueError(f"{field} holds half of a surrogate pair, which is no text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} is {json.dumps(value)[:60]}, not text or a number")
    if is_id and isinstance(value, float):
        raise ValueError(f"{field} is {value}; ids must be text or whole numbers")
    return repr(value) if isinstance(value, float) else str(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def texts_in(value: object) -> list[str]:
    """The strings in a string, a list, or a list of lists, in order; numbers as text."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts_in(part)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    return [value] if isinstance(value, str) and value and _is_unicode(value) else []
