"""Click metrics against scikit-learn, plain loops over pairs and arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import roc_auc_score

from slgr_jax.data.dataset import Slices
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import click_metrics
from slgr_jax.sampling.labelled_rows import LabelledRows


def pair_auc(scores, labels):
    """The definition, pair by pair."""
    pairs = [(p, n) for p, y in zip(scores, labels, strict=True) if y == 1
             for n, z in zip(scores, labels, strict=True) if z == 0]  # fmt: skip
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def world(seed, *, n=600, n_users=40, n_items=30, digits=1):
    """Rows of users with uneven counts; scores rounded so that many tie."""
    rng = np.random.default_rng(seed)
    users = (n_users * rng.random(n) ** 2).astype(np.int32)
    labels = (rng.random(n) < 0.4).astype(np.float32)
    scores = np.round(rng.normal(size=n) + labels, digits).astype(np.float32)
    items = rng.integers(0, n_items, n).astype(np.int32)
    rows = LabelledRows(users, items, rng.integers(0, 8, n).astype(np.int32), labels)
    slices = Slices(2, 2, rng.random(n_users) < 0.3, rng.random(n_items) < 0.3)
    return rows, scores, slices


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_auc_equals_scikit_learn_and_the_definition(digits):
    rows, scores, _ = world(digits, digits=digits)
    auc = click_metrics.auc(scores, rows.labels)
    assert auc == pytest.approx(roc_auc_score(rows.labels, scores), abs=1e-14)
    assert auc == pytest.approx(pair_auc(scores, rows.labels), abs=1e-14)
    order = np.random.default_rng(0).permutation(scores.size)
    assert click_metrics.auc(scores[order], rows.labels[order]) == auc
    assert click_metrics.auc(3 * scores - 1, rows.labels) == auc
    assert click_metrics.auc(-scores, rows.labels) == pytest.approx(1 - auc, abs=1e-14)


def test_auc_by_hand():
    # Positives 3, 1; negatives 2, 1, 0: wins 3 + 1, one tie, of 6 pairs.
    scores, labels = np.array([3.0, 2.0, 1.0, 1.0, 0.0]), np.array([1, 0, 1, 0, 0])
    assert click_metrics.auc(scores, labels) == 4.5 / 6
    assert click_metrics.auc(np.zeros(5), labels) == 0.5
    infinite = np.array([np.inf, 2.0, np.inf, -np.inf, 0.0])
    assert click_metrics.auc(infinite, labels) == 1.0


def test_what_is_undefined_is_nan():
    scores, none = np.array([1.0, 2.0]), np.zeros(0)
    for labels in (np.zeros(2), np.ones(2)):
        assert math.isnan(click_metrics.auc(scores, labels))
        assert math.isnan(click_metrics.gauc(scores, labels, np.zeros(2, int)))
    assert math.isnan(click_metrics.auc(none, none))
    assert math.isnan(click_metrics.log_loss(none, none))
    assert math.isnan(click_metrics.gauc(none, none, none.astype(int)))
    # A model that has diverged does not rank: NaN would otherwise sort as the best score.
    broken, labels = np.array([np.nan, 0.0]), np.array([1.0, 0.0])
    assert math.isnan(click_metrics.auc(broken, labels))
    assert math.isnan(click_metrics.gauc(broken, labels, np.zeros(2, int)))
    assert math.isnan(click_metrics.log_loss(broken, labels))


def test_log_loss_equals_scikit_learn_and_is_stable():
    rows, scores, _ = world(4, digits=5)
    probability = 1 / (1 + np.exp(-scores.astype(np.float64)))
    expected = sk_log_loss(rows.labels, probability)
    assert click_metrics.log_loss(scores, rows.labels) == pytest.approx(expected, rel=1e-12)
    half = click_metrics.log_loss(np.zeros(3), np.array([0.0, 1.0, 1.0]))
    assert half == pytest.approx(math.log(2), rel=1e-15)
    # log(1 + e^1000) = 1000 and log(1 + e^-1000) = 0, with no overflow on the way.
    far = np.array([1000.0, -1000.0, 1000.0, -1000.0], np.float32)
    assert click_metrics.log_loss(far, np.array([0.0, 1.0, 1.0, 0.0])) == 500.0
    tiny = click_metrics.log_loss(np.array([40.0]), np.array([1.0]))
    assert tiny == pytest.approx(math.exp(-40), rel=1e-12)


def test_gauc_by_hand():
    # User 7: one positive, between two negatives: auc 1/2. User 3: positives 5 and 2, negatives
    # 2 and 1 and 0: (3 + 2.5) / 6. User 9 has positives only.
    users = np.array([7, 3, 7, 3, 7, 3, 3, 3, 9, 9])
    scores = np.array([2.0, 5, 1, 2, 3, 2, 1, 0, 8, -8])
    labels = np.array([1.0, 1, 0, 1, 0, 0, 0, 0, 1, 1])
    first, second = 1 / 2, 5.5 / 6
    assert click_metrics.gauc(scores, labels, users) == pytest.approx((3 * first + 5 * second) / 8)
    by_positives = click_metrics.gauc(scores, labels, users, weights="positives")
    assert by_positives == pytest.approx((first + 2 * second) / 3)
    with pytest.raises(ConfigError, match="unknown gauc weights 'rows'; known: impressions, posit"):
        click_metrics.gauc(scores, labels, users, weights="rows")


@pytest.mark.parametrize("seed", range(3))
def test_gauc_equals_scikit_learn_user_by_user(seed):
    rows, scores, _ = world(seed, n=150)
    aucs, impressions, positives = [], [], []
    for user in set(rows.users.tolist()):
        of_user = rows.users == user
        if 0 < rows.labels[of_user].sum() < of_user.sum():
            aucs.append(roc_auc_score(rows.labels[of_user], scores[of_user]))
            impressions.append(of_user.sum())
            positives.append(rows.labels[of_user].sum())
    assert len(aucs) < len(set(rows.users.tolist()))  # some users have one class
    for name, weight in (("impressions", impressions), ("positives", positives)):
        expected = np.dot(aucs, weight) / np.sum(weight)
        measured = click_metrics.gauc(scores, rows.labels, rows.users, weights=name)
        assert measured == pytest.approx(expected, abs=1e-14)
    # A shift of one user's scores changes the pooled auc but no order within a user.
    shifted = scores + 100 * (rows.users == 0)
    gauc = click_metrics.gauc(scores, rows.labels, rows.users)
    assert click_metrics.gauc(shifted, rows.labels, rows.users) == pytest.approx(gauc, abs=1e-14)
    assert click_metrics.auc(shifted, rows.labels) != click_metrics.auc(scores, rows.labels)


def test_rela_impr_by_hand():
    # DeepFM on Sports, S-LLMR over the plain model (arXiv 2512.21526, table 2):
    # (0.3176 / 0.2990 - 1) * 100.
    assert click_metrics.rela_impr(0.8176, 0.7990) == pytest.approx(6.22073578, rel=1e-8)
    assert click_metrics.rela_impr(0.6, 0.7) == pytest.approx(-50.0)
    assert math.isnan(click_metrics.rela_impr(0.6, 0.5))


def test_slices_by_hand():
    # Users 0 (cold) and 1; items 0 and 1 are tail. One row a line: user, item, until, label.
    table = np.array([
        [0, 0, 1, 1],
        [0, 2, 1, 0],
        [0, 1, 4, 0],
        [0, 3, 4, 1],
        [1, 3, 3, 1],
        [1, 0, 3, 0],
        [1, 2, 9, 0],
    ])  # fmt: skip
    users, items, as_of, labels = table.T
    rows = LabelledRows(users, items, as_of, labels.astype(float))
    slices = Slices(2, 2, np.array([True, False]), np.array([True, True, False, False]))
    by_slice = {
        name: np.flatnonzero(chosen).tolist()
        for name, chosen in click_metrics.row_slices(rows, slices).items()
    }
    assert by_slice == {
        "overall": [0, 1, 2, 3, 4, 5, 6],
        "cold_rows": [0, 1, 4, 5],
        "warm_rows": [2, 3, 6],
        "cold_users": [0, 1, 2, 3],
        "warm_users": [4, 5, 6],
        "tail_items": [0, 2, 5],
        "head_items": [1, 3, 4, 6],
        "tail_positives_vs_user_negatives": [0, 1, 2],
        "head_positives_vs_user_negatives": [1, 2, 3, 4, 5, 6],
    }
    assert next(iter(by_slice)) == "overall"
    fewer = click_metrics.row_slices(rows, slices, cold_row_history=2)["cold_rows"]
    assert np.flatnonzero(fewer).tolist() == [0, 1]
    for name in by_slice:
        assert any(name in key.split(", ") for key in (*click_metrics.DEFINITIONS, "overall"))


def test_a_slice_is_the_metrics_of_its_rows_alone():
    rows, scores, slices = world(1)
    by_slice = click_metrics.summarize_rows(rows, scores, slices, cold_row_history=2)
    cold = {u for u in range(slices.cold_users.size) if slices.cold_users[u]}
    tail = {i for i in range(slices.tail_items.size) if slices.tail_items[i]}
    table = list(zip(rows.users, rows.items, rows.as_of, rows.labels, scores, strict=True))
    fans = {u for u, i, _, y, _ in table if y == 1 and i in tail}
    buyers = {u for u, i, _, y, _ in table if y == 1 and i not in tail}
    filters = {
        "overall": lambda u, i, t, y: True,
        "cold_rows": lambda u, i, t, y: t <= 2,
        "warm_rows": lambda u, i, t, y: t > 2,
        "cold_users": lambda u, i, t, y: u in cold,
        "warm_users": lambda u, i, t, y: u not in cold,
        "tail_items": lambda u, i, t, y: i in tail,
        "head_items": lambda u, i, t, y: i not in tail,
        "tail_positives_vs_user_negatives": lambda u, i, t, y: i in tail if y else u in fans,
        "head_positives_vs_user_negatives": lambda u, i, t, y: i not in tail if y else u in buyers,
    }
    assert list(by_slice) == list(filters)
    assert len(fans) < len({u for u, *_ in table})
    for name, accept in filters.items():
        users, _, _, labels, kept = map(
            np.array, zip(*(row for row in table if accept(*row[:4])), strict=True)
        )
        values = by_slice[name]
        assert (values["n"], values["n_positives"]) == (labels.size, labels.sum())
        assert values["auc"] == pytest.approx(roc_auc_score(labels, kept), abs=1e-14)
        expected = sk_log_loss(labels, 1 / (1 + np.exp(-kept.astype(np.float64))))
        assert values["log_loss"] == pytest.approx(expected, rel=1e-12)
        assert values["gauc"] == click_metrics.gauc(kept, labels, users)


def test_an_empty_slice_has_none():
    rows, scores, slices = world(2)
    by_slice = click_metrics.summarize_rows(rows, scores, slices, cold_row_history=-1)
    expected = {"auc": None, "log_loss": None, "gauc": None, "n": 0, "n_positives": 0}
    assert by_slice["cold_rows"] == expected
    assert by_slice["warm_rows"] == by_slice["overall"]


def test_bins_by_hand():
    # Users 0, 1, 2 have 2, 5, 9 training items; items 0, 1 have 4, 20 training users.
    users, items = np.array([0, 1, 2, 2]), np.array([1, 0, 0, 1])
    rows = LabelledRows(users, items, np.ones(4, int), np.array([1.0, 0, 1, 0]))
    by_slice = click_metrics.bin_slices(rows, np.array([2, 5, 9]), np.array([4, 20]), (5, 8), (4,))
    assert {name: np.flatnonzero(chosen).tolist() for name, chosen in by_slice.items()} == {
        "history<=5": [0, 1],
        "history 6-8": [],
        "history>8": [2, 3],
        "popularity<=4": [1, 2],
        "popularity>4": [0, 3],
    }


def test_the_auc_of_each_user_makes_up_gauc():
    rows, scores, slices = world(5, n=200)
    keep = slices.tail_items[rows.items]
    for chosen in (None, keep):
        of_users = click_metrics.per_user(rows, scores, chosen)
        mask = np.ones(len(rows), bool) if chosen is None else chosen
        assert of_users.users.tolist() == sorted(set(rows.users[mask].tolist()))
        weights = []
        for user, value, positives in zip(
            of_users.users, of_users.values["auc"], of_users.n_relevant, strict=True
        ):
            of_user = mask & (rows.users == user)
            weights.append(of_user.sum())
            assert positives == rows.labels[of_user].sum()
            if 0 < positives < of_user.sum():
                assert value == pytest.approx(roc_auc_score(rows.labels[of_user], scores[of_user]))
            else:
                assert math.isnan(value)
        defined = ~np.isnan(of_users.values["auc"])
        assert 0 < defined.sum() < defined.size
        mean = np.average(of_users.values["auc"][defined], weights=np.array(weights)[defined])
        expected = click_metrics.gauc(scores[mask], rows.labels[mask], rows.users[mask])
        assert mean == pytest.approx(expected, abs=1e-14)
    # A model that has diverged for one user says nothing of that user, and all of the others.
    broken = np.where(rows.users == rows.users[0], np.nan, scores).astype(np.float32)
    values = click_metrics.per_user(rows, broken).values["auc"]
    whole = click_metrics.per_user(rows, scores)
    assert np.isnan(values[whole.users == rows.users[0]]).all()
    others = whole.users != rows.users[0]
    np.testing.assert_array_equal(values[others], whole.values["auc"][others])
