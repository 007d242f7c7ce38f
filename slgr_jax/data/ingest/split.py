"""Filters and split rules, as pure numpy functions over aligned arrays.

Shape letters: n interactions. `users` and `items` are [n] int32 indices, `times` [n] int64
microseconds. A split is a [n] int8 array: 0 train, 1 valid, 2 test. Which rows a rule sees as
"first" among equals is stated for each: a split never depends on the order of a sort.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from slgr_jax.data.ingest.log import lexsorted
from slgr_jax.errors import InputError

TRAIN, VALID, TEST = 0, 1, 2
NEW = -1  # a row that no part has yet, among rows that have one


@dataclasses.dataclass(frozen=True)
class TimeCuts:
    """The first moment (microseconds since 1970 UTC, inclusive) of the valid and test parts."""

    valid_from: int
    test_from: int | None  # None where only a validation part was cut off

    def parts(self, times: np.ndarray) -> np.ndarray:
        """[n] int8: the part of each time."""
        parts = (times >= self.valid_from).astype(np.int8)
        if self.test_from is not None:
            parts += times >= self.test_from
        return parts


def _pair_keys(users: np.ndarray, items: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    """[n] int64: one number a (user, item) pair, and with `parts` a pair of a part."""
    pair = users.astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    return pair if parts is None else pair * 4 + parts


def times_repeated(
    users: np.ndarray, items: np.ndarray, parts: np.ndarray | None = None
) -> np.ndarray:
    """[n] int64: how many rows hold the pair of each row (in its part), itself among them."""
    pair = _pair_keys(users, items, parts)
    _, inverse, counts = np.unique(pair, return_inverse=True, return_counts=True)
    return counts[inverse]


def distinct_pairs(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None,
    parts: np.ndarray | None = None,
    *,
    keep: str = "first",
    ratings: np.ndarray | None = None,
) -> np.ndarray:
    """[n] bool: one row of each (user, item) is kept; with `parts`, one in each part.

    Args:
      keep: `first` keeps the earliest row, `last` the latest, `highest` the best rated (of equal
        ratings the earliest). Ties in time, and rows without times, keep the row that comes
        first in the input; with `last`, the one that comes last.
      ratings: [n], for `highest`.
    """
    mask = np.ones(users.size, bool)
    pair = _pair_keys(users, items, parts)
    ordered = np.sort(pair)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    del ordered
    if not repeated.size:
        return mask
    # The few rows of repeated pairs are sorted again, by what decides.
    place = np.minimum(np.searchsorted(repeated, pair), repeated.size - 1)
    rows = np.flatnonzero(repeated[place] == pair)
    pair = pair[rows]

    # lexsort is stable, and its last key counts most: the row to keep leads its pair.
    keys = [] if times is None else [times[rows]]
    if keep == "last":
        keys = [-np.arange(rows.size), *(-key for key in keys)]
    elif keep == "highest":
        assert ratings is not None
        keys = [*keys, -ratings[rows]]
    order = np.lexsort([*keys, pair])
    pair = pair[order]
    mask[rows[order[1:][pair[1:] == pair[:-1]]]] = False
    return mask


def k_core(
    users: np.ndarray, items: np.ndarray, user_core: int, item_core: int
) -> tuple[np.ndarray, int]:
    """[n] bool of the rows in the k-core, and the rounds until nothing changed.

    The largest set of rows in which each user has at least `user_core` rows and each item at
    least `item_core`. It is unique, so the order of removals does not matter. The rows must
    hold each (user, item) once.
    """
    (keep,), rounds = k_core_of_ranges(lambda: iter([(users, items)]), user_core, item_core)
    return keep, rounds


def k_core_of_ranges(
    pairs: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], user_core: int, item_core: int
) -> tuple[list[np.ndarray], int]:
    """`k_core` of rows that are read a range at a time, anew in each round.

    Args:
      pairs: the users and items of each range; no user is in two of them.

    Returns:
      A mask a range, and the rounds.
    """
    keep = [np.ones(users.size, bool) for users, _ in pairs()]
    n_left = sum(mask.size for mask in keep)
    rounds = 0
    while n_left:
        of_items = np.zeros(0, np.int64)
        for mask, (_, items) in zip(keep, pairs(), strict=True):
            of_items = _added(of_items, np.bincount(items[mask]))
        good: list[np.ndarray] = []
        for mask, (users, items) in zip(keep, pairs(), strict=True):
            left = np.flatnonzero(mask)
            users = users[left]
            users = users - (users.min() if users.size else 0)
            stays = np.bincount(users)[users] >= user_core
            stays &= of_items[items[left]] >= item_core
            better = np.zeros_like(mask)
            better[left] = stays
            good.append(better)
        n_good = sum(int(np.count_nonzero(mask)) for mask in good)
        if n_good == n_left:
            break
        keep, n_left, rounds = good, n_good, rounds + 1
    return keep, rounds


def _added(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum of two arrays, the shorter as if it went on with zeros."""
    if totals.size < counts.size:
        totals, counts = counts, totals
    totals[: counts.size] += counts
    return totals


