"""Files that are nearly right, through every reader: a dataset that adds up, or a named error.

More seeds: SLGR_FUZZ_SEEDS=FIRST:LAST python -m pytest tests/data/ingest/test_fuzz.py
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import random
import shutil

import malformed_files
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset, schema
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import UserError

FIRST, LAST = (int(seed) for seed in os.environ.get("SLGR_FUZZ_SEEDS", "0:240").split(":"))
CHUNK = 60


def outcome(options: dict[str, object], folder: pathlib.Path) -> str:
    """`refused`, or `read` after the dataset was written, loaded and its rows were added up."""
    try:
        manifest = prepare.prepare(PrepareConfig(**options, out=str(folder / "out")))  # type: ignore[arg-type]
    except UserError as error:
        message = str(error)
        assert message
        assert message.isprintable(), "one line, and nothing that a terminal acts on"
        assert not (folder / "out").exists()
        return "refused"
    data = dataset.load(folder / "out")
    filters = manifest.filters
    names = ("unused_in_split_column", "below_min_rating", "duplicates", "outside_k_core")
    dropped = sum(filters.get(name, 0) for name in names)
    dropped += sum(filters.get("repeated_in_eval", {}).values())
    left = sum(len(data.part(part)) for part in schema.PARTS)
    assert filters["rows_read"] == left + dropped
    assert prepare.summary(manifest).encode()
    return "read"


@pytest.mark.parametrize("start", range(FIRST, LAST, CHUNK))
def test_every_reader_reads_or_refuses(tmp_path: pathlib.Path, start: int) -> None:
    seen = collections.Counter[str]()
    for seed in range(start, min(start + CHUNK, LAST)):
        folder = tmp_path / "case"
        (folder / "in").mkdir(parents=True)
        case = malformed_files.case(seed, folder / "in")
        try:
            seen[outcome(case.options, folder)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {case}")
            raise
        shutil.rmtree(folder)
    assert min(seen["read"], seen["refused"]) >= CHUNK // 12  # neither is a matter of course


def arrow_bytes(rng: random.Random) -> bytearray:
    """A file that Arrow trusts, with a few bytes of it changed: lengths, offsets, types."""
    n = 50
    user = pa.array([f"u{k % 7}" for k in range(n)])
    columns = {
        "user": user.dictionary_encode() if rng.random() < 0.5 else user,
        "item": pa.array([f"i{k % 11}" for k in range(n)]),
        "timestamp": pa.array([1_500_000_000 + k for k in range(n)]),
        "extra": pa.array([[f"a{k}", "b"] for k in range(n)]),
    }
    table, sink, style = pa.table(columns), io.BytesIO(), rng.randrange(3)
    if style == 2:
        pq.write_table(table, sink)
    else:
        opener = pa.ipc.new_stream if style else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "lz4", "zstd")))
        with opener(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=20)
    data = bytearray(sink.getvalue())
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data))
        data[place : place + 4] = rng.choice(
            (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", bytes([rng.randrange(256)]) * 4)
        )
    return data


@pytest.mark.parametrize("start", range(FIRST, LAST, CHUNK))
def test_a_malformed_arrow_file_does_not_end_the_process(
    tmp_path: pathlib.Path, start: int
) -> None:
    for seed in range(start, min(start + CHUNK, LAST)):
        folder = tmp_path / "case"
        folder.mkdir()
        path = folder / "log.arrow"
        path.write_bytes(arrow_bytes(random.Random(seed)))
        options = {"source": "parquet", "input": str(path), "items_input": str(path)}
        try:
            outcome(options | {"categories_column": "extra"}, folder)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        shutil.rmtree(folder)
