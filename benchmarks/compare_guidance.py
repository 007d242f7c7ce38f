"""Does guidance help, and does selecting? Arms and controls on backbones, tuned alike, many seeds.

    python benchmarks/compare_guidance.py --data=DATA --teacher=NAME --out=DIR
    python benchmarks/compare_guidance.py --data=DATA --teacher=NAME --out=DIR \\
        --backbones=mf,lightgcn,sasrec,dcnv2 --guidance=none,global,rule,paper,calibrated --seeds=10
    python benchmarks/compare_guidance.py --preset=table3 --data=SPORTS,BEAUTY,TOYS --out=DIR

1. Tuning, on validation with seed 0: `none` over the backbone's grid; every other arm over lambda
   at the settings of `none`, its other guidance loss at the best lambda, then over the grid, until
   it has had as many runs as `none` (every lambda is tried at least).
2. --seeds runs of every arm.
3. Every run meets the test part, once.

Arms: none; global (alpha 1); pointwise (the teacher's scores as labels); rule, paper, budget,
calibrated; hard negatives (what the teacher lists against what `none` would recommend
instead, calibrated with the margin of `none` among its inputs) and global_hard_negatives (the same
pairs, alpha 1); --arm for others (ensemble=none: the run of `none` of the same seed). Controls, in
every report: constant (the matched gate's mean alpha), shuffled (another user's answers),
popularity and item_item as teachers.

Called again it goes on where it was: finished runs are known by their settings and data. Other
knobs of a run (--epochs, --batch_size, ...) hold for every arm; one that is tuned is then fixed.
Writes DIR/report.md, report.json and pictures; of several data sets, in DIR/NAME.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, flag_name
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import arms, pool, presets, results, tuning
from slgr_jax.experiments.arms import ComparisonPlan

_DEFAULT_ARMS = ("none", "global", "pointwise", "rule", "paper", "calibrated")

absl_flags.DEFINE_list("data", [], "dataset directories (launch/prepare.py)")
absl_flags.DEFINE_string("out", "", "directory of the runs and the report")
absl_flags.DEFINE_string("preset", "", f"shape of a published table: {', '.join(presets.PRESETS)}")
absl_flags.DEFINE_list("backbones", ["mf"], f"recommenders: {', '.join(config.BACKBONES)}")
absl_flags.DEFINE_list(
    "guidance", list(_DEFAULT_ARMS), f"arms: {', '.join((*arms.ARMS, *arms.CONTROLS))}"
)
absl_flags.DEFINE_multi_string(
    "arm", [], "one more arm: NAME:knob=value,knob=value; may be given several times"
)
absl_flags.DEFINE_list(
    "controls", list(arms.CONTROLS), "controls besides; --controls= for none of them"
)
absl_flags.DEFINE_string(
    "matched_to", "", f"arm that controls copy; the first there is of {', '.join(arms.GATED)}"
)
absl_flags.DEFINE_string("focus", "", "arm that the verdict is about; --matched_to unless given")
absl_flags.DEFINE_string("teacher", "", "name of the teacher product under DATA/teacher")
absl_flags.DEFINE_integer("seeds", 5, "seeds per arm", lower_bound=2)
absl_flags.DEFINE_integer(
    *("tune_runs", 0, "tuning runs per arm; 0 = as many as the backbone's grid has points"),
    lower_bound=0,
)
for _name in arms.TUNED[:-1]:
    absl_flags.DEFINE_list(
        f"tune_{_name}", [], f"values of --{_name} tried; empty = the backbone's"
    )
absl_flags.DEFINE_list(
    "tune_lambda", [f"{value:g}" for value in arms.LAMBDAS], "values of --lambda tried"
)
absl_flags.DEFINE_bool(
    *("tune_guidance_loss", True),
    "also try, at an arm's best lambda, its other loss: hinge and logistic, of calibrated informed "
    "and hinge, of hard negatives the gate without a reference; paper and pointwise keep their "
    "own, and --guidance_loss is that of every arm",
)
absl_flags.DEFINE_integer(
    "workers", 0, "processes on a CPU; 0 = one per core; accelerators take one", lower_bound=0
)
OWN = (
    *("data", "out", "preset", "backbones", "guidance", "arm", "controls", "matched_to", "focus"),
    *("teacher", "seeds", "tune_runs", *(f"tune_{name}" for name in arms.TUNED)),
    *("tune_guidance_loss", "workers"),
)
# Knobs of a run that the comparison sets itself.
_SET_HERE = frozenset(
    {"backbone", "guidance", "teacher", "gate", "alpha", "hard_negatives", "seed", "restart"}
)


# --------------------------------------------------------------------- the command line


def _without(section: type[Section]) -> type[Section]:
    """A section without the knobs that are set here: only the others become flags."""
    hints = typing.get_type_hints(section)
    kept = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(default=field.default, metadata=field.metadata),
        )
        for field in dataclasses.fields(section)
        if flag_name(field) not in _SET_HERE
    ]
    namespace = {"__doc__": section.__doc__}
    return dataclasses.make_dataclass(
        section.__name__, kept, bases=(Section,), frozen=True, namespace=namespace
    )


def given_knobs() -> dict[str, Any]:
    """The knobs of a run that the command line gives, by name."""
    fields = [field for one in config.sections().values() for field in dataclasses.fields(one)]
    names = {flag_name(field) for field in fields} - _SET_HERE
    found = {name: flags.FLAGS[name] for name in names}
    return {name: flag.value for name, flag in found.items() if not flag.using_default_value}


def _values(name: str) -> tuple[float, ...]:
    """The numbers of a --tune_ flag."""
    try:
        return tuple(float(text) for text in flags.FLAGS[name].value)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}; give numbers, e.g. --{name}=0.1,1") from error


def make_plan(data: str, out: pathlib.Path) -> ComparisonPlan:
    """What the command line asks for on one data set."""
    given = flags.FLAGS
    if given.preset and given.preset not in presets.PRESETS:
        raise ConfigError(f"--preset={given.preset} is not one of: {listing(presets.PRESETS)}")
    preset = presets.PRESETS.get(given.preset)
    backbones, asked, wanted = given.backbones, given.guidance, given.controls
    knobs = given_knobs()
    if preset is not None:
        backbones = given.backbones if given["backbones"].present else preset.backbones
        asked = given.guidance if given["guidance"].present else preset.arms
        wanted = given.controls if given["controls"].present else ()
        knobs = {**preset.knobs, **knobs}
    if not given.teacher:
        if given["guidance"].present and set(given.guidance) != {"none"}:
            raise ConfigError("missing --teacher; without one only --guidance=none can be measured")
        asked, wanted = ("none",), ()
    own_arms = dict(map(arms.own_arm, given.arm)) if given.teacher else {}
    chosen, matched, focus = arms.choose(asked, wanted, given.matched_to, given.focus, own_arms)
    lambdas = (float(knobs["lambda"]),) if "lambda" in knobs else _values("tune_lambda")
    plan = ComparisonPlan(
        data=data,
        out=out,
        knobs={name: value for name, value in knobs.items() if name not in arms.TUNED},
        teacher=given.teacher,
        backbones=tuple(dict.fromkeys(backbones)),
        arms=chosen,
        matched=matched,
        focus=focus,
        seeds=given.seeds,
        grids=arms.grids(backbones, knobs, {k: _values(f"tune_{k}") for k in arms.TUNED[:-1]}),
        lambdas=lambdas,
        tune_loss=given.tune_guidance_loss,
        own_arms=own_arms,
        tune_runs=given.tune_runs,
    )
    if len(chosen) > 1 and not lambdas:
        raise ConfigError("--tune_lambda is empty; give at least one value")
    if len(chosen) > 1 and 0 < plan.tune_runs < len(lambdas):
        raise ConfigError(
            f"--tune_runs={plan.tune_runs} is below the {len(lambdas)} values of --tune_lambda; "
            "raise it, or try fewer"
        )
    plan.check()
    return plan


# --------------------------------------------------------------------- one data set


def compare(plan: ComparisonPlan, workers: int) -> dict[str, Any]:
    """Tune, train and test everything; what report.json holds."""
    train = functools.partial(pool.train_runs, workers=workers, root=plan.out)
    print(f"tuning {listing(plan.arms, 99)} of {listing(plan.backbones, 99)}", flush=True)
    tuned = tuning.tune(plan, train)
    runs = {
        (backbone, arm): [plan.run(backbone, arm, of_arms, seed) for seed in range(plan.seeds)]
        for backbone, of_arms in tuned.items()
        for arm in plan.arms
    }
    every = [run for mine in runs.values() for run in mine]
    print(f"{plan.seeds} seeds of each", flush=True)
    for run, outcome in zip(every, train(every), strict=True):
        if outcome["error"]:
            raise ConfigError(f"{run.workdir}: {outcome['error']}")
    print("meeting the test part", flush=True)
    pool.evaluate_runs(every, workers=workers)
    return _report(plan, tuned, runs)


def _report(
    plan: ComparisonPlan,
    tuned: tuning.Tuned,
    runs: Mapping[tuple[str, str], Sequence[config.RunConfig]],
) -> dict[str, Any]:
    from slgr_jax.data import dataset
    from slgr_jax.experiments import summary

    data = dataset.load(plan.data, verify=False)
    firsts = {backbone: mine[0] for (backbone, arm), mine in runs.items() if arm == "none"}
    primary = {backbone: run.train.early_stop_metric for backbone, run in firsts.items()}
    first = next(iter(firsts.values()))
    where = {key: [pathlib.Path(run.workdir) for run in mine] for key, mine in runs.items()}
    controls = [arm for arm in plan.arms if arm in arms.CONTROLS]
    rows = summary.rows_of(where, first.evaluation.ks, primary, plan.focus, controls)
    slices = data.slices(first.slices)
    protocol = {
        "data": data.manifest.name,
        "split_hash": data.manifest.split_hash,
        "teacher": plan.teacher,
        "command": shlex.join(["python", *sys.argv]),
        "backbones": list(plan.backbones),
        "arms": list(plan.arms),
        "matched_to": plan.matched,
        "focus": plan.focus,
        "seeds": plan.seeds,
        "primary": primary,
        "budget": {
            backbone: {arm: len(found["tried"]) for arm, found in mine.items() if found["tried"]}
            for backbone, mine in tuned.items()
        },
        "thresholds": {
            "cold_user_history": slices.cold_user_history,
            "tail_item_popularity": slices.tail_item_popularity,
            "cold users": int(slices.cold_users.sum()),
            "tail items": int(slices.tail_items.sum()),
        },
        "tests": sum(
            bool(value) and "p_seeds" in value
            for row in rows
            if row["primary"]
            for key, value in row.items()
            if key.startswith("vs_")
        ),
    }
    return {
        "protocol": protocol,
        "tuned": tuned,
        "rows": rows,
        "verdict": summary.verdict(rows, plan.focus),
        "cost": summary.costs(where),
        "gate": summary.gates(where),
        "alpha_by_epoch": summary.alphas(where),
        "baselines": _baselines(plan, list(firsts.values()), data, primary),
    }


def _baselines(
    plan: ComparisonPlan, runs: Sequence[config.RunConfig], data: Any, primary: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Most popular and, where it takes seconds, EASE, by slice; none where nothing is ranked."""
    from slgr_jax.evaluation import baselines

    ranked = [run for run in runs if run.evaluation.ranking]
    if not ranked:
        return []
    metrics = dict.fromkeys(primary[run.model.backbone] for run in ranked)
    made = baselines.evaluate_baselines(config.BaselineConfig(), ranked[0], data, plan.out)
    return [
        {"baseline": one.label, "slice": name, "users": values["n"]}
        | {metric: values.get(metric) for metric in metrics}
        for one in made
        for name in results.MAIN_SLICES
        for values in [one.parts["test"].slices[name]]
    ]


