"""Files that are whole or absent, and the user's cache.

Standard library only: every other package may use it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Callable

PathLike = str | os.PathLike[str]


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


def cache_directory(*parts: str) -> pathlib.Path:
    """Where this project keeps `parts`: under $XDG_CACHE_HOME, else ~/.cache; not made here."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home, "slgr_jax", *parts)
