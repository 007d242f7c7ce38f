"""Guidance chosen by validation, in worlds where it is known what should be chosen."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex

import numpy as np
import pytest

import slgr_jax as sl
from slgr_jax import config, testing
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import auto, pool, results
from slgr_jax.testing import Constant, WorldConfig
from slgr_jax.training import run_directory

pytestmark = pytest.mark.usefixtures("one_device")

KNOBS = {"epochs": 6, "dim": 8, "batch_size": 256, "lr": 0.2}


def write_world(path, right, **more):
    settings = {"n_users": 400, "n_items": 60, "history_max": 12, "open_per_user": 40}
    world = WorldConfig(reliability=Constant(right), known_per_valid=0, **settings, **more)
    return testing.write(testing.simulate(world), path, lists=10)


def call(root, **more):
    return sl.train(
        root / "data", root / "run", guidance="auto", teacher="pairs", workers=1, **KNOBS, **more
    )


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A search with a perfect teacher, which has no word on what would teach a calibrated gate."""
    root = tmp_path_factory.mktemp("right")
    write_world(root / "data", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "GUIDED", ("global", "calibrated"))
        outcome = call(root, lambda_=1.0)
    return root, outcome


def values(workdir, part):
    (run,) = sl.evaluate(workdir, baselines="none").runs
    return run.parts[part].users["all"].values["ndcg@10"]


def test_a_teacher_that_is_right_is_chosen_and_is_better_on_test(right):
    root, outcome = right
    table = json.loads((root / "run" / auto.TABLE).read_text())
    assert table["chosen"] == "global_lambda1"
    none, run = root / "run" / auto.CANDIDATES / "none", root / "run"
    (row,) = [row for row in table["candidates"] if row["name"] == "global_lambda1"]
    gains = values(run, "valid") - values(none, "valid")
    assert row["gain"] == pytest.approx(gains.mean())
    assert row["p"] == pytest.approx(auto.significance.max_sign_flip(gains[:, None])[0])
    assert outcome.status == "finished"
    assert outcome.best_metric == row["valid"] == pytest.approx(values(run, "valid").mean())
    test_gains = values(run, "test") - values(none, "test")
    assert test_gains.mean() > 3 * test_gains.std() / np.sqrt(test_gains.size)


def test_what_could_not_be_trained_is_said(right):
    table = json.loads((right[0] / "run" / auto.TABLE).read_text())
    (reason,) = table["failed"].values()
    assert "no word on any" in reason
    assert "calibrated_lambda1" in table["failed"]


def test_the_run_is_the_candidate_and_its_command_makes_it(right):
    run = right[0] / "run"
    kept = run_directory.read_config(str(run))
    there = run_directory.read_config(str(run / auto.CANDIDATES / "global_lambda1"))
    assert kept == dataclasses.replace(there, workdir=str(run))
    assert (kept.guidance.guidance, kept.gate.gate, kept.guidance.weight) == (
        "pairwise", "constant", 1.0,
    )  # fmt: skip
    *_, last = str(auto.read(run)).splitlines()
    words = shlex.split(last.removeprefix("train it directly: "))
    assert words[:2] == ["slgr", "train"]
    knobs = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    assert knobs.pop("workdir") == "RUN"
    words_of = ("data", "guidance", "gate", "teacher")
    typed = {
        name: value if name in words_of else json.loads(value) for name, value in knobs.items()
    }
    assert config.make_run(workdir=str(run), **typed) == kept
    # Only the run without guidance is kept beside it, to be compared with.
    assert [path.parts[-3] for path in run.glob("candidates/*/checkpoints/*")] == ["none"]


def refuse(run):
    raise AssertionError(f"trains {run.workdir}")


def test_a_finished_search_does_nothing(right, monkeypatch, caplog):
    root, outcome = right
    monkeypatch.setattr(pool, "fit", refuse)
    caplog.set_level("INFO", "slgr_jax")
    again = call(root, lambda_=1.0)
    assert dataclasses.replace(again, seconds=outcome.seconds) == outcome
    assert "chosen already, nothing to do" in caplog.text


def test_another_search_or_a_run_is_not_overwritten(right, tmp_path):
    root, _ = right
    with pytest.raises(ConfigError, match=r"other settings \(lambda: 1.0 -> None\); choose ano"):
        call(root)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "data").symlink_to(root / "data")
    with pytest.raises(ConfigError, match=r"holds a run that --guidance=auto did not begin"):
        call(tmp_path)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_the_kept_run_goes_on_as_any_run(right):
    root, _ = right
    knobs = {"guidance": "pairwise", "gate": "constant", "teacher": "pairs", "lambda_": 1.0}
    outcome = sl.train(root / "data", root / "run", **knobs, **KNOBS)
    assert (outcome.status, outcome.epoch) == ("finished", 6)


def test_a_random_teacher_is_left_also_after_an_interruption(tmp_path, monkeypatch):
    write_world(tmp_path / "data", 0.5)
    monkeypatch.setattr(auto, "GUIDED", ("global",))
    begun, fit = [], pool.fit

    def interrupted(run):
        if begun:
            raise KeyboardInterrupt
        begun.append(pathlib.Path(run.workdir).name)
        fit(run)

    monkeypatch.setattr(pool, "fit", interrupted)
    assert call(tmp_path, lambda_=0.1).status == "interrupted"
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(pool, "fit", lambda run: (begun.append(pathlib.Path(run.workdir).name),
                                                  fit(run)))  # fmt: skip
    assert call(tmp_path, lambda_=0.1).status == "finished"
    assert begun == ["none", "global_lambda0.1"]
    found = auto.read(tmp_path / "run")
    assert found.chosen == "none"
    assert "no more than noise, so no guidance" in found.why
    assert "--guidance" not in found.command.replace("--guidance=none", "")
    kept = run_directory.read_config(str(tmp_path / "run"))
    assert kept == dataclasses.replace(
        run_directory.read_config(str(tmp_path / "run" / auto.CANDIDATES / "none")),
        workdir=str(tmp_path / "run"),
    )
    assert not kept.guided


