"""What the library logs, as plain lines on a terminal, above a progress bar where there is one.

The library logs to `logging.getLogger("slgr_jax")` and prints nothing. A command calls `install`,
which shows these lines as they are: on standard output, warnings on standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from slgr_jax import progress

if TYPE_CHECKING:
    from tqdm import tqdm

    from slgr_jax.training.training_log import TrainingProgress

LOGGER = logging.getLogger("slgr_jax")


class _Lines(logging.Handler):
    """Writes each record as one line, not into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        if warning:
            line = f"{record.levelname.lower()}: {line}"
        progress.write(line, stream)


_LINES = _Lines(logging.INFO)


def install(*, quiet: bool = False) -> None:
    """Show what the library logs from now on: all of it, or warnings alone."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.propagate = False  # absl's handler on the root logger would show the lines again
    if _LINES not in LOGGER.handlers:
        LOGGER.addHandler(_LINES)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress callback for `slgr_jax.train` that draws a bar of steps on a terminal.

    Where standard error is a file or a pipe nothing is drawn.
    """
    with contextlib.ExitStack() as stack:
        bars: list[tqdm] = []

        def show(done: TrainingProgress) -> None:
            if not bars:
                bar = progress.bar(done.total, "step", initial=done.step)
                bars.append(stack.enter_context(bar))
            bars[0].update(done.step - bars[0].n)

        yield show
