"""The small table and the verdict in words."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
from evaluated import random_runs

from slgr_jax.reports import tables, verdict


def test_the_verdict_has_the_numbers_of_the_paired_test(tmp_path):
    runs = random_runs(tmp_path, ("base", "better"))
    (line, caution) = verdict.lines(runs, "ndcg@10")
    row = next(
        row
        for row in tables.paired_rows(runs, "test", "ndcg@10")
        if (row["run"], row["slice"]) == ("better", "overall")
    )
    assert line.startswith(
        f"better is better than base overall: {row['this']:.4f} to {row['first']:.4f} "
        f"({100 * row['difference'] / row['first']:+.1f} %, "
    )
    assert f"p {row['p_holm']:.2g})" in line
    assert "differs for cold users +" in line
    assert "slgr compare" in caution

    worse = verdict.lines([runs[1], runs[0]], "ndcg@10")[0]
    assert worse.startswith("base is worse than better overall")


def test_what_cannot_be_told_apart_is_said_and_not_tested(tmp_path):
    runs = random_runs(tmp_path, ("base", "other"))
    users = runs[0].parts["test"].users["all"]
    values = dict(users.values)
    # All but five users are as in the base.
    values["ndcg@10"] = users.values["ndcg@10"].copy()
    values["ndcg@10"][:5] += 0.5
    part = dataclasses.replace(
        runs[0].parts["test"],
        users={**runs[0].parts["test"].users, "all": dataclasses.replace(users, values=values)},
    )
    other = dataclasses.replace(runs[1], parts={"test": part})
    line = verdict.lines([runs[0], other], "ndcg@10")[0]
    assert line.startswith("other is not told apart from base overall")
    assert "not tested" in line
    assert "fewer than 6 users differ in overall, cold users" in line
    rows = tables.paired_rows([runs[0], other], "test", "ndcg@10")
    assert all(row["p"] is None and row["p_holm"] is None for row in rows)


def test_the_best_baseline_is_named(tmp_path):
    runs = random_runs(tmp_path, ("base", "better", "simple"))
    facts = {"name": "simple", "settings": {}, "tuned_on": "valid", "tried": []}
    simple = dataclasses.replace(runs[2], baseline=facts)
    value = simple.parts["test"].slices["overall"]["ndcg@10"]
    above = verdict.lines([runs[0], simple], "ndcg@10")
    assert above == [
        f"The baseline simple ({value:.4f}), which learns nothing from an LLM, is above every run."
    ]
    runs[0] = dataclasses.replace(runs[0], baseline=facts)
    below = verdict.lines([runs[1], runs[0]], "ndcg@10")
    assert below[0].startswith("better (")
    assert "is above the best baseline, base (" in below[0]


def test_runs_of_different_splits_have_no_verdict(tmp_path):
    runs = random_runs(tmp_path, ("base", "other"))
    manifest = dataclasses.replace(runs[1].dataset.manifest, split_hash="0" * 64)
    other = dataclasses.replace(
        runs[1], dataset=dataclasses.replace(runs[1].dataset, manifest=manifest)
    )
    assert verdict.lines([runs[0], other], "ndcg@10")[0].startswith("No verdict")


def test_the_small_table_in_three_formats(tmp_path):
    runs = random_runs(tmp_path, ("base_1", "b"))
    markdown, comma, latex = verdict.write(runs, "ndcg@10", tmp_path / "out")
    overall = runs[0].parts["test"].slices["overall"]
    with open(comma, encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert float(first["overall"]) == overall["ndcg@10"]  # in full
    assert float(first["coverage@10"]) == overall["coverage@10"]
    assert set(first) == {
        *("run", "overall", "cold users", "warm users", "tail items"),
        *("coverage@10", "mean popularity@10"),
    }
    text = latex.read_text()
    assert rf"base\_1 & {overall['ndcg@10']:.4f} & " in text
    assert text.startswith("\\begin{tabular}{lrrrrrr}\n\\toprule\nrun & overall & ")
    assert verdict.lines(runs, "ndcg@10")[0] in markdown.read_text()


@pytest.mark.parametrize("text", ["50 % of A&B", "a_b", "x\\y", "{#$}"])
def test_latex_is_escaped(text):
    line = tables.latex_table([{"run": text, "n": np.float64(0.5)}]).splitlines()[4]
    escaped = line.split(" & ")[0]
    plain = escaped.replace(r"\textbackslash{}", "\0")
    for character in "&%$#_{}":
        assert plain.count(character) == plain.count(f"\\{character}")
    assert plain.replace("\\", "").replace("\0", "\\") == text
