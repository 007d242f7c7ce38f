"""The report's numbers against slow plain Python on small random worlds."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import numpy as np
import pyarrow as pa
import pytest
import worlds
from scipy import stats

from slgr_jax import config
from slgr_jax.config import SliceConfig
from slgr_jax.data import schema
from slgr_jax.reports import teacher_audit
from slgr_jax.teacher.audit import accuracy, consistency, known_pairs
from slgr_jax.teacher.audit.known_pairs import HELD_IN, VALIDATION
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.preferences import Provenance

N_USERS, N_ITEMS = 60, 30
BINS = [("history<=4", 0, 4), ("history>4", 5, math.inf)]
ITEM_BINS = [("popularity<=6", 0, 6), ("popularity>6", 7, math.inf)]


@pytest.fixture
def world(make_dataset):
    """Popular items are chosen more often; every user has training and validation items."""
    rng = np.random.default_rng(5)
    weights = 1 / np.arange(1, N_ITEMS + 1)
    train, valid = {}, {}
    for user in range(N_USERS):
        size = int(rng.integers(2, 9))
        items = rng.choice(N_ITEMS, size + 2, replace=False, p=weights / weights.sum()).tolist()
        train[user], valid[user] = items[:size], items[size : size + int(rng.integers(0, 3))]
    users, items = (tuple(str(k) for k in range(n)) for n in (N_USERS, N_ITEMS))
    return make_dataset("world", users=users, items=items, train=train, valid=valid, test={0: [29]})


def chosen(dataset, part):
    """User -> set of items."""
    part = dataset.part(part)
    found = {user: set() for user in range(N_USERS)}
    for user, item in zip(part.users.tolist(), part.items.tolist(), strict=True):
        found[user].add(item)
    return found


def product(dataset, kind="scores", seed=0, **stated):
    """(teacher, {user: {item: score}} or [(user, preferred, other, margin)])."""
    rng = np.random.default_rng(seed)
    if kind == "scores":
        said = {
            user: {
                int(item): float(rng.integers(0, 6)) / 4
                for item in rng.choice(N_ITEMS, 14, replace=False)
            }
            for user in range(0, N_USERS, 1 + seed % 2)
        }
        rows = [
            (user, item, score) for user, list_ in said.items() for item, score in list_.items()
        ]
    else:
        pairs = itertools.product(range(N_USERS), itertools.combinations(range(N_ITEMS), 2))
        said = rows = [
            (user, *rng.permutation(pair).tolist(), float(rng.integers(1, 5)) / 4)
            for user, pair in pairs
            if rng.random() < 0.1
        ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = pa.table(columns, schema=schema.TEACHER_SCHEMAS[kind])
    preferences.write_product(dataset, "t", table, provenance=Provenance(**stated), overwrite=True)
    return preferences.load(dataset, "t"), said


def every_known_pair(dataset, kind, said, source):
    """Plain Python: (user, positive, negative, right, margin) of all pairs the teacher orders."""
    train, valid = chosen(dataset, "train"), chosen(dataset, "valid")
    positives = train if source == HELD_IN else valid
    taken = {user: train[user] | valid[user] for user in train}
    if kind == "preferences":
        for user, one, two, margin in said:
            if one in positives[user] and two not in taken[user]:
                yield user, one, two, True, margin
            if two in positives[user] and one not in taken[user]:
                yield user, two, one, False, margin
        return
    for user, list_ in said.items():
        for one, two in itertools.product(list_, list_):
            if one in positives[user] and two not in taken[user] and list_[one] != list_[two]:
                gap = list_[one] - list_[two]
                yield user, one, two, gap > 0, abs(gap)


def as_tuples(pairs):
    columns = (pairs.users, pairs.positives, pairs.negatives, pairs.right, pairs.margin)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def everyone():
    return np.ones(N_USERS, bool)


@pytest.mark.parametrize("kind", ["scores", "preferences"])
@pytest.mark.parametrize("source", [HELD_IN, VALIDATION])
def test_known_pairs_are_all_there(world, kind, source):
    teacher, said = product(world, kind)
    pairs = known_pairs.find(world, teacher, source, among=everyone(), most=N_ITEMS)
    expected = sorted(every_known_pair(world, kind, said, source))
    assert len(expected) > 50
    assert sorted(as_tuples(pairs)) == expected
    assert (np.diff(pairs.users) >= 0).all()
    odd = np.arange(N_USERS) % 2 == 1
    some = known_pairs.find(world, teacher, source, among=odd, most=N_ITEMS)
    assert sorted(as_tuples(some)) == [row for row in expected if row[0] % 2]
    near = known_pairs.find(world, teacher, source, among=everyone(), most=N_ITEMS, matched=True)
    count = world.popularity.tolist()
    matched = [
        row
        for row in expected
        if max(count[row[1]], count[row[2]]) <= 1.5 * min(count[row[1]], count[row[2]])
    ]
    assert 0 < len(matched) < len(expected)
    assert sorted(as_tuples(near)) == matched


def test_fewer_negatives_are_a_part_of_all(world):
    teacher, said = product(world)
    pairs = known_pairs.find(world, teacher, VALIDATION, among=everyone(), most=3)
    found, expected = as_tuples(pairs), set(every_known_pair(world, "scores", said, VALIDATION))
    assert len(set(found)) == len(found)
    assert set(found) < expected
    assert pairs.asked <= 3 * len({row[:2] for row in expected}) + 3 * N_USERS
    of_user = {}
    for user, _, two, *_ in found:
        of_user.setdefault(user, set()).add(two)
    assert max(map(len, of_user.values())) > 3  # positives take turns around them
    assert max(np.unique([row[:2] for row in found], axis=0, return_counts=True)[1]) == 3


def test_unlisted_items_rank_below(world):
    teacher, said = product(world, seed=1, unlisted="below")
    train, valid = chosen(world, "train"), chosen(world, "valid")
    for matched in (False, True):
        pairs = known_pairs.find(
            world, teacher, VALIDATION, among=everyone(), most=40, matched=matched
        )
        found = as_tuples(pairs)
        assert {row[0] for row in found} <= set(said)
        ordered = 0
        for user, one, two, right, margin in found:
            assert one in valid[user]
            assert two not in train[user] | valid[user]
            scores = [said[user].get(item, -math.inf) for item in (one, two)]
            assert right == (scores[0] > scores[1])
            ordered += scores[0] != scores[1]
            if math.isinf(scores[0] - scores[1]):
                assert math.isnan(margin)
            else:
                assert margin == pytest.approx(abs(scores[0] - scores[1]))
            sizes = sorted(world.popularity[[one, two]].tolist())
            assert not matched or sizes[1] <= 1.5 * sizes[0]
        if matched:  # the edges count as near, too
            count = world.popularity.tolist()
            assert {count[one] / count[two] for _, one, two, *_ in found} >= {1 / 1.5, 1, 1.5}
        assert ordered == len(found) < pairs.asked  # ties and two unlisted items are not ordered
        if not matched:  # every pair that the teacher orders can come, and 40 draws find most
            possible = {
                (user, one, two)
                for user, list_ in said.items()
                for one in valid[user]
                for two in set(range(N_ITEMS)) - train[user] - valid[user]
                if list_.get(one) != list_.get(two)
            }
            assert {row[:3] for row in found} <= possible
            assert len({row[:3] for row in found}) > 0.6 * len(possible)


def cosine_score(others, history, item):
    """Plain Python item-item: `others` are the training sets that count."""
    total = 0.0
    for owned in history:
        together = sum(item in one and owned in one for one in others)
        sizes = [sum(k in one for one in others) for k in (item, owned)]
        total += together / math.sqrt(sizes[0] * sizes[1]) if together else 0.0
    return total


@pytest.mark.parametrize("source", [HELD_IN, VALIDATION])
@pytest.mark.parametrize("dense", [True, False])
def test_what_the_data_know(world, source, dense):
    teacher, _ = product(world)
    pairs = known_pairs.find(world, teacher, source, among=everyone(), most=2)
    cosines = known_pairs.cosines(world)
    if not dense:
        cosines = known_pairs.sparse.csr_matrix(cosines)
    held_in = source == HELD_IN
    items = known_pairs.by_items(world, pairs, cosines, held_in=held_in)
    popularity = known_pairs.by_popularity(world, pairs, held_in=held_in)
    train = chosen(world, "train")
    hidden = {user: set() for user in train}
    if held_in:
        for user, positive, *_ in as_tuples(pairs):
            hidden[user].add(positive)
    close = 0
    for k, (user, one, two, *_) in enumerate(as_tuples(pairs)):
        history = train[user] - hidden[user]
        # The positive's counts are without the user; the history's items are still hers.
        own = list(train.values())
        without = [owned - ({one} if other == user else set()) for other, owned in train.items()]
        first = cosine_score(without if held_in else own, history, one)
        second = cosine_score(own, history, two)
        if abs(first - second) < 1e-5:
            close += 1
        else:
            assert items[k] == (first > second)
        sizes = [
            sum(item in owned for owned in sets) for item, sets in ((one, without), (two, own))
        ]
        if not held_in:
            sizes[0] = sum(one in owned for owned in own)
        assert popularity[k] == (0.5 if sizes[0] == sizes[1] else sizes[0] > sizes[1])
    assert close < 0.1 * len(items)


def test_accuracy_is_a_share_of_pairs(world):
    teacher, said = product(world, training_items="hidden")
    found = accuracy.measure(
        world, teacher, history_bins=BINS, popularity_bins=ITEM_BINS, most_pairs=N_ITEMS
    )
    rows = {(row.known, row.name): row for row in found.agreement}
    slices = world.slices(SliceConfig())
    for source in (HELD_IN, VALIDATION):
        pairs = list(every_known_pair(world, "scores", said, source))
        cuts = {
            "all": lambda _: True,
            "cold users": lambda row: slices.cold_users[row[0]],
            "warm users": lambda row: not slices.cold_users[row[0]],
            "tail items": lambda row: slices.tail_items[row[1]],
            "head items": lambda row: not slices.tail_items[row[1]],
            "history<=4": lambda row: world.history[row[0]] <= 4,
            "history>4": lambda row: world.history[row[0]] > 4,
            "popularity<=6": lambda row: world.popularity[row[1]] <= 6,
            "popularity>6": lambda row: world.popularity[row[1]] > 6,
        }
        margins = sorted(row[4] for row in pairs)
        low, *_, high = (margins[(len(margins) - 1) * k // 4] for k in (1, 2, 3))
        cuts[f"margin<={low:.3g}"] = lambda row, low=low: row[4] <= low
        cuts[f"margin>{high:.3g}"] = lambda row, high=high: row[4] > high
        for name, inside in cuts.items():
            by_user = {}
            for row in filter(inside, pairs):
                by_user.setdefault(row[0], []).append(float(row[3]))
            values = list(itertools.chain.from_iterable(by_user.values()))
            row = rows[source, name]
            assert (row.pairs, row.users) == (len(values), len(by_user))
            assert row.accuracy == pytest.approx(statistics.mean(values))
            assert row.gain == pytest.approx(row.accuracy - row.item_item)
            assert row.low <= row.accuracy <= row.high or len(by_user) == 1
    assert rows[VALIDATION, "matched: all"].pairs < rows[VALIDATION, "all"].pairs
    assert found.deciding == HELD_IN
    useful = preferences.usable_pairs(teacher) > 0
    shown = {row.slice: (row.total, row.covered) for row in found.coverage}
    assert shown["users"] == (N_USERS, int(useful.sum()))
    assert shown["cold users"] == (slices.cold_users.sum(), (useful & slices.cold_users).sum())
    named = {item for user in np.flatnonzero(useful).tolist() for item in said[user]}
    assert shown["items"] == (N_ITEMS, len(named))
    tail = set(np.flatnonzero(slices.tail_items).tolist())
    assert shown["tail items"] == (len(tail), len(tail & named))


def test_the_interval_is_over_users():
    rng = np.random.default_rng(0)
    once = rng.random(25)
    test = stats.ttest_1samp(once, 0).confidence_interval(0.95)
    pair_each = accuracy.interval(np.arange(25), once)
    assert pair_each == pytest.approx((once.mean(), test.low, test.high))
    # The same pairs ten times over tell no more about the users.
    assert accuracy.interval(np.repeat(np.arange(25), 10), np.repeat(once, 10)) == pytest.approx(
        pair_each
    )
    # Users of unequal numbers of pairs, all theirs alike: as a bootstrap over users has it.
    counts = rng.integers(1, 30, 200)
    users, values = np.repeat(np.arange(200), counts), np.repeat(rng.random(200) < 0.7, counts)
    mean, low, high = accuracy.interval(users, values.astype(float))
    sums = np.bincount(users, weights=values)
    drawn = rng.integers(0, 200, (4000, 200))
    shares = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    assert (low, mean, high) == pytest.approx(
        (np.quantile(shares, 0.025), values.mean(), np.quantile(shares, 0.975)), abs=0.006
    )
    assert np.isnan(accuracy.interval(np.zeros(3), np.arange(3.0))[1:]).all()


def free_lists(dataset, listed):
    """The audit of lists of what `listed` [U, I] bool says, in random order."""
    users, items = np.nonzero(listed)
    scores = np.random.default_rng(9).random(users.size).astype(np.float32)
    columns = [users.astype(np.int32), items.astype(np.int32), scores]
    table = pa.table(columns, schema=schema.TEACHER_SCORES)
    stated = Provenance(unlisted="below", training_items="none")
    preferences.write_product(dataset, "free", table, provenance=stated, overwrite=True)
    return accuracy.measure(dataset, preferences.load(dataset, "free"), history_bins=BINS)


@pytest.mark.parametrize("length", [2, 10])
def test_random_free_lists_are_right_half_of_the_time(tmp_path, length):
    rng = np.random.default_rng(length)
    dataset = worlds.random_dataset(tmp_path / "data", n_users=400, n_items=N_ITEMS)
    taken = dataset.positives(("train",)).matrix(N_ITEMS).toarray() > 0
    rows = []
    for _ in range(5):
        order = np.where(taken, 2, rng.random(taken.shape)).argsort(axis=1).argsort(axis=1)
        rows.append(free_lists(dataset, (order < length) & ~taken).agreement[0])
    assert {row.known for row in rows} == {VALIDATION}
    assert np.mean([row.accuracy for row in rows]) == pytest.approx(0.5, abs=0.03)
    assert sum(row.low <= 0.5 <= row.high for row in rows) >= 4


@pytest.mark.parametrize(("chosen_listed", "others_listed"), [(0.4, 0.05), (0.1, 0.1), (0.05, 0.3)])
def test_free_lists_of_known_accuracy(tmp_path, chosen_listed, others_listed):
    """An item is listed at a known rate: right is listed over unlisted, wrong the reverse."""
    rng = np.random.default_rng(1)
    pairs = worlds.random_pairs(3, 400, 60, 4)
    dataset = worlds.write_dataset(
        tmp_path / "data", pairs[::4], np.concatenate([pairs[1::4], pairs[2::4]]), pairs[3::4],
        n_users=400, n_items=60,
    )  # fmt: skip
    is_chosen = dataset.positives(("valid",)).matrix(60).toarray() > 0
    listed = rng.random(is_chosen.shape) < np.where(is_chosen, chosen_listed, others_listed)
    # Both listed, in random order, is right half of the time.
    both = chosen_listed * others_listed
    right, wrong = chosen_listed - both / 2, others_listed - both / 2
    found = free_lists(dataset, listed).agreement[0]
    assert found.accuracy == pytest.approx(right / (right + wrong), abs=0.04)
    assert found.low < right / (right + wrong) < found.high


def all_knowing(dataset, likes):
    """A product that scores all items of everybody by `likes(user, item)`."""
    pairs = itertools.product(range(N_USERS), range(N_ITEMS))
    rows = [(user, item, float(likes(user, item))) for user, item in pairs]
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = pa.table(columns, schema=schema.TEACHER_SCORES)
    preferences.write_product(dataset, "t", table, provenance=Provenance(), overwrite=True)
    return accuracy.measure(
        dataset, preferences.load(dataset, "t"), popularity_bins=ITEM_BINS, history_bins=BINS
    )


def test_the_verdict_believes_who_knows_and_nobody_else(world):
    valid = chosen(world, "valid")
    rng = np.random.default_rng(0)
    noise = rng.random((N_USERS, N_ITEMS))
    knows = all_knowing(world, lambda u, i: (i in valid[u]) + noise[u, i] / 2)
    assert teacher_audit.verdict(knows)[0].startswith("Believe it on: all (+")
    assert next(row for row in knows.agreement if row.slice == "all").accuracy == 1
    for likes in (
        lambda u, i: noise[u, i],
        lambda _, i: -int(world.popularity[i]) + noise[0, i] / 2,
        lambda _, i: int(world.popularity[i]) + noise[0, i] / 2,
    ):
        found = all_knowing(world, likes)
        assert teacher_audit.verdict(found)[0].startswith("Believe it nowhere")
        # On unpopular positives even a coin beats the data: why those slices are not believed.
    coin = {row.name: row for row in all_knowing(world, lambda u, i: noise[u, i]).agreement}
    assert coin["popularity<=6"].gain > 0.05
    assert coin["popularity<=6"].leans
    assert not coin["matched: popularity<=6"].leans


def log_of(rows):
    """Rows of (request, user, item, other, position, permutation, score)."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.table(columns, schema=schema.ANSWERS)


