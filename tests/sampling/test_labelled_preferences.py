"""Labelled preferences against enumeration of every pair, on small worlds."""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest
import worlds

from slgr_jax.sampling import arrays, labelled_preferences, random_bits
from slgr_jax.sampling.teacher_arrays import PreferenceRule, teacher_lists, teacher_pairs


def _lists(dataset, below, min_gap=0.0, seed=0, length=8):
    """Some users have no list; a list may hold training items."""
    rng = np.random.default_rng(seed)
    counts = np.where(np.arange(dataset.n_users) % 4 == 3, 0, length)
    items = [rng.choice(dataset.n_items, n, replace=False) for n in counts]
    scores = [np.sort(rng.integers(0, 5, n)).astype(np.float32) for n in counts]  # with ties
    return teacher_lists(
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate(items).astype(np.int32),
        np.concatenate(scores),
        min_gap=min_gap,
        unlisted_share=1.0,
        unlisted_below=below,
        positives=dataset.positives(("train",)),
        n_items=dataset.n_items,
    )


def _drawn(dataset, source, teacher, size=200_000, min_gap=0.0):
    facts = arrays.make_facts(
        dataset, np.zeros(dataset.n_users, bool), np.zeros(dataset.n_items, bool)
    )
    words_of = random_bits.generators(jax.random.split(jax.random.key(0), 1))
    placed = jax.device_put((source, teacher, facts))
    rule = PreferenceRule(count=size, min_gap=min_gap)
    drawn = labelled_preferences.draw_labelled(words_of, *placed, rule, histories=False)
    return jax.tree.map(lambda x: np.asarray(x)[0], drawn)


def _sets(dataset, parts):
    pairs = dataset.positives(parts)
    return [set(pairs.row(user).tolist()) for user in range(dataset.n_users)]


@pytest.mark.parametrize("part", ["valid", "test"])
def test_chosen_are_the_new_items_of_a_part_at_their_moments(tmp_path, part):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=9, n_items=14)
    chosen = labelled_preferences.chosen_items(dataset, part)
    before = ("train",) if part == "valid" else ("train", "valid")
    seen, own = _sets(dataset, before), _sets(dataset, (part,))
    expected = {(u, i) for u in range(9) for i in own[u] - seen[u]}
    assert worlds.pairs_of(chosen.users, chosen.items) == expected
    assert len(expected) == chosen.items.size > 0
    events = sum(np.bincount(dataset.part(name).users, minlength=9) for name in before)
    np.testing.assert_array_equal(chosen.as_of, events[chosen.users])
    for user in range(9):
        row = slice(*chosen.offsets[user : user + 2])
        assert set(chosen.items[row].tolist()) == {i for u, i in expected if u == user}
        assert chosen.negatives.free[user] == 14 - len(seen[user] | own[user])


def test_hidden_items_are_the_training_items_that_were_asked_about(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=9, n_items=14)
    asked = np.array([(u, i) for u in range(9) for i in range(0, 14, 3)])
    hidden = labelled_preferences.hidden_positives(dataset, asked[:, 0], asked[:, 1])
    train = worlds.pairs_of(dataset.train.users, dataset.train.items)
    expected = train & set(map(tuple, asked.tolist()))
    owners = np.repeat(np.arange(9), hidden.counts)
    assert worlds.pairs_of(owners, hidden.indices) == expected
    chosen = labelled_preferences.chosen_items(dataset, "hidden", hidden)
    for user, item, as_of in zip(chosen.users, chosen.items, chosen.as_of, strict=True):
        events = dataset.train.items[dataset.train.users == user]
        assert events[as_of] == item
    left = arrays.targets(
        dataset, window=0, history=False, min_history=0, threshold=0.0, left_out=hidden
    )
    assert worlds.pairs_of(left.users, left.items) == train - expected


