"""Hard negatives: what trained runs would recommend where a teacher lists something else.

A teacher that names its favourites freely says of all other items that they rank below. Of a
listed item and any other one it is right nearly always, whoever's list it is: such preferences
teach what is popular, and a gate that learns from them has nothing to select. What the teacher
adds shows where the recommender would have put another item on the user's page. So each list is
completed by its user's hard negatives, the R items that runs without guidance rank highest, hard
negatives as in Xiong et al. 2021 (arXiv 2007.00808), and preferences are drawn among list and hard
negatives alone.

Without a teacher (--negatives=hard) a share of the negatives of a user's own training items comes
from there: what remains of a guided gain beside that is the teacher's.

Shape letters: U users, R hard negatives of a user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import full_ranking
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.scoring import Scoring, score_users
from slgr_jax.teacher.products.rows import Teacher


def of_lists(
    dataset: Dataset,
    teacher: Teacher,
    reference_runs: Sequence[tuple[AnyBackbone, Scoring]],
    count: int,
    *,
    kernels: str = "auto",
) -> Csr:
    """[U] those of each user with a list: neither listed items nor training items; see `find`."""
    train = dataset.positives(("train",))
    listed_by = np.repeat(np.arange(dataset.n_users), np.diff(teacher.offsets))
    taken = Csr.from_pairs(
        np.concatenate([listed_by, train.owners()]),
        np.concatenate([teacher.items, train.indices]),
        dataset.n_users,
    )
    users = np.flatnonzero(np.diff(teacher.offsets))
    return find(dataset, users, taken, reference_runs, count, kernels=kernels)


def of_training(
    dataset: Dataset,
    reference_runs: Sequence[tuple[AnyBackbone, Scoring]],
    count: int,
    *,
    kernels: str = "auto",
) -> Csr:
    """[U] those of each user with training items, for --negatives=hard; see `find`."""
    train = dataset.positives(("train",))
    users = np.flatnonzero(train.counts)
    return find(dataset, users, train, reference_runs, count, kernels=kernels)


def find(
    dataset: Dataset,
    users: np.ndarray,
    taken: Csr,
    reference_runs: Sequence[tuple[AnyBackbone, Scoring]],
    count: int,
    *,
    kernels: str = "auto",
) -> Csr:
    """[U] the items that reference runs rank highest for each of `users`, by mean score.

    Of training items none is a hard negative; validation and test items may be, as the reference
    runs know nothing of them.

    Args:
      taken: [U] items that are none.
      reference_runs: backbones, and what they score with as of the end of training.
      count: R; a user with fewer items left has those.
      kernels: as of `full_ranking.top_k`.
    """
    scorers = [score_users(backbone) for backbone, _ in reference_runs]

    def mean(scorings: tuple[Scoring, ...], users: jax.Array) -> jax.Array:
        scores = [score(run, users) for score, run in zip(scorers, scorings, strict=True)]
        return sum(scores[1:], scores[0]) / len(scores)

    top = full_ranking.top_k(
        mean,
        tuple(scoring for _, scoring in reference_runs),
        users,
        taken,
        dataset.n_items,
        k=count,
        kernels=kernels,
    )
    real = top.items >= 0  # a user with fewer items left has -1 behind them
    return Csr.from_pairs(np.repeat(top.users, real.sum(axis=1)), top.items[real], dataset.n_users)


def complete(teacher: Teacher, hard_negatives: Csr) -> Teacher:
    """The lists with their users' hard negatives below them, all at one score; nothing else is
    below.

    That score is the least of all lists minus the standard deviation of scores: how far an item
    that is not listed lies below one that is, the teacher does not say.

    Raises:
      ConfigError: what is not listed does not rank below.
    """
    manifest = teacher.manifest
    if manifest.kind != "scores" or manifest.unlisted != "below":
        raise ConfigError(
            f"--hard_negatives: unlisted items of teacher {manifest.name} are unknown, they do "
            f"not rank "
            "below its lists, so that no hard negative is beaten; drop --hard_negatives, or say "
            "so when you import it (slgr teach import --unlisted=below)"
        )
    floor = np.float32(teacher.scores.min() - (float(teacher.scores.std()) or 1.0))
    # Within a user by score, then item: hard negatives first, as all lie below the list.
    listed, more = np.diff(teacher.offsets), hard_negatives.counts.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(listed + more)])
    items = np.empty(offsets[-1], np.int32)
    scores = np.full(offsets[-1], floor, np.float32)
    is_negative = np.arange(offsets[-1]) - np.repeat(offsets[:-1], listed + more) < np.repeat(
        more, listed + more
    )
    items[is_negative], items[~is_negative] = hard_negatives.indices, teacher.items
    scores[~is_negative] = teacher.scores
    return dataclasses.replace(
        teacher,
        manifest=dataclasses.replace(manifest, unlisted="unknown"),
        offsets=offsets,
        items=items,
        scores=scores,
    )
