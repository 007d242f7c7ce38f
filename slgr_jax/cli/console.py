"""What the library logs, as plain lines on a terminal, above a progress bar where there is one.

The library logs to `logging.getLogger("slgr_jax")` and prints nothing. A command calls `install`,
which shows these lines as they are: on standard output, warnings on standard error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slgr_jax.training.training_log import TrainingProgress

LOGGER = logging.getLogger("slgr_jax")


class _Lines(logging.Handler):
    """Writes each record as one line; `bar` is the progress bar it must not write into."""

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        if warning:
            line = f"{record.levelname.lower()}: {line}"

        if self.bar is None or self.bar.disable:
            print(line, file=stream, flush=True)
        else:
            self.bar.write(line, file=stream)


_LINES = _Lines(logging.INFO)


def install(*, quiet: bool = False) -> None:
    """Show what the library logs from now on: all of it, or warnings alone."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.propagate = False  # absl's handler on the root logger would show the lines again
    if _LINES not in LOGGER.handlers:
        LOGGER.addHandler(_LINES)


@contextmanager
def progress_bar() -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress callback for `slgr_jax.train` that draws a bar of steps on a terminal.

    Where standard error is a file or a pipe nothing is drawn.
    """
    from tqdm import tqdm

    def show(progress: TrainingProgress) -> None:
        if _LINES.bar is None:
            # disable=None: a bar on a terminal, nothing in a log file.
            _LINES.bar = tqdm(
                total=progress.total, initial=progress.step, unit="step", disable=None, leave=False
            )
        _LINES.bar.update(progress.step - _LINES.bar.n)

    try:
        yield show
    finally:
        if _LINES.bar is not None:
            _LINES.bar.close()
        _LINES.bar = None
