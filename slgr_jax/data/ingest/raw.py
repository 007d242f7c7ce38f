"""What a reader makes of raw files: interactions of each, in memory or read some at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import FileRows
from slgr_jax.data.ingest.feature_columns import Declared, FeatureColumns
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import InputError, printable


@dataclasses.dataclass(frozen=True)
class Piece:
    """Interactions of one file, columns as they were found.

    Attributes:
      where: the file, for messages.
      part: train, valid or test where the file is one part; None where a rule decides.
      columns: role (`tables.ROLES`) -> column; user and item always, the others where present;
        and those of features (`feature_columns.role`).
      names: role -> the column's name in the file.
      count: the lines of the file.
      numbers: [n] the rows' numbers in the file, from 1; None: `first` + 1 to `first` + n.
      first: rows of the file that come before these.
    """

    where: str
    part: str | None
    columns: Mapping[str, pa.ChunkedArray]
    names: Mapping[str, str]
    count: LineCount
    numbers: np.ndarray | None = None
    first: int = 0

    @classmethod
    def of(cls, rows: FileRows, part: str | None, names: Mapping[str, str]) -> Piece:
        """The piece of what was read from a file."""
        return cls(rows.count.where, part, rows.columns, names, rows.count, rows.numbers)

    def label(self, role: str) -> str:
        """The file and the column, for messages."""
        return f"{self.where}: column {printable(self.names[role])}"

    def __len__(self) -> int:
        return len(self.columns["user"])


@dataclasses.dataclass(frozen=True)
class Stream:
    """Interactions of one file that are read some at a time, once.

    Attributes:
      where, part, names, count: as of `Piece`; lines are counted as they are read.
      batches: rows in their order.
    """

    where: str
    part: str | None
    names: Mapping[str, str]
    count: LineCount
    batches: Iterator[FileRows]

    def piece(self, batches: Sequence[FileRows], first: int) -> Piece:
        """Batches that follow one another, with `first` rows of the file before them."""

        def joined(role: str) -> pa.ChunkedArray:
            return pa.chunked_array([chunk for b in batches for chunk in b.columns[role].chunks])

        columns = {role: joined(role) for role in self.names}
        numbers = None
        if any(rows.numbers is not None for rows in batches):
            ends = first + np.cumsum([len(rows) for rows in batches])
            numbers = np.concatenate(
                [
                    np.arange(end - len(rows), end) + 1 if rows.numbers is None else rows.numbers
                    for rows, end in zip(batches, ends, strict=True)
                ]
            )
        return Piece(self.where, self.part, columns, self.names, self.count, numbers, first)


@dataclasses.dataclass(frozen=True)
class Raw:
    """All interactions of an input, and how to read the texts that belong to them.

    Either all of them are `pieces`, which are in memory, or all are `streams`.
    """

    pieces: tuple[Piece, ...]
    files: tuple[Files, ...]
    # Wanted ids (None: all of the table) -> rows of schema.ITEMS, any order.
    items: Callable[[pa.Array | None], Texts | None]
    users: Callable[[pa.Array], Texts | None]  # wanted ids -> rows of schema.USERS
    features: Mapping[str, FeatureColumns] = dataclasses.field(default_factory=dict)  # by side
    of_interactions: tuple[Declared, ...] = ()  # features, whose columns each piece has
    name: str = ""  # what the files call the data set; empty if nothing better than --input
    streams: tuple[Stream, ...] = ()

    @property
    def inputs(self) -> tuple[Piece | Stream, ...]:
        """The files of interactions."""
        return self.streams or self.pieces

    def has(self, role: str) -> bool:
        """Whether the interactions have a column of a role."""
        return any(role in each.names for each in self.inputs)


def stretches(raw: Raw, most_rows: int) -> Iterator[tuple[Piece, ...]]:
    """All rows of the streams in their order, `most_rows` at a time.

    Raises:
      InputError: a file has no rows.
    """
    pieces: list[Piece] = []
    n_rows = 0
    for stream in raw.streams:
        first, batches = 0, list[FileRows]()
        for batch in stream.batches:
            batches.append(batch)
            n_rows += len(batch)
            if n_rows < most_rows:
                continue
            pieces.append(stream.piece(batches, first))
            yield tuple(pieces)
            first += len(pieces[-1])
            pieces, batches, n_rows = [], [], 0
        if batches:
            pieces.append(stream.piece(batches, first))
        elif not first:
            raise no_rows(stream)
    if pieces:
        yield tuple(pieces)


def no_rows(file: Piece | Stream) -> InputError:
    """What to say of a file without rows."""
    dropped = f" left: {file.count.examples[0]}" if file.count.examples else ""
    return InputError(f"{file.where} has no rows{dropped}")


def nothing(wanted: pa.Array | None) -> None:
    """No texts."""
    return None
