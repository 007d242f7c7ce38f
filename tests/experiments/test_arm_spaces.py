"""What is searched of an arm: what all share first, its own after it, nothing that is given."""

from __future__ import annotations

import pyarrow as pa
import pytest
import worlds
from comparisons import GIVEN, plan_of

from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arm_spaces, arms, planning, presets, sampler
from slgr_jax.experiments.search_space import Choice, Range
from slgr_jax.teacher.products import preferences

SHARED = ["lr", "l2", "dropout", "dim", "loss", "popularity_power"]


def test_arms_share_ranges_and_have_their_own_after_them(tmp_path):
    plan = plan_of(
        tmp_path,
        asked=("none", "global", "paper", "budget", "calibrated", "hard_negatives", "kd", "auto"),
        controls=("ease",),
        variants=(*arms.VARIANTS, *arms.FREE_LISTS),
    )
    spaces = {arm: arm_spaces.space_of(plan, "mf", arm) for arm in plan.arms}
    for space in spaces.values():
        assert list(space)[:6] == SHARED
        assert {name: space[name] for name in SHARED} == spaces["none"]
    own = {arm: list(space)[6:] for arm, space in spaces.items()}
    assert own == {
        "none": [],
        "global": ["lambda", "guidance_loss"],
        "paper": ["lambda"],
        "budget": ["lambda", "budget", "guidance_loss"],
        "calibrated": ["lambda", "guidance_loss"],
        "hard_negatives": ["lambda", "gate_inputs"],
        "kd": ["lambda", "kd_temperature"],
        "auto": ["variant", "lambda"],
        "ease": ["variant", "lambda"],
    }
    assert spaces["global"]["guidance_loss"] == Choice(("hinge", "logistic"))
    assert spaces["calibrated"]["guidance_loss"] == Choice(("confidence", "hinge"))
    assert spaces["kd"]["kd_temperature"] == Range(0.25, 4.0, log=True)
    assert set(arm_spaces.RANGES) == set(config.BACKBONES)
    assert [plan.reads(arm) for arm in ("auto", "ease", "paper")] == ["strongest", "strongest", ""]


def test_losses_are_those_that_backbone_arm_and_catalogue_allow(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "hard_own"))

    def losses(backbone, arm, **more):
        of = arm_spaces.space_of(plan_of(tmp_path, asked=plan.arms, **more), backbone, arm)
        return of["loss"].values if "loss" in of else ()

    assert losses("mf", "none") == ("bpr", "bce", "softmax")
    assert losses("mf", "hard_own") == ("bpr", "bce")
    assert losses("dcnv2", "none") == ("bce", "bpr")
    assert losses("mf", "none", softmax=arm_spaces.softmax_of(10_001))[-1] == "sampled_softmax"
    assert arm_spaces.softmax_of(10_000) == "softmax"
    labelled = {"knobs": {"rating_threshold": 4.0}}
    assert losses("dcnv2", "none", **labelled) == ()  # bce alone: labels are given
    own = arm_spaces.space_of(plan, "mf", "hard_own")
    assert "popularity_power" not in own
    assert list(own)[-1] == "hard_share"
    truncated = plan_of(tmp_path, asked=("none", "truncated"))
    assert losses("mf", "truncated") == ("bpr", "bce")
    run = truncated.config("mf", "truncated", {}, tmp_path)
    assert (run.loss.drop, run.loss.drop_share, run.loss.drop_steps) == ("hardest", 0.1, 3000)


