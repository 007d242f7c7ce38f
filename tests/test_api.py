"""The Python API: light to import, typed knobs, the numbers of the commands, no side effects."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from absl import flags as absl_flags

import slgr_jax as sl
from slgr_jax import config
from slgr_jax.config import RunConfig, knobs
from slgr_jax.config.keywords import knob_values
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")

REPO = pathlib.Path(__file__).resolve().parents[1]
SMALL = {"epochs": 2, "batch_size": 32, "dim": 8}
HEAVY = {"jax", "numpy", "pyarrow", "scipy", "matplotlib", "absl"}


# --- importing --------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, slgr_jax\n"
        "assert callable(slgr_jax.train)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert shown.stdout == "[]\n"


def test_every_name_of_the_package_has_a_docstring():
    for name in sl.__all__:
        assert len(getattr(sl, name).__doc__) > 100, name


# --- keyword arguments ------------------------------------------------------------------------


RUN = tuple(config.sections().values())


@pytest.mark.parametrize(
    ("knobs", "values"),
    [
        ({"lambda_": 1}, {"lambda": 1.0}),
        ({"lambda": 0.5}, {"lambda": 0.5}),
        ({"ks": [5, 10]}, {"ks": (5, 10)}),
        ({"mlp": range(3, 5)}, {"mlp": (3, 4)}),
        ({"epochs": np.int64(3)}, {"epochs": 3}),
        ({"lr": np.float32(0.5)}, {"lr": 0.5}),
        ({"gate_inputs": ["history", "teacher"]}, {"gate_inputs": "history,teacher"}),
        (
            {"reference_runs": [pathlib.Path("a"), pathlib.Path("b")]},
            {"reference_runs": "a,b"},
        ),
        ({"teacher": pathlib.Path("t")}, {"teacher": "t"}),
        ({"restart": True}, {"restart": True}),
    ],
)
def test_keyword_arguments_become_knobs_of_their_type(knobs, values):
    typed = knob_values(RUN, knobs)
    assert typed == values
    assert [type(value) for value in typed.values()] == [type(v) for v in values.values()]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epoch": 3}, "no knob is called 'epoch'; did you mean epochs"),
        ({"zzz": 3}, "no knob is called 'zzz'$"),
        ({"epochs": "3"}, "--epochs='3' is of type str, not of type int"),
        ({"epochs": 3.0}, "--epochs=3.0 is of type float, not of type int"),
        ({"epochs": True}, "--epochs=True is of type bool, not of type int"),
        ({"restart": 1}, "--restart=1 is of type int, not of type bool"),
        ({"ks": 10}, "--ks=10 is of type int, not a list"),
        ({"ks": "10,20"}, "--ks='10,20' is of type str, not a list"),
        ({"ks": [10, 0.5]}, "--ks=0.5 is of type float, not of type int"),
        ({"backbone": None}, "--backbone=None is of type NoneType, not of type str"),
    ],
)
def test_a_wrong_keyword_argument_is_named_with_its_type(knobs, message):
    with pytest.raises(ConfigError, match=message):
        knob_values(RUN, knobs)


def test_each_function_refuses_what_is_no_knob_of_it(tmp_path):
    for call in (
        lambda: sl.prepare(source="csv", input="x", out=tmp_path / "d", epochs=3),
        lambda: sl.import_teacher(tmp_path, "x", "t", epochs=3),
        lambda: sl.train(tmp_path, tmp_path / "run", user_core=3),
        lambda: sl.evaluate(tmp_path, epochs=3),
        lambda: sl.compare(tmp_path, tmp_path / "out", user_core=3),
    ):
        with pytest.raises(ConfigError, match=r"no knob is called '(epochs|user_core)'"):
            call()
    assert not list(tmp_path.iterdir())


# --- from files to a result -------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 20 users and a teacher that were made through the API."""
    root = tmp_path_factory.mktemp("api")
    pairs = worlds.random_pairs(0, n_users=20, n_items=15, per_user=8)
    rows = [f"u{user},i{item},{1_000 + k}" for k, (user, item) in enumerate(pairs.tolist())]
    (root / "log.csv").write_text("user,item,timestamp\n" + "\n".join(rows), "utf-8")
    manifest = sl.prepare(
        source="csv", input=root / "log.csv", out=root / "data", split="leave_last"
    )
    assert manifest.counts["users"] == 20
    assert manifest.counts["train"] == 20 * 6

    rng = np.random.default_rng(1)
    scores = [
        f"u{user},i{item},{rng.random():.3f}"
        for user in range(20)
        for item in np.unique(pairs[:, 1])[:6]
    ]
    (root / "llm.csv").write_text("user,item,score\n" + "\n".join(scores), "utf-8")
    teacher = sl.import_teacher(
        root / "data",
        root / "llm.csv",
        "llm",
        model="some-llm",
        training_items="none",
        keep_training_items=True,
    )
    assert (teacher.model, teacher.training_items) == ("some-llm", "none")
    return root


