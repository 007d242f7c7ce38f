"""Files that are whole or absent, locks that end with their process, the user's cache.

Standard library only: every other package may use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import platform
import secrets
from collections.abc import Callable, Iterator

PathLike = str | os.PathLike[str]

# What flock says where the file system keeps no locks (some network mounts).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class LockHeldError(Exception):
    """Another process holds the lock.

    Attributes:
      holder: `PID on HOST`, or empty where the lock is on a directory, which names nobody.
    """

    def __init__(self, path: PathLike, holder: str) -> None:
        super().__init__(f"{os.fspath(path)} is held by {holder or 'another process'}")
        self.holder = holder


def atomically(
    path: PathLike, write: Callable[[pathlib.Path], object], *, durable: bool = False
) -> pathlib.Path:
    """`write` to a file beside `path`, then put it in place; a reader sees the old file or the new.

    The file has a name of its own, with the ending of `path`, and is removed if anything fails, so
    that processes which write the same path at once do not spoil each other's. Missing directories
    are made.

    Args:
      durable: also flush the file and its directory to disk, so that a power cut after the
        return loses nothing.

    Raises:
      OSError: the directory cannot be made or written, or is full; `path` is as it was.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    own_name = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial{target.suffix}"
    partial = target.with_name(own_name)
    try:
        write(partial)
        if durable:
            sync(partial)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync(target.parent)
    return target


def write_atomically(path: PathLike, content: str | bytes, *, durable: bool = False) -> None:
    """Replace the file at `path` by `content`, as `atomically` does.

    Text is written as UTF-8 with line ends as they are.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    atomically(path, lambda partial: partial.write_bytes(data), durable=durable)


def sync(path: PathLike) -> None:
    """Flush a file, or a directory's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold(path: PathLike) -> Iterator[bool]:
    """Hold an exclusive lock on a directory, or on a file that is made where it is missing.

    The system lets go however the process ends. A locked file holds `PID on HOST`, for whoever
    finds it locked; a directory is locked without a trace.

    Yields:
      Whether there is a lock: False on a file system that has none, where a second process
      gets past this call.

    Raises:
      LockHeldError: another process holds it.
      OSError: the file cannot be made or opened.
    """
    is_directory = os.path.isdir(path)
    flags = os.O_RDONLY if is_directory else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        locked = _lock(descriptor, path, is_directory)
        if not is_directory:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {platform.node()}".encode(), 0)
        yield locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: PathLike, is_directory: bool) -> bool:
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


def cache_directory(*parts: str) -> pathlib.Path:
    """Where this project keeps `parts`: under $XDG_CACHE_HOME, else ~/.cache; not made here."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home, "slgr_jax", *parts)
