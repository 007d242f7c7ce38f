"""benchmarks/compare_guidance.py: what it refuses, what it writes, going on where it was."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds
from comparisons import pick
from scipy import stats as scipy_stats

from slgr_jax import config
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import comparison, planning
from slgr_jax.teacher.products import preferences

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def tuned_dir(report, root, backbone, arm):
    """The trial that was chosen of an arm."""
    return root / arm / f"trial_{report['tuned'][backbone][arm]['trial']:03d}"


def launch(*given):
    command = [sys.executable, str(BENCHMARKS / "compare_guidance.py"), *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_help_needs_no_jax():
    code = "import sys, runpy; sys.modules['jax'] = None; sys.argv = ['x', '--help']\n"
    code += f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
    code += f"runpy.run_path({str(BENCHMARKS / 'compare_guidance.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--guidance=none,global,pointwise,rule,paper,calibrated,auto" in done.stdout
    assert "--early_stop_metric" in done.stdout
    assert "use of the teacher in training" not in done.stdout  # that knob is the arms'


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    worlds.random_dataset(tmp_path / "data")
    where = (f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}")
    for given, message in (
        ((), "missing --data"),
        (where[:1], "missing --out"),
        ((*where, "--guidance=none,paper"), "missing --teacher"),
        ((*where, "--teacher=llm", "--guidance=best"), "best is not one of: none, global"),
        ((*where, "--backbones=svd"), "--backbones: svd is not one of: mf, lightgcn"),
        ((*where, "--preset=table9"), "--preset=table9 is not one of: table2, table3"),
        ((*where, "--search=dim=4", "--guidance=none"), "dim=4 needs two values at least"),
        ((*where, "--search=gate=paper|rule"), "--search: gate is set by the arms"),
        ((*where, "--teacher=llm", "--guidance=paper,auto"), "has no teacher 'llm'"),
        (("--data=/nowhere", where[1]), "/nowhere is not a directory"),
    ):
        done = launch(*given)
        assert done.returncode == 2, (given, done.stderr)
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_comparisons_in_one_directory_are_refused(tmp_path):
    """The second would train over the runs of the first."""
    worlds.random_dataset(tmp_path / "data")
    given = (f"--data={tmp_path / 'data'}", f"--out={tmp_path}", "--guidance=none", "--controls=")
    with shards.locked(tmp_path):
        done = launch(*given)
    assert done.returncode == 2
    assert f"{tmp_path} is being written by another process" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_compares_and_goes_on_where_it_was(tmp_path):
    data = worlds.random_dataset(tmp_path / "data", n_users=40, n_items=30, per_user=10)
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 5)
    items = np.concatenate([np.sort(rng.choice(30, 5, replace=False)) for _ in range(40)])
    table = pa.table([users, items, rng.random(200)], names=["user", "item", "score"])
    preferences.write_product(
        data, "llm", table.cast(schema.TEACHER_SCORES), provenance=preferences.Provenance()
    )
    out = tmp_path / "out"
    given = (
        f"--data={data.path}",
        "--teacher=llm",
        f"--out={out}",
        "--backbones=mf,dcnv2",
        "--guidance=none,paper",
        "--controls=",
        "--seeds=2",
        "--epochs=1",
        "--dim=4",
        "--trials=1",
        "--nowiden",
        "--loss=bce",
        "--l2=0",
        "--workers=2",
        "--batch_size=64",
        "--mlp=4",
        "--history_bins=5,7",
        "--popularity_bins=12",
        "--norefit",
    )
    done = launch(*given)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["primary"] == {"mf": "ndcg@10", "dcnv2": "rows_auc"}
    assert (out / "report.md").read_text().startswith("# world, teacher llm")
    where = {
        (backbone, arm): [
            out / backbone / "runs" / folder / f"{arm}_seed{seed}"
            if seed
            else tuned_dir(report, out / backbone / "tune" / folder, backbone, arm)
            for seed in range(2)
        ]
        for backbone in ("mf", "dcnv2")
        for arm, folder in (("none", ""), ("paper", "llm"))
    }
    for backbone, metric, name in (
        ("mf", "ndcg@10", "per_user"),
        ("dcnv2", "auc", "rows_per_user"),
    ):
        users = {}
        for arm in ("none", "paper"):
            seeds = []
            for root in where[backbone, arm]:
                rows = pq.read_table(root / f"{name}.parquet").to_pylist()
                tested = [r for r in rows if r["part"] == "test" and r["items"] == "all"]
                seeds.append([r[metric] for r in sorted(tested, key=lambda r: r["user"])])
            users[arm] = np.mean(np.array(seeds, float), axis=0)
        primary = report["protocol"]["primary"][backbone]
        row = pick(report["rows"], backbone, "paper", "overall", primary)
        defined = ~np.isnan(users["paper"])
        assert defined.sum() == row["users"] > 20
        expected = scipy_stats.ttest_rel(users["paper"][defined], users["none"][defined]).pvalue
        assert row["vs_none"]["p_users"] == pytest.approx(expected)
        metrics = [json.loads((r / "metrics.json").read_text()) for r in where[backbone, "paper"]]
        of = [m["test"]["overall"]["ndcg@10"] if backbone == "mf"
              else m["rows"]["test"]["overall"]["auc"] for m in metrics]  # fmt: skip
        assert row["mean"] == pytest.approx(np.mean(of))
        bins = {r["slice"] for r in report["rows"] if r["backbone"] == backbone}
        assert {"history 6-7", "popularity<=12", "popularity>12"} <= bins
    # Called again: nothing is trained or tested, and the report is the same but for the pictures.
    outcomes = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")
                if path.name in ("outcome.json", "rows.json")}  # fmt: skip
    # Of each backbone and arm a trial, a second seed, tests; a trial of each backbone's base.
    assert len(outcomes) == 2 * 2 * (1 + 1 + 2) + 2
    again = launch(*given)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in outcomes.items())
    assert json.loads((out / "report.json").read_text()) == report


@pytest.mark.slow
def test_refits_learn_from_teachers_made_anew(tmp_path):
    """And the controls' refits from controls of these."""
    data = worlds.random_dataset(tmp_path / "data", n_users=40, n_items=30, per_user=10)
    for name, of, seed in (("llm", data, 0), ("anew", data.with_validation(), 1)):
        rng = np.random.default_rng(seed)
        listed = [np.sort(rng.choice(30, 5, replace=False)) for _ in range(40)]
        users, items = np.repeat(np.arange(40), 5), np.concatenate(listed)
        seen = {"unlisted": "below", "built_from": ("train_only", "includes_valid")[seed]}
        worlds.teach(of, users, items, rng.random(200), name=name, **seen)
    request = planning.Request(
        teacher="llm",
        refit_teacher="anew",
        guidance=("none", "paper"),
        controls=("shuffled", "popularity"),
        seeds=2,
        options=config.CompareConfig(trials=1, widen=False, base=False),
        knobs={"epochs": 1, "dim": 4, "batch_size": 64},
    )
    done = comparison.compare_all([str(data.path)], tmp_path / "out", request, workers=1)
    (report,) = done.reports.values()
    assert report["protocol"]["refit_teacher"] == "anew"
    root = tmp_path / "out/mf/refit"
    configs = {
        path.parent.relative_to(root).as_posix(): json.loads(path.read_text())
        for path in root.rglob("config.json")
    }
    learned = {name: of_run["guidance"]["teacher"] for name, of_run in configs.items()}
    assert learned == {
        **{f"none_seed{seed}": "" for seed in (0, 1)},
        **{f"llm/anew/paper_seed{seed}": "anew" for seed in (0, 1)},
        **{
            f"llm/anew/{control}_seed{seed}": f"anew.{control}"
            for control in ("shuffled", "popularity")
            for seed in (0, 1)
        },
    }
    assert "Teachers, too: anew, and controls that were made of it." in done.texts["world"]
    for changes, words in (
        ({"refit_teacher": "llm"}, "--refit_teacher=llm: built_from=train_only, expected"),
        ({"refit": False}, r"--refit_teacher=anew: no run is refitted \(--refit\); drop it"),
        ({"teacher": "", "guidance": ("none",), "controls": ()}, "no arm learns from a teacher"),
    ):
        with pytest.raises(ConfigError, match=words):
            planning.make_plan(
                str(data.path), tmp_path / "x", dataclasses.replace(request, **changes)
            )


