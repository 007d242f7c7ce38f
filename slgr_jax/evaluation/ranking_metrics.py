"""From ranks to metrics: pure NumPy, per user first, so that runs can be compared user by user.

Every definition is in `DEFINITIONS`; reports print it next to the numbers. A metric's value
over a slice is the mean over the slice's users, each user weighing the same.

Shape letters: U users, I items, n ranked users, N relevant pairs, K cut-off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slgr_jax.config import SliceConfig
from slgr_jax.data.dataset import Csr, Dataset, Slices
from slgr_jax.errors import ConfigError, listing

Values = dict[str, float | int | None]  # the metrics of one slice; None where undefined

DEFINITIONS: Mapping[str, str] = {
    "candidates": "every item of the catalogue but the user's masked ones; R: the user's relevant "
    "items of the part; users without any are not evaluated; equal scores rank by item index",
    "recall@K": "relevant items among the first K / |R|",
    "ndcg@K": "sum over relevant items among the first K of 1 / log2(rank + 1), divided by that "
    "sum over the ranks 1..min(|R|, K)",
    "hit@K": "1 if any relevant item is among the first K",
    "precision@K": "relevant items among the first K / K",
    "map@K": "mean of precision@rank over relevant items among the first K, with divisor "
    "min(|R|, K)",
    "mrr": "1 / rank of the first relevant item, over the full ranking",
    "auc": "per user: share of (relevant, non-relevant candidate) pairs in the right order, ties "
    "count one half; then the mean over users",
    "auc_pooled": "the same share over the pairs of all users pooled (a relevant item of one user "
    "against a non-relevant candidate of another counts too)",
    "coverage@K": "share of the catalogue that is in the first K of at least one user",
    "mean_popularity@K": "training count of the first K items, mean per user, then over users",
    "tail_items, head_items, popularity": "R holds only the slice's items; candidates, ranks and "
    "the non-relevant items of auc stay the same; n counts users with any such item",
    "tail_items_apart, head_items_apart": "the slice's items are the only candidates, too",
}


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Where the relevant items of each evaluated user rank among that user's candidates.

    Attributes:
      users: [n] int32 ascending: users with at least one relevant item.
      offsets: [n + 1] int64: the pairs of `users[r]` are `offsets[r]:offsets[r + 1]`.
      items: [N] int32 relevant items, ascending per user.
      ranks: [N] int64 from 1; equal scores rank by item index.
      scores: [N] float32.
      greater: [N] int64: non-relevant candidates with a greater score.
      tied: [N] int64: non-relevant candidates with the same score.
      n_candidates: [n] int64: items that are not masked, relevant ones included.
      top_items: [n, K] int32 best first, -1 where a user has fewer candidates.
      n_items: I.
      pooled_auc: see `DEFINITIONS`; NaN if not asked for or without any pair.
      n_dropped: relevant pairs left out because the item is masked for the user.
    """

    users: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    greater: np.ndarray
    tied: np.ndarray
    n_candidates: np.ndarray
    top_items: np.ndarray
    n_items: int
    pooled_auc: float = float("nan")
    n_dropped: int = 0

    @property
    def counts(self) -> np.ndarray:
        """[n] int64: relevant items of each user."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """[N] int64: the row of `users` that each pair belongs to."""
        return np.repeat(np.arange(self.users.size), self.counts)


@dataclasses.dataclass(frozen=True)
class TopItems:
    """The best items of some users.

    Attributes:
      users: [n] int32, in the order they were asked for.
      items: [n, K] int32, best first; -1 where the user has fewer unmasked items.
      scores: [n, K] float32; -inf where `items` is -1.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class UserValues:
    """Metrics per user, [n] each; users with at least one counted relevant item only."""

    users: np.ndarray  # [n] int32
    n_relevant: np.ndarray  # [n] int64
    values: dict[str, np.ndarray]  # name -> [n] float64; NaN where undefined


