"""A small world whose teacher lists items best first, and what guidances of lists draw of it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import worlds

from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products import preferences
from slgr_jax.training import step
from slgr_jax.training.build import Experiment, build

N_USERS, N_ITEMS = 24, 30


def listing_dataset(
    path: pathlib.Path, *, unlisted: str = "below", lengths: Sequence[int] = (6, 3, 0)
) -> Dataset:
    """User u has a list `t` of `lengths[u % 3]` items with scores that fall along it."""
    dataset = worlds.random_dataset(
        path, n_users=N_USERS, n_items=N_ITEMS, timed=True, categories=3
    )
    rng = np.random.default_rng(0)
    lines = ["user,item,score"]
    for user in range(N_USERS):
        items = rng.choice(N_ITEMS, lengths[user % 3], replace=False)
        lines += [f"u{user},i{item},{1.0 - 0.1 * rank}" for rank, item in enumerate(items)]
    (path / "scores.csv").write_text("\n".join(lines) + "\n")
    provenance = preferences.Provenance(unlisted=unlisted)
    preferences.import_scores(
        dataset, path / "scores.csv", "t", provenance=provenance, keep_training_items=True
    )
    return dataset


def experiment(dataset: Dataset, workdir: pathlib.Path, **knobs: Any) -> Experiment:
    """A small run that learns `t`, on one device."""
    common: dict[str, Any] = {"teacher": "t", "batch_size": 32, "dim": 8, "epochs": 2}
    run = make_run(str(dataset.path), str(workdir), **common | {"lambda": 0.3} | knobs)
    return build(run, dataset, worlds.one_device())


def draws_of(experiment: Experiment, steps: int = 1, seed: int = 0) -> Any:
    """What the guidance draws for so many steps, on the host."""
    keys = jax.random.split(jax.random.key(seed), steps)
    draw = jax.jit(lambda keys, arrays: step.draw_steps(experiment.trainer, keys, arrays)[1])
    return jax.device_get(draw(keys, experiment.arrays))
