"""Raw columns of any type to the arrays a split works on: id codes, parts, ratings; see `times`.

Every function works on whole Arrow columns; no Python object is made per row, unless a row is
bad. A value that cannot be used goes to the piece's `Sieve`, which refuses it (`InputError`) or
drops its row, with the file, the column, the row and the value; rows count from 1 and leave out
the header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data.ingest.bad_rows import Sieve
from slgr_jax.errors import InputError, listing

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


# --- ids ----------------------------------------------------------------------------------


def encode_ids(
    columns: Sequence[pa.ChunkedArray], labels: Sequence[str], *, ordered: bool = True
) -> tuple[list[np.ndarray], pa.Array]:
    """Replace the ids of several columns by their rank among all distinct ids.

    Args:
      columns: ids, each column text, integer or dictionary-encoded; [n_k] rows.
      labels: what to call each column in an error.
      ordered: False leaves the distinct ids in any order, which is faster.

    Returns:
      Per column [n_k] int32 codes, and the distinct ids as strings in the order of their
      Unicode code points (UTF-8 bytes sort alike): `ids[codes]` is the column.

    Raises:
      InputError: an id is empty or missing, or the type has no exact text (floats).
    """
    encoded = [_dictionary(c, label) for c, label in zip(columns, labels, strict=True)]
    if len(encoded) == 1 and not ordered:
        ((codes, ids),) = encoded
        return [codes], ids
    ids = pc.unique(pa.chunked_array([values for _, values in encoded], pa.string()))
    if ordered:
        ids = ids.take(pc.sort_indices(ids))
    out = []
    for codes, values in encoded:
        rank = pc.index_in(values, value_set=ids).to_numpy().astype(np.int32)
        out.append(rank[codes])
    return out, ids


def check_ids(column: pa.ChunkedArray, label: str, sieve: Sieve) -> None:
    """Reject the rows whose id is missing or empty.

    Raises:
      InputError: the type has no exact text (floats, lists); or the sieve refuses.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _has_exact_text(kind):
        raise InputError(
            f"{label} has type {kind}; ids must be text or integers: cast the column first, as "
            "astype('int64') in pandas"
        )
    _reject_nulls(column, label, sieve, "the id is missing")
    if not pa.types.is_integer(kind) and _may_be_empty(column):
        values = decoded(column)
        if pa.types.is_string_view(kind):
            values = values.cast(pa.large_string())
        empty = pc.fill_null(pc.equal(pc.binary_length(values), 0), False)
        sieve.reject(_mask(empty), label, lambda row: "the id is empty")


def _may_be_empty(column: pa.ChunkedArray) -> bool:
    """False where no row can hold an empty text: none of its dictionaries has one."""
    kind = column.type
    if not pa.types.is_dictionary(kind) or pa.types.is_string_view(kind.value_type):
        return True
    return any(
        pc.any(pc.equal(pc.binary_length(chunk.dictionary), 0)).as_py() for chunk in column.chunks
    )


def _dictionary(column: pa.ChunkedArray, label: str) -> tuple[np.ndarray, pa.Array]:
    check_ids(column, label, Sieve(len(column)))
    if len(column) == 0:
        return np.zeros(0, np.int32), pa.array([], pa.string())
    if not pa.types.is_dictionary(column.type):
        if pa.types.is_string_view(column.type):  # has no dictionaries
            column = column.cast(pa.large_string())
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # more than one chunk only past 2^31 bytes
        raise InputError(f"{label} holds too many distinct ids for one table")
    try:
        values = array.dictionary.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise InputError(f"{label} holds ids that are not UTF-8 text") from error
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


# --- numbers ------------------------------------------------------------------------------


def to_ratings(
    column: pa.ChunkedArray, label: str, sieve: Sieve | None = None, *, decimal: str = "."
) -> np.ndarray:
    """[n] float32 ratings; missing, infinite and unreadable ones are bad rows, with 0 there.

    Args:
      decimal: the character before the fraction, where ratings are text.
    """
    sieve = sieve or Sieve(len(column))
    values = numbers(column, pa.float64(), label, "a rating", sieve, decimal=decimal)
    if values is None:
        raise InputError(f"{label} has type {column.type}; ratings must be numbers")
    # Also what is finite in float64 alone, and would be stored as infinite.
    largest = np.finfo(np.float32).max
    finite = np.isfinite(values) & (np.abs(values) <= largest)

    def reason(row: int) -> str:
        return f"the rating is {values[row]}; ratings must be finite"

    sieve.reject(~finite, label, reason)
    return np.where(finite, values, 0).astype(np.float32)


