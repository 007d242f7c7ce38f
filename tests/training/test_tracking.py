"""Trackers beside the log: told once of each step, across kills; never the end of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import sqlite3
import subprocess
import sys

import pytest
import worlds

from slgr_jax.config import ModelConfig, SamplerConfig, TrainConfig
from slgr_jax.errors import ConfigError
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.training import (
    checkpoint,
    checkpoint_manifest,
    loop,
    run_directory,
    tracking,
    training_log,
)

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
    "model": ModelConfig(dim=8),
    "sampler": SamplerConfig(batch_size=64),
    "train": TrainConfig(epochs=2, track="wandb", kernels="xla"),
}


class Remembered:
    """A tracker that keeps what it is told, by run id, in `runs`; `broken` makes it fail."""

    runs: dict[str, dict] = {}  # noqa: RUF012 - one service for every run of a test
    broken: set[str] = set()  # noqa: RUF012

    def __init__(self, run, known):
        self._may("init")
        self.id = known or f"id{len(self.runs)}"
        fresh = {"settings": tracking.settings(run), "steps": [], "final": {}, "status": []}
        self.told = self.runs.setdefault(self.id, fresh)

    def _may(self, what):
        if what in self.broken:
            raise OSError(28, "No space left on device")

    def record(self, step, values):
        self._may("record")
        self.told["steps"].append((step, values["valid/ndcg@10"]))

    def summarize(self, values):
        self._may("summarize")
        self.told["final"] |= values

    def close(self, status):
        self._may("close")
        self.told["status"].append(status)


@pytest.fixture
def service(monkeypatch):
    """The tracker `wandb`, replaced by one that remembers."""
    monkeypatch.setattr(tracking, "_MAKERS", {"wandb": Remembered, "mlflow": Remembered})
    monkeypatch.setattr(Remembered, "runs", {})
    monkeypatch.setattr(Remembered, "broken", set())
    return Remembered


@pytest.fixture
def run(tmp_path):
    return worlds.run_config(worlds.random_dataset(tmp_path / "d"), tmp_path / "run", **SMALL)


def _more(run, **knobs):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **knobs))


def _logged(run):
    path = f"{run.workdir}/log.jsonl"
    with open(path, encoding="utf-8") as file:
        return [(r["step"], r["valid/ndcg@10"]) for r in map(json.loads, file)]


def test_a_resumed_run_goes_on_in_the_same_tracker_run_without_a_step_told_twice(run, service):
    loop.train(run)
    loop.train(_more(run, epochs=3))
    ((identity, told),) = service.runs.items()
    assert told["steps"] == _logged(run)
    assert len(told["steps"]) == 3
    assert told["status"] == ["finished", "finished"]
    assert told["settings"]["dim"] == 8
    assert told["settings"]["ks"] == "10,20"

    evaluated = evaluate_run(run.workdir, "run")
    assert told["final"]["test/ndcg@10"] == evaluated.parts["test"].slices["overall"]["ndcg@10"]
    assert "test/tail_items/ndcg@10" in told["final"]
    assert list(service.runs) == [identity]

    loop.train(_more(run, restart=True))
    assert len(service.runs) == 2


def test_a_kill_before_a_checkpoint_tells_no_step_twice(run, service):
    def die(progress):
        if progress.metrics.get("epoch") == 2:
            raise MemoryError("killed")

    with pytest.raises(MemoryError), training_log.listening(die):
        loop.train(run)
    loop.train(run)  # no checkpoint was due: it starts over
    (told,) = service.runs.values()
    assert told["steps"] == _logged(run)
    assert told["status"] == ["failed", "finished"]


@pytest.mark.parametrize("what", ["init", "record", "close"])
def test_a_tracker_that_fails_is_one_warning_and_catches_up_later(run, service, caplog, what):
    service.broken.add(what)
    with caplog.at_level(logging.WARNING, logger="slgr_jax"):
        assert loop.train(run).status == "finished"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("--track=wandb fails and is left out (OSError: [Errno 28] No space")

    service.broken.clear()
    loop.train(run)
    (told,) = service.runs.values()
    assert told["steps"] == _logged(run)
    service.broken.add("summarize")
    assert evaluate_run(run.workdir, "run").parts


def test_one_tracker_failing_leaves_the_other(run, service, monkeypatch):
    class Failing(Remembered):
        def record(self, step, values):
            raise ConnectionError("no network")

    monkeypatch.setitem(tracking._MAKERS, "mlflow", Failing)
    loop.train(_more(run, track="mlflow,wandb"))
    assert [told["steps"] for told in service.runs.values()] == [[], _logged(run)]


def test_a_missing_package_is_said_before_the_first_step(run, service, monkeypatch):
    def absent(run, known):
        raise ImportError("No module named 'wandb'")

    monkeypatch.setitem(tracking._MAKERS, "wandb", absent)
    with pytest.raises(ConfigError, match=r"--track=wandb needs .*pip install 'slgr_jax\[wandb\]'"):
        loop.train(run)
    assert not checkpoint_manifest.steps_in(pathlib.Path(run.workdir) / checkpoint.DIRECTORY)


def test_unknown_trackers_are_refused():
    with pytest.raises(ConfigError, match=r"--track=neptune is not one of: tensorboard, wandb"):
        TrainConfig(track="wandb,neptune")
    assert TrainConfig(track=" wandb ,mlflow,wandb").tracker_names == ("wandb", "mlflow")


@pytest.mark.parametrize("state", ["", '{"wandb": {"id": "x"}}'])
def test_a_damaged_state_begins_a_new_tracker_run(run, service, state):
    loop.train(run)
    (pathlib.Path(run.workdir) / tracking.STATE).write_text(state)
    loop.train(_more(run, epochs=3))
    assert [told["steps"] for told in service.runs.values()] == [_logged(run)[:2], _logged(run)]


def test_a_run_of_the_old_flag_is_read(run):
    loop.train(_more(run, track=""))
    path = pathlib.Path(run.workdir) / run_directory.CONFIG
    old = json.loads(path.read_text())
    del old["train"]["track"], old["checksum"]
    path.write_text(json.dumps(old | {"train": old["train"] | {"tensorboard": True}}))
    assert run_directory.read_config(run.workdir) == _more(run, track="tensorboard")


# --- the packages themselves ------------------------------------------------------------------

# In a process of its own: warnings of these packages are no errors of ours, and they leave threads.
REAL = """
import os, pathlib, sys
import worlds
from slgr_jax.config import ModelConfig, SamplerConfig, TrainConfig
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.training import loop
root, track = pathlib.Path(sys.argv[1]), sys.argv[2]
data = worlds.random_dataset(root / "d")
def train(name, epochs):
    loop.train(worlds.run_config(
        data, root / name, model=ModelConfig(dim=8), sampler=SamplerConfig(batch_size=64),
        train=TrainConfig(epochs=epochs, track=track, kernels="xla")))
