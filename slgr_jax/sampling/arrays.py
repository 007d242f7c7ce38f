"""Resident arrays: what drawing batches needs, built on the host, kept on the devices.

For each user the set of items that must not be drawn is cut out of the distribution over items
(`Excluded`), so that a draw is one binary search and never a rejection (`negatives.draw_outside`).

Shape letters: U users, I items, n training pairs, E entries of the teacher's lists, m entries
that can start a preference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import GuidanceConfig, SamplerConfig
from slgr_jax.data.dataset import Csr, Dataset, beaten
from slgr_jax.errors import InputError
from slgr_jax.sampling.context import Context, Queries, host32

# Keys from one of `Excluded.marks` to the next: a cache line of them (kLine of draws.cc).
MARKED = 16


@struct.dataclass
class Excluded:
    """Per user, a sorted set of items cut out of a distribution over items.

    Attributes:
      offsets: [U + 1] bounds of each user's row.
      keys: [n] mass of the items below the row's k-th item that are not cut out.
      marks: [ceil(n / MARKED)] every MARKED-th of the keys, where the CPU kernels begin a search.
      shifts: [n] mass of the row's items up to and with the k-th; None where every mass is 1,
        when it is k + 1.
      free: [U] mass that is left.
    """

    offsets: Int[Array, "U1"]
    keys: Int[Array, "n"]
    marks: Int[Array, "m"]
    shifts: Int[Array, "n"] | None
    free: Int[Array, "U"]


@struct.dataclass
class Facts:
    """What is known of each user and item from training data alone.

    Attributes:
      log_history, log_popularity: log(1 + training interactions) of each user, of each item, with
        mean 0 and standard deviation 1.
      cold, tail: 1 where the user is cold, where the item is tail.
    """

    log_history: Float[Array, "U"]
    log_popularity: Float[Array, "I"]
    cold: Float[Array, "U"]
    tail: Float[Array, "I"]


@struct.dataclass
class PairFacts:
    """`Facts` of the user and of both items of G pairs."""

    log_history: Float[Array, "G"]
    log_popularity: Float[Array, "G 2"]
    cold: Float[Array, "G"]
    tail: Float[Array, "G 2"]


@struct.dataclass
class Targets:
    """Interactions to learn from one by one, where their time or their label counts.

    Attributes:
      users, items: of each; a window's are those of its last event.
      until: how many events the user has before it; None where no history is read.
      labels: 1 or 0; None where every interaction is a positive.
    """

    users: Int[Array, "m"]
    items: Int[Array, "m"]
    as_of: Int[Array, "m"] | None
    labels: Float[Array, "m"] | None


@struct.dataclass
class Interactions:
    """Training pairs, sorted by user and item, with what drawing triples from them needs."""

    users: Int[Array, "n"]
    items: Int[Array, "n"]
    negatives: Excluded
    cumulative: Int[Array, "I1"] | None  # mass of items below i; None when every mass is 1
    facts: Facts
    targets: Targets | None = None  # drawn from instead of the pairs


@struct.dataclass
class TeacherLists:
    """Scored lists: a preference is two entries of one user with scores that differ enough.

    Entries of a user are sorted by score. A row of `starts` is (entry, its user, low, high):
    low:high (positions in the user's row) are the entries too close to it to make a preference
    with it. One array, as the four are looked up together at random places.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "E"]
    scores: Float[Array, "E"]
    starts: Int[Array, "m 4"]  # entries that can start a preference
    unlisted: Excluded | None  # list and positives cut out; None: unlisted means unknown
    floor: float = struct.field(pytree_node=False)  # score that an unlisted item counts with
    ceiling: float = struct.field(pytree_node=False)  # the greatest score

    @property
    def stated(self) -> int:
        """How many entries there are to start a preference with."""
        return int(self.starts.shape[0])


@struct.dataclass
class TeacherPairs:
    """Preferences as the teacher stated them, one by one."""

    users: Int[Array, "E"]
    items: Int[Array, "E 2"]
    margins: Float[Array, "E"]

    @property
    def stated(self) -> int:
        """How many preferences there are to draw from."""
        return int(self.users.shape[0])


