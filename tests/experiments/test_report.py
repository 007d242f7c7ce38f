"""The report, its pictures, and the tables beside published ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from comparisons import PRIMARY, SEEDS, USERS, pick

from slgr_jax import config
from slgr_jax.experiments import plots, presets, render, summary


def test_the_report_shows_the_numbers_and_draws_them(written, tmp_path, monkeypatch):
    runs, _ = written
    rows = summary.rows_of(runs, (10,), PRIMARY, "paper")
    tried = [{"lr": 0.1, "lambda": 0.3, "valid": 0.5, "epoch": 1},
             {"lr": 0.1, "lambda": 1.0, "valid": None, "epoch": None}]  # fmt: skip
    bins = [{"low": 0.1, "high": 0.5, "alpha": 0.3, "right": 0.4, "n": 7}]
    report = {
        "protocol": {
            "data": "books", "teacher": "llm", "arms": ["none", "global", "paper", "constant"],
            "backbones": ["mf", "dcnv2"], "matched_to": "paper", "primary": PRIMARY, "seeds": SEEDS,
            "search": dataclasses.asdict(config.CompareConfig()),
            "budget": {"mf": {"none": 6}}, "thresholds": {"cold users": 9}, "tests": 30,
        },
        "rows": rows,
        "verdict": summary.verdict(rows, "paper"),
        "tuned": {"mf": {
            "none": {"tried": [], "chosen": {"lr": 0.1}, "settings_of": "paper"},
            "paper": {"tried": tried, "chosen": {"lr": 0.1, "lambda": 0.3},
                      "ranges": {"lambda": "0.3..1:log"}, "widened": ["lambda 0.3..1 to 0.2..1"],
                      "ends": ["lambda 0.3 is at the end of its range 0.2..1"]},
            "auto": {"tried": [], "chosen": {},
                     "by_seed": [{"variant": "none"}, {"variant": "paper"}]}}},
        "cost": [
            {"backbone": "mf", "arm": "none", "epochs": 5.0, "best_at_the_end": 2},
            {"backbone": "mf", "arm": "paper", "epochs": 7.5, "best_at_the_end": 0},
        ],
        "gate": [{"backbone": "mf", "arm": "paper", "auc": 0.5, "calibration_error": None,
                  "slices": {"overall": {"alpha": 0.3, "right": None, "n": 7}},
                  "reliability": bins}],
        "alpha_by_epoch": [{"backbone": "mf", "arm": "paper", "epochs": [1, 2], "alpha": [1, 0.1]}],
        "baselines": [{"baseline": "popular", "slice": "overall", "ndcg@10": 0.1}],
    }  # fmt: skip
    monkeypatch.setattr(plots, "FEWEST", 1)
    names = plots.draw(report, tmp_path)
    assert names == [
        "bars.png",
        "gain_by_history.png",
        "alpha_by_slice.png",
        "reliability.png",
        "alpha_by_epoch.png",
    ]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in names)
    text = render.render(report, names)
    row = pick(rows, "mf", "paper", "overall", "ndcg@10")
    line = next(line for line in text.splitlines() if line.startswith("| overall    | paper"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    vs = row["vs_none"]
    assert cells[2:6] == [
        str(USERS), f"{row['mean']:.4f}", f"{row['high'] - row['mean']:.4f}",
        f"{vs['difference']:.4f}",
    ]  # fmt: skip
    assert float(cells[7]) == pytest.approx(vs["p_seeds_holm"], rel=1e-3)
    assert "lr 0.1, lambda 0.3" in text
    assert "- mf paper: lambda 0.3 is at the end of its range" in text
    assert "- mf paper: lambda 0.3..1:log" in text
    assert "- mf paper: lambda 0.3..1 to 0.2..1" in text
    assert f"- mf none: 2 of {SEEDS} seeds" in text
    assert "- mf paper: 0 of" not in text
    assert "- auto of mf is by validation: seed 0 none, seed 1 paper" in text
    assert "20 trials of tpe, sampler seed 0" in text
    # Nothing to say of gates: no table and no picture of them.
    report |= {"gate": [], "alpha_by_epoch": [], "baselines": []}
    assert "## Gates" not in render.render(report, [])
    assert plots.draw(report, tmp_path) == ["bars.png", "gain_by_history.png"]
    monkeypatch.setattr(plots, "FEWEST", USERS + 1)  # bins of fewer users are not drawn
    assert plots.draw(report, tmp_path) == ["bars.png"]


def test_the_printed_tables_have_the_differences_that_were_computed_from_them():
    def gains(over):
        return np.array([np.subtract(row["S-LLMR"], row[over]) for row in presets.TABLE2.values()])

    none, other = gains("None"), gains("LLM-CF")
    assert none.size == 18
    assert (none.mean(), none.min(), none.max()) == pytest.approx(
        (0.0169, 0.0040, 0.0339), abs=5e-5
    )
    assert (other.mean(), np.median(other)) == pytest.approx((0.0072, 0.0056), abs=5e-5)
    assert (other.min(), other.max()) == pytest.approx((0.0007, 0.0258), abs=5e-5)
    ours, base = presets.TABLE3["paper"], presets.TABLE3["none"]
    cold, tail = (np.subtract(ours[n], base[n]) for n in ("cold_users", "tail_items"))
    assert cold == pytest.approx([0.0030, 0.0057, 0.0049], abs=1e-9)
    assert tail == pytest.approx([0.0200, 0.0014, 0.0100], abs=1e-9)
    # The two tables agree on DCNv2.
    assert presets.TABLE3["none"]["overall"] == presets.TABLE2["dcnv2"]["None"]
    assert presets.TABLE3["paper"]["overall"] == presets.TABLE2["dcnv2"]["S-LLMR"]


def test_presets_put_ours_beside_the_printed(written):
    runs, values = written
    rows = summary.rows_of(runs, (10,), PRIMARY)
    protocol = {"backbones": ["dcnv2"], "arms": ["none", "global", "paper"]}
    reports = {"Beauty": {"protocol": protocol, "rows": rows}}
    ours = np.mean([of_seed["overall"].mean() for of_seed in values["dcnv2", "paper"]])
    for name in presets.PRESETS:
        text = presets.table(name, reports)
        assert f"{ours:.4f}" in text
        assert "0.8177" in text  # S-LLMR on DCNv2, Beauty
        assert "Not run: Sports, Toys" in text
        assert "0.8150" not in text
        assert "cell for cell" in text
    line = next(line for line in presets.table("table3", reports).splitlines() if "point" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:6] == ["pointwise", "0.7999", "-", "-"]  # printed, and not run here
    text = presets.table("table3", {"books": reports["Beauty"]})
    assert "Not in the paper: books" in text
    assert "0.8177" not in text