@dataclasses.dataclass(frozen=True)
class SliceMasks:
    """Named subsets of users ([U] bool each) and of items ([I] bool each)."""

    users: dict[str, np.ndarray]
    items: dict[str, np.ndarray]


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """The ranking metrics of a slice, each better when greater, for the cut-offs `ks`."""
    per_k = (f"{name}@{k}" for k in ks for name in ("recall", "ndcg", "hit", "precision", "map"))
    return (*per_k, "mrr", "auc")


ROW_METRICS = ("rows_auc", "rows_gauc")  # of labelled rows (click_metrics.py), better when greater


def check_metric(
    name: str,
    ks: Sequence[int],
    *,
    pooled_auc: bool = False,
    ranking: bool = True,
    rows: bool = False,
) -> str:
    """`name` if the overall slice has it.

    Raises:
      ConfigError: it does not; the message lists what there is.
    """
    known = metric_names(ks) + (("auc_pooled",) if pooled_auc else ()) if ranking else ()
    known += ROW_METRICS if rows else ()
    if name not in known:
        raise ConfigError(f"unknown metric {name!r}; known: {listing(known, limit=len(known))}")
    return name


def _once(rows: np.ndarray) -> bool:
    """Whether rows ascend and none comes twice: of each user one pair, as with leave-one-out."""
    return bool(np.all(rows[1:] > rows[:-1]))


def per_user(ranking: Ranking, ks: Sequence[int], keep: np.ndarray | None = None) -> UserValues:
    """Metrics of each user, as `DEFINITIONS` states them.

    Args:
      ranking: ranks of the relevant items.
      ks: cut-offs.
      keep: [I] bool: count only these items as relevant; ranks and negatives stay.
    """
    n = ranking.users.size
    chosen = np.ones(ranking.items.size, bool) if keep is None else keep[ranking.items]
    rows, ranks = ranking.rows[chosen], ranking.ranks[chosen]
    once = _once(rows)
    order = np.arange(rows.size) if once else np.lexsort((ranks, rows))
    count = np.bincount(rows, minlength=n)
    row, rank = rows[order], ranks[order].astype(np.float64)
    start = np.cumsum(count) - count
    position = np.arange(row.size) - start[row] + 1  # this pair's place among the relevant
    has = count > 0
    size = count[has].astype(np.float64)

    def total(weights: np.ndarray) -> np.ndarray:
        return weights if once else np.bincount(row, weights=weights, minlength=n)[has]

    values: dict[str, np.ndarray] = {}
    gain = 1 / np.log2(rank + 1)
    for k in ks:
        hit = rank <= k
        hits = total(hit.astype(np.float64))
        best = np.minimum(count[has], k)
        ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])[best]
        values[f"recall@{k}"] = hits / size
        values[f"ndcg@{k}"] = total(np.where(hit, gain, 0.0)) / ideal
        values[f"hit@{k}"] = (hits > 0).astype(np.float64)
        values[f"precision@{k}"] = hits / k
        values[f"map@{k}"] = total(np.where(hit, position / rank, 0.0)) / best
    values["mrr"] = 1 / rank[start[has]]
    negatives = (ranking.n_candidates - ranking.counts).astype(np.float64)
    above = ranking.greater[chosen][order] + ranking.tied[chosen][order] / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = 1 - total(above) / size / negatives[has]
    values["auc"] = np.where(negatives[has] > 0, auc, np.nan)
    return UserValues(ranking.users[has], count[has], values)


def coverage(top_items: np.ndarray, k: int, n_items: int) -> float:
    """Share of the catalogue in the first `k` of at least one row of `top_items` [n, K]."""
    shown = top_items[:, :k]
    return np.unique(shown[shown >= 0]).size / n_items if n_items else float("nan")


