"""Arms and controls as data: order, knobs, grids."""

from __future__ import annotations

import numpy as np
import pytest
import worlds
from comparisons import plan_of

from slgr_jax import config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arm_spaces, arms, comparison, planning, results
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import controls


def test_arms_are_ordered_and_matched():
    def choose(asked, controls=(), matched="", focus="", own_arms=None):
        return arms.choose(asked, controls, matched, focus, own_arms or {})

    assert choose(("global",)) == (("none", "global"), "", "global")
    every = choose(("constant", "paper", "calibrated"), ("shuffled", "constant"))
    assert every == (
        ("none", "paper", "calibrated", "constant", "shuffled"),
        "calibrated",
        "calibrated",
    )
    assert choose(("paper", "rule"), ("shuffled",), "rule", "paper")[1:] == ("rule", "paper")
    assert choose(("paper", "auto"), ("shuffled",))[1:] == ("auto", "auto")
    assert choose(("auto",), ("shuffled",), focus="auto")[0] == ("none", "auto", "shuffled")
    # Without a gate to match there is nothing to control.
    assert choose(("none", "global"), arms.CONTROLS) == (("none", "global"), "", "global")
    wide = {"wide": {"guidance": "pairwise", "gate": "paper"}}
    assert choose(("global",), ("shuffled",), own_arms=wide)[1] == "wide"
    for bad, message in (
        ((("best",),), "--guidance: best .* none, global, pointwise"),
        ((("paper",), ("swapped",)), "--controls: swapped .* constant"),
        ((("paper",), (), "global"), "--matched_to=global .* paper"),
        ((("paper",), (), "", "rule"), "--focus=rule .* paper"),
        ((("global", "shuffled"),), "control shuffled .* paper"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(*bad)


def test_an_arm_of_ones_own():
    name, knobs = arms.own_arm("wide:gate=paper,margin=0.5,guidance_loss=logistic,item_bias=false")
    assert (name, knobs["guidance"], knobs["margin"]) == ("wide", "pairwise", 0.5)
    run = config.make_run("", "", teacher="llm", **knobs)
    assert (run.gate.gate, run.pairwise.margin, run.model.item_bias) == ("paper", 0.5, False)
    assert arms.own_arm("w:gate_inputs=history,teacher,gate_hidden=8")[1] == {
        "guidance": "pairwise", "gate_inputs": "history,teacher", "gate_hidden": 8,
    }  # fmt: skip
    for text in ("wide", "wide:", "wide:gate", "a b:gate=paper", "paper:gate=rule"):
        with pytest.raises(ConfigError, match="--arm="):
            arms.own_arm(text)


def test_every_arm_is_the_run_that_its_name_says(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "global", "rule", "paper"), controls=arms.CONTROLS,
                   knobs={"epochs": 7, "guidance_loss": "logistic"})  # fmt: skip
    settings = {"lr": 0.3, "lambda": 2.0}
    runs = {arm: plan.config("mf", arm, settings, tmp_path, 4) for arm in plan.arms}
    for arm, run in runs.items():
        assert (run.optimizer.lr, run.guidance.weight, run.train.epochs) == (0.3, 2.0, 7)
        assert (run.train.seed, run.workdir) == (4, str(tmp_path))
        assert run.guidance.guidance == ("none" if arm == "none" else "pairwise")
        # A knob of every run, where the arm has a use for it: `none` would refuse it.
        assert run.pairwise.guidance_loss == ("auto" if arm == "none" else "logistic")
    teachers = {arm: run.guidance.teacher for arm, run in runs.items()}
    assert teachers == {
        **dict.fromkeys(("global", "rule", "paper", "constant"), "llm"),
        **{c: f"llm.{c}" for c in controls.CONTROLS},
        "none": "",
    }
    gates = {arm: run.gate.gate for arm, run in runs.items() if arm != "none"}
    assert gates == {
        **{arm: arm for arm in ("rule", "paper", "constant")},
        **dict.fromkeys(controls.CONTROLS, "paper"),
        "global": "constant",
    }
    assert runs["global"].gate.alpha == 1.0
    assert plan.config("mf", "constant", {"alpha": 0.25}, tmp_path).gate.alpha == 0.25
    arm_spaces.check(plan)
    wrong = plan_of(tmp_path, own_arms={"wide": {"guidance": "pairwise", "gate": "oracle"}})
    with pytest.raises(ConfigError, match="arm wide of mf: --gate='oracle'"):
        arm_spaces.check(wrong)


def test_arms_of_vectors_have_no_teacher_and_the_product_of_vectors(tmp_path):
    plan = plan_of(tmp_path, asked=("none", "init", "adapter", "global"), vectors="words")
    runs = {arm: plan.config("mf", arm, {"lr": 0.3}, tmp_path) for arm in plan.arms}
    assert {arm: run.guidance.teacher for arm, run in runs.items()} == {
        **dict.fromkeys(("none", "init", "adapter"), ""),
        "global": "llm",
    }
    assert runs["init"].vectors.init_products == {"item": "words"}
    assert runs["adapter"].vectors.products == {"item": "words"}
    assert runs["global"].vectors == runs["none"].vectors
    assert not runs["none"].vectors.init_products


def test_arms_of_vectors_need_a_product_and_no_teacher(tmp_path):
    data = str(worlds.random_dataset(tmp_path / "data").path)

    def plan(**asked):
        return planning.make_plan(data, tmp_path, planning.Request(**asked))

    asked = plan(guidance=("none", "init", "adapter"), vectors="words", controls=())
    assert asked.arms == ("none", "init", "adapter")
    assert asked.focus == "adapter"
    for request, message in (
        ({"guidance": ("init",)}, "missing --vectors=NAME .*, which arm init reads"),
        ({"guidance": ("none",), "vectors": "words"}, "--vectors=words is read by no arm"),
        ({"guidance": ("init", "global"), "vectors": "words"}, "missing --teacher; without one"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(**request)
    dataset = dataset_lib.load(data)
    for name, kind in (("one", Vectors), ("several", chunks_of_one)):
        rows = (dataset.n_items, dataset.n_users)
        both = (kind(np.ones((n, 2), np.float32), np.ones(n, bool)) for n in rows)
        embeddings.write(dataset, name, *both, users_from="file")
    with pytest.raises(ConfigError, match=r"arm kser chooses .* has one vector a row"):
        plan(guidance=("kser",), vectors="one")
    assert plan(guidance=("kar", "kser"), vectors="several").arms == ("none", "kar", "kser")


def chunks_of_one(values, has):
    return Chunks(values[:, None].astype(np.float16), has[:, None].astype(np.int16), {"text": 1})


@pytest.mark.parametrize("matched", arms.GATED)
def test_every_control_copies_every_gated_arm(tmp_path, matched):
    """A constant gate has the matched gate's weight: of `confidence` and `gain`, whose weight is
    not alpha, on the loss whose weight is; other losses stay, and so do the pairs."""
    plan = plan_of(tmp_path, asked=("none", matched), controls=arms.CONTROLS)
    arm_spaces.check(plan)
    losses = {"calibrated": "logistic", "hard_negatives": "logistic"}
    constant = plan.config("mf", "constant", {"alpha": 0.25}, tmp_path)
    assert constant.guidance_loss_name == losses.get(matched, "hinge")
    assert constant.hard_negatives == plan.config("mf", matched, {}, tmp_path).hard_negatives
    if matched == "calibrated":  # a loss that its search chose
        for chosen, loss in (("hinge", "hinge"), ("confidence", "logistic"), ("soft", "soft")):
            settings = {"alpha": 0.25, "guidance_loss": chosen}
            assert plan.config("mf", "constant", settings, tmp_path).guidance_loss_name == loss
    assert constant.gate.gate == "constant"
    shuffled = plan.config("mf", "shuffled", {}, tmp_path)
    if matched.endswith("_selective"):  # it has no loss of pairs
        assert shuffled.guidance.guidance == constant.guidance.guidance == matched[:-10]
        assert shuffled.gate.gate == "calibrated"
        return
    losses = {"calibrated": "confidence", "hard_negatives": "gain"}
    assert shuffled.guidance_loss_name == losses.get(matched, "hinge")


def test_a_constant_gate_copies_an_arm_without_pairs(tmp_path):
    """It has no knobs of pairwise guidance, which its run would refuse."""
    own = dict([arms.own_arm("lists:guidance=rrd,gate=calibrated,rrd_pool=9")])
    plan = plan_of(tmp_path, asked=("none",), controls=("constant",), own_arms=own)
    arm_spaces.check(plan)
    run = plan.config("mf", "constant", {"alpha": 0.25}, tmp_path)
    assert (run.guidance.guidance, run.gate.gate, run.gate.alpha) == ("rrd", "constant", 0.25)
    assert run.rrd.pool == 9


def test_teachers_share_a_folder_and_the_runs_without_one(tmp_path):
    plans = [plan_of(tmp_path, teacher=name, controls=("shuffled",)) for name in ("llm", "gpt")]
    for where in (
        lambda plan, arm: plan.tune_dir("mf", arm),
        lambda plan, arm: plan.run_dir("mf", arm, {"trial": None, "chosen": {}}, 1),
    ):
        first, second = ([where(plan, arm) for arm in plan.arms] for plan in plans)
        assert plans[0].arms == ("none", "global", "paper", "shuffled")
        assert first[0] == second[0]
        assert not set(first[1:]) & set(second[1:])
        assert all(path.parent.name == "llm" for path in first[1:])


def test_the_report_of_another_teacher_is_kept(tmp_path):
    for name in ("report.md", "summary.tex", "ndcg.png"):
        (tmp_path / name).write_text("old")
    results.write_json(tmp_path / "report.json", {"protocol": {"teacher": "llm"}})
    comparison._keep_other(tmp_path, "llm")  # the same: to be written anew
    assert (tmp_path / "report.md").is_file()
    comparison._keep_other(tmp_path, "gpt")
    assert not list(tmp_path.glob("*.*"))
    kept = sorted(path.name for path in (tmp_path / "reports" / "llm").iterdir())
    assert kept == ["ndcg.png", "report.json", "report.md", "summary.tex"]
    comparison._keep_other(tmp_path, "gpt")  # nothing there