# --- without training -----------------------------------------------------------------------------


def make_plan(data, workdir, teacher="pairs", **knobs):
    given = {"guidance": "auto", "teacher": teacher, **knobs}
    return auto.make_plan(str(data), pathlib.Path(workdir), given)


def test_lists_are_learned_as_lists_and_against_hard_negatives_where_they_are_free(right, tmp_path):
    data = right[0] / "data"
    assert {c.arm for c in make_plan(data, tmp_path).candidates()} == {"none", *auto.GUIDED}
    plan = make_plan(data, tmp_path, "lists", seed=4, min_gap=0.5)
    names = [c.name for c in plan.candidates()]
    assert names[-2:] == ["hard_negatives_lambda1", "hard_negatives_lambda5"]
    assert len(names) == 1 + 2 * len(auto.GUIDED) + 2 * len(auto.FREE_LISTS)
    whole, gated = (
        plan.run(c) for c in plan.candidates() if c.weight == 5.0 and c.arm.startswith("rrd")
    )
    assert (whole.guidance.guidance, whole.gate.gate) == ("rrd", "constant")
    assert (gated.guidance.guidance, gated.gate.gate) == ("rrd", "calibrated")
    run = plan.run(plan.candidates()[-1])
    assert run.reference_runs == (str(tmp_path / "candidates" / "none"),)
    assert (run.pairwise.hard_negatives, run.guidance_loss_name) == (100, "gain")
    assert (run.train.seed, run.guidance.min_gap) == (4, 0.5)
    again = plan.run(dataclasses.replace(plan.candidates()[-1], again=True))
    assert again.reference_runs == (str(tmp_path / "candidates" / "none_next_seed"),)
    assert again.train.seed == 5
    none = plan.run(plan.candidates()[0])
    assert not none.guided
    assert none.guidance.min_gap == 0.0


def against_none(arm, gain, p):
    return auto.Tested(auto.Candidate(arm, 1.0), 0.5 + gain, gain, p)


def test_the_best_of_those_beyond_noise_is_chosen():
    lucky, sure, surer = (
        against_none("a", 0.3, 0.2),
        against_none("b", 0.2, 0.04),
        against_none("c", 0.1, 0.001),
    )
    assert auto.choose([lucky, sure, surer]) == sure
    assert auto.choose([lucky]) is None
    assert auto.choose([]) is None


def test_a_gain_that_the_next_seed_does_not_have_is_not_kept(right, tmp_path, monkeypatch):
    plan = make_plan(right[0] / "data", tmp_path, **{"lambda": 1.0})

    def pretend(runs, *, workers, root):
        for run in runs:
            write = pathlib.Path(run.workdir)
            write.mkdir(parents=True, exist_ok=True)
            (write / "config.json").write_text("{}")
            results.write_json(write / results.OUTCOME, {"best_metric": 0.5, "error": None})

    def user_values(run):
        rng = np.random.default_rng(run.train.seed)
        gain = 0.5 if run.guided and run.train.seed == 0 else 0.0
        return rng.random(50) + gain + 0.01 * rng.standard_normal(50)

    monkeypatch.setattr(pool, "train_runs", pretend)
    monkeypatch.setattr(auto, "_user_values", user_values)
    results.write_json(tmp_path / auto.TABLE, {"asked": {}})
    auto._search(plan, 1, lambda: None)
    table = results.read_json(tmp_path / auto.TABLE)
    assert min(row["p"] for row in table["candidates"][1:]) < 0.001
    assert table["next_seed"]["p"] > auto.LEVEL
    assert table["chosen"] == "none"
    assert table["why"].endswith("no more than noise, so no guidance")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gate": "paper"}, "auto chooses gate and loss itself: drop --gate=paper, or name"),
        ({"guidance_loss": "hinge", "reference_runs": "r"}, "drop --guidance_loss=hinge, --ref"),
        ({"rrd_pool": 9}, "drop --rrd_pool=9"),
        ({"teacher": ""}, "--guidance=auto needs --teacher=NAME"),
        ({"layers": 3}, "--layers=3 is not used with --backbone=mf"),
        ({"teacher": "nobody"}, "nobody"),
    ],
)
def test_what_contradicts_the_search_is_refused(right, tmp_path, knobs, message):
    with pytest.raises(sl.errors.UserError, match=message):
        sl.train(right[0] / "data", tmp_path, **{"guidance": "auto", "teacher": "pairs"} | knobs)
    assert not list(tmp_path.iterdir())


def test_auto_is_for_train_and_an_arm_of_comparisons(right, tmp_path):
    data = right[0] / "data"
    with pytest.raises(ConfigError, match="choice among runs, which slgr train alone makes"):
        sl.tune(data, tmp_path, "lr=0.01..0.1", guidance="auto", teacher="pairs")
    with pytest.raises(ConfigError, match="guidance is set by the arms of a comparison"):
        sl.compare(data, tmp_path, teacher="pairs", search="guidance=auto|none")
    with pytest.raises(ConfigError, match="--workers=2 is not used for one run"):
        sl.train(data, tmp_path, workers=2)
    with pytest.raises(ConfigError, match="auto is there already"):
        sl.register_guidance("auto", lambda *_: None)
