"""Pairs whose right order is known, what the teacher says about them, and what the data know.

A user chose one item of a pair (the positive) and, as far as is known, not the other (the
negative). Chosen are training items that had been hidden from the teacher, or validation items;
negatives have neither a training nor a validation interaction. Test interactions are not looked at.

Shape letters: U users, I items, n pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import sparse

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.teacher.products.rows import Teacher

HELD_IN, VALIDATION = "held-in", "validation"
MATCHED = 1.5  # popularity-matched: neither item is more popular than this times the other
_CELLS = 1 << 24  # of a dense block

Cosines = Any  # a sparse matrix or an array; scipy has no types


@dataclasses.dataclass(frozen=True)
class AuditPairs:
    """Known pairs that the teacher orders, by user.

    Attributes:
      users, positives, negatives: [n] int32.
      right: [n] bool: the teacher prefers the positive.
      margin: [n] float32: how far its scores of the two are apart; NaN where one is unlisted.
      asked: pairs that were looked at; in the others the teacher orders nothing.
    """

    users: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    right: np.ndarray
    margin: np.ndarray
    asked: int

    def take(self, chosen: np.ndarray) -> AuditPairs:
        """The pairs where `chosen` [n] bool; all of them count as asked."""
        return AuditPairs(
            users=self.users[chosen],
            positives=self.positives[chosen],
            negatives=self.negatives[chosen],
            right=self.right[chosen],
            margin=self.margin[chosen],
            asked=int(chosen.sum()),
        )


def find(
    dataset: Dataset,
    teacher: Teacher,
    source: str,
    *,
    among: np.ndarray,
    most: int,
    matched: bool = False,
    seed: int = 0,
) -> AuditPairs:
    """Known pairs of `source` (HELD_IN or VALIDATION).

    A teacher of preferences: every row with a positive and a negative. Lists: each listed positive
    against at most `most` listed negatives of its user, drawn anew for each positive. Lists whose
    unlisted items rank below: each validation item of a listed user against `most` draws from the
    catalogue; a listed item is above an unlisted one, and two unlisted ones are not ordered.

    Args:
      among: [U] bool: users to look at.
      matched: only pairs of about equal popularity (see MATCHED).
    """
    rng = np.random.default_rng(seed)
    chosen = dataset.positives(("train" if source == HELD_IN else "valid",))
    taken = dataset.positives(("train", "valid"))

    if teacher.manifest.kind == "preferences":
        pairs = _stated(dataset, teacher, chosen, taken, among)
    elif teacher.manifest.unlisted == "below" and source == VALIDATION:
        return _in_catalogue(dataset, teacher, chosen, taken, among, most, matched, rng)
    else:
        pairs = _listed(dataset, teacher, chosen, taken, among, most, rng)

    return pairs.take(near(dataset.popularity, pairs)) if matched else pairs


def near(popularity: np.ndarray, pairs: AuditPairs) -> np.ndarray:
    """[n] bool: neither item of the pair is more popular than MATCHED times the other."""
    of_positives, of_negatives = popularity[pairs.positives], popularity[pairs.negatives]
    higher, lower = np.maximum(of_positives, of_negatives), np.minimum(of_positives, of_negatives)
    return higher <= MATCHED * lower


def _lookup(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([n] bool: in the sorted `keys`, [n] the place where)."""
    if not keys.size:
        return np.zeros(wanted.size, bool), np.zeros(wanted.size, np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return keys[place] == wanted, place


def _stated(
    dataset: Dataset, teacher: Teacher, chosen: Csr, taken: Csr, among: np.ndarray
) -> AuditPairs:
    users = teacher.users
    first, second = (
        (chosen.contains(users, items), taken.contains(users, items))
        for items in (teacher.preferred, teacher.other)
    )
    right, wrong = first[0] & ~second[1], second[0] & ~first[1]
    known = (right | wrong) & among[users]
    right, preferred, other = right[known], teacher.preferred[known], teacher.other[known]
    positives, negatives = np.where(right, preferred, other), np.where(right, other, preferred)
    return AuditPairs(
        users[known], positives, negatives, right, teacher.margin[known], int(known.sum())
    )


def _listed(
    dataset: Dataset,
    teacher: Teacher,
    chosen: Csr,
    taken: Csr,
    among: np.ndarray,
    most: int,
    rng: np.random.Generator,
) -> AuditPairs:
    users = np.repeat(np.arange(dataset.n_users, dtype=np.int32), np.diff(teacher.offsets))
    looked_at = among[users]
    is_positive = looked_at & chosen.contains(users, teacher.items)
    is_negative = looked_at & ~taken.contains(users, teacher.items)
    positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(is_negative)
    negatives = negatives[np.lexsort((rng.random(negatives.size), users[negatives]))]

    n_negatives = np.bincount(users[negatives], minlength=dataset.n_users)
    start = np.cumsum(n_negatives) - n_negatives
    owner = users[positives]
    each = np.minimum(n_negatives[owner], most)

    # A user's positives take turns around its shuffled negatives: no pair comes twice.
    rank = np.arange(positives.size) - np.searchsorted(owner, owner)
    of_pair = np.repeat(np.arange(positives.size), each)
    step = np.arange(of_pair.size) - np.repeat(np.cumsum(each) - each, each)
    spot = (rank[of_pair] * most + step) % np.maximum(n_negatives[owner][of_pair], 1)
    worse = negatives[start[owner][of_pair] + spot]
    better = positives[of_pair]

    gap = teacher.scores[better] - teacher.scores[worse]
    pairs = AuditPairs(
        users[better], teacher.items[better], teacher.items[worse], gap > 0, np.abs(gap), gap.size
    )
    return dataclasses.replace(pairs.take(gap != 0), asked=gap.size)


def _in_catalogue(
    dataset: Dataset,
    teacher: Teacher,
    chosen: Csr,
    taken: Csr,
    among: np.ndarray,
    most: int,
    matched: bool,
    rng: np.random.Generator,
) -> AuditPairs:
    n_items, popularity = dataset.n_items, dataset.popularity
    owners = chosen.owners()
    answered = among & (np.diff(teacher.offsets) > 0)
    usable = answered[owners]
    users, positives = np.repeat(owners[usable], most), np.repeat(chosen.indices[usable], most)

    if matched:  # from the stretch of the catalogue, in order of popularity, that is near
        order = np.argsort(popularity, kind="stable").astype(np.int32)
        sizes, of_positive = popularity[order], popularity[positives]
        low = np.searchsorted(sizes, of_positive / MATCHED, side="left")
        high = np.searchsorted(sizes, of_positive * MATCHED, side="right")
        negatives = order[rng.integers(low, high)]
    else:
        negatives = rng.integers(0, n_items, users.size, np.int32)
    real = ~taken.contains(users, negatives)
    users, positives, negatives = users[real], positives[real], negatives[real]

    entry_users = np.repeat(np.arange(dataset.n_users), np.diff(teacher.offsets))
    keys = entry_users * n_items + teacher.items
    by_key = np.argsort(keys)
    keys, scores = keys[by_key], teacher.scores[by_key]

    floor = np.float32(-np.inf)
    scores_of_both = []
    for items in (positives, negatives):
        listed, place = _lookup(keys, users.astype(np.int64) * n_items + items)
        scores_of_both.append(np.where(listed, scores[place] if scores.size else floor, floor))
    with np.errstate(invalid="ignore"):  # two unlisted items
        gap = scores_of_both[0] - scores_of_both[1]
    margin = np.where(np.isfinite(gap), np.abs(gap), np.nan).astype(np.float32)
    pairs = AuditPairs(users, positives, negatives, gap > 0, margin, gap.size)
    return dataclasses.replace(pairs.take((gap != 0) & ~np.isnan(gap)), asked=gap.size)


# --- what the data know --------------------------------------------------------------------------


def by_popularity(dataset: Dataset, pairs: AuditPairs, *, held_in: bool) -> np.ndarray:
    """[n] 1, 1/2 or 0: whether the positive has more training users than the negative.

    The pair's user does not count: the positive of a held-in pair is a training item of hers.
    """
    own_interaction = int(held_in)
    return _better(
        dataset.popularity[pairs.positives] - own_interaction, dataset.popularity[pairs.negatives]
    )


def cosines(dataset: Dataset) -> Cosines:
    """[I, I] item-item cosines c_ij / sqrt(p_i p_j): co-occurrences c and training counts p.

    Sparse, or dense where that is faster.
    """
    matrix = dataset.positives(("train",)).matrix(dataset.n_items)
    scale = sparse.diags(1 / _roots(dataset))
    similarities = (scale @ (matrix.T @ matrix) @ scale).tocsr()
    if similarities.nnz > 0.1 * dataset.n_items**2 and dataset.n_items <= 20_000:
        return similarities.toarray()
    return similarities


def _roots(dataset: Dataset) -> np.ndarray:
    return np.sqrt(np.maximum(dataset.popularity, 1)).astype(np.float32)


def by_items(dataset: Dataset, pairs: AuditPairs, cosines: Cosines, *, held_in: bool) -> np.ndarray:
    """[n] 1, 1/2 or 0: whether item-item neighbours put the positive above the negative.

    An item's score is the sum of its cosines with the user's training items (Sarwar et al., 2001);
    `cosines` are those of the dataset. A held-in positive is scored
    as if the user had none of the held-in positives: neither in her history nor in what c and p
    of the positive count.
    """
    history, roots = dataset.positives(("train",)).matrix(dataset.n_items), _roots(dataset)
    if held_in:
        marks = (np.ones(len(pairs.users), np.float32), (pairs.users, pairs.positives))
        hidden = sparse.csr_matrix(marks, shape=history.shape).sign()
        history = (history - hidden).tocsr()
        history.eliminate_zeros()

    who, row = np.unique(pairs.users, return_inverse=True)
    positive, negative = (np.zeros(row.size, np.float32) for _ in range(2))
    step = max(1, _CELLS // dataset.n_items)
    for begin in range(0, who.size, step):
        scores = history[who[begin : begin + step]] @ cosines
        block = scores.toarray() if sparse.issparse(scores) else scores
        low, high = np.searchsorted(row, [begin, begin + step])  # pairs are sorted by user
        inside = slice(low, high)
        positive[inside] = block[row[inside] - begin, pairs.positives[inside]]
        negative[inside] = block[row[inside] - begin, pairs.negatives[inside]]

    if held_in:
        others = np.maximum(dataset.popularity[pairs.positives] - 1, 1)
        user_share = np.asarray(history @ (1 / roots)).ravel()[pairs.users]
        # Differences of float32 sums: what is left of a count of 0 must not be above 0.
        rest = positive * roots[pairs.positives] - user_share
        positive = np.where(rest > 1e-4 * user_share, rest, 0) / np.sqrt(others)
    return _better(positive, negative)


def _better(of_positives: np.ndarray, of_negatives: np.ndarray) -> np.ndarray:
    return np.where(
        of_positives == of_negatives, 0.5, (of_positives > of_negatives).astype(np.float64)
    )