def test_labels_of_free_lists_are_preferences_with_one_chosen_item(tmp_path):
    """Each (listed, unlisted) pair with exactly one chosen item has the same weight in its user:
    1 / N_u of the unlisted items, over all chosen items."""
    dataset = worlds.random_dataset(tmp_path / "d", n_users=8, n_items=20, per_user=10)
    teacher = _lists(dataset, below=True)
    chosen = labelled_preferences.chosen_items(dataset, "valid")
    source = labelled_preferences.label_source(dataset, teacher, chosen)
    seen, own = _sets(dataset, ("train",)), _sets(dataset, ("valid",))
    expected = {}
    for u in range(8):
        listed = set(teacher.items[teacher.offsets[u] : teacher.offsets[u + 1]].tolist())
        positive, everything = own[u] - seen[u], own[u] | seen[u]
        outside = set(range(20)) - listed - everything
        if not listed:
            continue
        for a in listed:
            for b in set(range(20)) - listed:
                if a in positive and b in outside:
                    expected[u, a, b, 1.0] = 1 / len(outside)
                if b in positive and a not in everything and outside:
                    expected[u, a, b, 0.0] = 1 / len(outside)
    drawn = _drawn(dataset, source, teacher)
    got = collections.Counter()
    rows = zip(drawn.queries.users, *drawn.items.T, drawn.right, drawn.weights, strict=True)
    for u, a, b, right, weight in rows:
        if weight > 0:
            got[int(u), int(a), int(b), float(right)] += float(weight)
    assert set(got) <= set(expected)
    assert {right for *_, right in got} == {0.0, 1.0}
    total = sum(expected.values())
    size = drawn.weights.size
    for pair, mass in expected.items():
        # A pair's weight is at most L / N, hence the variance.
        share, error = mass / source.count, 5 * np.sqrt(2.0 * mass / source.count / size)
        assert abs(got[pair] / size - share) < error, (pair, total)
    own_items = {
        (u, i): s
        for u in range(8)
        for i, s in zip(
            teacher.items[teacher.offsets[u] : teacher.offsets[u + 1]],
            teacher.scores[teacher.offsets[u] : teacher.offsets[u + 1]],
            strict=True,
        )
    }
    for u, a, margin, weight in zip(
        drawn.queries.users[:500],
        drawn.items[:500, 0],
        drawn.margins[:500],
        drawn.weights[:500],
        strict=True,
    ):
        if weight > 0:
            assert margin == pytest.approx(own_items[u, a] - teacher.floor)


@pytest.mark.parametrize("min_gap", [0.0, 2.0])
def test_labels_of_asked_lists_compare_listed_items_only(tmp_path, min_gap):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=8, n_items=20, per_user=10)
    teacher = _lists(dataset, below=False, min_gap=min_gap)
    chosen = labelled_preferences.chosen_items(dataset, "valid")
    source = labelled_preferences.label_source(dataset, teacher, chosen)
    seen, own = _sets(dataset, ("train",)), _sets(dataset, ("valid",))
    expected = set()
    for u in range(8):
        row = slice(teacher.offsets[u], teacher.offsets[u + 1])
        score = dict(zip(teacher.items[row].tolist(), teacher.scores[row].tolist(), strict=True))
        for a in score:
            for b in set(score) - {a}:
                one = (a in own[u] - seen[u]) != (b in own[u] - seen[u])
                other = b if a in own[u] - seen[u] else a
                gap = score[a] - score[b]
                if one and other not in own[u] | seen[u] and gap > 0 and gap >= min_gap:
                    expected.add((u, a, b, float(a in own[u] - seen[u]), gap))
    drawn = _drawn(dataset, source, teacher, size=20_000, min_gap=min_gap)
    keep = drawn.weights > 0
    got = {
        (int(u), int(a), int(b), float(r), float(m))
        for u, (a, b), r, m in zip(
            *(drawn.queries.users[keep], drawn.items[keep], drawn.right[keep]),
            drawn.margins[keep],
            strict=True,
        )
    }
    assert got == expected
    assert len(expected) > 5


def test_labels_of_stated_preferences_are_those_with_one_chosen_item(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=8, n_items=20, per_user=10)
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 8, 400)).astype(np.int32)
    items = np.stack([rng.choice(20, 2, replace=False) for _ in users]).astype(np.int32)
    teacher = teacher_pairs(users, items, rng.random(400).astype(np.float32))
    source = labelled_preferences.label_source(
        dataset, teacher, labelled_preferences.chosen_items(dataset, "valid")
    )
    seen, own = _sets(dataset, ("train",)), _sets(dataset, ("valid",))
    expected = {}
    for row, (u, (a, b)) in enumerate(zip(users, items, strict=True)):
        new = own[u] - seen[u]
        if (a in new) != (b in new) and (b if a in new else a) not in own[u] | seen[u]:
            expected[row] = bool(a in new)
    places = source.labels.pairs.tolist()
    assert dict(zip(places, source.labels.right.tolist(), strict=True)) == expected
    drawn = _drawn(dataset, source, teacher, size=2_000)
    rows = {(int(u), int(a), int(b)) for u, (a, b) in zip(users, items, strict=True)}
    got = {
        (int(u), int(a), int(b)) for u, (a, b) in zip(drawn.queries.users, drawn.items, strict=True)
    }
    assert got <= rows
    assert {bool(r) for r in drawn.right} == {True, False}
