"""What a trained run would have an LLM asked about: its best items, and those it is unsure of."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from slgr_jax.config import CandidateConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import full_ranking
from slgr_jax.training import restore


def propose(dataset: Dataset, options: CandidateConfig) -> dict[str, Csr]:
    """By reason the unseen items [U] of each user with training items.

    hard_top are the `hard_top` items that the run at `options.run` ranks first, hard_uncertain
    those whose sigma(score) is nearest 1/2. A reason of size 0 is left out.

    Raises:
      ConfigError: the run is of another split or id map than `dataset`.
    """
    run = restore.restore_run(options.run)
    if run.config.train.refit:
        raise ConfigError(
            f"--run={options.run} is a refit, which has learned validation: what it proposes would "
            f"show that to the LLM; name the run that it refits, {run.config.train.refit}"
        )
    for name in ("id_map_hash", "split_hash"):
        of_run, of_data = getattr(run.dataset.manifest, name), getattr(dataset.manifest, name)
        if of_run != of_data:
            raise ConfigError(
                f"--run={options.run} was trained on {run.dataset.path} ({name} {of_run[:8]}), "
                f"{dataset.path} has {of_data[:8]}; give a run of this dataset"
            )

    def least_sure(scoring: Any, users: Any) -> Any:
        return -jnp.abs(run.score_users(scoring, users))

    seen, scoring = dataset.positives(("train",)), run.scoring("valid")
    proposed = {}
    for reason, score, size in (
        ("hard_top", run.score_users, options.hard_top),
        ("hard_uncertain", least_sure, options.hard_uncertain),
    ):
        if not size:
            continue
        best = full_ranking.top_k(
            score,
            scoring,
            np.flatnonzero(seen.counts),
            seen,
            dataset.n_items,
            k=size,
            users_per_chunk=run.config.evaluation.eval_users_per_chunk,
            mesh=run.mesh,
            kernels=run.config.train.kernels,
        )
        users = np.repeat(best.users, best.items.shape[1])
        items = best.items.ravel()
        real = np.isfinite(best.scores).ravel() & (items >= 0)
        proposed[reason] = Csr.from_pairs(users[real], items[real], dataset.n_users)
    return proposed
