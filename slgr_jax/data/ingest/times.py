"""Times in any unit or notation to microseconds since 1970-01-01 UTC."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data.ingest import columns
from slgr_jax.data.ingest.bad_rows import Sieve
from slgr_jax.errors import InputError, listing

# Per unit: how many make one second.
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Times of events are expected between these (seconds since 1970, UTC): 1973-03-03, 2100-01-01.
# The bounds are less than a factor 1000 apart, so a number fits one unit at most.
_EARLIEST, _LATEST = 100_000_000, 4_102_444_800
# Numbers below _EARLIEST are no recent times: positions in an order, kept as seconds.
ORDINAL = "ordinal"
# ns keeps every digit that ISO text may carry; without a zone in the text, and with one.
_ISO_KINDS = (pa.timestamp("ns"), pa.timestamp("ns", tz="UTC"))
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
# The first rows by which it is decided whether text holds numbers, and which format would fit.
_LOOKED_AT = 100
_FORMATS = (
    "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S",
    "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d-%m-%Y",
    "%Y/%m/%d", "%Y/%m/%d %H:%M:%S", "%a %b %d %H:%M:%S %z %Y", "%b %d, %Y", "%B %d, %Y",
    "%d %b %Y", "%d-%b-%Y", "%d %B %Y", "%m %d, %Y", "%m/%d/%Y %I:%M %p", "%Y-%m-%d %H:%M",
)  # fmt: skip


def to_microseconds(
    column: pa.ChunkedArray,
    label: str,
    sieve: Sieve | None = None,
    *,
    time_format: str = "",
    decimal: str = ".",
    unit: str | None = None,
) -> tuple[np.ndarray, str]:
    """[n] int64 microseconds since 1970-01-01 UTC, and the unit that was found.

    Arrow timestamps and dates are taken as they are, those without a zone as UTC. Numbers
    (also as text) are s, ms, us or ns: the one unit that puts the median between 1973 and
    2100, after which every value must lie there. If the median is below 1973 in every unit
    the numbers are positions in an order ("ordinal") and count as seconds. Other text is
    read as ISO 8601, or by `time_format` (as Python's `strptime`).

    Args:
      unit: of the rows before these; numbers are taken to be of it, whatever their median.

    Raises:
      InputError: times of a type that has none; or one is missing, unreadable, or of another
        unit than the median, where the sieve refuses. Rejected rows hold 0.
    """
    column = columns.decoded(column)
    sieve = sieve or Sieve(len(column))
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        columns.reject_missing(column, label, sieve)
        stored = kind.unit if pa.types.is_timestamp(kind) else "days"
        return _dated(column, kind, label, sieve), f"Arrow {stored}"
    if time_format and (pa.types.is_integer(kind) or columns.is_text(kind)):
        columns.reject_missing(column, label, sieve)
        return _formatted(column.cast(pa.large_string()), label, sieve, time_format), time_format

    numbers = columns.numbers(column, pa.int64(), label, "a time", sieve, decimal=decimal)
    if numbers is None and columns.is_text(kind):
        text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        if not _mostly_numbers(text, decimal):
            return _from_iso(text, label, sieve), "ISO 8601"
        numbers = columns.numbers(text, pa.float64(), label, "a time", sieve, decimal=decimal)
    if numbers is None:
        raise InputError(f"{label} has type {kind}; times must be numbers, dates or text")
    return _scaled(numbers, label, sieve, unit)


def _mostly_numbers(text: pa.ChunkedArray, decimal: str) -> bool:
    """Whether more of the first texts are numbers than dates; in doubt, numbers."""
    values = [value for value in text.slice(0, _LOOKED_AT).to_pylist() if value]
    as_numbers = [value.replace(decimal, ".") for value in values]
    n_numbers = sum(not columns.fails(pa.array([value]), pa.float64()) for value in as_numbers)
    n_dates = sum(
        not all(columns.fails(pa.array([value]), kind) for kind in _ISO_KINDS) for value in values
    )
    return n_numbers > 0 and n_numbers >= n_dates


# --- text ---------------------------------------------------------------------------------


def _formatted(text: pa.ChunkedArray, label: str, sieve: Sieve, time_format: str) -> np.ndarray:
    """Each distinct text by `strptime`."""
    array = text.dictionary_encode().unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    values = array.dictionary.to_pylist()
    # The last place is that of a missing text.
    micros = np.zeros(len(values) + 1, np.int64)
    bad = np.zeros(len(values) + 1, bool)
    for place, value in enumerate(values):
        try:
            micros[place] = _parsed(value, time_format)
        except (ValueError, OverflowError):
            bad[place] = True
    codes = pc.fill_null(array.indices, -1).to_numpy()

    def reason(row: int) -> str:
        return (
            f"{columns.quoted(text[row])} is not a time as --time_format={time_format!r}"
            f"{_hint([text[row].as_py()])}"
        )

    sieve.reject(bad[codes], label, reason)
    return _in_range(micros[codes], label, sieve)


def _parsed(text: str, time_format: str) -> int:
    moment = datetime.datetime.strptime(text.strip(), time_format)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)


def _hint(texts: Iterable[str]) -> str:
    """The formats that fit all of some texts, as advice."""

    def fits(time_format: str) -> bool:
        try:
            return all(_parsed(text, time_format) is not None for text in texts)
        except (ValueError, OverflowError):
            return False

    fitting = [f"--time_format='{time_format}'" for time_format in _FORMATS if fits(time_format)]
    return f"; it reads as {' or '.join(fitting)}" if fitting else ""


def _from_iso(text: pa.ChunkedArray, label: str, sieve: Sieve) -> np.ndarray:
    columns.reject_missing(text, label, sieve)
    for kind in _ISO_KINDS:
        if not columns.fails(text, kind):
            return _dated(text.cast(kind), kind, label, sieve)
    readings = [(columns.failures(text, kind), kind) for kind in _ISO_KINDS]
    if sieve.drops:  # the kind of most rows
        bad, kind = min(readings, key=lambda reading: int(reading[0].sum()))
    else:  # the kind that reads furthest
        bad, kind = max(readings, key=lambda reading: int(np.argmax(reading[0])))
    examples = [value for value in text.slice(0, _LOOKED_AT).to_pylist() if value]

    def reason(row: int) -> str:
        return (
            f"{columns.quoted(text[row])} is not a time like those before it; use numbers (s, ms, "
            "us, ns) or ISO 8601 dates, all with a zone or all without, or state --time_format"
            f"{_hint(examples)}"
        )

    sieve.reject(bad, label, reason)
    readable = pc.if_else(pa.array(bad), pa.scalar(None, text.type), text)
    return _dated(readable.cast(kind), kind, label, sieve)


# --- numbers and dates --------------------------------------------------------------------


def _dated(column: pa.ChunkedArray, kind: pa.DataType, label: str, sieve: Sieve) -> np.ndarray:
    """Microseconds of an Arrow time or date column; finer digits are cut off."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        micros = pc.fill_null(column.cast(pa.int64()), 0).to_numpy() // 1000
    else:
        try:
            stamps = column.cast(pa.timestamp("us", tz=getattr(kind, "tz", None)))
        except pa.ArrowInvalid as error:
            raise InputError(f"{label} holds a date out of range: {error}") from error
        micros = pc.fill_null(stamps.cast(pa.int64()), 0).to_numpy()
    return _in_range(micros, label, sieve)


def _in_range(micros: np.ndarray, label: str, sieve: Sieve) -> np.ndarray:
    bad = (micros < 0) | (micros > _LATEST * 10**6)
    sieve.reject(bad, label, lambda row: f"{micros[row]} us since 1970 is outside 1970 to 2100")
    return np.where(bad, 0, micros)


def _scaled(
    values: np.ndarray, label: str, sieve: Sieve, unit: str | None
) -> tuple[np.ndarray, str]:
    if values.dtype.kind == "f":
        sieve.reject(~np.isfinite(values), label, lambda row: f"the time is {values[row]}")
    usable = values[sieve.keep]
    if usable.size == 0:
        return np.zeros(values.size, np.int64), unit or ORDINAL
    decider = "that of the rows before it"
    if unit not in (ORDINAL, *_UNITS):
        with np.errstate(over="ignore"):  # two huge numbers in the middle: no unit fits
            median = float(np.median(usable))
        unit = _unit_of(median, label)
        decider = f"the unit of the median {median:.16g}"
    if unit == ORDINAL:
        bad = ~((values >= 0) & (values < _EARLIEST))

        def misplaced(row: int) -> str:
            of = decider.removeprefix("the unit of ")
            return f"{values[row]} does not fit {of}, a position in an order"

        sieve.reject(bad, label, misplaced)
        return np.rint(np.where(bad, 0, values) * 10**6).astype(np.int64), ORDINAL

    scale = _UNITS[unit]
    bad = ~((values >= _EARLIEST * scale) & (values <= _LATEST * scale))
    sieve.reject(
        bad, label, lambda row: f"time {values[row]} is outside 1973 to 2100 in {unit}, {decider}"
    )
    return _to_us(np.where(bad, 0, values), scale), unit


def _unit_of(median: float, label: str) -> str:
    """The unit in which a median lies between 1973 and 2100; `ORDINAL` of one below all."""
    if 0 <= median < _EARLIEST:
        return ORDINAL
    for unit, scale in _UNITS.items():
        if _EARLIEST * scale <= median <= _LATEST * scale:
            return unit
    raise InputError(
        f"{label}: the median time {median:.16g} is between 1973 and 2100 in none of "
        f"{listing(_UNITS)}; if it is a date, state its --time_format, as %Y%m%d"
    )


def _to_us(values: np.ndarray, scale: int) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.rint(values * (10**6 / scale)).astype(np.int64)
    return values * (10**6 // scale) if scale <= 10**6 else values // (scale // 10**6)