def test_pairs_asked_both_ways_round():
    found = consistency.measure(
        log_of(
            [
                (0, 1, 5, 7, 0, 0, 0.9),  # user 1: 5 over 7 ...
                (1, 1, 7, 5, 0, 1, 0.3),  # ... both ways
                (2, 2, 5, 7, 0, 0, 0.8),  # user 2: whichever is first
                (3, 2, 7, 5, 0, 1, 0.7),
                (4, 3, 5, 7, 0, 0, 0.5),  # a tie is no answer
                (5, 3, 7, 5, 0, 1, 0.2),
                (6, 3, 1, 7, 0, 0, 1.0),  # one order only
                (7, 4, 1, 7, 0, 0, None),
                (8, 5, 1, 7, 0, 0, 0.4),  # user 5: 7 over 1 both ways
                (9, 5, 7, 1, 0, 1, 0.9),
            ]
        )
    )
    assert (found.pairs, found.both_orders, found.list_pairs) == (9, 4, 0)
    assert found.first_preferred == pytest.approx((1 + 0 + 1 + 1 + 0.5 + 0 + 1 + 0 + 1) / 9)
    assert found.bias == pytest.approx((0.6 + 0.75 + 0.35 + 0.65) / 4 - 0.5)
    assert found.same_both_orders == pytest.approx(2 / 4)
    assert math.isnan(found.place_slope)


