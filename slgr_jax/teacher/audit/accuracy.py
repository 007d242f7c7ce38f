"""How accurate is a teacher? Coverage, agreement with labelled preferences, consistency, cost.

All numbers of `slgr teach report` (reports/teacher_audit.py). Accuracy is that of pairs
(known_pairs.py): the share of them that is ordered right. Pairs count alike, and the 95 % interval
holds though those of one user depend on each other. A mean within users first would be wrong for
free lists: a chosen item that is listed is above nearly all that it is compared with, one that is
not is below the few that are listed: one user has fifty right pairs and another one wrong pair.

Shape letters: U users, I items, n pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from slgr_jax.config import SliceConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset, Slices
from slgr_jax.teacher.audit import known_pairs
from slgr_jax.teacher.audit.added_value import AddedValue
from slgr_jax.teacher.audit.consistency import Consistency
from slgr_jax.teacher.audit.known_pairs import HELD_IN, VALIDATION, AuditPairs
from slgr_jax.teacher.products.coverage import useful
from slgr_jax.teacher.products.rows import Teacher

Bin = tuple[str, int, float]  # name, lowest, highest
FEWEST_USERS = 30  # a slice of fewer says too little to believe in it
_PARTS = 4  # of the margins


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Accuracy on the known pairs of a slice: the teacher's, and that of the data alone.

    Attributes:
      known: held-in | validation: what the positives are.
      slice: of users, positives or margins.
      matched: only pairs of two items of about equal popularity.
      leans: the slice is one of positives by popularity, and pairs are not matched: whoever likes
        unpopular items, or tosses a coin, beats the data on unpopular positives.
      pairs, users: how many.
      accuracy, low, high: the teacher's, with its 95 % interval.
      popularity, item_item: of the same pairs, by popularity and by item-item neighbours.
      gain, gain_low, gain_high: accuracy - item_item, with its 95 % interval (paired).
    """

    known: str
    slice: str
    matched: bool
    leans: bool
    pairs: int
    users: int
    accuracy: float
    low: float
    high: float
    popularity: float
    item_item: float
    gain: float
    gain_low: float
    gain_high: float

    @property
    def believed(self) -> bool:
        """The teacher is better than a coin and knows more than the data here, beyond chance."""
        return self.tells and self.low > 0.5 and self.gain_low > 0

    @property
    def tells(self) -> bool:
        """Enough users, and a slice that does not lean."""
        return self.users >= FEWEST_USERS and not self.leans

    @property
    def name(self) -> str:
        """The slice, and whether its pairs are matched."""
        return f"matched: {self.slice}" if self.matched else self.slice


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Of how many users or items of a slice the teacher has something to say."""

    slice: str
    total: int
    covered: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the answers in the log cost, with those that could not be used.

    Attributes:
      answers, unusable: how many; untold: those among `answers` whose tokens are not known.
      money: in the unit of the prices; 0 without them.
    """

    answers: int
    unusable: int
    untold: int
    prompt_tokens: int
    completion_tokens: int
    money: float


@dataclasses.dataclass(frozen=True)
class TeacherAudit:
    """Everything that the report says.

    Attributes:
      data: directory of the dataset.
      ordered: known -> share of the known pairs looked at that the teacher orders.
      answers: position bias and self-consistency; None without an answer log.
      value: what its lists add at scoring time; None where there are none, or nothing to judge by.
    """

    data: str
    manifest: schema.TeacherManifest
    coverage: tuple[Coverage, ...]
    agreement: tuple[Agreement, ...]
    ordered: Mapping[str, float]
    answers: Consistency | None
    cost: Cost | None
    value: AddedValue | None = None

    @property
    def deciding(self) -> str:
        """Which labelled preferences the verdict rests on: held-in ones, where there are any.

        Of a free list nobody knows which hidden items it left out: what it says of those that it
        lists flatters it, and validation goes first.
        """
        known = {row.known for row in self.agreement if row.pairs}
        order = (HELD_IN, VALIDATION)
        if self.manifest.unlisted == "below":
            order = order[::-1]
        return next((source for source in order if source in known), "")


def measure(
    dataset: Dataset,
    teacher: Teacher,
    *,
    history_bins: Sequence[Bin] = (),
    popularity_bins: Sequence[Bin] = (),
    most_pairs: int = 50,
    most_users: int = 20_000,
    seed: int = 0,
    answers: Consistency | None = None,
    cost: Cost | None = None,
) -> TeacherAudit:
    """Measure the teacher of `dataset`.

    Args:
      history_bins, popularity_bins: slices by training interactions of the user, of the item.
      most_pairs: negatives for each positive.
      most_users: users whose pairs are looked at, drawn if there are more.
      seed: of both draws.
      answers, cost: of the answer log.
    """
    slices = dataset.slices(SliceConfig())
    among = np.zeros(dataset.n_users, bool)
    rng = np.random.default_rng(seed)
    listed = np.flatnonzero(np.diff(teacher.offsets))
    among[rng.permutation(listed)[:most_users]] = True

    sources = [VALIDATION]
    if teacher.manifest.training_items == "hidden":
        sources.insert(0, HELD_IN)

    rows: list[Agreement] = []
    ordered = {}
    cosines = known_pairs.cosines(dataset)
    for source in sources:
        for near in (False, True):
            pairs = known_pairs.find(
                dataset, teacher, source, among=among, most=most_pairs, matched=near, seed=seed
            )
            of_users = user_slices(dataset, slices, pairs.users, history_bins)
            of_items = item_slices(dataset, slices, pairs.positives, popularity_bins)
            cuts = of_users | of_items | margin_slices(pairs.margin)
            if near:
                cuts = {name: cuts[name] for name in ("all", "cold users", *of_items)}
            else:
                ordered[source] = len(pairs.users) / pairs.asked if pairs.asked else float("nan")
            rows += _agreement(dataset, source, pairs, cuts, cosines, near, set(of_items))

    return TeacherAudit(
        data=str(dataset.path),
        manifest=teacher.manifest,
        coverage=tuple(_coverage(dataset, teacher, slices, history_bins, popularity_bins)),
        agreement=tuple(rows),
        ordered=ordered,
        answers=answers,
        cost=cost,
    )


