"""`slgr tune`: validation alone, repeatable across kills, pruned early, errors that are errors."""

from __future__ import annotations

import math
import pathlib
import types

import pytest
import worlds

import slgr_jax as sl
from slgr_jax import config
from slgr_jax.config import config_file
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import pool, results, study
from slgr_jax.training import checkpoint, checkpoint_manifest, run_directory, training_log
from slgr_jax.training.training_log import TrainingProgress

optuna = pytest.importorskip("optuna", reason="needs the extra tune")
pytest.importorskip("tomli_w", reason="needs the extra tune")

SEARCH = "lr=1e-3..1e-1:log,dim=8|16|64"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return worlds.random_dataset(tmp_path_factory.mktemp("world") / "d")


def _value(run):
    """The best validation of a trial without training: greatest at lr 0.02, little noise by dim."""
    return math.exp(-(math.log(run.optimizer.lr / 0.02) ** 2)) + run.model.dim / 1000


@pytest.fixture
def trained(monkeypatch):
    """(workdir's trial, epoch) of every validation, in a stead of training that takes no time."""
    seen = []

    def fit(run):
        told = training_log._LISTENER.get()
        for epoch in range(1, run.train.epochs + 1):
            value = _value(run) * epoch / run.train.epochs
            seen.append((pathlib.Path(run.workdir).parent.name, epoch))
            if told is not None:
                metrics = {"epoch": epoch, "valid/ndcg@10": value}
                told(TrainingProgress(run.workdir, epoch, run.train.epochs, metrics))
        outcome = {"best_metric": value, "best_epoch": epoch, "error": None}
        results.write_json(pathlib.Path(run.workdir) / results.OUTCOME, outcome)

    monkeypatch.setattr(pool, "fit", fit)
    monkeypatch.setattr(pool, "finished", lambda run: False)
    return seen


def _tune(data, out, **more):
    knobs = {"trials": 12, "epochs": 4, "pruner": "none"} | more
    return sl.tune(data.path, out, knobs.pop("search", SEARCH), **knobs)


def _trials(result):
    return {(t.state, t.value, tuple(t.settings.items())) for t in result.trials}


def _stored(out):
    backend = optuna.storages.journal.JournalFileBackend(str(out / study.STORE))
    return optuna.load_study(study_name=study.NAME, storage=optuna.storages.JournalStorage(backend))


# --- real training ----------------------------------------------------------------------------


def test_a_small_study_ends_with_settings_that_train_again(data, tmp_path):
    out = tmp_path / "study"
    knobs = {"search": "lr=0.01..0.5:log", "dim": 8, "batch_size": 64, "epochs": 2}
    result = _tune(data, out, trials=2, kernels="xla", patience=0, **knobs)
    assert len(result.trials) == 2
    values = [trial.value for trial in result.trials]
    assert values == sorted(values, reverse=True)
    for trial in result.trials:
        workdir = pathlib.Path(trial.directory) / "seed0"
        assert trial.value == max(record["valid/ndcg@10"] for record in results.log(workdir))
        assert not (workdir / "metrics.json").exists()  # the test part was not read
        kept = checkpoint_manifest.steps_in(workdir / checkpoint.DIRECTORY)
        assert bool(kept) == (trial == result.best)

    found = config_file.read(str(out / "best.toml"))
    assert found.pop("data") == str(data.path)
    workdir = pathlib.Path(result.best.directory) / "seed0"
    run = config.make_run(str(data.path), str(workdir), **found)
    assert run == run_directory.read_config(str(workdir))
    text = str(result)
    assert f"slgr train --config={out}/best.toml --workdir=RUN" in text
    assert f"slgr evaluate --workdir={workdir}" in text


@pytest.mark.slow
def test_two_jobs_do_all_trials_between_them(data, tmp_path):
    knobs = {"batch_size": 64, "epochs": 1, "kernels": "xla"}
    result = _tune(data, tmp_path / "s", trials=3, jobs=2, search="lr=0.01..0.5:log", **knobs)
    assert sorted(trial.number for trial in result.trials) == [0, 1, 2]
    assert len({trial.settings["lr"] for trial in result.trials}) == 3


