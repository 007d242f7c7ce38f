"""Evaluated runs on disk, made up."""

from __future__ import annotations

import pytest
from comparisons import SEEDS, write_run


@pytest.fixture
def written(tmp_path):
    """(runs, values) of three arms: (backbone, arm) -> directories, -> seeds of user values."""
    runs, values = {}, {}
    for backbone, clicks in (("mf", False), ("dcnv2", True)):
        for arm, gain in (("none", 0.0), ("global", 0.02), ("paper", 0.15)):
            dirs = [tmp_path / f"{backbone}_{arm}_{seed}" for seed in range(SEEDS)]
            runs[backbone, arm] = dirs
            values[backbone, arm] = [
                write_run(root, seed, gain, clicks=clicks) for seed, root in enumerate(dirs)
            ]
    return runs, values
