"""benchmarks/compare_guidance.py: plans, equal tuning, resuming, numbers against SciPy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds
from scipy import stats as scipy_stats

from slgr_jax import config
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, NonFiniteError
from slgr_jax.experiments import (
    arms,
    plots,
    pool,
    presets,
    render,
    results,
    summary,
    tuning,
)
from slgr_jax.teacher.products import preferences
from slgr_jax.training import loop, multi_seed

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

GRID = {"lr": (0.1, 0.2), "l2": (0.0, 1.0, 2.0)}


def plan_of(path, *, asked=("none", "global", "paper"), controls=(), own_arms=None, **more):
    own_arms = own_arms or {}
    chosen, matched, focus = arms.choose(asked, controls, "", "", own_arms)
    made = {"knobs": {}, "teacher": "llm", "backbones": ("mf",), "seeds": 3, "lambdas": (1.0, 3.0)}
    made |= {"grids": {"mf": GRID}, "data": str(path / "data"), "out": path / "out"} | more
    return arms.ComparisonPlan(arms=chosen, matched=matched, focus=focus, own_arms=own_arms, **made)


# --------------------------------------------------------------------- arms


def test_arms_are_ordered_and_matched():
    def choose(asked, controls=(), matched="", focus="", own=None):
        return arms.choose(asked, controls, matched, focus, own or {})

    assert choose(("global",)) == (("none", "global"), "", "global")
    every = choose(("constant", "paper", "calibrated"), ("shuffled", "constant"))
    assert every == (
        ("none", "paper", "calibrated", "constant", "shuffled"),
        "calibrated",
        "calibrated",
    )
    assert choose(("paper", "rule"), ("shuffled",), "rule", "paper")[1:] == ("rule", "paper")
    # Without a gate to match there is nothing to control.
    assert choose(("none", "global"), arms.CONTROLS) == (("none", "global"), "", "global")
    mine = {"mine": {"guidance": "selective", "gate": "paper"}}
    assert choose(("global",), ("shuffled",), own=mine)[1] == "mine"
    for bad, message in (
        ((("best",),), "--guidance: best is not one of: none, global, pointwise"),
        ((("paper",), ("swapped",)), "--controls: swapped is not one of: constant"),
        ((("paper",), (), "global"), "--matched_to=global is not one of the arms: paper"),
        ((("paper",), (), "", "rule"), "--focus=rule is not one of the arms: paper"),
        ((("global", "shuffled"),), "the control shuffled copies an arm with a gate"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(*bad)


def test_an_arm_of_ones_own():
    name, knobs = arms.own_arm("wide:gate=paper,margin=0.5,guidance_loss=logistic,item_bias=false")
    assert (name, knobs["guidance"], knobs["margin"]) == ("wide", "selective", 0.5)
    run = config.make_run("", "", teacher="llm", **knobs)
    assert (run.gate.gate, run.guidance.margin, run.model.item_bias) == ("paper", 0.5, False)
    for text in ("wide", "wide:", "wide:gate", "a b:gate=paper", "paper:gate=rule"):
        with pytest.raises(ConfigError, match="--arm="):
            arms.own_arm(text)


def test_every_arm_is_the_run_that_its_name_says(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "global", "rule", "paper"), controls=arms.CONTROLS,
                   knobs={"epochs": 7, "guidance_loss": "logistic"})  # fmt: skip
    settings = {"lr": 0.3, "lambda": 2.0}
    found = {arm: plan.config("mf", arm, settings, tmp_path, 4) for arm in plan.arms}
    for arm, run in found.items():
        assert (run.optimizer.lr, run.guidance.weight, run.train.epochs) == (0.3, 2.0, 7)
        assert (run.train.seed, run.workdir) == (4, str(tmp_path))
        assert run.guidance.guidance == ("none" if arm == "none" else "selective")
    teachers = {arm: run.guidance.teacher for arm, run in found.items()}
    assert teachers == {
        **dict.fromkeys(("global", "rule", "paper", "constant"), "llm"),
        **{c: f"llm.{c}" for c in ("shuffled", "popularity", "item_item")},
        "none": "",
    }
    gates = {arm: run.gate.gate for arm, run in found.items() if arm != "none"}
    assert gates == {
        **{arm: arm for arm in ("rule", "paper", "constant")},
        **dict.fromkeys(("shuffled", "popularity", "item_item"), "paper"),
        "global": "constant",
    }
    assert found["global"].gate.alpha == 1.0
    assert plan.config("mf", "constant", {"alpha": 0.25}, tmp_path).gate.alpha == 0.25
    plan.check()
    wrong = plan_of(tmp_path, own_arms={"mine": {"guidance": "selective", "gate": "oracle"}})
    with pytest.raises(ConfigError, match="arm mine of mf: --gate='oracle' is not one of: paper"):
        wrong.check()


@pytest.mark.parametrize("matched", arms.GATED)
def test_every_control_copies_every_gated_arm(tmp_path, matched):
    """A constant gate has no alpha_0: `gain` becomes `confidence`, other losses stay."""
    plan = plan_of(tmp_path, asked=("none", matched), controls=arms.CONTROLS)
    plan.check()
    losses = {"calibrated": "confidence", "hard_negatives": "confidence"}
    constant = plan.config("mf", "constant", {"alpha": 0.25}, tmp_path)
    assert constant.guidance_loss_name == losses.get(matched, "hinge")
    shuffled = plan.config("mf", "shuffled", {}, tmp_path)
    losses = {"calibrated": "confidence", "hard_negatives": "gain"}
    assert shuffled.guidance_loss_name == losses.get(matched, "hinge")


def test_grids_are_the_backbones_unless_said_otherwise():
    found = arms.grids(["mf", "dcnv2"], {}, {"lr": (), "dropout": ()})
    assert found == {"mf": arms.GRIDS["mf"], "dcnv2": arms.GRIDS["dcnv2"]}
    given = {"dropout": 0.25, "lambda": 3.0, "epochs": 5}
    found = arms.grids(["mf", "dcnv2"], given, {"lr": (0.1,), "l2": ()})
    assert found == {
        "mf": {"lr": (0.1,), "l2": arms.GRIDS["mf"]["l2"], "dropout": (0.25,)},
        "dcnv2": {"lr": (0.1,), "dropout": (0.25,)},
    }
    assert set(arms.GRIDS) == set(config.BACKBONES)
    with pytest.raises(ConfigError, match="--backbones: svd is not one of: mf, lightgcn"):
        arms.grids(["svd"], {}, {})


# --------------------------------------------------------------------- tuning


def test_points_near_the_best():
    assert tuning.points(GRID)[:2] == [{"lr": 0.1, "l2": 0.0}, {"lr": 0.1, "l2": 1.0}]
    near = tuning.near(GRID, {"lr": 0.2, "l2": 0.0}, 99)
    pairs = [(point["lr"], point["l2"]) for point in near]
    assert pairs == [(0.2, 1.0), (0.2, 2.0), (0.1, 0.0), (0.1, 1.0), (0.1, 2.0)]
    assert tuning.near(GRID, {"lr": 0.2, "l2": 0.0}, 2) == near[:2]
    some = tuning.first_points(GRID, 4)
    assert some == tuning.first_points(GRID, 4)
    assert len(some) == 4
    assert all(point in tuning.points(GRID) for point in some)
    assert tuning.first_points(GRID, 0) == tuning.first_points(GRID, 50) == tuning.points(GRID)


class Landscape:
    """Validation by a formula: best at lr .2, l2 1, a lambda of each arm's own, logistic loss."""

    def __init__(self):
        self.asked = []
        self.best_lambda = {"global": 1.0, "paper": 3.0, "popularity": 1.0}
        self.losses = set()

    def __call__(self, runs):
        out = []
        for run in runs:
            arm = pathlib.Path(run.workdir).name.split("_")[0]
            self.asked.append(arm)
            value = 1 - (run.optimizer.lr - 0.2) ** 2 - (run.optimizer.l2 - 1) ** 2 / 10
            if arm != "none":
                value -= (run.guidance.weight - self.best_lambda[arm]) ** 2 / 100
                value += 0.01 * (run.guidance_loss_name == "logistic")
                self.losses.add((arm, run.guidance_loss_name))
            assert run.train.seed == 0
            root = pathlib.Path(run.workdir)
            root.mkdir(parents=True, exist_ok=True)
            outcome = {"best_metric": value, "best_epoch": 2, "error": None}
            results.write_json(root / results.OUTCOME, outcome)
            alphas = [0.9, 0.125 * run.guidance.weight, 0.1]
            log = [{"epoch": e, "train/alpha": a} for e, a in enumerate(alphas, 1)]
            (root / results.LOG).write_text("".join(json.dumps(one) + "\n" for one in log))
            out.append(outcome)
        return out


