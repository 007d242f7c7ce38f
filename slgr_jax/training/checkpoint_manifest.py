"""What a checkpoint directory holds: RUN/checkpoints/STEP/manifest.json.

It says how far the loop was, which arrays there are, and the size and the XXH3-128 of every other
file, so that a byte which changed anywhere is named and never trained on or served. It is written
last: a directory without one is no checkpoint. XXH3 costs about a hundredth of what writing the
arrays does (benchmarks/LOG.md); it tells damage, not malice.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import xxhash

from slgr_jax import files
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ManifestError, listing, printable

FORMAT, VERSION = "slgr_jax.checkpoint", 1
DIRECTORY = "checkpoints"
_FIX = "put back a copy of {}, or train anew with --restart"
_BLOCK_BYTES = 1 << 20
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the loop stands; plain numbers, saved with the state.

    Attributes:
      step: steps done.
      epoch: whole epochs done.
      sums: sums of metrics since the last validation.
      best_metric, best_epoch: the best validation so far; epoch 0 is the initial state.
      stale: validations since then.
    """

    step: int = 0
    epoch: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best_metric: float | None = None
    best_epoch: int = 0
    stale: int = 0


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """An array as it was saved; `name` is its path in the saved tree, `best/values/user`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """A file of a checkpoint; `path` is relative to its directory."""

    path: str
    bytes: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True)
class CheckpointManifest:
    """See the module's docstring. `checksum` is the XXH3-128 of everything else."""

    progress: Progress
    arrays: tuple[ArrayShape, ...]
    files: tuple[ListedFile, ...]
    checksum: str = ""
    format: str = FORMAT
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Of all files, itself left out."""
        return sum(file.bytes for file in self.files)


def write(
    directory: pathlib.Path, progress: Progress, arrays: Sequence[ArrayShape]
) -> CheckpointManifest:
    """List the files of a directory in its manifest, flushed to disk.

    Raises:
      OSError: a file cannot be read, or the disk is full.
    """
    listed = [
        ListedFile(path, (directory / path).stat().st_size, _xxh3_128(directory / path))
        for path in sorted(_paths_in(directory))
    ]
    manifest = CheckpointManifest(progress, tuple(arrays), tuple(listed))
    manifest = dataclasses.replace(manifest, checksum=_checksum(manifest))
    files.write_atomically(directory / MANIFEST, _text(manifest), durable=True)
    return manifest


def read(directory: pathlib.Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
      ManifestError: there is none, as in a run of an earlier version, or a byte of it changed.
    """
    path, fix = directory / MANIFEST, _FIX.format(directory)
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(
            f"{directory} holds no {MANIFEST}: an earlier version wrote it, or the file was "
            f"removed, and damage could not be told; {fix}"
        ) from error
    try:
        raw = json.loads(text)
        arrays = (ArrayShape(**x | {"shape": tuple(x["shape"])}) for x in raw["arrays"])
        read_back = {
            "progress": Progress(**raw["progress"]),
            "arrays": tuple(arrays),
            "files": tuple(ListedFile(**file) for file in raw["files"]),
        }
        manifest = CheckpointManifest(**raw | read_back)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ManifestError(f"{path} is damaged ({reason[:100]}); {fix}") from error

    computed = _checksum(manifest)
    if computed != manifest.checksum:
        raise ManifestError(
            f"{path} is damaged (its XXH3 is {computed[:12]}, it states "
            f"{printable(str(manifest.checksum))[:12]}); {fix}"
        )
    if text != _text(manifest).encode():
        raise ManifestError(f"{path} is damaged (a byte between its values changed); {fix}")
    if (manifest.format, manifest.version) != (FORMAT, VERSION):
        raise ManifestError(
            f"{path} is {manifest.format} {manifest.version}, this code reads {FORMAT} {VERSION}; "
            "train anew with --restart"
        )
    return manifest


def faults(
    directory: pathlib.Path, manifest: CheckpointManifest, *, contents: bool = True
) -> Iterator[str]:
    """What is wrong with which file of a checkpoint; nothing where it is whole.

    Args:
      contents: also read every file, to compare its checksum.
    """
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file():
            yield f"{path} is missing; {MANIFEST} lists it with {file.bytes} bytes"
        elif (size := path.stat().st_size) != file.bytes:
            yield f"{path} has {size} bytes, {MANIFEST} lists {file.bytes}"
        elif contents and (computed := _xxh3_128(path)) != file.xxh3_128:
            yield (
                f"{path} is damaged: its XXH3 is {computed[:12]}, {MANIFEST} lists "
                f"{file.xxh3_128[:12]}"
            )
    listed = {file.path for file in manifest.files}
    for extra in sorted(set(_paths_in(directory)) - listed):
        yield f"{directory / extra} is not in {MANIFEST}; remove it"


def verify(directory: pathlib.Path, *, contents: bool = True) -> CheckpointManifest:
    """The manifest of a checkpoint, whose files are those that it lists.

    Raises:
      ManifestError: files are missing, cut, altered or added; it names the first three.
    """
    manifest = read(directory)
    try:
        found = list(faults(directory, manifest, contents=contents))
    except OSError as error:  # it went between two looks: a run that trains replaced it
        found = [f"{error.filename or directory} cannot be read ({error.strerror})"]
    if found:
        raise ManifestError(f"{listing(found, 3)}; {_FIX.format(directory)}")
    return manifest


def steps_in(root: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints under RUN/checkpoints."""
    return [int(path.name) for path in root.glob("*") if path.name.isdecimal()]


def newest(root: pathlib.Path, use: Callable[[pathlib.Path], Result]) -> Result | None:
    """`use` of the newest checkpoint's directory; None without one.

    A run that still trains replaces its checkpoint: where that is why `use` failed, the one after
    it is taken.

    Raises:
      ManifestError: of `use`.
    """
    while steps := steps_in(root):
        try:
            return use(root / str(max(steps)))
        except ManifestError:
            if max(steps_in(root), default=-1) <= max(steps):
                raise
    return None


def progress_of(workdir: str | os.PathLike[str]) -> Progress | None:
    """How far the newest checkpoint of a run is; None where there is none."""
    manifest = newest(pathlib.Path(workdir) / DIRECTORY, read)
    return None if manifest is None else manifest.progress


def _paths_in(directory: pathlib.Path) -> Iterator[str]:
    """The files below a checkpoint's directory but its manifest, relative to it."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), directory)
            if path != MANIFEST:
                yield path


def _xxh3_128(path: pathlib.Path) -> str:
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _checksum(manifest: CheckpointManifest) -> str:
    plain = {
        name: value for name, value in dataclasses.asdict(manifest).items() if name != "checksum"
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _text(manifest: CheckpointManifest) -> str:
    return json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
