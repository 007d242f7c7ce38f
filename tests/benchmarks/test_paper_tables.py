"""The paper's tables from public files: cells, what a budget cuts, ours beside the printed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
QUALITY = ROOT / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))

import idgenrec  # noqa: E402
import paper_tables  # noqa: E402


def clone(root: pathlib.Path) -> pathlib.Path:
    """A tiny IDGenRec."""
    for dataset in idgenrec.DATASETS:
        folder = root / "rec_datasets" / dataset
        folder.mkdir(parents=True)
        (folder / idgenrec.SEQUENCES).write_text("U1 B1 B2 B3 B4 B5\n")
        (folder / idgenrec.KEYWORDS).write_text("B1 soap\n")
    return root


def report(backbone: str, auc: float) -> dict[str, Any]:
    row = {"backbone": backbone, "arm": "none", "slice": "overall", "metric": "rows_auc"}
    return {
        "protocol": {"backbones": [backbone], "arms": ["none"]},
        "rows": [{**row, "mean": auc}],
        "verdict": {},
        "tuned": {backbone: {"none": {"chosen": {"l2": 0.00012345, "loss": "bce"}}}},
    }


def test_every_data_set_comes_before_another_recommender() -> None:
    assert [cell.name for cell in paper_tables.cells("table3")] == [
        "dcnv2 on Beauty",
        "dcnv2 on Sports",
        "dcnv2 on Toys",
    ]
    names = [cell.name for cell in paper_tables.cells("table2")]
    assert len(set(names)) == 18
    assert names[2:4] == ["deepfm on Toys", "xdeepfm on Beauty"]
    assert [paper_tables.reads_vectors(table) for table in ("table2", "table3")] == [True, False]


def test_cells_of_a_data_set_are_joined_beside_the_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paper_tables.render, "short_verdict", lambda report: ["nothing shown"])
    reports = {
        paper_tables.Cell("deepfm", "Toys"): report("deepfm", 0.7),
        paper_tables.Cell("dcn", "Toys"): report("dcn", 0.8),
    }
    config = paper_tables.TablesConfig(table="table2", scale="hours")
    facts = paper_tables.facts_of(config, reports, ["din on Toys"])
    rows = {row["backbone"]: row for row in facts["rows"]}
    assert {name: row["none"] for name, row in rows.items()} == {"deepfm": 0.7, "dcn": 0.8}
    assert rows["deepfm"]["None (printed)"] == 0.7681
    assert rows["dcn"]["S-LLMR (printed)"] == 0.7960
    page = paper_tables.page(facts, "TABLE")
    assert page.startswith("TABLE\n## deepfm on Toys\n\nnothing shown\n")
    assert "- none: l2 0.000123, loss bce" in page
    assert page.endswith("## Cut\n\n- din on Toys\n")


def test_cells_beyond_the_budget_are_named_and_finished_ones_take_none(
    tmp_path: pathlib.Path,
) -> None:
    out = tmp_path / "out"
    finished = out / "table3" / "dcnv2_Sports"
    finished.mkdir(parents=True)
    (finished / "report.json").write_text(json.dumps({"rows": []}))
    (finished / "finished").touch()
    config = paper_tables.TablesConfig(out=str(out), scale="hours")
    cell = paper_tables.Cell("dcnv2", "Sports")
    assert paper_tables.run_cell(cell, config, idgenrec.Budget(1e-9)) == {"rows": []}

    (finished / "finished").unlink()
    command = [
        *(sys.executable, str(QUALITY / "paper_tables.py"), f"--input={clone(tmp_path / 'clone')}"),
        *(f"--out={out}", "--scale=hours", "--minutes=0.0001"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    facts = json.loads((out / "table3.json").read_text())
    assert facts["cut"] == [f"dcnv2 on {dataset}" for dataset in idgenrec.DATASETS]
    assert "- dcnv2 on Toys" in result.stdout
    other = subprocess.run(
        [*command[:-2], "--scale=full"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "table3_scale.txt says --scale=hours; choose another --out" in other.stderr
