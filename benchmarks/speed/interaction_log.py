"""A log of interactions of any length as a Parquet or CSV file, written in row groups.

    interaction_log.write(path, interaction_log.SIZES["20m"])

The rows are in the order of time, as those of an event log are. A user is drawn by a power of a
uniform number, so that a few are very active, an item with weight 1 / (rank + 20); ids are text, in
no order of activity or popularity. A pair may occur twice. Only a row group is in memory.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

GROUP = 1 << 20  # rows written at once
_START, _SPAN = 1_500_000_000, 200_000_000  # seconds: 2017 to 2023
_SKEW = 1.5  # user = users * uniform ** _SKEW
_HEAD = 20.0


@dataclasses.dataclass(frozen=True)
class Size:
    """How many users and items there are to draw from, and how many rows are drawn."""

    users: int
    items: int
    rows: int
    seed: int = 11


SIZES = {
    "200k": Size(10_000, 1_000, 200_000),
    "2m": Size(100_000, 10_000, 2_000_000),
    "20m": Size(1_000_000, 100_000, 20_000_000),
    "200m": Size(10_000_000, 1_000_000, 200_000_000),
}


def write(path: pathlib.Path, size: Size) -> None:
    """Write the log of `size`; the ending of `path` decides between .parquet and .csv."""
    rng = np.random.default_rng(size.seed)
    schema = pa.schema(
        [
            ("user", pa.string()),
            ("item", pa.string()),
            ("timestamp", pa.int64()),
            ("rating", pa.float32()),
        ]
    )
    is_csv = path.suffix == ".csv"
    with pacsv.CSVWriter(path, schema) if is_csv else pq.ParquetWriter(path, schema) as writer:
        for first in range(0, size.rows, GROUP):
            n = min(GROUP, size.rows - first)
            users = (size.users * rng.random(n) ** _SKEW).astype(np.int64)
            ranks = _HEAD * np.exp(rng.random(n) * np.log1p(size.items / _HEAD)) - _HEAD
            items = np.minimum(ranks.astype(np.int64), size.items - 1)
            writer.write_table(
                pa.table(
                    [
                        _ids("u", users, size.users),
                        _ids("i", items, size.items),
                        _START + (first + np.arange(n)) * _SPAN // size.rows,
                        rng.integers(1, 6, n).astype(np.float32),
                    ],
                    schema=schema,
                )
            )


def _ids(letter: str, numbers: np.ndarray, n: int) -> pa.Array:
    """Texts of one length whose order is not that of the numbers (a prime is coprime to n)."""
    digits = len(str(n))
    shuffled = (numbers * 7_919 + 12_345) % n
    place = np.array([10**k for k in range(digits - 1, -1, -1)])
    text = np.empty((numbers.size, digits + 1), np.uint8)
    text[:, 0] = ord(letter)
    text[:, 1:] = shuffled[:, None] // place % 10 + ord("0")
    offsets = np.arange(numbers.size + 1, dtype=np.int32) * (digits + 1)
    return pa.StringArray.from_buffers(numbers.size, pa.py_buffer(offsets), pa.py_buffer(text))
