"""Means, intervals and paired tests against SciPy; cost, gates, the verdict."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparisons import KINDS, PRIMARY, SEEDS, pick, write_run
from scipy import stats as scipy_stats

from slgr_jax.evaluation import results as evaluation_results
from slgr_jax.experiments import results, summary


def holm_by_hand(ps):
    """Holm 1979: the k-th smallest of m times m - k + 1, never below the one before, at most 1."""
    order, out, worst = np.argsort(ps), {}, 0.0
    for place, at in enumerate(order):
        worst = max(worst, min(1.0, ps[at] * (len(ps) - place)))
        out[int(at)] = worst
    return [out[i] for i in range(len(ps))]


def test_means_intervals_and_tests_equal_scipy(written):
    runs, values = written
    rows = summary.rows_of(runs, (10,), PRIMARY)
    expected = []
    for backbone, metric in PRIMARY.items():
        for name in KINDS:
            seeds = {
                arm: np.array([of_seed[name].mean() for of_seed in values[backbone, arm]])
                for arm in ("none", "global", "paper")
            }
            users = {
                arm: np.mean([of_seed[name] for of_seed in values[backbone, arm]], axis=0)
                for arm in seeds
            }
            for arm, others in (("none", ()), ("global", ("none",)), ("paper", ("none", "global"))):
                row, x = pick(rows, backbone, arm, name, metric), seeds[arm]
                spread = scipy_stats.t.interval(0.95, SEEDS - 1, x.mean(), scipy_stats.sem(x))
                assert (row["low"], row["high"]) == pytest.approx(spread)
                assert (row["mean"], row["sd"]) == pytest.approx((x.mean(), x.std(ddof=1)))
                assert (row["seeds"], row["users"]) == (SEEDS, users[arm].size)
                assert row["primary"]
                assert {k for k in row if k.startswith("vs_")} == {f"vs_{o}" for o in others}
                for other in others:
                    test, y = row[f"vs_{other}"], seeds[other]
                    spread = scipy_stats.ttest_rel(x, y).confidence_interval(0.95)
                    assert (test["low"], test["high"]) == pytest.approx((spread.low, spread.high))
                    assert test["difference"] == pytest.approx(x.mean() - y.mean())
                    assert test["relative"] == pytest.approx(x.mean() / y.mean() - 1)
                    by_users = scipy_stats.ttest_rel(users[arm], users[other]).pvalue
                    expected.append((test, scipy_stats.ttest_rel(x, y).pvalue, by_users))
    assert len(expected) == 2 * 5 * 3
    tests, by_seeds, by_users = zip(*expected, strict=True)
    for key, raw in (("p_seeds", by_seeds), ("p_users", by_users)):
        assert [test[key] for test in tests] == pytest.approx(raw)
        # One family: both backbones' primary metrics.
        assert [test[f"{key}_holm"] for test in tests] == pytest.approx(holm_by_hand(raw))
    # Bins have means and intervals but no tests; an empty one is left out.
    bin_row = pick(rows, "mf", "paper", "history<=5", "ndcg@10")
    assert set(bin_row["vs_none"]) == {"difference", "low", "high", "relative"}
    assert not any(row["slice"] == "popularity>9" for row in rows)
    json.dumps(rows, allow_nan=False)


def test_the_focus_is_tested_against_controls_too(written):
    runs, _ = written
    rows = summary.rows_of(runs, (10,), PRIMARY, "paper", ["global"])
    controlled = runs | {(b, "shuffled"): dirs for (b, arm), dirs in runs.items() if arm == "none"}
    with_shuffled = summary.rows_of(controlled, (10,), PRIMARY, "paper", ["shuffled"])
    row = pick(with_shuffled, "mf", "paper", "overall", "ndcg@10")
    same = {k: v for k, v in row["vs_none"].items() if not k.endswith("_holm")}
    assert {k: v for k, v in row["vs_shuffled"].items() if not k.endswith("_holm")} == same
    assert "vs_shuffled" not in pick(with_shuffled, "mf", "global", "overall", "ndcg@10")
    assert pick(rows, "mf", "paper", "overall", "ndcg@10")["vs_global"]["p_users"] is not None


def test_what_is_undefined_is_null(tmp_path):
    runs = {
        ("mf", arm): [tmp_path / f"{arm}{seed}" for seed in range(2)] for arm in ("none", "paper")
    }
    for (_, arm), dirs in runs.items():
        for seed, root in enumerate(dirs):
            write_run(root, seed, 0.1, undefined=arm == "paper" and seed == 1)
    rows = summary.rows_of(runs, (10,), {"mf": "ndcg@10"})
    row = pick(rows, "mf", "paper", "tail_items", "ndcg@10")
    assert (row["mean"], row["low"], row["sd"], row["vs_none"]) == (None, None, None, None)
    assert summary.gates(runs) == []
    assert summary.alphas(runs) == []
    cost = summary.costs(runs)[1]
    assert {key: value for key, value in cost.items() if key not in ("backbone", "arm")} == (
        dict.fromkeys(("seconds", "cpu_seconds", "epochs", "triples_per_s", "speed_vs_none"))
        | {"best_at_the_end": 0}
    )
    one_seed = {key: dirs[:1] for key, dirs in runs.items()}
    row = pick(summary.rows_of(one_seed, (10,), {"mf": "ndcg@10"}), "mf", "paper", "overall",
               "ndcg@10")  # fmt: skip
    assert (row["low"], row["sd"], row["vs_none"]["p_seeds"]) == (None, None, None)


def test_cost_and_gates_are_means_over_seeds(tmp_path):
    runs = {("mf", arm): [tmp_path / f"{arm}{s}" for s in range(2)] for arm in ("none", "paper")}
    for (_, arm), dirs in runs.items():
        for seed, root in enumerate(dirs):
            write_run(root, seed, 0.0)
            guided = arm == "paper"
            outcome = {"seconds": 4.0 + 2 * seed + guided, "epoch": 5, "best_epoch": 4 + seed}
            outcome |= {"best_epoch": 3} if guided else {}
            results.write_json(root / results.OUTCOME, outcome)
            rates = [100, 900 + seed, 400] if guided else [100, 1802, 1700]
            more = {"train/alpha": 0.5} if guided else {}
            log = [{"epoch": e, "triples_per_s": r, **more} for e, r in enumerate(rates, 1)]
            (root / results.LOG).write_text("".join(json.dumps(row) + "\n" for row in log))
            if not guided:
                continue
            bins = [(0.0, 0.3, 0.2, 0.25 + seed / 4, 10 + seed), (0.3, 0.9, 0.8, 0.75, 11)]
            names = ("low", "high", "alpha", "right", "n")
            gate = {
                "auc": 0.6 + 0.2 * seed,
                "calibration_error": None,
                "slices": {
                    "overall": {"alpha": 0.25 * (1 + seed), "right": None, "n": 40 - 30 * seed}
                },
                "reliability": [dict(zip(names, bin_, strict=True)) for bin_ in bins],
            }
            metrics = results.read_json(root / results.METRICS)
            results.write_json(root / results.METRICS, metrics | {"gate": gate})
    none, paper = summary.costs(runs)
    assert (none["seconds"], none["speed_vs_none"]) == (5.0, 1.0)
    assert (paper["seconds"], paper["triples_per_s"]) == (6.0, 901.0)
    assert paper["speed_vs_none"] == pytest.approx(901 / 1802)
    assert (none["best_at_the_end"], paper["best_at_the_end"]) == (1, 0)
    (gate,) = summary.gates(runs)
    assert (gate["auc"], gate["calibration_error"]) == (pytest.approx(0.7), None)
    alpha = pytest.approx((40 * 0.25 + 10 * 0.5) / 50)
    assert gate["slices"] == {"overall": {"alpha": alpha, "right": None, "n": 50}}
    assert [(b["n"], b["alpha"], b["right"]) for b in gate["reliability"]] == [
        (21, pytest.approx(0.2), pytest.approx((10 * 0.25 + 11 * 0.5) / 21)),
        (22, pytest.approx(0.8), 0.75),
    ]  # fmt: skip
    alphas = summary.alphas(runs)
    assert [(row["arm"], row["epochs"]) for row in alphas] == [("paper", [1, 2, 3])]


def judged(backbone, name, **against):
    """A row of the focus with made-up comparisons: other -> difference, high, p seeds, p users."""
    row = {"backbone": backbone, "arm": "paper", "slice": name, "metric": "m", "primary": True}
    keys = ("difference", "high", "p_seeds_holm", "p_users_holm")
    return row | {f"vs_{k}": v and dict(zip(keys, v, strict=True)) for k, v in against.items()}


def test_the_verdict_counts_cells():
    rows = [
        judged("mf", "overall", none=(0.1, 0.2, 0.01, 0.2), **{"global": (0.0, 0.1, 1.0, 1.0)}),
        judged(
            "mf", "cold_users", none=(0.1, 0.2, 0.01, 0.01), **{"global": (0.1, 0.2, 0.9, 0.04)}
        ),
        judged("mf", "tail_items", none=(-0.1, 0.01, 0.2, 0.03), **{"global": None}),
        judged("mf", "warm_users", none=(-0.5, -0.4, 0.01, 0.01), **{"global": (-1, -1, 0.0, 0.0)}),
        judged("din", "overall", none=(-0.2, -0.1, 0.04, None), **{"global": (0.1, 0.2, 0.1, 0.1)}),
    ]
    verdict = summary.verdict(rows, "paper")
    none, other = verdict["against"]["none"], verdict["against"]["global"]
    assert (none["cells"], other["cells"]) == (4, 3)
    assert none["at_least"] == ["mf overall", "mf cold_users", "mf tail_items"]
    assert none["better_over_seeds"] == ["mf overall", "mf cold_users"]
    assert none["better_over_both"] == ["mf cold_users"]
    assert (none["worse_over_seeds"], none["worse_over_users"]) == (
        ["din overall"],
        ["mf tail_items"],
    )
    assert other["better_over_users"] == ["mf cold_users"]
    assert (verdict["backbones"], verdict["holds_overall"]) == (2, ["mf"])
    assert verdict["wins_cold_or_tail"] == ["mf"]
    assert summary.verdict(rows, "none") is None


def test_names_of_files_and_slices_are_those_of_an_evaluation():
    for name in ("METRICS", "PER_USER", "ROWS_PER_USER", "MAIN_SLICES"):
        assert getattr(results, name) == getattr(evaluation_results, name)
