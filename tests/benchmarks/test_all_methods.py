"""benchmarks/quality/all_methods.py: what fits, the tests beside SciPy, the table."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import worlds
from comparisons import write_run
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

import all_methods  # noqa: E402
import results_page  # noqa: E402

from slgr_jax.errors import ConfigError  # noqa: E402
from slgr_jax.experiments import arms  # noqa: E402

# Arm -> what its users gain; `ease` is the best of what does without the LLM.
GAINS = {"none": 0.0, "ease": 0.05, "init-shuffled": 0.01,
         "global": 0.06, "calibrated": 0.2, "rrd": 0.04, "rrd_selective": 0.03}  # fmt: skip


@pytest.fixture
def found(tmp_path, monkeypatch) -> tuple[dict[str, Any], dict[str, list[dict[str, np.ndarray]]]]:
    """What is told of arms with made-up users, and these users' values, seed by seed."""
    monkeypatch.setattr(all_methods, "SHOWN", dict.fromkeys(all_methods.SHOWN, "ndcg@10"))
    runs = {arm: [tmp_path / f"{arm}_seed{seed}" for seed in range(2)] for arm in GAINS}
    values = {
        arm: [write_run(root, seed, GAINS[arm]) for seed, root in enumerate(runs[arm])]
        for arm in GAINS
    }
    tried = {arm: {"trial": 0, "tried": [{"valid": gain}]} for arm, gain in GAINS.items()}
    return all_methods.tested({"tuned": {"mf": tried}}, runs, ["init-shuffled"]), values


def test_every_arm_is_tested_against_the_best_control(found) -> None:
    told, values = found
    controls = [arm for arm, of in told.items() if of["control"]]
    assert controls == ["none", "ease", "init-shuffled"]
    for name in all_methods.SHOWN:
        users = {arm: np.mean([seed[name] for seed in of], axis=0) for arm, of in values.items()}
        for arm in ("global", "calibrated", "rrd", "rrd_selective"):
            test = told[arm]["over_controls"][name]
            assert test["difference"] == pytest.approx(
                users[arm].mean() - max(users[control].mean() for control in controls)
            )
            below = any(users[arm].mean() <= users[control].mean() for control in controls)
            p = [stats.ttest_rel(users[arm], users[control]).pvalue for control in controls]
            assert test["p_users"] == pytest.approx(1.0 if below else max(p))
            assert told[arm]["means"][name] == pytest.approx(users[arm].mean())
    assert told["rrd"]["valid"] == GAINS["rrd"]


def test_selection_is_told_apart_from_the_method(found) -> None:
    told, values = found
    assert {arm for arm, of in told.items() if "selection" in of} == {"calibrated", "rrd_selective"}
    raw = []
    for arm, everywhere in (("calibrated", "global"), ("rrd_selective", "rrd")):
        mine, other = (
            np.mean([seed["overall"] for seed in values[name]], axis=0)
            for name in (arm, everywhere)
        )
        test = told[arm]["selection"]["overall"]
        assert test["difference"] == pytest.approx(mine.mean() - other.mean())
        raw.append(stats.ttest_rel(mine, other).pvalue)
        assert test["p_users"] == pytest.approx(raw[-1])
    low, high = sorted(raw)
    corrected = {low: min(2 * low, 1.0), high: max(min(2 * low, 1.0), high)}
    for arm, p in zip(("calibrated", "rrd_selective"), raw, strict=True):
        assert told[arm]["selection"]["overall"]["p_users_holm"] == pytest.approx(corrected[p])


def test_the_table_has_every_arm_once_and_controls_last(found) -> None:
    told, _ = found
    facts = {
        "data": "books", "backbone": "mf", "teacher": "llm", "vectors": "", "trials": 2, "seeds": 2,
        "split_hash": "0123456789abcdef", "arms": told,
        "baselines": [{"baseline": "EASE", "slice": "overall", "ndcg@10": 0.25}],
    }  # fmt: skip
    lines = list(results_page.screened(facts))
    rows = [line for line in lines if line.startswith("| `")]
    overall = {arm: of["means"]["overall"] for arm, of in told.items()}
    assert [row.split("`")[1] for row in rows] == [
        *sorted(("calibrated", "global", "rrd", "rrd_selective"), key=lambda arm: -overall[arm]),
        *sorted(("ease", "init-shuffled", "none"), key=lambda arm: -overall[arm]),
    ]
    assert [", a control" in row for row in rows] == [False] * 4 + [True] * 3
    gained = told["calibrated"]["over_controls"]["overall"]["difference"]
    assert f"+{gained:.4f}".replace("+0.", "+.") in rows[0]
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert lines[-1] == "EASE: .2500."


def config(data: pathlib.Path, out: pathlib.Path, **more: str) -> all_methods.AllMethodsConfig:
    return all_methods.AllMethodsConfig(data=str(data), teacher="llm", out=str(out), **more)


def test_what_does_not_fit_is_left_out_with_the_reason(tmp_path) -> None:
    data = worlds.random_dataset(tmp_path / "data", n_users=20, n_items=12, per_user=6)
    users, ranks = np.repeat(np.arange(20), 3), np.tile(np.arange(3.0), 20)
    items = (users + ranks.astype(int)) % 12
    worlds.teach(data, users, items, -ranks, name="llm", unlisted="below")
    fit, unfit = all_methods.fitting(config(data.path, tmp_path, backbone="sasrec"))
    assert {*fit, *unfit} == {*arms.ARMS, arms.AUTO}
    assert not {*fit} & {*arms.VECTOR_ARMS}
    assert unfit["init"] == "no --vectors"
    assert unfit["hard_own"].startswith("--negatives=hard are drawn for one user each")
    assert {"none", "global", "rrd", "rrd_selective", "auto"} <= {*fit}
    chosen, _ = all_methods.fitting(config(data.path, tmp_path, only="rrd,none"))
    assert chosen == ["none", "rrd"]
    with pytest.raises(ConfigError, match="--only: nothing: there is no such arm"):
        all_methods.fitting(config(data.path, tmp_path, only="nothing"))