train("run", 1)
train("run", 3)
evaluate_run(str(root / "run"), "run")
evaluate_run(str(root / "run"), "run")
"""
TRACKERS = ("wandb", "mlflow", "tensorboard")
PACKAGES = ("wandb", "mlflow", "sqlalchemy", "tensorboardX")


@pytest.mark.slow
def test_the_real_trackers_without_a_network(tmp_path):
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{absent} not installed: pip install 'slgr_jax[wandb,mlflow,tensorboard]'")
    tests = pathlib.Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path), ",".join(TRACKERS)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
        | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "WANDB_MODE": "offline"},
        cwd=tmp_path,
        check=True,
        timeout=250,
    )
    run = tmp_path / "run"
    state = json.loads((run / tracking.STATE).read_text())
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    test = json.loads((run / "metrics.json").read_text())["test"]
    last = records[-1]["step"]
    assert {name: told["step"] for name, told in state.items()} == dict.fromkeys(TRACKERS, last)

    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:

        def ask(query: str) -> list[tuple]:
            return store.execute(query, (state["mlflow"]["id"],)).fetchall()

        assert ask("SELECT status FROM runs WHERE run_uuid = ?") == [("FINISHED",)]
        params = dict(ask("SELECT key, value FROM params WHERE run_uuid = ?"))
        assert (params["dim"], params["ks"]) == ("8", "10,20")
        points = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = "
        assert ask(f"{points} 'valid/ndcg_at_10' ORDER BY step") == [
            (record["step"], record["valid/ndcg@10"]) for record in records
        ]
        assert ask(f"{points} 'test/ndcg_at_10'") == [(0, test["overall"]["ndcg@10"])]

    folders = list((run / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, with -1 after it where a second process began within the same second
    assert {folder.name.split("-")[3] for folder in folders} == {state["wandb"]["id"]}
    kept = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    assert b"valid/ndcg@10" in kept
    assert b"test/tail_items/ndcg@10" in kept
    assert list((run / "tensorboard").glob("events*"))
