"""Arms and controls as data: order, knobs, grids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import worlds
from comparisons import plan_of

from slgr_jax import config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arm_spaces, arms, comparison, planning, results, search_space
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import controls, edit_controls, edits, preferences


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


def test_arms_of_other_products_read_them_alone(tmp_path):
    products = {"--edits": "noise", "--insert": "taken", "--keep_hard": "rated"}
    asked = ("none", "truncated", "edited", "edited_random", "inserted", "kept_hard")
    plan = plan_of(tmp_path, asked=asked, backbones=("sasrec",), products=products)
    of_sequences = ("none", "edited", "edited_random", "inserted")
    runs = {arm: plan.config("sasrec", arm, {}, tmp_path) for arm in of_sequences}
    assert {arm: (run.edits.product, run.edits.inserted) for arm, run in runs.items()} == {
        **{"none": ("", ""), "edited": ("noise", ""), "edited_random": ("noise.random", "")},
        "inserted": ("", "taken"),
    }
    assert all(not plan.teacher_of(arm) for arm in asked)
    hard, plain = (plan.config("mf", arm, {}, tmp_path) for arm in ("kept_hard", "truncated"))
    assert (hard.hardness.product, hard.sampler.negatives) == ("rated", "scored")
    assert dataclasses.replace(hard, hardness=plain.hardness, sampler=plain.sampler) == plain
    # Of labelled rows no negative is drawn.
    knobs = {"rating_threshold": 3.0, "loss": "bce"}
    rows = dataclasses.replace(plan, knobs=knobs).config("mf", "kept_hard", {}, tmp_path)
    assert (rows.hardness.product, rows.sampler.negatives) == ("rated", "uniform")


def test_what_is_searched_of_edits_is_of_their_product(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "data")
    rows = np.array([0, 3, 7, 8])
    told = preferences.Provenance(built_from="train_only")

    def plan(noise, named, asked=("edited", "edited_random"), **more):
        noise, named = np.array(noise, np.float32), np.array(named)
        edits.write(dataset, "n", rows, noise, named, provenance=told, overwrite=True)
        request = planning.Request(guidance=("none", *asked), controls=(), edits="n", **more)
        return planning.make_plan(str(dataset.path), tmp_path / "out", request)

    found = plan([0.25, 0.5, 0.75, 0.75], [2, -1, -1, -1])
    space = arm_spaces.space_of(found, "mf", "edited")
    assert space == arm_spaces.space_of(found, "mf", "edited_random")
    assert space["edit_threshold"] == search_space.Range(0.25, 0.5)  # above it there is always one
    assert space["edit_how"].values == ("replace", "delete", "weigh")
    assert not {"edit_threshold", "edit_how"} & {*arm_spaces.space_of(found, "mf", "none")}
    # Without replacements, or where there is nothing to choose a threshold from, or a loss of rows.
    found = plan([0.75, 0.75, 0.75, 0.75], [-1, -1, -1, -1])
    space = arm_spaces.space_of(found, "mf", "edited")
    assert space["edit_how"].values == ("delete", "weigh")
    assert "edit_threshold" not in space
    found = plan(
        [0.25, 0.5, 0.75, 0.75], [2, 1, 1, 1], knobs={"rating_threshold": 3.0, "loss": "bce"}
    )
    assert arm_spaces.space_of(found, "mf", "edited")["edit_how"].values == ("delete", "weigh")
    for request, message in (
        ({"guidance": ("edited",)}, "missing --edits=NAME .*, which arm edited reads"),
        ({"guidance": ("none",), "keep_hard": "r"}, "--keep_hard=r is read by no arm; add kept_h"),
        ({"guidance": ("inserted",), "insert": "t"}, "arm inserted of mf: --insert=t puts items"),
        ({"guidance": ("none",), "knobs": {"edits": "n"}}, "--edits=n is set by the arms"),
    ):
        with pytest.raises(ConfigError, match=message):
            planning.make_plan(str(dataset.path), tmp_path, planning.Request(**request))
    own = dataclasses.replace(found, products={"--insert": "t", "--keep_hard": "r"})
    assert arm_spaces.space_of(own, "sasrec", "inserted")["inserted_per_user"].values == (1, 2, 4)
    own = dataclasses.replace(own, knobs={})
    assert arm_spaces.space_of(own, "mf", "kept_hard")["hard_variance_share"].high == 1.0
    assert arm_spaces.space_of(own, "mf", "kept_hard")["loss"].values == ("bpr", "bce")


def test_random_edits_are_as_many_of_each_user(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "data")
    users = dataset.train.users
    rng = np.random.default_rng(1)
    rows = np.flatnonzero((rng.random(users.size) < 0.4) & (users != 3))
    noise = rng.random(rows.size).astype(np.float32)
    named = np.where(rng.random(rows.size) < 0.5, rng.integers(0, dataset.n_items, rows.size), -1)
    told = preferences.Provenance(built_from="train_only", model="m")
    edits.write(dataset, "n", rows, noise, named, provenance=told)
    assert edit_controls.ensure(dataset, "n") == edit_controls.ensure(dataset, "n") == "n.random"
    product, control = edits.load(dataset, "n"), edits.load(dataset, "n.random")
    assert (np.bincount(users[control.rows]) == np.bincount(users[product.rows])).all()
    assert (control.rows != product.rows).any()
    for user in range(dataset.n_users):
        mine, theirs = (
            sorted(zip(each.noise[of], each.replacements[of], strict=True))
            for each in (product, control)
            for of in [users[each.rows] == user]
        )
        assert [noise for noise, _ in mine] == [noise for noise, _ in theirs]
        for (_, item), (_, moved) in zip(mine, theirs, strict=True):
            assert moved in (item, -1)
    there = dataset.train.items[control.rows]
    assert (control.replacements != there).all()
    # An interaction is as likely as another: over seeds each is edited in its user's share.
    times = np.zeros(users.size)
    for seed in range(60):
        edit_controls.write(dataset, product, f"s{seed}", seed=seed)
        times[edits.load(dataset, f"s{seed}").rows] += 1
    share = np.bincount(users[rows], minlength=dataset.n_users) / np.bincount(users)
    assert np.abs(times / 60 - share[users]).max() < 0.3
    assert abs((times / 60 - share[users])[dataset.moments("train") == 0].mean()) < 0.05
    edits.write(dataset, "n", rows, noise / 2, named, provenance=told, overwrite=True)
    with pytest.raises(ConfigError, match=r"it controls other edits than n holds"):
        edit_controls.ensure(dataset, "n")


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