def test_every_arm_has_as_many_runs_and_gets_its_best(tmp_path):
    plan = plan_of(tmp_path, controls=("constant", "shuffled", "popularity"))
    train = Landscape()
    found = tuning.tune(plan, train)["mf"]
    assert {arm: len(one["tried"]) for arm, one in found.items()} == {
        **dict.fromkeys(("none", "global", "paper", "popularity"), 6),
        **dict.fromkeys(("constant", "shuffled"), 0),
    }
    assert sorted(set(train.asked)) == ["global", "none", "paper", "popularity"]
    assert found["none"]["chosen"] == {"lr": 0.2, "l2": 1.0}
    # The paper's arm, and what is matched to it, keeps the paper's loss.
    losses = {"global": {"guidance_loss": "logistic"}, "paper": {}, "popularity": {}}
    for arm, weight in train.best_lambda.items():
        assert found[arm]["chosen"] == {"lr": 0.2, "l2": 1.0, "lambda": weight} | losses[arm]
    tried = {("global", "logistic"), *((arm, "hinge") for arm in losses)}
    assert train.losses == tried
    # The sweep of every guided arm is at the settings of `none`, then comes the other loss.
    for arm, swept in (("global", [1.0, 3.0, 1.0]), ("paper", [1.0, 3.0])):
        rows = [row for row in found[arm]["tried"] if (row["lr"], row["l2"]) == (0.2, 1.0)]
        assert [row["lambda"] for row in rows] == swept
    found_again = {row["guidance_loss"] for row in found["global"]["tried"][2:]}
    assert found_again == {"logistic"}

    # Matched controls: the settings of paper, and its mean alpha in its best epoch.
    assert found["shuffled"]["chosen"] == found["paper"]["chosen"]
    assert found["constant"]["chosen"] == {**found["paper"]["chosen"], "alpha": 0.375}


