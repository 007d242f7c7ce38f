"""Evaluated runs of random scores, for tests of what is written and printed of them."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import worlds

from slgr_jax.config import EvaluationConfig, SliceConfig
from slgr_jax.evaluation import full_ranking
from slgr_jax.evaluation.results import EvaluatedRun


def _score(state: jax.Array, users: jax.Array) -> jax.Array:
    return state[users]


def random_runs(path: pathlib.Path, names: tuple[str, ...], **options: Any) -> list[EvaluatedRun]:
    """Runs of random scores on one world; a later run is closer to the truth."""
    dataset = worlds.random_dataset(path / "data", n_users=60, n_items=40, per_user=15)
    config = worlds.run_config(
        dataset,
        path,
        slices=SliceConfig(history_bins=(5, 10), popularity_bins=(10, 20)),
        evaluation=EvaluationConfig(ks=(5, 10), **options),
    )
    truth = np.zeros((60, 40), np.float32)
    truth[dataset.test.users, dataset.test.items] = 1
    truth[dataset.valid.users, dataset.valid.items] = 1
    out = []
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).normal(size=truth.shape).astype(np.float32)
        state = jax.device_put(noise + i * truth)
        parts = full_ranking.evaluate_dataset(
            _score, state, dataset, config.slices, config.evaluation
        )
        workdir = str(path / name)
        out.append(EvaluatedRun(workdir, name, config, dataset, "best", parts))
    return out
