"""All methods side by side on one data set: tuned alike, beside the same controls.

    python benchmarks/quality/real_data.py --dataset=facebook_book --clone=CLONE --out=BOOK
    slgr teach embed --data=BOOK/data --name=wordllama
    python benchmarks/quality/all_methods.py --data=BOOK/data --teacher=gpt-3.5-turbo_free_top50 \\
        --vectors=wordllama --out=OUT

Asks `slgr compare` for every arm that fits the recommender and the products (which do not, and
why, is told), for its controls in the LLM's place, and for controls of vectors: the same with each
item's vector given to another item. Every arm is refitted on training and validation; the numbers
are those of refitted runs on the test part. Each arm is tested against the best of what does
without this LLM's word, and each selective one against itself without selection. Called again it
goes on; writes OUT/all_methods.json, beside what other calls with the same OUT came to.
benchmarks/results has it, and docs/results.md the tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import confirm
import idgenrec
import numpy as np

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import arms, planning, results, summary
from slgr_jax.files import write_atomically

FILE = "all_methods.json"
SELECTIVE = "_selective"
# Slice -> the metric that is shown of it; of tail items nothing can be seen at a cut-off of 10.
SHOWN: Mapping[str, str] = {"overall": "ndcg@10", "cold_users": "ndcg@10", "tail_items": "ndcg@100"}
# Arms of pairs whose selection is of pairs, by the arm that believes the same pairs everywhere.
_BELIEVED_EVERYWHERE: Mapping[str, str] = {
    "paper": "global",
    "calibrated": "global",
    "hard_negatives": "global_hard_negatives",
    "paper_hard_negatives": "global_hard_negatives",
}


@dataclasses.dataclass(frozen=True)
class AllMethodsConfig(Section):
    """Which data, with what of an LLM, how much of it."""

    data: str = knob("", "dataset directory")
    teacher: str = knob("", "product under DATA/teacher")
    vectors: str = knob("", "product under DATA/embeddings; empty: no arm of vectors")
    backbone: str = knob("mf", "recommender")
    out: str = knob("", "directory of the runs and the numbers; goes on where it was")
    only: str = knob("", "arms, a comma between; empty: all that fit")
    matched_to: str = knob("", "arm that controls copy; empty: as slgr compare chooses")
    trials: int = knob(8, "trials of each arm", minimum=1)
    seeds: int = knob(2, "runs of each arm", minimum=2)
    workers: int = knob(0, "processes; 0 = one per core", minimum=0)
    epochs: int = knob(100, "most epochs of a run; validation every tenth", minimum=10)
    minutes: float = knob(0.0, "stop after so many; 0 = when all is done", minimum=0)


def fitting(config: AllMethodsConfig) -> tuple[list[str], dict[str, str]]:
    """The arms that fit recommender and products, and of the others why they do not.

    Raises:
      ConfigError: --only names an arm that does not fit.
    """
    fit, unfit = [], dict[str, str]()
    for arm in (*arms.ARMS, arms.AUTO):
        of_vectors = arm in arms.VECTOR_ARMS
        try:
            if of_vectors and not config.vectors:
                raise ConfigError("no --vectors")
            request = planning.Request(
                teacher=config.teacher,
                vectors=config.vectors if of_vectors else "",
                backbones=(config.backbone,),
                guidance=("none", arm),
                controls=(),
            )
            planning.make_plan(config.data, pathlib.Path(config.out), request)
            fit.append(arm)
        except ConfigError as error:
            unfit[arm] = str(error).removeprefix(f"arm {arm} of {config.backbone}: ")
    only = config.only.split(",") if config.only else fit
    if wrong := [arm for arm in only if arm not in fit]:
        raise ConfigError(f"--only: {wrong[0]}: {unfit.get(wrong[0], 'there is no such arm')}")
    return [arm for arm in fit if arm in only], unfit


def shuffled_vectors(config: AllMethodsConfig, budget: idgenrec.Budget) -> str:
    """The name of a product in which each item has another item's vector, made where there is none;
    a user's is the mean of these over training, as in the product that it is the control of."""
    from slgr_jax.data import dataset, schema
    from slgr_jax.teacher.local import embeddings

    name = f"{config.vectors}_shuffled"
    product = pathlib.Path(config.data) / schema.EMBEDDINGS_DIR / name
    if not (product / schema.MANIFEST).is_file():
        data = dataset.load(config.data)
        values, has = embeddings.load(data, config.vectors).items
        rows = np.flatnonzero(has)
        moved = np.random.default_rng(0).permutation(rows)
        path = pathlib.Path(config.out) / f"{name}.npz"
        np.savez(
            path,
            ids=np.array([str(data.items.column("item_id")[row]) for row in rows]),
            vectors=values[moved],
        )
        where = (f"--data={config.data}", f"--name={name}", f"--vectors={path}")
        budget.run("teach", "embed", *where, "--built_from=train_only", f"--model={name}")
    return name


