"""Runs that have begun, for tests that look at what a backbone computes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib


def after_three_steps(run: RunConfig, data: Dataset) -> tuple[Any, Any]:
    """A run and its state after three steps, in which every dense parameter moved."""
    experiment = build.build(run, data)
    state = state_lib.init_state(experiment.trainer, 0)
    begun = jax.tree.map(np.asarray, state.params["backbone"])
    key = jax.random.key_data(jax.random.key(1))
    state, _, health = step.make_run_steps(experiment.trainer)(
        state, experiment.arrays, key, np.int32(3)
    )
    assert int(health.step) == -1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), begun, state.params["backbone"])
    assert min(jax.tree.leaves(moved)) > 0
    return experiment, state