def user_slices(
    dataset: Dataset, slices: Slices, users: np.ndarray, bins: Iterable[Bin]
) -> dict[str, np.ndarray]:
    """Name -> [n] bool, by the training interactions of each pair's user."""
    cold, history = slices.cold_users[users], dataset.history[users]
    masks = {"all": np.ones(users.size, bool), "cold users": cold, "warm users": ~cold}
    return masks | {name: (history >= low) & (history <= high) for name, low, high in bins}


def item_slices(
    dataset: Dataset, slices: Slices, items: np.ndarray, bins: Iterable[Bin]
) -> dict[str, np.ndarray]:
    """Name -> [n] bool, by the training interactions of each pair's positive."""
    tail, popularity = slices.tail_items[items], dataset.popularity[items]
    masks = {"tail items": tail, "head items": ~tail}
    return masks | {name: (popularity >= low) & (popularity <= high) for name, low, high in bins}


def margin_slices(margin: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> [n] bool: margins cut at their quartiles; NaN is a pair with an unlisted item."""
    masks = {}
    apart = margin[~np.isnan(margin)]
    if apart.size:
        edges = np.unique(np.quantile(apart, np.arange(1, _PARTS) / _PARTS, method="lower"))
        for low, high in itertools.pairwise([-np.inf, *edges.tolist(), np.inf]):
            name = f"margin {low:.3g} to {high:.3g}"
            name = f"margin<={high:.3g}" if low == -np.inf else name
            name = f"margin>{low:.3g}" if high == np.inf else name
            masks[name] = (margin > low) & (margin <= high)
    if apart.size < margin.size:
        masks["one unlisted"] = np.isnan(margin)
    return masks


def _agreement(
    dataset: Dataset,
    source: str,
    pairs: AuditPairs,
    cuts: Mapping[str, np.ndarray],
    cosines: known_pairs.Cosines,
    matched: bool,
    of_items: Collection[str],
) -> list[Agreement]:
    if not len(pairs.users):
        return []
    held_in = source == HELD_IN
    popularity = known_pairs.by_popularity(dataset, pairs, held_in=held_in)
    items = known_pairs.by_items(dataset, pairs, cosines, held_in=held_in)
    right = pairs.right.astype(np.float64)

    rows = []
    for name, cut in cuts.items():
        if not cut.any():
            continue
        users = pairs.users[cut]
        accuracy, low, high = interval(users, right[cut])
        gain, gain_low, gain_high = interval(users, right[cut] - items[cut])
        rows.append(
            Agreement(
                known=source,
                slice=name,
                matched=matched,
                leans=not matched and name in of_items,
                pairs=int(cut.sum()),
                users=int(np.unique(users).size),
                accuracy=accuracy,
                low=max(low, 0.0),
                high=min(high, 1.0),
                popularity=float(popularity[cut].mean()),
                item_item=float(items[cut].mean()),
                gain=gain,
                gain_low=gain_low,
                gain_high=gain_high,
            )
        )
    return rows


def interval(
    users: np.ndarray, values: np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `values` over pairs, and its interval over users; NaN ends of a single user.

    The mean A is a ratio of sums over users, of their values t_u and their pairs n_u. Its standard
    error is sqrt(U / (U - 1) sum_u (t_u - A n_u)^2) / sum_u n_u (linearised; Cochran 1977, section
    6.4), and Student's with U - 1 degrees of freedom: with a pair a user, the t interval.

    Args:
      users, values: [n] of pairs.
    """
    from scipy import stats  # as slow to import as JAX

    _, row, counts = np.unique(users, return_inverse=True, return_counts=True)
    mean = float(values.mean())
    if counts.size < 2:
        return mean, float("nan"), float("nan")
    residuals = np.bincount(row, weights=values) - mean * counts
    spread = float((residuals**2).sum()) * counts.size / (counts.size - 1)
    half = float(stats.t.ppf((1 + level) / 2, counts.size - 1)) * math.sqrt(spread) / values.size
    return mean, mean - half, mean + half


def _coverage(
    dataset: Dataset,
    teacher: Teacher,
    slices: Slices,
    history_bins: Iterable[Bin],
    popularity_bins: Iterable[Bin],
) -> Iterable[Coverage]:
    users, items = useful(dataset, teacher)
    for has, cuts, counts, bins in (
        (users, {"users": None, "cold users": slices.cold_users, "warm users": ~slices.cold_users},
         dataset.history, history_bins),
        (items, {"items": None, "tail items": slices.tail_items, "head items": ~slices.tail_items},
         dataset.popularity, popularity_bins),
    ):  # fmt: skip
        masks = {name: np.ones(has.size, bool) if cut is None else cut
                 for name, cut in cuts.items()}  # fmt: skip
        masks |= {name: (counts >= low) & (counts <= high) for name, low, high in bins}
        for name, cut in masks.items():
            if cut.any():
                yield Coverage(name, int(cut.sum()), int((has & cut).sum()))
