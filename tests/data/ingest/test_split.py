"""Split rules and filters against brute force, their leak properties, and a fixed recipe."""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slgr_jax.data.ingest import split
from slgr_jax.errors import InputError

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "data"


def arrays(rows: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, time) rows as the arrays the rules take."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2]


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=60
)


@given(ROWS)
def test_earliest_keeps_one_row_of_a_pair(rows: list[tuple[int, int, int]]) -> None:
    users, items, times = arrays(rows)
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for index, (user, item, time) in enumerate(rows):
        best[user, item] = min(best.get((user, item), (time, index)), (time, index))
    expected = {index for _, index in best.values()}
    assert set(np.flatnonzero(split.distinct_pairs(users, items, times))) == expected
    first = {pair: index for index, pair in reversed([(i, r[:2]) for i, r in enumerate(rows)])}
    assert set(np.flatnonzero(split.distinct_pairs(users, items, None))) == set(first.values())


def test_earliest_counts_a_pair_once_per_part() -> None:
    users, items, times = arrays([(0, 0, 5), (0, 0, 3), (0, 0, 9)])
    keep = split.distinct_pairs(users, items, times, np.array([0, 0, 2], np.int8))
    assert keep.tolist() == [False, True, True]


@given(ROWS, st.integers(1, 4), st.integers(1, 4))
def test_k_core_is_the_brute_force_fixed_point(
    rows: list[tuple[int, int, int]], user_core: int, item_core: int
) -> None:
    pairs = sorted({row[:2] for row in rows})
    left = set(pairs)
    while True:
        by_user = collections.Counter(user for user, _ in left)
        by_item = collections.Counter(item for _, item in left)
        bad = {p for p in left if by_user[p[0]] < user_core or by_item[p[1]] < item_core}
        if not bad:
            break
        left.remove(min(bad))  # one at a time: the order of removals must not matter
    users, items, _ = arrays([(*pair, 0) for pair in pairs])
    keep, _ = split.k_core(users, items, user_core, item_core)
    assert {pair for pair, kept in zip(pairs, keep, strict=True) if kept} == left


def test_k_core_needs_a_second_round() -> None:
    # Item 1 has one row; without it user 1 falls below 2; without user 1 nothing else falls.
    users, items, _ = arrays([(0, 0, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 2, 0)])
    keep, rounds = split.k_core(users, items, 2, 2)
    assert keep.tolist() == [True, True, False, False, True, True]
    assert rounds == 2


def test_leave_last_by_hand() -> None:
    rows = [
        (0, 5, 10),
        (0, 4, 30),
        (0, 3, 20),
        (1, 0, 1),
        (1, 1, 2),
        (2, 9, 7),
        (2, 8, 7),
        (2, 7, 7),
    ]
    parts = split.leave_last(*arrays(rows))
    # User 1 has two rows and stays in train; user 2's equal times are ordered by item index.
    assert parts.tolist() == [0, 2, 1, 0, 0, 2, 1, 0]


@given(ROWS)
def test_leave_last_invariants(rows: list[tuple[int, int, int]]) -> None:
    unique = sorted({row[:2]: row for row in rows}.values())
    users, items, times = arrays(unique)
    if max(collections.Counter(users.tolist()).values()) < 3:
        with pytest.raises(InputError, match="3 interactions"):
            split.leave_last(users, items, times)
        return
    parts = split.leave_last(users, items, times)
    for user in np.unique(users):
        mine = parts[users == user]
        if mine.size < 3:
            assert (mine == 0).all()
            continue
        keys = sorted(zip(times[users == user], items[users == user], mine, strict=True))
        assert [key[2] for key in keys] == [0] * (mine.size - 2) + [1, 2]
    shuffle = np.random.default_rng(0).permutation(users.size)
    again = split.leave_last(users[shuffle], items[shuffle], times[shuffle])
    np.testing.assert_array_equal(again, parts[shuffle])


@given(
    st.lists(st.integers(0, 50), min_size=3, max_size=80),
    st.floats(0.02, 0.45),
    st.floats(0.02, 0.45),
)
def test_global_time_never_leaks(values: list[int], valid: float, test: float) -> None:
    times = np.array(values, np.int64)
    if np.unique(times).size < 3:
        with pytest.raises(InputError, match="3 distinct times"):
            split.global_time(times, valid, test)
        return
    parts, cuts = split.global_time(times, valid, test)
    assert times[parts == 0].max() < times[parts == 1].min()
    assert times[parts == 1].max() < times[parts == 2].min()
    assert (cuts.valid_from, cuts.test_from) == (times[parts == 1].min(), times[parts == 2].min())
    # No other cut is nearer to the wanted share (a cut needs two earlier times before it).
    sizes = [int((times >= cut).sum()) for cut in np.unique(times)[2:]]
    best = min(abs(size - test * times.size) for size in sizes)
    assert abs((parts == 2).sum() - test * times.size) == pytest.approx(best)


