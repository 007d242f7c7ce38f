"""benchmarks/PROTOCOL.md, carried out: does the method hold on data that no choice was made on?

    git clone https://github.com/agiresearch/IDGenRec
    python benchmarks/quality/confirm.py --input=IDGenRec --out=DIR
    python benchmarks/quality/confirm.py --input=IDGenRec --out=DIR --scale=reduced --minutes=25

Prepares the data sets and splits, makes the teacher from the items' keywords (for refits once more,
of training and validation), and compares: cell
after cell, in the order of the protocol. Each step is a command of `slgr`, which is shown. When
--minutes are over, the cell at work is stopped and the others are cut; called again it goes on.
Writes DIR/confirmation.json and confirmation.md, in which every cell is: its result, or that it was
cut.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import idgenrec

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob

EDITION = 3  # of PROTOCOL.md
SPLITS: Mapping[str, tuple[str, ...]] = {
    "ratio_1": ("--split=ratio", "--ratio_by=user", "--seed=1"),
    "ratio_2": ("--split=ratio", "--ratio_by=user", "--seed=2"),
    "leave_last": ("--split=leave_last",),
}
TEACHER = "nearest50"
# The same, made of training and validation: what refits learn from.
TEACHER_ANEW = "nearest50_anew"
# What is tested: the arm that chooses among its variants by validation, which every control copies.
METHOD = "auto"
# Without what this LLM says of this user: what the LLM adds is a gain over all of them.
WITHOUT_LLM = ("none", "hard_own", "shuffled", "consensus", "popularity", "item_item", "ease")
# With the LLM's word, but no selection.
UNSELECTED = ("global", "constant", "paper")
# The split whose test parts earlier editions met: no primary question is about them.
MET = "leave_last"
# What is tested: slice, metric. The first is primary.
QUESTIONS = (("overall", "ndcg@10"), ("cold_users", "ndcg@10"), ("tail_items", "rows_auc"))
ALSO_SHOWN = (("tail_items", "ndcg@100"),)
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of the protocol is run.

    Attributes:
      users: share of each data set's users that are kept, drawn with seed 0.
      seeds: runs of an arm.
      backbones, arms, controls: what is compared; `METHOD` among the arms.
      knobs: flags of `slgr compare` besides.
    """

    users: float
    seeds: int
    backbones: tuple[str, ...]
    arms: tuple[str, ...]
    controls: tuple[str, ...]
    knobs: tuple[str, ...] = ()


_ALL_SCALES = ("--refit", "--slice_preset=s_llmr", "--ks=10,100", "--rows=sampled")
SCALES: Mapping[str, Scale] = {
    "full": Scale(
        1.0,
        5,
        ("mf", "lightgcn"),
        ("none", "global", "paper", "hard_own", METHOD),
        ("constant", "shuffled", "consensus", "popularity", "item_item", "ease"),
        ("--eval_every=5",),
    ),
    "reduced": Scale(
        0.25,
        2,
        ("mf",),
        ("none", "global", "hard_own", METHOD),
        ("shuffled", "consensus", "item_item", "ease"),
        ("--trials=8", "--epochs=100", "--eval_every=10", "--patience=3"),
    ),
}