def test_lists_asked_in_several_orders():
    rng = np.random.default_rng(3)
    rows, request = [], 0
    for user in range(6):
        for part in range(2):  # two lists of each user
            items = (rng.permutation(10) + 10 * part).tolist()
            for permutation in range(3):
                order = rng.permutation(items).tolist()
                for position, item in enumerate(order):
                    score = None if rng.random() < 0.1 else float(rng.integers(0, 5)) - position / 4
                    rows.append((request, user, item, None, position, permutation, score))
                request += 1
    found = consistency.measure(log_of(rows))
    given = [row for row in rows if row[6] is not None]
    by_request = {k: {row[2]: row[6] for row in given if row[0] == k} for k in range(request)}
    same = []
    for k in range(request):
        if k % 3 == 2:
            continue
        # Items that skip a permutation meet their next answer, in the one after.
        for one, two in itertools.combinations(range(k, k - k % 3 + 3), 2):
            if one != k:
                continue
            middle = by_request[k + 1] if two == k + 2 else {}
            both = [i for i in by_request[one] if i in by_request[two] and i not in middle]
            for i, j in itertools.combinations(both, 2):
                sign = (by_request[one][i] - by_request[one][j]) * (
                    by_request[two][i] - by_request[two][j]
                )
                same += [sign > 0] if sign else []
    assert found.list_pairs == len(same) > 300
    assert found.same_in_lists == pytest.approx(statistics.mean(same))
    # Least squares with a constant for each (user, item): the slope of `np.linalg.lstsq`.
    owners = sorted({row[1:3] for row in given})
    design = np.zeros((len(given), len(owners) + 1))
    for k, row in enumerate(given):
        design[k, owners.index(row[1:3])] = 1
        design[k, -1] = row[4] / max(r[4] for r in given if r[0] == row[0])
    scores = np.array([row[6] for row in given])
    slope = np.linalg.lstsq(design, scores, rcond=None)[0][-1]
    assert found.place_slope == pytest.approx(slope / scores.std())
    assert found.place_slope < -0.3


