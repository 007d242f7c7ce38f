"""Lines of text as clean UTF-8: encoding, NULs and quotes are checked before Arrow sees them.

Arrow splits the lines into fields; what it would take for something else is refused or dropped
here: a quote that is never closed swallows the lines up to the next one, a NUL or a byte of
another encoding ends up inside an id.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Sequence
from typing import BinaryIO, Protocol

import numpy as np

from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.errors import ConfigError, InputError

BLOCK = 1 << 24
_LONGEST_LINE = 1 << 26
# A quoted field over more lines than this is a quote that was never closed.
_MOST_LINES = 1000
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# A rating or a time in a line that is split without regard to quotes.
_NUMERIC = re.compile(rb'^["\s]*[-+.]?\d[-+\d.,:/TZe ]*["\s]*$')
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a delimited file is written; characters are single ASCII bytes, empty for none."""

    delimiter: str = ","
    quote: str = '"'
    escape: str = ""
    encoding: str = "auto"

    def with_delimiter(self, delimiter: str, *, quote: str) -> Dialect:
        """The dialect of a layout with a fixed delimiter; quotes as given."""
        return dataclasses.replace(self, delimiter=delimiter, quote=quote)


def dialect_of(config: PrepareConfig) -> Dialect:
    """The dialect of the command line.

    Raises:
      ConfigError: a character that is not one ASCII character, two that are the same, or an
        encoding that Python does not know.
    """
    delimiter = _character(config.delimiter, "delimiter", {"\\t": "\t", "tab": "\t"})
    automatic = "" if delimiter == "\t" else '"'
    quote = _character(config.quote, "quote", {"auto": automatic, "none": "", "": ""})
    escape = _character(config.escape, "escape", {"none": "", "": ""})
    used = [character for character in (delimiter, quote, escape) if character]
    if len(set(used)) < len(used):
        raise ConfigError(
            f"--delimiter={config.delimiter!r}, --quote={config.quote!r} and "
            f"--escape={config.escape!r} must differ; --quote=none turns quotes off"
        )
    check_encoding(config.encoding)
    return Dialect(delimiter, quote, escape, config.encoding)


def _character(value: str, knob: str, words: dict[str, str]) -> str:
    text = words.get(value, value)
    if (text and len(text) != 1) or not text.isascii() or text in ("\n", "\r", "\0"):
        choices = " or ".join(repr(word) for word in words if word)
        raise ConfigError(f"--{knob}={value!r} must be one ASCII character, or {choices}")
    if not text and value not in words:
        raise ConfigError(f"--{knob} is empty; give one ASCII character")
    return text


def check_encoding(name: str) -> None:
    """Raise `ConfigError` unless --encoding names an encoding of text, or is auto."""
    if name == "auto":
        return
    try:
        "a".encode(name)
    except (LookupError, UnicodeError, ValueError) as error:
        raise ConfigError(
            f"--encoding={name!r} is no encoding of text that Python knows; examples: auto, "
            "utf-8, cp1252, latin-1, utf-16, shift_jis, gb18030"
        ) from error


def encoding_of(head: bytes, encoding: str) -> str:
    """The encoding of a file that begins with `head`; auto is UTF-8 unless a mark says else."""
    if encoding != "auto":
        return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8-sig")


def encoding_of_texts(file: BinaryIO, encoding: str) -> str:
    """The encoding of a file of texts; with auto, what is not UTF-8 is cp1252 (else Latin-1)."""
    head = file.read(BLOCK)
    chosen = encoding_of(head[:4], encoding)
    if encoding != "auto" or chosen != "utf-8-sig":
        return chosen
    decoders = {name: codecs.getincrementaldecoder(name)() for name in ("utf-8-sig", "cp1252")}
    while head:
        block, head = head, file.read(BLOCK)
        for name in list(decoders):
            try:
                decoders[name].decode(block, final=not head)
            except UnicodeDecodeError:
                del decoders[name]
    return next(iter(decoders), "latin-1")


class Readable(Protocol):
    """What of a file is asked."""

    def read(self, size: int, /) -> bytes: ...


