"""Rows that cannot be used: the first is refused, or all are dropped, counted and shown.

Nothing is thrown away in silence: of every file, lines read = header + blank lines + lines that
continue a quoted field + rows + dropped (`LineCount.check`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from slgr_jax.errors import InputError

SHOWN = 5


@dataclasses.dataclass
class LineCount:
    """What became of the lines of one file; of a table, of its rows.

    Attributes:
      where: the file.
      lines: all lines; a last one without a line end counts.
      header, blank: lines that hold no row.
      continued: further lines of rows with a quoted field over several lines.
      first_continued: the line on which the first such row begins; 0 if there is none.
      rows: rows that were handed on.
      dropped: rows that were not, each with the lines that it filled.
      examples: why, for the first few of `dropped`.
      note: what else there is to say of how it was read.
    """

    where: str
    lines: int = 0
    header: int = 0
    blank: int = 0
    continued: int = 0
    first_continued: int = 0
    rows: int = 0
    dropped: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    def check(self) -> None:
        """Raise `InputError` unless every line is accounted for."""
        accounted = self.header + self.blank + self.continued + self.rows + self.dropped
        if accounted != self.lines:
            raise InputError(
                f"{self.where} has {self.lines} lines, but {accounted} were understood: its "
                "quotes, escapes or line ends are read in two ways; state --quote and --escape"
            )

    def drop(self, message: str, count: int = 1) -> None:
        """Count rows that are left out, and keep the first messages."""
        self.dropped += count
        if len(self.examples) < SHOWN:
            self.examples.append(message)

    def record(self) -> dict[str, Any]:
        """The counts for a manifest, with the file's name in place of its path."""
        name = os.path.basename(self.where)
        examples = [example.replace(self.where, name) for example in self.examples]
        record = dataclasses.asdict(self) | {"name": name, "examples": examples}
        del record["where"]
        return record


class Sieve:
    """Which rows of a piece can be used; refuses the first that cannot, unless told to drop.

    Attributes:
      keep: [n] bool.
    """

    def __init__(
        self,
        n_rows: int,
        *,
        count: LineCount | None = None,
        numbers: np.ndarray | None = None,
        first: int = 0,
    ) -> None:
        """A sieve that drops if there is a `count` to drop into, else refuses.

        Args:
          n_rows: n.
          count: of the file; its rows become its dropped.
          numbers: [n] the rows' numbers in the file, from 1; None if none was dropped before.
          first: rows of the file that come before these, where there are no numbers.
        """
        self.keep = np.ones(n_rows, bool)
        self._count = count
        self._numbers, self._first = numbers, first

    @property
    def drops(self) -> bool:
        """Whether bad rows are dropped."""
        return self._count is not None

    def reject(self, bad: np.ndarray, label: str, reason: Callable[[int], str]) -> None:
        """Refuse or drop the rows of a mask.

        Args:
          bad: [n] bool.
          label: the file and the column.
          reason: what is wrong with a row, by its place in the mask.

        Raises:
          InputError: a row is bad and rows are not to be dropped.
        """
        places = np.flatnonzero(bad & self.keep)
        if not places.size:
            return
        if self._count is None:
            more = f" ({places.size} such rows in {bad.size})" if places.size > 1 else ""
            raise InputError(
                f"{self._message(places[0], label, reason)}{more}; --bad_rows=drop leaves out "
                "rows that cannot be used"
            )

        self.keep[places] = False
        self._count.rows -= places.size
        for place in places[:SHOWN]:
            self._count.drop(self._message(place, label, reason))
        self._count.dropped += places[SHOWN:].size

    def _message(self, place: int, label: str, reason: Callable[[int], str]) -> str:
        row = self._first + int(place) + 1 if self._numbers is None else int(self._numbers[place])
        return f"{label}, row {row}: {reason(int(place))}"


def told(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines for the terminal, of `LineCount.record`s: what the lines were, the first bad rows."""
    texts = []
    for record in records:
        kinds = {
            "header": record["header"],
            "blank": record["blank"],
            "of fields over several lines": record["continued"],
            "rows": record["rows"],
            "dropped": record["dropped"],
        }
        shown = " + ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n or kind == "rows")
        first = f" (the first from line {record['first_continued']})" if record["continued"] else ""
        note = f"; {record['note']}" if record["note"] else ""
        texts.append(f"{record['name']}: {record['lines']:,} lines = {shown}{first}{note}")
        texts += [f"  dropped: {example}" for example in record["examples"]]
        if record["dropped"] > len(record["examples"]):
            texts.append(f"  dropped: ... {record['dropped'] - len(record['examples']):,} more")
    return texts
