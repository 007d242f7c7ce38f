"""How much of a log preparation holds at once, and where it puts the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib

from slgr_jax.config import PrepareConfig
from slgr_jax.data import shards

# Bytes that a row with short ids takes while it is read, indexed, sorted or written.
ROW_BYTES = 200
_LEAST_ROWS = 1000
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")
_MEMINFO = pathlib.Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What preparation may hold.

    Attributes:
      rows: interactions that are in memory at once.
      target, stack: where temporary files go, and what removes them.
    """

    rows: int
    target: pathlib.Path
    stack: contextlib.ExitStack

    @classmethod
    def of(cls, config: PrepareConfig, stack: contextlib.ExitStack) -> Memory:
        """By --memory and --temp_dir; temporary files are removed when `stack` is closed.

        What a process that was killed left there is removed here.
        """
        out = pathlib.Path(config.out).absolute()
        parent = pathlib.Path(config.temp_dir).absolute() if config.temp_dir else out.parent
        target = parent / f"{out.name}.rows"
        shards.remove_leftovers(target)
        size = config.memory * 2**30 or available() / 2
        return cls(max(int(size / ROW_BYTES), _LEAST_ROWS), target, stack)

    def scratch(self) -> pathlib.Path:
        """A new directory for temporary files.

        Raises:
          InputError: it cannot be made.
        """
        return self.stack.enter_context(shards.scratch_directory(self.target))


def available() -> int:
    """Bytes of memory that this process can have now, as far as the system says."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limit = min(limit, int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = min(limit, int(_CGROUP.read_text()))
    return limit
