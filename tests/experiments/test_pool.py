"""Runs side by side: groups, outcomes, and what is not trained again."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pyarrow as pa
import pytest
import worlds
from comparisons import plan_of

from slgr_jax.config import make_run
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, NonFiniteError
from slgr_jax.experiments import pool, results, tuning
from slgr_jax.teacher.products import preferences
from slgr_jax.training import checkpoint_manifest, loop, multi_seed


def test_seeds_train_together_on_accelerators_only(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    a = [plan.config("mf", "paper", {"lr": 0.1}, tmp_path / f"a{i}", i) for i in range(3)]
    b = [plan.config("mf", "paper", {"lr": 0.2}, tmp_path / f"b{i}", i) for i in range(2)]
    mixed = [a[0], b[0], a[1], b[1], a[2]]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert pool.groups(mixed) == [[run] for run in mixed]
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert pool.groups(mixed) == [a, b]


def test_a_group_leaves_an_outcome_for_each_run(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="slgr_jax")
    plan = plan_of(tmp_path)
    runs = [plan.config("mf", "paper", {"lr": 0.1}, tmp_path / f"s{i}", i) for i in range(3)]
    alone = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pool, "fit", lambda run: alone.append(run) or results.write_json(
        pathlib.Path(run.workdir) / results.OUTCOME,
        {"best_metric": None, "best_epoch": None, "error": "diverged"}))  # fmt: skip

    def together(group):
        print("epoch 1")
        return [loop.Outcome("finished", 9, 90, 4 + i, 0.25, 3.5) for i in range(len(group))]

    monkeypatch.setattr(multi_seed, "train_seeds", together)
    outcomes = pool.train_runs(runs, workers=1, root=tmp_path)
    assert [outcome["best_epoch"] for outcome in outcomes] == [4, 5, 6]
    for outcome in outcomes:
        expected = {"epoch": 9, "best_metric": 0.25, "seconds": 3.5, "error": None}
        assert {name: outcome[name] for name in expected} == expected
        assert 0 <= outcome["cpu_seconds"] < 60
    assert caplog.messages[1] == "  [1/1] s1: 0.2500 (epoch 5)"
    assert "epoch 1\n" in (tmp_path / "s0" / "train.log").read_text()
    assert alone == []

    def diverge(group):
        raise NonFiniteError("seed 1")

    # One that diverges does not take the others with it: each is trained alone.
    monkeypatch.setattr(multi_seed, "train_seeds", diverge)
    for run in runs:
        results.forget(run.workdir)
    assert [outcome["error"] for outcome in pool.train_runs(runs, workers=1, root=tmp_path)] == [
        "diverged"
    ] * 3
    assert alone == runs


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="slgr_jax")
    data = worlds.random_dataset(tmp_path / "data")
    rows = [[0, 0, 1], [1, 2, 3], [0.5, 0.25, 0.1]]
    table = pa.table(rows, names=["user", "item", "score"]).cast(schema.TEACHER_SCORES)
    preferences.write_product(data, "llm", table, provenance=preferences.Provenance())
    plan = plan_of(tmp_path, knobs={"epochs": 2, "batch_size": 64, "dim": 8})
    run = plan.config("mf", "paper", {"lr": 0.1}, tmp_path / "out" / "a")
    assert not pool.finished(run)
    (outcome,) = pool.train_runs([run], workers=1, root=tmp_path)
    assert outcome["epoch"] == 2
    assert outcome["error"] is None
    assert f"out/a: {outcome['best_metric']:.4f}" in caplog.text
    logged = [record["valid/ndcg@10"] for record in results.log(run.workdir)]
    assert outcome["best_metric"] == max(logged)
    best = results.log(run.workdir)[outcome["best_epoch"] - 1]
    assert tuning.mean_weight(tmp_path / "out" / "a") == best["train/alpha"]

    root = tmp_path / "out" / "a"
    other = shutil.copytree(root, tmp_path / "other")
    knobs = plan.knobs | {"uncertainty": "ensemble", "reference_runs": f"{root},{other}"}
    unsure = dataclasses.replace(plan, knobs=knobs).config("mf", "paper", {}, root.parent / "b")
    pool.train_runs([unsure], workers=1, root=tmp_path)
    assert pool.finished(unsure)
    (step,) = other.glob("checkpoints/*")  # a member that was trained anew
    later = dataclasses.replace(checkpoint_manifest.read(step).progress, stale=99)
    checkpoint_manifest.write(step, later, ())
    assert not pool.finished(unsure)

    pool.evaluate_runs([run], workers=1)
    assert (root / "metrics.json").is_file()
    seen = []
    monkeypatch.setattr(pool, "fit", lambda run: seen.append(run) or results.write_json(
        pathlib.Path(run.workdir) / results.OUTCOME, outcome))  # fmt: skip
    monkeypatch.setattr(pool, "_evaluate", lambda run: seen.append(run))
    pool.evaluate_runs([run], workers=1)
    assert pool.train_runs([run, run], workers=1, root=tmp_path) == [outcome, outcome]
    assert seen == []
    # Other settings, or other answers of the teacher, are another run.
    other = plan.config("mf", "paper", {"lr": 0.2}, root)
    assert not pool.finished(other)
    with pytest.raises(ConfigError, match=r"--lr: 0.1 -> 0.2.*--out"):
        pool.train_runs([other], workers=1, root=tmp_path)
    preferences.write_product(
        data, "llm", table.slice(1), provenance=preferences.Provenance(), overwrite=True
    )
    assert not pool.finished(run)
    # A killed run has no outcome: it trains on, and what it had said of the test part is gone.
    preferences.write_product(
        data, "llm", table, provenance=preferences.Provenance(), overwrite=True
    )
    (root / results.OUTCOME).unlink()
    pool.train_runs([run], workers=1, root=tmp_path)
    assert seen == [run]
    results.forget(root)
    assert not results.evaluated(root)
    assert not (root / "metrics.json").exists()


class Listed:
    """A stream of given batches; `after`: the stream that must have ended before."""

    def __init__(self, root, name, sizes, after=None):
        self.batches = [
            [make_run("data", str(root / name / f"{batch}_{k}")) for k in range(size)]
            for batch, size in enumerate(sizes)
        ]
        self.after, self.told = after, []

    @property
    def over(self):
        return len(self.told) == len(self.batches)

    def due(self):
        if self.after is not None and not self.after.over:
            return None
        return [] if self.over else self.batches[len(self.told)]

    def tell(self, outcomes):
        self.told.append([outcome["best_metric"] for outcome in outcomes])


@pytest.fixture
def fitted(monkeypatch):
    """Runs that are `fit` in threads: workdirs, in the order in which they begin; what waits."""
    begun, waits = [], {}

    def fit(run):
        begun.append(pathlib.Path(run.workdir).parts[-2:])
        if run.workdir in waits:
            assert waits[run.workdir].wait(20), f"{run.workdir} waits for a run that never began"
        for event in [x for name, x in waits.items() if name == f"begun {run.workdir}"]:
            event.set()
        pathlib.Path(run.workdir).mkdir(parents=True)
        written = {"best_metric": float(len(begun)), "best_epoch": 1, "error": None}
        results.write_json(pathlib.Path(run.workdir) / results.OUTCOME, written)

    monkeypatch.setattr(pool, "fit", fit)
    monkeypatch.setattr(pool, "finished", lambda run: results.outcome(run.workdir) is not None)
    monkeypatch.setattr(pool, "in_worker", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(pool, "process_pool", ThreadPoolExecutor)
    return begun, waits


def test_a_stream_goes_on_while_another_is_at_work(fitted, tmp_path):
    """The only run of a ends when the third batch of b has begun; c begins when both have ended."""
    begun, waits = fitted
    a, b = Listed(tmp_path, "a", [1]), Listed(tmp_path, "b", [2, 1, 1])
    c = Listed(tmp_path, "c", [1, 1], after=a)
    event = threading.Event()
    waits[a.batches[0][0].workdir] = waits[f"begun {b.batches[2][0].workdir}"] = event
    pool.train_streams([c, a, b], 7, workers=2, root=tmp_path)
    assert all(stream.over for stream in (a, b, c))
    assert begun.index(("b", "2_0")) < begun.index(("c", "0_0")) < begun.index(("c", "1_0"))
    assert len(begun) == len(set(begun)) == 7
    assert [len(batch) for batch in b.told] == [2, 1, 1]
    again = [Listed(tmp_path, name, sizes) for name, sizes in (("a", [1]), ("b", [2, 1, 1]))]
    pool.train_streams(again, 5, workers=2, root=tmp_path)
    assert len(begun) == 7, "what is there is not trained again"
    assert [stream.told for stream in again] == [a.told, b.told]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_ends_all_streams(fitted, monkeypatch, tmp_path, workers):
    def failing(run):
        raise ConfigError("out of memory")

    monkeypatch.setattr(pool, "fit", failing)
    streams = [Listed(tmp_path, name, [2, 1]) for name in "ab"]
    with pytest.raises(ConfigError, match="out of memory"):
        pool.train_streams(streams, 6, workers=workers, root=tmp_path)
    assert not any(stream.told for stream in streams)
