"""The loop: exact resume, signals, kills, NaNs, early stopping; bad input as a user meets it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import worlds
from commands import launch_train
from orbax.checkpoint import v1 as ocp

from slgr_jax.config import (
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
    knobs,
)
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, ManifestError, NonFiniteError, UserError
from slgr_jax.training import (
    agreement,
    build,
    checkpoint,
    checkpoint_manifest,
    loop,
    restore,
    run_directory,
    training_log,
    validation,
)
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

REPO = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "model": ModelConfig(dim=8),
    "sampler": SamplerConfig(batch_size=32),
    "train": TrainConfig(epochs=6, patience=0, steps_per_dispatch=3),
}


def _records(workdir: pathlib.Path) -> list[dict[str, float]]:
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _log(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The log without what a clock put there."""
    clocked = ("time", "triples_per_s")
    return [{k: v for k, v in r.items() if k not in clocked} for r in _records(workdir)]


def _values(workdir: pathlib.Path, which: str = "last") -> dict[str, np.ndarray]:
    state = restore.restore_run(str(workdir), which).serving
    return {name: np.asarray(value) for name, value in state.values.items()}


def _assert_same(a: pathlib.Path, b: pathlib.Path) -> None:
    assert _log(a) == _log(b)
    for which in ("best", "last"):
        left, right = _values(a, which), _values(b, which)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


class _StopAfter(threading.Event):
    """A stand-in for the signal: set once so many dispatches have asked."""

    def __init__(self, asks: int) -> None:
        super().__init__()
        self.left = asks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return worlds.random_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`SMALL`, trained without a stop; not to be changed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(worlds.run_config(dataset, workdir, **SMALL)).status == "finished"
    return workdir


