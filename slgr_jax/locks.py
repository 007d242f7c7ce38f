"""Locks that end with their process, also on file systems that keep none.

`hold` takes the system's lock (flock), which goes however the process ends. Some network file
systems keep no locks; there a file with a heartbeat takes its place:

    PATH.heartbeat, or PATH/.heartbeat of a directory:  PID on HOST / token / beats

The holder rewrites it every few seconds, in a thread. Whoever finds it watches, by a clock of its
own, whether it changes: the clocks of two machines are never compared. If it does, the lock is
held. If it does not for `STALE_S`, the holder has died, or its machine sleeps: the file is written
anew with another token, and is the newcomer's if it says so a beat later (of several who try at
once, the last to write). A holder that finds another token has lost its lock, which `check` says.

Standard library only: every other package may use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

PathLike = str | os.PathLike[str]
LOGGER = logging.getLogger("slgr_jax")
# What flock says where the file system keeps no locks (some network mounts).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
# Between two beats; without one for so long the holder counts as dead.
BEAT_S, STALE_S = 5.0, 60.0


class LockHeldError(Exception):
    """Another process holds the lock.

    Attributes:
      holder: `PID on HOST`, or empty where the lock is on a directory, which names nobody.
    """

    def __init__(self, path: PathLike, holder: str) -> None:
        super().__init__(f"{os.fspath(path)} is held by {holder or 'another process'}")
        self.holder = holder


class LockLostError(Exception):
    """Another process took the lock over, because no heartbeat was seen for `STALE_S` seconds.

    Attributes:
      holder: `PID on HOST` of the other process; empty where the heartbeat's file was removed.
    """

    def __init__(self, path: PathLike, holder: str) -> None:
        super().__init__(f"{os.fspath(path)} was taken over by {holder or 'another process'}")
        self.holder = holder


class Lock:
    """A lock that is held."""

    def check(self) -> None:
        """Raise `LockLostError` where another process has taken the lock over.

        The system's own locks cannot be lost.
        """


@contextlib.contextmanager
def hold(path: PathLike) -> Iterator[Lock]:
    """Hold an exclusive lock on a directory, or on a file that is made where it is missing.

    A locked file holds `PID on HOST`, for whoever finds it locked; a directory is locked without a
    trace. Where the file system keeps no locks, a heartbeat stands in (see the module), and it may
    take `STALE_S` seconds to see that a holder was killed.

    Raises:
      LockHeldError: another process holds it.
      LockLostError: when the block ends: another process took it over.
      OSError: the file cannot be made or opened.
    """
    is_directory = os.path.isdir(path)
    flags = os.O_RDONLY if is_directory else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        if not _flock(descriptor, path, is_directory):
            with _Heartbeat(pathlib.Path(path), is_directory) as heartbeat:
                yield heartbeat
            return
        if not is_directory:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _holder().encode(), 0)
        yield Lock()
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: PathLike, is_directory: bool) -> bool:
    """Lock a file; False where the file system keeps no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = b"" if is_directory else os.pread(descriptor, 300, 0)
        raise LockHeldError(path, text.decode("utf-8", "replace").strip()) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _holder() -> str:
    return f"{os.getpid()} on {platform.node()}"


class _Beat(NamedTuple):
    """What a heartbeat's file says; empty where it says nothing."""

    holder: str
    token: str
    beats: str


_NO_BEAT = _Beat("", "", "")


class _Heartbeat(Lock):
    """A lock by a file that its holder keeps rewriting."""

    def __init__(self, path: pathlib.Path, is_directory: bool) -> None:
        name = ".heartbeat" if is_directory else path.name + ".heartbeat"
        self._path, self._file = path, (path if is_directory else path.parent) / name
        self._token, self._beats = secrets.token_hex(16), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def check(self) -> None:
        # Read here, and not left to the thread: a process that was stopped may come to this first.
        holder, token = self._read()[:2]
        if token != self._token:
            raise LockLostError(self._path, holder)

    def __enter__(self) -> _Heartbeat:
        while not self._create():
            if self._is_stale():
                self._take_over()
                break
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            self.check()
        except LockLostError:
            if kind is None:  # else what happened in the block says more
                raise
        else:
            self._file.unlink()

    def _create(self) -> bool:
        """Make the file; False where there is one."""
        try:
            os.close(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        self._write()
        return True

    def _is_stale(self) -> bool:
        """Watch the file of another: True if it stays as it is for long, False if it goes.

        Raises:
          LockHeldError: it changed: its holder lives.
        """
        seen = self._read()
        LOGGER.info(
            "%s: no locks on this file system; watching for %.0f s whether %s still holds it",
            self._path,
            STALE_S,
            seen.holder or "another process",
        )
        begin = time.monotonic()
        while time.monotonic() - begin < STALE_S:
            time.sleep(BEAT_S / 5)
            now = self._read()
            if now == _NO_BEAT and not self._file.exists():
                return False
            if now != seen:
                raise LockHeldError(self._path, now.holder)
        LOGGER.warning(
            "%s: taken over from %s, which has not been heard of for %.0f s",
            self._path,
            seen.holder or "another process",
            STALE_S,
        )
        return True

    def _take_over(self) -> None:
        """Write over the file of a holder that died; of several who do, the last is the next.

        Raises:
          LockHeldError: another was later.
        """
        self._write()
        time.sleep(BEAT_S)
        try:
            self.check()
        except LockLostError as error:
            raise LockHeldError(self._path, error.holder) from None

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError, LockLostError):  # the next `check` says so
                self.check()
                self._write()

    def _read(self) -> _Beat:
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return _NO_BEAT
        return _Beat(*[*lines, "", "", ""][:3])

    def _write(self) -> None:
        """Rewrite the file in place: a network file system shows others a new one late."""
        self._beats += 1
        text = f"{_holder()}\n{self._token}\n{self._beats:012d}\n"
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