def _untouched():
    """What a library must leave as it was."""
    root, ours = logging.getLogger(), logging.getLogger("slgr_jax")
    return (
        dict(os.environ),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        (list(root.handlers), root.level),
        (list(ours.handlers), ours.level, ours.propagate),
        {name for name in absl_flags.FLAGS if "orbax" not in name},  # Orbax has flags of its own
        jax.config.jax_compilation_cache_dir,
        os.getcwd(),
    )


def test_training_prints_nothing_and_leaves_the_process_as_it_was(prepared, tmp_path, capfd):
    before = _untouched()
    outcome = sl.train(prepared / "data", tmp_path / "run", **SMALL)
    assert _untouched() == before
    assert capfd.readouterr() == ("", "")
    assert (outcome.status, outcome.epoch) == ("finished", 2)


def test_training_is_the_run_that_its_knobs_describe(prepared, tmp_path, caplog):
    knobs = {**SMALL, "guidance": "pairwise", "teacher": "llm", "lambda_": 0.25, "ks": [5, 10]}
    heard = []

    def progress(event):
        assert float(jnp.asarray(3.0) + 1) == 4.0  # a callback may use JAX as it likes
        heard.append(event)

    with caplog.at_level(logging.INFO, logger="slgr_jax"):
        outcome = sl.train(prepared / "data", tmp_path / "run", progress=progress, **knobs)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("starting: mf on log, 20 users x")
    assert [line.split()[1] for line in lines[1:]] == ["1", "2"]

    # The same run through the library's own entry, in another directory.
    del knobs["lambda_"]
    knobs |= {"lambda": 0.25, "ks": (5, 10)}
    run = config.make_run(str(prepared / "data"), str(tmp_path / "same"), **knobs)
    same = loop.train(run)
    assert outcome.best_metric == same.best_metric
    assert (outcome.epoch, outcome.step) == (same.epoch, same.step)

    validations = [event.metrics for event in heard if event.metrics]
    assert [metrics["epoch"] for metrics in validations] == [1, 2]
    assert max(m["valid/ndcg@10"] for m in validations) == outcome.best_metric
    assert [event.step for event in heard] == sorted(event.step for event in heard)
    assert {event.total for event in heard} == {outcome.step}
    assert {event.workdir for event in heard} == {str(tmp_path / "run")}


def test_what_the_callback_raises_ends_training(prepared, tmp_path):
    def progress(event):
        if event.metrics:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.train(prepared / "data", tmp_path / "run", progress=progress, **SMALL)
    # What comes after says nothing to it any more, and trains to the end.
    assert sl.train(prepared / "data", tmp_path / "run", **SMALL).epoch == 2


