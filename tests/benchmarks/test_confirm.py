"""benchmarks/PROTOCOL.md and what carries it out: the same arms, the tests, what a budget cuts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
QUALITY = ROOT / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))

import confirm  # noqa: E402
import idgenrec  # noqa: E402

PROTOCOL = (ROOT / "benchmarks" / "PROTOCOL.md").read_text(encoding="utf-8")


def clone(root: pathlib.Path, users: int = 40) -> pathlib.Path:
    """A tiny IDGenRec."""
    for dataset in idgenrec.DATASETS:
        folder = root / "rec_datasets" / dataset
        folder.mkdir(parents=True)
        lines = [f"U{u} " + " ".join(f"B{(u + k) % 9}" for k in range(5)) for u in range(users)]
        (folder / "user_sequence.txt").write_text("\n".join(lines) + "\n")
        (folder / "item_generative_indexing_phase_0.txt").write_text(
            "".join(f"B{i} soap number {i}\n" for i in range(9))
        )
    return root


def test_the_protocol_names_what_the_command_runs() -> None:
    full, reduced = confirm.SCALES["full"], confirm.SCALES["reduced"]
    named = set(re.findall(r"`([a-z_0-9]+)`", PROTOCOL))
    arms = {*full.arms, *full.controls}
    assert arms <= named
    assert arms == {*confirm.WITHOUT_LLM, *confirm.UNSELECTED, confirm.METHOD}
    assert "the splits are " + ", ".join(f"`{split}`" for split in confirm.SPLITS) in PROTOCOL
    assert list(confirm.SPLITS)[-1] == confirm.MET
    assert f"test parts of `{confirm.MET}`" in PROTOCOL
    assert {*full.backbones, *confirm.SPLITS, confirm.TEACHER, confirm.TEACHER_ANEW} <= named
    assert all(f"**{dataset}**" in PROTOCOL for dataset in ("Beauty", "Sports", "Toys"))
    assert full.seeds == 5
    assert "Five seeds, 0 to 4" in PROTOCOL
    # What the reduced scale cuts is told, and nothing else is cut.
    told = PROTOCOL.split("## Reduced")[1]
    cut = {*full.arms, *full.controls} - {*reduced.arms, *reduced.controls}
    assert cut == set(re.findall(r"`([a-z_]+)`", told)) - {"lightgcn"}
    assert "seeds 2, 3 and 4" in told
    assert reduced.seeds == 2
    assert "a quarter" in told
    assert reduced.users == 0.25
    for name, metric in confirm.QUESTIONS:
        assert f"`adds {name}`" in PROTOCOL
        assert f"`selects {name}`" in PROTOCOL
        assert metric in ("ndcg@10", "rows_auc")


def test_every_data_set_comes_before_another_recommender_or_split() -> None:
    cells = confirm.cells(confirm.SCALES["full"])
    assert len(cells) == len(set(cells)) == 18
    assert [cell.name for cell in cells[:4]] == [
        "Beauty, ratio_1, mf",
        "Sports, ratio_1, mf",
        "Toys, ratio_1, mf",
        "Beauty, ratio_1, lightgcn",
    ]
    assert [cell.name for cell in cells[6:8]] == ["Beauty, ratio_2, mf", "Sports, ratio_2, mf"]


def test_a_cell_that_answers_no_primary_question_comes_last() -> None:
    cells = confirm.cells(confirm.SCALES["full"])
    assert [cell.met for cell in cells] == [False] * 12 + [True] * 6


def test_a_sample_keeps_whole_users_in_their_order(tmp_path: pathlib.Path) -> None:
    source = clone(tmp_path / "clone") / "rec_datasets" / "Beauty"
    idgenrec.sample(source, tmp_path / "kept", 0.25)
    kept = (tmp_path / "kept" / "user_sequence.txt").read_text().splitlines()
    every = (source / "user_sequence.txt").read_text().splitlines()
    drawn = np.random.default_rng(0).choice(40, 10, replace=False)
    assert kept == [every[place] for place in sorted(drawn)]


def test_the_best_control_is_the_one_that_leaves_least() -> None:
    def test_of(difference: float, p: float) -> dict[str, float]:
        return {"difference": difference, "p_users": p, "low_users": 0.0, "high_users": 1.0}

    against = {"none": test_of(0.02, 0.001), "ease": test_of(0.01, 0.0001)}
    best = confirm.over_best(against)
    assert best is not None
    assert (best["best"], best["difference"], best["p_users"]) == ("ease", 0.01, 0.001)
    # Below one of them: nothing is shown, however sure that is.
    below = confirm.over_best({**against, "item_item": test_of(-0.01, 1e-9)})
    assert below is not None
    assert (below["best"], below["p_users"]) == ("item_item", 1.0)
    assert confirm.over_best({}) is None


def test_primary_questions_are_corrected_among_themselves() -> None:
    def result(p: float, met: bool = False) -> dict[str, object]:
        tests = {"adds overall": {"p_users": p}, "adds cold_users": {"p_users": 0.01}, "x": None}
        return {"tests": tests, "met": met}

    results = [result(0.01), result(0.02), result(0.5)]
    confirm.correct(results)
    primary = [one["tests"]["adds overall"]["p_users_holm"] for one in results]  # type: ignore[index]
    assert primary == pytest.approx([0.03, 0.04, 0.5])
    assert results[0]["tests"]["adds cold_users"]["p_users_holm"] == pytest.approx(0.03)  # type: ignore[index]
    # A cell whose test part was met asks no primary question: it is corrected with the others.
    results.append(result(0.001, met=True))
    confirm.correct(results)
    primary = [one["tests"]["adds overall"]["p_users_holm"] for one in results]  # type: ignore[index]
    assert primary == pytest.approx([0.03, 0.04, 0.5, 0.005])


def test_a_cell_says_what_validation_chose() -> None:
    against = {"difference": 0.01, "relative": 0.1, "low_users": 0.0, "high_users": 0.02}
    row = {"arm": "auto", "slice": "overall", "metric": "ndcg@10", "mean": 0.5}
    row |= {"vs_none": {**against, "p_seeds": 0.1, "p_users": 0.02}}
    report = {
        "refit": {"rows": [row], "baselines": []},
        "protocol": {"split_hash": "h", "thresholds": {}, "seeds": 2, "budget": {}},
        "tuned": {"mf": {"auto": {"by_seed": [{"variant": "none"}, {"variant": "paper"}]}}},
    }
    for split, met in (("leave_last", True), ("ratio_1", False)):
        result = confirm.result_of(report, confirm.Cell(split, "Beauty", "mf"))
        assert (result["method"], result["chosen"]) == ("auto", ["none", "paper"])
        assert result["met"] == met
        assert result["tests"]["adds overall"]["best"] == "none"


def test_a_finished_cell_takes_no_time(tmp_path: pathlib.Path) -> None:
    cell = confirm.Cell("leave_last", "Toys", "mf")
    folder = tmp_path / "runs" / "Toys_leave_last_mf"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"method": "calibrated"}))
    config = confirm.ConfirmConfig(out=str(tmp_path), scale="reduced")
    result = confirm.run_cell(cell, config, idgenrec.Budget(1e-9))
    assert result == {"cell": "Toys, leave_last, mf", "method": "calibrated"}
    other = confirm.Cell("ratio_1", "Toys", "mf")
    with pytest.raises(idgenrec.OutOfTimeError):
        confirm.run_cell(
            other,
            dataclasses.replace(config, input=str(clone(tmp_path / "clone"))),
            idgenrec.Budget(1e-9),
        )


def test_cells_beyond_the_budget_are_named(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(QUALITY / "confirm.py"), f"--input={clone(tmp_path / 'clone')}"),
        *(f"--out={out}", "--scale=reduced", "--minutes=0.0001"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    facts = json.loads((out / "confirmation.json").read_text())
    assert facts["results"] == []
    assert facts["cut"] == [cell.name for cell in confirm.cells(confirm.SCALES["reduced"])]
    assert all(f"- {name}" in result.stdout for name in facts["cut"])
    other = subprocess.run(
        [*command[:-2], "--scale=full"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "scale.txt says --scale=reduced; choose another --out" in other.stderr
