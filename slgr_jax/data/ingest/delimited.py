"""Delimited text (CSV, TSV and kin): its header, and its columns as exact text."""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

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

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


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
        layout = _Layout.of(self.names, columns, ids, is_log)
        table, lines, misfits = self._parse(layout, drop=drop, threads=not drop)
        if misfits and not drop:  # once more, in order: threads do not know row numbers
            table, lines, misfits = self._parse(layout, drop=drop, threads=False)
        numbers = self._account(lines, table.num_rows, misfits, drop=drop)
        return FileRows(layout.columns(table), lines.count, numbers)

    def stream(
        self, columns: Mapping[str, str], *, drop: bool = False
    ) -> tuple[LineCount, Iterator[FileRows]]:
        """`read` of a log, some rows at a time; the lines are counted as they are read."""
        layout = _Layout.of(self.names, columns, ID_ROLES, is_log=True)
        count = LineCount(self.where)

        def batches() -> Iterator[FileRows]:
            misfits: list[pacsv.InvalidRow] = []
            with self._lines(count, layout, drop=drop) as lines:
                if lines.is_empty():
                    return
                options = self._options(layout, misfits, threads=False)
                n_given = n_odd = 0  # rows that Arrow was given; those of another width
                for batch in pacsv.open_csv(lines, **options):
                    odd = _before(misfits, n_given + batch.num_rows)
                    last = n_given + batch.num_rows + len(odd)
                    numbers = None  # from 1, until a row is left out
                    n_odd += len(odd)
                    if lines.dropped or n_odd:
                        numbers = _in_file(np.arange(n_given + 1, last + 1), lines.dropped)
                        places = np.array([row.number - 1 - n_given for row in odd], np.int64)
                        self._refuse(odd, numbers[places], count, drop=drop)
                        numbers = np.delete(numbers, places)
                    n_given = last
                    count.rows += batch.num_rows
                    yield FileRows(layout.columns(pa.Table.from_batches([batch])), count, numbers)
                given = np.array([row.number for row in misfits], np.int64)
                self._refuse(misfits, _in_file(given, lines.dropped), count, drop=drop)

        return count, batches()

    @contextlib.contextmanager
    def _lines(self, count: LineCount, layout: _Layout, *, drop: bool) -> Iterator[CheckedLines]:
        """The file's lines; what is wrong with one is an `InputError`."""
        size = self._files.size(self._name)
        with (
            self._files.open(self._name) as file,
            reading(self.where),
            progress.bar(size, "B", label="read", scale=True) as bar,
        ):
            yield CheckedLines(
                _Counted(file, bar),
                count,
                self._dialect,
                has_header=self._has_header,
                drop=drop,
                width=len(self.names),
                numeric=layout.suspects,
            )

    def _options(
        self, layout: _Layout, misfits: list[pacsv.InvalidRow], *, threads: bool
    ) -> dict[str, Any]:
        """How Arrow is to read; rows of another width go to `misfits`."""

        def skip(row: pacsv.InvalidRow) -> str:
            misfits.append(row)
            return "skip"

        dialect = self._dialect
        return {
            "read_options": pacsv.ReadOptions(
                column_names=[str(place) for place in range(len(self.names))],
                block_size=ARROW_BLOCK,
                use_threads=threads,
            ),
            "parse_options": pacsv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char=dialect.quote or False,
                escape_char=dialect.escape or False,
                newlines_in_values=bool(dialect.quote),
                invalid_row_handler=skip,
            ),
            "convert_options": pacsv.ConvertOptions(
                column_types=dict(layout.types),
                include_columns=list(layout.types),
                strings_can_be_null=False,
            ),
        }

    def _parse(
        self, layout: _Layout, *, drop: bool, threads: bool
    ) -> tuple[pa.Table, CheckedLines, list[pacsv.InvalidRow]]:
        """The columns by place, the lines that held them, rows of another width."""
        misfits: list[pacsv.InvalidRow] = []
        with self._lines(LineCount(self.where), layout, drop=drop) as lines:
            if lines.is_empty():
                kinds = layout.types.items()
                empty = {place: pa.chunked_array([], kind) for place, kind in kinds}
                return pa.table(empty), lines, misfits
            table = pacsv.read_csv(lines, **self._options(layout, misfits, threads=threads))
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
        self._refuse(misfits, numbers[places], count, drop=drop)
        count.rows = n_rows
        count.check()
        return np.delete(numbers, places)

    def _refuse(
        self, misfits: Sequence[pacsv.InvalidRow], numbers: np.ndarray, count: LineCount, *,
        drop: bool,
    ) -> None:  # fmt: skip
        """Refuse or drop rows of another width, whose numbers in the file are given."""
        for row, number in zip(misfits, numbers, strict=True):
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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which columns are read, and as what.

    Attributes:
      places: role -> the column's place in a row.
      types: place -> Arrow type.
      suspects: places of numbers, see `CheckedLines`.
    """

    places: Mapping[str, int]
    types: Mapping[str, pa.DataType]
    suspects: Sequence[int] | None

    @classmethod
    def of(
        cls, names: Sequence[str], columns: Mapping[str, str], ids: Collection[str], is_log: bool
    ) -> _Layout:
        places = {role: names.index(column) for role, column in columns.items()}
        types = {str(place): _ID if role in ids else pa.string() for role, place in places.items()}
        numeric = [places[role] for role in ("timestamp", "rating") if role in places]
        return cls(places, types, numeric if is_log else None)

    def columns(self, table: pa.Table) -> dict[str, pa.ChunkedArray]:
        """Role -> column of a table whose columns are called by their places."""
        return {role: table.column(str(place)) for role, place in self.places.items()}


def _before(misfits: list[pacsv.InvalidRow], last: int) -> list[pacsv.InvalidRow]:
    """Take out the rows of another width that stand before a row.

    Args:
      misfits: in their order; Arrow may have read on.
      last: the row's number among those that fit, and those of another width before `misfits`.
    """
    n = 0
    while n < len(misfits) and misfits[n].number <= last + n:
        n += 1
    taken = misfits[:n]
    del misfits[:n]
    return taken


def _in_file(given: np.ndarray, dropped: Sequence[int]) -> np.ndarray:
    """The numbers in the file of rows that Arrow was given, both from 1.

    Args:
      dropped: ascending numbers of the rows that it was not given.
    """
    before = np.array(dropped, np.int64)
    before -= np.arange(1, before.size + 1)  # how many rows were given before each
    return given + np.searchsorted(before, given, "left")


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