def test_what_is_given_is_not_searched_and_what_is_asked_for_is(tmp_path):
    plan = plan_of(
        tmp_path,
        asked=("none", "global", "kd"),
        knobs=GIVEN,
        search={
            "layers": Range(1, 3),
            "kd_temperature": Range(1.0, 2.0),
            "lambda": Range(1.0, 2.0),
        },
    )
    spaces = {arm: list(arm_spaces.space_of(plan, "mf", arm)) for arm in plan.arms}
    assert spaces == {
        "none": ["lr", "layers"],
        "global": ["lr", "lambda", "guidance_loss", "layers"],
        "kd": ["lr", "lambda", "kd_temperature", "layers"],
    }
    assert arm_spaces.space_of(plan, "mf", "kd")["kd_temperature"] == Range(1.0, 2.0)
    unused = plan_of(tmp_path, asked=("none",), search={"hard_share": Range(0.1, 0.2)})
    with pytest.raises(ConfigError, match="no arm has a use for hard_share"):
        arm_spaces.check(unused)
    for where in ({"asked": ("none",), "knobs": GIVEN}, {"asked": ("hard_own",)}):
        power = plan_of(tmp_path, search={"popularity_power": Range(0.5, 0.9)}, **where)
        space = arm_spaces.space_of(power, "mf", where["asked"][0])
        assert "popularity_power" not in space  # negatives are given
    nothing = plan_of(tmp_path, asked=("none",), knobs={**GIVEN, "lr": 0.1})
    with pytest.raises(ConfigError, match="nothing is left to search; add --trials=1"):
        arm_spaces.check(nothing)


def test_parameters_become_knobs_that_do_something(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "auto"), variants=arms.VARIANTS)
    space = arm_spaces.space_of(plan, "mf", "auto")
    params = {"lr": 0.1, "loss": "bpr", "popularity_power": 0.25, "variant": "none", "lambda": 3.0}

    def settings(**more):
        return arm_spaces.settings_of(plan, "mf", "auto", space, params | more)

    popular = {"negatives": "popularity", "popularity_power": 0.25}
    assert settings() == {"lr": 0.1, "loss": "bpr", "variant": "none", **popular}
    assert settings(loss="softmax") == {"lr": 0.1, "loss": "softmax", "variant": "none"}
    uniform = settings(popularity_power=0.0, variant="paper")
    assert uniform == {"lr": 0.1, "loss": "bpr", "variant": "paper", "lambda": 3.0}
    run = plan.config("mf", "auto", uniform, tmp_path)
    assert (run.gate.gate, run.guidance.teacher, run.sampler.negatives) == (
        *("paper", "llm"),
        "uniform",
    )


def test_the_first_trial_is_as_near_the_defaults_as_ranges_allow(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "hard_negatives"))
    first = [
        arm_spaces.first_params(plan, "mf", arm, arm_spaces.space_of(plan, "mf", arm))
        for arm in plan.arms
    ]
    base = {"lr": 0.05, "l2": 0.02, "dropout": 0.0, "dim": 64, "loss": "bpr"}
    base |= {"popularity_power": 0.0}
    assert first[0] == [base]
    inputs = "reference,history,popularity,teacher"
    assert first[1] == [base | {"lambda": 1.0, "gate_inputs": inputs}]
    (click,) = arm_spaces.first_params(
        plan, "dcnv2", "none", arm_spaces.space_of(plan, "dcnv2", "none")
    )
    assert (click["lr"], click["l2"], click["loss"]) == (1e-3, 1e-6, "bce")  # l2 0 is below it


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_search_what_the_paper_leaves_open(tmp_path, preset):
    data = worlds.random_dataset(tmp_path / "data")
    rows = [[0, 0, 1], [1, 2, 3], [0.5, 0.25, 0.1]]
    table = pa.table(rows, names=["user", "item", "score"]).cast(schema.TEACHER_SCORES)
    preferences.write_product(data, "llm", table, provenance=preferences.Provenance())
    request = planning.Request(preset=preset, teacher="llm")
    plan = planning.make_plan(str(data.path), tmp_path / "out", request)
    for backbone in plan.backbones:
        assert list(arm_spaces.space_of(plan, backbone, "none")) == ["lr", "l2", "dropout"]
        own = list(arm_spaces.space_of(plan, backbone, "paper"))[3:]
        assert own == ["lambda"]


