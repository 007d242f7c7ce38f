"""Labelled preferences: pairs of items on which the teacher's word can be checked.

Of an item that a user chose, and that the recommender is not trained on, and an item that the user
did not choose, the teacher is right if it prefers the chosen one. Chosen items are validation
interactions, or training items that were hidden from the teacher and are left out of training
too; for a report on a finished run, test interactions.

A labelled preference is drawn as preferences are, given that exactly one of its items is chosen.
For a teacher whose unlisted items rank below its list L_u, a preference is a listed item over one
of N_u unlisted ones. So a chosen item of the list counts 1 (over a drawn unlisted item: right),
and a chosen item outside it counts |L_u| / N_u (a drawn listed item is preferred over it: wrong).

Shape letters: U users, m chosen items, n places to draw from, E entries of the teacher's lists,
K labelled preferences, S steps drawn at once.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Excluded, Facts, PairFacts, Share, excluded, host_array
from slgr_jax.sampling.context import Queries, host32
from slgr_jax.sampling.negatives import below, draw_outside
from slgr_jax.sampling.preferences import pair_facts, unlisted_words
from slgr_jax.sampling.teacher_arrays import PreferenceRule, TeacherLists, TeacherPairs


@struct.dataclass
class ChosenItems:
    """Items that users chose and the recommender does not learn from, by user.

    Attributes:
      offsets: [U + 1]; users, items: [m].
      as_of: [m] how many training events of the user lie before.
      negatives: each user's chosen items of all parts looked at, cut out.
    """

    offsets: Int[Array, "U1"]
    users: Int[Array, "m"]
    items: Int[Array, "m"]
    as_of: Int[Array, "m"]
    negatives: Excluded


@struct.dataclass
class ListLabels:
    """What the teacher's lists say about chosen items.

    Attributes:
      chosen: [n] places in `ChosenItems` on which the lists have a word.
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
class PairLabels:
    """Stated preferences of which exactly one item is chosen: places among the teacher's pairs."""

    pairs: Int[Array, "n"]
    right: Bool[Array, "n"]
    as_of: Int[Array, "n"]


@struct.dataclass
class LabelSource:
    """All that labelled preferences are drawn from."""

    chosen: ChosenItems
    labels: ListLabels | PairLabels
    share: Share | None = None  # of a shard of users

    @property
    def count(self) -> int | Int[Array, ""]:
        """How many places there are to draw from; of a shard at least 1, padding."""
        if self.share is not None:
            return jnp.maximum(self.share.count, 1)
        labels = self.labels
        return int((labels.pairs if isinstance(labels, PairLabels) else labels.chosen).shape[0])


@struct.dataclass
class LabelledPreferences:
    """Drawn labelled preferences, [S, K] of S steps, [K] of one; weight 0 is padding.

    Attributes:
      items: [..., 2] (preferred by the teacher, other).
      margins: the teacher's score difference.
      right: 1 where the preferred item is the chosen one.
      facts: what is known of each.
      entries: as of `Preferences`.
    """

    queries: Queries
    items: Int[Array, "*K 2"]
    margins: Float[Array, "*K"]
    right: Float[Array, "*K"]
    weights: Float[Array, "*K"]
    facts: PairFacts
    entries: Int[Array, "*K 2"] | None = None


# ------------------------------------------------------------------------------- on the host