def run(config: AllMethodsConfig) -> dict[str, Any]:
    """Compare, and what is kept of it."""
    budget = idgenrec.Budget(config.minutes)
    fit, unfit = fitting(config)
    own: list[str] = []
    if any(arm in arms.VECTOR_ARMS for arm in fit):
        shuffled = shuffled_vectors(config, budget)
        own = [
            f"init-shuffled:guidance=none,init_item_vectors={shuffled}",
            f"adapter-shuffled:guidance=none,item_vectors={shuffled}",
        ]
    controls = [control for control in arms.DEFAULT_CONTROLS if control != "constant"]
    out = pathlib.Path(config.out) / f"{pathlib.Path(config.data).parent.name}_{config.backbone}"
    try:
        budget.run(
            *("compare", f"--data={config.data}", f"--teacher={config.teacher}", f"--out={out}"),
            *([f"--vectors={config.vectors}"] if own else []),
            *(f"--backbones={config.backbone}", f"--guidance={','.join(fit)}"),
            *(f"--arm={arm}" for arm in own),
            *(f"--controls={','.join(controls)}", f"--matched_to={config.matched_to}"),
            *(f"--seeds={config.seeds}", f"--trials={config.trials}", "--nowiden", "--refit"),
            *("--ks=10,100", f"--epochs={config.epochs}", "--eval_every=10", "--patience=3"),
            f"--workers={config.workers}",
        )
    except idgenrec.OutOfTimeError:
        raise SystemExit("out of time; the same command goes on") from None
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    runs = _refitted(out, config.backbone, report["protocol"]["arms"], config.seeds)
    return {
        **{name: report["protocol"][name] for name in ("data", "split_hash", "seeds")},
        **{name: getattr(config, name) for name in ("backbone", "teacher", "vectors", "trials")},
        "arms": tested(report, runs, [arm.partition(":")[0] for arm in own]),
        "unfit": unfit,
        "baselines": report["refit"]["baselines"],
    }


def _refitted(
    out: pathlib.Path, backbone: str, names: Sequence[str], seeds: int
) -> dict[str, list[pathlib.Path]]:
    """arm -> the directories of its refitted runs."""
    found = {}
    for arm in names:
        of_arm = [next((out / backbone / "refit").rglob(f"{arm}_seed{s}")) for s in range(seeds)]
        found[arm] = of_arm
    return found


def tested(
    report: Mapping[str, Any], runs: Mapping[str, Sequence[pathlib.Path]], own: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Arm -> validation, means by slice, the tests.

    over_controls: against the best of what does without this LLM's word (`confirm.over_best`);
    selection: of a selective arm, against the same believed everywhere. p is over users, the mean
    over seeds of each, and corrected by Holm over the arms that are tested so in a slice.

    Args:
      report: of `slgr compare`.
      runs: arm -> its refitted runs, seed by seed.
      own: the controls of vectors.
    """
    from slgr_jax.evaluation.significance import holm

    (tuned,) = report["tuned"].values()
    cells = {arm: summary.Cell(workdirs, (10, 100)) for arm, workdirs in runs.items()}
    without = [arm for arm in (*arms.WITHOUT_LLM, *arms.CONTROLS, *own) if arm in cells]
    found: dict[str, dict[str, Any]] = {}
    for arm, cell in cells.items():
        seeds = {name: cell.seeds(name, metric) for name, metric in SHOWN.items()}
        trial = tuned[arm]["trial"]
        found[arm] = {
            "control": arm in without,
            "valid": None if trial is None else tuned[arm]["tried"][trial]["valid"],
            "means": {name: summary.number(float(np.mean(of))) for name, of in seeds.items()},
        }
        if arm in without:
            continue
        found[arm]["over_controls"] = {
            name: confirm.over_best(
                {
                    other: test
                    for other in without
                    if (test := summary.compare(cell, cells[other], name, metric))
                }
            )
            for name, metric in SHOWN.items()
        }
        if (everywhere := believed_everywhere(arm)) in cells:
            found[arm]["selection"] = {
                name: summary.compare(cell, cells[everywhere], name, metric)
                for name, metric in SHOWN.items()
            }
    for kind in ("over_controls", "selection"):
        for name in SHOWN:
            tests = [of[kind][name] for of in found.values() if kind in of and of[kind][name]]
            raw = [math.nan if test["p_users"] is None else test["p_users"] for test in tests]
            for test, p in zip(tests, holm(raw), strict=True):
                test["p_users_holm"] = summary.number(p)
    return found


def believed_everywhere(arm: str) -> str:
    """The arm that a selective one is without its selection; empty for others."""
    if arm.endswith(SELECTIVE):
        return arm.removesuffix(SELECTIVE)
    return _BELIEVED_EVERYWHERE.get(arm, "")


def main(_: list[str]) -> None:
    config: AllMethodsConfig = flags.section_from_flags(AllMethodsConfig)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = run(config)
    path = out / FILE
    held = results.read_json(path) or {}
    key = f"{facts['data']} {config.backbone}"
    write_atomically(path, json.dumps({**held, key: facts}, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}: {key}, {len(facts['arms'])} arms")


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[AllMethodsConfig], required=("data", "teacher", "out"))
