"""A log larger than memory becomes the same dataset, byte for byte, as one that is held whole."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import fingerprints, schema, shards
from slgr_jax.data.ingest import memory, prepare, spill
from slgr_jax.data.ingest.log import lexsorted
from slgr_jax.errors import InputError, ShardError

N = 2_500
START = 1_500_000_000


def table(seed: int = 0, n: int = N) -> pa.Table:
    """Rows of 90 users and 60 items: repeated pairs, equal times, one very active user."""
    rng = np.random.default_rng(seed)
    users = np.where(rng.random(n) < 0.3, 7, rng.integers(0, 90, n))
    part = rng.choice(["train", "train", "train", "valid", "test", "unused"], n)
    return pa.table(
        {
            # No order of numbers: u10 comes before u9.
            "user": pa.array([f"u{user}" for user in users]),
            "item": pa.array(rng.integers(100, 160, n)),
            "timestamp": pa.array(START + rng.integers(0, 400, n) * 3600),
            "rating": pa.array(rng.integers(1, 6, n), pa.float32()),
            "part": pa.array(part),
        }
    )


def contents(out: pathlib.Path) -> dict[str, object]:
    """The bytes of every file; of the manifest all but when it was made."""
    files: dict[str, object] = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != schema.MANIFEST
    }
    manifest = json.loads((out / schema.MANIFEST).read_text())
    return files | {key: manifest[key] for key in manifest if key not in ("created", "checksum")}


@pytest.fixture
def few_at_once(monkeypatch):
    """A stretch is 300 rows, a range as many or one user's; a batch, and what is sorted, 170."""
    monkeypatch.setattr(memory, "_LEAST_ROWS", 300)
    monkeypatch.setattr(shards, "ROWS_STREAMED", 170)
    monkeypatch.setattr(spill, "_AT_ONCE", 170)


def both(path: pathlib.Path, folder: pathlib.Path, **knobs: object) -> tuple[object, object]:
    """What becomes of a file that is held whole, and of one that is not."""
    source = "csv" if ".csv" in path.name else "parquet"
    outs = []
    for name, size in (("whole", 1.0), ("stretches", 1e-9)):
        out = folder / name
        values = {"source": source, "input": str(path), "out": str(out), "memory": size, **knobs}
        prepare.prepare(PrepareConfig(**{"rows_per_shard": 700, **values}))  # type: ignore[arg-type]
        outs.append(contents(out))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return outs[0], outs[1]


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(table().drop_columns("part"), path, row_group_size=400)
    return path


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"split": "leave_last", "keep": "last"},
        {"split": "ratio", "seed": 3, "keep": "highest"},
        {"split": "ratio", "ratio_by": "user", "min_rating": 3.0},
        {"user_core": 9, "item_core": 12, "split": "leave_last"},
        {"rating_column": "", "count_repeats": True},
        {"time_column": "", "split": "ratio", "test_fraction": 0.3},
        {"split_column": "part"},
        {"split_column": "part", "time_column": "", "user_core": 5, "item_core": 3},
        {"user_shards": 7},
        {"split_column": "part", "user_shards": 200},
    ],
    ids=lambda knobs: " ".join(f"{key}={value}" for key, value in knobs.items()),
)
def test_every_split_and_filter(tmp_path, few_at_once, knobs):
    path = tmp_path / "log.parquet"
    rows = table()
    if "split_column" not in knobs:
        rows = rows.drop_columns("part")
    pq.write_table(rows, path, row_group_size=400)
    whole, stretches = both(path, tmp_path, **knobs)
    assert stretches == whole


def test_the_log_was_not_held_whole(tmp_path, few_at_once, parquet, monkeypatch):
    added, loaded = [], []
    add, load = spill.Spill.add, spill._OnDisk.load

    def add_and_note(self, log, *ids):
        added.append(len(log))
        add(self, log, *ids)

    def load_and_note(self):
        log = load(self)
        loaded.append(len(log))
        return log

    monkeypatch.setattr(spill.Spill, "add", add_and_note)
    monkeypatch.setattr(spill._OnDisk, "load", load_and_note)
    both(parquet, tmp_path)
    assert sum(added) == N
    assert max(added) <= 300 + 170
    assert len(added) >= 6
    # A range is shorter than a stretch and the user that ends it, here one with 30 % of the rows.
    assert max(loaded) < 300 + 0.35 * N


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.arrow", "log.arrows", "folder"])
def test_every_format(tmp_path, few_at_once, name):
    rows = table().drop_columns("part")
    path = tmp_path / name
    if ".csv" in name:
        lines = ["user,item,timestamp,rating"]
        lines += [",".join(map(str, row.values())) for row in rows.to_pylist()]
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    elif name == "folder":  # also of columns whose types differ
        path.mkdir()
        pq.write_table(rows.slice(0, 900), path / "a.parquet")
        narrow = rows.slice(900).set_column(1, "item", rows["item"].slice(900).cast(pa.int16()))
        pq.write_table(narrow, path / "b.parquet")
    elif name == "log.arrow":
        pyarrow.feather.write_feather(rows, path, chunksize=130)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=130)
    whole, stretches = both(path, tmp_path)
    assert stretches == whole


@pytest.mark.parametrize("valid_from", ["train", "test"])
def test_texts_features_and_parts_in_files(tmp_path, few_at_once, valid_from):
    rows = table().drop_columns("part")
    for name, first, n in (("train", 0, 1_500), ("test", 1_500, 1_000)):
        pq.write_table(rows.slice(first, n), tmp_path / f"{name}.parquet")
    items = "item,title,kind\n" + "".join(f"{k},Title {k},{'xyz'[k % 3]}\n" for k in range(90, 170))
    (tmp_path / "items.csv").write_text(items)
    whole, stretches = both(
        tmp_path / "train.parquet",
        tmp_path,
        test_input=str(tmp_path / "test.parquet"),
        valid_from=valid_from,
        items_input=str(tmp_path / "items.csv"),
        item_features="kind",
        keep_items=True,
    )
    assert stretches == whole


