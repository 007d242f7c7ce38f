"""One search for every arm: as many trials, alike draws, wider ranges where they end too early."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import pytest
from comparisons import GIVEN, plan_of

from slgr_jax import config
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arm_spaces, arms, comparison, pool, results, tuning

pytest.importorskip("optuna", reason="needs the extra tune")
SHARED = ("lr", "l2", "dropout", "dim")


class Landscape:
    """Trains nothing: validation of a run by a formula; a run that has an outcome is finished.

    Attributes:
      trained: workdirs, in the order in which they were trained.
      runs: workdir -> run.
    """

    def __init__(self, value, *, stop_at=0):
        self.value, self.stop_at = value, stop_at
        self.trained, self.runs = [], {}

    def __call__(self, runs):
        return [self._outcome(run) for run in runs]

    def streams(self, streams, total):
        """As `pool.train_streams`, all streams in step."""
        while batches := pool._due(streams):
            for stream, due in batches:
                stream.tell(self(due))

    def _outcome(self, run):
        root = pathlib.Path(run.workdir)
        self.runs[run.workdir] = run
        if (done := results.outcome(root)) is not None:
            return done
        if len(self.trained) + 1 == self.stop_at:
            raise KeyboardInterrupt
        self.trained.append(run.workdir)
        value = self.value(run)
        error = "not finite" if value is None else None
        outcome = {"best_metric": value, "best_epoch": 2, "error": error}
        root.mkdir(parents=True, exist_ok=True)
        results.write_json(root / results.OUTCOME, outcome)
        log = [{"epoch": e, "train/alpha": a} for e, a in enumerate((0.9, 0.375, 0.1), 1)]
        (root / results.LOG).write_text("".join(json.dumps(record) + "\n" for record in log))
        return outcome


def near(best):
    """Greatest, 0, at a learning rate."""
    return lambda run: -(math.log(run.optimizer.lr / best) ** 2)


def options(**more):
    return config.CompareConfig(**{"trials": 8, "widen": False, "base": False} | more)


def test_every_arm_has_as_many_trials_and_draws_alike(tmp_path):
    plan = plan_of(
        tmp_path,
        controls=("constant", "shuffled", "popularity"),
        options=options(widen=True),
    )
    tuned = tuning.tune(plan, Landscape(near(0.1)).streams)["mf"]
    counts = {arm: len(of_arm["tried"]) for arm, of_arm in tuned.items()}
    assert counts == {
        **dict.fromkeys(("none", "global", "paper", "popularity"), 8 + 2 + 2),
        **dict.fromkeys(("constant", "shuffled"), 0),
    }
    # The defaults first; what is drawn at random is the same of what arms share.
    rows = {arm: tuned[arm]["tried"] for arm in ("none", "global", "paper", "popularity")}
    for number in range(4):
        shared = [{name: row[number][name] for name in SHARED} for row in rows.values()]
        assert shared == [shared[0]] * 4
        assert (shared[0]["lr"] == 0.05) == (number == 0)
    for name in SHARED:
        assert len({tuned[arm]["ranges"][name] for arm in rows}) == 1
    # Matched controls have the settings of paper, and its gate's mean weight in its best epoch.
    assert tuned["shuffled"]["chosen"] == tuned["paper"]["chosen"]
    assert tuned["constant"]["chosen"] == {**tuned["paper"]["chosen"], "alpha": 0.375}


@pytest.mark.parametrize(
    ("best", "widened"),
    [(0.06, 0), (1.0, 2), (0.5, 1), (0.003, 2)],
)
def test_a_range_is_widened_where_the_optimum_is_outside_and_not_otherwise(tmp_path, best, widened):
    plan = plan_of(
        tmp_path, asked=("none",), knobs=GIVEN, options=options(trials=16, widen=True)
    )  # fmt: skip
    tuned = tuning.tune(plan, Landscape(near(best)).streams)["mf"]["none"]
    assert tuned["ranges"] == {"lr": "0.01..0.3:log"}
    rates = [row["lr"] for row in tuned["tried"]]
    assert len(rates) == 16 + 4 + 4
    assert all(0.01 <= rate <= 0.3 for rate in rates[:16])
    assert len(tuned["widened"]) == widened
    if not widened:
        assert all(0.01 <= rate <= 0.3 for rate in rates)
        assert tuned["ends"] == []
        return
    # The first trial of a widened range is in the middle of what is new: 30^(1/6) beyond the end.
    end, sign = (0.3, 1) if best > 0.1 else (0.01, -1)
    assert rates[16] == pytest.approx(end * 30 ** (sign / 6), rel=1e-3)
    assert tuned["widened"][0].startswith("lr 0.01..0.3:log to ")
    assert tuned["widened"][0].endswith("after 16 trials")
    assert abs(math.log(tuned["chosen"]["lr"] / best)) < abs(math.log(end / best))


def test_a_search_that_is_interrupted_repeats_nothing(tmp_path):
    def search(name, landscape):
        plan = plan_of(
            tmp_path / name, asked=("none", "paper", "hard_own"), options=options(widen=True)
        )
        return tuning.tune(plan, landscape.streams)["mf"]

    whole = search("whole", Landscape(near(0.1)))
    parts = []
    for stop_at in (3, 9, 17, 0):
        landscape = Landscape(near(0.1), stop_at=stop_at)
        parts.append(landscape)
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                search("parts", landscape)
        else:
            resumed = search("parts", landscape)
    assert resumed == whole
    trained = [workdir for landscape in parts for workdir in landscape.trained]
    assert len(trained) == len(set(trained)) == 3 * 12

    again = Landscape(near(0.1))
    assert search("parts", again) == whole
    assert again.trained == []


def test_the_seed_of_the_sampler_says_what_is_drawn(tmp_path):
    def search(name, **more):
        plan = plan_of(tmp_path / name, asked=("none",), options=options(**more))
        return tuning.tune(plan, Landscape(near(0.1)).streams)["mf"]["none"]["tried"]

    first = search("a")
    assert first == search("b")
    other = search("c", sampler_seed=1)
    assert first[0] == other[0]  # the defaults
    assert all(a["lr"] != b["lr"] for a, b in zip(first[1:], other[1:], strict=True))
    assert search("d", sampler="random")[:4] == first[:4]
    with pytest.raises(ConfigError, match=r"other settings \(sampler_seed: 0 -> 1\)"):
        search("a", sampler_seed=1)


def test_a_trial_that_diverges_is_not_chosen(tmp_path):
    plan = plan_of(tmp_path / "some", asked=("none",))

    def fast_ones_diverge(run):
        return None if run.optimizer.lr > 0.05 else run.optimizer.lr

    tuned = tuning.tune(plan, Landscape(fast_ones_diverge).streams)["mf"]["none"]
    assert tuned["chosen"]["lr"] <= 0.05
    assert any(row["valid"] is None for row in tuned["tried"])
    plan = plan_of(tmp_path / "all", asked=("none",))
    with pytest.raises(ConfigError, match="every trial of arm none of mf diverged"):
        tuning.tune(plan, Landscape(lambda run: None).streams)

    def unjudged(streams, total):
        (stream,) = streams
        stream.tell([{"best_metric": None, "best_epoch": 1, "error": None}] * len(stream.due()))

    with pytest.raises(ConfigError, match="no validation part"):
        tuning.tune(plan_of(tmp_path / "none", asked=("none",)), unjudged)


def test_auto_is_what_each_seed_prefers_of_its_two_best_variants(tmp_path):
    """Best: global, then paper; seed 1 prefers paper."""
    worth = {"global": 0.3, "paper": 0.2, "none": 0.1, "calibrated": 0.0}
    trained = []

    def value(run):
        trained.append(run)
        gate = run.gate.gate if run.guided else "none"
        variant = {"constant": "global"}.get(gate, gate)
        return worth[variant] + 0.2 * (run.train.seed == 1 and variant == "paper")

    plan = plan_of(
        tmp_path,
        asked=("none", "auto"),
        controls=("constant", "shuffled", "ease"),
        variants=arms.VARIANTS,
    )
    assert (plan.matched, plan.focus) == ("auto", "auto")
    landscape = Landscape(value)
    tuned = tuning.tune(plan, landscape.streams)
    of_auto = tuned["mf"]["auto"]
    finalists = [finalist["chosen"]["variant"] for finalist in of_auto["finalists"]]
    assert finalists == ["global", "paper"]
    assert of_auto["chosen"]["variant"] == "global"
    before = len(trained)
    runs = comparison._train_seeds(plan, tuned, landscape)
    chosen = [choice["variant"] for choice in of_auto["by_seed"]]
    assert chosen == ["global", "paper", "global"]
    assert of_auto["by_seed"][1]["valid"] == {"global": 0.3, "paper": pytest.approx(0.4)}
    gates = [run.gate.gate for run in runs["mf", "auto"]]
    assert gates == ["constant", "paper", "constant"]
    assert [run.train.seed for run in runs["mf", "auto"]] == [0, 1, 2]
    # As many runs as any other arm's: the second finalists are of its trials.
    assert len(of_auto["tried"]) + 2 * (plan.seeds - 1) == 8 + plan.seeds - 1
    # none, auto, and the controls that are matched to it: ease chooses for itself.
    assert len(trained) - before == (1 + 2 + 2) * (plan.seeds - 1) + 2 * plan.seeds
    assert {row["variant"] for row in of_auto["tried"][:4]} == set(arms.VARIANTS)
    assert len(tuned["mf"]["ease"]["tried"]) == len(of_auto["tried"])
    assert [choice["variant"] for choice in tuned["mf"]["ease"]["by_seed"]] == chosen
    teachers = {arm: runs["mf", arm][0].guidance.teacher for arm in plan.arms}
    assert teachers == {
        **{"none": "", "auto": "llm", "constant": "llm"},
        **{"shuffled": "llm.shuffled", "ease": "llm.ease"},
    }
    assert runs["mf", "constant"][0].gate.alpha == 0.375


def test_every_search_begins_at_what_one_without_guidance_found(tmp_path):
    """The optimum, lr 1, is outside of the range: the base's search is wider at its end."""
    worth = {"none": 0.0, "global": 0.1, "paper": 0.2, "calibrated": 0.3}

    def value(run):
        gate = run.gate.gate if run.guided else "none"
        return near(1.0)(run) + worth[{"constant": "global"}.get(gate, gate)]

    plan = plan_of(
        tmp_path,
        asked=("none", "global", "auto"),
        variants=arms.VARIANTS,
        options=options(widen=True, base=True, trials=12),
        seeds=2,
    )
    landscape = Landscape(value)
    tuned = tuning.tune(plan, landscape.streams)["mf"]
    base_dir = plan.base_dir("mf")
    assert [pathlib.Path(run).parent for run in landscape.trained[:18]] == [base_dir] * 18
    assert base_dir not in {pathlib.Path(run).parent for run in landscape.trained[18:]}
    of_base = {run: near(1.0)(landscape.runs[run]) for run in landscape.trained[:18]}
    best = landscape.runs[max(of_base, key=of_base.get)]
    assert set(tuned) == {"none", "global", "auto"}
    for arm, of_arm in tuned.items():
        assert of_arm["base"]["valid"] == max(of_base.values())
        assert of_arm["base"]["trials"] == len(of_arm["tried"]) + (arm == "auto") == 18
        assert of_arm["base"]["settings"]["lr"] == best.optimizer.lr > 0.3
        assert of_arm["tried"][0]["lr"] == best.optimizer.lr
        assert of_arm["ranges"]["lr"].startswith("0.01..")
        assert "0.3:" not in of_arm["ranges"]["lr"]

    # What is drawn at random: an arm's own knobs and lr at the base's; without own ones all knobs,
    # others than the base drew.
    drawn = {arm: tuned[arm]["tried"][1:6] for arm in tuned}
    shared = {name: tuned["global"]["tried"][0][name] for name in SHARED}
    for row in drawn["global"]:
        assert {**row, "lr": shared["lr"]}.items() >= shared.items()
    assert len({(row["lambda"], row["lr"]) for row in drawn["global"]}) == 5
    powers = {row["popularity_power"] for row in drawn["none"] if "popularity_power" in row}
    of_base = {landscape.runs[run].sampler.popularity_power for run in landscape.trained[:18]}
    assert len(powers) > 1
    assert not powers & of_base
    # A trial of each variant there.
    firsts = tuned["auto"]["tried"][:4]
    assert [row["variant"] for row in firsts] == list(arms.VARIANTS)
    assert all({name: row[name] for name in SHARED} == shared for row in firsts)

    again = Landscape(value)
    assert tuning.tune(plan, again.streams)["mf"] == tuned
    assert again.trained == []
    without = dataclasses.replace(plan, options=options(widen=True, trials=12))
    with pytest.raises(ConfigError, match=r"begins at: .* -> not given"):
        tuning.tune(without, again.streams)