class CheckedLines:
    """A readable stream of the rows of a text file, in UTF-8 and without the header.

    Bad lines raise, or are left out and counted in `count`; so is everything else but `rows`,
    which whoever splits the lines knows.

    Attributes:
      count: the lines of the file so far.
      dropped: numbers of the rows that were left out; rows count from 1.
    """

    closed = False

    def __init__(
        self,
        file: Readable,
        count: LineCount,
        dialect: Dialect,
        *,
        has_header: bool,
        drop: bool,
        width: int,
        numeric: Sequence[int] | None = None,
    ) -> None:
        """Check `file` line by line.

        Args:
          file: the raw bytes.
          dialect: its encoding is resolved (`encoding_of`).
          has_header: the first line that is not blank holds no row.
          drop: leave bad lines out instead of raising.
          width: fields of a row.
          numeric: places of fields that hold numbers or times, by which a row is known that
            a quote has swallowed; None: no row over several lines is suspected.
        """
        self.count = count
        self.dropped: list[int] = []
        self._file, self._dialect, self._drop = file, dialect, drop
        self._width, self._numeric = width, numeric
        self._decoder = codecs.getincrementaldecoder(dialect.encoding)()
        self._header_is_due = has_header
        self._ready = bytearray()
        self._carry = b""
        self._pending: list[bytes] = []  # lines of a row whose quote is open
        self._row = 0
        self._is_utf8 = dialect.encoding == "utf-8-sig"
        self._is_past_mark = self._ended = False
        self._quote = dialect.quote.encode()
        self._delimiter = dialect.delimiter.encode()
        self._scan = _Scan(dialect)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes of whole rows; empty at the end."""
        while not self._ended and (size < 0 or len(self._ready) < size):
            self._advance()
        size = len(self._ready) if size < 0 else size
        out = bytes(self._ready[:size])
        del self._ready[:size]
        return out

    def is_empty(self) -> bool:
        """Whether there is no row at all."""
        while not self._ended and not self._ready:
            self._advance()
        return not self._ready

    @property
    def n_rows(self) -> int:
        """Rows until now, those that were left out among them."""
        return self._row

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def _advance(self) -> None:
        """Check one block and make its rows ready."""
        raw = self._file.read(BLOCK)
        last = not raw
        data = self._carry + self._utf8(raw, last)
        if last:
            self._ended = True
            cut = len(data)
        else:
            cut = data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, len(data) - 1) + 1
            if not cut and len(data) > _LONGEST_LINE:
                raise InputError(
                    f"{self.count.where}, line {self.count.lines + 1} is over "
                    f"{_LONGEST_LINE >> 20} MiB long; is it of another --source?"
                )
        block, self._carry = data[:cut], data[cut:]
        if self._header_is_due and block:
            block = self._cut_header(block)

        if block and not self._pending and self._is_plain(block):
            self._pass(block)
        elif block:
            self._check_lines(block.splitlines(keepends=True))
        while last and self._pending:
            self._check_lines(self._give_up("its quote is never closed"))

    def _utf8(self, raw: bytes, last: bool) -> bytes:
        if self._is_utf8:
            if not self._is_past_mark:
                self._is_past_mark = True
                return raw.removeprefix(codecs.BOM_UTF8)
            return raw
        try:
            return self._decoder.decode(raw, last).encode("utf-8")
        except UnicodeError as error:
            raise InputError(
                f"{self.count.where} is not {self._dialect.encoding} after line "
                f"{self.count.lines}: {error}; state its --encoding"
            ) from error

    def _cut_header(self, block: bytes) -> bytes:
        for match in _LINE_END.finditer(block):
            start, end = match.span()
            self.count.lines += 1
            if start:
                self.count.header = 1
                self._header_is_due = False
                return block[end:]
            self.count.blank += 1
            return self._cut_header(block[end:])
        if block:  # the header is all there is
            self.count.lines, self.count.header = self.count.lines + 1, 1
            self._header_is_due = False
        return b""

    def _is_plain(self, block: bytes) -> bool:
        """Whether every row is one line, text, and its quotes are at the ends of fields."""
        if b"\0" in block:
            return False
        if not block.isascii():
            try:
                block.decode("utf-8")
            except UnicodeDecodeError:
                return False
        if not self._quote or self._quote not in block:
            return not self._dialect.escape or self._dialect.escape.encode() not in block
        return not self._dialect.escape and self._quotes_are_plain(block)

    def _quotes_are_plain(self, block: bytes) -> bool:
        data = np.frombuffer(block, np.uint8)
        places = np.flatnonzero(data == self._quote[0])
        if places.size % 2:
            return False
        opening, closing = places[::2], places[1::2]
        # What may stand before an opening quote and after a closing one; a doubled quote is a
        # closing one and an opening one side by side.
        edges = np.zeros(256, bool)
        edges[[self._delimiter[0], 10, 13, self._quote[0]]] = True
        before = edges[data[np.maximum(opening - 1, 0)]] | (opening == 0)
        after = edges[data[np.minimum(closing + 1, data.size - 1)]] | (closing == data.size - 1)
        ends = np.flatnonzero((data == 10) | (data == 13))
        on_one_line = np.searchsorted(ends, opening) == np.searchsorted(ends, closing)
        return bool(before.all() and after.all() and on_one_line.all())

    def _pass(self, block: bytes) -> None:
        """Hand on a block of which every line is a row or blank."""
        plain = block
        if b"\r" in plain:
            plain = plain.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        data = np.frombuffer(plain, np.uint8)
        ends = np.flatnonzero(data == 10)
        blank = int(np.count_nonzero(np.diff(ends, prepend=-1) == 1))
        lines = ends.size + (not plain.endswith(b"\n"))
        self.count.lines += lines
        self.count.blank += blank
        self._row += lines - blank
        self._ready += block

    def _check_lines(self, lines: Sequence[bytes]) -> None:
        todo = list(reversed(lines))
        while todo:
            line = todo.pop()
            if not self._pending and not line.rstrip(b"\r\n"):
                self.count.lines += 1
                self.count.blank += 1
                continue
            if reason := _not_text(line):
                if self._pending:
                    todo += [line, *reversed(self._give_up("its quote is never closed"))]
                    continue
                self._bad(reason)
                continue
            state = self._scan.line(line.rstrip(b"\r\n"), bool(self._pending))
            if state == "closed" and not self._pending:
                self._good([line])
                continue
            self._pending.append(line)
            if state == "open" and len(self._pending) <= _MOST_LINES:
                continue
            if state == "open":
                reason = f"its quote is not closed within {_MOST_LINES} lines"
            elif state == "text after quote":
                reason = "text follows the quote that ends a field over several lines"
            elif self._swallowed():
                reason = "a quote spans lines that are rows themselves"
            else:
                self._good(self._pending)
                self._pending = []
                continue
            todo += reversed(self._give_up(reason))

    def _swallowed(self) -> bool:
        """Whether each line of the pending row is a row by itself, quotes aside."""
        if self._numeric is None:
            return False
        for line in self._pending:
            fields = line.rstrip(b"\r\n").split(self._delimiter)
            if len(fields) != self._width:
                return False
            if not all(_NUMERIC.match(fields[k]) or not fields[k].strip() for k in self._numeric):
                return False
        return True

    def _give_up(self, reason: str) -> list[bytes]:
        """Refuse or drop the first pending line; the others are to be checked again."""
        others, self._pending = self._pending[1:], []
        self._bad(f"{reason}; if quotes are plain text here, add --quote=none")
        return others

    def _bad(self, reason: str) -> None:
        self._row += 1
        self.count.lines += 1
        message = f"{self.count.where}, line {self.count.lines}: {reason}"
        if not self._drop:
            raise InputError(f"{message}; --bad_rows=drop leaves out rows that cannot be used")
        self.count.drop(message)
        self.dropped.append(self._row)

    def _good(self, lines: list[bytes]) -> None:
        self._row += 1
        if len(lines) > 1 and not self.count.continued:
            self.count.first_continued = self.count.lines + 1
        self.count.lines += len(lines)
        self.count.continued += len(lines) - 1
        self._ready += b"".join(lines)


def _not_text(line: bytes) -> str:
    """Why a line is no UTF-8 text; empty if it is."""
    if b"\0" in line:
        return "it holds a NUL byte; is the file of another --source?"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"byte 0x{line[error.start]:02x} at place {error.start + 1} is not UTF-8; state the "
            "encoding of the file, as --encoding=cp1252"
        )
    return ""


class _Scan:
    """Whether a line ends inside a quoted field, as Arrow reads it.

    A quote opens a field only at its start. After the closing one, text up to the delimiter is
    taken as it is.
    """

    def __init__(self, dialect: Dialect) -> None:
        quote, delimiter, escape = (
            re.escape(c.encode()) for c in (dialect.quote, dialect.delimiter, dialect.escape)
        )
        escaped = b"|" + escape + b"." if escape else b""
        inside = b"(?:[^" + quote + escape + b"]++|" + quote * 2 + escaped + b")*+"
        outside = b"(?:[^" + delimiter + escape + b"]++" + escaped + b")*+"
        self._inside = re.compile(inside, re.DOTALL) if quote else None
        self._outside = re.compile(outside, re.DOTALL)
        self._quote, self._delimiter = dialect.quote.encode(), dialect.delimiter.encode()

    def line(self, line: bytes, is_open: bool) -> str:
        """`closed`, `open` or `text after quote`; the last only for a field over several lines."""
        position = 0
        if is_open:
            position = self._closing(line, 0)
            if position >= len(line):
                return "open"
            position += 1
            if position < len(line) and line[position : position + 1] != self._delimiter:
                return "text after quote"
            if position == len(line):
                return "closed"
            position += 1

        while True:
            if self._quote and line[position : position + 1] == self._quote:
                position = self._closing(line, position + 1)
                if position >= len(line):
                    return "open"
                position += 1
            position = _end(self._outside, line, position)
            if position >= len(line) or line[position : position + 1] != self._delimiter:
                return "closed"  # or an escape before the line end: `LineCount.check` tells
            position += 1

    def _closing(self, line: bytes, position: int) -> int:
        """The position of the quote that closes a field; the line's length if none does."""
        assert self._inside is not None
        position = _end(self._inside, line, position)
        return position if line[position : position + 1] == self._quote else len(line)


def _end(pattern: re.Pattern[bytes], line: bytes, position: int) -> int:
    match = pattern.match(line, position)
    assert match is not None  # the patterns match the empty text
    return match.end()