def test_bad_rows_have_their_number_and_are_dropped_alike(tmp_path, few_at_once, monkeypatch):
    monkeypatch.setattr("slgr_jax.data.ingest.text_lines.BLOCK", 4_096)
    monkeypatch.setattr("slgr_jax.data.ingest.delimited.ARROW_BLOCK", 4_096)
    lines = ["user,item,timestamp,rating"]
    lines += [",".join(map(str, row.values())) for row in table().drop_columns("part").to_pylist()]
    lines[1_900] = "u3,101,1500000000"
    lines[2_101] = "u3,,1500000000,3"
    lines[2_202] = "u3,101,1500000000,good"
    lines[2_203] = "u3,10\0001,1500000000,2"
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    whole, stretches = both(path, tmp_path, bad_rows="drop")
    assert stretches["counts"] == whole["counts"]
    assert stretches["split_hash"] == whole["split_hash"]
    (of_whole,), (of_stretches,) = (each["source"]["lines"] for each in (whole, stretches))
    assert sorted(of_stretches.pop("examples")) == sorted(of_whole.pop("examples"))
    assert of_stretches == of_whole
    bad = {1_900, 2_101, 2_202, 2_203}
    while bad:
        with pytest.raises(InputError, match=r"log\.csv") as error:
            both(path, tmp_path, out=str(tmp_path / "refused"), memory=1e-9)
        kind, number = re.findall(r"(row|line) (\d+): ", str(error.value))[0]
        row = int(number) - (kind == "line")  # the header is a line
        bad.remove(row)
        lines[row] = "u3,101,1500000000,3"
        path.write_text("\n".join(lines) + "\n")


def test_times_of_another_unit_later_in_the_file(tmp_path, few_at_once):
    rows = table().drop_columns("part")
    times = rows["timestamp"].to_numpy().copy()
    times[2_000] *= 1000
    path = tmp_path / "log.parquet"
    pq.write_table(rows.set_column(2, "timestamp", pa.array(times)), path)
    with pytest.raises(InputError, match=r"row 2001: time \d+ is outside 1973 to 2100 in s, that"):
        both(path, tmp_path, memory=1e-9)


def test_a_damaged_row_group_leaves_nothing(tmp_path, few_at_once, parquet):
    data = bytearray(parquet.read_bytes())
    begin = pq.read_metadata(parquet).row_group(4).column(0).data_page_offset
    data[begin : begin + 40] = b"\xff" * 40
    parquet.write_bytes(data)
    with pytest.raises((InputError, ShardError), match=r"log\.parquet cannot be read"):
        both(parquet, tmp_path, memory=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_no_room_and_no_directory_for_temporary_files(tmp_path, few_at_once, parquet, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"temporary files cannot be written in .*--temp_dir"):
        both(parquet, tmp_path, temp_dir=str(tmp_path / "file" / "below"), memory=1e-9)

    class Full:
        def __enter__(self):
            raise OSError(28, "No space left on device")

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(spill, "open", lambda *_: Full(), raising=False)
    with pytest.raises(InputError, match=r"No space left on device; give them room .*--temp_dir"):
        both(parquet, tmp_path, temp_dir=str(tmp_path / "room"), memory=1e-9)
    assert not any((tmp_path / "room").iterdir())


KILLED = """
import os, sys
from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest import memory, prepare, spill
memory._LEAST_ROWS = 300
spill.Spill.ranges = lambda *_, **__: os._exit(9)
prepare.prepare(PrepareConfig(source="parquet", input=sys.argv[1], out=sys.argv[2], memory=1e-9))
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, parquet):
    command = [sys.executable, "-c", KILLED, str(parquet), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == 9
    (left,) = tmp_path.glob(".out.rows.partial-*")
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    values = {"source": "parquet", "input": str(parquet), "out": str(tmp_path / "out")}
    prepare.prepare(PrepareConfig(**values))  # type: ignore[arg-type]
    assert not left.exists()


def test_the_order_of_several_keys_is_numpys():
    rng = np.random.default_rng(0)
    few, many = rng.integers(0, 9, 4_000), rng.integers(-(2**62), 2**62, 4_000)
    seconds = rng.integers(0, 2_000, 4_000) * 10**6 + 1_500_000_000 * 10**6
    micros = rng.integers(0, 2**53, 4_000)
    wide = rng.choice([-(2**62), 5, 2**62], 4_000)  # joins nothing, and leaves ties
    keys_of = ([few], [few, seconds, few], [few, micros, few], [many, few], [wide, few, seconds])
    for keys in keys_of:
        assert (lexsorted(keys) == np.lexsort(keys[::-1])).all()


def test_the_hash_of_a_split_in_files_is_that_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_AT_ONCE", 50)
    rng = np.random.default_rng(0)
    pairs, files = {}, {}
    for part, n in (("train", 900), ("valid", 0), ("test", 120)):
        users = np.sort(rng.integers(0, 40, n)).astype(np.int32)
        items = rng.integers(0, 30, n).astype(np.int32)
        pairs[part] = users, items
        path = tmp_path / part
        ranges = (users < 11, (users >= 11) & (users < 12), users >= 12)
        path.write_bytes(b"".join(fingerprints.items_by_user(users[r], items[r]) for r in ranges))
        files[part] = np.bincount(users, minlength=40), path
    assert fingerprints.split_hash_of(files) == fingerprints.split_hash(pairs)