def test_presets_run_what_the_paper_and_its_benchmark_say(tmp_path):
    data = worlds.random_dataset(tmp_path / "data")
    rows = [[0, 0, 1], [1, 2, 3], [0.5, 0.25, 0.1]]
    table = pa.table(rows, names=["user", "item", "score"]).cast(schema.TEACHER_SCORES)
    preferences.write_product(data, "llm", table, provenance=preferences.Provenance())

    def plan_of(**asked):
        request = planning.Request(preset="table2", teacher="llm", **asked)
        return planning.make_plan(str(data.path), tmp_path / "out", request)

    plan = plan_of(knobs={"epochs": 3})
    assert not plan.refit  # the paper trains on training alone
    assert plan_of(refit=True).refit
    run = plan.config("dcn", "paper", {"lambda": 0.5}, tmp_path / "run")
    assert run.pairwise.pair_selection == "largest_gap"
    assert (run.sampler.batch_size, run.model.dim, run.train.patience) == (128, 64, 2)
    assert (run.train.epochs, run.model.layers, run.loss_name) == (3, 3, "bce")
    assert run.guidance.weight == 0.5
    networks = [plan.config(name, "none", {}, tmp_path / "run").model for name in plan.backbones]
    shapes = [(network.backbone, network.layers, network.low_rank) for network in networks]
    assert shapes == [
        *(("deepfm", 2, 0), ("xdeepfm", 2, 0), ("autoint", 1, 0)),
        *(("dcn", 3, 0), ("dcnv2", 2, 4), ("din", 2, 0)),
    ]
    # What is given wins; KAR's experts need vectors.
    given = plan_of(knobs={"layers": 5}, vectors="texts")
    assert given.config("dcn", "none", {}, tmp_path / "run").model.layers == 5
    assert "kar" in given.arms
    assert "kar" not in plan.arms


def test_rows_of_mf_may_begin_with_the_factors_of_ease(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "init", "hard_negatives"), factors_width=512)
    spaces = {arm: arm_spaces.space_of(plan, "mf", arm) for arm in plan.arms}
    assert list(spaces["none"]) == [*SHARED, "start"]
    assert list(spaces["hard_negatives"])[:7] == [*SHARED, "start"]
    assert "start" not in spaces["init"]  # which begins with other vectors
    assert "start" not in arm_spaces.space_of(plan, "lightgcn", "none")
    drawn, factors = arm_spaces.first_params(plan, "mf", "none", spaces["none"])
    assert (drawn["start"], factors["start"]) == ("drawn", "ease")
    assert factors == {**drawn, "start": "ease", "lr": 0.01, "dim": 256}
    settings = arm_spaces.settings_of(plan, "mf", "none", spaces["none"], factors)
    run = plan.config("mf", "none", settings, tmp_path)
    assert run.vectors.init_products == dict.fromkeys(("item", "user"), arm_spaces.FACTORS)
    assert (run.vectors.init_how, run.vectors.init_scale) == ("leading", 10.0)
    of_drawn = arm_spaces.settings_of(plan, "mf", "none", spaces["none"], drawn)
    assert not plan.config("mf", "none", of_drawn, tmp_path).vectors.init_products

    def width(users, items, **knobs):
        return arm_spaces.factors_width({"users": users, "items": items}, knobs)

    assert width(600, 5000) == 512
    assert width(600, 5001) == 0  # EASE is not a baseline there
    assert width(300, 5000) == 300  # there are no more
    assert width(100, 200, dim=64) == 64


def test_draws_at_random_depend_on_seed_number_and_the_space_before():
    pytest.importorskip("optuna", reason="needs the extra tune")
    base = {"lr": Range(1e-3, 1.0, log=True), "dim": Choice((8, 16, 32))}
    more = {**base, "lambda": Range(0.1, 10.0, log=True)}

    def draw(space, number, seed=0, tried=()):
        return sampler.suggest(
            space, tried, kind="tpe", sampler_seed=seed, number=number, startup=5
        )

    for number in range(4):
        first = draw(base, number)
        assert first == draw(base, number, tried=[({"lr": 0.5, "dim": 8}, 1.0)] * 9)
        assert {name: draw(more, number)[name] for name in base} == first
        assert first != draw(base, number, seed=1)
    assert len({draw(base, number)["lr"] for number in range(4)}) == 4
    # Later it learns: of two settings the good one's surroundings.
    tried = [({"lr": 10 ** (-3 + i / 4), "dim": 8}, float(i >= 8)) for i in range(12)]
    tried[3] = (tried[3][0], None)  # diverged
    later = [draw(base, 12 + number, tried=tried)["lr"] for number in range(20)]
    assert sum(lr > 0.05 for lr in later) > 14
