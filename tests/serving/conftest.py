"""Runs of a family each, trained once for the tests of what is served."""

from __future__ import annotations

import functools

import pytest
import worlds

from slgr_jax import serving
from slgr_jax.config import make_run
from slgr_jax.training import loop

N_USERS, N_ITEMS = 24, 30


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A dataset with times and categories: users u0 .. u23, items i0 .. i29."""
    path = tmp_path_factory.mktemp("served") / "d"
    return worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, timed=True, categories=3)


@pytest.fixture(scope="session")
def trained(small_data, tmp_path_factory):
    """backbone -> its run, trained when it is first asked for."""

    @functools.cache
    def run_of(backbone: str) -> serving.TrainedRun:
        workdir = str(tmp_path_factory.mktemp(backbone))
        knobs = {"dim": 8, "epochs": 1, "batch_size": 32, "patience": 0}
        loop.train(make_run(str(small_data.path), workdir, backbone=backbone, **knobs))
        return serving.load(workdir)

    return run_of
