"""`slgr serve` as a process, for tests that need a real server."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

REPO = pathlib.Path(__file__).resolve().parents[1]
SERVE = (sys.executable, "-m", "slgr_jax.cli", "serve")


@contextlib.contextmanager
def started(workdir: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of a server on a free port that is ready; killed at the end."""
    process = subprocess.Popen(
        [*SERVE, f"--workdir={workdir}", "--port=0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    address = None
    try:
        for line in process.stdout:
            address = address or re.search(r" at (http://127\.0\.0\.1:\d+);", line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError(process.communicate())
        assert address is not None
        yield address[1], process
    finally:
        process.kill()
        process.communicate()
