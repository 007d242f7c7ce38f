"""Checkpoints: one atomic Orbax v1 directory holds all that a run needs to go on.

A checkpoint has the train state (step, tables with optimiser slots, parameters, optax state),
the best serving state so far, and the loop's progress (epoch, counters, partial sums) as
JSON. All three become visible together, so neither a kill nor a full disk can leave "best"
and "last" at odds. The draws are a function of (seed, step): there is no iterator to save.

Orbax takes half as long to import as JAX: it is, once there is something to restore or to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from slgr_jax.errors import ManifestError, UserError
from slgr_jax.models.scoring import ServingState
from slgr_jax.training.state import TrainState

DIRECTORY = "checkpoints"
_STATE, _BEST = "state", "best"


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
    """

    def __init__(self, workdir: str, *, writable: bool) -> None:
        self._workdir = workdir
        self._root = root = pathlib.Path(workdir).absolute() / DIRECTORY
        if root.exists() and not root.is_dir():
            raise ManifestError(
                f"{root} is not a directory; remove it, or choose another --workdir"
            )
        if writable:
            root.mkdir(parents=True, exist_ok=True)
        elif not root.is_dir():
            raise ManifestError(f"{workdir} holds no checkpoints; train first (slgr train)")
        self._writable = writable
        self._pending: Any = None

    @functools.cached_property
    def _checkpointer(self) -> Any:
        from orbax.checkpoint import v1 as ocp

        return ocp.training.Checkpointer(
            self._root,
            preservation_policy=ocp.training.preservation_policies.LatestN(1),
            cleanup_tmp_directories=self._writable,
        )

    def save(self, state: TrainState, best: ServingState, progress: Progress) -> None:
        """Start writing a checkpoint; a checkpoint of this very step is left as it is.

        Orbax replaces a step by deleting it first, and a kill in between would lose it. The loop
        therefore saves a step once, with all that belongs to it. The arrays are copied off the
        device before this returns, so the state may be donated to the next step at once.
        """
        self.wait()
        latest = self._checkpointer.latest
        if latest is not None and latest.step == progress.step:
            return
        with _disk_errors(self._root):
            self._pending = self._checkpointer.save_checkpointables_async(
                progress.step,
                {_STATE: state, _BEST: best},
                force=True,
                custom_metadata={"progress": json.dumps(dataclasses.asdict(progress))},
            )

    def wait(self) -> None:
        """Wait for the save under way; its error, if any, is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with _disk_errors(self._root):
                pending.result()

    def progress(self) -> Progress | None:
        """What the newest whole checkpoint says of the loop; None if there is none."""
        if not any(self._root.iterdir()):
            return None
        latest = self._checkpointer.latest
        if latest is None:
            return None
        with _damage(self._root / str(latest.step)):
            metadata = self._checkpointer.checkpointables_metadata(latest.step).custom_metadata
            return Progress(**json.loads(metadata["progress"]))

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
        latest = self._latest()
        try:
            with _damage(self._root / str(latest.step)):
                restored = self._checkpointer.load_checkpointables(latest.step, targets)
        except ManifestError:
            # A run that still trains replaces its checkpoint: take the one after it.
            if self._writable or self._newest_step() <= latest.step:
                raise
            self._checkpointer.close()
            del self._checkpointer
            return self._load(targets)
        assert isinstance(restored, dict)
        return restored

    def _latest(self) -> Any:
        latest = self._checkpointer.latest
        if latest is None:
            raise ManifestError(
                f"{self._workdir} holds no finished checkpoint; train first (slgr train)"
            )
        return latest

    def _newest_step(self) -> int:
        """The step of the newest finished checkpoint on disk; -1 without one."""
        return max(steps_in(self._root), default=-1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the newest checkpoint's state, by its path.

        Raises:
          ManifestError: there is none, or it is damaged.
        """
        latest = self._latest()
        with _damage(self._root / str(latest.step)):
            saved = self._checkpointer.checkpointables_metadata(latest.step).metadata[_STATE]
            return shapes_by_path(saved, lambda leaf: tuple(leaf.shape))

    def close(self) -> None:
        """Wait for the save under way and release the background threads."""
        self.wait()
        self._checkpointer.close()


def shapes_by_path(
    tree: Any, shape_of: Callable[[Any], tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """`tables/user` and so on -> shape, of the leaves of nested dictionaries and lists."""
    if isinstance(tree, dict):
        branches = [(str(name), branch) for name, branch in tree.items()]
    elif isinstance(tree, list | tuple):
        branches = [(str(place), branch) for place, branch in enumerate(tree)]
    else:
        return {} if tree is None else {"": shape_of(tree)}
    shapes = {}
    for name, branch in branches:
        for path, shape in shapes_by_path(branch, shape_of).items():
            shapes[f"{name}/{path}".rstrip("/")] = shape
    return shapes


def steps_in(root: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints under RUN/checkpoints."""
    return [int(path.name) for path in root.glob("*") if path.name.isdigit()]


def exists(workdir: str) -> bool:
    """Whether a run has a finished checkpoint."""
    return bool(steps_in(pathlib.Path(workdir) / DIRECTORY))


def clear(workdir: str) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(os.path.join(workdir, DIRECTORY), ignore_errors=True)
