"""Raw columns of any type to the arrays a split works on: id codes, microseconds, ratings.

Every function works on whole Arrow columns; no Python object is made per row. A value that
cannot be used is an `InputError` that names the file, the column, the row and the value; rows
count from 1 and leave out the header.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.errors import InputError, listing

# Per unit: how many make one second.
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Times of events are expected between these (seconds since 1970, UTC): 1973-03-03, 2100-01-01.
# The bounds are less than a factor 1000 apart, so a number fits one unit at most.
_EARLIEST, _LATEST = 100_000_000, 4_102_444_800
# Numbers below _EARLIEST are no recent times: positions in an order, kept as seconds.
ORDINAL = "ordinal"
SPLIT_NAMES = {
    "train": 0,
    "valid": 1,
    "val": 1,
    "validation": 1,
    "dev": 1,
    "test": 2,
    "unused": 3,
}
UNUSED = 3


def encode_ids(
    columns: Sequence[pa.ChunkedArray], labels: Sequence[str]
) -> tuple[list[np.ndarray], pa.Array]:
    """Replace the ids of several columns by their rank among all distinct ids.

    Args:
      columns: ids, each column text, integer or dictionary-encoded; [n_k] rows.
      labels: what to call each column in an error.

    Returns:
      Per column [n_k] int32 codes, and the distinct ids as strings in the order of their
      Unicode code points (UTF-8 bytes sort alike): `ids[codes]` is the column.

    Raises:
      InputError: an id is empty or missing, or the type has no exact text (floats).
    """
    encoded = [_dictionary(c, label) for c, label in zip(columns, labels, strict=True)]
    union = pc.unique(pa.chunked_array([values for _, values in encoded], pa.string()))
    ids = union.take(pc.sort_indices(union))
    out = []
    for codes, values in encoded:
        rank = pc.index_in(values, value_set=ids).to_numpy().astype(np.int32)
        out.append(rank[codes])
    return out, ids


def _dictionary(column: pa.ChunkedArray, label: str) -> tuple[np.ndarray, pa.Array]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _has_exact_text(kind):
        raise InputError(f"{label} has type {kind}; ids must be text or integers: cast it first")
    if len(column) == 0:
        return np.zeros(0, np.int32), pa.array([], pa.string())
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # more than one chunk only past 2^31 bytes
        raise InputError(f"{label} holds too many distinct ids for one table")
    try:
        values = array.dictionary.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise InputError(f"{label} holds ids that are not UTF-8 text") from error
    _reject_rows(array.indices.is_null(), label, "the id is missing")
    empty = pc.fill_null(pc.equal(values, ""), True)
    if pc.any(empty).as_py():
        _reject_rows(empty.take(array.indices), label, "the id is empty")
    codes = array.indices.cast(pa.int32()).to_numpy()
    used = np.bincount(codes, minlength=len(values)) > 0
    if not used.all():
        codes = (np.cumsum(used, dtype=np.int32) - 1)[codes]
        values = values.filter(pa.array(used))
    return codes, values


def _has_exact_text(kind: pa.DataType) -> bool:
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_integer,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(check(kind) for check in checks)


def _reject_rows(bad: pa.Array, label: str, reason: str) -> None:
    mask = np.asarray(bad.to_numpy(zero_copy_only=False), bool)
    if mask.any():
        first, count = int(np.argmax(mask)) + 1, int(mask.sum())
        raise InputError(f"{label}, row {first}: {reason} ({count} such rows in {mask.size})")


def to_ratings(column: pa.ChunkedArray, label: str) -> np.ndarray:
    """[n] float32 ratings; a missing, infinite or unreadable one is an `InputError`."""
    values = _numbers(column, pa.float64(), label, "a rating")
    if values is None:
        raise InputError(f"{label} has type {column.type}; ratings must be numbers")
    _check_all(np.isfinite(values), values, label, "the rating is {}; ratings must be finite")
    return values.astype(np.float32)


def to_microseconds(column: pa.ChunkedArray, label: str) -> tuple[np.ndarray, str]:
    """[n] int64 microseconds since 1970-01-01 UTC, and the unit that was found.

    Arrow timestamps and dates are taken as they are, those without a zone as UTC. Numbers
    (also as text) are s, ms, us or ns: the one unit that puts the median between 1973 and
    2100, after which every value must lie there. If the median is below 1973 in every unit
    the numbers are positions in an order ("ordinal") and count as seconds. Other text is
    read as ISO 8601.

    Raises:
      InputError: a time is missing, unreadable, or of another unit than the median.
    """
    column = _decoded(column)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        _reject_nulls(column, label)
        unit = kind.unit if pa.types.is_timestamp(kind) else "days"
        return _dated(column, kind, label), f"Arrow {unit}"
    numbers = _numbers(column, pa.int64(), label, "a time")
    if numbers is None and _is_text(kind):
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        numbers = _numbers(text, pa.float64(), label, "a time") if _first_is_number(text) else None
        if numbers is None:
            return _from_iso(text, label), "ISO 8601"
    if numbers is None:
        raise InputError(f"{label} has type {kind}; times must be numbers, dates or text")
    return _scaled(numbers, label)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    return column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _reject_nulls(column: pa.ChunkedArray, label: str) -> None:
    if column.null_count:
        mask = column.is_null().combine_chunks()
        reason = "the value is missing; fill it, or name no column (--time_column=, say)"
        _reject_rows(mask, label, reason)


def _check_all(good: np.ndarray, values: np.ndarray, label: str, reason: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{label}, row {row + 1}: {reason.format(values[row])}")


def _numbers(
    column: pa.ChunkedArray, kind: pa.DataType, label: str, noun: str
) -> np.ndarray | None:
    """The column as numpy numbers of `kind` (floats stay floats); None if it is no number.

    Text is tried as `kind`; with float64 the first text that is not a number is an error.
    """
    column = _decoded(column)
    found = column.type
    if pa.types.is_integer(found) or pa.types.is_floating(found):
        _reject_nulls(column, label)
        wide = pa.float64() if pa.types.is_floating(found) else kind
        try:
            return column.cast(wide).to_numpy()
        except pa.ArrowInvalid as error:  # an integer that float64 or int64 cannot hold
            raise InputError(f"{label} holds a number too large to use: {error}") from error
    if pa.types.is_decimal(found):
        _reject_nulls(column, label)
        return column.cast(pa.float64()).to_numpy()
    if not _is_text(found):
        return None
    _reject_nulls(column, label)
    text = column.cast(pa.string())
    try:
        return text.cast(kind).to_numpy()
    except pa.ArrowInvalid:
        if kind != pa.float64():
            return None
    text = pc.utf8_trim_whitespace(text)
    row = _first_failure(text, kind)
    if row is not None:
        raise InputError(f"{label}, row {row + 1}: {_quoted(text[row])} is not {noun}")
    return text.cast(kind).to_numpy()


def _first_is_number(text: pa.ChunkedArray) -> bool:
    return len(text) > 0 and not _fails(text.slice(0, 1), pa.float64())


def _fails(text: pa.ChunkedArray, kind: pa.DataType) -> bool:
    try:
        text.cast(kind)
    except pa.ArrowInvalid:
        return True
    return False


def _first_failure(text: pa.ChunkedArray, kind: pa.DataType) -> int | None:
    """Index of the first text that does not parse as `kind`, by bisection; None if all do."""
    if not _fails(text, kind):
        return None
    low, high = 0, len(text)  # text[:low] parses, text[low:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if _fails(text.slice(low, middle - low), kind):
            high = middle
        else:
            low = middle
    return low


def _quoted(scalar: pa.Scalar) -> str:
    value = str(scalar.as_py())
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _from_iso(text: pa.ChunkedArray, label: str) -> np.ndarray:
    # ns keeps every digit that ISO text may carry; with a zone in the text, then without.
    kinds = (pa.timestamp("ns"), pa.timestamp("ns", tz="UTC"))
    for kind in kinds:
        if not _fails(text, kind):
            return _dated(text.cast(kind), kind, label)
    row = max(_first_failure(text, kind) or 0 for kind in kinds)
    raise InputError(
        f"{label}, row {row + 1}: {_quoted(text[row])} is not a time like those before it; use "
        "numbers (s, ms, us, ns) or ISO 8601 dates, all with a zone or all without"
    )


def _dated(column: pa.ChunkedArray, kind: pa.DataType, label: str) -> np.ndarray:
    """Microseconds of an Arrow time or date column; finer digits are cut off."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        micros = column.cast(pa.int64()).to_numpy() // 1000
    else:
        try:
            micros = column.cast(pa.timestamp("us", tz=getattr(kind, "tz", None)))
        except pa.ArrowInvalid as error:
            raise InputError(f"{label} holds a date out of range: {error}") from error
        micros = micros.cast(pa.int64()).to_numpy()
    good = (micros >= 0) & (micros <= _LATEST * 10**6)
    _check_all(good, micros, label, "{} us since 1970 is outside 1970 to 2100")
    return micros


