"""Metrics against ir-measures, scikit-learn, arithmetic by hand and plain Python."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG
from sklearn.metrics import ndcg_score, roc_auc_score

from slgr_jax.data.dataset import Csr, Slices
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import ranking_metrics

KS = (1, 5, 10)


def ranking_of(
    scores: np.ndarray, relevant: np.ndarray, masked: np.ndarray
) -> ranking_metrics.Ranking:
    """A `Ranking` from dense arrays [U, I] by sorting; relevant items must not be masked."""
    users, offsets, out = [], [0], {"items": [], "ranks": [], "greater": [], "tied": []}
    n_candidates, top = [], []
    for u in range(scores.shape[0]):
        wanted = np.flatnonzero(relevant[u])
        if not wanted.size:
            continue
        candidates = np.flatnonzero(~masked[u])
        order = candidates[np.lexsort((candidates, -scores[u, candidates]))]
        others = scores[u, candidates[~relevant[u, candidates]]]
        users.append(u)
        offsets.append(offsets[-1] + wanted.size)
        for item in wanted:
            out["items"].append(item)
            out["ranks"].append(1 + int(np.flatnonzero(order == item)[0]))
            out["greater"].append(int(np.sum(others > scores[u, item])))
            out["tied"].append(int(np.sum(others == scores[u, item])))
        n_candidates.append(candidates.size)
        top.append(order[: max(KS)])
    arrays = {name: np.array(values, np.int64) for name, values in out.items()}
    pairs = np.repeat(np.array(users, np.int64), np.diff(offsets))
    return ranking_metrics.Ranking(
        users=np.array(users, np.int32),
        offsets=np.array(offsets),
        scores=scores[pairs, arrays["items"]],
        n_candidates=np.array(n_candidates),
        top_items=np.array(top),
        n_items=scores.shape[1],
        **arrays,
    )


def world(seed: int, *, ties: bool = False, share: float = 0.1) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(30 * 60).reshape(30, 60).astype(np.float32)
    if ties:
        scores = scores // 300
    masked = rng.random(scores.shape) < 0.2
    relevant = (rng.random(scores.shape) < share) & ~masked
    relevant[3] = False  # a user without relevant items
    return scores, relevant, masked


def reference(measures: list, scores: np.ndarray, relevant: np.ndarray, masked: np.ndarray) -> dict:
    """Per-user values from ir-measures: {(measure, user): value}."""
    qrels = [ir_measures.Qrel(str(u), str(i), 1) for u, i in np.argwhere(relevant)]
    run = [
        ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u, i in np.argwhere(~masked)
    ]
    measured = ir_measures.iter_calc(measures, qrels, run)
    return {(str(value.measure), int(value.query_id)): value.value for value in measured}


@pytest.mark.parametrize("seed", range(3))
def test_ir_measures_agrees_per_user(seed):
    scores, relevant, masked = world(seed)
    ranking = ranking_of(scores, relevant, masked)
    of_users = ranking_metrics.per_user(ranking, KS)
    assert of_users.users.tolist() == [u for u in range(30) if relevant[u].any()]
    assert 3 not in of_users.users
    names = {"mrr": RR}
    for k in KS:
        names |= {f"recall@{k}": R @ k, f"ndcg@{k}": nDCG @ k, f"hit@{k}": Success @ k}
        names |= {f"precision@{k}": P @ k}
    expected = reference(list(names.values()), scores, relevant, masked)
    for name, measure in names.items():
        want = [expected[str(measure), u] for u in of_users.users]
        np.testing.assert_allclose(of_users.values[name], want, rtol=1e-12, err_msg=name)


def test_map_is_ir_measures_ap_up_to_the_stated_divisor():
    scores, relevant, masked = world(7, share=0.3)
    of_users = ranking_metrics.per_user(ranking_of(scores, relevant, masked), KS)
    assert of_users.n_relevant.max() > 10 > of_users.n_relevant.min() > 1
    expected = reference([AP @ k for k in KS], scores, relevant, masked)
    for k in KS:
        # ir-measures divides by |R|, we by min(|R|, K).
        ratio = of_users.n_relevant / np.minimum(of_users.n_relevant, k)
        want = np.array([expected[str(AP @ k), u] for u in of_users.users]) * ratio
        np.testing.assert_allclose(of_users.values[f"map@{k}"], want, rtol=1e-12)


def test_ndcg_equals_scikit_learn_without_masks():
    scores, relevant, masked = world(1)
    masked[:] = False
    ranking = ranking_of(scores, relevant, masked)
    of_users = ranking_metrics.per_user(ranking, KS)
    for k in KS:
        want = [ndcg_score(relevant[[u]], scores[[u]], k=k) for u in of_users.users]
        np.testing.assert_allclose(of_users.values[f"ndcg@{k}"], want, rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_scikit_learn_per_user(ties):
    scores, relevant, masked = world(2, ties=ties)
    of_users = ranking_metrics.per_user(ranking_of(scores, relevant, masked), KS)
    want = [roc_auc_score(relevant[u, ~masked[u]], scores[u, ~masked[u]]) for u in of_users.users]
    np.testing.assert_allclose(of_users.values["auc"], want, rtol=1e-12)


def test_arithmetic_by_hand():
    """Five candidates, relevant at ranks 2, 3 and 5; three of three asked for within K = 4: two."""
    ranking = ranking_metrics.Ranking(
        users=np.array([4], np.int32),
        offsets=np.array([0, 3]),
        items=np.array([0, 1, 2]),
        ranks=np.array([5, 2, 3]),
        scores=np.array([0.1, 0.9, 0.8], np.float32),
        greater=np.array([2, 1, 1]),
        tied=np.array([0, 0, 0]),
        n_candidates=np.array([5]),
        top_items=np.zeros((1, 0), np.int32),
        n_items=7,
    )
    values = {
        name: float(v[0]) for name, v in ranking_metrics.per_user(ranking, (2, 4)).values.items()
    }
    two, three = 1 / math.log2(3), 1 / math.log2(4)
    assert values["recall@4"] == pytest.approx(2 / 3)
    assert values["precision@4"] == pytest.approx(2 / 4)
    assert values["ndcg@4"] == pytest.approx((two + three) / (1 + two + three))
    assert values["ndcg@2"] == pytest.approx(two / (1 + two))
    assert values["map@4"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert values["map@2"] == pytest.approx((1 / 2) / 2)
    assert values["hit@2"] == 1.0
    assert values["mrr"] == pytest.approx(1 / 2)
    # Two negatives, at ranks 1 and 4: the pairs in the right order are 1 + 1 + 0 of 6.
    assert values["auc"] == pytest.approx(2 / 6)


def test_a_user_without_negatives_has_no_auc_and_does_not_enter_its_mean():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], np.float32)
    relevant = np.array([[True, True, True], [False, True, False]])
    ranking = ranking_of(scores, relevant, np.zeros_like(relevant))
    of_users = ranking_metrics.per_user(ranking, (1,))
    assert np.isnan(of_users.values["auc"]).tolist() == [True, False]
    whole = ranking_metrics.summarize(of_users)
    assert whole["auc"] == pytest.approx(0.5)
    assert whole["n"] == 2
    assert whole["n_relevant"] == 4
    alone = ranking_metrics.summarize(of_users, np.array([True, False]))
    assert alone["auc"] is None
    assert alone["recall@1"] == pytest.approx(1 / 3)


def test_no_users_give_none_and_zero():
    empty = np.zeros((2, 3), bool)
    nothing = ranking_of(np.zeros((2, 3), np.float32), empty, empty)
    values = ranking_metrics.summarize(ranking_metrics.per_user(nothing, KS))
    assert values.pop("n") == 0
    assert values.pop("n_relevant") == 0
    assert set(values) == set(ranking_metrics.metric_names(KS))
    assert set(values.values()) == {None}


def test_keep_restricts_relevant_items_and_leaves_ranks_and_negatives():
    scores, relevant, masked = world(5)
    ranking = ranking_of(scores, relevant, masked)
    keep = np.arange(60) % 3 == 0
    of_users = ranking_metrics.per_user(ranking, KS, keep)
    for row, u in enumerate(of_users.users):
        candidates = np.flatnonzero(~masked[u])
        order = candidates[np.argsort(-scores[u, candidates])].tolist()
        wanted = [i for i in np.flatnonzero(relevant[u]) if keep[i]]
        others = [i for i in candidates if not relevant[u, i]]
        hits = [i for i in order[:5] if i in wanted]
        assert of_users.values["recall@5"][row] == pytest.approx(len(hits) / len(wanted))
        right = sum(scores[u, i] > scores[u, j] for i in wanted for j in others)
        want = right / len(wanted) / len(others)
        assert of_users.values["auc"][row] == pytest.approx(want)
        first = 1 + min(order.index(i) for i in wanted)
        assert of_users.values["mrr"][row] == pytest.approx(1 / first)
    assert of_users.users.size == sum(bool((relevant[u] & keep).any()) for u in range(30))
    assert of_users.users.size < ranking.users.size


def test_slices_equal_plain_python():
    scores, relevant, masked = world(11)
    ranking = ranking_of(scores, relevant, masked)
    rng = np.random.default_rng(0)
    history, popularity = rng.integers(0, 30, 30), rng.integers(0, 90, 60)
    slices = Slices(8, 20, history <= 8, popularity <= 20)
    masks = ranking_metrics.slice_masks(slices, history, popularity, (5, 10, 20), (20, 50))
    data = ranking_metrics.PartData(
        relevant=Csr.from_pairs(*np.nonzero(relevant), 30),
        seen=Csr.from_pairs(*np.nonzero(masked), 30),
        masked=("train",),
        slices=slices,
        history=history,
        popularity=popularity,
        masks=masks,
    )
    result = ranking_metrics.summarize_part(ranking, data, KS)

    def recall(u: int, allowed) -> float | None:
        wanted = [i for i in range(60) if relevant[u, i] and allowed(i)]
        order = [i for i in np.argsort(-scores[u]) if not masked[u, i]]
        return len(set(order[:5]) & set(wanted)) / len(wanted) if wanted else None

    rules = {
        "overall": (lambda u: True, lambda i: True),
        "cold_users": (lambda u: history[u] <= 8, lambda i: True),
        "warm_users": (lambda u: history[u] > 8, lambda i: True),
        "tail_items": (lambda u: True, lambda i: popularity[i] <= 20),
        "head_items": (lambda u: True, lambda i: popularity[i] > 20),
        "history<=5": (lambda u: history[u] <= 5, lambda i: True),
        "history 6-10": (lambda u: 6 <= history[u] <= 10, lambda i: True),
        "history 11-20": (lambda u: 11 <= history[u] <= 20, lambda i: True),
        "history>20": (lambda u: history[u] > 20, lambda i: True),
        "popularity<=20": (lambda u: True, lambda i: popularity[i] <= 20),
        "popularity 21-50": (lambda u: True, lambda i: 21 <= popularity[i] <= 50),
        "popularity>50": (lambda u: True, lambda i: popularity[i] > 50),
    }
    assert set(result.slices) == set(rules)
    assert next(iter(result.slices)) == "overall"
    for name, (user_in, item_in) in rules.items():
        values = [recall(u, item_in) for u in range(30) if user_in(u)]
        values = [value for value in values if value is not None]
        assert result.slices[name]["n"] == len(values) > 0, name
        assert result.slices[name]["recall@5"] == pytest.approx(np.mean(values)), name
        pairs = sum(
            relevant[u, i] and user_in(u) and item_in(i) for u in range(30) for i in range(60)
        )
        assert result.slices[name]["n_relevant"] == pairs
    assert result.users["tail"].users.size == result.slices["tail_items"]["n"]
    shown = {i for u in ranking.users for i in np.argsort(-scores[u] + 1e9 * masked[u])[:5]}
    assert result.slices["overall"]["coverage@5"] == pytest.approx(len(shown) / 60)
    assert result.slices["overall"]["auc_pooled"] is None


def test_lists_shorter_than_k_count_only_their_items():
    top = np.array([[2, 0, -1], [2, -1, -1], [-1, -1, -1]])
    popularity = np.array([10, 99, 4])
    assert ranking_metrics.coverage(top, 3, 3) == pytest.approx(2 / 3)
    assert ranking_metrics.coverage(top, 1, 3) == pytest.approx(1 / 3)
    assert ranking_metrics.mean_popularity(top, 3, popularity) == pytest.approx((7 + 4) / 2)


def test_bins_cover_every_count_once():
    edges = (5, 6, 20)
    names = [name for name, _, _ in ranking_metrics.bins("history", edges)]
    assert names == ["history<=5", "history 6", "history 7-20", "history>20"]
    for count in range(50):
        assert (
            sum(low <= count <= high for _, low, high in ranking_metrics.bins("history", edges))
            == 1
        )
    assert ranking_metrics.bins("history", ()) == []
    assert ranking_metrics.bins("history", (20, 5, 6, 5)) == ranking_metrics.bins("history", edges)


def test_an_unknown_metric_lists_the_names():
    assert ranking_metrics.check_metric("ndcg@10", (10, 20)) == "ndcg@10"
    with pytest.raises(ConfigError, match=r"'ndcg@5'.*recall@10, ndcg@10.*mrr, auc"):
        ranking_metrics.check_metric("ndcg@5", (10, 20))
    with pytest.raises(ConfigError):
        ranking_metrics.check_metric("auc_pooled", (10,))
    assert ranking_metrics.check_metric("auc_pooled", (10,), pooled_auc=True) == "auc_pooled"


def test_without_relevant_against_counting():
    rng = np.random.default_rng(3)
    rows = np.sort(rng.integers(0, 5, 40))
    scores = rng.integers(0, 4, 40).astype(np.float32)
    same = rows[:, None] == rows[None, :]
    greater = (same & (scores[None, :] > scores[:, None])).sum(axis=1)
    tied = (same & (scores[None, :] == scores[:, None])).sum(axis=1) - 1
    # All candidates are relevant, plus 7 greater and 2 tied ones that are not.
    counts = ranking_metrics.without_relevant(rows, scores, greater + 7, tied + 2)
    assert set(counts[0].tolist()) == {7}
    assert set(counts[1].tolist()) == {2}