# --- the search -------------------------------------------------------------------------------


def test_the_first_trial_has_the_defaults_and_later_ones_are_better(data, tmp_path, trained):
    result = _tune(data, tmp_path / "s", trials=20)
    (default,) = [trial for trial in result.trials if trial.default]
    assert (default.number, default.settings) == (0, {"lr": 0.05, "dim": 64})
    assert result.best.value > default.value + 0.3
    assert result.best.value > 0.95
    for trial in result.trials:
        run = config.make_run("d", "w", **trial.settings)
        assert trial.value == pytest.approx(_value(run))


def test_a_study_that_is_killed_and_called_again_is_the_one_that_was_not(
    data, tmp_path, trained, monkeypatch
):
    whole = _tune(data, tmp_path / "whole")
    fit, calls = pool.fit, []

    def killed(run):
        calls.append(run.workdir)
        if len(calls) in (1, 5):
            raise SystemError("killed")
        fit(run)

    monkeypatch.setattr(pool, "fit", killed)
    for _ in range(2):
        with pytest.raises(SystemError, match="killed"):
            _tune(data, tmp_path / "parts")
        # What kill -9 leaves in the middle of a write.
        journal = tmp_path / "parts" / study.STORE
        journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')
        journal.with_name(f"{study.STORE}.lock").symlink_to(journal)
    parts = _tune(data, tmp_path / "parts", trials=8)
    assert len(parts.trials) == 8
    parts = _tune(data, tmp_path / "parts")
    assert _trials(parts) == _trials(whole)
    assert calls[0] == calls[1]  # tried again where it was, to go on from its checkpoint
    assert calls[4] == calls[5]
    stored = _stored(tmp_path / "parts")
    states = [trial.state.name for trial in stored.trials]
    assert states.count("FAIL") == 2
    assert states.count("COMPLETE") == 12


def test_what_never_ends_is_given_up(data, tmp_path, trained, monkeypatch, caplog):
    fit = pool.fit

    def killed(run):
        if run.workdir.endswith("0000/seed0"):
            raise SystemError("killed")
        fit(run)

    monkeypatch.setattr(pool, "fit", killed)
    for _ in range(3):
        with pytest.raises(SystemError, match="killed"):
            _tune(data, tmp_path / "s", trials=2)
    assert len(_tune(data, tmp_path / "s", trials=2).trials) == 2
    assert "is given up" in caplog.text


