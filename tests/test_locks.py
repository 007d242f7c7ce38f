"""Locks between real processes, with the system's locks and with heartbeats in their place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from slgr_jax import locks
from slgr_jax.data import shards
from slgr_jax.errors import InputError

BEAT_S, STALE_S = 0.2, 1.0
# A process that holds the lock on argv[1], says so, and says once more whether it still does.
HOLDER = f"""
import errno, fcntl, sys
from slgr_jax import locks

def refuse(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "heartbeat":
    fcntl.flock = refuse
    locks.BEAT_S, locks.STALE_S = {BEAT_S}, {STALE_S}
try:
    with locks.hold(sys.argv[1]) as lock:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            lock.check()
            print("still", flush=True)
        except locks.LockLostError as error:
            print("lost to", error.holder, flush=True)
except (locks.LockLostError, locks.LockHeldError) as error:
    print(type(error).__name__, error.holder, flush=True)
"""


@contextlib.contextmanager
def _process(path: pathlib.Path, how: str) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", HOLDER, str(path), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _no_locks(monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOLCK) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "BEAT_S", BEAT_S)
    monkeypatch.setattr(locks, "STALE_S", STALE_S)


@pytest.fixture(params=["flock", "heartbeat"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kinds of lock this process and its children use."""
    if request.param == "heartbeat":
        _no_locks(monkeypatch)
    kind: str = request.param
    return kind


@pytest.fixture(params=["file", "directory"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """What is locked."""
    if request.param == "directory":
        return tmp_path
    file = tmp_path / "lock"
    file.write_text("a longer text than any process id and host: of an older holder, long gone")
    return file


def test_a_lock_is_exclusive_and_ends_with_its_block(path: pathlib.Path, how: str) -> None:
    with locks.hold(path) as lock:
        lock.check()
        with pytest.raises(locks.LockHeldError) as error, locks.hold(path):
            pass
        lock.check()
    named = error.value.holder.startswith(f"{os.getpid()} on ")
    assert named == (how == "heartbeat" or path.is_file())
    with locks.hold(path):
        pass
    assert not list(path.parent.glob("*.heartbeat"))
    assert not list(path.parent.glob("**/.heartbeat"))


def test_a_killed_process_lets_go(path: pathlib.Path, how: str) -> None:
    with _process(path, how) as other:
        assert _line(other) == "held"
        with pytest.raises(locks.LockHeldError) as error, locks.hold(path):
            pass
        if path.is_file() or how == "heartbeat":
            assert error.value.holder.startswith(f"{other.pid} on ")
        other.kill()  # no chance to let go
        other.wait()
        begin = time.monotonic()
        with locks.hold(path) as lock:
            lock.check()
        assert (time.monotonic() - begin > STALE_S) == (how == "heartbeat")


def test_a_holder_that_stood_still_finds_its_lock_taken_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that slept: its process goes on long after another has taken its place."""
    _no_locks(monkeypatch)
    caplog.set_level("INFO", "slgr_jax")
    path = tmp_path / "lock"
    with _process(path, "heartbeat") as other:
        assert _line(other) == "held"
        os.kill(other.pid, signal.SIGSTOP)
        with locks.hold(path) as lock:
            os.kill(other.pid, signal.SIGCONT)
            _go_on(other)
            assert _line(other).startswith(f"lost to {os.getpid()} on ")
            assert _line(other).startswith(f"LockLostError {os.getpid()} on ")
            other.wait()
            time.sleep(3 * BEAT_S)
            lock.check()  # the loser left its file alone
    watched, taken = [record.getMessage() for record in caplog.records]
    assert f"watching for 1 s whether {other.pid} on " in watched
    assert f"taken over from {other.pid} on " in taken


def test_of_several_who_take_over_one_gets_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    (tmp_path / "lock.heartbeat").write_text("1 on gone\ntoken\n000000000007\n")
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(_process(path, "heartbeat")) for _ in range(3)]
        lines = sorted(_line(other).split(" ")[0] for other in others)
        assert lines == ["LockHeldError", "LockHeldError", "held"]


def test_the_clocks_of_two_machines_are_not_compared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live holder's file may be from any time: here from 1970, and from 2096."""
    _no_locks(monkeypatch)
    path = tmp_path / "lock"
    with _process(path, "heartbeat") as other:
        assert _line(other) == "held"
        for when in (0, 4_000_000_000):
            os.utime(tmp_path / "lock.heartbeat", (when, when))
            with pytest.raises(locks.LockHeldError, match=f"{other.pid} on"), locks.hold(path):
                pass
        _go_on(other)
        assert _line(other) == "still"


def test_other_errors_of_the_file_system_are_not_hidden(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locks.hold(tmp_path):
        pass


def test_a_product_that_another_process_took_over_is_a_named_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_locks(monkeypatch)
    with (
        pytest.raises(InputError, match=r"was taken over by 7 on there, .* the same command again"),
        shards.locked(tmp_path),
    ):
        (tmp_path / ".heartbeat").write_text("7 on there\nother\n1\n")
    (tmp_path / ".heartbeat").unlink()
    with (
        shards.locked(tmp_path),
        pytest.raises(InputError, match=r"is being written by another process \(\d+ on \S+\)"),
        shards.locked(tmp_path),
    ):
        pass


def test_leftovers_are_removed_where_there_are_no_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_locks(monkeypatch)
    left = tmp_path / ".d.partial-killed"
    left.mkdir()
    (left / ".heartbeat").write_text("1 on gone\ntoken\n000000000007\n")
    os.utime(left, (0, 0))
    with shards.atomic_directory(tmp_path / "d") as staging:
        assert not left.exists()
        (staging / "whole").touch()
    assert [entry.name for entry in (tmp_path / "d").iterdir()] == ["whole"]
