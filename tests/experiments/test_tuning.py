"""Equal tuning: the same number of runs for each arm, and the best of them."""

from __future__ import annotations

import itertools
import json
import pathlib

import pytest
from comparisons import GRID, plan_of

from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arms, pool, results, tuning


def test_points_near_the_best():
    assert tuning.points(GRID)[:2] == [{"lr": 0.1, "l2": 0.0}, {"lr": 0.1, "l2": 1.0}]
    near = tuning.near(GRID, {"lr": 0.2, "l2": 0.0}, 99)
    pairs = [(point["lr"], point["l2"]) for point in near]
    assert pairs == [(0.2, 1.0), (0.2, 2.0), (0.1, 0.0), (0.1, 1.0), (0.1, 2.0)]
    assert tuning.near(GRID, {"lr": 0.2, "l2": 0.0}, 2) == near[:2]
    drawn = tuning.first_points(GRID, 4)
    assert drawn == tuning.first_points(GRID, 4)
    assert len(drawn) == 4
    assert all(point in tuning.points(GRID) for point in drawn)
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
            (root / results.LOG).write_text("".join(json.dumps(record) + "\n" for record in log))
            out.append(outcome)
        return out


def test_an_arm_without_a_teacher_tries_every_point_as_none_does(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "init"), vectors="words")
    landscape = Landscape()
    landscape.best_lambda["init"] = 0.1  # what its runs have, and do not read
    tuned = tuning.tune(plan, landscape)["mf"]
    assert landscape.asked == ["none"] * 6 + ["init"] * 6
    assert tuned["init"]["chosen"] == tuned["none"]["chosen"] == {"lr": 0.2, "l2": 1.0}
    ends = [tuning.at_an_end(arm, tuned[arm]) for arm in ("init", "none")]
    assert ends == [["lr 0.2, the greatest"]] * 2


def test_every_arm_has_as_many_runs_and_gets_its_best(tmp_path):
    plan = plan_of(tmp_path, controls=("constant", "shuffled", "popularity"))
    train = Landscape()
    tuned = tuning.tune(plan, train)["mf"]
    assert {arm: len(of_arm["tried"]) for arm, of_arm in tuned.items()} == {
        **dict.fromkeys(("none", "global", "paper", "popularity"), 6),
        **dict.fromkeys(("constant", "shuffled"), 0),
    }
    assert sorted(set(train.asked)) == ["global", "none", "paper", "popularity"]
    assert tuned["none"]["chosen"] == {"lr": 0.2, "l2": 1.0}
    # The paper's arm, and what is matched to it, keeps the paper's loss.
    losses = {"global": {"guidance_loss": "logistic"}, "paper": {}, "popularity": {}}
    for arm, weight in train.best_lambda.items():
        assert tuned[arm]["chosen"] == {"lr": 0.2, "l2": 1.0, "lambda": weight} | losses[arm]
    tried = {("global", "logistic"), *((arm, "hinge") for arm in losses)}
    assert train.losses == tried
    # The sweep of every guided arm is at the settings of `none`, then comes the other loss.
    for arm, swept in (("global", [1.0, 3.0, 1.0]), ("paper", [1.0, 3.0])):
        rows = [row for row in tuned[arm]["tried"] if (row["lr"], row["l2"]) == (0.2, 1.0)]
        assert [row["lambda"] for row in rows] == swept
    assert {row["guidance_loss"] for row in tuned["global"]["tried"][2:]} == {"logistic"}

    # Matched controls: the settings of paper, and its mean alpha in its best epoch.
    assert tuned["shuffled"]["chosen"] == tuned["paper"]["chosen"]
    assert tuned["constant"]["chosen"] == {**tuned["paper"]["chosen"], "alpha": 0.375}


def test_another_loss_is_within_the_budget(tmp_path):
    for runs, losses in ((2, {"hinge"}), (3, {"hinge", "logistic"})):
        train = Landscape()
        plan = plan_of(tmp_path / str(runs), asked=("none", "global"), tune_runs=runs)
        tuned = tuning.tune(plan, train)["mf"]
        assert [len(tuned[arm]["tried"]) for arm in ("none", "global")] == [runs, runs]
        assert {loss for _, loss in train.losses} == losses


