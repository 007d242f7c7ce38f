"""Labelled rows for click prediction: (user, item, moment, 0 or 1), made on the host.

A row's moment is the number of the user's `context.Histories` events (training events in time
order, then those of validation) that lie before it. Nothing from the row's own event on is looked
at, by whoever reads at most `as_of` events.

Shape letters: n rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from slgr_jax.config import EvaluationConfig, LossConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.features import INTERACTION
from slgr_jax.errors import InputError
from slgr_jax.sampling import arrays
from slgr_jax.sampling.context import interaction_rows


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Rows to train on or to score.

    Attributes:
      users, items: [n] int32.
      as_of: [n] int32: events of the user before the row's moment, in `context.Histories` order.
      labels: [n] float32: 1 positive, 0 negative.
      interactions: [n] int32: whose features hold, as `context.interaction_rows` counts them: the
        row's own, of a drawn negative its positive's. None where the dataset has none.
    """

    users: Int[np.ndarray, "n"]
    items: Int[np.ndarray, "n"]
    as_of: Int[np.ndarray, "n"]
    labels: Float[np.ndarray, "n"]
    interactions: Int[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return int(self.users.size)


def sampled_rows(
    dataset: Dataset, part: str, *, negatives: int = 1, min_history: int = 1, seed: int
) -> LabelledRows:
    """Each positive of a part, directly followed by items that its user has in no part.

    The rows of the S-LLMR and LLM-CF click benchmarks with `negatives` = `min_history` = 1, under
    --split=leave_last (arXiv 2512.21526, table 1: their number is 2 (interactions - 3 users) in
    training).

    A negative is uniform over the items that the user has in none of train, valid and test, drawn
    with replacement, and has the moment of its positive. A user who has every item has no rows.

    Args:
      part: train, valid or test.
      negatives: to each positive.
      min_history: leave out positives with fewer events before them.
      seed: of the negatives; parts draw from streams of their own.

    Raises:
      InputError: no positive of the part is left.
    """
    interactions, as_of = dataset.part(part), dataset.moments(part)
    cut = arrays.excluded(dataset.positives(schema.PARTS), None, dataset.n_items)
    eligible = (as_of >= min_history) & (cut.free[interactions.users] > 0)
    if not eligible.any():
        raise InputError(
            f"{dataset.path} has no {part} rows: none of its {len(interactions)} {part} "
            f"interactions has {min_history} earlier ones and an item left to be its negative"
        )

    # A positive and its negatives stand side by side, [positives, 1 + negatives].
    users, width = interactions.users[eligible], 1 + negatives
    rng = np.random.default_rng([seed, schema.PARTS.index(part)])
    items = np.empty((users.size, width), np.int32)
    items[:, 0] = interactions.items[eligible]
    items[:, 1:] = _outside(cut, np.repeat(users, negatives), dataset.n_items, rng).reshape(
        users.size, negatives
    )
    asked = _interactions(dataset, part)
    labels = np.zeros(items.shape, np.float32)
    labels[:, 0] = 1.0
    return LabelledRows(
        users=np.repeat(users, width),
        items=items.reshape(-1),
        as_of=np.repeat(as_of[eligible], width),
        labels=labels.reshape(-1),
        interactions=None if asked is None else np.repeat(asked[eligible], width),
    )


def _interactions(dataset: Dataset, part: str) -> Int[np.ndarray, "n"] | None:
    if not any(feature.side == INTERACTION for feature in dataset.features):
        return None
    return interaction_rows(dataset, part)


def _outside(
    cut: arrays.Excluded, users: Int[np.ndarray, "n"], n_items: int, rng: np.random.Generator
) -> Int[np.ndarray, "n"]:
    """An item outside each user's set, uniformly: `negatives.draw_outside` on the host.

    The r-th item outside a sorted set p_0 < p_1 < ... is r + #{k: p_k - k <= r}. The users' rows
    of keys p_k - k, each lifted above those before it, are one ascending array to search.
    """
    r = rng.integers(0, cut.free[users])

    # A key of user u is lifted by u (I + 1), more than any key: one search serves all users.
    owners = np.repeat(np.arange(cut.free.size), np.diff(cut.offsets))
    lifted = owners * (n_items + 1) + cut.keys
    passed = np.searchsorted(lifted, users * np.int64(n_items + 1) + r, side="right")
    return r + passed - cut.offsets[users]


def rated_rows(dataset: Dataset, part: str, *, threshold: float) -> LabelledRows:
    """Every interaction of a part: label 1 where its rating is at least `threshold`, else 0.

    Raises:
      InputError: the data set has no ratings, or all labels of the part are the same.
    """
    interactions = dataset.part(part)
    if interactions.ratings is None:
        raise InputError(
            f"{dataset.path} has no ratings to label rows by; prepare it from a source with "
            "ratings, or draw negatives (--rows=sampled)"
        )
    liked = interactions.ratings >= threshold
    n, positives = len(interactions), int(np.count_nonzero(liked))
    if positives in (0, n):
        rated = interactions.ratings
        ratings = f"ratings are {rated.min():g} to {rated.max():g}" if n else "it is empty"
        raise InputError(
            f"{dataset.path}: {positives} of {n} {part} interactions are rated at least "
            f"{threshold:g} ({ratings}); choose a threshold that leaves rows on both sides"
        )
    return LabelledRows(
        interactions.users,
        interactions.items,
        dataset.moments(part),
        liked.astype(np.float32),
        _interactions(dataset, part),
    )


def make_rows(
    dataset: Dataset, part: str, evaluation: EvaluationConfig, loss: LossConfig
) -> LabelledRows:
    """The rows of `part` that --rows names.

    Raises:
      InputError: there are none, or they are all of one label.
    """
    if evaluation.rows == "rated":
        return rated_rows(dataset, part, threshold=loss.rating_threshold)
    return sampled_rows(
        dataset,
        part,
        negatives=evaluation.row_negatives,
        min_history=loss.min_history,
        seed=evaluation.row_seed,
    )