def test_the_report_is_written_and_says_what_it_found(world, tmp_path):
    product(world, training_items="hidden")
    options = config.ReportConfig(known_negatives=5)
    found = teacher_audit.make(world, "t", options, prices=(1.0, 2.0), seed=0)
    paths = teacher_audit.write(found, tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "report.json", "report.png"]
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    data = json.loads(paths[1].read_text())
    rows = [row for row in data["agreement"] if row["known"] == "held-in"]
    assert data["deciding"] == "held-in"
    assert rows[0]["accuracy"] == found.agreement[0].accuracy
    text = paths[0].read_text()
    for line in data["verdict"]:
        assert f"- {line}\n" in text
    assert f" {found.agreement[0].accuracy:.4f} |" in text
    assert "## Agreement with validation items" in text
    assert teacher_audit.verdict(found)[0] in teacher_audit.terminal(found)


def test_a_teacher_without_a_known_pair(world, tmp_path):
    table = pa.table([[0, 0], [28, 27], [1.0, 2.0]], schema=schema.TEACHER_SCORES)
    preferences.write_product(world, "t", table, provenance=Provenance())
    found = teacher_audit.make(world, "t", config.ReportConfig(), prices=(0, 0), seed=0)
    assert found.agreement == ()
    assert "Nothing is known about its correctness" in teacher_audit.terminal(found)
    assert teacher_audit.write(found, tmp_path / "out")[2].is_file()


def test_cost_counts_what_could_not_be_used(tmp_path):
    ledger = {
        "accepted": {
            "answers": 3, "without_usage": 1, "prompt_tokens": 1000, "completion_tokens": 100
        },
        "quarantined": {"answers": 2, "prompt_tokens": 500, "completion_tokens": 50},
        "models": ["m"],
    }  # fmt: skip
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(ledger))
    cost = teacher_audit._cost(path, (2.0, 10.0))
    assert (cost.prompt_tokens, cost.completion_tokens) == (1500, 150)
    assert cost.money == pytest.approx((1500 * 2 + 150 * 10) / 1e6)
    assert (cost.answers, cost.unusable, cost.untold) == (3, 2, 1)
