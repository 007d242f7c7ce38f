"""Input files wherever they lie: a folder, a zip archive (a .whl is one), or one file."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from slgr_jax.data.ingest import text_lines
from slgr_jax.data.shards import sha256_of
from slgr_jax.errors import InputError, listing, printable

_INFLATES = 5  # times that a gz file of a log grows, about


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what readers raise on a damaged or foreign file into an `InputError` about `where`."""
    try:
        yield
    except MemoryError:
        raise
    except (
        pa.ArrowException,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        UnicodeError,
        NotImplementedError,  # a compression method that zipfile lacks
        OSError,
    ) as error:
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise InputError(f"{where} cannot be read: {reason}") from error


class Files:
    """The files at a path, by their names inside it; remembers which were opened.

    Attributes:
      path: what the user gave.
      names: every file, as a relative path with `/`; for one file, its folder's files.
      single: the name of the file itself where `path` is one plain file, else None.
    """

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        self.single: str | None = None
        self._zip: zipfile.ZipFile | None = None
        self._used: list[str] = []
        if not self.path.exists():
            raise InputError(f"{path} does not exist; --input names a file, folder or zip archive")
        if self.path.is_dir():
            self._root = self.path
            files = (p for p in self.path.rglob("*") if p.is_file())
            names = [p.relative_to(self.path).as_posix() for p in files]
        elif self._is_archive():
            with reading(str(self.path)):
                self._zip = zipfile.ZipFile(self.path)
            names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        else:
            self._root, self.single = self.path.parent, self.path.name
            names = [p.name for p in self.path.parent.iterdir() if p.is_file()]
        self.names = sorted(name for name in names if not _is_junk(name))

    def _is_archive(self) -> bool:
        if self.path.suffix.lower() in (".zip", ".whl"):
            return True
        with open(self.path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"

    def open(self, name: str) -> BinaryIO:
        """Open one of `names` for reading; a gz file is inflated on the way."""
        if name not in self._used:
            self._used.append(name)
        with reading(self.where(name)):
            if self._zip is None:
                return pa.input_stream(os.fspath(self._root / name), compression="detect")
            try:
                return self._zip.open(name)  # type: ignore[return-value]
            except RuntimeError as error:  # encrypted; zipfile has no finer class
                raise InputError(f"{self.where(name)} cannot be read: {error}") from error

    def where(self, name: str) -> str:
        """What to call a member in a message."""
        path = f"{self.path}:{name}" if self._zip is not None else str(self._root / name)
        return printable(path)

    def path_of(self, name: str) -> pathlib.Path:
        """Where a file of a folder lies."""
        assert self._zip is None
        return self._root / name

    def size(self, name: str) -> int | None:
        """Bytes that `open` reads of a file; None where it is a gz file."""
        if self._zip is not None:
            return self._zip.getinfo(name).file_size
        return None if name.endswith(".gz") else self.path_of(name).stat().st_size

    def inflated_size(self, name: str) -> int:
        """About how many bytes `open` reads of a file; of a gz file a guess."""
        size = self.size(name)
        return self.path_of(name).stat().st_size * _INFLATES if size is None else size

    def head(self, name: str, size: int = 1 << 16) -> bytes:
        """The first bytes of a file, inflated."""
        with self.open(name) as file, reading(self.where(name)):
            return bytes(file.read(size))

    def text(self, name: str, encoding: str = "auto") -> tuple[str, str]:
        """A whole small file, and a note where it is no UTF-8 (`text_lines.encoding_of_texts`)."""
        with self.open(name) as file, reading(self.where(name)):
            data = bytes(file.read())
        chosen = text_lines.encoding_of_texts(io.BytesIO(data), encoding)
        try:
            text = data.decode(chosen)
        except UnicodeError as error:
            raise InputError(
                f"{self.where(name)} is not {chosen}: {error}; state its --encoding"
            ) from error
        return text, "" if chosen == "utf-8-sig" else f"read as {chosen}"

    def beside(self, name: str, basename: str) -> str | None:
        """The file called `basename` in the folder of `name`, if there is one."""
        sibling = (pathlib.PurePosixPath(name).parent / basename).as_posix()
        return sibling if sibling in self.names else None

    def choose(self, accept: Callable[[str], bool], kind: str, wanted: str) -> str:
        """The one name that `accept` takes; `wanted` (--name) settles it between several.

        Raises:
          InputError: none, or several of which `wanted` does not pick exactly one.
        """
        if self.single is not None:
            return self.single
        candidates = [name for name in self.names if accept(name.rsplit("/", 1)[-1])]
        if not candidates:
            held = listing(self.names, 6)
            raise InputError(f"{self.path} holds no {kind}; files found: {held}")
        if len(candidates) > 1 and wanted:
            # A path component, or the file name up to any of its dots, must equal --name.
            hits = [name for name in candidates if wanted in _handles(name)]
            candidates = hits or candidates
        if len(candidates) > 1:
            raise InputError(
                f"{self.path} holds {len(candidates)} candidates: {listing(candidates)}; choose "
                "one with --name=FOLDER or --name=FILE (without its ending)"
            )
        return candidates[0]

    def record(self) -> list[dict[str, Any]]:
        """What the manifest says of the input: names without folders, sizes, SHA-256."""
        if self._zip is not None:
            return [{**_describe(self.path), "members": sorted(set(self._used))}]
        return [_describe(self._root / name) for name in sorted(set(self._used))]


def _handles(name: str) -> set[str]:
    path = pathlib.PurePosixPath(name)
    pieces = path.name.split(".")
    return {*path.parts, *(".".join(pieces[:k]) for k in range(1, len(pieces) + 1))}


def _describe(path: pathlib.Path) -> dict[str, Any]:
    return {"name": printable(path.name), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1].startswith(".")