def numbers(
    column: pa.ChunkedArray,
    kind: pa.DataType,
    label: str,
    noun: str,
    sieve: Sieve,
    *,
    decimal: str = ".",
) -> np.ndarray | None:
    """The column as numpy numbers of `kind` (floats stay floats); None if it is no number.

    Text is tried as `kind`; with int64, None where not all of it is. Rejected rows hold 0.
    """
    column = decoded(column)
    stored = column.type
    if pa.types.is_integer(stored) or pa.types.is_floating(stored):
        reject_missing(column, label, sieve)
        wide = pa.float64() if pa.types.is_floating(stored) else kind
        try:
            return pc.fill_null(column.cast(wide), 0).to_numpy()
        except pa.ArrowInvalid as error:  # an integer that float64 or int64 cannot hold
            raise InputError(f"{label} holds a number too large to use: {error}") from error
    if pa.types.is_decimal(stored):
        reject_missing(column, label, sieve)
        return pc.fill_null(column.cast(pa.float64()), 0).to_numpy()
    if not is_text(stored):
        return None

    reject_missing(column, label, sieve)
    text = column.cast(pa.large_string()) if pa.types.is_string_view(stored) else column
    if text.null_count:
        text = pc.fill_null(text, "0")
    if decimal != ".":
        text = pc.replace_substring(text, pattern=decimal, replacement=".")
    try:
        return text.cast(kind).to_numpy()
    except pa.ArrowInvalid:
        if kind != pa.float64():
            return None
    text = pc.utf8_trim_whitespace(text)
    bad = failures(text, kind)

    def reason(row: int) -> str:
        comma = decimal == "." and re.fullmatch(r"-?\d+,\d+", text[row].as_py())
        hint = "; a comma before the fraction needs --decimal=," if comma else ""
        return f"{quoted(column[row])} is not {noun}{hint}"

    sieve.reject(bad, label, reason)
    return pc.if_else(pa.array(bad), "0", text).cast(kind).to_numpy()


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a dictionary-encoded column, or the column itself."""
    kind = column.type
    return column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is Unicode text."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is lists of any length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def fails(text: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether some text does not parse as `kind`."""
    try:
        text.cast(kind)
    except pa.ArrowInvalid:
        return True
    return False


def failures(text: pa.ChunkedArray, kind: pa.DataType) -> np.ndarray:
    """[n] bool: which texts do not parse as `kind`; one attempt a distinct text. Nulls do."""
    if not fails(text, kind):
        return np.zeros(len(text), bool)
    array = text.dictionary_encode().unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    values = array.dictionary
    # The last place is that of a null.
    bad = np.array([fails(values.slice(k, 1), kind) for k in range(len(values))] + [False], bool)
    return bad[pc.fill_null(array.indices, -1).to_numpy()]


def quoted(scalar: pa.Scalar) -> str:
    """A value for a message, cut where it is long."""
    value = str(scalar.as_py())
    return repr(value if len(value) <= 60 else value[:57] + "...")


def reject_missing(column: pa.ChunkedArray, label: str, sieve: Sieve) -> None:
    """Reject the rows without a value."""
    reason = "the value is missing; fill it, or name no column (--time_column=, say)"
    _reject_nulls(column, label, sieve, reason)


def _reject_nulls(column: pa.ChunkedArray, label: str, sieve: Sieve, reason: str) -> None:
    # A dictionary may hold null as one of its values: that is a null too.
    is_dictionary = pa.types.is_dictionary(column.type)
    hidden = is_dictionary and any(chunk.dictionary.null_count for chunk in column.chunks)
    if column.null_count or hidden:
        sieve.reject(_mask(decoded(column).is_null()), label, lambda row: reason)


def _mask(values: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(values.to_numpy(), bool)


# --- parts of a pre-made split ------------------------------------------------------------


def to_parts(column: pa.ChunkedArray, label: str, sieve: Sieve | None = None) -> np.ndarray:
    """[n] int8: 0 train, 1 valid, 2 test, 3 unused, from the names in `SPLIT_NAMES`.

    Raises:
      InputError: no text; or another value or a missing one, where the sieve refuses: the
        values found are listed.
    """
    column = decoded(column)
    sieve = sieve or Sieve(len(column))
    if not is_text(column.type):
        raise InputError(f"{label} has type {column.type}; it must be text: {listing(SPLIT_NAMES)}")
    array = column.cast(pa.string()).dictionary_encode().unify_dictionaries().combine_chunks()
    names = array.dictionary.to_pylist()
    wrong = [repr(name) for name in names if name.strip().lower() not in SPLIT_NAMES]
    if array.indices.null_count:
        wrong.append("null")
    if wrong and not sieve.drops:
        raise InputError(f"{label} holds {listing(wrong)}; it may hold {listing(SPLIT_NAMES)}")

    # Of a value that is no name, and of none, -1: the last place of `codes`.
    codes = np.array([SPLIT_NAMES.get(name.strip().lower(), -1) for name in names] + [-1], np.int8)
    parts = codes[pc.fill_null(array.indices, -1).to_numpy()]
    sieve.reject(parts < 0, label, lambda row: f"{quoted(column[row])} is no part of a split")
    return np.where(parts < 0, UNUSED, parts).astype(np.int8)
