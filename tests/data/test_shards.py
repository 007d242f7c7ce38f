"""Shards: whole or refused, never half-read; directories: whole or absent."""

from __future__ import annotations

import errno
import os
import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from slgr_jax import locks
from slgr_jax.data import fingerprints, schema, shards
from slgr_jax.errors import InputError, ShardError

TABLE = pa.table(
    {"user_id": ["007", " a b ", "žluť", "x" * 100], "text": ["t", None, "", "ü"]},
    schema=schema.USERS,
)


def write(root: pathlib.Path, rows_per_shard: int = 3) -> tuple[schema.ShardFile, ...]:
    return shards.write_shards(root, "part", TABLE, rows_per_shard=rows_per_shard)


@pytest.mark.parametrize(("per_shard", "sizes"), [(3, [3, 1]), (2, [2, 2]), (4, [4]), (9, [4])])
def test_round_trip_and_sizes(tmp_path: pathlib.Path, per_shard: int, sizes: list[int]) -> None:
    files = write(tmp_path, per_shard)
    assert [file.rows for file in files] == sizes
    assert [f.path for f in files] == [
        f"part-{k:05d}-of-{len(sizes):05d}.arrow" for k in range(len(sizes))
    ]
    assert shards.read_shards(tmp_path, files, schema.USERS).equals(TABLE)


def test_an_empty_table_keeps_its_schema(tmp_path: pathlib.Path) -> None:
    files = shards.write_shards(tmp_path, "p", TABLE.slice(0, 0), rows_per_shard=5)
    assert len(files) == 1
    assert shards.read_shards(tmp_path, files, schema.USERS).schema == schema.USERS


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_cut_by_one_byte(tmp_path: pathlib.Path, verify: bool) -> None:
    files = write(tmp_path)
    path = tmp_path / files[1].path
    path.write_bytes(path.read_bytes()[:-1])
    size = files[1].bytes
    with pytest.raises(ShardError, match=rf"00001-of-00002.* has {size - 1} bytes.* says {size}"):
        shards.read_shards(tmp_path, files, schema.USERS, verify=verify)


def test_every_flipped_byte_is_found(tmp_path: pathlib.Path) -> None:
    files = write(tmp_path, 4)
    path = tmp_path / files[0].path
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="does not match its SHA-256"):
            shards.read_shards(tmp_path, files, schema.USERS)


def test_a_missing_shard(tmp_path: pathlib.Path) -> None:
    files = write(tmp_path)
    (tmp_path / files[0].path).unlink()
    with pytest.raises(ShardError, match=r"00000-of-00002.arrow is missing.* with 3 rows"):
        shards.read_shards(tmp_path, files, schema.USERS)


def test_another_schema(tmp_path: pathlib.Path) -> None:
    files = write(tmp_path)
    with pytest.raises(ShardError, match="has columns user_id, text; expected user, item"):
        shards.read_shards(tmp_path, files, schema.INTERACTIONS)


def test_a_wrong_row_count(tmp_path: pathlib.Path) -> None:
    (first, second) = write(tmp_path)
    wrong = schema.ShardFile(first.path, 4, first.bytes, first.sha256)
    with pytest.raises(ShardError, match="has 3 rows, the manifest says 4"):
        shards.read_shards(tmp_path, (wrong, second), schema.USERS)


def encodings(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """One table as an IPC file, an IPC stream and Parquet, under names that say nothing."""
    paths = {name: root / f"{name}.bin" for name in ("file", "stream", "parquet")}
    with pa.ipc.new_file(paths["file"], TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)
    with pa.ipc.new_stream(paths["stream"], TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)
    pq.write_table(TABLE, paths["parquet"])
    return paths


def test_file_stream_and_parquet_read_alike(tmp_path: pathlib.Path) -> None:
    for path in encodings(tmp_path).values():
        assert shards.read_table(path).equals(TABLE)
        assert shards.read_table(path, columns=["text"]).equals(TABLE.select(["text"]))


def test_a_stream_cut_between_two_batches(tmp_path: pathlib.Path) -> None:
    path = encodings(tmp_path)["stream"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])  # the end marker
    with pytest.raises(ShardError, match="without its end marker"):
        shards.read_table(path)


@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_any_truncation_is_a_shard_error(tmp_path: pathlib.Path, kind: str) -> None:
    path = encodings(tmp_path)[kind]
    whole = path.read_bytes()
    for size in {0, 1, 5, 9, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=path.name):
            shards.read_table(path)