@dataclasses.dataclass(frozen=True)
class ConfirmConfig(Section):
    """From where, to where, how much."""

    input: str = knob("", "a clone of github.com/agiresearch/IDGenRec, or its rec_datasets")
    out: str = knob("", "directory of the data, the runs and the report; goes on where it was")
    scale: str = knob("full", "how much of the protocol, as PROTOCOL.md says", choices=SCALES)
    minutes: float = knob(0.0, "stop after so many; 0 = when all cells are done", minimum=0)
    workers: int = knob(0, "processes; 0 = one per core", minimum=0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison of the protocol."""

    split: str
    dataset: str
    backbone: str

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.dataset}, {self.split}, {self.backbone}"

    @property
    def met(self) -> bool:
        """Whether an earlier edition met its test part."""
        return self.split == MET


def cells(scale: Scale) -> list[Cell]:
    """All cells, in the order in which they are run: every data set once, then other splits; last
    the one whose test parts were met, as no primary question is about them."""
    return [
        Cell(split, dataset, backbone)
        for split, backbone, dataset in itertools.product(
            SPLITS, scale.backbones, idgenrec.DATASETS
        )
    ]


# --- data and teacher ------------------------------------------------------------------------


def make_data(cell: Cell, config: ConfirmConfig, budget: idgenrec.Budget) -> pathlib.Path:
    """The dataset directory of a cell, with its teacher; made where it is not there."""
    share = SCALES[config.scale].users
    folder = idgenrec.folder_of(pathlib.Path(config.input), cell.dataset)
    if share < 1:
        sampled = pathlib.Path(config.out) / "input" / cell.dataset
        if not (sampled / idgenrec.KEYWORDS).is_file():
            idgenrec.sample(folder, sampled, share)
        folder = sampled
    data = pathlib.Path(config.out) / "data" / f"{cell.dataset}_{cell.split}"
    idgenrec.prepare(folder, data, cell.dataset, budget, *SPLITS[cell.split])
    for name, more in ((TEACHER, ()), (TEACHER_ANEW, ("--with_validation",))):
        if not (data / "teacher" / name / "manifest.json").is_file():
            where = (f"--data={data}", f"--name={name}")
            budget.run("teach", "nearest", *where, "--listed=50", *more)
    return data


# --- one cell --------------------------------------------------------------------------------


def run_cell(cell: Cell, config: ConfirmConfig, budget: idgenrec.Budget) -> dict[str, Any]:
    """Compare the method with its controls."""
    scale = SCALES[config.scale]
    out = pathlib.Path(config.out) / "runs" / f"{cell.dataset}_{cell.split}_{cell.backbone}"
    finished = out / "result.json"
    if finished.is_file():
        return {"cell": cell.name, **json.loads(finished.read_text(encoding="utf-8"))}
    data = make_data(cell, config, budget)
    budget.run(
        *("compare", f"--data={data}", f"--teacher={TEACHER}", f"--out={out}"),
        f"--refit_teacher={TEACHER_ANEW}",
        *(f"--backbones={cell.backbone}", f"--guidance={','.join(scale.arms)}"),
        *(f"--controls={','.join(scale.controls)}", f"--matched_to={METHOD}"),
        *(f"--seeds={scale.seeds}", *_ALL_SCALES, *scale.knobs, f"--workers={config.workers}"),
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    result = result_of(report, cell)
    finished.write_text(json.dumps(result), encoding="utf-8")
    return {"cell": cell.name, **result}


def result_of(report: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """What is kept of a report: of refitted runs, the means of all arms and the method's tests."""
    refit = report["refit"]["rows"]
    rows = {(row["arm"], row["slice"], row["metric"]): row for row in refit}
    shown = (*QUESTIONS, *ALSO_SHOWN)
    arms = list(dict.fromkeys(row["arm"] for row in refit))
    tests = {}
    for name, metric in QUESTIONS:
        row = rows.get((METHOD, name, metric), {})
        for question, others in (("adds", WITHOUT_LLM), ("selects", UNSELECTED)):
            against = {arm: row[f"vs_{arm}"] for arm in others if row.get(f"vs_{arm}")}
            tests[f"{question} {name}"] = over_best(against)
    return {
        "method": METHOD,
        "chosen": [
            choice["variant"] for choice in report["tuned"][cell.backbone][METHOD]["by_seed"]
        ],
        "met": cell.met,
        "split_hash": report["protocol"]["split_hash"],
        "thresholds": report["protocol"]["thresholds"],
        "seeds": report["protocol"]["seeds"],
        "budget": report["protocol"]["budget"],
        "means": {
            arm: {
                f"{name} {metric}": rows.get((arm, name, metric), {}).get("mean")
                for name, metric in shown
            }
            for arm in arms
        },
        "baselines": report["refit"]["baselines"],
        "tests": tests,
    }


def over_best(against: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The method against the best of several: the control that it gains least on.

    p is the greatest over all controls of the two-sided p over users, 1 where the method is below
    one of them: an intersection-union test, which needs no correction among the controls (Berger
    1982). None without a control.
    """
    if not against:
        return None
    best = min(against, key=lambda arm: against[arm]["difference"])
    p = [
        1.0 if test["difference"] <= 0 or test.get("p_users") is None else test["p_users"]
        for test in against.values()
    ]
    keys = ("difference", "relative", "low_users", "high_users", "p_seeds")
    return {"best": best, **{key: against[best].get(key) for key in keys}, "p_users": max(p)}


# --- the report ------------------------------------------------------------------------------


def correct(results: Sequence[Mapping[str, Any]]) -> None:
    """Add Holm's p: over the primary questions of cells that were not met, and over all others."""
    from slgr_jax.evaluation.significance import holm

    primary = f"adds {QUESTIONS[0][0]}"
    families: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for result in results:
        for question, test in result["tests"].items():
            if test is not None:
                families[question == primary and not result["met"]].append(test)
    for tests in families.values():
        for test, p in zip(tests, holm([test["p_users"] for test in tests]), strict=True):
            test["p_users_holm"] = p


def render(facts: Mapping[str, Any]) -> str:
    """confirmation.md."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "# Confirmation"
    yield ""
    yield f"Scale {facts['scale']}, variants chosen by validation, runs refitted on training and"
    yield "validation; differences against the best control, p over users (Holm). A difference of"
    yield "AUC is that of all rows together, its interval and p are of each user's own AUC."
    for result in facts["results"]:
        met = ", whose test part was met before" if result["met"] else ""
        yield from ("", f"## {result['cell']}{met}", "")
        yield f"{result['method']}, seed by seed: {', '.join(result['chosen'])}."
        yield ""
        columns = list(next(iter(result["means"].values())))
        yield f"| arm | {' | '.join(columns)} |"
        yield "|---|" + "---:|" * len(columns)
        for arm, means in result["means"].items():
            yield f"| {arm} | {' | '.join(_number(means[column]) for column in columns)} |"
        yield ""
        for question, test in result["tests"].items():
            yield f"- {question}: {_told(test)}"
    yield from ("", "## Cut", "")
    yield from ([f"- {cut}" for cut in facts["cut"]] or ["Nothing."])


def _told(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "no control was run"
    interval = f"{_number(test['low_users'])} to {_number(test['high_users'])}"
    better = test["difference"] > 0 and test["p_users_holm"] < LEVEL
    verdict = "yes" if better else "not shown"
    return (
        f"{verdict}; {test['difference']:+.4f} over {test['best']}, 95 % over users {interval}, "
        f"p {test['p_users_holm']:.3g}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main(_: list[str]) -> None:
    from slgr_jax.experiments import results as results_lib

    config: ConfirmConfig = flags.section_from_flags(ConfirmConfig)
    scale, out = SCALES[config.scale], pathlib.Path(config.out)
    for dataset in idgenrec.DATASETS:
        idgenrec.folder_of(pathlib.Path(config.input), dataset)
    out.mkdir(parents=True, exist_ok=True)
    idgenrec.hold_scale(out / "scale.txt", config.scale)
    budget = idgenrec.Budget(config.minutes)
    by_cell, cut = idgenrec.run_all(cells(scale), lambda cell: run_cell(cell, config, budget))
    results = list(by_cell.values())
    correct(results)
    facts = {
        "edition": EDITION,
        "scale": config.scale,
        **dataclasses.asdict(scale),
        "results": results,
        "cut": [cell.name for cell in cut],
    }
    results_lib.write_json(out / "confirmation.json", facts)
    text = render(facts)
    (out / "confirmation.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[ConfirmConfig], required=("input", "out"))