def test_which_variants_of_an_arm_are_tried(tmp_path):
    asked = ("none", "global", "pointwise", "rule", "paper", "calibrated")
    extra = {"wide": {"guidance": "pairwise", "gate": "calibrated", "guidance_loss": "soft"}}
    plan = plan_of(tmp_path, asked=asked, controls=arms.CONTROLS, own_arms=extra)
    expected = dict.fromkeys(("none", "pointwise", "paper", "wide"), ())
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
    extra = {
        "wide": {
            "guidance": "pairwise",
            "gate": "constant",
            "hard_negatives": 7,
            "reference_runs": "none",
        }
    }
    knobs = {"hard_negatives": 100, "gate_inputs": "reference,history,popularity,teacher"}
    plan = plan_of(
        tmp_path, asked=("none", "paper", "hard_negatives"), controls=("shuffled", "popularity"),
        own_arms=extra, tune_runs=3,
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

    tuned = tuning.tune(plan, train)
    best = plan.tune_dir("mf", "none", tuned["mf"]["none"]["chosen"])
    guided = [name for name in asked if not name.startswith("none")]
    assert {arm: len(tuned["mf"][arm]["tried"]) for arm in ("none", "paper", "hard_negatives")} == {
        **dict.fromkeys(("none", "paper", "hard_negatives"), 3),
    }
    for name in guided:
        read = () if name.startswith("paper") else (str(best),)
        assert members[name] == read
    blind = {"lambda": 1.0, **arms.BLIND}
    for arm in ("hard_negatives", "popularity", "shuffled"):
        assert tuned["mf"][arm]["chosen"] == {**tuned["mf"]["none"]["chosen"], **blind}
    runs = {
        (arm, seed): plan.run("mf", arm, tuned["mf"], seed)
        for arm in plan.arms
        for seed in range(2)
    }
    assert runs["none", 0].workdir == str(best)
    for arm in ("hard_negatives", "wide", "shuffled", "popularity"):
        for seed in range(2):
            assert runs[arm, seed].reference_runs == (runs["none", seed].workdir,)
            assert runs[arm, seed].hard_negatives == (7 if arm == "wide" else 100)
    assert runs["paper", 1].reference_runs == ()
    run = plan.config("mf", "hard_negatives", {}, tmp_path)
    assert (run.gate.gate, run.hard_negatives, run.gate.gate_inputs) == (
        "calibrated",
        knobs["hard_negatives"],
        knobs["gate_inputs"],
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
    grid = itertools.product((0.01, 0.1, 0.3), (0.0, 0.05, 0.1))
    tried = {
        "none": [{"lr": lr, "l2": l2, "dropout": 0.2} for lr, l2 in grid],
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

    tuned = tuning.tune(plan, train)["mf"]["none"]
    assert tuned["chosen"] == {"lr": 0.1, "l2": 2.0}
    assert sum(row["valid"] is None for row in tuned["tried"]) == 3

    def never(runs):
        return [{"best_metric": None, "best_epoch": None, "error": "not finite"}] * len(runs)

    with pytest.raises(ConfigError, match="every setting of arm none of mf diverged"):
        tuning.tune(plan, never)

    def unjudged(runs):
        return [{"best_metric": None, "best_epoch": 1, "error": None}] * len(runs)

    with pytest.raises(ConfigError, match="no validation part"):
        tuning.tune(plan, unjudged)


@pytest.mark.parametrize(
    ("name", "values", "end", "step"),
    [
        ("lr", [0.1, 0.2], 0.2, 0.4),
        ("lr", [0.1, 0.3], 0.1, 0.03333),
        ("l2", [0.0, 0.01, 0.05], 0.05, 0.25),
        ("l2", [0.0, 0.01], 0.01, None),  # no distance to repeat
        ("dropout", [0.0, 0.3, 0.6], 0.6, None),  # 1.2
        ("hard_share", [0.03, 0.1, 0.3], 0.3, 0.9),
    ],
)
def test_how_far_one_goes_beyond_an_end(name, values, end, step):
    assert tuning.further(name, values, end) == step


def landscape(value, asked):
    """Trains nothing: validation of a run by a formula."""

    def train(runs):
        for run in runs:
            asked.setdefault(pathlib.Path(run.workdir).name.split("_lr")[0], []).append(run)
        return [{"best_metric": value(run), "best_epoch": 1, "error": None} for run in runs]

    return train


def test_ends_are_gone_beyond_and_bases_joined(tmp_path):
    """Best: lr .8 of .1 and .2, width 256 and popular negatives together, lambda 9 of 1 and 3."""

    def value(run):
        wide, popular = run.model.dim == 256, run.sampler.negatives == "popularity"
        total = -abs(run.optimizer.lr - 0.8) - abs(run.optimizer.l2 - 1) + 0.1 * wide
        total += 0.1 * popular - 1.0 * (run.loss_name == "bce")
        return total - abs(run.guidance.weight - 9.0) / 100 * run.guided

    asked = {}
    plan = plan_of(
        tmp_path, asked=("none", "paper"), widen=True, bases={"mf": arms.BASES["mf"]}
    )  # fmt: skip
    tuned = tuning.tune(plan, landscape(value, asked))["mf"]
    base = {"dim": 256, "negatives": "popularity", "popularity_power": 0.5}
    assert tuned["none"]["chosen"] == {"lr": 0.8, "l2": 1.0, **base}
    # Grid 6, two steps of lr, three bases, both that help, two points beside.
    assert len(tuned["none"]["tried"]) == 6 + 2 + 3 + 1 + 2
    assert [run.optimizer.lr for run in asked["none"][6:8]] == [0.4, 0.8]
    assert [run.optimizer.l2 for run in asked["none"][-2:]] == [0.0, 2.0]
    assert tuned["paper"]["chosen"] == {**tuned["none"]["chosen"], "lambda": 9.0}
    assert len(tuned["paper"]["tried"]) == len(tuned["none"]["tried"])
    assert tuning.at_an_end("none", tuned["none"]) == [
        "lr 0.8, the greatest",
        "dim 256, the greatest",
    ]

    # A budget holds for everything; without `widen` and bases nothing is added.
    few = plan_of(tmp_path, asked=("none",), widen=True, bases=plan.bases, tune_runs=7)
    assert len(tuning.tune(few, landscape(value, {}))["mf"]["none"]["tried"]) == 7
    plain = plan_of(tmp_path, asked=("none",))
    assert len(tuning.tune(plain, landscape(value, {}))["mf"]["none"]["tried"]) == 6


def test_hard_negatives_of_ones_own_are_tuned_by_their_share(tmp_path):
    def value(run):
        popular = run.sampler.negatives == "popularity"
        return 0.1 * popular - abs(run.sampler.hard_share - 0.9) * run.draws_hard_negatives

    asked = {}
    plan = plan_of(
        tmp_path, asked=("none", "hard_own"), teacher="", widen=True, bases={"mf": arms.BASES["mf"]}
    )  # fmt: skip
    plan.check()
    tuned = tuning.tune(plan, landscape(value, asked))["mf"]
    assert tuned["none"]["chosen"]["negatives"] == "popularity"
    assert tuned["hard_own"]["chosen"]["hard_share"] == 0.9
    best = plan.tune_dir("mf", "none", tuned["none"]["chosen"])
    for run in asked["hard_own"]:  # the arm is what it is, whatever suits `none`
        assert (run.sampler.negatives, run.guided) == ("hard", False)
        assert run.reference_runs == (str(best),)
    assert len(tuned["hard_own"]["tried"]) == len(tuned["none"]["tried"])
    run = plan.run("mf", "hard_own", tuned, 1)
    assert run.reference_runs == (plan.run("mf", "none", tuned, 1).workdir,)
