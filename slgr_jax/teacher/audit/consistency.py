"""Does the teacher say the same when it is asked the same in another order?

From the answer log (`schema.ANSWERS`): pairs of items asked both ways round, and lists asked in
several permutations.

Shape letters: n rows of the log, g groups of rows that belong together.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Position bias and self-consistency; NaN where nothing was asked twice.

    Attributes:
      pairs: comparisons of two items in the log.
      first_preferred: of them, the share that prefers what was shown first (1/2 where p = 1/2);
        1/2 if items are put first at random and places do not matter.
      both_orders: pairs of items of a user that were asked both ways round.
      bias: over those, mean p(first shown is preferred) - 1/2: what the place alone does.
      same_both_orders: the share of those whose preferred item is the same both ways; ties do not
        agree.
      twice_listed: items of a user with scores in several permutations of a list.
      place_slope: what moving from first to last place adds to an item's score, in standard
        deviations of scores: least squares within items.
      list_pairs, same_in_lists: pairs of items that two permutations of a list both score and do
        not tie, and the share that both order alike.
    """

    pairs: int
    first_preferred: float
    both_orders: int
    bias: float
    same_both_orders: float
    twice_listed: int
    place_slope: float
    list_pairs: int
    same_in_lists: float


def measure(log: pa.Table) -> Consistency:
    """Measure the rows of an answer log (`schema.ANSWERS`)."""
    compared = log.column("other").is_valid().to_numpy()
    columns = {
        name: log.column(name).to_numpy().astype(np.int64)
        for name in ("request", "user", "item", "position", "permutation")
    }
    columns["other"] = log.column("other").fill_null(-1).to_numpy().astype(np.int64)
    scores = log.column("score").to_numpy().astype(np.float64)  # null is NaN here
    given = ~np.isnan(scores)

    def rows(chosen: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {name: column[chosen] for name, column in columns.items()}, scores[chosen]

    in_pairs, preferred = rows(compared & given)
    pairs, first_preferred, both_orders, bias, same = _pairwise(in_pairs, preferred)
    in_lists, list_scores = rows(~compared & given)
    twice_listed, place_slope, list_pairs, same_in_lists = _listwise(in_lists, list_scores)

    return Consistency(
        pairs=pairs,
        first_preferred=first_preferred,
        both_orders=both_orders,
        bias=bias,
        same_both_orders=same,
        twice_listed=twice_listed,
        place_slope=place_slope,
        list_pairs=list_pairs,
        same_in_lists=same_in_lists,
    )


def _groups(*columns: np.ndarray) -> tuple[np.ndarray, int]:
    """([n] number of each row's group of equal columns, how many groups)."""
    if not columns[0].size:
        return np.zeros(0, np.int64), 0
    order = np.lexsort(columns)
    changed = np.zeros(order.size, bool)
    for column in columns:
        changed[1:] |= np.diff(column[order]) != 0
    group = np.empty(order.size, np.int64)
    group[order] = np.cumsum(changed)
    return group, int(changed.sum()) + 1


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _group_means(group: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """[g] mean of `values`; NaN of a group without any."""
    counts = np.bincount(group, minlength=n)
    sums = np.bincount(group, weights=values, minlength=n)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _pairwise(
    columns: dict[str, np.ndarray], p: np.ndarray
) -> tuple[int, float, int, float, float]:
    """The first five of `Consistency`; `p` [n]: that what was shown first is preferred."""
    item, other = columns["item"], columns["other"]
    group, n = _groups(columns["user"], np.minimum(item, other), np.maximum(item, other))
    low_first = item < other
    lower_first, higher_first = (
        _group_means(group[way], p[way], n) for way in (low_first, ~low_first)
    )
    both = ~np.isnan(lower_first) & ~np.isnan(higher_first)
    lower_first, higher_first = lower_first[both], higher_first[both]
    first = _mean(np.where(p == 0.5, 0.5, p > 0.5))
    same = _mean((lower_first - 0.5) * (0.5 - higher_first) > 0)
    return p.size, first, int(both.sum()), _mean((lower_first + higher_first) / 2 - 0.5), same


def _listwise(columns: dict[str, np.ndarray], scores: np.ndarray) -> tuple[int, float, int, float]:
    """The last four of `Consistency`."""
    user, item, request = columns["user"], columns["item"], columns["request"]
    list_number, lists = _groups(request)
    longest = np.zeros(lists, np.int64)
    np.maximum.at(longest, list_number, columns["position"])
    place = columns["position"] / np.maximum(longest, 1)[list_number]  # 0 first, 1 last
    group, n = _groups(user, item)
    often = np.bincount(group, minlength=n) > 1
    kept = often[group]
    moved = place[kept] - _group_means(group, place, n)[group[kept]]
    changed = scores[kept] - _group_means(group, scores, n)[group[kept]]
    spread = float((moved**2).sum())
    deviation = float(scores.std()) if scores.size else 0.0
    slope = float((moved * changed).sum()) / spread if spread else float("nan")
    pairs, same = _same_order(user, item, request, columns["permutation"], scores)
    in_deviations = slope / deviation if deviation else float("nan")
    return int(often.sum()), in_deviations, pairs, same


def _same_order(
    user: np.ndarray,
    item: np.ndarray,
    request: np.ndarray,
    permutation: np.ndarray,
    scores: np.ndarray,
) -> tuple[int, float]:
    """Pairs that two successive permutations of a list both order, and the share ordered alike."""
    order = np.lexsort((permutation, item, user))
    user, item, request = user[order], item[order], request[order]
    scores = scores[order]
    # Each row with the next answer on the same item.
    again = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
    before = np.flatnonzero(again)
    scores_before, scores_after = scores[before], scores[before + 1]

    group, n = _groups(request[before], request[before + 1])  # items that share both requests
    by_group = np.argsort(group, kind="stable")
    scores_before, scores_after = scores_before[by_group], scores_after[by_group]

    sizes = np.bincount(group, minlength=n)
    ends = np.repeat(np.cumsum(sizes), sizes)
    # Partners of each row: those after it in its group.
    later = ends - np.arange(scores_before.size) - 1
    left = np.repeat(np.arange(scores_before.size), later)
    right = left + 1 + np.arange(left.size) - np.repeat(np.cumsum(later) - later, later)

    order_before = np.sign(scores_before[left] - scores_before[right])
    order_after = np.sign(scores_after[left] - scores_after[right])
    signs = order_before * order_after
    ordered = signs[signs != 0]
    return int(ordered.size), _mean(ordered > 0)