def test_another_loss_is_within_the_budget(tmp_path):
    for runs, losses in ((2, {"hinge"}), (3, {"hinge", "logistic"})):
        train = Landscape()
        plan = plan_of(tmp_path / str(runs), asked=("none", "global"), tune_runs=runs)
        found = tuning.tune(plan, train)["mf"]
        assert [len(found[arm]["tried"]) for arm in ("none", "global")] == [runs, runs]
        assert {loss for _, loss in train.losses} == losses


def test_which_variants_of_an_arm_are_tried(tmp_path):
    asked = ("none", "global", "pointwise", "rule", "paper", "calibrated")
    own = {"mine": {"guidance": "selective", "gate": "calibrated", "guidance_loss": "soft"}}
    plan = plan_of(tmp_path, asked=asked, controls=arms.CONTROLS, own_arms=own)
    expected = dict.fromkeys(("none", "pointwise", "paper", "mine"), ())
    expected |= dict.fromkeys(("global", "rule"), ({"guidance_loss": "logistic"},))
    hinge = ({"guidance_loss": "hinge"},)
    expected |= dict.fromkeys(("calibrated", "popularity", "item_item"), hinge)
    assert {arm: plan.variants(arm) for arm in expected} == expected
    for fixed in ({"tune_loss": False}, {"knobs": {"guidance_loss": "soft"}}):
        off = plan_of(tmp_path, asked=asked, **fixed)
        assert {off.variants(arm) for arm in asked} == {()}
    settings = {"lr": 0.1, "lambda": 3.0, "guidance_loss": "hinge"}
    assert plan.tune_dir("mf", "global", settings).name == "global_lr0.1_lambda3_guidance_losshinge"
    assert tuning.as_text(settings) == "lr 0.1, lambda 3, guidance_loss hinge"


def test_a_reference_is_the_run_of_none_of_the_same_seed(tmp_path):
    """While tuning, at the settings that `none` got; later of each seed, which train before."""
    own = {
        "mine": {
            "guidance": "selective",
            "gate": "constant",
            "hard_negatives": 7,
            "reference_runs": "none",
        }
    }
    knobs = {"hard_negatives": 100, "gate_inputs": "reference,history,popularity,teacher"}
    plan = plan_of(
        tmp_path, asked=("none", "paper", "hard_negatives"), controls=("shuffled", "popularity"),
        own_arms=own, tune_runs=3,
    )  # fmt: skip
    assert (plan.matched, plan.focus) == ("hard_negatives", "hard_negatives")
    plan.check()
    asked, members = [], {}

    def train(runs):
        for run in runs:
            name = pathlib.Path(run.workdir).name
            asked.append(name)
            members[name] = run.reference_runs
        # The gate without its reference, which is tried last, is the better one.
        values = [run.optimizer.l2 - ("reference" in run.gate.gate_inputs) for run in runs]
        return [{"best_metric": x, "best_epoch": 1, "error": None} for x in values]

    found = tuning.tune(plan, train)
    best = plan.tune_dir("mf", "none", found["mf"]["none"]["chosen"])
    guided = [name for name in asked if not name.startswith("none")]
    assert {arm: len(found["mf"][arm]["tried"]) for arm in ("none", "paper", "hard_negatives")} == {
        **dict.fromkeys(("none", "paper", "hard_negatives"), 3),
    }
    for name in guided:
        read = () if name.startswith("paper") else (str(best),)
        assert members[name] == read
    blind = {"lambda": 1.0, **arms.BLIND}
    for arm in ("hard_negatives", "popularity", "shuffled"):
        assert found["mf"][arm]["chosen"] == {**found["mf"]["none"]["chosen"], **blind}
    runs = {
        (arm, seed): plan.run("mf", arm, found["mf"], seed)
        for arm in plan.arms
        for seed in range(2)
    }
    assert runs["none", 0].workdir == str(best)
    for arm in ("hard_negatives", "mine", "shuffled", "popularity"):
        for seed in range(2):
            assert runs[arm, seed].reference_runs == (runs["none", seed].workdir,)
            assert runs[arm, seed].hard_negatives == (7 if arm == "mine" else 100)
    assert runs["paper", 1].reference_runs == ()
    mine = plan.config("mf", "hard_negatives", {}, tmp_path)
    assert (mine.gate.gate, mine.guidance.hard_negatives, mine.gate.gate_inputs) == (
        *("calibrated", knobs["hard_negatives"], knobs["gate_inputs"]),
    )

    # Runs that others read are trained before them.
    first, rest = pool.waves([runs["hard_negatives", 1], runs["none", 0], runs["none", 1]])
    assert first == [runs["none", 1]]
    assert rest == [runs["hard_negatives", 1], runs["none", 0]]


@pytest.mark.parametrize(
    ("arm", "chosen", "ends"),
    [
        ("none", {"lr": 0.3, "l2": 0.0, "dropout": 0.2}, ["lr 0.3, the greatest"]),
        ("none", {"lr": 0.1, "l2": 0.1, "dropout": 0.2}, ["l2 0.1, the greatest"]),
        ("none", {"lr": 0.01, "l2": 0.05, "dropout": 0.2}, ["lr 0.01, the least"]),
        ("global", {"lr": 0.3, "lambda": 1.0, "guidance_loss": "soft"}, []),
        ("global", {"lr": 0.3, "lambda": 0.1}, ["lambda 0.1, the least"]),
        ("global", {"lr": 0.3, "lambda": 3.0}, ["lambda 3, the greatest"]),
    ],
)
def test_what_is_chosen_at_an_end_of_its_grid_is_told(arm, chosen, ends):
    own = itertools.product((0.01, 0.1, 0.3), (0.0, 0.05, 0.1))
    tried = {
        "none": [{"lr": lr, "l2": l2, "dropout": 0.2} for lr, l2 in own],
        "global": [{"lr": 0.3, "lambda": weight} for weight in (0.1, 1.0, 3.0)],
    }[arm]
    assert tuning.at_an_end(arm, {"tried": tried, "chosen": chosen}) == ends
    assert tuning.at_an_end(arm, {"tried": tried[:1], "chosen": tried[0]}) == []


