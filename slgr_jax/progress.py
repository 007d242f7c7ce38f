"""Progress bars: one place decides when there is one.

A bar is drawn where a command shows what the library logs (`--verbosity=-1` is quiet, a program
that imports the package is), standard error is a terminal, somebody has waited for two seconds, and
no other bar is open. Of a loop in a loop the outer one is shown; where both count the same, the
inner one moves it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")
DELAY = 2.0  # seconds before a bar is drawn
TICK = 1.0  # seconds between two drawings of a bar that counts what takes minutes
# (unit, bar), the outermost first, which is the one that may be drawn.
_OPEN: list[tuple[str, Any]] = []


@contextlib.contextmanager
def bar(
    total: int | None, unit: str, *, label: str = "", initial: int = 0, scale: bool = False
) -> Iterator[tqdm]:
    """A bar, to be moved by `update`; one that draws nothing is moved likewise.

    Args:
      total: of units; None where it is not known.
      label: what stands before it.
      initial: units that were done before.
      scale: large numbers as k, M, G.
    """
    from tqdm import tqdm

    if _OPEN and _OPEN[-1][0] == unit:
        yield _OPEN[-1][1]
        return
    shown = logging.getLogger("slgr_jax").isEnabledFor(logging.INFO) and not _OPEN
    opened = tqdm(
        total=total,
        unit=unit,
        desc=label or None,
        initial=initial,
        unit_scale=scale,
        delay=DELAY,
        leave=False,
        disable=None if shown else True,  # None: where standard error is no terminal
    )
    entry = unit, opened
    _OPEN.append(entry)
    try:
        yield opened
    finally:
        opened.close()
        _OPEN.remove(entry)


def over(items: Sequence[Item], unit: str, *, label: str = "") -> Iterator[Item]:
    """The items, with a bar that moves as they are taken."""
    with bar(len(items), unit, label=label) as moved:
        for item in items:
            yield item
            moved.update()


def first_ended(
    running: Collection[Future[Item]], opened: tqdm
) -> tuple[set[Future[Item]], set[Future[Item]]]:
    """Wait for one of them: those that have ended, which move the bar, and those that have not.

    Meanwhile the bar's clock goes on: what other processes do may take minutes.
    """
    while True:
        ended, others = wait(running, TICK, FIRST_COMPLETED)
        if ended:
            opened.update(len(ended))
            return ended, others
        if not opened.disable and time.time() - opened.start_t >= DELAY:
            opened.refresh()


def write(line: str, stream: Any) -> None:
    """A line, above the bar where one is drawn."""
    for _, opened in _OPEN:
        if not opened.disable:
            opened.write(line, file=stream)
            return
    print(line, file=stream, flush=True)
