"""Tables and the picture; the command itself."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import worlds
from evaluated import random_runs

from slgr_jax.config import EvaluationConfig, SamplerConfig, TrainConfig
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import results
from slgr_jax.reports import plots
from slgr_jax.reports import tables as tables_lib
from slgr_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch" / "evaluate.py"


def test_tables():
    rows = [
        {"run": "a|b", "n": 12, "ndcg": 0.123456},
        {"run": "c", "n": None, "ndcg": 1234567.0, "more": float("nan")},
    ]
    assert tables_lib.markdown_table(rows) == (
        "| run  |  n |      ndcg | more |\n"
        "|------|---:|----------:|-----:|\n"
        "| a\\|b | 12 |    0.1235 |    - |\n"
        "| c    |  - | 1.235e+06 |    - |\n"
    )
    assert tables_lib.text_table(rows, ["n", "run"]) == " n  run\n-------\n12  a|b\n -  c\n"
    assert tables_lib.markdown_table([], ["x", "y"]).splitlines()[0] == "| x | y |"


def test_render_states_values_tests_and_definitions(tmp_path):
    runs = random_runs(tmp_path, ("base", "better"))
    text = tables_lib.render(runs, "ndcg@10")
    slices = runs[1].parts["test"].slices
    line = next(
        line
        for line in text.split("test: full ranking")[1].splitlines()
        if line.startswith("cold_users") and " better " in line
    )
    assert line.split()[2] == str(slices["cold_users"]["n"])
    assert f"{slices['cold_users']['ndcg@10']:.4f}" in line
    table = text.split("\n\n")[0].splitlines()[1:]
    assert len({len(row) for row in table}) == 1  # every row ends where the last column does
    assert "test: ndcg@10 user by user, each run minus base" in text
    facts = results.thresholds(runs[0])
    assert f"at most {facts['cold_user_history']} training items" in text
    assert "test: masks each user's train and valid items" in text
    assert "1 / log2(rank + 1)" in text
    assert "log2" not in tables_lib.render(runs, "ndcg@10", definitions=False)
    assert text.index("test: full ranking") < text.index("valid: full ranking")
    assert "user by user" not in tables_lib.render(runs[:1], "ndcg@10")


def test_paired_rows_see_the_better_run_and_only_shared_users(tmp_path):
    runs = random_runs(tmp_path, ("base", "same", "best"))
    runs[1] = dataclasses.replace(runs[0], label="same")
    rows = tables_lib.paired_rows(runs, "test", "ndcg@10")
    by_key = {(row["run"], row["slice"]): row for row in rows}
    same, best = by_key["same", "overall"], by_key["best", "overall"]
    assert same["difference"] == 0.0
    assert same["p"] is same["p_flip"] is same["p_holm"] is None  # nobody differs
    gap = [runs[i].parts["test"].slices["overall"]["ndcg@10"] for i in (2, 0)]
    assert best["difference"] == pytest.approx(gap[0] - gap[1])
    assert best["p"] < best["p_holm"] < 0.01
    assert best["95% low"] > 0
    cold = by_key["best", "cold_users"]
    assert cold["n"] == runs[0].parts["test"].slices["cold_users"]["n"]
    assert cold["this"] == pytest.approx(runs[2].parts["test"].slices["cold_users"]["ndcg@10"])
    tail = by_key["best", "tail_items"]
    assert tail["this"] == pytest.approx(runs[2].parts["test"].slices["tail_items"]["ndcg@10"])
    with pytest.raises(ConfigError, match=r"no value per user.*mrr, auc"):
        tables_lib.paired_rows(runs, "test", "coverage@10")


def test_runs_of_different_splits_are_not_tested(tmp_path):
    runs = random_runs(tmp_path, ("base", "other"))
    manifest = dataclasses.replace(runs[1].dataset.manifest, split_hash="0" * 64)
    runs[1] = dataclasses.replace(
        runs[1], dataset=dataclasses.replace(runs[1].dataset, manifest=manifest)
    )
    text = tables_lib.render(runs, "ndcg@10")
    assert "no paired tests" in text
    assert "user by user" not in text


def test_items_ranked_apart_have_rows_tests_and_users_of_their_own(tmp_path):
    """The difference of two runs is that of their means; the file has the same users."""
    runs = random_runs(tmp_path, ("base", "better"), rank_apart=True)
    named = {row["slice"]: row for row in tables_lib.paired_rows(runs, "test", "recall@5")}
    shown = {row["slice"] for row in tables_lib.metric_rows(runs, "test", bins=False)}
    users = results.user_table(runs[1]).to_pylist()
    for name, kind in (("tail_items_apart", "tail_apart"), ("head_items_apart", "head_apart")):
        base, better = (run.parts["test"].slices[name] for run in runs)
        assert named[name]["difference"] == pytest.approx(better["recall@5"] - base["recall@5"])
        assert named[name]["n"] == better["n"] > 0
        rows = [row for row in users if row["part"] == "test" and row["items"] == kind]
        assert np.mean([row["recall@5"] for row in rows]) == pytest.approx(better["recall@5"])
        assert name in shown
    assert "the slice's items are the only candidates" in tables_lib.render(runs, "ndcg@10")


def test_baselines_are_tested_apart_and_say_what_was_chosen(tmp_path):
    runs = random_runs(tmp_path, ("base", "better", "simple"))
    facts = {"name": "simple", "settings": {"lambda": 50}, "tuned_on": "valid ndcg@10"}
    simple = dataclasses.replace(runs[2], baseline=facts | {"tried": [{"lambda": 50}, {}]})
    alone = tables_lib.render(runs[:2], "ndcg@10").split("\n\n")
    beside = tables_lib.render([*runs[:2], simple], "ndcg@10").split("\n\n")
    for part in ("valid", "test"):
        begin = f"{part}: ndcg@10 user by user, each run minus base"
        tables = [next(b for b in text if b.startswith(begin)) for text in (alone, beside)]
        assert tables[0] == tables[1]  # p_holm too
        begin = f"{part}: ndcg@10 user by user, each baseline minus base"
        table = next(block for block in beside if block.startswith(begin)).splitlines()
        assert sum("simple" in line for line in table) == len(results.MAIN_SLICES)
        assert not any("better" in line for line in table)
        main = next(block for block in beside if block.startswith(f"{part}: full ranking"))
        assert sum("simple" in line for line in main.splitlines()) >= len(results.MAIN_SLICES)
    assert "baseline simple: lambda 50, the best of 2 by valid ndcg@10\n" in "\n".join(beside)
    assert results.metrics_json(simple)["baseline"]["settings"] == {"lambda": 50}
    assert "baseline" not in results.metrics_json(runs[0])


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_shows_every_run(tmp_path, count):
    runs = random_runs(tmp_path, ("base", "better", "best")[:count])
    if count == 3:
        facts = {"name": "best", "settings": {}, "tuned_on": "valid", "tried": []}
        runs[2] = dataclasses.replace(runs[2], baseline=facts)
    path = plots.draw(runs, "ndcg@10", tmp_path / "out" / "metrics.png")
    assert os.listdir(tmp_path / "out") == ["metrics.png"]
    pixels = matplotlib.image.imread(path)[:, :, :3]
    assert pixels.shape[1] > 1000
    for color, drawn in ((plots.RUN, True), (plots.FIRST, count > 1), (plots.BASELINE, count > 1)):
        wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        pixels_of_it = np.sum(np.all(np.abs(pixels - wanted) < 0.01, axis=2))
        assert (pixels_of_it > 2000) == drawn, color


def test_slices_in_which_nothing_is_seen_are_not_drawn(tmp_path):
    (run,) = random_runs(tmp_path, ("a",))
    assert plots.panels([run], "test", "ndcg@10") == list(plots.SLICES)
    slices = dict(run.parts["test"].slices)
    slices["tail_items"] = {**slices["tail_items"], "ndcg@10": 0.0}
    slices["cold_users"] = {**slices["cold_users"], "ndcg@10": None}
    part = dataclasses.replace(run.parts["test"], slices=slices)
    run = dataclasses.replace(run, parts={"test": part})
    assert plots.panels([run], "test", "ndcg@10") == ["overall", "warm_users"]
    slices |= {name: {**values, "ndcg@10": 0.0} for name, values in slices.items()}
    nothing = dataclasses.replace(run, parts={"test": dataclasses.replace(part, slices=slices)})
    with pytest.raises(ConfigError, match="ndcg@10 has no value but 0 on the test part"):
        plots.draw([nothing], "ndcg@10", tmp_path / "none.png")


def test_labels_tell_runs_apart():
    assert tables_lib.labels(["runs/a", "runs/b/"]) == ["a", "b"]
    assert tables_lib.labels(["x/seed0/run", "x/seed1/run"]) == ["seed0/run", "seed1/run"]
    assert tables_lib.labels([]) == []
    with pytest.raises(ConfigError, match="twice"):
        tables_lib.labels(["runs/a", "runs/../runs/a"])


def test_the_default_metric_is_one_the_run_has():
    assert tables_lib.choose_metric("", EvaluationConfig(ks=(5, 10))) == "ndcg@10"
    assert tables_lib.choose_metric("", EvaluationConfig(ks=(5, 20))) == "ndcg@5"
    assert tables_lib.choose_metric("mrr", EvaluationConfig(ks=(5,))) == "mrr"
    with pytest.raises(ConfigError, match=r"recall@5, ndcg@5"):
        tables_lib.choose_metric("ndcg@10", EvaluationConfig(ks=(5,)))


def _launch(*flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(LAUNCH), *flags], capture_output=True, text=True, env=env, timeout=250
    )


def test_help_is_quick_and_needs_no_jax():
    begin = time.monotonic()
    shown = _launch("--help")
    assert time.monotonic() - begin < 3.0  # 0.2 s on an idle machine
    assert shown.returncode == 0
    assert all(flag in shown.stdout for flag in ("--workdir", "--metric", "--out", "--checkpoint"))
    blocked = "import sys; sys.modules['jax'] = None; sys.argv = ['x', '--help']\nimport runpy\n"
    code = blocked + f"runpy.run_path({str(LAUNCH)!r}, run_name='__main__')"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "missing --workdir"),
        (("--data=/nowhere",), "missing --workdir, or --data and --out"),
        (("--data=/nowhere", "--workdir=/nowhere"), "/nowhere is not a run"),
        (("--workdir=/nowhere", "--baselines=ease,knn"), "--baselines=ease,knn: choose from"),
        (("--workdir=/nowhere", "--checkpoint=first"), "is not one of: best, last"),
        (("--workdir=/nowhere",), "/nowhere is not a run"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    refused = _launch(*flags)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_evaluates_trainedrandom_runs(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "data")
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for seed, workdir in enumerate(runs):
        settings = TrainConfig(epochs=2, seed=seed, early_stop_metric="ndcg@5")
        sampler = SamplerConfig(batch_size=64)
        config = worlds.run_config(
            dataset, workdir, train=settings, sampler=sampler, evaluation=EvaluationConfig(ks=(5,))
        )
        loop.train(config)
    finished = _launch(*[f"--workdir={workdir}" for workdir in runs], f"--out={tmp_path}/compared")
    assert finished.returncode == 0, finished.stderr
    assert "test: ndcg@5 user by user, each run minus one" in finished.stdout
    assert (tmp_path / "compared" / "metrics.png").stat().st_size > 10_000
    for workdir in runs:
        metrics = json.loads(pathlib.Path(workdir, "metrics.json").read_text())
        assert metrics["test"]["overall"]["n"] == np.unique(dataset.test.users).size
        assert pathlib.Path(workdir, "per_user.parquet").is_file()
        lines = pathlib.Path(workdir, "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        best = max(row["valid/ndcg@5"] for row in log if "valid/ndcg@5" in row)
        assert metrics["valid"]["overall"]["ndcg@5"] == pytest.approx(best, abs=1e-6)
