"""Scripts of benchmarks/speed import one another by plain name, and so do their tests."""

from __future__ import annotations

import pathlib
import sys

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))
