"""Checkpoints: one atomic directory holds all that a run needs to go on, and a list of its files.

A checkpoint has the train state (step, tables with optimiser slots, parameters, optax state) and
the best serving state so far, as Orbax v1 writes them, and a manifest (checkpoint_manifest.py) with
the loop's progress (epoch, counters, partial sums) and every file's checksum. All become visible
together, so neither a kill nor a full disk can leave "best" and "last" at odds. The draws are a
function of (seed, step): there is no iterator to save.

    Orbax writes STEP.partial; the manifest is written into it; STEP.partial is renamed to STEP;
    the checkpoint before it is renamed to OLD.removed, and removed.

A validation that was interrupted is done again at the step where it was, which is then saved again:
STEP makes way before the renaming, and a kill in between leaves a STEP.partial with a manifest,
which is whole, and is put in place when the run goes on.

Of the processes of a job each writes its part of the arrays; the first does all the rest.

Orbax takes half as long to import as JAX: it is, once there is something to restore or to save.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from slgr_jax import cluster, files
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ManifestError, UserError
from slgr_jax.models.scoring import ServingState
from slgr_jax.training import checkpoint_manifest
from slgr_jax.training.checkpoint_manifest import DIRECTORY, ArrayShape
from slgr_jax.training.checkpoint_manifest import Progress as Progress
from slgr_jax.training.state import TrainState

_STATE, _BEST = "state", "best"
_TABLES = f"{_BEST}/values/"  # of a best state, in names of arrays
# What a save that was cut short leaves, in this version (STEP.partial, OLD.removed) and in Orbax.
_LEFTOVER = re.compile(r"\d+\.(partial|removed|orbax-checkpoint-tmp).*")


@contextlib.contextmanager
def _disk_errors(root: pathlib.Path) -> Iterator[None]:
    """TensorStore and the system each word a full disk in their own way; say it in ours."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left on device" not in str(error):
            raise
        raise UserError(
            f"no space left on the disk of {root} for a checkpoint; the one before it, if any, "
            "is kept: free space and give the same command again to resume"
        ) from error


@contextlib.contextmanager
def _damage(checkpoint: pathlib.Path) -> Iterator[None]:
    """Orbax and TensorStore raise whatever class a damaged file leads them to.

    Reads that are still under way when the first one fails meet a closed event loop, at any time
    later; TensorStore reports that through `sys.unraisablehook`, as if it were news.
    """
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = quiet
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        # Orbax drops a coroutine on the way out, of which Python would warn at its end.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        first = error
        while isinstance(cause := first.__cause__ or first.__context__, Exception):
            first = cause  # it says what is wrong with which file, the others where it was met
        reason = " ".join(f"{type(first).__name__}: {first}".split())[:200]
        raise ManifestError(
            f"{checkpoint} cannot be restored ({reason}); put back a copy, or train anew with "
            "--restart"
        ) from error


class Checkpoints:
    """The checkpoints of one run, newest kept; saving never blocks on the disk.

    Args:
      workdir: the run's directory.
      writable: also removes what an interrupted save left behind.
      verify: compare every file's checksum before it is restored; sizes always are.
      may_write: called before a save and before it becomes visible; what it raises stops it.
    """

    def __init__(
        self,
        workdir: str,
        *,
        writable: bool,
        verify: bool = True,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._workdir = workdir
        self._root = root = pathlib.Path(workdir).absolute() / DIRECTORY
        if root.exists() and not root.is_dir():
            raise ManifestError(
                f"{root} is not a directory; remove it, or choose another --workdir"
            )
        if writable and cluster.is_first():
            root.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(root)
        elif not writable and not root.is_dir():
            raise ManifestError(f"{workdir} holds no checkpoints; train first (slgr train)")
        self._verify, self._may_write = verify, may_write
        self._saved: Progress | None = None  # by this object
        self._publisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, best: ServingState, progress: Progress) -> None:
        """Start writing a checkpoint; one of this very progress is left as it is.

        The arrays are copied off the device before this returns, so the state may be donated to
        the next step at once.
        """
        self.wait()
        if progress == (self._saved or self.progress()):
            return
        cluster.together(self._may_write)
        from orbax.checkpoint import v1 as ocp

        trees = {_STATE: state, _BEST: best}
        shapes = array_shapes(trees)
        partial = self._root / f"{progress.step}.partial"
        # Over several processes Orbax compares the directory's name, by a collective.
        with _disk_errors(self._root), jax.transfer_guard("allow"):
            written = ocp.save_checkpointables_async(partial, trees)
        self._pending = self._publisher.submit(self._publish, partial, written, progress, shapes)
        self._saved = progress

    def _publish(
        self, partial: pathlib.Path, written: Any, progress: Progress, shapes: list[ArrayShape]
    ) -> None:
        """List what Orbax has written, make it visible, remove the checkpoints before it."""
        written.result()
        if not cluster.is_first():
            return
        checkpoint_manifest.write(partial, progress, shapes)
        self._may_write()
        earlier = checkpoint_manifest.steps_in(self._root)
        if progress.step in earlier:
            self._remove(progress.step, lambda: partial.rename(self._root / str(progress.step)))
            return
        partial.rename(self._root / str(progress.step))
        files.sync(self._root)
        for step in earlier:
            self._remove(step)

    def _remove(self, step: int, replace: Callable[[], object] = lambda: None) -> None:
        removed = self._root / f"{step}.removed"
        (self._root / str(step)).rename(removed)
        replace()
        files.sync(self._root)
        shutil.rmtree(removed)

    def wait(self) -> None:
        """Wait for the save under way; its error, if any, is raised here."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None

        def finish() -> None:
            with _disk_errors(self._root):
                pending.result()

        cluster.together(finish)

    def progress(self) -> Progress | None:
        """What the newest whole checkpoint says of the loop; None if there is none."""
        manifest = checkpoint_manifest.newest(self._root, checkpoint_manifest.read)
        return None if manifest is None else manifest.progress

    def restore(self, state: TrainState, serving: ServingState) -> tuple[TrainState, ServingState]:
        """The newest checkpoint, laid out as its abstract states say."""
        restored = self._load({_STATE: state, _BEST: serving})
        return restored[_STATE], restored[_BEST]

    def restore_best(self, serving: ServingState) -> ServingState:
        """Only the best serving state of the newest checkpoint."""
        best = self._load({_BEST: serving})[_BEST]
        assert isinstance(best, ServingState)
        return best

    def restore_state(self, state: TrainState) -> TrainState:
        """Only the train state of the newest checkpoint."""
        restored = self._load({_STATE: state})[_STATE]
        assert isinstance(restored, TrainState)
        return restored

    def _load(self, targets: dict[str, Any]) -> dict[str, Any]:
        """The newest checkpoint's trees, laid out as the abstract ones of `targets`.

        Tables of the best state have their rows alone, or as many more as filled them up on the
        devices that trained (`Learner.serves_blocks`): they get what these devices want.
        """
        from orbax.checkpoint import v1 as ocp

        def load(directory: pathlib.Path) -> dict[str, Any]:
            contents = self._verify and cluster.is_first()  # one reads every byte for all
            manifest = checkpoint_manifest.verify(directory, contents=contents)
            restored: dict[str, Any] = {}
            with _damage(directory):
                for name, target in targets.items():
                    context = ocp.Context()
                    if name == _BEST:
                        _check_but_for_rows(manifest.arrays, target)
                        context.array.loading.enable_padding_and_truncation = True
                    with context:
                        restored |= ocp.load_checkpointables(directory, {name: target})
            return restored

        restored = checkpoint_manifest.newest(self._root, load)
        if restored is None:
            raise ManifestError(
                f"{self._workdir} holds no finished checkpoint; train first (slgr train)"
            )
        return restored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the newest checkpoint's state, by its path.

        Raises:
          ManifestError: there is none, or it is damaged.
        """
        manifest = checkpoint_manifest.newest(self._root, checkpoint_manifest.read)
        if manifest is None:
            raise ManifestError(
                f"{self._workdir} holds no finished checkpoint; train first (slgr train)"
            )
        prefix = f"{_STATE}/"
        return {
            array.name.removeprefix(prefix): array.shape
            for array in manifest.arrays
            if array.name.startswith(prefix)
        }

    def close(self) -> None:
        """Wait for the save under way and release the background thread."""
        try:
            self.wait()
        finally:
            self._publisher.shutdown()


def _check_but_for_rows(saved: Sequence[ArrayShape], best: ServingState) -> None:
    """Refuse a best state of other shapes, but for how many rows its tables have.

    Raises:
      ValueError: as Orbax does where it neither fills up nor cuts off.
    """
    shapes = {array.name: array.shape for array in saved}
    for array in array_shapes({_BEST: best}):
        shape, is_table = shapes.get(array.name, array.shape), array.name.startswith(_TABLES)
        if shape[is_table:] != array.shape[is_table:]:
            raise ValueError(f"{array.name} is {list(shape)}, expected {list(array.shape)}")


def array_shapes(trees: Mapping[str, Any]) -> list[ArrayShape]:
    """Name (`tables/user`), shape and type of every array of what is saved."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(trees))
    return [
        ArrayShape(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(leaf.shape),
            str(leaf.dtype),
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf in leaves
    ]


def _clear_leftovers(root: pathlib.Path) -> None:
    """Finish what a save that was cut short had begun to put in place; remove the rest."""
    for path in root.iterdir():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        step = root / path.name.partition(".")[0]
        whole = path.suffix == ".partial" and (path / MANIFEST).is_file()
        if whole and not step.exists() and (root / f"{step.name}.removed").exists():
            path.rename(step)
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remembered(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """`Learner.remembered` of a saved state, by the shapes of its arrays."""
    return shapes.get("rings/times", (0,))[0]


def exists(workdir: str) -> bool:
    """Whether a run has a finished checkpoint."""
    return bool(checkpoint_manifest.steps_in(pathlib.Path(workdir) / DIRECTORY))


def clear(workdir: str) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(os.path.join(workdir, DIRECTORY), ignore_errors=True)