@struct.dataclass
class Chosen:
    """Items that users chose and the recommender does not learn from, by user.

    Attributes:
      offsets: [U + 1]; users, items: [m].
      until: [m] how many training events of the user lie before.
      negatives: each user's chosen items of all parts looked at, cut out.
    """

    offsets: Int[Array, "U1"]
    users: Int[Array, "m"]
    items: Int[Array, "m"]
    as_of: Int[Array, "m"]
    negatives: Excluded


@struct.dataclass
class KnownLists:
    """What the teacher's lists say about chosen items.

    Attributes:
      chosen: [n] places in `Chosen` on which the lists have a word.
      entry: [n] entry of the item in the teacher's lists; -1: not listed.
      other_offsets, others: [U + 1], [E'] entries of each user that are not chosen items.
      outside: lists and chosen items cut out; None where unlisted means unknown.
    """

    chosen: Int[Array, "n"]
    entry: Int[Array, "n"]
    other_offsets: Int[Array, "U1"]
    others: Int[Array, "E"]
    outside: Excluded | None


@struct.dataclass
class KnownPairs:
    """Stated preferences of which exactly one item is chosen: places among the teacher's pairs."""

    pairs: Int[Array, "n"]
    right: Bool[Array, "n"]
    as_of: Int[Array, "n"]


@struct.dataclass
class Known:
    """All that labelled preferences are drawn from; `answers` is None where only `chosen` is
    needed."""

    chosen: Chosen
    answers: KnownLists | KnownPairs | None

    @property
    def count(self) -> int:
        """How many places there are to draw from."""
        if isinstance(self.answers, KnownPairs):
            return int(self.answers.pairs.shape[0])
        return int((self.chosen.items if self.answers is None else self.answers.chosen).shape[0])


@struct.dataclass
class Answers:
    """K pairs on which the teacher has a word, and whether it is right; weight 0: none drawn.

    `items` is (preferred by the teacher, other); `facts` are there once a step has drawn them.
    """

    queries: Queries
    items: Int[Array, "K 2"]
    margins: Float[Array, "K"]
    right: Float[Array, "K"]
    weights: Float[Array, "K"]
    facts: PairFacts | None = None


@struct.dataclass
class HeldOut:
    """For each preference an item that its user chose, and one not; weight 0: there is none."""

    items: Int[Array, "G 2"]
    weights: Float[Array, "G"]


@struct.dataclass
class DeviceArrays:
    """All device-resident data of a run."""

    interactions: Interactions
    teacher: TeacherLists | TeacherPairs | None
    context: Context = dataclasses.field(default_factory=Context)
    known: Known | None = None  # what a supervised gate learns from
    # The frozen runs whose spread a gate reads, as `scoring.Scoring`, a room further down.
    reference_runs: tuple[Any, ...] = ()

    @property
    def drawn(self) -> int:
        """How many interactions (or windows) an epoch draws."""
        targets = self.interactions.targets
        return int((self.interactions if targets is None else targets).items.shape[0])


def host_array(x: np.ndarray, dtype: type) -> Any:
    """A contiguous host array, standing in for the device array that `device_put` makes of it."""
    return np.ascontiguousarray(x, dtype)


def item_masses(popularity: np.ndarray, sampler: SamplerConfig) -> np.ndarray | None:
    """[I] int64 masses of the negative distribution; None when all are 1 (uniform, in-batch).

    Popularity masses are counts for power 1, otherwise count^power scaled to integers whose sum
    stays under 2^30; an item never seen in training has mass 0.
    """
    if sampler.negatives != "popularity":
        return None
    if sampler.popularity_power == 1.0 and int(popularity.sum()) < 2**30:
        return popularity.astype(np.int64)
    weights = np.where(popularity > 0, popularity.astype(np.float64), np.nan)
    weights = np.nan_to_num(weights**sampler.popularity_power, nan=0.0)
    scaled = weights * ((2**30 - popularity.size) / weights.sum())
    return np.where(weights > 0, np.maximum(1, scaled.astype(np.int64)), 0)