@pytest.fixture
def finished(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, to go on from or to be damaged."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def _assert_resumes(dataset: Dataset, whole: pathlib.Path, tmp_path, monkeypatch, asks) -> None:
    split = worlds.run_config(dataset, tmp_path / "split", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "stop_on_signal", lambda: contextlib.nullcontext(_StopAfter(asks)))
        assert loop.train(split).status == "interrupted"
    outcome = loop.train(split)
    assert outcome.status == "finished"
    assert outcome.epoch == 6
    _assert_same(whole, tmp_path / "split")


@pytest.mark.parametrize("asks", [1, 2, 7, 13])
def test_resume_is_bit_identical(dataset, whole, tmp_path, monkeypatch, asks):
    """Stopped in the middle of an epoch or at its end, resumed: same log, same tables."""
    _assert_resumes(dataset, whole, tmp_path, monkeypatch, asks)


@pytest.mark.parametrize("epoch", [1, 6])
def test_a_stop_within_a_validation_leaves_it_to_the_next_call(
    dataset, whole, tmp_path, monkeypatch, epoch
):
    """It ends between two chunks of users; the last one is saved again, at the same step."""
    split = worlds.run_config(dataset, tmp_path / "split", **SMALL)
    stop, real, validated = threading.Event(), validation.Validation.__call__, []

    def validate(self, serving, between_chunks):
        validated.append(stop.is_set())
        if len(validated) == epoch:
            stop.set()
        return real(self, serving, between_chunks)

    with monkeypatch.context() as patch:
        patch.setattr(agreement, "stop_on_signal", lambda: contextlib.nullcontext(stop))
        patch.setattr(validation.Validation, "__call__", validate)
        outcome = loop.train(split)
    assert (outcome.status, outcome.epoch, outcome.step) == ("interrupted", epoch - 1, epoch * 8)
    assert len(_log(tmp_path / "split")) == epoch - 1
    assert loop.train(split).status == "finished"
    _assert_same(whole, tmp_path / "split")
    assert ["triples_per_s" in r for r in _records(tmp_path / "split")] == [
        at != epoch for at in range(1, 7)
    ], "no speed is known of an epoch that another process trained"
    assert loop.train(split).epoch == 6, "the step that was saved again is the newest"


def test_the_speed_of_an_epoch_that_was_resumed_is_of_what_was_trained_then(
    dataset, tmp_path, monkeypatch
):
    split = worlds.run_config(dataset, tmp_path / "split", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "stop_on_signal", lambda: contextlib.nullcontext(_StopAfter(1)))
        stopped = loop.train(split)
    assert (stopped.epoch, stopped.step) == (0, 6)
    clock = types.SimpleNamespace(monotonic=itertools.count(step=10.0).__next__)
    monkeypatch.setattr(loop, "time", clock)
    loop.train(split)
    assert _records(tmp_path / "split")[0]["triples_per_s"] == round((8 - 6) * 32 / 10)


@pytest.mark.usefixtures("eight_devices")
def test_resume_on_eight_devices_is_bit_identical(dataset, tmp_path, monkeypatch):
    loop.train(worlds.run_config(dataset, tmp_path / "whole", **SMALL))
    _assert_resumes(dataset, tmp_path / "whole", tmp_path, monkeypatch, 7)


def test_resume_with_more_epochs_goes_on(dataset, whole, tmp_path):
    short = dataclasses.replace(SMALL["train"], epochs=2)
    loop.train(worlds.run_config(dataset, tmp_path / "split", **SMALL | {"train": short}))
    loop.train(worlds.run_config(dataset, tmp_path / "split", **SMALL))
    _assert_same(whole, tmp_path / "split")


def test_other_settings_are_refused_by_name(dataset, finished):
    other = SMALL | {"optimizer": OptimizerConfig(lr=0.5)}
    with pytest.raises(ConfigError, match=r"--lr: 0.05 -> 0.5.*--restart"):
        loop.train(worlds.run_config(dataset, finished, **other))
    again = other | {"train": dataclasses.replace(SMALL["train"], restart=True)}
    assert loop.train(worlds.run_config(dataset, finished, **again)).epoch == 6


def test_best_is_the_best_validation_and_patience_stops(dataset, tmp_path):
    sections = SMALL | {
        "optimizer": OptimizerConfig(lr=0.5),
        "train": TrainConfig(epochs=200, patience=4),
    }
    outcome = loop.train(worlds.run_config(dataset, tmp_path / "run", **sections))
    records = _log(tmp_path / "run")
    curve = [record["valid/ndcg@10"] for record in records]
    assert outcome.best_epoch == int(np.argmax(curve)) + 1
    assert outcome.best_metric == max(curve)
    assert outcome.epoch == outcome.best_epoch + 4 == len(curve)
    best, last = _values(tmp_path / "run", "best"), _values(tmp_path / "run", "last")
    assert any((best[name] != last[name]).any() for name in best)


@pytest.mark.parametrize(("lr", "warns"), [(1e6, True), (0.5, False)])
def test_a_loss_that_runs_away_is_said_once(dataset, tmp_path, caplog, lr, warns):
    """Every number stays finite, and the run ends as if all were well."""
    epochs = dataclasses.replace(SMALL["train"], epochs=2)
    sections = SMALL | {"optimizer": OptimizerConfig(lr=lr), "train": epochs}
    with caplog.at_level(logging.WARNING, logger="slgr_jax"):
        loop.train(worlds.run_config(dataset, tmp_path / "run", **sections))
    said = [record.getMessage() for record in caplog.records if "diverges" in record.getMessage()]
    assert len(said) == warns
    assert all("lower --lr (1e+06)" in text for text in said)


def test_a_nan_names_step_and_leaf_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
    good = SMALL | {"train": dataclasses.replace(SMALL["train"], epochs=2)}
    run = worlds.run_config(dataset, tmp_path / "run", **good)
    loop.train(run)
    before = _values(tmp_path / "run")
    trainer = build.build(run, dataset).trainer
    saved = checkpoint.Checkpoints(run.workdir, writable=True)
    state, best = saved.restore(
        state_lib.abstract_state(trainer), state_lib.abstract_serving(trainer)
    )
    progress = saved.progress()
    poisoned = jax.tree.map(lambda x: x, state)
    poisoned = poisoned.replace(
        tables=poisoned.tables | {"user": poisoned.tables["user"].at[:, 0].set(np.nan)}
    )
    saved.save(poisoned, best, dataclasses.replace(progress, step=progress.step + 1))
    saved.close()
    more = worlds.run_config(dataset, tmp_path / "run", **SMALL)
    with pytest.raises(NonFiniteError, match=r"tables/user.* is kept; lower --lr"):
        loop.train(more)
    after = _values(tmp_path / "run")
    assert np.isfinite(after["item"]).all()
    np.testing.assert_array_equal(after["item"], before["item"])


def test_a_validation_without_a_finite_metric_names_what_to_lower(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(validation.Validation, "__call__", lambda *_: {"n": 0.0})
    with pytest.raises(NonFiniteError, match=r"validation after step 7: ndcg@10 not finite; .*--d"):
        loop.train(worlds.run_config(dataset, tmp_path / "run", **SMALL))


def test_run_record_states_what_was_resolved(dataset, whole):
    run = worlds.run_config(dataset, whole, **SMALL)
    assert run_directory.read_config(run.workdir) == run
    record = json.loads((whole / "run.json").read_text())
    assert record["split_hash"] == dataset.manifest.split_hash
    assert record["steps_per_epoch"] == -(-len(dataset.train) // 32)
    assert record["cold_users"] == int(dataset.slices(run.slices).cold_users.sum())


def test_tensorboard_files_hold_the_log(dataset, tmp_path):
    sections = SMALL | {"train": dataclasses.replace(SMALL["train"], track="tensorboard", epochs=2)}
    loop.train(worlds.run_config(dataset, tmp_path / "run", **sections))
    files = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(files) == 1
    assert b"valid/ndcg_10" in files[0].read_bytes()


def test_dataset_swapped_under_a_run_is_refused(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    one_epoch = SMALL | {"train": dataclasses.replace(SMALL["train"], epochs=1)}
    run = worlds.run_config(dataset, tmp_path / "run", **one_epoch)
    loop.train(run)
    shutil.rmtree(tmp_path / "d")
    other = worlds.random_dataset(tmp_path / "d", seed=9)
    with pytest.raises(ConfigError, match=other.manifest.split_hash[:8]):
        restore.restore_run(run.workdir)


def test_restoring_what_never_trained(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"not a run.*slgr train"):
        restore.restore_run(str(tmp_path))
    run = worlds.run_config(dataset, tmp_path / "run", **SMALL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(knobs.to_json(run))
    with pytest.raises(ManifestError, match="no checkpoints"):
        restore.restore_run(run.workdir)


def test_a_checkpoint_is_never_replaced_only_followed(dataset, tmp_path, monkeypatch):
    """Replacing deletes first: a kill in between would lose the only one."""
    saved, real = [], ocp.save_checkpointables_async

    def spy(path, items, **options):
        assert not options.get("overwrite")
        saved.append(int(path.name.removesuffix(".partial")))
        return real(path, items, **options)

    monkeypatch.setattr(ocp, "save_checkpointables_async", spy)
    often = SMALL | {"train": dataclasses.replace(SMALL["train"], checkpoint_every_s=0.0)}
    loop.train(worlds.run_config(dataset, tmp_path / "run", **often))
    per_epoch = -(-len(dataset.train) // 32)
    assert saved == [
        step
        for step in range(1, 6 * per_epoch + 1)
        if step % per_epoch % 3 == 0 or step % per_epoch == 0
    ]
    loop.train(worlds.run_config(dataset, tmp_path / "run", **often))
    assert saved[-1] == 6 * per_epoch
    assert len(saved) == len(set(saved))


@pytest.mark.parametrize("when", ["arrays", "manifest"])
def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(
    dataset, whole, tmp_path, monkeypatch, when
):
    short = SMALL | {"train": dataclasses.replace(SMALL["train"], epochs=2)}
    loop.train(worlds.run_config(dataset, tmp_path / "run", **short))
    before = _values(tmp_path / "run")

    def full(*args: object, **options: object) -> None:
        if when == "manifest":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise ValueError('RESOURCE_EXHAUSTED: Failed writing: "x": No space left on device')

    with monkeypatch.context() as patch:
        module, name = {
            "arrays": (ocp, "save_checkpointables_async"),
            "manifest": (checkpoint_manifest, "write"),
        }[when]
        patch.setattr(module, name, full)
        with pytest.raises(UserError, match=r"no space left.*again to resume"):
            loop.train(worlds.run_config(dataset, tmp_path / "run", **SMALL))
    after = _values(tmp_path / "run")
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    loop.train(worlds.run_config(dataset, tmp_path / "run", **SMALL))
    _assert_same(whole, tmp_path / "run")


def test_a_run_that_another_process_took_over_writes_nothing_more(dataset, tmp_path, monkeypatch):
    """A file system without locks, and a process that stood still for longer than it may."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = worlds.run_config(dataset, tmp_path / "run", **SMALL)
    heartbeat = tmp_path / "run" / ".lock.heartbeat"
    seen = []

    def take_over(event):
        seen.append(heartbeat.read_text())
        heartbeat.write_text("7 on there\nanother token\n1\n")

    with (
        training_log.listening(take_over),
        pytest.raises(ConfigError, match=r"run was taken over by 7 on there, .*give the same com"),
    ):
        loop.train(run)
    assert seen[0].startswith(f"{os.getpid()} on ")
    assert not checkpoint_manifest.steps_in(tmp_path / "run" / checkpoint.DIRECTORY)
    assert heartbeat.read_text().startswith("7 on there")  # not ours to remove
    heartbeat.unlink()
    assert loop.train(run).epoch == 6
    assert not heartbeat.exists()


@pytest.mark.usefixtures("eight_devices")
def test_checkpoint_restores_on_another_topology(dataset, tmp_path):
    """Written with 4 table shards, read with 8 and with 1."""
    sections = SMALL | {"train": dataclasses.replace(SMALL["train"], table_shards=4, epochs=2)}
    run = worlds.run_config(dataset, tmp_path / "run", **sections)
    loop.train(run)
    sections = SMALL | {"train": dataclasses.replace(SMALL["train"], table_shards=8, epochs=4)}
    assert loop.train(worlds.run_config(dataset, tmp_path / "run", **sections)).epoch == 4
    assert _values(tmp_path / "run")["user"].shape == (dataset.n_users, 8)


# --- as a user meets it -------------------------------------------------------------------------


def _start(dataset, workdir: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(REPO / "launch" / "train.py"),
            *(f"--data={dataset.path}", f"--workdir={workdir}", "--dim=8", "--batch_size=32"),
            *("--patience=0", "--checkpoint_every_s=0", *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_epochs(process: subprocess.Popen[str], workdir: pathlib.Path, count: int) -> None:
    limit = time.monotonic() + 100
    log = workdir / "log.jsonl"
    while time.monotonic() < limit and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} epochs: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_exits_as_interrupted(dataset, tmp_path, name):
    process = _start(dataset, tmp_path / "run", "--epochs=100000")
    _wait_for_epochs(process, tmp_path / "run", 3)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "interrupted after epoch" in output
    done = len(_log(tmp_path / "run"))
    again = launch_train(
        *(f"--data={dataset.path}", f"--workdir={tmp_path / 'run'}", "--dim=8", "--batch_size=32"),
        *("--patience=0", f"--epochs={done + 2}"),
    )
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
    assert [record["epoch"] for record in _log(tmp_path / "run")] == list(range(1, done + 3))


@pytest.mark.slow
def test_kill_9_while_saving_loses_nothing(dataset, tmp_path, monkeypatch):
    """A checkpoint after every dispatch, killed at random moments: each restart goes on."""
    # What is killed may have been writing to it.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    workdir, seen = tmp_path / "run", 0
    for round_ in range(3):
        process = _start(dataset, workdir, "--epochs=100000")
        _wait_for_epochs(process, workdir, seen + 3)
        time.sleep(0.013 * round_)
        process.kill()
        process.communicate()
        seen = len((workdir / "log.jsonl").read_text().splitlines())
    final = launch_train(
        *(f"--data={dataset.path}", f"--workdir={workdir}", "--dim=8", "--batch_size=32"),
        *("--patience=0", f"--epochs={seen + 2}"),
    )
    assert final.returncode == 0, final.stderr
    assert "resuming at step" in final.stdout
    whole = launch_train(
        *(f"--data={dataset.path}", f"--workdir={tmp_path / 'whole'}", "--dim=8"),
        *("--batch_size=32", "--patience=0", f"--epochs={seen + 2}"),
    )
    assert whole.returncode == 0, whole.stderr
    _assert_same(tmp_path / "whole", workdir)


def test_guidance_needs_a_product_of_this_dataset(dataset, tmp_path):
    sections = SMALL | {"guidance": GuidanceConfig(guidance="pairwise", teacher="nobody")}
    with pytest.raises(ManifestError, match="nobody"):
        loop.train(worlds.run_config(dataset, tmp_path / "run", **sections))
