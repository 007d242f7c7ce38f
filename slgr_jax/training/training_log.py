"""What a run says while it trains: JSONL always, trackers on request, lines through `logging`.

`RUN/log.jsonl` has one object a validation, with its step. A resumed run first drops the
lines past its checkpoint, so the file reads as if nothing had happened.

Lines for people go to the logger `slgr_jax.training.training_log` at level INFO: a command shows
them, a program that uses the library decides for itself. How far a run is, is told to the callback
that `listening` names.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from slgr_jax import json_files
from slgr_jax.files import write_atomically
from slgr_jax.training.tracking import Trackers

LOG = "log.jsonl"
LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingProgress:
    """How far a run is.

    Attributes:
      workdir: the run's directory.
      step, total: steps done, and steps at most (early stopping may end the run before).
      metrics: what `log.jsonl` records of the validation that has just ended: `epoch`,
        `train/loss`, `valid/ndcg@10`, ...; empty between two validations.
    """

    workdir: str
    step: int
    total: int
    metrics: Mapping[str, float | int] = dataclasses.field(default_factory=dict)


# Whom the runs of this context tell how far they are.
_LISTENER: ContextVar[Callable[[TrainingProgress], None] | None] = ContextVar(
    "slgr_jax_training_listener", default=None
)


@contextmanager
def listening(callback: Callable[[TrainingProgress], None] | None) -> Iterator[None]:
    """Call `callback` whenever a run that trains within this context has come further.

    It is called after every dispatch and every validation. What it raises ends training; the last
    checkpoint stays.
    """
    token = _LISTENER.set(callback)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def lines_to(stream: io.TextIOBase) -> Iterator[None]:
    """Within this context, what the library logs goes to `stream` alone."""
    logger = logging.getLogger("slgr_jax")
    before = (logger.handlers, logger.level, logger.propagate)
    logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


class TrainingLog:
    """Writes one run's records.

    Args:
      workdir: the run's directory.
      epoch: epochs whose validation is done; records past them are dropped, also that of a
        validation which was logged before its checkpoint could be written.
      total: steps at most, for the progress callback.
      trackers: told what the file holds, also of records that are kept and they missed.
      silent: write and log nothing: another process of the job does.
    """

    def __init__(
        self,
        workdir: str,
        *,
        epoch: int,
        total: int,
        trackers: Trackers | None = None,
        silent: bool = False,
    ) -> None:
        self._workdir, self._total = workdir, total
        self._path = pathlib.Path(os.devnull) if silent else pathlib.Path(workdir) / LOG
        self._silent = silent
        self._trackers, self._status = trackers, "failed"
        for record in self._keep_until(epoch):
            self._track(record["step"], record)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._listener = _LISTENER.get()

    def _keep_until(self, epoch: int) -> list[dict[str, Any]]:
        """Drop the records past an epoch; those that stay."""
        if self._silent or not self._path.exists():
            return []
        kept, records = [], []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            recorded = _epoch_of(line)
            if recorded is None or recorded > epoch:
                break
            kept.append(line + "\n")
            records.append(json.loads(line))

        write_atomically(self._path, "".join(kept))
        return records

    def _track(self, step: int, values: Mapping[str, float | int]) -> None:
        if self._trackers is not None:
            self._trackers.record(step, values)

    def advance(self, step: int) -> None:
        """Tell the listener that `step` steps are done."""
        self._tell(TrainingProgress(self._workdir, step, self._total))

    def record(self, step: int, values: Mapping[str, float | int], line: str) -> None:
        """Append one object to the log file and log `line`."""
        stamped = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(stamped) + "\n")
        self._file.flush()

        self.say(line)
        self._track(step, values)
        self._tell(TrainingProgress(self._workdir, step, self._total, dict(values)))

    def say(self, line: str) -> None:
        """Log one line for people."""
        if not self._silent:
            LOGGER.info("%s", line)

    def end(self, status: str) -> None:
        """Note how the run ended, for the trackers: finished or interrupted."""
        self._status = status

    def _tell(self, progress: TrainingProgress) -> None:
        if self._listener is not None:
            self._listener(progress)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close("failed" if kind is not None else self._status)


def _epoch_of(line: str) -> int | None:
    """The epoch of a record; None where there is none: the line a kill or a full disk cut short."""
    try:
        epoch = json_files.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return None
    return epoch if isinstance(epoch, int) else None
