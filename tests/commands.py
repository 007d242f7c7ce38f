"""Launch scripts as processes, as a user runs them."""

from __future__ import annotations

import pathlib
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parents[1]


def launch_train(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`python launch/train.py ...`, run to its end."""
    return subprocess.run(
        [sys.executable, str(REPO / "launch" / "train.py"), *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )
