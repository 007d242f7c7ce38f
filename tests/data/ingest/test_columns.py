"""Columns of any type to id codes, microseconds and ratings: values, units and bad rows."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from slgr_jax.data.ingest import columns, times
from slgr_jax.errors import InputError


def chunked(values: list[object], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """A column in two chunks, as large files have."""
    whole, middle = pa.array(values, kind), len(values) // 2
    return pa.chunked_array([whole[:middle], whole[middle:]], whole.type)


def test_ids_sort_by_code_point_and_keep_every_character() -> None:
    # Code points, not UTF-16 units: U+FF5E sorts before U+1F600. Case and spaces count.
    values = ["b", "B", " b", "b ", "007", "7", "é", "\uff5e", "\U0001f600", "a\nb"]
    (codes,), ids = columns.encode_ids([chunked([*values, "7"], pa.string())], ["x"])
    assert ids.to_pylist() == sorted(values)
    assert [ids[int(code)].as_py() for code in codes] == [*values, "7"]


def test_ids_of_many_types_meet_as_text() -> None:
    parts = [
        chunked([10, 9, 10], pa.int64()),
        chunked(["10", "x"], pa.large_string()),
        chunked(["9", "9"], pa.string()).dictionary_encode(),
        chunked([2**64 - 1], pa.uint64()),
        chunked([b"x", b"y"], pa.binary()),
    ]
    codes, ids = columns.encode_ids(parts, ["x"] * 5)
    assert ids.to_pylist() == ["10", "18446744073709551615", "9", "x", "y"]
    assert [c.tolist() for c in codes] == [[0, 2, 0], [0, 3], [2, 2], [1], [3, 4]]


def test_unused_dictionary_entries_are_no_ids() -> None:
    column = pa.chunked_array([pa.DictionaryArray.from_arrays([2, 2], ["a", "b", "c"])])
    (codes,), ids = columns.encode_ids([column], ["x"])
    assert (codes.tolist(), ids.to_pylist()) == ([0, 0], ["c"])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (chunked(["a", "b", None, None], pa.string()), "f: column u, row 3: the id is missing"),
        (chunked(["a", "b", "c", ""], pa.string()), "f: column u, row 4: the id is empty"),
        (chunked([1.0, 2.0]), "has type double; ids must be text or integers"),
        (chunked([b"\xff\xfe"], pa.binary()), "not UTF-8"),
    ],
)
def test_bad_ids(column: pa.ChunkedArray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        columns.encode_ids([column], ["f: column u"])


SECONDS = [1_500_000_000, 1_500_000_001, 1_600_000_000, 978_300_760]
MICROS = [s * 10**6 for s in SECONDS]


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.float64()])
def test_units_are_found(unit: str, scale: int, kind: pa.DataType) -> None:
    column = chunked([s * scale for s in SECONDS], pa.int64()).cast(kind, safe=False)
    found, name = times.to_microseconds(column, "t")
    assert (found.tolist(), name) == (MICROS, unit)


def test_fractions_of_seconds_and_spaces_in_text() -> None:
    found, unit = times.to_microseconds(chunked([" 1500000000.25", "1500000001 "]), "t")
    assert (found.tolist(), unit) == ([1_500_000_000_250_000, 1_500_000_001_000_000], "s")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Paris"])
def test_arrow_timestamps(unit: str, zone: str | None) -> None:
    column = chunked(SECONDS, pa.int64()).cast(pa.timestamp("s", tz=zone))
    found, name = times.to_microseconds(column.cast(pa.timestamp(unit, tz=zone)), "t")
    assert (found.tolist(), name) == (MICROS, f"Arrow {unit}")


def test_dates_and_iso_text() -> None:
    day = datetime.date(2020, 2, 29)
    midnight = 1_582_934_400 * 10**6
    for kind in (pa.date32(), pa.date64()):
        assert times.to_microseconds(chunked([day], kind), "t")[0].tolist() == [midnight]
    plain = chunked(["2020-02-29", "2020-02-29T01:00:00", "2020-02-29 00:00:00.000001999"])
    expected = [midnight, midnight + 3600 * 10**6, midnight + 1]
    assert times.to_microseconds(plain, "t")[0].tolist() == expected
    zoned = chunked(["2020-02-29T00:00:00Z", "2020-02-29T02:00:00+02:00"])
    assert times.to_microseconds(zoned, "t") == (pytest.approx([midnight] * 2), "ISO 8601")


def test_positions_are_kept_as_seconds() -> None:
    found, unit = times.to_microseconds(chunked([3, 0, 12]), "t")
    assert (found.tolist(), unit) == ([3_000_000, 0, 12_000_000], "ordinal")


GOOD = 1_500_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([GOOD, GOOD, GOOD * 1000], "row 3: time 1500000000000 is outside 1973 to 2100 in s"),
        ([GOOD * 1000, GOOD, GOOD * 1000], "row 2: time 1500000000 is outside .* in ms"),
        ([GOOD, GOOD, 0], "row 3: time 0 is outside"),
        ([GOOD, -1, GOOD], "row 2: time -1 is outside"),
        ([1, 2, GOOD], "row 3: 1500000000 does not fit the median 2"),
        ([-5, -5, -5], "the median time -5 is between 1973 and 2100 in none"),
        ([5_000_000_000] * 3, "the median time 5000000000 is"),
        ([GOOD, None, GOOD], "row 2: the value is missing"),
        ([1.5e9, float("nan"), 1.5e9], "row 2: the time is nan"),
        (["1500000000", "x", "1500000000"], "row 2: 'x' is not a time"),
        (["1500000000", "1500000000", ""], "row 3: '' is not a time"),
        (["2020-01-01", "2020-01-01", "yesterday"], "row 3: 'yesterday' is not a time"),
        (["2020-01-01", "1969-12-31"], "row 2: -86400000000 us since 1970 is outside"),
        ([True, False], "has type bool; times must be"),
    ],
)
def test_bad_times(values: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        times.to_microseconds(chunked(values), "f: column t")


def test_the_first_bad_row_of_many_is_named() -> None:
    values = [str(GOOD)] * 999
    values[700] = values[900] = "oops"
    with pytest.raises(InputError, match="row 701: 'oops'"):
        times.to_microseconds(chunked(values), "t")


def test_ratings() -> None:
    found = columns.to_ratings(chunked(["3", "4.5", " 1"]), "r")
    assert (found.tolist(), found.dtype) == ([3.0, 4.5, 1.0], np.float32)
    for bad, message in (
        (["3", "good"], "row 2: 'good' is not a rating"),
        ([1.0, float("nan")], "row 2: the rating is nan"),
        ([1.0, float("inf")], "row 2: the rating is inf"),
        ([1, None], "row 2: the value is missing"),
    ):
        with pytest.raises(InputError, match=message):
            columns.to_ratings(chunked(bad), "r")


def test_split_names() -> None:
    names = ["train", "valid", "val", "validation", "dev", "test", "unused", "Test", " train"]
    expected = [0, 1, 1, 1, 1, 2, 3, 2, 0]
    for column in (chunked(names), chunked(names).dictionary_encode()):
        assert columns.to_parts(column, "s").tolist() == expected
    with pytest.raises(InputError, match="holds 'holdout', null; it may hold train, valid"):
        columns.to_parts(chunked(["train", "holdout", None], pa.string()), "s")