def test_a_setting_that_diverges_is_not_chosen(tmp_path):
    plan = plan_of(tmp_path, asked=("none",))

    def train(runs):
        return [
            {"best_metric": None, "best_epoch": None, "error": "step 3: not finite"}
            if run.optimizer.lr == 0.2
            else {"best_metric": run.optimizer.l2, "best_epoch": 1, "error": None}
            for run in runs
        ]

    found = tuning.tune(plan, train)["mf"]["none"]
    assert found["chosen"] == {"lr": 0.1, "l2": 2.0}
    assert sum(row["valid"] is None for row in found["tried"]) == 3

    def never(runs):
        return [{"best_metric": None, "best_epoch": None, "error": "not finite"}] * len(runs)

    with pytest.raises(ConfigError, match="every setting of arm none of mf diverged"):
        tuning.tune(plan, never)

    def unjudged(runs):
        return [{"best_metric": None, "best_epoch": 1, "error": None}] * len(runs)

    with pytest.raises(ConfigError, match="no validation part"):
        tuning.tune(plan, unjudged)


# --------------------------------------------------------------------- runs


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


def test_a_group_leaves_an_outcome_for_each_run(tmp_path, monkeypatch, capsys):
    plan = plan_of(tmp_path)
    runs = [plan.config("mf", "paper", {"lr": 0.1}, tmp_path / f"s{i}", i) for i in range(3)]
    alone = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pool, "_fit", lambda run: alone.append(run) or results.write_json(
        pathlib.Path(run.workdir) / results.OUTCOME,
        {"best_metric": None, "best_epoch": None, "error": "diverged"}))  # fmt: skip

    def together(group):
        print("epoch 1")
        return [loop.Outcome("finished", 9, 90, 4 + i, 0.25, 3.5) for i in range(len(group))]

    monkeypatch.setattr(multi_seed, "train_many", together)
    found = pool.train_runs(runs, workers=1, root=tmp_path)
    assert [one["best_epoch"] for one in found] == [4, 5, 6]
    for one in found:
        expected = {"epoch": 9, "best_metric": 0.25, "seconds": 3.5, "error": None}
        assert {name: one[name] for name in expected} == expected
        assert 0 <= one["cpu_seconds"] < 60
    shown = capsys.readouterr().out
    assert shown.splitlines()[1] == "  [1/1] s1: 0.2500 (epoch 5)"
    assert "epoch 1\n" in (tmp_path / "s0" / "train.log").read_text()
    assert alone == []

    def diverge(group):
        raise NonFiniteError("seed 1")

    # One that diverges does not take the others with it: each is trained alone.
    monkeypatch.setattr(multi_seed, "train_many", diverge)
    for run in runs:
        results.forget(run.workdir)
    assert [one["error"] for one in pool.train_runs(runs, workers=1, root=tmp_path)] == [
        "diverged"
    ] * 3
    assert alone == runs


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, capsys):
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
    assert f"out/a: {outcome['best_metric']:.4f}" in capsys.readouterr().out
    logged = [one["valid/ndcg@10"] for one in results.log(run.workdir)]
    assert outcome["best_metric"] == max(logged)
    best = results.log(run.workdir)[outcome["best_epoch"] - 1]
    assert tuning.mean_alpha(tmp_path / "out" / "a") == best["train/alpha"]

    root = tmp_path / "out" / "a"
    other = shutil.copytree(root, tmp_path / "other")
    knobs = plan.knobs | {"uncertainty": "ensemble", "reference_runs": f"{root},{other}"}
    unsure = dataclasses.replace(plan, knobs=knobs).config("mf", "paper", {}, root.parent / "b")
    pool.train_runs([unsure], workers=1, root=tmp_path)
    assert pool.finished(unsure)
    (notes,) = other.glob("checkpoints/*/_CHECKPOINT_METADATA")
    notes.write_text(notes.read_text() + " ")  # a member that was trained anew
    assert not pool.finished(unsure)

    pool.evaluate_runs([run], workers=1)
    assert (root / "metrics.json").is_file()
    seen = []
    monkeypatch.setattr(pool, "_fit", lambda run: seen.append(run) or results.write_json(
        pathlib.Path(run.workdir) / results.OUTCOME, outcome))  # fmt: skip
    monkeypatch.setattr(pool, "_evaluate", lambda run: seen.append(run))
    pool.evaluate_runs([run], workers=1)
    assert pool.train_runs([run, run], workers=1, root=tmp_path) == [outcome, outcome]
    assert seen == []
    # Other settings, or other answers of the teacher, are another run.
    other = plan.config("mf", "paper", {"lr": 0.2}, root)
    assert not pool.finished(other)
    with pytest.raises(ConfigError, match=r"--lr: 0.1 -> 0.2\); choose another --out"):
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


# --------------------------------------------------------------------- numbers

USERS, SEEDS = 24, 4
KINDS = {"overall": "all", "cold_users": "all", "warm_users": "all", "tail_items": "tail",
         "head_items": "head"}  # fmt: skip