def mean_popularity(top_items: np.ndarray, k: int, popularity: np.ndarray) -> float:
    """Training count of the first `k` items of `top_items` [n, K]: mean per row, then over rows."""
    shown = top_items[:, :k]
    listed = shown >= 0
    totals = np.where(listed, popularity[np.maximum(shown, 0)], 0).sum(axis=1)
    lengths = listed.sum(axis=1)
    return float(np.mean(totals[lengths > 0] / lengths[lengths > 0])) if lengths.any() else np.nan


def bins(fact: str, edges: Iterable[int]) -> list[tuple[str, int, float]]:
    """(name, lowest, highest) of each bin with upper `edges`: `fact<=5`, `fact 6-10`, `fact>10`."""
    ordered = sorted(set(edges))
    out: list[tuple[str, int, float]] = []
    low = 0
    for edge in ordered:
        name = f"{fact} {low}-{edge}" if edge > low else f"{fact} {edge}"
        out.append((name if out else f"{fact}<={edge}", low, edge))
        low = edge + 1
    return [*out, (f"{fact}>{ordered[-1]}", low, float("inf"))] if ordered else []


def slice_masks(
    slices: Slices,
    history: np.ndarray,
    popularity: np.ndarray,
    history_bins: Iterable[int] = (),
    popularity_bins: Iterable[int] = (),
) -> SliceMasks:
    """Every slice but `overall`.

    Args:
      slices: cold users and tail items.
      history: [U] training items of each user.
      popularity: [I] training users of each item.
      history_bins, popularity_bins: upper edges.
    """
    users = {"cold_users": slices.cold_users, "warm_users": ~slices.cold_users}
    items = {"tail_items": slices.tail_items, "head_items": ~slices.tail_items}
    for name, low, high in bins("history", history_bins):
        users[name] = (history >= low) & (history <= high)
    for name, low, high in bins("popularity", popularity_bins):
        items[name] = (popularity >= low) & (popularity <= high)
    return SliceMasks(users, items)


def summarize(of_users: UserValues, within: np.ndarray | None = None) -> Values:
    """Means over users (those in `within` [U] bool), then `n` users and `n_relevant` pairs.

    Users for whom a metric is undefined (auc without a non-relevant candidate) do not enter
    its mean; a metric that no user has is None.
    """
    users = of_users.users
    chosen = np.ones(users.size, bool) if within is None else within[users]
    out: Values = {}
    for name, values in of_users.values.items():
        defined = values[chosen & ~np.isnan(values)]
        out[name] = float(np.mean(defined)) if defined.size else None
    out["n"] = int(chosen.sum())
    out["n_relevant"] = int(of_users.n_relevant[chosen].sum())
    return out


# The slices of --rank_apart, and the slice whose items each ranks among themselves.
APART: Mapping[str, str] = {f"{name}_apart": name for name in ("tail_items", "head_items")}


@dataclasses.dataclass(frozen=True)
class PartData:
    """What a part's ranking and slices need, from the dataset alone."""

    relevant: Csr  # [U] items to find
    seen: Csr  # [U] masked items
    masked: tuple[str, ...]  # the parts those are from
    slices: Slices
    history: np.ndarray  # [U] int32
    popularity: np.ndarray  # [I] int32
    masks: SliceMasks


@dataclasses.dataclass(frozen=True)
class PartResult:
    """Metrics of one part.

    Attributes:
      slices: slice name -> metrics, `overall` first.
      users: per-user metrics with all, only tail, only head items as relevant; tail_apart and
        head_apart of `APART`.
      data: what was evaluated.
      n_dropped: relevant pairs left out because the item is masked for the user.
    """

    slices: dict[str, Values]
    users: dict[str, UserValues]
    data: PartData
    n_dropped: int


def part_data(dataset: Dataset, part: str, config: SliceConfig) -> PartData:
    """Relevant items, masked items (test also masks valid) and slices of `part`."""
    masked = ("train",) if part == "valid" else ("train", "valid")
    slices = dataset.slices(config)
    masks = slice_masks(
        slices, dataset.history, dataset.popularity, config.history_bins, config.popularity_bins
    )
    return PartData(
        relevant=dataset.positives((part,)),
        seen=dataset.positives(masked),
        masked=masked,
        slices=slices,
        history=dataset.history,
        popularity=dataset.popularity,
        masks=masks,
    )


