"""Metrics of labelled rows: pure NumPy on scores (logits), labels, users and items.

Every definition is in `DEFINITIONS`; reports print it next to the numbers. Ranking metrics, over
the whole catalogue, are `metrics.py`.

Shape letters: n rows, U users, I items, R groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from slgr_jax.data.dataset import Slices
from slgr_jax.errors import ConfigError, listing
from slgr_jax.evaluation.ranking_metrics import UserValues, Values, bins
from slgr_jax.sampling.labelled_rows import LabelledRows

# History at the row that still counts as cold: with it the training rows are Table 1 of S-LLMR.
COLD_ROW_HISTORY = 3
GAUC_WEIGHTS = ("impressions", "positives")

DEFINITIONS: Mapping[str, str] = {
    "rows": "labelled (user, item) rows; n counts them, n_positives those with label 1",
    "auc": "share of (positive, negative) row pairs in the right order, over the rows of all users "
    "pooled, ties count one half",
    "log_loss": "mean over rows of -log sigmoid(score) where the label is 1, -log sigmoid(-score) "
    "where it is 0; natural logarithm",
    "gauc": "auc among the rows of one user, mean over users weighted by their number of rows "
    "(DIN, FuxiCTR); weights=positives: by their number of positive rows (RecBole); users whose "
    "rows are all of one label are left out",
    "rela_impr": "((auc - 0.5) / (base auc - 0.5) - 1) * 100, per cent",
    "cold_rows, warm_rows": "rows whose user has at most 3 events before the row's moment, the "
    "others; under leave-last every test row of a 5-core data set is warm",
    "cold_users, warm_users": "all rows of users with at most cold_user_history training items, "
    "of the others",
    "tail_items, head_items": "rows, positive or negative, whose item is tail, whose item is not",
    "tail_positives_vs_user_negatives, head_positives_vs_user_negatives": "the positive rows whose "
    "item is tail (head), and every negative row, whatever its item, of the users who have such a "
    "positive; gauc compares a positive with the negatives of its own user only, auc with those "
    "of all these users",
}


def _aucs(
    scores: np.ndarray, positive: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC of each group and its numbers of rows and of positives, exact up to one division.

    Args:
      scores: [n] without NaN.
      positive: [n] bool.
      groups: [n] in [0, R), each of which occurs.

    Returns:
      [R] float64 (NaN where a group has one class), [R] and [R] int64.
    """
    order = np.lexsort((scores, groups))
    group, score, hit = groups[order], scores[order], positive[order].astype(np.int64)
    starts = np.ones(order.size, bool)  # of a run of equal scores in one group
    starts[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    first = np.flatnonzero(starts)
    if not first.size:
        return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)

    run_group = group[first]
    run_positives, run_negatives = np.add.reduceat(hit, first), np.add.reduceat(1 - hit, first)
    group_first = np.flatnonzero(np.append(True, run_group[1:] != run_group[:-1]))
    positives = np.add.reduceat(run_positives, group_first)
    negatives = np.add.reduceat(run_negatives, group_first)

    # Of a run: negatives of its group with a lower score, each beaten by the run's positives;
    # those in the run itself count one half.
    below = np.cumsum(run_negatives) - run_negatives
    below -= below[group_first][run_group]
    wins2 = np.add.reduceat(run_positives * (2 * below + run_negatives), group_first)
    pairs2 = 2 * positives * negatives
    aucs = np.divide(wins2, pairs2, out=np.full(pairs2.size, np.nan), where=pairs2 > 0)
    return aucs, positives + negatives, positives


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; ties count one half.

    NaN where only one label occurs or a score is NaN.

    Args:
      scores: [n], any increasing function of the probability.
      labels: [n] 0 or 1.
    """
    if scores.size == 0 or np.isnan(scores).any():
        return float("nan")
    return float(_aucs(scores, labels == 1, np.zeros(scores.size, np.int64))[0][0])


def log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of log(1 + exp(-s)) over positives and log(1 + exp(s)) over negatives.

    NaN without rows or where a score is NaN.

    Args:
      scores: [n] logits.
      labels: [n] 0 or 1.
    """
    if scores.size == 0 or np.isnan(scores).any():
        return float("nan")
    exact = scores.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, np.where(labels == 1, -exact, exact))))


def gauc(
    scores: np.ndarray, labels: np.ndarray, users: np.ndarray, *, weights: str = "impressions"
) -> float:
    """AUC within each user's rows, weighted mean over users.

    NaN where no user has both labels or a score is NaN.

    Args:
      scores, labels, users: [n] each.
      weights: of `GAUC_WEIGHTS`: a user weighs their rows (Zhou et al. 2018, DIN) or their
        positive rows (RecBole's GAUC). They agree where users have the same share of
        positives.

    Raises:
      ConfigError: unknown weights.
    """
    if weights not in GAUC_WEIGHTS:
        raise ConfigError(f"unknown gauc weights {weights!r}; known: {listing(GAUC_WEIGHTS)}")
    if np.isnan(scores).any():
        return float("nan")
    _, groups = np.unique(users, return_inverse=True)
    per_user, rows, positives = _aucs(scores, labels == 1, groups)
    both = ~np.isnan(per_user)
    if not both.any():
        return float("nan")
    weight = rows if weights == "impressions" else positives
    return float(np.average(per_user[both], weights=weight[both]))