def write_run(root, seed, gain, *, clicks=False, undefined=False):
    """Files of an evaluated run with random values; returns slice -> values of its users."""
    rng = np.random.default_rng([seed, int(1000 * gain)])
    base = np.random.default_rng(0).random((3, USERS))
    kinds, cold = np.repeat(["all", "tail", "head"], USERS), np.tile(np.arange(USERS) < 9, 3)
    values = (base + gain + 0.1 * rng.normal(size=(3, USERS))).reshape(-1)
    metric = "auc" if clicks else "ndcg@10"
    shuffled = rng.permutation(values.size)  # rows come in any order
    columns = {
        "part": np.repeat("test", 3 * USERS), "items": kinds, "cold": cold, metric: values,
        "user": np.tile([f"u{u}" for u in range(USERS)], 3),
    }  # fmt: skip
    table = pa.table({name: column[shuffled] for name, column in columns.items()})
    valid = table.set_column(0, "part", pa.array(["valid"] * table.num_rows))
    root.mkdir(parents=True)
    name = results.ROWS_PER_USER if clicks else results.PER_USER
    pq.write_table(pa.concat_tables([valid, table]), root / name)
    found = {}
    for slice_name, kind in KINDS.items():
        keep = kinds == kind
        if slice_name in ("cold_users", "warm_users"):
            keep &= cold == (slice_name == "cold_users")
        found[slice_name] = values[keep]
    means = {name: {"n": one.size, metric: one.mean()} for name, one in found.items()}
    means["history<=5"] = {"n": 5, metric: float(values[:5].mean())}
    means["popularity>9"] = {"n": 0, metric: None}
    if undefined:
        means["tail_items"][metric] = None
    results.write_json(root / results.METRICS, {} if clicks else {"test": means})
    results.write_json(root / results.ROWS, means if clicks else {})
    return found


@pytest.fixture
def written(tmp_path):
    """(runs, values) of three arms: (backbone, arm) -> directories, -> seeds of user values."""
    runs, values = {}, {}
    for backbone, clicks in (("mf", False), ("dcnv2", True)):
        for arm, gain in (("none", 0.0), ("global", 0.02), ("paper", 0.15)):
            dirs = [tmp_path / f"{backbone}_{arm}_{seed}" for seed in range(SEEDS)]
            runs[backbone, arm] = dirs
            values[backbone, arm] = [
                write_run(root, seed, gain, clicks=clicks) for seed, root in enumerate(dirs)
            ]
    return runs, values


def pick(rows, backbone, arm, name, metric):
    wanted = (backbone, arm, name, metric)
    (found,) = [r for r in rows if (r["backbone"], r["arm"], r["slice"], r["metric"]) == wanted]
    return found


PRIMARY = {"mf": "ndcg@10", "dcnv2": "rows_auc"}


def holm_by_hand(ps):
    """Holm 1979: the k-th smallest of m times m - k + 1, never below the one before, at most 1."""
    order, out, worst = np.argsort(ps), {}, 0.0
    for place, at in enumerate(order):
        worst = max(worst, min(1.0, ps[at] * (len(ps) - place)))
        out[int(at)] = worst
    return [out[i] for i in range(len(ps))]


def test_means_intervals_and_tests_equal_scipy(written):
    runs, values = written
    rows = summary.rows_of(runs, (10,), PRIMARY)
    expected = []
    for backbone, metric in PRIMARY.items():
        for name in KINDS:
            seeds = {
                arm: np.array([one[name].mean() for one in values[backbone, arm]])
                for arm in ("none", "global", "paper")
            }
            users = {
                arm: np.mean([one[name] for one in values[backbone, arm]], axis=0) for arm in seeds
            }
            for arm, others in (("none", ()), ("global", ("none",)), ("paper", ("none", "global"))):
                row, x = pick(rows, backbone, arm, name, metric), seeds[arm]
                spread = scipy_stats.t.interval(0.95, SEEDS - 1, x.mean(), scipy_stats.sem(x))
                assert (row["low"], row["high"]) == pytest.approx(spread)
                assert (row["mean"], row["sd"]) == pytest.approx((x.mean(), x.std(ddof=1)))
                assert (row["seeds"], row["users"]) == (SEEDS, users[arm].size)
                assert row["primary"]
                assert {k for k in row if k.startswith("vs_")} == {f"vs_{o}" for o in others}
                for other in others:
                    found, y = row[f"vs_{other}"], seeds[other]
                    spread = scipy_stats.ttest_rel(x, y).confidence_interval(0.95)
                    assert (found["low"], found["high"]) == pytest.approx((spread.low, spread.high))
                    assert found["difference"] == pytest.approx(x.mean() - y.mean())
                    assert found["relative"] == pytest.approx(x.mean() / y.mean() - 1)
                    by_users = scipy_stats.ttest_rel(users[arm], users[other]).pvalue
                    expected.append((found, scipy_stats.ttest_rel(x, y).pvalue, by_users))
    assert len(expected) == 2 * 5 * 3
    tests, by_seeds, by_users = zip(*expected, strict=True)
    for key, raw in (("p_seeds", by_seeds), ("p_users", by_users)):
        assert [test[key] for test in tests] == pytest.approx(raw)
        # One family: both backbones' primary metrics.
        assert [test[f"{key}_holm"] for test in tests] == pytest.approx(holm_by_hand(raw))
    # Bins have means and intervals but no tests; an empty one is left out.
    bin_row = pick(rows, "mf", "paper", "history<=5", "ndcg@10")
    assert set(bin_row["vs_none"]) == {"difference", "low", "high", "relative"}
    assert not any(row["slice"] == "popularity>9" for row in rows)
    json.dumps(rows, allow_nan=False)