def test_evaluation_has_the_numbers_of_validation_and_of_the_files(prepared, tmp_path, capfd):
    outcome = sl.train(prepared / "data", tmp_path / "run", **SMALL)
    evaluation = sl.evaluate(tmp_path / "run", baselines=["popular", "ease"])
    assert [run.label for run in evaluation.runs] == ["run", "popular", "ease"]
    valid = evaluation.runs[0].parts["valid"].slices["overall"]
    assert valid["ndcg@10"] == pytest.approx(outcome.best_metric, abs=1e-6)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    test = evaluation.runs[0].parts["test"].slices["overall"]
    assert written["test"]["overall"]["ndcg@10"] == pytest.approx(test["ndcg@10"])
    assert capfd.readouterr() == ("", "")

    assert str(evaluation) == evaluation.table()
    assert "test: full ranking" in str(evaluation)
    assert "popularity<=" in evaluation.table(bins=True)
    assert "popularity<=" not in evaluation.table()
    assert evaluation.draw() == tmp_path / "run" / "metrics.png"


def test_an_unfinished_run_is_said_to_be(prepared, tmp_path, caplog):
    sl.train(prepared / "data", tmp_path / "run", **SMALL)
    with caplog.at_level(logging.WARNING, logger="slgr_jax"):
        sl.evaluate(tmp_path / "run", baselines="none")
        assert not caplog.records
        more = knobs.from_json(RunConfig, (tmp_path / "run" / "config.json").read_text(), "config")
        more = dataclasses.replace(more, train=dataclasses.replace(more.train, epochs=9))
        (tmp_path / "run" / "config.json").write_text(knobs.to_json(more))
        sl.evaluate(tmp_path / "run", baselines="none")
    (record,) = caplog.records
    assert "run is not finished: epoch 2 of at most 9" in record.getMessage()


def test_baselines_need_no_run(prepared, tmp_path):
    evaluation = sl.evaluate(data=prepared / "data", out=tmp_path, baselines="popular")
    assert [run.label for run in evaluation.runs] == ["popular"]
    with pytest.raises(ConfigError, match="missing --workdir, or --data and --out"):
        sl.evaluate()
    with pytest.raises(ConfigError, match="leaves nothing to evaluate"):
        sl.evaluate(data=prepared / "data", out=tmp_path, baselines="none")


def test_errors_are_those_of_the_commands(prepared, tmp_path):
    with pytest.raises(InputError, match="exists"):
        sl.prepare(source="csv", input=prepared / "log.csv", out=prepared / "data")
    with pytest.raises(ConfigError, match="--epochs=0 is below its minimum 1"):
        sl.train(prepared / "data", tmp_path / "run", epochs=0)
    with pytest.raises(ConfigError, match="--checkpoint='first' is not one of: best, last"):
        sl.evaluate(tmp_path, checkpoint="first")


@pytest.mark.slow
def test_a_comparison_of_arms(prepared, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="slgr_jax"):
        comparison = sl.compare(
            prepared / "data",
            tmp_path,
            teacher="llm",
            guidance=["none", "global"],
            controls=[],
            seeds=2,
            trials=2,
            widen=False,
            search="lr=0.05|0.1",
            workers=1,
            **SMALL,
        )
    (report,) = comparison.reports.values()
    assert report["protocol"]["arms"] == ["none", "global"]
    assert report["protocol"]["seeds"] == 2
    (text,) = comparison.texts.values()
    assert text == (tmp_path / "report.md").read_text()

    # What it ends with: the small table, in three files too.
    row = next(row for row in report["rows"] if row["primary"] and row["slice"] == "overall")
    assert str(comparison).startswith("in short (log, teacher llm, test, mean of 2 seeds):")
    assert f"{row['mean']:.4f}" in str(comparison)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert (first["arm"], float(first["overall"])) == (row["arm"], row["mean"])
    assert (tmp_path / "summary.md").is_file()
    assert (tmp_path / "summary.tex").is_file()
    assert "epoch    2" in next(tmp_path.rglob("train.log")).read_text()
    assert not any(record.getMessage().startswith("epoch") for record in caplog.records)


def test_a_comparison_refuses_what_its_arms_set(tmp_path):
    for given, message in (
        ({"gate": "rule"}, "--gate=rule is set by the arms of a comparison"),
        ({"seeds": 1}, "--seeds=1 is below its minimum 2"),
        ({"preset": "table9"}, "--preset=table9 is not one of: table2, table3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sl.compare(tmp_path, tmp_path / "out", **given)
