"""Teachers that cost nothing: the lists of a recommender as a product, and as controls of an LLM's.

A list holds the L best items of the catalogue outside the user's training items; every other item
ranks below it, as with an LLM that writes its recommendations freely. Of a dataset in which
validation has joined training it is fitted on both, with the setting that validation chose.

Shape letters: U users, I items, B users of a chunk, L length of a list.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pyarrow as pa

from slgr_jax.config import BaselineConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import baselines, full_ranking
from slgr_jax.evaluation.baselines import Fitted
from slgr_jax.evaluation.device_scoring import ScoreUsers
from slgr_jax.teacher.products import controls, preferences
from slgr_jax.teacher.products.same_split import seen_in


def host_scores(fitted: Fitted) -> controls.ScoreUsers:
    """The scores of a fitted recommender as NumPy arrays: users [B] -> [B, I]."""
    score = jax.jit(fitted.score_users)

    def scores(users: np.ndarray) -> np.ndarray:
        return np.asarray(score(fitted.state, users.astype(np.int32)))

    return scores


def fit_control(dataset: Dataset, name: str) -> controls.ScoreUsers:
    """The scores of a baseline, fitted on train and tuned on validation: `controls.Fit`.

    Raises:
      ConfigError: it cannot be fitted: a package is missing, or memory.
    """
    baseline = baselines.make_baseline(name, BaselineConfig())
    return host_scores(baselines.tune(baseline, dataset).fitted)


def ensure_control(dataset: Dataset, name: str, control: str, *, seed: int = 0) -> str:
    """`controls.ensure`, with recommenders fitted where a control needs one."""
    return controls.ensure(
        dataset, name, control, seed=seed, fit=lambda which: fit_control(dataset, which)
    )


def write(
    dataset: Dataset,
    common: TeachConfig,
    score_users: ScoreUsers,
    state: Any,
    *,
    length: int,
    model: str,
    built_from: str = "train_only",
) -> schema.TeacherManifest:
    """Write DATA/teacher/NAME: each user's `length` best items outside training.

    A list of which all scores are equal says nothing, and is left out: of users without a history,
    mostly.

    Args:
      score_users, state: as for `full_ranking.top_k`, at the moment of validation.
      model: what the manifest says of itself.
      built_from: what the recommender has seen, one of `schema.BUILT_FROM`.

    Raises:
      InputError: the product is there, without --overwrite.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    top = full_ranking.top_k(
        score_users,
        state,
        np.arange(dataset.n_users, dtype=np.int32),
        dataset.positives(("train",)),
        dataset.n_items,
        k=length,
    )
    listed = top.items >= 0
    listed &= (top.scores != top.scores[:, :1]).any(axis=1, keepdims=True)
    users = np.repeat(top.users, listed.sum(axis=1))
    columns = [users.astype(np.int32), top.items[listed], top.scores[listed]]
    return preferences.write_product(
        dataset,
        common.name,
        pa.table(columns, schema=schema.TEACHER_SCORES),
        provenance=preferences.Provenance(
            built_from=built_from,
            unlisted="below",
            training_items="none",
            model=model,
            score_kind=f"score, best {length}",
        ),
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def from_baseline(
    dataset: Dataset, common: TeachConfig, name: str, length: int, options: BaselineConfig
) -> schema.TeacherManifest:
    """The lists of a baseline, fitted on train and tuned on validation, as DATA/teacher/NAME.

    Args:
      name: one of `config.BASELINES`.
      length: L.
      options: its grid.

    Raises:
      ConfigError: it cannot be fitted.
      InputError: the product is there, without --overwrite.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    fitted, settings, _ = baselines.tune(baselines.make_baseline(name, options), dataset)
    text = ", ".join(f"{key} {value:g}" for key, value in settings.items())
    return write(
        dataset,
        common,
        fitted.score_users,
        fitted.state,
        length=length,
        model=f"baseline {name}" + (f" ({text})" if text else ""),
        built_from=seen_in(dataset),
    )
