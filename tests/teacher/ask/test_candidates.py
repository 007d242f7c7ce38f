"""Whom to ask: each set against its definition, and the leak guard."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slgr_jax.config import CandidateConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError, ManifestError
from slgr_jax.teacher.ask import candidates

U, I = 40, 60  # noqa: E741 - the letters of the code
NOTHING = CandidateConfig(candidates=0, cold_candidates=0, tail_users=0, calibration_users=0)
LINES = [f"Title {i}" for i in range(I)]


@pytest.fixture
def world(make_dataset):
    """40 users, 60 items, with times: the later of two events has the higher index, unless the
    user is odd; valid and test items that are no training items."""
    rng = np.random.default_rng(1)
    train, valid, test = {}, {}, {}
    for u in range(U):
        drawn = rng.permutation(I)
        size = 2 if u < 10 else 8
        train[u] = sorted(drawn[:size].tolist())
        valid[u], test[u] = drawn[size : size + 1].tolist(), drawn[size + 1 : size + 3].tolist()
    train[39], train[38] = [], [5]
    data = make_dataset(
        users=[f"u{u}" for u in range(U)],
        items=[f"i{i}" for i in range(I)],
        titles=LINES,
        train=train,
        valid=valid,
        test=test,
    )
    users, items = data.train.users, data.train.items
    times = np.where(users % 2, -items, items).astype(np.int64) + 1_000
    order = np.lexsort((times, users))
    part = dataclasses.replace(
        data.train, users=users[order], items=items[order], timestamps=times[order]
    )
    return dataclasses.replace(data, train=part)


def of_reason(drawn, reason):
    """Pairs of a set as tuples."""
    bit = 1 << schema.REASONS.index(reason)
    mine = (drawn.reasons & bit) > 0
    return set(zip(drawn.users[mine].tolist(), drawn.items[mine].tolist(), strict=True))


def own(data, part):
    part = data.part(part)
    return set(zip(part.users.tolist(), part.items.tolist(), strict=True))


def test_calibration_hides_the_last_training_items(world):
    options = dataclasses.replace(
        NOTHING, calibration_users=100, calibration_positives=2, calibration_negatives=5
    )
    drawn = candidates.draw(world, LINES, options, seed=0)
    pairs, trained = of_reason(drawn, "calibration"), own(world, "train")
    for u in range(U):
        mine = sorted(i for v, i in trained if v == u)
        mine = mine[::-1] if u % 2 else mine  # oldest first
        hidden = drawn.hidden.row(u).tolist()
        # One item stays; users with one item or none are not asked.
        assert hidden == sorted(mine[max(1, len(mine) - 2) :] if len(mine) > 1 else []), u
        asked = {i for v, i in pairs if v == u}
        assert asked & set(mine) == set(hidden)
        assert len(asked - set(mine)) == (5 if hidden else 0)


def test_calibration_picks_at_random_where_there_are_no_times(world):
    untimed = dataclasses.replace(world, train=dataclasses.replace(world.train, timestamps=None))
    options = dataclasses.replace(NOTHING, calibration_users=100)
    last = candidates.draw(world, LINES, options, seed=0)
    drawn = candidates.draw(untimed, LINES, options, seed=0)
    random = dataclasses.replace(options, calibration_pick="random")
    assert np.array_equal(
        drawn.hidden.indices, candidates.draw(world, LINES, random, seed=0).hidden.indices
    )
    assert not np.array_equal(drawn.hidden.indices, last.hidden.indices)
    assert of_reason(drawn, "calibration") & own(world, "train") == {
        (u, i) for u in range(U) for i in drawn.hidden.row(u).tolist()
    }


def test_every_other_set_avoids_the_users_own_items(world):
    drawn = candidates.draw(world, LINES, CandidateConfig(candidates=10, popular_pool=30), seed=0)
    trained = own(world, "train")
    for reason in ("popular", "cold", "tail"):
        pairs = of_reason(drawn, reason)
        assert pairs
        assert not pairs & trained
    asked = set(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))
    assert asked & trained == {(u, i) for u in range(U) for i in drawn.hidden.row(u).tolist()}
    assert 39 not in drawn.users  # nothing to show of them
    keys = drawn.users.astype(np.int64) * I + drawn.items
    assert (np.diff(keys) > 0).all()


def test_validation_and_test_change_nothing_unless_excluded(world):
    none = np.zeros(0, np.int32)
    empty = dataclasses.replace(world.valid, users=none, items=none)
    blind = dataclasses.replace(world, valid=empty, test=empty)
    options = CandidateConfig(candidates=10)
    drawn = candidates.draw(world, LINES, options, seed=3)
    same = candidates.draw(blind, LINES, options, seed=3)
    assert np.array_equal(drawn.users, same.users)
    assert np.array_equal(drawn.items, same.items)
    held = own(world, "valid") | own(world, "test")
    asked = set(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))
    assert asked & held
    without = dataclasses.replace(options, exclude_evaluation=True)
    less = candidates.draw(world, LINES, without, seed=3)
    left = set(zip(less.users.tolist(), less.items.tolist(), strict=True))
    assert left == asked - held


def test_items_without_a_text_are_neither_asked_about_nor_shown(world):
    lines = ["" if i % 3 == 0 else line for i, line in enumerate(LINES)]
    drawn = candidates.draw(world, lines, CandidateConfig(), seed=0)
    assert (drawn.items % 3 > 0).all()
    assert (drawn.hidden.indices % 3 > 0).all()
    described = np.array([bool(line) for line in lines])
    users, items = candidates.described_history(world, described, drawn.hidden)
    assert (items % 3 > 0).all()
    shown = set(zip(users.tolist(), items.tolist(), strict=True))
    hidden = {(u, i) for u in range(U) for i in drawn.hidden.row(u).tolist()}
    assert shown == {pair for pair in own(world, "train") if pair[1] % 3} - hidden


def test_a_repeated_pair_stands_where_it_happened_last(world):
    times = np.arange(4, dtype=np.int64)
    users, items = np.array([0, 0, 0, 1], np.int32), np.array([7, 3, 7, 2], np.int32)
    part = dataclasses.replace(world.train, users=users, items=items, timestamps=times)
    found = candidates.described_history(
        dataclasses.replace(world, train=part), np.ones(I, bool), None
    )
    assert found[0].tolist() == [0, 0, 1]
    assert found[1].tolist() == [3, 7, 2]


def test_what_a_run_proposes_is_asked_about_where_it_can_be(world):
    lines = ["" if i == 7 else line for i, line in enumerate(LINES)]
    owners = np.repeat(np.arange(U), I)
    everything = Csr.from_pairs(owners, np.tile(np.arange(I), U), U)
    some = Csr.from_pairs(np.array([3, 3, 39]), np.array([7, 8, 9]), U)
    options = dataclasses.replace(NOTHING)
    proposed = {"hard_top": everything, "hard_uncertain": some}
    drawn = candidates.draw(world, lines, options, seed=0, proposed=proposed)
    trained = own(world, "train")
    able = {user for user, item in trained if item != 7}
    assert of_reason(drawn, "hard_top") == {
        (user, item)
        for user in able
        for item in range(I)
        if item != 7 and (user, item) not in trained
    }
    assert of_reason(drawn, "hard_uncertain") == {(3, 8)} - trained  # 7 has no text, 39 no history


def test_what_a_run_doubts_is_hidden_and_asked_about_but_for_one_of_a_user(world):
    trained = own(world, "train")
    of_user = {u: [i for v, i in sorted(trained) if v == u] for u in range(U)}
    wanted = [(12, item) for item in of_user[12]]  # all that there is to show
    wanted += [(13, item) for item in of_user[13][:3]] + [(38, 5)]  # 38 has no other
    unseen = next(i for i in range(I) if (13, i) not in trained)
    doubtful = Csr.from_pairs(*map(np.array, zip(*wanted, (13, unseen), strict=True)), U)
    options = dataclasses.replace(NOTHING, calibration_users=U)
    drawn = candidates.draw(world, LINES, options, seed=0, proposed={"doubtful": doubtful})
    alone = candidates.draw(world, LINES, options, seed=0)
    asked = of_reason(drawn, "doubtful")
    hidden = {(u, int(i)) for u in range(U) for i in drawn.hidden.row(u)}
    tests = {(u, int(i)) for u in range(U) for i in alone.hidden.row(u)}
    assert of_reason(drawn, "calibration") == of_reason(alone, "calibration")
    assert hidden == tests | (asked - {(13, unseen)})
    assert {pair for pair in asked if pair[0] == 13} == {*wanted[8:11], (13, unseen)} - tests
    assert sum(user == 12 for user, _ in asked) == 8 - 1 - 1  # one is for calibration, one shown
    assert not any(user == 38 for user, _ in asked)
    shown = candidates.described_history(world, np.ones(I, bool), drawn.hidden)
    assert set(zip(*(x.tolist() for x in shown), strict=True)) == trained - hidden


def test_draws_depend_on_the_seed_only(world):
    first, again, other = (
        candidates.draw(world, LINES, CandidateConfig(), seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)


def test_nothing_to_ask_is_an_error(world):
    with pytest.raises(InputError, match=r"no pair is left to ask about .*--candidates"):
        candidates.draw(world, LINES, NOTHING, seed=0)


def test_a_set_is_read_back_as_it_was_drawn(world):
    options = CandidateConfig(candidates=5)
    drawn = candidates.draw(world, LINES, options, seed=4)
    manifest = candidates.write(
        world, "c", drawn, options, seed=4, diversity="popularity", rows_per_shard=100
    )
    assert len(manifest.files["pairs"]) > 1
    found, told = candidates.load(world, "c")
    assert told == manifest
    for name in ("users", "items", "reasons"):
        assert np.array_equal(getattr(found, name), getattr(drawn, name))
    assert np.array_equal(found.hidden.offsets, drawn.hidden.offsets)
    assert manifest.counts["hidden"] == drawn.hidden.indices.size
    assert manifest.counts["tail"] == len(of_reason(drawn, "tail"))
    assert "drawn like any other item" in candidates.report(manifest)
    with pytest.raises(InputError, match=r"c exists; .*--overwrite"):
        candidates.write(world, "c", drawn, options, seed=4, diversity="popularity")
    with pytest.raises(ManifestError, match=r"no candidate set 'd'; it has: c"):
        candidates.load(world, "d")
    other = dataclasses.replace(world.manifest, split_hash="0" * 64)
    with pytest.raises(ManifestError, match=r"'c' was made for split .*has split 00000000"):
        candidates.load(dataclasses.replace(world, manifest=other), "c")


def test_a_part_of_the_users_keeps_their_pairs_and_hidden_items():
    hidden = Csr.from_pairs(np.array([0, 2]), np.array([4, 5]), 3)
    whole = candidates.CandidateSet(
        np.array([0, 1, 2]), np.array([4, 6, 5]), np.array([32, 1, 32]), hidden
    )
    part = whole.of_users(np.array([False, True, True]))
    assert part.users.tolist() == [1, 2]
    assert part.items.tolist() == [6, 5]
    assert [part.hidden.row(u).tolist() for u in range(3)] == [[], [], [5]]
