"""A run's directory: who may hold it, what may change, and damage that is named in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import worlds

from slgr_jax.config import (
    EvaluationConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SamplerConfig,
    TrainConfig,
)
from slgr_jax.data.dataset import Dataset, load
from slgr_jax.errors import ConfigError, InputError, ManifestError, UserError
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.teacher.products import preferences
from slgr_jax.training import checkpoint, loop, restore, run_directory

pytestmark = pytest.mark.usefixtures("one_device")

REPO = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "model": ModelConfig(dim=4),
    "sampler": SamplerConfig(batch_size=64),
    "train": TrainConfig(epochs=1),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return worlds.random_dataset(tmp_path_factory.mktemp("data") / "d", n_users=16, n_items=24)


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(worlds.run_config(dataset, workdir, **SMALL))
    return workdir


@pytest.fixture
def workdir(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run, to be damaged."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def _run(dataset: Dataset, workdir: pathlib.Path, **train_knobs: object) -> RunConfig:
    knobs = dataclasses.replace(SMALL["train"], **train_knobs)
    return worlds.run_config(dataset, workdir, **SMALL | {"train": knobs})


def _open(run: RunConfig, dataset: Dataset) -> None:
    with run_directory.opened(run, dataset):
        pass


# --- where a run may live -----------------------------------------------------------------------


def test_a_directory_that_cannot_be_made_is_named(dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        with pytest.raises(ConfigError, match=f"--workdir=.*{place} cannot be made: "):
            _open(_run(dataset, tmp_path / place), dataset)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_dataset_is_no_place_for_a_run(dataset):
    before = sorted(dataset.path.iterdir())
    with pytest.raises(ConfigError, match="is a dataset or a teacher product"):
        _open(_run(dataset, dataset.path), dataset)
    assert sorted(dataset.path.iterdir()) == before


def test_one_process_at_a_time(dataset, tmp_path):
    run = _run(dataset, tmp_path / "run")
    with (
        run_directory.opened(run, dataset),
        pytest.raises(ConfigError, match=r"being trained by another process \(\d+ on .+\); stop"),
    ):
        _open(dataclasses.replace(run, train=TrainConfig(restart=True)), dataset)
    _open(run, dataset)


# --- what a run was trained on ------------------------------------------------------------------


def test_moved_data_are_found_again(dataset, workdir, tmp_path):
    moved = load(shutil.copytree(dataset.path, tmp_path / "moved"))
    values = json.loads((workdir / run_directory.CONFIG).read_text())
    del values["checksum"]  # as in a run of an earlier version
    values["data"] = str(tmp_path / "gone")
    (workdir / run_directory.CONFIG).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"gone, which is not there; .*--data=NEW"):
        restore.restore_run(str(workdir))
    _open(_run(moved, workdir), moved)
    assert restore.restore_run(str(workdir)).dataset.path == moved.path


def test_resuming_on_a_dataset_that_was_replaced_is_refused(workdir, dataset, tmp_path):
    other = worlds.random_dataset(tmp_path / "other", n_users=16, n_items=24, seed=5)
    shutil.copytree(dataset.path, tmp_path / "d")
    _open(_run(load(tmp_path / "d"), workdir), dataset)
    shutil.rmtree(tmp_path / "d")
    shutil.move(other.path, tmp_path / "d")
    replaced = load(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"--data: .*/d holds another split.*--restart"):
        _open(_run(replaced, workdir), replaced)
    with pytest.raises(ConfigError, match="was trained on another split or id map"):
        restore.restore_run(str(workdir))


def test_a_record_without_its_hashes_is_named(dataset, workdir):
    for text in ('{"split_ha', "{}", "[]", '"x"'):
        (workdir / run_directory.RECORD).write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json is damaged; restore it, or remove it"):
            restore.restore_run(str(workdir))
    (workdir / run_directory.RECORD).unlink()
    assert restore.restore_run(str(workdir)).dataset.n_users == 16
    loop.train(_run(dataset, workdir))
    assert run_directory.trained_on(str(workdir), dataset)


def test_restart_leaves_no_numbers_of_the_run_before(dataset, workdir):
    evaluate_run(str(workdir), "a")
    assert (workdir / "metrics.json").is_file()
    _open(_run(dataset, workdir, restart=True), dataset)
    assert sorted(path.name for path in workdir.iterdir()) == [".lock", "config.json", "log.jsonl"]


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"data": "d", "wor', b"\xff\xfe\x00", b"", b"[]"], ids=repr)
def test_a_damaged_config_is_named_and_restart_mends_it(dataset, workdir, content):
    (workdir / run_directory.CONFIG).write_bytes(content)
    for attempt in (
        lambda: restore.restore_run(str(workdir)),
        lambda: _open(_run(dataset, workdir), dataset),
    ):
        with pytest.raises(ConfigError, match=r"config\.json is .*; restore it, or .*--restart"):
            attempt()
    _open(_run(dataset, workdir, restart=True), dataset)
    assert run_directory.read_config(str(workdir)) == _run(dataset, workdir)


def _checkpoint_files(workdir: pathlib.Path, parent: str) -> list[pathlib.Path]:
    found = [p for p in (workdir / "checkpoints").rglob("*") if p.is_file()]
    return [path for path in found if path.parent.name == parent]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "altered", "gone"])
def test_a_damaged_checkpoint_is_one_line(dataset, workdir, how):
    """In a process of its own: what Orbax leaves behind must not be on the screen either."""
    chosen = _checkpoint_files(workdir, "d")
    assert chosen
    for path in chosen:
        content = path.read_bytes()
        altered = bytes(byte ^ 0x40 if at % 97 == 50 else byte for at, byte in enumerate(content))
        path.write_bytes(altered if how == "altered" else content[: len(content) // 2])
        if how == "gone":
            path.unlink()
    found = subprocess.run(
        [sys.executable, str(REPO / "launch" / "evaluate.py"), f"--workdir={workdir}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    said = {"cut": r"has \d+ bytes", "altered": "is damaged: its XXH3", "gone": "is missing"}[how]
    assert re.search(rf"checkpoints/\d+/\S+ {said}.*--restart", found.stderr)
    assert loop.train(_run(dataset, workdir, restart=True)).epoch == 1


def test_late_reads_of_a_damaged_checkpoint_are_silent_and_nothing_else_is(tmp_path, monkeypatch):
    """What TensorStore reports when a read ends after the one that failed: a race otherwise."""
    heard: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(str(found.exc_value)))
    before = sys.unraisablehook
    with checkpoint._damage(tmp_path):
        pass
    assert sys.unraisablehook is before
    with pytest.raises(ManifestError, match="cannot be restored"), checkpoint._damage(tmp_path):
        raise OSError("gone")
    for text in ("Event loop is closed", "something new"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert heard == ["something new"]


def test_damaged_progress_is_named(dataset, workdir):
    (path,) = (workdir / "checkpoints").glob("*/manifest.json")
    path.write_text(path.read_text().replace("progress", "pr"))
    with pytest.raises(ManifestError, match=r"checkpoints/\d+/manifest\.json is damaged"):
        loop.train(_run(dataset, workdir, epochs=2))


def test_a_file_in_place_of_the_checkpoints(dataset, workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")
    with pytest.raises(ManifestError, match="checkpoints is not a directory; remove it"):
        loop.train(_run(dataset, workdir))


# --- unusual worlds, end to end -------------------------------------------------------------------


def _guided(**knobs: object) -> GuidanceConfig:
    return GuidanceConfig(guidance="pairwise", teacher="t", **knobs)


def _teach(dataset: Dataset, tmp_path: pathlib.Path, rows: str) -> None:
    (tmp_path / "answers.csv").write_text(rows)
    preferences.import_scores(
        dataset, tmp_path / "answers.csv", "t", overwrite=True, keep_training_items=True
    )


@pytest.mark.parametrize(
    "rows",
    ["user,item,score\nu0,i1,0.1\nu0,i2,0.2\n", "user,preferred,other,margin\nu0,i1,i2,0.5\n"],
    ids=["scores", "preferences"],
)
def test_a_teacher_of_one_user_is_enough(dataset, tmp_path, rows):
    own = load(shutil.copytree(dataset.path, tmp_path / "d"))
    _teach(own, tmp_path, rows)
    run = worlds.run_config(own, tmp_path / "run", **SMALL | {"guidance": _guided()})
    assert loop.train(run).status == "finished"
    assert loop.train(run).status == "finished"  # the same answers: nothing left to do
    _teach(own, tmp_path, rows.replace("i2", "i3"))
    with pytest.raises(ConfigError, match=r"--teacher: t holds other answers now.*--restart"):
        loop.train(run)
    _teach(own, tmp_path, rows)
    too_far = worlds.run_config(own, tmp_path / "far", **SMALL, guidance=_guided(min_gap=9.0))
    with pytest.raises(InputError, match=r"teacher t states no preference of --min_gap=9 or more"):
        loop.train(too_far)
    assert not (tmp_path / "far").exists()


@pytest.mark.usefixtures("eight_devices")
def test_without_validation_the_last_state_is_the_best(tmp_path):
    pairs = worlds.random_pairs(0, 8, 12, 4)
    dataset = worlds.write_dataset(
        tmp_path / "d", pairs[::2], pairs[:0], pairs[1::2], n_users=8, n_items=12
    )
    outcome = loop.train(_run(dataset, tmp_path / "run", epochs=3))
    assert (outcome.epoch, outcome.best_epoch, outcome.best_metric) == (3, 3, None)
    found = evaluate_run(str(tmp_path / "run"), "a")
    assert found.parts["test"].slices["overall"]["n"] == len(set(pairs[1::2, 0].tolist()))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(("n_users", "n_items"), [(1, 6), (6, 1)])
def test_one_user_or_one_item(tmp_path, n_users, n_items):
    pairs = [[u, i] for u in range(n_users) for i in range(n_items)]
    table = np.array(pairs)
    dataset = worlds.write_dataset(
        tmp_path / "d",
        table[2:],
        table[:1],
        table[1:2],
        n_users=n_users,
        n_items=n_items,
    )
    run = _run(dataset, tmp_path / "run")
    assert loop.train(run).status == "finished"
    assert evaluate_run(run.workdir, "a").parts["test"].slices["overall"]["n"] == 1


def test_a_metric_that_is_not_computed_is_refused_before_the_work(dataset, tmp_path):
    run = worlds.run_config(
        dataset, tmp_path / "run", **SMALL, evaluation=EvaluationConfig(ks=(5,))
    )
    with pytest.raises(UserError, match=r"unknown metric 'ndcg@10'; known: recall@5, "):
        loop.train(run)
    assert not (tmp_path / "run").exists()
