"""An answer log -> a teacher product: means over permutations and orders.

Shape letters: n rows of the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import CollectConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.collect import answer_log, free_lists
from slgr_jax.teacher.products import preferences, training_items, votes


def write(
    dataset: Dataset,
    common: TeachConfig,
    options: CollectConfig,
    rows: pa.Table,
    log: schema.AnswerManifest,
    ledger: Mapping[str, Any],
    states: Mapping[str, int],
) -> schema.TeacherManifest:
    """Write DATA/teacher/NAME from all `rows` of an answer log.

    Args:
      rows: schema.ANSWERS, or of free lists schema.TITLES.
      log: the log's manifest; ledger: what ledger.json holds.
      states: how many requests are complete, cut, refused, failed and missing.
    """
    counts = {
        "requests": sum(states.values()),
        "answered_requests": states["complete"] + states["cut"],
        **{f"{state}_requests": count for state, count in states.items()},
        "quarantined": int(ledger["quarantined"]["answers"]),
        "prompt_tokens": int(ledger["accepted"]["prompt_tokens"]),
        "completion_tokens": int(ledger["accepted"]["completion_tokens"]),
    }
    agreement: pa.Table | None = None
    free = answer_log.is_free(log)
    paired = log.sources[0]["prompt"] == "pairwise"
    hidden = any(source["training_items"] == "hidden" for source in log.sources)
    if free:
        known = free_lists.hidden_items(dataset, log)
        hidden = hidden and known is not None
        table, agreement, of_titles = free_lists.scores(
            rows, dataset, known, subtitles=common.subtitles
        )
        counts |= of_titles
    elif paired:
        users, low, high, p = _pair_probabilities(rows, dataset.n_items)
        if options.pairs_to == "preferences":
            table, counts["dropped_undecided_pairs"] = _preferences(users, low, high, p)
        else:
            table = _win_rates(users, low, high, p, dataset.n_items)
    else:
        by_rank = options.aggregate == "rank"
        table, agreement = _mean_scores(rows, dataset.n_items, by_rank=by_rank)

    def joined(key: str) -> str:
        return "+".join(dict.fromkeys(str(source[key]) for source in log.sources))

    prompts = {source["prompt"] for source in log.sources}
    words = prompts <= {"pairwise", "pointwise"}
    ranked = free or options.aggregate == "rank" or prompts == {"ranking"}
    if not hidden and not free:
        # Of a log that was carried over: items that its prompts asked about, and that are training
        # items by now.
        table, dropped = training_items.drop(table, dataset, f"answer log {common.name!r}")
        counts |= {name: count for name, count in dropped.items() if count}
    return preferences.write_product(
        dataset,
        common.name,
        table,
        provenance=preferences.Provenance(
            built_from="train_only",
            unlisted="below" if free else "unknown",
            model=joined("model"),
            prompt_hash=joined("template_hash"),
            score_kind="prob" if words else "rank" if ranked else "score",
            training_items="hidden" if hidden else "none",
        ),
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=True,
        votes=agreement,
    )


def _mean_scores(
    rows: pa.Table, n_items: int, *, by_rank: bool
) -> tuple[pa.Table, pa.Table | None]:
    """Mean over answers of each (user, item), null where none has one, and how far they agree.

    Returns:
      schema.TEACHER_SCORES; schema.TEACHER_VOTES of the scores from their lowest, 0, to their
      highest, 1: None where no item has two answers.
    """
    users, items = (rows.column(k).to_numpy().astype(np.int64) for k in ("user", "item"))
    scores = rows.column("score").to_numpy().astype(np.float64)  # null is NaN here
    if by_rank:
        scores = _ranks(answer_log.answer_numbers(rows), scores)
    keys, place = np.unique(users * n_items + items, return_inverse=True)
    given = ~np.isnan(scores)
    sums = np.bincount(place, np.where(given, scores, 0), keys.size)
    answers = np.bincount(place, given, keys.size)
    means = (sums / np.maximum(answers, 1)).astype(np.float32)
    arrays = [pa.array(part.astype(np.int32)) for part in np.divmod(keys, n_items)]
    table = pa.table([*arrays, pa.array(means, mask=answers == 0)], schema=schema.TEACHER_SCORES)
    return table, votes.of_answers(keys, place[given], scores[given], n_items)


def _ranks(groups: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[n] place of each score among those of its group, 0 worst to 1 best; ties share their mean
    place, and a score alone is .5; NaN where there is no score."""
    ranks = np.full(scores.size, np.nan)
    order = np.lexsort((scores, groups))
    order = order[~np.isnan(scores[order])]
    if not order.size:
        return ranks
    group, score = groups[order], scores[order]
    first = np.concatenate([[True], group[1:] != group[:-1]])
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, order.size))
    ties = np.flatnonzero(first | np.concatenate([[True], score[1:] != score[:-1]]))
    widths = np.diff(np.append(ties, order.size))
    within = np.repeat(ties + (widths - 1) / 2, widths) - np.repeat(starts, sizes)
    most = np.repeat(sizes - 1, sizes)
    ranks[order] = np.where(most > 0, within / np.maximum(most, 1), 0.5)
    return ranks


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _pair_probabilities(rows: pa.Table, n_items: int) -> Pairs:
    """(users, low item, high item, p) of every pair: p that the low index is preferred.

    p = (p1 + 1 - p2) / 2 where both orders were answered, p1 the mean with the low index shown
    first and p2 the mean with it shown second; the one there is where one was.
    """
    users, items, others = (
        rows.column(name).to_numpy().astype(np.int64) for name in ("user", "item", "other")
    )
    scores = rows.column("score").to_numpy().astype(np.float64)
    swapped = items > others
    low, high = np.minimum(items, others), np.maximum(items, others)
    pairs, pair = np.unique(low * n_items + high, return_inverse=True)
    keys, place = np.unique(users * pairs.size + pair, return_inverse=True)
    share = np.where(swapped, 1 - scores, scores)
    sums = np.zeros(keys.size)
    orders = np.zeros(keys.size)
    for which in (False, True):
        rows_of_order = swapped == which
        count = np.bincount(place[rows_of_order], minlength=keys.size)
        total = np.bincount(place[rows_of_order], share[rows_of_order], keys.size)
        sums += total / np.maximum(count, 1)
        orders += count > 0
    owner, which_pair = np.divmod(keys, pairs.size)
    first, second = np.divmod(pairs[which_pair], n_items)
    return owner, first, second, sums / orders