def excluded(sets: Csr, masses: np.ndarray | None, n_items: int) -> Excluded:
    """Cut the sorted `sets` (user -> items) out of the distribution with `masses` over items."""
    rows = np.repeat(np.arange(sets.offsets.size - 1), np.diff(sets.offsets))
    mass = np.ones(n_items, np.int64) if masses is None else masses
    below = np.concatenate([[0], np.cumsum(mass)])
    own = np.concatenate([[0], np.cumsum(mass[sets.indices])])
    start = own[sets.offsets[:-1]][rows]
    shifts = None if masses is None else host32(own[1:] - start)  # with the k-th
    keys = below[sets.indices] - (own[:-1] - start)  # without it
    free = below[-1] - (own[sets.offsets[1:]] - own[sets.offsets[:-1]])
    marks = keys[::MARKED]
    return Excluded(host32(sets.offsets), host32(keys), host32(marks), shifts, host32(free))


def targets(
    dataset: Dataset,
    *,
    window: int,
    history: bool,
    min_history: int,
    threshold: float,
    left_out: Csr | None = None,
) -> Targets:
    """The training interactions to learn from, in the order of the part (user, then time).

    Args:
      window: L of a sequence backbone: a target stands for itself and the L - 1 events before it,
        and every event with one before it is in exactly one window. 0: each interaction.
      history: whether the backbone reads histories.
      min_history: fewest earlier events of the user.
      threshold: label 1 from this rating on; 0: all are positives.
      left_out: interactions not to learn from.

    Raises:
      InputError: nothing is left, labels without ratings, or labels that are all the same.
    """
    part = dataset.train
    place = dataset.moments("train")
    keep = place >= max(min_history, 1 if window else 0)
    if window:  # counted back from the user's last event
        last = np.bincount(part.users, minlength=dataset.n_users) - 1
        keep &= (last[part.users] - place) % window == 0
    if left_out is not None:
        own = np.repeat(np.arange(dataset.n_users), left_out.counts) * dataset.n_items
        keys = part.users.astype(np.int64) * dataset.n_items + part.items
        keep &= ~np.isin(keys, own + left_out.indices)
    if not keep.any():
        raise InputError(
            f"no user has a training interaction with {max(min_history, 1)} earlier ones; "
            "lower --min_history or use another backbone"
        )
    labels = None
    if threshold:
        if part.ratings is None:
            raise InputError(f"--rating_threshold={threshold:g}: the dataset has no ratings")
        found = part.ratings[keep] >= threshold
        if found.all() or not found.any():
            raise InputError(
                f"--rating_threshold={threshold:g} gives all {found.size} training rows the label "
                f"{int(found[0])}; ratings go from {part.ratings.min():g} to {part.ratings.max():g}"
            )
        labels = host_array(found, np.float32)
    as_of = host32(place[keep]) if history else None
    return Targets(host32(part.users[keep]), host32(part.items[keep]), as_of, labels)


def interactions(
    dataset: Dataset, sampler: SamplerConfig, cold: np.ndarray, tail: np.ndarray
) -> Interactions:
    """The training pairs of `dataset`, ready to be drawn from (host arrays).

    Raises:
      InputError: nothing to train on, or counts past what int32 arrays address.
    """
    pairs = dataset.positives(("train",))
    if pairs.indices.size == 0:
        raise InputError(f"{dataset.path} has no training interactions; check the split")
    if pairs.indices.size >= 2**31 or dataset.n_items >= 2**30:
        raise InputError(
            f"{pairs.indices.size} training pairs and {dataset.n_items} items: device-resident "
            f"arrays hold fewer than {2**31} and {2**30}"
        )
    masses = item_masses(dataset.popularity, sampler)
    return Interactions(
        users=host32(np.repeat(np.arange(dataset.n_users), pairs.counts)),
        items=host32(pairs.indices),
        negatives=excluded(pairs, masses, dataset.n_items),
        cumulative=None if masses is None else host32(np.concatenate([[0], np.cumsum(masses)])),
        facts=Facts(
            log_history=_standardised(dataset.history),
            log_popularity=_standardised(dataset.popularity),
            cold=host_array(cold, np.float32),
            tail=host_array(tail, np.float32),
        ),
    )