def summarize_part(
    ranking: Ranking,
    data: PartData,
    ks: Sequence[int],
    apart: Mapping[str, Ranking] | None = None,
) -> PartResult:
    """Every slice of `data`; coverage, popularity and the pooled AUC on `overall` only.

    Args:
      apart: the rankings of `APART`, where there are any.
    """
    everyone = per_user(ranking, ks)
    overall = summarize(everyone)
    n = {name: overall.pop(name) for name in ("n", "n_relevant")}
    overall["auc_pooled"] = None if np.isnan(ranking.pooled_auc) else ranking.pooled_auc
    for k in ks:
        spread = coverage(ranking.top_items, k, ranking.n_items)
        shown = mean_popularity(ranking.top_items, k, data.popularity)
        overall[f"coverage@{k}"] = spread if ranking.users.size else None
        overall[f"mean_popularity@{k}"] = shown if ranking.users.size else None

    out = {"overall": overall | n}
    tables = {"all": everyone}
    for name, mask in data.masks.users.items():
        out[name] = summarize(everyone, mask)
    for name, mask in data.masks.items.items():
        of_users = per_user(ranking, ks, mask)
        out[name] = summarize(of_users)
        if name in ("tail_items", "head_items"):
            tables[name.removesuffix("_items")] = of_users

    for name, alone in (apart or {}).items():
        of_users = per_user(alone, ks)
        out[name] = summarize(of_users)
        tables[name.replace("_items", "")] = of_users

    first = ("overall", "cold_users", "warm_users", "tail_items", "head_items", *(apart or ()))
    ordered = {name: out[name] for name in (*first, *out)}
    return PartResult(ordered, tables, data, ranking.n_dropped)


# ------------------------------------------------- between the device's counts and a Ranking


