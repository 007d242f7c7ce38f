"""Seeds trained as one program against each trained alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.errors import ConfigError, NonFiniteError
from slgr_jax.training import (
    build,
    checkpoint,
    epochs,
    loop,
    multi_seed,
    programs,
    restore,
    run_directory,
)
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
    "dim": 8,
    "batch_size": 32,
    "epochs": 12,
    "patience": 2,
    "steps_per_dispatch": 3,
    "kernels": "xla",
    "checkpoint_every_s": 1e9,
}
GUIDED = {
    "guidance": "pairwise",
    "teacher": "llm",
    "gate": "calibrated",
    "gate_inputs": "history,popularity",
    "lambda": 0.3,
    "lr": 0.3,
}
SASREC = {
    "backbone": "sasrec",
    "lr": 0.02,
    "dropout": 0.2,
    "max_history": 6,
    "layers": 1,
    "hidden": 8,
    "epochs": 4,
    "patience": 1,
}


def _dataset(path: pathlib.Path):
    """A small world with a teacher that scores ten items of every user."""
    dataset = worlds.random_dataset(path)
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(40), 10)
    items = np.concatenate([rng.choice(30, 10, replace=False) for _ in range(40)])
    worlds.teach(dataset, users, items, rng.random(400), name="llm")
    return dataset


def _runs(dataset, root: pathlib.Path, seeds=(0, 1, 2), **knobs: object) -> list[config.RunConfig]:
    made = SMALL | knobs
    return [
        config.make_run(str(dataset.path), str(root / f"s{seed}"), **made | {"seed": seed})
        for seed in seeds
    ]


def _log(run: config.RunConfig) -> list[dict[str, float]]:
    lines = (pathlib.Path(run.workdir) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in ("time", "triples_per_s")} for r in records]


def _assert_close(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def _assert_as_alone(alone: list[config.RunConfig], group: list[config.RunConfig]) -> None:
    """Train both; compare everything that a run leaves."""
    expected = [loop.train(run) for run in alone]
    found = multi_seed.train_seeds(group)
    for one, other, by_itself, together in zip(alone, group, expected, found, strict=True):
        for name in ("status", "epoch", "step", "best_epoch"):
            assert getattr(together, name) == getattr(by_itself, name)
        assert together.best_metric == pytest.approx(by_itself.best_metric, abs=1e-5)
        logs = _log(one), _log(other)
        assert len(logs[0]) == len(logs[1]) == by_itself.epoch
        for left, right in zip(*logs, strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
        for which in ("best", "last"):
            left, right = (restore.restore_run(run.workdir, which).serving for run in (one, other))
            _assert_close(left, right)
        files = [pathlib.Path(run.workdir) / "run.json" for run in (one, other)]
        records = [json.loads(file.read_text()) for file in files]
        assert records[0] == records[1]
        assert run_directory.read_config(other.workdir) == other
    assert len({one.epoch for one in found}) > 1, "the seeds should stop at different epochs"


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param(GUIDED, id="calibrated mf"),
        pytest.param(SASREC, id="sasrec", marks=pytest.mark.slow),
    ],
)
def test_seeds_together_are_the_seeds_alone(tmp_path, knobs):
    dataset = _dataset(tmp_path / "d")
    _assert_as_alone(
        _runs(dataset, tmp_path / "alone", **knobs), _runs(dataset, tmp_path / "group", **knobs)
    )


def test_initial_states_are_those_of_the_seeds_to_the_bit(tmp_path):
    """Steps too small to change a float32 leave the tables as they began."""
    dataset = _dataset(tmp_path / "d")
    still = {"table_optimizer": "sgd", "lr": 1e-30, "l2": 0.0, "epochs": 1}
    group = _runs(dataset, tmp_path, (3, 8), **still)
    multi_seed.train_seeds(group)
    for run in group:
        trainer = build.build(run, dataset).trainer
        saved = checkpoint.Checkpoints(run.workdir, writable=False)
        last = saved.restore_state(state_lib.abstract_state(trainer))
        saved.close()
        expected = state_lib.init_state(trainer, run.train.seed)
        for name, table in expected.tables.items():
            np.testing.assert_array_equal(last.tables[name], table)


def _stamps(run: config.RunConfig) -> dict[str, int]:
    """When each file of training was written; a directory's opening rewrites config.json."""
    root = pathlib.Path(run.workdir)
    files = [*root.glob("checkpoints/**/*"), root / "log.jsonl", root / "run.json"]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_a_call_goes_on_where_runs_are_over_and_starts_the_others_over(tmp_path, monkeypatch):
    dataset = _dataset(tmp_path / "d")
    knobs = {"lr": 0.3, "patience": 1}
    whole = _runs(dataset, tmp_path / "whole", **knobs)
    expected = multi_seed.train_seeds(whole)
    over = min(range(3), key=lambda seed: expected[seed].epoch)
    first = expected[over].epoch
    assert sum(outcome.epoch > first for outcome in expected), "one ends before another"

    group, real = _runs(dataset, tmp_path / "killed", **knobs), epochs.close_epoch

    def kill(trainer, progress, metrics, seconds):
        if progress.epoch == first:  # the round after the first one ended
            raise KeyboardInterrupt
        return real(trainer, progress, metrics, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "close_epoch", kill)
        with pytest.raises(KeyboardInterrupt):
            multi_seed.train_seeds(group)
    before = _stamps(group[over])
    assert any("checkpoints" in path for path in before)
    # One seed at a time, as where no more fit: the same numbers again.
    again = multi_seed.train_seeds(group, together=1)
    assert _stamps(group[over]) == before
    for seed in range(3):
        logs = [_log(run) for run in (whole[seed], group[seed])]
        assert len(logs[0]) == len(logs[1])
        for left, right in zip(*logs, strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
        for name in ("status", "epoch", "step", "best_epoch"):
            assert getattr(again[seed], name) == getattr(expected[seed], name)
    # More epochs: what is saved goes on, alone.
    more = _runs(dataset, tmp_path / "killed", **knobs | {"patience": 0, "epochs": 13})[over]
    assert multi_seed.train_seeds([more])[0].epoch == 13
    assert [record["epoch"] for record in _log(more)] == list(range(1, 14))


def test_a_nan_names_its_seed(tmp_path, monkeypatch):
    real = programs._make_init

    def poisoned(trainer, initial):
        init = real(trainer, initial)

        def make(seed):
            state = init(seed)
            if seed != 8:
                return state
            users = state.tables["user"].at[:, 0].set(np.nan)
            return state.replace(tables=state.tables | {"user": users})

        return make

    monkeypatch.setattr(programs, "_make_init", poisoned)
    group = _runs(_dataset(tmp_path / "d"), tmp_path, (3, 8, 1))
    with pytest.raises(NonFiniteError, match=r"^seed 8 \(.*s8\): step 0: tables/user.* not finite"):
        multi_seed.train_seeds(group)


def test_seeds_that_fit_halves_until_they_do(tmp_path, monkeypatch):
    """A program of n seeds that takes 1000 + 100 n, and the best states: 4 bytes a number."""
    dataset = _dataset(tmp_path / "d")
    (run,) = _runs(dataset, tmp_path, (0,))
    experiment = build.build(run, dataset)
    best = 4 * (40 + 30) * 8
    tried = []

    @dataclasses.dataclass
    class Compiled:
        seeds: int

        def memory_analysis(self):
            return self

        @property
        def temp_size_in_bytes(self):
            return 100 * self.seeds

        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 1000, 600, 600

    def compiled(trainer, arrays, seeds):
        tried.append(seeds)
        return Compiled(seeds)

    monkeypatch.setattr(multi_seed, "_compile", compiled)

    def fit(most, limit):
        tried.clear()
        seeds, _ = multi_seed.seeds_that_fit(experiment.trainer, experiment.arrays, most, limit)
        return seeds, list(tried)

    assert fit(7, None) == (7, [7])
    assert fit(7, 1000 + 7 * (100 + best)) == (7, [7])
    assert fit(7, 1000 + 7 * (100 + best) - 1) == (4, [7, 4])
    assert fit(7, 1000 + 2 * (100 + best)) == (2, [7, 4, 2])
    assert fit(7, 0) == (1, [7, 4, 2, 1])


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    dataset = _dataset(tmp_path / "d")
    one, two = _runs(dataset, tmp_path, (0, 1))
    assert multi_seed.train_seeds([]) == []
    (other,) = _runs(dataset, tmp_path, (2,), lr=0.5)
    with pytest.raises(ConfigError, match=r"s0 and .*s2 differ in .* \(--lr: .* -> 0.5\)"):
        multi_seed.train_seeds([one, two, other])
    moved = dataclasses.replace(two, data=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"--data: .*/d -> .*/elsewhere"):
        multi_seed.train_seeds([one, moved])
    with pytest.raises(ConfigError, match=r"2 runs have --workdir=.*/s0; give"):
        multi_seed.train_seeds([one, dataclasses.replace(two, workdir=one.workdir)])
    native = _runs(dataset, tmp_path, (0, 1), kernels="native")
    with pytest.raises(ConfigError, match=r"--kernels=native: seeds .* use --kernels=xla or auto"):
        multi_seed.train_seeds(native)
    assert not (tmp_path / "s0").exists()