def _preferences(
    users: np.ndarray, low: np.ndarray, high: np.ndarray, p: np.ndarray
) -> tuple[pa.Table, int]:
    """schema.TEACHER_PREFERENCES with margin |2p - 1|, and how many pairs are undecided."""
    margin = np.abs(2 * p - 1).astype(np.float32)
    kept = margin > 0
    users, low, high, p, margin = (x[kept] for x in (users, low, high, p, margin))
    preferred, other = np.where(p > 0.5, low, high), np.where(p > 0.5, high, low)
    order = np.lexsort((other, preferred, users))
    arrays = [pa.array(x[order].astype(np.int32)) for x in (users, preferred, other)]
    table = pa.table([*arrays, pa.array(margin[order])], schema=schema.TEACHER_PREFERENCES)
    return table, int((~kept).sum())


def _win_rates(
    users: np.ndarray, low: np.ndarray, high: np.ndarray, p: np.ndarray, n_items: int
) -> pa.Table:
    """schema.TEACHER_SCORES: each item's mean probability to win the pairs it was in."""
    owners, items = np.concatenate([users, users]), np.concatenate([low, high])
    keys, place = np.unique(owners * n_items + items, return_inverse=True)
    wins = np.bincount(place, np.concatenate([p, 1 - p])) / np.bincount(place)
    arrays = [pa.array(part.astype(np.int32)) for part in np.divmod(keys, n_items)]
    return pa.table([*arrays, pa.array(wins.astype(np.float32))], schema=schema.TEACHER_SCORES)