def _standardised(counts: np.ndarray) -> Any:
    logs = np.log1p(counts.astype(np.float64))
    return host_array((logs - logs.mean()) / max(float(logs.std()), 1e-6), np.float32)


def every_lane_drawn(resident: DeviceArrays, sampler: SamplerConfig) -> bool:
    """Whether each user has a negative to draw, so that no lane is ever left out."""
    if sampler.negatives == "in_batch":
        return False
    if sampler.allow_positive_negatives:
        return True
    return bool(np.all(np.asarray(resident.interactions.negatives.free) > 0))


def margin_scale(teacher: TeacherLists | TeacherPairs | None) -> float:
    """The size of a typical teacher margin: the spread of its scores, or the mean margin."""
    if teacher is None:
        return 1.0
    if isinstance(teacher, TeacherPairs):
        size = float(np.mean(teacher.margins)) if teacher.margins.size else 0.0
    else:
        size = float(np.std(teacher.scores)) if teacher.scores.size else 0.0
    return size or 1.0


def teacher_lists(
    offsets: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    guidance: GuidanceConfig,
    *,
    unlisted_below: bool,
    positives: Csr,
    n_items: int,
) -> TeacherLists:
    """Per-user score lists, ready to be drawn from (host arrays).

    Args:
      offsets: [U + 1]; items, scores: [E], each user's entries sorted by score.
      unlisted_below: an item outside a user's list ranks below it.
      positives: training pairs, never the unlisted side of a preference.
    """
    counts = np.diff(offsets)
    users = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
    # Scores ascend within a row: what an entry beats comes first, what beats it comes last.
    low = beaten(offsets, scores, guidance.min_gap)
    beaten_by = beaten(offsets[-1] - offsets[::-1], -scores[::-1], guidance.min_gap)[::-1]
    high = counts[users] - beaten_by
    partners = counts[users] - (high - low)
    use_unlisted = unlisted_below and guidance.unlisted_share > 0
    able = np.ones(items.size, bool) if use_unlisted else partners > 0
    cut = None
    if use_unlisted:
        pair_users = np.repeat(np.arange(counts.size), positives.counts)
        both = Csr.from_pairs(
            np.concatenate([users, pair_users]),
            np.concatenate([items, positives.indices]),
            counts.size,
        )
        cut = excluded(both, None, n_items)
        able &= cut.free[users] > 0
    chosen = np.flatnonzero(able)
    starts = np.empty((chosen.size, 4), np.int32)  # filled by column: lists can be large
    for column, values in enumerate((chosen, users[chosen], low[chosen], high[chosen])):
        starts[:, column] = values
    return TeacherLists(
        offsets=host32(offsets),
        items=host32(items),
        scores=host_array(scores, np.float32),
        starts=host32(starts),
        unlisted=cut,
        floor=float(scores.min()) if scores.size else 0.0,
        ceiling=float(scores.max()) if scores.size else 0.0,
    )


def longest_row(resident: DeviceArrays) -> int:
    """The longest excluded row, which bounds the binary search."""
    rows = [resident.interactions.negatives]
    if isinstance(resident.teacher, TeacherLists) and resident.teacher.unlisted is not None:
        rows.append(resident.teacher.unlisted)
    if resident.known is not None:
        rows.append(resident.known.chosen.negatives)
        answers = resident.known.answers
        if isinstance(answers, KnownLists) and answers.outside is not None:
            rows.append(answers.outside)
    return max(int(np.diff(np.asarray(row.offsets)).max(initial=0)) for row in rows)