def test_nothing_is_searched_twice_where_there_is_nothing_to_begin_with(tmp_path):
    alone = plan_of(tmp_path, asked=("none",), options=options(base=True))
    assert not arm_spaces.has_base(alone, "mf")
    knobs = {**GIVEN, "lr": 0.1}
    given = plan_of(tmp_path, knobs=knobs, options=options(base=True, trials=1))
    assert not arm_spaces.has_base(given, "mf")
    assert arm_spaces.has_base(plan_of(tmp_path, options=options(base=True)), "mf")


def test_auto_needs_a_trial_of_each_variant(tmp_path):
    few = plan_of(
        tmp_path, asked=("none", "auto"), variants=arms.VARIANTS, options=options(trials=5)
    )
    with pytest.raises(ConfigError, match="--trials=5 is below the 6 that arm auto takes"):
        arm_spaces.check(few)
    arm_spaces.check(dataclasses.replace(few, options=options(trials=6)))


@pytest.mark.parametrize("strongest", ["none", "hard_own"])
def test_a_reference_is_the_strongest_run_without_an_llm_of_the_same_seed(tmp_path, strongest):
    """While tuning, at the settings that its arm got; later of each seed, which train before. What
    asks for the run of `none` has that one."""
    wide = {"guidance": "pairwise", "gate": "constant", "hard_negatives": 7}
    plan = plan_of(
        tmp_path,
        asked=("none", "paper", "hard_negatives", "hard_own"),
        controls=("shuffled", "popularity"),
        own_arms={"wide": {**wide, "reference_runs": "none"}},
    )
    assert (plan.matched, plan.focus) == ("hard_negatives", "hard_negatives")
    landscape = Landscape(
        lambda run: (
            near(0.1)(run)
            + 9 * ("reference" not in run.gate.gate_inputs)
            + (run.draws_hard_negatives and strongest == "hard_own")
        )
    )
    tuned = tuning.tune(plan, landscape.streams)["mf"]
    best, best_own = (str(plan.run_dir("mf", arm, tuned[arm], 0)) for arm in ("none", "hard_own"))
    read = {
        **dict.fromkeys(("none", "paper"), ()),
        **dict.fromkeys(("hard_own", "wide"), (best,)),
        **dict.fromkeys(("hard_negatives", "popularity"), (best_own,)),
    }
    if strongest == "none":
        read |= {"hard_negatives": (best,), "popularity": (best,)}
    assert tuned["hard_negatives"]["reference"] == tuned["popularity"]["reference"] == strongest
    assert "reference" not in tuned["paper"]
    for workdir, run in landscape.runs.items():
        arm = pathlib.Path(workdir).parent.name
        assert run.reference_runs == read[arm]
        if arm in ("hard_negatives", "popularity", "wide"):
            assert run.hard_negatives == (7 if arm == "wide" else 100)
        if arm == "hard_own":  # the arm is what it is, whatever suits `none`
            assert (run.sampler.negatives, run.guided) == ("hard", False)
            assert run.loss_name in ("bpr", "bce")
    # The better gate, without its reference, was among what was searched, and chosen.
    for arm in ("hard_negatives", "shuffled"):
        assert tuned[arm]["chosen"]["gate_inputs"] == "history,popularity,teacher"
    runs = {(arm, seed): plan.run("mf", arm, tuned, seed) for arm in plan.arms for seed in range(2)}
    assert runs["none", 0].workdir == best
    for seed in range(2):
        for arm in ("hard_negatives", "shuffled", "popularity"):
            assert runs[arm, seed].reference_runs == (runs[strongest, seed].workdir,)
        for arm in ("wide", "hard_own"):
            assert runs[arm, seed].reference_runs == (runs["none", seed].workdir,)
    assert runs["paper", 1].reference_runs == ()

    # Runs that others read are trained before them.
    asked = [runs[name] for name in (("hard_negatives", 1), ("hard_own", 1), ("none", 1))]
    expected = [asked[2:], asked[:2]] if strongest == "none" else [[asked[i]] for i in (2, 1, 0)]
    assert pool.waves(asked) == expected