def rela_impr(auc: float, base: float) -> float:
    """((auc - 0.5) / (base - 0.5) - 1) * 100, per cent (DIN); NaN for a base of 0.5."""
    return ((auc - 0.5) / (base - 0.5) - 1) * 100 if base != 0.5 else float("nan")


def row_slices(
    rows: LabelledRows, slices: Slices, *, cold_row_history: int = COLD_ROW_HISTORY
) -> dict[str, np.ndarray]:
    """[n] bool per slice: which rows it holds, as `DEFINITIONS` states; `overall` first.

    Args:
      rows: what was scored.
      slices: cold users and tail items, from `Dataset.slices`.
      cold_row_history: a row with at most this many events before it is cold.
    """
    positive = rows.labels == 1
    cold_row = rows.as_of <= cold_row_history
    cold_user = slices.cold_users[rows.users]
    tail = slices.tail_items[rows.items]

    def against_own_negatives(chosen: np.ndarray) -> np.ndarray:
        has = np.zeros(slices.cold_users.size, bool)
        has[rows.users[chosen]] = True
        return chosen | (~positive & has[rows.users])

    return {
        "overall": np.ones(len(rows), bool),
        "cold_rows": cold_row,
        "warm_rows": ~cold_row,
        "cold_users": cold_user,
        "warm_users": ~cold_user,
        "tail_items": tail,
        "head_items": ~tail,
        "tail_positives_vs_user_negatives": against_own_negatives(positive & tail),
        "head_positives_vs_user_negatives": against_own_negatives(positive & ~tail),
    }


def bin_slices(
    rows: LabelledRows,
    history: np.ndarray,
    popularity: np.ndarray,
    history_bins: Iterable[int],
    popularity_bins: Iterable[int],
) -> dict[str, np.ndarray]:
    """[n] bool per bin, named as in `ranking_metrics.slice_masks`: all rows of users with so many
    training items; rows, positive or negative, whose item has so many training users.

    Args:
      rows: what was scored.
      history: [U] training items of each user.
      popularity: [I] training users of each item.
      history_bins, popularity_bins: upper edges.
    """
    out = {}
    for fact, counts, edges in (
        ("history", history[rows.users], history_bins),
        ("popularity", popularity[rows.items], popularity_bins),
    ):
        for name, low, high in bins(fact, edges):
            out[name] = (counts >= low) & (counts <= high)
    return out


def per_user(rows: LabelledRows, scores: np.ndarray, keep: np.ndarray | None = None) -> UserValues:
    """auc among the rows of each user, those of `gauc`: what a paired test over users needs.

    `n_relevant` counts positives. NaN where a user's rows are all of one label, or a score is NaN.

    Args:
      rows: what was scored.
      scores: [n] logits.
      keep: [n] bool: only these rows.
    """
    chosen = np.ones(len(rows), bool) if keep is None else keep
    users, groups = np.unique(rows.users[chosen], return_inverse=True)
    score, positive = scores[chosen], rows.labels[chosen] == 1
    aucs, _, positives = _aucs(score, positive, groups)
    aucs[np.unique(groups[np.isnan(score)])] = np.nan
    return UserValues(users.astype(np.int32), positives, {"auc": aucs})


def summarize_rows(
    rows: LabelledRows,
    scores: np.ndarray,
    slices: Slices,
    *,
    cold_row_history: int = COLD_ROW_HISTORY,
) -> dict[str, Values]:
    """Slice name -> auc, log_loss, gauc (by impressions), n, n_positives; None where undefined.

    Args:
      rows: what was scored.
      scores: [n] logits.
      slices: cold users and tail items, from `Dataset.slices`.
      cold_row_history: a row with at most this many events before it is cold.
    """
    return summarize_slices(
        rows, scores, row_slices(rows, slices, cold_row_history=cold_row_history)
    )


def summarize_slices(
    rows: LabelledRows, scores: np.ndarray, slices: Mapping[str, np.ndarray]
) -> dict[str, Values]:
    """`summarize_rows` of any slices: name -> [n] bool."""
    out: dict[str, Values] = {}
    for name, chosen in slices.items():
        score, label, user = scores[chosen], rows.labels[chosen], rows.users[chosen]
        metrics = {
            "auc": auc(score, label),
            "log_loss": log_loss(score, label),
            "gauc": gauc(score, label, user),
        }
        values: Values = {key: None if np.isnan(x) else x for key, x in metrics.items()}
        values["n"] = int(label.size)
        values["n_positives"] = int(np.count_nonzero(label == 1))
        out[name] = values
    return out