def test_another_seed_of_the_sampler_is_another_search(data, tmp_path, trained):
    first, again, other = (
        _trials(_tune(data, tmp_path / name, trials=4, sampler_seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert len(first & other) == 1  # the defaults


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning_stops_bad_trials_early(data, tmp_path, trained, pruner):
    result = _tune(data, tmp_path / "s", trials=20, pruner=pruner, prune_after=2, epochs=8)
    epochs = {name: max(e for n, e in trained if n == name) for name, _ in trained}
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned
    for trial in result.trials:
        stopped = epochs[pathlib.Path(trial.directory).name]
        assert stopped == 8 if trial.state == "complete" else 2 <= stopped < 8
        assert trial.epoch == stopped


def test_a_repeated_trial_knows_what_was_reported(data, tmp_path, trained, monkeypatch):
    fit, stop = pool.fit, [True]

    def killed_at_3(run):
        if stop and (told := training_log._LISTENER.get()):
            for epoch in (1, 2):
                metrics = {"epoch": epoch, "valid/ndcg@10": 0.125 * epoch}
                told(TrainingProgress(run.workdir, epoch, 4, metrics))
            stop.clear()
            raise SystemError("killed")
        fit(run)

    monkeypatch.setattr(pool, "fit", killed_at_3)
    with pytest.raises(SystemError):
        _tune(data, tmp_path / "s", trials=1)
    _tune(data, tmp_path / "s", trials=1)
    stored = _stored(tmp_path / "s")
    values = stored.trials[1].intermediate_values
    assert (values[1], values[2], sorted(values)) == (0.125, 0.25, [1, 2, 3, 4])


def test_several_seeds_are_averaged(data, tmp_path, trained, monkeypatch):
    values = {7: 0.25, 8: 0.75}

    def fit(run):
        outcome = {"best_metric": values[run.train.seed], "best_epoch": 1, "error": None}
        results.write_json(pathlib.Path(run.workdir) / results.OUTCOME, outcome)

    monkeypatch.setattr(pool, "fit", fit)
    result = _tune(data, tmp_path / "s", trials=2, seeds=2, seed=7)
    assert [trial.value for trial in result.trials] == [0.5, 0.5]
    assert config_file.read(str(result.config_file))["seed"] == 7


# --- what goes wrong --------------------------------------------------------------------------


def _diverging(run):
    outcome = {"best_metric": None, "best_epoch": None, "error": "loss is nan"}
    results.write_json(pathlib.Path(run.workdir) / results.OUTCOME, outcome)


def test_a_trial_that_diverges_is_the_worst_and_not_the_end(data, tmp_path, trained, monkeypatch):
    fit = pool.fit
    monkeypatch.setattr(pool, "fit", lambda r: (_diverging if r.optimizer.lr > 0.03 else fit)(r))
    result = _tune(data, tmp_path / "s")
    diverged = [trial for trial in result.trials if trial.state == "diverged"]
    assert diverged == list(result.trials[-len(diverged) :])
    assert {trial.settings["lr"] > 0.03 for trial in diverged} == {True}

    monkeypatch.setattr(pool, "fit", _diverging)
    with pytest.raises(ConfigError, match="none of 3 trials came to a value"):
        _tune(data, tmp_path / "none", trials=3)


def test_an_error_of_the_data_ends_the_study_with_it(data, tmp_path, trained, monkeypatch):
    fit = pool.fit

    def broken(run):
        raise ConfigError("shard 3 is damaged")

    monkeypatch.setattr(pool, "fit", broken)
    with pytest.raises(ConfigError, match="shard 3 is damaged"):
        _tune(data, tmp_path / "s")
    monkeypatch.setattr(pool, "fit", fit)
    assert len(_tune(data, tmp_path / "s").trials) == 12


def test_another_study_in_the_directory_is_refused(data, tmp_path, trained):
    _tune(data, tmp_path / "s", trials=2)
    with pytest.raises(ConfigError, match=r"other settings \(epochs: 4 -> 5\); choose another"):
        _tune(data, tmp_path / "s", epochs=5)
    with pytest.raises(ConfigError, match=r"search lr: 0.001..0.1:log -> not given"):
        _tune(data, tmp_path / "s", search="dim=8|16|64")
    assert len(_tune(data, tmp_path / "s", trials=1, jobs=1).trials) == 2


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"search": "lr=0..1"}, "--lr=0.0 must be greater than 0"),
        ({"search": "backbone=mf|sasrec", "rating_threshold": 3.0}, "--rating_threshold=3 labels"),
        ({"restart": True}, "--restart is for one run"),
        ({"refit": "RUN"}, "--refit is of a run that was tuned"),
        ({"trials": 0}, "--trials=0 is below its minimum 1"),
        ({"sampler": "grid"}, "--sampler='grid' is not one of: tpe, random"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(data, tmp_path, trained, knobs, message):
    with pytest.raises(ConfigError, match=message):
        _tune(data, tmp_path / "s", **knobs)
    assert not (tmp_path / "s").exists()
    assert trained == []


def test_no_validation_part_is_said(data, tmp_path):
    pairs = worlds.random_pairs(0, 10, 10, 4)
    bare = worlds.write_dataset(tmp_path / "d", pairs, pairs[:0], pairs[:0], n_users=10, n_items=10)
    with pytest.raises(ConfigError, match="no validation part: nothing to tune on"):
        _tune(bare, tmp_path / "s")


def test_a_timeout_begins_no_more_trials(data, tmp_path, trained, monkeypatch):
    ticks = iter(range(100))
    clock = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(study, "time", clock)
    assert len(_tune(data, tmp_path / "s", timeout=3.0).trials) == 2