def test_a_hive_looking_folder_adds_no_column(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "day=7"
    folder.mkdir()
    pq.write_table(TABLE, folder / "p.parquet")
    assert shards.read_table(folder / "p.parquet").schema.names == ["user_id", "text"]


def test_the_directory_appears_whole(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "deep" / "out"
    with shards.atomic_directory(out) as root:
        (root / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "a").read_text() == "1"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), SystemExit(1)]
)
def test_a_failure_leaves_nothing(tmp_path: pathlib.Path, error: BaseException) -> None:
    def fail() -> None:
        with shards.atomic_directory(tmp_path / "deep" / "out") as root:
            (root / "a").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_real_write_error_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left"),
        shards.atomic_directory(tmp_path / "o") as r,
    ):
        write(r)
    assert list(tmp_path.iterdir()) == []


def finished(path: pathlib.Path, text: str) -> None:
    with shards.atomic_directory(path, overwrite=True) as root:
        (root / schema.MANIFEST).write_text(text)


def test_overwrite(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    finished(out, "old")
    with pytest.raises(InputError, match="exists; choose another path"):
        shards.check_target(out, overwrite=False)
    finished(out, "new")
    assert (out / schema.MANIFEST).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finished(out, "old")
    rename = pathlib.Path.rename

    def fail_into_place(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        # Moving the old one aside works, and so does moving it back; putting the new one fails.
        if "partial" in self.name and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="broken"):
        finished(out, "new")
    assert (out / schema.MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_a_foreign_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("only copy")
    with pytest.raises(InputError, match="leaves it alone"):
        finished(tmp_path / "home", "new")
    assert (tmp_path / "home" / "thesis").read_text() == "only copy"


def test_what_a_killed_process_left_is_removed(tmp_path: pathlib.Path) -> None:
    ages = {"killed": 3600, "held": 3600, "new": 0, "before-old": 3600}
    paths = {name: tmp_path / f".d.partial-{name}" for name in ages}
    for name, path in paths.items():
        path.mkdir()
        (path / "part.arrow").write_text("half")
        os.utime(path, (time.time() - ages[name],) * 2)
    others = tmp_path / ".e.partial-killed"
    others.mkdir()
    with locks.hold(paths["held"]), shards.atomic_directory(tmp_path / "d"):
        left = sorted(name for name, path in paths.items() if path.exists())
        assert left == [
            "before-old",
            "held",
            "new",
        ]  # with no target, the old is all
        (staging,) = set(tmp_path.glob(".d.partial-*")) - set(paths.values())
        os.utime(staging, (0, 0))
        with shards.atomic_directory(tmp_path / "d"):
            assert staging.exists()  # a second process leaves one that is being written
        (tmp_path / "d").rmdir()
    with shards.atomic_directory(tmp_path / "d", overwrite=True):
        assert sorted(name for name, path in paths.items() if path.exists()) == ["new"]
    assert others.exists()


def test_a_parent_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_text("")
    with (
        pytest.raises(InputError, match="is not a directory"),
        shards.atomic_directory(tmp_path / "f" / "out"),
    ):
        pass


def test_split_hash_ignores_order_and_sees_every_pair() -> None:
    rng = np.random.default_rng(0)
    pairs = {p: (rng.integers(0, 9, 20, np.int32), rng.integers(0, 9, 20, np.int32))
             for p in schema.PARTS}  # fmt: skip
    base = fingerprints.split_hash(pairs)
    order = rng.permutation(20)
    shuffled = {p: (users[order], items[order]) for p, (users, items) in pairs.items()}
    assert fingerprints.split_hash(shuffled) == base
    none = np.zeros(0, np.int32)
    one = dict.fromkeys(schema.PARTS, (none, none)) | {"train": pairs["train"]}
    other = dict.fromkeys(schema.PARTS, (none, none)) | {"valid": pairs["train"]}
    assert fingerprints.split_hash(one) != fingerprints.split_hash(other)
    users, items = pairs["valid"]
    changed = items.copy()
    changed[3] += 1
    assert fingerprints.split_hash({**pairs, "valid": (users, changed)}) != base
    assert (
        fingerprints.split_hash({**pairs, "train": pairs["test"], "test": pairs["train"]}) != base
    )


def test_id_map_hash_sees_boundaries_and_order() -> None:
    def digest(users: list[str], items: list[str]) -> str:
        return fingerprints.id_map_hash(pa.array(users, pa.string()), pa.array(items, pa.string()))

    found = {
        digest(["ab", "c"], ["d"]),
        digest(["a", "bc"], ["d"]),
        digest(["c", "ab"], ["d"]),
        digest(["ab", "c", "d"], []),
        digest(["ab"], ["c", "d"]),
    }
    assert len(found) == 5
