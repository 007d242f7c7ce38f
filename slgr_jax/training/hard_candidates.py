"""What a trained run would have an LLM asked about: its best items, those it is unsure of, and
those that it takes for noise whatever it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slgr_jax.config import CandidateConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import full_ranking
from slgr_jax.training import checkpoint, dropping, edited, restore, run_directory
from slgr_jax.training.restore import RestoredRun
from slgr_jax.training.state import abstract_state, rings_of


def propose(dataset: Dataset, options: CandidateConfig) -> dict[str, Csr]:
    """By reason the unseen items [U] of each user with training items.

    hard_top are the `hard_top` items that the run at `options.run` ranks first, hard_uncertain
    those whose sigma(score) is nearest 1/2; doubtful see `doubtful`. A reason of size 0 is left
    out.

    Raises:
      ConfigError: the run is of another split or id map than `dataset`, or as of `doubtful`.
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
    if options.doubtful:
        proposed["doubtful"] = doubtful(run, dataset, options)
    return proposed


def doubtful(run: RestoredRun, dataset: Dataset, options: CandidateConfig) -> Csr:
    """The items [U], training items among them, that an LLM is to be asked about anew.

    Of the pairs that the run remembers (`score_rings`), has m scores of and dropped at least
    `doubtful_drops` times: of each user the `doubtful` whose scores vary least (LLMHD's preference
    updating, arXiv 2409.10343).

    Args:
      run: restored from `options.run`.

    Raises:
      ConfigError: it remembers none, or the product that says which is another one now.
    """
    given = f"--doubtful={options.doubtful}: --run={options.run}"
    if not run.config.hardness.filters:
        raise ConfigError(
            f"{given} remembers no scores; train it with --keep_hard=NAME "
            "--hard_variance_share=0.5, or drop --doubtful"
        )
    record = run_directory.read_record(options.run)
    if changed := edited.changed(run.config, dataset, record):
        raise ConfigError(f"{given} remembers pairs of that product ({changed}); put it back")
    pairs = dropping.Scores(run.config, dataset).pairs()
    learner = dataclasses.replace(run.learner, remembered=pairs.users.size)
    saved = checkpoint.Checkpoints(options.run, writable=False)
    try:
        rings = rings_of(saved.restore_state(abstract_state(learner)))
    finally:
        saved.close()
    assert rings is not None
    times, drops, scores = jax.device_get((rings.times, rings.dropped, rings.scores))
    wanted = (times >= scores.shape[1]) & (drops >= options.doubtful_drops)
    at = np.flatnonzero(wanted)
    at = at[np.lexsort((scores[at].var(axis=1), pairs.users[at]))]
    place = np.arange(at.size) - np.searchsorted(pairs.users[at], pairs.users[at], side="left")
    at = at[place < options.doubtful]
    return Csr.from_pairs(pairs.users[at], pairs.items[at], dataset.n_users)
