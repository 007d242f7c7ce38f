"""What a command is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `slgr`.

    Attributes:
      usage: the docstring of its module: what `--help` shows first; the first line is its summary.
      run: parses `sys.argv` and does the work.
    """

    usage: str
    run: Callable[[], None]

    @property
    def summary(self) -> str:
        """The first line of `usage`."""
        return self.usage.strip().splitlines()[0]
