"""Atomic writes and the cache: what a reader sees."""

from __future__ import annotations

import errno
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


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert files.cache_directory("xla") == pathlib.Path("/somewhere/slgr_jax/xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert files.cache_directory("a", "b") == pathlib.Path("/home/me/.cache/slgr_jax/a/b")


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys, slgr_jax.files, slgr_jax.locks\n"
        "assert not {'jax', 'numpy', 'pyarrow', 'absl'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
