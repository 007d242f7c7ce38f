"""What a run says while it trains: JSONL always, TensorBoard on request, a bar on a terminal.

`RUN/log.jsonl` has one object a validation, with its step. A resumed run first drops the
lines past its checkpoint, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from slgr_jax.errors import ConfigError

LOG = "log.jsonl"


class TrainingLog:
    """Writes one run's records.

    Args:
      workdir: the run's directory.
      step: steps already done, for the progress bar and TensorBoard.
      epoch: epochs whose validation is done; records past them are dropped, also that of a
        validation which was logged before its checkpoint could be written.
      total: steps at most, for the progress bar.
      tensorboard: also write `RUN/tensorboard`.
    """

    def __init__(
        self, workdir: str, *, step: int, epoch: int, total: int, tensorboard: bool
    ) -> None:
        self._path = pathlib.Path(workdir) / LOG
        self._keep_until(epoch)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        # disable=None: a bar on a terminal, nothing in a log file.
        self._bar = tqdm(total=total, initial=step, unit="step", disable=None, leave=False)
        self._scalars: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "--tensorboard needs the extra: pip install 'slgr_jax[tensorboard]'"
                ) from error
            self._scalars = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step)

    def _keep_until(self, epoch: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            at = _epoch_of(line)
            if at is None or at > epoch:
                break
            kept.append(line + "\n")
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self._path)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def record(self, step: int, values: dict[str, float | int], line: str) -> None:
        """Append one object to the log and show `line`."""
        stamped = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(stamped) + "\n")
        self._file.flush()
        self.say(line)
        if self._scalars is not None:
            for name, value in values.items():
                self._scalars.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """Show one line, above the bar where there is one."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()
        if self._scalars is not None:
            self._scalars.close()


def _epoch_of(line: str) -> int | None:
    """The epoch of a record; None where there is none: the line a kill or a full disk cut short."""
    try:
        found = json.loads(line)["epoch"]
    except (json.JSONDecodeError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) else None