def without_relevant(
    rows: np.ndarray, scores: np.ndarray, greater: np.ndarray, tied: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts against all other candidates turned into counts against the non-relevant ones.

    Args:
      rows: [N] user of each relevant pair.
      scores: [N] its score.
      greater, tied: [N] candidates of the user with a greater, with the same score.
    """
    if _once(rows):
        return greater.astype(np.int64), tied.astype(np.int64)
    order = np.lexsort((-scores, rows))
    rows_o, scores_o = rows[order], scores[order]
    place = np.arange(order.size)

    # Runs of equal scores of a user, greatest first: what is before a pair's run, from the user's
    # start on, are the relevant items above it; what is in the run are those tied with it.
    user_starts, run_starts = np.ones(order.size, bool), np.ones(order.size, bool)
    user_starts[1:] = rows_o[1:] != rows_o[:-1]
    run_starts[1:] = user_starts[1:] | (scores_o[1:] != scores_o[:-1])
    first_of_user = np.maximum.accumulate(np.where(user_starts, place, 0))
    first_of_run = np.maximum.accumulate(np.where(run_starts, place, 0))
    run = np.cumsum(run_starts) - 1
    run_length = np.bincount(run)[run] if order.size else run

    out_greater, out_tied = greater.astype(np.int64), tied.astype(np.int64)
    out_greater[order] -= first_of_run - first_of_user
    out_tied[order] -= run_length - 1
    return out_greater, out_tied


class PairOrder:
    """From the order in which users are counted to that of a `Ranking`, by ascending user."""

    def __init__(self, users: np.ndarray, relevant: Csr) -> None:
        """For every user with relevant items ([n], in any order) and rows [U] of items to find."""
        self._relevant, self._by_user = relevant, np.argsort(users)
        self._ranked = users[self._by_user]
        # By ascending user the pairs are the relevant rows themselves: move each run to its row.
        length = relevant.counts[users].astype(np.int64)
        within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        self._back = np.empty(within.size, np.int64)
        self._back[np.repeat(relevant.offsets[users], length) + within] = np.arange(within.size)
        self._pair_user = np.repeat(np.arange(relevant.offsets.size - 1), relevant.counts)

    def ranking(
        self, masked: np.ndarray, n_items: int, counts: Mapping[str, np.ndarray], top: np.ndarray
    ) -> Ranking:
        """The ranking that the device's counts come to.

        Args:
          masked: [n] how many items are masked, in the order of the users.
          n_items: I.
          counts: "score" (-inf where the item is masked), and the numbers of unmasked candidates,
            relevant ones included: "greater", "tied", "tied_before" (tied with a smaller index);
            [N] each, user after user in the order of the users.
          top: [n, K] lists, in the order of the users.
        """
        kept = counts["score"][self._back] > -np.inf
        flat = {name: values[self._back][kept] for name, values in counts.items()}
        pair_user = self._pair_user[kept]
        count = np.bincount(pair_user, minlength=self._relevant.offsets.size - 1)
        alive = count[self._ranked] > 0  # users who keep a relevant item
        ranked = self._ranked[alive]
        greater, tied = without_relevant(pair_user, flat["score"], flat["greater"], flat["tied"])
        return Ranking(
            users=ranked,
            offsets=np.concatenate([[0], np.cumsum(count[ranked])]),
            items=self._relevant.indices[kept],
            ranks=1 + flat["greater"].astype(np.int64) + flat["tied_before"].astype(np.int64),
            scores=flat["score"].astype(np.float32),
            greater=greater,
            tied=tied,
            n_candidates=n_items - masked[self._by_user][alive].astype(np.int64),
            top_items=top[self._by_user][alive],
            n_items=n_items,
            n_dropped=int((~kept).sum()),
        )


def pool_tables(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Tables that find, for any score x, the relevant pairs scored above x or the same.

    The range of `scores` [N] is cut into equal cells; a binary search that starts from x's
    cell needs few steps.

    Returns:
      scores: [D] float32, the distinct ones ascending, then at least one +inf.
      above2: [D] int32, twice the number of pairs scored at least scores[d].
      ties: [D] int32, the number of pairs scored scores[d].
      base: [cells] int32, how many distinct scores lie below all of the cell before.
      low, scale: [] float32, cell of x = (x / 2 - low / 2) * scale, halved against overflow.
      steps: [] int32, halvings that the fullest cell and its two neighbours need.
    """
    distinct, ties = np.unique(scores, return_counts=True)
    room = 1 << distinct.size.bit_length()
    padded = np.full(room, np.inf, np.float32)
    padded[: distinct.size] = distinct
    above2, tied = np.zeros(room, np.int32), np.zeros(room, np.int32)
    above2[: distinct.size] = 2 * np.cumsum(ties[::-1])[::-1]
    tied[: distinct.size] = ties

    # At most 2^20 cells: float32 then places any score within one cell of where float64 does.
    cells = min(max(4 * room, 1 << 10), 1 << 20)
    low, high = np.float64(distinct[0]), np.float64(distinct[-1])
    scale = np.float32(min(cells / (high / 2 - low / 2), 1e38) if high > low else 0.0)
    place = np.minimum((distinct.astype(np.float64) / 2 - low / 2) * np.float64(scale), cells - 1)
    below = np.zeros(cells + 1, np.int64)  # distinct scores in the cells before
    np.cumsum(np.bincount(place.astype(np.int64), minlength=cells), out=below[1:])
    cell = np.arange(cells)
    base = below[np.maximum(cell - 1, 0)]
    reach = below[np.minimum(cell + 2, cells)]
    return {
        "scores": padded,
        "above2": above2,
        "ties": tied,
        "base": base.astype(np.int32),
        "low": np.asarray(low, np.float32),
        "scale": np.asarray(scale, np.float32),
        "steps": np.asarray(int(np.max(reach - base)).bit_length(), np.int32),
    }