def test_the_focus_is_tested_against_controls_too(written):
    runs, _ = written
    rows = summary.rows_of(runs, (10,), PRIMARY, "paper", ["global"])
    controlled = runs | {(b, "shuffled"): dirs for (b, arm), dirs in runs.items() if arm == "none"}
    found = summary.rows_of(controlled, (10,), PRIMARY, "paper", ["shuffled"])
    row = pick(found, "mf", "paper", "overall", "ndcg@10")
    same = {k: v for k, v in row["vs_none"].items() if not k.endswith("_holm")}
    assert {k: v for k, v in row["vs_shuffled"].items() if not k.endswith("_holm")} == same
    assert "vs_shuffled" not in pick(found, "mf", "global", "overall", "ndcg@10")
    assert pick(rows, "mf", "paper", "overall", "ndcg@10")["vs_global"]["p_users"] is not None


def test_what_is_undefined_is_null(tmp_path):
    runs = {
        ("mf", arm): [tmp_path / f"{arm}{seed}" for seed in range(2)] for arm in ("none", "paper")
    }
    for (_, arm), dirs in runs.items():
        for seed, root in enumerate(dirs):
            write_run(root, seed, 0.1, undefined=arm == "paper" and seed == 1)
    rows = summary.rows_of(runs, (10,), {"mf": "ndcg@10"})
    row = pick(rows, "mf", "paper", "tail_items", "ndcg@10")
    assert (row["mean"], row["low"], row["sd"], row["vs_none"]) == (None, None, None, None)
    assert summary.gates(runs) == []
    assert summary.alphas(runs) == []
    cost = summary.costs(runs)[1]
    assert {key: value for key, value in cost.items() if key not in ("backbone", "arm")} == (
        dict.fromkeys(("seconds", "cpu_seconds", "epochs", "triples_per_s", "speed_vs_none"))
    )
    one_seed = {key: dirs[:1] for key, dirs in runs.items()}
    row = pick(summary.rows_of(one_seed, (10,), {"mf": "ndcg@10"}), "mf", "paper", "overall",
               "ndcg@10")  # fmt: skip
    assert (row["low"], row["sd"], row["vs_none"]["p_seeds"]) == (None, None, None)


def test_cost_and_gates_are_means_over_seeds(tmp_path):
    runs = {("mf", arm): [tmp_path / f"{arm}{s}" for s in range(2)] for arm in ("none", "paper")}
    for (_, arm), dirs in runs.items():
        for seed, root in enumerate(dirs):
            write_run(root, seed, 0.0)
            guided = arm == "paper"
            outcome = {"seconds": 4.0 + 2 * seed + guided, "epoch": 5}
            results.write_json(root / results.OUTCOME, outcome)
            rates = [100, 900 + seed, 400] if guided else [100, 1802, 1700]
            more = {"train/alpha": 0.5} if guided else {}
            log = [{"epoch": e, "triples_per_s": r, **more} for e, r in enumerate(rates, 1)]
            (root / results.LOG).write_text("".join(json.dumps(one) + "\n" for one in log))
            if not guided:
                continue
            bins = [(0.0, 0.3, 0.2, 0.25 + seed / 4, 10 + seed), (0.3, 0.9, 0.8, 0.75, 11)]
            names = ("low", "high", "alpha", "right", "n")
            gate = {
                "auc": 0.6 + 0.2 * seed,
                "calibration_error": None,
                "slices": {
                    "overall": {"alpha": 0.25 * (1 + seed), "right": None, "n": 40 - 30 * seed}
                },
                "reliability": [dict(zip(names, one, strict=True)) for one in bins],
            }
            metrics = results.read_json(root / results.METRICS)
            results.write_json(root / results.METRICS, metrics | {"gate": gate})
    none, paper = summary.costs(runs)
    assert (none["seconds"], none["speed_vs_none"]) == (5.0, 1.0)
    assert (paper["seconds"], paper["triples_per_s"]) == (6.0, 901.0)
    assert paper["speed_vs_none"] == pytest.approx(901 / 1802)
    (gate,) = summary.gates(runs)
    assert (gate["auc"], gate["calibration_error"]) == (pytest.approx(0.7), None)
    alpha = pytest.approx((40 * 0.25 + 10 * 0.5) / 50)
    assert gate["slices"] == {"overall": {"alpha": alpha, "right": None, "n": 50}}
    assert [(b["n"], b["alpha"], b["right"]) for b in gate["reliability"]] == [
        (21, pytest.approx(0.2), pytest.approx((10 * 0.25 + 11 * 0.5) / 21)),
        (22, pytest.approx(0.8), 0.75),
    ]  # fmt: skip
    alphas = summary.alphas(runs)
    assert [(one["arm"], one["epochs"]) for one in alphas] == [("paper", [1, 2, 3])]


def judged(backbone, name, **against):
    """A row of the focus with made-up comparisons: other -> difference, high, p seeds, p users."""
    row = {"backbone": backbone, "arm": "paper", "slice": name, "metric": "m", "primary": True}
    keys = ("difference", "high", "p_seeds_holm", "p_users_holm")
    return row | {f"vs_{k}": v and dict(zip(keys, v, strict=True)) for k, v in against.items()}