def test_global_time_sizes_are_exact_without_ties() -> None:
    times = np.random.default_rng(1).permutation(1000).astype(np.int64)
    parts, cuts = split.global_time(times, 0.1, 0.2)
    assert np.bincount(parts).tolist() == [700, 100, 200]
    assert (cuts.valid_from, cuts.test_from) == (700, 800)


def test_carve_by_time() -> None:
    times = np.array([5, 1, 9, 9, 3, 2, 8, 7, 6, 4])
    parts, cuts = split.carve_by_time(times, 0.2)
    assert parts.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert cuts == split.TimeCuts(9, None)


def test_ratio_is_the_stated_recipe() -> None:
    parts = split.ratio(50, 0.1, 0.2, seed=3)
    order = np.random.default_rng(3).permutation(50)
    assert (parts[order[:35]] == 0).all()
    assert (parts[order[35:40]] == 1).all()
    assert (parts[order[40:]] == 2).all()
    assert (split.ratio(50, 0.1, 0.2, seed=4) != parts).any()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the read-only data in ../shared")
def test_ratio_reproduces_the_published_rows() -> None:
    table = pq.read_table(SHARED / "ml100k_splits" / "interactions.parquet")
    names = np.array(["train", "valid", "test"])
    found = names[split.ratio(table.num_rows, 0.1, 0.1, seed=42)]
    np.testing.assert_array_equal(found, np.array(table["ratio_split"].to_pylist()))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the read-only data in ../shared")
def test_leave_last_reproduces_the_published_rows() -> None:
    table = pq.read_table(SHARED / "ml100k_splits" / "interactions.parquet")
    # The published rows break ties by the numeric id, so that is the index here.
    users, items = (table[name].to_numpy() for name in ("user", "item"))
    found = split.leave_last(users, items, table["timestamp"].to_numpy())
    names = np.array(["train", "valid", "test"])
    np.testing.assert_array_equal(names[found], np.array(table["leave_last_split"].to_pylist()))


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=120),
    st.floats(0.05, 0.3),
    st.floats(0.05, 0.65),
    st.integers(0, 5),
)
@example(values=[0] * 9 + [1], valid=0.2, test=0.6, seed=0)  # a single row stays in train
def test_ratio_by_user_sizes(values: list[int], valid: float, test: float, seed: int) -> None:
    users = np.array(values, np.int32)
    try:
        parts = split.ratio_by_user(users, valid, test, seed)
    except InputError:
        return
    for user in np.unique(users):
        count = int((users == user).sum())
        got = np.bincount(parts[users == user], minlength=3)
        n_test = min(int(np.floor(test * count + 0.5)), count - 1)
        n_valid = min(int(np.floor(valid * count + 0.5)), count - 1 - n_test)
        assert got.tolist() == [count - n_valid - n_test, n_valid, n_test]
        assert got[0] >= 1


def test_ratio_by_user_takes_every_row_equally_often() -> None:
    users = np.zeros(5, np.int32)
    hits = sum(
        (split.ratio_by_user(users, 0.2, 0.2, seed) == 2).astype(int) for seed in range(2000)
    )
    # Binomial(2000, 1/5): standard deviation 17.9.
    assert np.abs(np.asarray(hits) - 400).max() < 90


def test_drop_seen() -> None:
    users, items, _ = arrays([(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 0), (1, 0, 0)])
    keep = split.drop_seen(users, items, np.array([0, 1, 1, 2, 2, 2], np.int8))
    assert keep.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("rule", ["global_time", "ratio", "ratio_by_user"])
def test_fractions_that_leave_no_training_rows(rule: str) -> None:
    n = np.arange(10)
    calls = {
        "global_time": lambda: split.global_time(n, 0.5, 0.5),
        "ratio": lambda: split.ratio(10, 0.5, 0.5, 0),
        "ratio_by_user": lambda: split.ratio_by_user(n, 0.5, 0.5, 0),
    }
    with pytest.raises(InputError, match="their sum must be below 1"):
        calls[rule]()


def test_a_part_without_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="4 interactions make 4 train, 0 valid, 0 test"):
        split.ratio(4, 0.1, 0.1, 0)
    with pytest.raises(InputError, match="--ratio_by=user leaves"):
        split.ratio_by_user(np.arange(50), 0.1, 0.1, 0)


def test_halves_split_each_user() -> None:
    users = np.repeat(np.arange(4000), np.arange(4000) % 4 + 1)
    half = split.halves(users, 0)
    sizes, taken = np.bincount(users), np.bincount(users, half)
    assert (np.abs(2 * taken - sizes) <= 1).all()
    assert 0.44 < half[np.isin(users, np.flatnonzero(sizes == 1))].mean() < 0.56
    assert not np.array_equal(half, split.halves(users, 1))