def leave_last(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Each user's last row is test, the one before it valid, the others train.

    Rows of a user are ordered by time, then by item index (external id order). Users with
    fewer than 3 rows stay in train as a whole.

    Leak property: per user, no train time is after a valid time, none of which is after the
    test time. Across users there is a leak: one user's training rows may be later than
    another's test row, so popularity and item neighbours know the future.
    """
    parts = last_two(users, items, times)
    check_leave_last(bool(parts.any()) or not parts.size)
    return parts


def last_two(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`leave_last`, of some of the users; of none with 3 rows all is train."""
    parts = np.zeros(users.size, np.int8)
    if users.size == 0:
        return parts
    order = lexsorted((users, times, items))
    ordered = users[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    last = last[np.diff(last, prepend=-1) >= 3]
    parts[order[last]] = TEST
    parts[order[last - 1]] = VALID
    return parts


def check_leave_last(is_split: bool) -> None:
    """Raise `InputError` where no user had rows for validation and test."""
    if not is_split:
        raise InputError("--split=leave_last: no user has 3 interactions; use another split")


def global_time(
    times: np.ndarray, valid_fraction: float, test_fraction: float
) -> tuple[np.ndarray, TimeCuts]:
    """Rows from one moment on are test, those before it from another moment on valid.

    Both moments are times that occur, chosen so that the shares after them are as near as
    possible to the fractions; rows with the same time are never separated.

    Leak property: max(train) < min(valid) <= max(valid) < min(test), over all users.

    Raises:
      InputError: fewer than 3 distinct times, or fractions that leave nothing for training.
    """
    cuts = global_cuts(np.sort(times), valid_fraction, test_fraction)
    return cuts.parts(times), cuts


def global_cuts(ordered: np.ndarray, valid_fraction: float, test_fraction: float) -> TimeCuts:
    """The moments of `global_time`.

    Args:
      ordered: [n] times, ascending.
    """
    _check_fractions(valid_fraction, test_fraction)
    moments = _Moments(ordered, 3, "--split=global_time")
    n = ordered.size
    second = moments.after(int(ordered[0]))
    test = moments.nearest(n - test_fraction * n, moments.after(second), int(ordered[-1]))
    train_rows = n - (valid_fraction + test_fraction) * n
    return TimeCuts(moments.nearest(train_rows, second, moments.before(test)), test)


def carve_by_time(times: np.ndarray, valid_fraction: float) -> tuple[np.ndarray, TimeCuts]:
    """Rows of a training part from one moment on become valid.

    Leak property: max(train) < min(valid); the relation to a test part that someone else made
    is theirs.
    """
    cut = carving_cut(np.sort(times), valid_fraction)
    return cut.parts(times), cut


def carving_cut(ordered: np.ndarray, valid_fraction: float) -> TimeCuts:
    """The moment of `carve_by_time`, of [n] times in ascending order."""
    moments = _Moments(ordered, 2, "cutting a validation part off the training rows")
    target = (1 - valid_fraction) * ordered.size
    second = moments.after(int(ordered[0]))
    return TimeCuts(moments.nearest(target, second, int(ordered[-1])), None)


class _Moments:
    """The distinct ones of ascending times, without an array of them."""

    def __init__(self, ordered: np.ndarray, least: int, purpose: str) -> None:
        self._ordered = ordered
        n_distinct = 0
        place = 0
        while place < ordered.size and n_distinct < least:
            place = int(np.searchsorted(ordered, ordered[place], "right"))
            n_distinct += 1
        if n_distinct < least:
            raise InputError(
                f"{purpose} needs {least} distinct times, the data have {n_distinct}; use "
                "--split=ratio"
            )

    def rows_before(self, moment: int) -> int:
        """How many rows are earlier."""
        return int(np.searchsorted(self._ordered, moment, "left"))

    def after(self, moment: int) -> int:
        """The next later moment; the last one of the last."""
        place = int(np.searchsorted(self._ordered, moment, "right"))
        return int(self._ordered[min(place, self._ordered.size - 1)])

    def before(self, moment: int) -> int:
        """The next earlier moment."""
        return int(self._ordered[self.rows_before(moment) - 1])

    def nearest(self, target: float, low: int, high: int) -> int:
        """The moment in [low, high] before which the number of rows is nearest to `target`, the
        earlier one of two."""
        place = min(max(int(target), 0), self._ordered.size - 1)
        moment = int(self._ordered[place])
        later = self.after(moment)
        if target - self.rows_before(moment) > self.rows_before(later) - target:
            moment = later
        return min(max(moment, low), high)


def ratio(
    n: int, valid_fraction: float, test_fraction: float, seed: int, *, least: int = 3
) -> np.ndarray:
    """Shuffle all rows; the first are train, the next valid, the last test.

    `numpy.random.default_rng(seed).permutation(n)` over the rows in input order; valid and
    test have `round(fraction * n)` rows, train the rest.

    Leak property: none. Training rows are later than test rows of the same user; a model sees
    the future, and numbers from this split are comparable only with each other.
    """
    _check_fractions(valid_fraction, test_fraction)
    n_valid, n_test = round(valid_fraction * n), round(test_fraction * n)
    n_train = n - n_valid - n_test
    wanted = (n_train, n_valid, n_test)
    if sum(size > 0 for size in wanted) < least:
        raise InputError(
            f"--split=ratio leaves a part empty: {n} interactions make {n_train} train, "
            f"{n_valid} valid, {n_test} test; use larger fractions or more data"
        )
    # The permutation of `permutation(n)`, in half its memory.
    order = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    np.random.default_rng(seed).shuffle(order)
    parts = np.empty(n, np.int8)
    parts[order] = np.repeat(np.array([TRAIN, VALID, TEST], np.int8), wanted)
    return parts


def ratio_by_user(
    users: np.ndarray, valid_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """Shuffle each user's rows; the first are train, the next valid, the last test.

    A user with m rows gives floor(fraction * m + 1/2) rows to valid and to test, but always
    keeps one in train (test is served before valid). The order within a user is that of
    `default_rng(seed).random(n)`, drawn over the rows in input order.

    Leak property: none, as for `ratio`; but every user of valid or test has training rows.
    """
    draws = np.random.default_rng(seed).random(users.size)
    parts = by_user_draws(users, draws, valid_fraction, test_fraction)
    check_ratio_by_user(bool((parts == VALID).any() and (parts == TEST).any()))
    return parts


def by_user_draws(
    users: np.ndarray, draws: np.ndarray, valid_fraction: float, test_fraction: float
) -> np.ndarray:
    """`ratio_by_user` of some of the users, whose rows are shuffled by ascending `draws`."""
    _check_fractions(valid_fraction, test_fraction)
    n = users.size
    order = np.lexsort((draws, users))
    ordered = users[order]
    counts = np.bincount(ordered)
    first = np.cumsum(counts) - counts
    test = np.minimum(np.floor(test_fraction * counts + 0.5), counts - 1).astype(np.int64)
    valid = np.floor(valid_fraction * counts + 0.5).astype(np.int64)
    valid = np.clip(valid, 0, np.maximum(counts - 1 - test, 0))
    from_end = first[ordered] + counts[ordered] - 1 - np.arange(n)  # 0 is the user's last row
    parts = np.zeros(n, np.int8)
    parts[order[from_end < (valid + test)[ordered]]] = VALID
    parts[order[from_end < test[ordered]]] = TEST
    return parts


def check_ratio_by_user(is_split: bool) -> None:
    """Raise `InputError` where validation or test got no row."""
    if not is_split:
        raise InputError(
            "--ratio_by=user leaves valid or test empty: every user has too few interactions; "
            "use larger fractions or --ratio_by=all"
        )


def halves(users: np.ndarray, seed: int) -> np.ndarray:
    """[n] bool: a random half of each user's rows; the odd one falls to either side.

    The order within a user is that of `default_rng(seed).random(n)`, drawn over the rows in input
    order; which side the odd row falls to is drawn next, over the users in ascending order.
    """
    rng = np.random.default_rng(seed)
    draws = rng.random(users.size)
    distinct, owners = np.unique(users, return_inverse=True)
    return half_by_draws(users, draws, rng.integers(0, 2, distinct.size)[owners])


def half_by_draws(users: np.ndarray, draws: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """[n] bool: of each user's rows by ascending draw every second, the first one where odd is 0.

    Args:
      odd: [n] 0 or 1, the same for all rows of a user.
    """
    order = np.lexsort((draws, users))
    starts = np.flatnonzero(np.concatenate([[True], np.diff(users[order]) != 0]))
    lengths = np.diff(np.append(starts, users.size))
    place = np.arange(users.size) - np.repeat(starts, lengths)
    half = np.zeros(users.size, bool)
    half[order] = (place + odd[order]) % 2 == 0
    return half


def more_by_ratio(
    parts: np.ndarray, valid_fraction: float, test_fraction: float, seed: Sequence[int]
) -> np.ndarray:
    """`ratio` for rows that came later: the others keep their part.

    Of N rows in all, valid and test are to have `round(fraction * N)`: as many new rows as are
    missing, at `default_rng(seed).permutation(new rows)`; the rest is train. A fresh shuffle would
    move training rows into test, where a model or a teacher has seen them.

    Args:
      parts: [n] parts of the rows that were there, `NEW` for the others.
    """
    _check_fractions(valid_fraction, test_fraction)
    new = np.flatnonzero(parts == NEW)
    n = parts.size
    missing = {
        code: round(fraction * n) - int(np.count_nonzero(parts == code))
        for code, fraction in ((TEST, test_fraction), (VALID, valid_fraction))
    }
    n_test = min(max(missing[TEST], 0), new.size)
    n_valid = min(max(missing[VALID], 0), new.size - n_test)
    order = new[np.random.default_rng(seed).permutation(new.size)]
    out = parts.copy()
    out[order] = TRAIN
    out[order[:n_test]] = TEST
    out[order[n_test : n_test + n_valid]] = VALID
    return out


def more_by_user_ratio(
    users: np.ndarray,
    parts: np.ndarray,
    valid_fraction: float,
    test_fraction: float,
    seed: Sequence[int],
) -> np.ndarray:
    """`ratio_by_user` for rows that came later: the others keep their part.

    Of a user's m rows in all, test and valid are to have as many as `ratio_by_user` gives them, and
    get as many of the user's new rows as are missing, in the order of `default_rng(seed).random`.

    Args:
      users: [n].
      parts: [n] parts of the rows that were there, `NEW` for the others.
    """
    _check_fractions(valid_fraction, test_fraction)
    n_users = int(users.max(initial=-1)) + 1
    counts = np.bincount(users, minlength=n_users)

    def of_part(code: int) -> np.ndarray:
        return np.bincount(users[parts == code], minlength=n_users)

    new = of_part(NEW)
    test = np.minimum(np.floor(test_fraction * counts + 0.5), counts - 1).astype(np.int64)
    valid = np.floor(valid_fraction * counts + 0.5).astype(np.int64)
    valid = np.clip(valid, 0, np.maximum(counts - 1 - test, 0))
    to_test = np.clip(test - of_part(TEST), 0, new)
    to_valid = np.clip(valid - of_part(VALID), 0, new - to_test)

    rows = np.flatnonzero(parts == NEW)
    rows = rows[np.lexsort((np.random.default_rng(seed).random(rows.size), users[rows]))]
    first = np.cumsum(new) - new
    place = np.arange(rows.size) - first[users[rows]]  # 0 is a user's first new row
    out = parts.copy()
    out[rows] = TRAIN
    out[rows[place < (to_test + to_valid)[users[rows]]]] = VALID
    out[rows[place < to_test[users[rows]]]] = TEST
    return out


def drop_seen(users: np.ndarray, items: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """[n] bool: False for a valid pair that is also in train, and a test pair in either.

    Ranking masks what a user has already interacted with, so such a pair could never be a hit.
    """
    pair = _pair_keys(users, items, None)
    keep = np.ones(users.size, bool)
    for part in (VALID, TEST):
        rows = np.flatnonzero(parts == part)
        keep[rows] = ~np.isin(pair[rows], pair[parts < part])
    return keep


def _check_fractions(valid_fraction: float, test_fraction: float) -> None:
    if valid_fraction + test_fraction >= 1:
        raise InputError(
            f"--valid_fraction={valid_fraction:g} and --test_fraction={test_fraction:g} leave "
            "nothing for training; their sum must be below 1"
        )