def test_the_verdict_counts_cells():
    rows = [
        judged("mf", "overall", none=(0.1, 0.2, 0.01, 0.2), **{"global": (0.0, 0.1, 1.0, 1.0)}),
        judged(
            "mf", "cold_users", none=(0.1, 0.2, 0.01, 0.01), **{"global": (0.1, 0.2, 0.9, 0.04)}
        ),
        judged("mf", "tail_items", none=(-0.1, 0.01, 0.2, 0.03), **{"global": None}),
        judged("mf", "warm_users", none=(-0.5, -0.4, 0.01, 0.01), **{"global": (-1, -1, 0.0, 0.0)}),
        judged("din", "overall", none=(-0.2, -0.1, 0.04, None), **{"global": (0.1, 0.2, 0.1, 0.1)}),
    ]
    found = summary.verdict(rows, "paper")
    none, other = found["against"]["none"], found["against"]["global"]
    assert (none["cells"], other["cells"]) == (4, 3)
    assert none["at_least"] == ["mf overall", "mf cold_users", "mf tail_items"]
    assert none["better_over_seeds"] == ["mf overall", "mf cold_users"]
    assert none["better_over_both"] == ["mf cold_users"]
    assert (none["worse_over_seeds"], none["worse_over_users"]) == (
        ["din overall"],
        ["mf tail_items"],
    )
    assert other["better_over_users"] == ["mf cold_users"]
    assert (found["backbones"], found["holds_overall"]) == (2, ["mf"])
    assert found["wins_cold_or_tail"] == ["mf"]
    assert summary.verdict(rows, "none") is None


