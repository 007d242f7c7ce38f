"""Atomic writes, locks and the cache: what a reader and a second process see."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from slgr_jax import files


def test_text_and_bytes_are_written_as_they_are(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "žluť\r\n")
    assert path.read_bytes() == "žluť\r\n".encode()
    files.write_atomically(path, b"\xff\0", durable=True)
    assert path.read_bytes() == b"\xff\0"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new", durable=True)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_durable_flushes_the_file_before_its_name_and_the_directory_after(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args: object, name: str = name, real: object = real) -> None:
            calls.append(name)
            real(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, noted)
    files.write_atomically(tmp_path / "a", "x")
    assert calls == ["replace"]
    files.write_atomically(tmp_path / "a", "x", durable=True)
    assert calls == ["replace", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_lock_is_exclusive_and_ends_with_its_block(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "lock" if kind == "file" else tmp_path
    with files.hold(path) as locked:
        assert locked
        with pytest.raises(files.LockHeldError) as error, files.hold(path):
            pass
    holder = error.value.holder
    assert holder.startswith(f"{os.getpid()} on ") if kind == "file" else holder == ""
    with files.hold(path) as locked:
        assert locked


def test_the_holder_is_another_process(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    path.write_text("a longer text than any process id and host: of an older holder, long gone")
    code = (
        "import sys; from slgr_jax import files\n"
        "with files.hold(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(files.LockHeldError, match=rf"{other.pid} on \S+$"), files.hold(path):
            pass
        other.kill()  # no chance to let go
        other.wait()
        with files.hold(path) as locked:
            assert locked


def test_a_file_system_without_locks_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(error: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with files.hold(tmp_path) as locked:
        assert not locked
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), files.hold(tmp_path):
        pass


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert files.cache_directory("xla") == pathlib.Path("/somewhere/slgr_jax/xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert files.cache_directory("a", "b") == pathlib.Path("/home/me/.cache/slgr_jax/a/b")


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys, slgr_jax.files\n"
        "assert not {'jax', 'numpy', 'pyarrow', 'absl'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