def _scaled(values: np.ndarray, label: str) -> tuple[np.ndarray, str]:
    if values.size == 0:
        return values.astype(np.int64), ORDINAL
    if values.dtype.kind == "f":
        _check_all(np.isfinite(values), values, label, "the time is {}")
    median = float(np.median(values))
    if 0 <= median < _EARLIEST:
        good = (values >= 0) & (values < _EARLIEST)
        reason = f"{{}} does not fit the median {median:.16g}, a position in an order"
        _check_all(good, values, label, reason)
        return np.rint(values * 10**6).astype(np.int64), ORDINAL
    for unit, scale in _UNITS.items():
        if _EARLIEST * scale <= median <= _LATEST * scale:
            good = (values >= _EARLIEST * scale) & (values <= _LATEST * scale)
            reason = (
                f"time {{}} is outside 1973 to 2100 in {unit}, the unit of the median {median:.16g}"
            )
            _check_all(good, values, label, reason)
            return _to_us(values, scale), unit
    raise InputError(
        f"{label}: the median time {median:.16g} is between 1973 and 2100 in none of "
        f"{listing(_UNITS)}"
    )


def _to_us(values: np.ndarray, scale: int) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.rint(values * (10**6 / scale)).astype(np.int64)
    return values * (10**6 // scale) if scale <= 10**6 else values // (scale // 10**6)


def to_parts(column: pa.ChunkedArray, label: str) -> np.ndarray:
    """[n] int8: 0 train, 1 valid, 2 test, 3 unused, from the names in `SPLIT_NAMES`.

    Raises:
      InputError: another value, or a missing one; the values found are listed.
    """
    column = _decoded(column)
    if not _is_text(column.type):
        raise InputError(f"{label} has type {column.type}; it must be text: {listing(SPLIT_NAMES)}")
    array = column.cast(pa.string()).dictionary_encode().unify_dictionaries().combine_chunks()
    names = array.dictionary.to_pylist()
    wrong = [repr(name) for name in names if name.strip().lower() not in SPLIT_NAMES]
    if array.indices.null_count:
        wrong.append("null")
    if wrong:
        raise InputError(f"{label} holds {listing(wrong)}; it may hold {listing(SPLIT_NAMES)}")
    codes = np.array([SPLIT_NAMES[name.strip().lower()] for name in names], np.int8)
    return codes[array.indices.to_numpy()]