def test_the_report_shows_the_numbers_and_draws_them(written, tmp_path, monkeypatch):
    runs, _ = written
    rows = summary.rows_of(runs, (10,), PRIMARY, "paper")
    tried = [{"lr": 0.1, "lambda": 0.3, "valid": 0.5, "epoch": 1},
             {"lr": 0.1, "lambda": 1.0, "valid": None, "epoch": None}]  # fmt: skip
    bins = [{"low": 0.1, "high": 0.5, "alpha": 0.3, "right": 0.4, "n": 7}]
    found = {
        "protocol": {
            "data": "books", "teacher": "llm", "arms": ["none", "global", "paper", "constant"],
            "backbones": ["mf", "dcnv2"], "matched_to": "paper", "primary": PRIMARY, "seeds": SEEDS,
            "budget": {"mf": {"none": 6}}, "thresholds": {"cold users": 9}, "tests": 30,
        },
        "rows": rows,
        "verdict": summary.verdict(rows, "paper"),
        "tuned": {"mf": {"none": {"tried": [], "chosen": {"lr": 0.1}},
                         "paper": {"tried": tried, "chosen": {"lr": 0.1, "lambda": 0.3}}}},
        "cost": [{"backbone": "mf", "arm": "none", "seconds": None}],
        "gate": [{"backbone": "mf", "arm": "paper", "auc": 0.5, "calibration_error": None,
                  "slices": {"overall": {"alpha": 0.3, "right": None, "n": 7}},
                  "reliability": bins}],
        "alpha_by_epoch": [{"backbone": "mf", "arm": "paper", "epochs": [1, 2], "alpha": [1, 0.1]}],
        "baselines": [{"baseline": "popular", "slice": "overall", "ndcg@10": 0.1}],
    }  # fmt: skip
    monkeypatch.setattr(plots, "FEWEST", 1)
    names = plots.draw(found, tmp_path)
    assert names == [
        *("bars.png", "gain_by_history.png", "alpha_by_slice.png", "reliability.png"),
        "alpha_by_epoch.png",
    ]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in names)
    text = render.render(found, names)
    row = pick(rows, "mf", "paper", "overall", "ndcg@10")
    line = next(line for line in text.splitlines() if line.startswith("| overall    | paper"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    vs = row["vs_none"]
    assert cells[2:6] == [
        str(USERS), f"{row['mean']:.4f}", f"{row['high'] - row['mean']:.4f}",
        f"{vs['difference']:.4f}",
    ]  # fmt: skip
    assert float(cells[7]) == pytest.approx(vs["p_seeds_holm"], rel=1e-3)
    assert "| mf       | paper |     0.5000 |        - |" in text  # the sweep; what diverged is `-`
    assert "lr 0.1, lambda 0.3" in text
    assert "- mf paper: lambda 0.3, the least of what was tried" in text
    # Nothing to say of gates: no table and no picture of them.
    found |= {"gate": [], "alpha_by_epoch": [], "baselines": []}
    assert "## Gates" not in render.render(found, [])
    assert plots.draw(found, tmp_path) == ["bars.png", "gain_by_history.png"]
    monkeypatch.setattr(plots, "FEWEST", USERS + 1)  # bins of fewer users are not drawn
    assert plots.draw(found, tmp_path) == ["bars.png"]


# --------------------------------------------------------------------- presets


def test_the_printed_tables_have_the_differences_that_were_computed_from_them():
    def gains(over):
        return np.array([np.subtract(row["S-LLMR"], row[over]) for row in presets.TABLE2.values()])

    none, other = gains("None"), gains("LLM-CF")
    assert none.size == 18
    assert (none.mean(), none.min(), none.max()) == pytest.approx(
        (0.0169, 0.0040, 0.0339), abs=5e-5
    )
    assert (other.mean(), np.median(other)) == pytest.approx((0.0072, 0.0056), abs=5e-5)
    assert (other.min(), other.max()) == pytest.approx((0.0007, 0.0258), abs=5e-5)
    ours, base = presets.TABLE3["paper"], presets.TABLE3["none"]
    cold, tail = (np.subtract(ours[n], base[n]) for n in ("cold_users", "tail_items"))
    assert cold == pytest.approx([0.0030, 0.0057, 0.0049], abs=1e-9)
    assert tail == pytest.approx([0.0200, 0.0014, 0.0100], abs=1e-9)
    # The two tables agree on DCNv2.
    assert presets.TABLE3["none"]["overall"] == presets.TABLE2["dcnv2"]["None"]
    assert presets.TABLE3["paper"]["overall"] == presets.TABLE2["dcnv2"]["S-LLMR"]


def test_presets_put_ours_beside_the_printed(written):
    runs, values = written
    rows = summary.rows_of(runs, (10,), PRIMARY)
    protocol = {"backbones": ["dcnv2"], "arms": ["none", "global", "paper"]}
    reports = {"Beauty": {"protocol": protocol, "rows": rows}}
    ours = np.mean([one["overall"].mean() for one in values["dcnv2", "paper"]])
    for name in presets.PRESETS:
        text = presets.table(name, reports)
        assert f"{ours:.4f}" in text
        assert "0.8177" in text  # S-LLMR on DCNv2, Beauty
        assert "Not run: Sports, Toys" in text
        assert "0.8150" not in text
        assert "cell for cell" in text
    line = next(line for line in presets.table("table3", reports).splitlines() if "point" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:6] == ["pointwise", "0.7999", "-", "-"]  # printed, and not run here
    text = presets.table("table3", {"books": reports["Beauty"]})
    assert "Not in the paper: books" in text
    assert "0.8177" not in text


# --------------------------------------------------------------------- the command


def launch(*given):
    command = [sys.executable, str(BENCHMARKS / "compare_guidance.py"), *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_help_needs_no_jax():
    code = "import sys, runpy; sys.modules['jax'] = None; sys.argv = ['x', '--help']\n"
    code += f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
    code += f"runpy.run_path({str(BENCHMARKS / 'compare_guidance.py')!r}, run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--guidance=none,global,pointwise,rule,paper,calibrated" in found.stdout
    assert "--early_stop_metric" in found.stdout
    assert "use of the teacher in training" not in found.stdout  # that knob is the arms'


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    worlds.random_dataset(tmp_path / "data")
    here = (f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}")
    for given, message in (
        ((), "missing --data, --out"),
        ((*here, "--guidance=none,paper"), "missing --teacher"),
        ((*here, "--teacher=llm", "--guidance=best"), "best is not one of: none, global"),
        ((*here, "--backbones=svd"), "--backbones: svd is not one of: mf, lightgcn"),
        ((*here, "--preset=table9"), "--preset=table9 is not one of: table2, table3"),
        ((*here, "--teacher=llm", "--tune_runs=2"), "--tune_runs=2 is below the 4 values"),
        ((*here, "--teacher=llm", "--guidance=paper"), "has no teacher 'llm'"),
        (("--data=/nowhere", here[1]), "/nowhere is not a directory"),
    ):
        found = launch(*given)
        assert found.returncode == 2, (given, found.stderr)
        assert message in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_comparisons_in_one_directory_are_refused(tmp_path):
    """The second would train over the runs of the first."""
    worlds.random_dataset(tmp_path / "data")
    given = (f"--data={tmp_path / 'data'}", f"--out={tmp_path}", "--guidance=none", "--controls=")
    with shards.locked(tmp_path):
        found = launch(*given)
    assert found.returncode == 2
    assert f"{tmp_path} is being written by another process" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


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
        *(f"--data={data.path}", "--teacher=llm", f"--out={out}", "--backbones=mf,dcnv2"),
        *("--guidance=none,paper", "--controls=", "--seeds=2", "--epochs=1", "--dim=4"),
        *("--tune_lr=0.01", "--l2=0", "--tune_dropout=0.1", "--tune_lambda=0.1", "--workers=2"),
        *("--batch_size=64", "--mlp=4", "--history_bins=5,7", "--popularity_bins=12"),
    )
    found = launch(*given)
    assert found.returncode == 0, found.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["primary"] == {"mf": "ndcg@10", "dcnv2": "rows_auc"}
    assert (out / "report.md").read_text().startswith("# world, teacher llm")
    where = {
        (backbone, arm): [
            out / backbone / "runs" / f"{arm}_seed{seed}"
            if seed
            else next((out / backbone / "tune").glob(f"{arm}_*"))
            for seed in range(2)
        ]
        for backbone in ("mf", "dcnv2")
        for arm in ("none", "paper")
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
                mine = [r for r in rows if r["part"] == "test" and r["items"] == "all"]
                seeds.append([r[metric] for r in sorted(mine, key=lambda r: r["user"])])
            users[arm] = np.mean(np.array(seeds, float), axis=0)
        primary = report["protocol"]["primary"][backbone]
        row = pick(report["rows"], backbone, "paper", "overall", primary)
        there = ~np.isnan(users["paper"])
        assert there.sum() == row["users"] > 20
        expected = scipy_stats.ttest_rel(users["paper"][there], users["none"][there]).pvalue
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
    assert len(outcomes) == 2 * 2 * 4
    again = launch(*given)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in outcomes.items())
    assert json.loads((out / "report.json").read_text()) == report
