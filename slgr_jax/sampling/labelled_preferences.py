"""Labelled preferences: pairs of items on which the teacher's word can be checked.

Of an item that a user chose, and that the recommender is not trained on, and an item that the user
did not choose, the teacher is right if it prefers the chosen one. Chosen items are validation
interactions, or training items that were hidden from the teacher and are left out of training
too; for a report on a finished run, test interactions.

A labelled preference is drawn as preferences are, given that exactly one of its items is chosen.
For a teacher whose unlisted items rank below its list L_u, a preference is a listed item over one
of N_u unlisted ones. So a chosen item of the list counts 1 (over a drawn unlisted item: right),
and a chosen item outside it counts |L_u| / N_u (a drawn listed item is preferred over it: wrong).

Which of them a step draws: `preferences.draw_answers`.

Shape letters: U users, m chosen items, n places to draw from, E entries of the teacher's lists.
"""

from __future__ import annotations

import numpy as np

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.sampling.arrays import (
    Chosen,
    Excluded,
    Known,
    KnownLists,
    KnownPairs,
    TeacherLists,
    TeacherPairs,
    excluded,
    host_array,
)
from slgr_jax.sampling.context import host32


def hidden_positives(dataset: Dataset, users: np.ndarray, items: np.ndarray) -> Csr:
    """Training items among the (user, item) pairs that a teacher answered."""
    train = dataset.positives(("train",))
    own = _keys(_owners(train), train.indices, dataset.n_items)
    asked = np.unique(_keys(users, items, dataset.n_items))
    found = asked[_among(asked, own)]
    return Csr.from_pairs(found // dataset.n_items, found % dataset.n_items, dataset.n_users)


def make_chosen(dataset: Dataset, source: str, hidden: Csr | None = None) -> Chosen:
    """The chosen items of `source`: valid, test or hidden (host arrays).

    Args:
      hidden: of source hidden: the training items, by user.
    """
    parts = {"valid": ("train", "valid"), "test": ("train", "valid", "test")}
    everything = dataset.positives(parts.get(source, ("train", "valid")))
    count = dataset.n_items
    if source == "hidden":
        assert hidden is not None
        found = _keys(_owners(hidden), hidden.indices, count)
        part, place = dataset.train, dataset.moments("train")
    else:
        before = dataset.positives(parts[source][:-1])
        part = dataset.part(source)
        place = dataset.moments(source)
        found = np.unique(_keys(part.users, part.items, count))
        found = found[~_among(found, _keys(_owners(before), before.indices, count))]
    # The moment of an item that occurs twice is its first.
    keys = _keys(part.users, part.items, count)
    order = np.lexsort((place, keys))
    as_of = place[order[np.searchsorted(keys[order], found)]]
    chosen = Csr.from_pairs(found // count, found % count, dataset.n_users)
    return Chosen(
        host32(chosen.offsets),
        host32(found // count),
        host32(found % count),
        host32(as_of),
        excluded(everything, None, count),
    )


def make_known(
    dataset: Dataset,
    teacher: TeacherLists | TeacherPairs,
    chosen: Chosen,
) -> Known:
    """What `teacher` (host arrays) says about the chosen items."""
    count = dataset.n_items
    found = _keys(np.asarray(chosen.users), np.asarray(chosen.items), count)
    excluded_pairs = _excluded_keys(chosen.negatives, count)
    if isinstance(teacher, TeacherPairs):
        users, items = np.asarray(teacher.users), np.asarray(teacher.items)
        preferred, other = (_keys(users, items[:, side], count) for side in (0, 1))
        right = _among(preferred, found) & ~_among(other, excluded_pairs)
        wrong = _among(other, found) & ~_among(preferred, excluded_pairs)
        places = np.flatnonzero(right | wrong)
        sides = np.where(right, preferred, other)[places]
        as_of = np.asarray(chosen.as_of)[np.searchsorted(found, sides)] if places.size else places
        return Known(
            chosen, KnownPairs(host32(places), host_array(right[places], bool), host32(as_of))
        )
    offsets = np.asarray(teacher.offsets)
    owners = np.repeat(np.arange(offsets.size - 1, dtype=np.int64), np.diff(offsets))
    keys = _keys(owners, np.asarray(teacher.items), count)
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys[order], found), max(keys.size - 1, 0))
    entry = np.where(keys[order][at] == found, order[at], -1) if keys.size else found * 0 - 1
    others = np.flatnonzero(~_among(keys, excluded_pairs))
    other_counts = np.bincount(owners[others], minlength=dataset.n_users)
    users = np.asarray(chosen.users)
    outside = None
    if teacher.unlisted is not None:
        both = Csr.from_pairs(
            np.concatenate([owners, excluded_pairs // count]),
            np.concatenate([np.asarray(teacher.items), excluded_pairs % count]),
            dataset.n_users,
        )
        outside = excluded(both, None, count)
        able = np.where(entry >= 0, outside.free[users] > 0, other_counts[users] > 0)
        able &= np.diff(offsets)[users] > 0
    else:
        able = (entry >= 0) & (other_counts[users] > 0)
    places = np.flatnonzero(able)
    other_offsets = np.concatenate([[0], np.cumsum(other_counts)])
    return Known(
        chosen,
        KnownLists(
            host32(places), host32(entry[places]), host32(other_offsets), host32(others), outside
        ),
    )


def _owners(pairs: Csr) -> np.ndarray:
    return np.repeat(np.arange(pairs.offsets.size - 1, dtype=np.int64), pairs.counts)


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
    return _keys(rows, np.asarray(cut.keys) + place, n_items)