def write(found: Mapping[str, Any], out: pathlib.Path) -> None:
    """report.json, pictures and report.md."""
    from slgr_jax.experiments import plots, render

    results.write_json(out / "report.json", found)
    pictures = plots.draw(found, out)
    text = render.render(found, pictures)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)


def make_controls(plan: ComparisonPlan) -> None:
    """Write the control products that are not there."""
    from slgr_jax.data import dataset
    from slgr_jax.teacher.products import controls

    wanted = [arm for arm in plan.arms if arm in controls.CONTROLS]
    if wanted:
        data = dataset.load(plan.data)
        for control in wanted:
            print(f"control {controls.ensure(data, plan.teacher, control)}", flush=True)


def main(_: list[str]) -> None:
    from slgr_jax.data import shards

    given = flags.FLAGS
    names = [pool.check_data(data) for data in given.data]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data: {listing(names)}: two data sets of one name")
    root = pathlib.Path(given.out)
    places = [root] if len(names) == 1 else [root / name for name in names]
    plans = [make_plan(data, out) for data, out in zip(given.data, places, strict=True)]
    workers = pool.workers(given.workers)
    root.mkdir(parents=True, exist_ok=True)
    found = {}
    with shards.locked(root):  # a second comparison would train over the runs of the first
        for plan in plans:
            make_controls(plan)
        for name, plan in zip(names, plans, strict=True):
            found[name] = compare(plan, workers)
            write(found[name], plan.out)
    if given.preset:
        text = presets.table(given.preset, found)
        (root / f"{given.preset}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=[_without(section) for section in config.sections().values()],
        own=OWN,
        required=("data", "out"),
    )