@pytest.mark.slow
def test_refits_are_a_second_table_and_the_verdict(tmp_path):
    data = worlds.random_dataset(tmp_path / "data", n_users=40, n_items=30, per_user=10)
    request = planning.Request(
        guidance=("none", "hard_own"),
        seeds=2,
        options=config.CompareConfig(trials=1, widen=False),
        knobs={"epochs": 3, "dim": 4, "batch_size": 64, "hard_share": 0.2, "hard_pool": 5},
    )
    done = comparison.compare_all([str(data.path)], tmp_path / "out", request, workers=1)
    (report,) = done.reports.values()
    refit = report["refit"]
    assert report["verdict"] == refit["verdict"]
    assert report["verdict"]["focus"] == "hard_own"
    root = tmp_path / "out/mf"
    for arm in ("none", "hard_own"):
        tuned = tuned_dir(report, root / "tune", "mf", arm)
        for rows, runs in (
            (report["rows"], [tuned, root / f"runs/{arm}_seed1"]),
            (refit["rows"], [root / f"refit/{arm}_seed{seed}" for seed in (0, 1)]),
        ):
            written = [json.loads((run / "metrics.json").read_text()) for run in runs]
            mean = np.mean([metrics["test"]["overall"]["ndcg@10"] for metrics in written])
            assert pick(rows, "mf", arm, "overall", "ndcg@10")["mean"] == pytest.approx(mean)
    again = [json.loads((tmp_path / "out/mf/refit" / f"hard_own_seed{s}/config.json").read_text())
             for s in (0, 1)]  # fmt: skip
    assert [c["train"]["seed"] for c in again] == [0, 1]
    assert again[1]["train"]["refit"].endswith("runs/hard_own_seed1")
    assert "# Refitted on training and validation" in done.texts["world"]
    assert "hard_own, refit" in str(done)
    assert "ease, refit" in str(done)
    eases = [
        next(r for r in table if r["baseline"] == "ease" and r["slice"] == "overall")["ndcg@10"]
        for table in (report["baselines"], refit["baselines"])
    ]
    assert eases[0] != eases[1]