def hidden_positives(dataset: Dataset, users: np.ndarray, items: np.ndarray) -> Csr:
    """Training items among the (user, item) pairs that a teacher answered."""
    train = dataset.positives(("train",))
    positives = train.keys(dataset.n_items)
    asked = np.unique(_keys(users, items, dataset.n_items))
    hidden = asked[_among(asked, positives)]
    return Csr.from_pairs(hidden // dataset.n_items, hidden % dataset.n_items, dataset.n_users)


def chosen_items(dataset: Dataset, source: str, hidden: Csr | None = None) -> ChosenItems:
    """The chosen items of `source`: valid, test or hidden (host arrays).

    Args:
      hidden: of source hidden: the training items, by user.
    """
    parts = {"valid": ("train", "valid"), "test": ("train", "valid", "test")}
    everything = dataset.positives(parts.get(source, ("train", "valid")))
    n_items = dataset.n_items
    if source == "hidden":
        assert hidden is not None
        chosen_keys = hidden.keys(n_items)
        part, place = dataset.train, dataset.moments("train")
    else:
        before = dataset.positives(parts[source][:-1])
        part = dataset.part(source)
        place = dataset.moments(source)
        chosen_keys = np.unique(_keys(part.users, part.items, n_items))
        chosen_keys = chosen_keys[~before.contains(chosen_keys // n_items, chosen_keys % n_items)]

    # The moment of an item that occurs twice is its first.
    keys = _keys(part.users, part.items, n_items)
    order = np.lexsort((place, keys))
    as_of = place[order[np.searchsorted(keys[order], chosen_keys)]]

    chosen = Csr.from_pairs(chosen_keys // n_items, chosen_keys % n_items, dataset.n_users)
    return ChosenItems(
        host32(chosen.offsets),
        host32(chosen_keys // n_items),
        host32(chosen_keys % n_items),
        host32(as_of),
        excluded(everything, None, n_items),
    )


def label_source(
    dataset: Dataset, teacher: TeacherLists | TeacherPairs, chosen: ChosenItems
) -> LabelSource:
    """What `teacher` (host arrays) says about the chosen items."""
    n_items = dataset.n_items
    chosen_keys = _keys(np.asarray(chosen.users), np.asarray(chosen.items), n_items)
    excluded_keys = _excluded_keys(chosen.negatives, n_items)
    if isinstance(teacher, TeacherPairs):
        labels = _pair_labels(teacher, chosen, chosen_keys, excluded_keys, n_items)
        return LabelSource(chosen, labels)
    return LabelSource(chosen, _list_labels(dataset, teacher, chosen, chosen_keys, excluded_keys))


def _pair_labels(
    teacher: TeacherPairs,
    chosen: ChosenItems,
    chosen_keys: np.ndarray,
    excluded_keys: np.ndarray,
    n_items: int,
) -> PairLabels:
    users, items = np.asarray(teacher.users), np.asarray(teacher.items)
    preferred, other = (_keys(users, items[:, side], n_items) for side in (0, 1))
    right = _among(preferred, chosen_keys) & ~_among(other, excluded_keys)
    wrong = _among(other, chosen_keys) & ~_among(preferred, excluded_keys)

    places = np.flatnonzero(right | wrong)
    chosen_side = np.where(right, preferred, other)[places]
    as_of = places
    if places.size:
        as_of = np.asarray(chosen.as_of)[np.searchsorted(chosen_keys, chosen_side)]
    return PairLabels(host32(places), host_array(right[places], bool), host32(as_of))


def _list_labels(
    dataset: Dataset,
    teacher: TeacherLists,
    chosen: ChosenItems,
    chosen_keys: np.ndarray,
    excluded_keys: np.ndarray,
) -> ListLabels:
    n_items = dataset.n_items
    offsets = np.asarray(teacher.offsets)
    owners = np.repeat(np.arange(offsets.size - 1, dtype=np.int64), np.diff(offsets))
    keys = _keys(owners, np.asarray(teacher.items), n_items)

    entry = np.full(chosen_keys.size, -1)
    if keys.size:
        order = np.argsort(keys)
        at = np.minimum(np.searchsorted(keys[order], chosen_keys), keys.size - 1)
        entry = np.where(keys[order][at] == chosen_keys, order[at], -1)

    others = np.flatnonzero(~_among(keys, excluded_keys))
    other_counts = np.bincount(owners[others], minlength=dataset.n_users)
    users = np.asarray(chosen.users)
    outside = None
    if teacher.unlisted is not None:
        listed_and_chosen = Csr.from_pairs(
            np.concatenate([owners, excluded_keys // n_items]),
            np.concatenate([np.asarray(teacher.items), excluded_keys % n_items]),
            dataset.n_users,
        )
        outside = excluded(listed_and_chosen, None, n_items)
        able = np.where(entry >= 0, outside.free[users] > 0, other_counts[users] > 0)
        able &= np.diff(offsets)[users] > 0
    else:
        able = (entry >= 0) & (other_counts[users] > 0)

    places = np.flatnonzero(able)
    other_offsets = np.concatenate([[0], np.cumsum(other_counts)])
    return ListLabels(
        host32(places), host32(entry[places]), host32(other_offsets), host32(others), outside
    )


def _keys(users: np.ndarray, items: np.ndarray, n_items: int) -> np.ndarray:
    return users.astype(np.int64) * n_items + items


def _among(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[n] bool: which of `keys` are in the sorted `wanted`."""
    if not wanted.size:
        return np.zeros(keys.size, bool)
    at = np.minimum(np.searchsorted(wanted, keys), wanted.size - 1)
    return np.asarray(wanted[at] == keys, bool)


def _excluded_keys(cut: Excluded, n_items: int) -> np.ndarray:
    """The (user, item) keys of a uniform `Excluded`, ascending."""
    offsets = np.asarray(cut.offsets).astype(np.int64)
    rows = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    place = np.arange(rows.size) - offsets[rows]
    # Keys count the items below that are not cut out; the row's own place adds those that are.
    return _keys(rows, np.asarray(cut.keys) + place, n_items)


# ----------------------------------------------------------------------------- on the device


def draw_labelled(
    words_of: UInt32[Array, "S 2"],
    source: LabelSource,
    teacher: TeacherLists | TeacherPairs,
    facts: Facts,
    rule: PreferenceRule,
    *,
    histories: bool,
) -> LabelledPreferences:
    """K = rule.count labelled preferences a step, distributed as preferences are.

    Args:
      histories: whether the backbone reads them, so that queries say as of which moment.
    """
    bits = random_bits.words(words_of, 4, rule.count)
    place = below(bits[0], source.count)
    if isinstance(source.labels, PairLabels):
        assert isinstance(teacher, TeacherPairs)
        pair = source.labels.pairs[place]
        users, as_of = teacher.users[pair], source.labels.as_of[place]
        items, margins = teacher.items[pair], teacher.margins[pair]
        right = source.labels.right[place].astype(jnp.float32)
        weights, entries = jnp.ones(pair.shape, jnp.float32), None
    else:
        assert isinstance(teacher, TeacherLists)
        at = source.labels.chosen[place]
        users, as_of = source.chosen.users[at], source.chosen.as_of[at]
        items, margins, right, weights, entries = _draw_from_lists(
            bits, place, source.chosen, source.labels, teacher, rule
        )
    if source.share is not None:
        weights = weights * source.share.weight
    return LabelledPreferences(
        Queries(users, as_of if histories else None),
        items,
        margins,
        right,
        weights,
        pair_facts(facts, users, items, native=rule.native),
        entries,
    )


def _draw_from_lists(
    bits: UInt32[Array, "4 S K"],
    place: Int[Array, "S K"],
    chosen: ChosenItems,
    labels: ListLabels,
    teacher: TeacherLists,
    rule: PreferenceRule,
) -> tuple[
    Int[Array, "S K 2"],
    Float[Array, "S K"],
    Float[Array, "S K"],
    Float[Array, "S K"],
    Int[Array, "S K 2"],
]:
    """items, margins, right, weights, entries."""
    at, entry = labels.chosen[place], labels.entry[place]
    users, positive = chosen.users[at], chosen.items[at]
    listed = entry >= 0

    # Against another entry of the list.
    start = labels.other_offsets[users]
    count = labels.other_offsets[users + 1] - start
    other = labels.others.at[start + below(bits[1], count)].get(mode="clip")
    score, other_score = teacher.scores[jnp.maximum(entry, 0)], teacher.scores[other]
    gap = score - other_score
    right = gap > 0
    other_item = teacher.items[other]
    items = jnp.stack(
        [jnp.where(right, positive, other_item), jnp.where(right, other_item, positive)], axis=-1
    )
    entries = jnp.stack([jnp.where(right, entry, other), jnp.where(right, other, entry)], axis=-1)
    margins = jnp.abs(gap)
    able = listed & (count > 0) & (margins > 0) & (margins >= rule.min_gap)
    weights = able.astype(jnp.float32)

    # Against an item outside it, where these rank below.
    if labels.outside is not None:
        share = np.uint32(unlisted_words(rule))
        use = bits[3] <= share if share else jnp.zeros(users.shape, bool)
        # Where nothing outside is asked for, a row that is in a cache: reading rows is the cost.
        asked = jnp.where(use & listed, users, 0)
        free, drawn = draw_outside(bits[2], asked, labels.outside, None, native=rule.native)
        over_unlisted = jnp.stack(
            [jnp.where(listed, positive, other_item), jnp.where(listed, free, positive)], axis=-1
        )
        room = jnp.maximum(labels.outside.free[users], 1).astype(jnp.float32)
        mass = jnp.where(listed, drawn, count.astype(jnp.float32) / room)
        items = jnp.where(use[..., None], over_unlisted, items)
        one_listed = jnp.stack([jnp.where(listed, entry, other), jnp.full_like(entry, -1)], axis=-1)
        entries = jnp.where(use[..., None], one_listed, entries)
        margins = jnp.where(use, jnp.where(listed, score, other_score) - teacher.floor, margins)
        right = jnp.where(use, listed, right)
        weights = jnp.where(use, mass, weights)
    return items, margins, right.astype(jnp.float32), weights, entries
