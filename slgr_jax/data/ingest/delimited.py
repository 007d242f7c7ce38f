"""Delimited text (CSV, TSV and kin): its header, and its columns as exact text."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from slgr_jax import progress
from slgr_jax.data.ingest import text_lines
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.text_lines import CheckedLines, Dialect
from slgr_jax.errors import InputError, listing

if TYPE_CHECKING:
    from tqdm import tqdm

ID_ROLES = ("user", "item", "split")
_ID = pa.dictionary(pa.int32(), pa.string())
# Arrow splits a file into blocks of this size, each of which holds at least a row.
ARROW_BLOCK = 1 << 24
_LONGEST_HEADER = 1 << 20
_KNOBS = {"timestamp": "time"}
_DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}


@dataclasses.dataclass(frozen=True)
class FileRows:
    """Columns of one file, and what became of its lines.

    Attributes:
      columns: role -> column, [n] rows each.
      count: of the file; `count.rows` is n.
      numbers: [n] int64, the rows' numbers in the file, from 1; None: 1 to n.
    """

    columns: dict[str, pa.ChunkedArray]
    count: LineCount
    numbers: np.ndarray | None = None


class _Counted:
    """A file of which a bar says how far it has been read."""

    def __init__(self, file: BinaryIO, bar: tqdm) -> None:
        self._file, self._bar = file, bar

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._bar.update(len(data))
        return data


class DelimitedFile:
    """A file of delimited text whose columns have names.

    Attributes:
      names: of the columns, in order.
      where: the file, for messages.
    """

    def __init__(
        self, files: Files, name: str, dialect: Dialect, names: Sequence[str] | None = None
    ) -> None:
        """Open a file and read its header.

        Args:
          names: column names where the file has no header line.

        Raises:
          InputError: it is empty, or its first line is no header.
        """
        self.where = files.where(name)
        self._files, self._name = files, name
        self._has_header = names is None
        head = files.head(name, _LONGEST_HEADER)
        if not head.strip():
            raise InputError(f"{self.where} is empty")
        encoding = text_lines.encoding_of(head[:4], dialect.encoding)
        self._dialect = dataclasses.replace(dialect, encoding=encoding)
        self.names = list(names) if names is not None else self._header(head)

    def _header(self, head: bytes) -> list[str]:
        try:
            decoder = codecs.getincrementaldecoder(self._dialect.encoding)("replace")
            text = decoder.decode(head)
        except UnicodeError as error:
            message = f"{self.where} is not {self._dialect.encoding}: {error}; state its --encoding"
            raise InputError(message) from error
        line = next((line for line in re.split(r"\r\n|\n|\r", text) if line), "")
        if "\0" in line:
            raise InputError(f"{self.where} is not text; is it of another --source?")
        if len(line) == len(text) and len(head) >= _LONGEST_HEADER:
            raise InputError(f"{self.where} has a first line over {_LONGEST_HEADER:,} bytes")
        dialect = self._dialect
        if not dialect.quote and not dialect.escape:
            return line.split(dialect.delimiter)
        try:
            (fields,) = csv.reader(
                io.StringIO(line, newline=""),
                delimiter=dialect.delimiter,
                quotechar=dialect.quote or None,
                escapechar=dialect.escape or None,
                quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
                strict=True,
            )
        except (csv.Error, ValueError) as error:
            raise InputError(
                f"{self.where}: the quotes in the header are not closed: {error}; if quotes are "
                "plain text here, add --quote=none"
            ) from error
        return fields

    def read(
        self,
        columns: Mapping[str, str],
        *,
        drop: bool = False,
        ids: Collection[str] = ID_ROLES,
        is_log: bool = True,
    ) -> FileRows:
        """Columns as exact text.

        Args:
          columns: role -> name of a column.
          drop: leave out rows that cannot be read instead of raising.
          ids: roles that are dictionary-encoded while reading, which keeps large files small.
          is_log: rows of numbers and ids, where a row over several lines is looked at closely.

        Raises:
          InputError: a row has another number of fields, is not text, or has an open quote.
        """
        places = {role: self.names.index(column) for role, column in columns.items()}
        types = {str(place): _ID if role in ids else pa.string() for role, place in places.items()}
        numeric = [places[role] for role in ("timestamp", "rating") if role in places]
        suspects = numeric if is_log else None

        table, lines, misfits = self._parse(types, suspects, drop=drop, threads=not drop)
        if misfits and not drop:  # once more, in order: threads do not know row numbers
            table, lines, misfits = self._parse(types, suspects, drop=drop, threads=False)
        numbers = self._account(lines, table.num_rows, misfits, drop=drop)
        chosen = {role: table.column(str(place)) for role, place in places.items()}
        return FileRows(chosen, lines.count, numbers)

    def _parse(
        self, types: Mapping[str, pa.DataType], suspects: Sequence[int] | None, *,
        drop: bool, threads: bool,
    ) -> tuple[pa.Table, CheckedLines, list[pacsv.InvalidRow]]:  # fmt: skip
        """The columns of `types` by place, the lines that held them, rows of another width."""
        misfits: list[pacsv.InvalidRow] = []

        def skip(row: pacsv.InvalidRow) -> str:
            misfits.append(row)
            return "skip"

        dialect, width = self._dialect, len(self.names)
        size = self._files.size(self._name)
        with (
            self._files.open(self._name) as file,
            reading(self.where),
            progress.bar(size, "B", label="read", scale=True) as bar,
        ):
            lines = CheckedLines(
                _Counted(file, bar),
                LineCount(self.where),
                dialect,
                has_header=self._has_header,
                drop=drop,
                width=width,
                numeric=suspects,
            )
            if lines.is_empty():
                empty = {place: pa.chunked_array([], kind) for place, kind in types.items()}
                return pa.table(empty), lines, misfits
            table = pacsv.read_csv(
                lines,
                read_options=pacsv.ReadOptions(
                    column_names=[str(place) for place in range(width)],
                    block_size=ARROW_BLOCK,
                    use_threads=threads,
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=dialect.delimiter,
                    quote_char=dialect.quote or False,
                    escape_char=dialect.escape or False,
                    newlines_in_values=bool(dialect.quote),
                    invalid_row_handler=skip,
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict(types),
                    include_columns=list(types),
                    strings_can_be_null=False,
                ),
            )
        return table, lines, misfits

    def _account(
        self, lines: CheckedLines, n_rows: int, misfits: Sequence[pacsv.InvalidRow], *, drop: bool
    ) -> np.ndarray | None:
        """Count every line; the numbers of the rows that are left, None if all are."""
        count = lines.count
        if not lines.dropped and not misfits:
            count.rows = n_rows
            count.check()
            return None
        numbers = np.delete(np.arange(1, lines.n_rows + 1), np.array(lines.dropped, np.int64) - 1)
        # Arrow numbers the rows that it was given.
        places = np.array([row.number for row in misfits], np.int64) - 1
        for row, number in zip(misfits, numbers[places], strict=True):
            shown = row.text if len(row.text) <= 60 else row.text[:57] + "..."
            message = (
                f"{self.where}, row {number}: Expected {row.expected_columns} columns, got "
                f"{row.actual_columns}: {shown!r}"
            )
            if not self._dialect.escape and f"\\{self._dialect.quote}" in row.text:
                message += "; a backslash before a quote means --escape='\\'"
            if not drop:
                raise InputError(
                    f"{message} ({len(misfits)} such rows); --bad_rows=drop leaves out rows that "
                    "cannot be used"
                )
            count.drop(message)
        count.rows = n_rows
        count.check()
        return np.delete(numbers, places)


def pick(
    names: Sequence[str],
    wanted: Mapping[str, str],
    where: str,
    *,
    required: Collection[str],
    first_line: bool = False,
) -> dict[str, str]:
    """Role -> column for the roles whose column is in the file.

    Args:
      names: the columns of the file.
      wanted: role -> name of its column.
      first_line: the names are those of the first line of a delimited file.

    Raises:
      InputError: a required column is missing, or a column that is read is there twice.
    """
    missing = [wanted[role] or f"(--{role}_column is empty)" for role in required]
    missing = [column for column in missing if column not in names]
    if missing:
        advice = _advice(names) if first_line else ""
        knobs = listing(dict.fromkeys(map(_knob, required)))
        raise InputError(
            f"{where} has no column {listing(missing)}; columns found: {listing(names)}; name "
            f"them with {knobs}{advice}"
        )
    chosen = {role: column for role, column in wanted.items() if column in names}
    twice = [column for column in chosen.values() if list(names).count(column) > 1]
    if twice:
        raise InputError(f"{where} has column {listing(twice)} more than once; rename one of them")
    return chosen


def _knob(role: str) -> str:
    """The flag that names the column of a role."""
    if role.startswith("feature "):
        return "--interaction_features"
    return f"--{_KNOBS.get(role, role)}_column"


def _advice(names: Sequence[str]) -> str:
    """What else a first line without the columns may mean."""
    if len(names) == 1:
        for delimiter, written in _DELIMITERS.items():
            if delimiter in names[0]:
                return f"; the first line holds {written!r}: add --delimiter='{written}'"
    if names[0].startswith('"') and names[0].endswith('"'):
        return "; the names are quoted: add --quote='\"'"
    # A number is a row and not a name.
    if any(re.fullmatch(r"\s*[-+]?\d[\d.,:]*\s*", name) for name in names):
        return (
            f"; if the first line is a row, name all {len(names)} columns in order, as "
            "--columns=user,item,rating,timestamp"
        )
    return ""
