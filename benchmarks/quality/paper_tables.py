"""Tables 2 and 3 of S-LLMR (arXiv 2512.21526) from public files, with a teacher made here.

    git clone https://github.com/agiresearch/IDGenRec
    python benchmarks/quality/paper_tables.py --input=IDGenRec --out=DIR
    python benchmarks/quality/paper_tables.py --input=IDGenRec --out=DIR --table=table2

Prepares Beauty, Sports and Toys (leave-last), lets wordllama, a Llama's distilled token vectors,
score the paper's candidates by the keywords that a language model wrote about each item, and runs
`slgr compare --preset=TABLE` cell after cell: a recommender on a data set. Each step is a command
of `slgr`, which is shown. --scale=hours is for two cores. When --minutes are over, the cell at work
is stopped and the others are cut; called again it goes on. Writes DIR/TABLE.md, printed numbers
beside ours, what differs and what was cut, and DIR/TABLE.json.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import idgenrec

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob
from slgr_jax.experiments import presets, render
from slgr_jax.experiments.arms import VECTOR_ARMS

TEACHER = "wordllama"  # scores of the teacher, and the vectors that KAR's experts read
# Flags of `slgr compare`. What the smaller scale cuts of the search: the learning rate is LLM-CF's
# (the paper's own takes three times the epochs), and four trials are left.
SCALES: Mapping[str, tuple[str, ...]] = {
    "full": ("--seeds=5",),
    "hours": ("--seeds=3", "--lr=0.01", "--trials=4", "--nowiden"),
}
_SLICES = "--slice_preset=s_llmr"


@dataclasses.dataclass(frozen=True)
class TablesConfig(Section):
    """From where, to where, how much."""

    input: str = knob("", "a clone of github.com/agiresearch/IDGenRec, or its rec_datasets")
    out: str = knob("", "directory of the data, the runs and the table; goes on where it was")
    table: str = knob("table3", "which table", choices=presets.PRESETS)
    scale: str = knob(
        "full", "full = 20 trials and 5 seeds an arm, hours = 4 and 3", choices=SCALES
    )
    minutes: float = knob(0.0, "stop after so many; 0 = when all cells are done", minimum=0)
    workers: int = knob(0, "processes; 0 = one per core", minimum=0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recommender on a data set."""

    backbone: str
    dataset: str

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.backbone} on {self.dataset}"


def cells(table: str) -> list[Cell]:
    """All cells in the order in which they are run: every data set before another recommender."""
    backbones = presets.PRESETS[table].backbones
    return [Cell(backbone, dataset) for backbone in backbones for dataset in idgenrec.DATASETS]


def reads_vectors(table: str) -> bool:
    """Whether an arm of the table reads vectors of items and users."""
    return any(arm in VECTOR_ARMS for arm in presets.PRESETS[table].arms)


def make_data(dataset: str, config: TablesConfig, budget: idgenrec.Budget) -> pathlib.Path:
    """The dataset directory with its teacher and the vectors it needs; made where not there."""
    data = pathlib.Path(config.out) / "data" / dataset
    folder = idgenrec.folder_of(pathlib.Path(config.input), dataset)
    idgenrec.prepare(folder, data, dataset, budget, "--split=leave_last")
    products = {"teacher": "score"}
    if reads_vectors(config.table):
        products["embeddings"] = "embed"
    for product, command in products.items():
        if not (data / product / TEACHER / "manifest.json").is_file():
            budget.run("teach", command, f"--data={data}", f"--name={TEACHER}")
    return data


def run_cell(cell: Cell, config: TablesConfig, budget: idgenrec.Budget) -> dict[str, Any]:
    """The report of a cell; of one that is finished without a run."""
    out = pathlib.Path(config.out) / config.table / f"{cell.backbone}_{cell.dataset}"
    finished = out / "finished"
    if not finished.is_file():
        data = make_data(cell.dataset, config, budget)
        vectors = (f"--vectors={TEACHER}",) if reads_vectors(config.table) else ()
        budget.run(
            *("compare", f"--preset={config.table}", f"--backbones={cell.backbone}"),
            *(f"--data={data}", f"--teacher={TEACHER}", *vectors, f"--out={out}"),
            *(_SLICES, *SCALES[config.scale], f"--workers={config.workers}"),
        )
        finished.touch()
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def by_dataset(reports: Mapping[Cell, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Reports of single recommenders as one a data set, as `presets.table` reads them."""
    joined: dict[str, dict[str, Any]] = {}
    for cell, report in reports.items():
        protocol = report["protocol"]
        of_data = joined.setdefault(
            cell.dataset, {"protocol": {**protocol, "backbones": []}, "rows": []}
        )
        of_data["protocol"]["backbones"] += protocol["backbones"]
        of_data["rows"] += report["rows"]
    return joined


def facts_of(
    config: TablesConfig, reports: Mapping[Cell, Mapping[str, Any]], cut: Sequence[str]
) -> dict[str, Any]:
    """What TABLE.json holds: the rows, of each cell what was found and chosen, and what was cut."""
    return {
        "table": config.table,
        "scale": config.scale,
        "flags": SCALES[config.scale],
        "rows": presets.rows(config.table, by_dataset(reports)),
        "found": {cell.name: render.short_verdict(report) for cell, report in reports.items()},
        "chosen": {
            cell.name: {
                arm: tuned["chosen"] for arm, tuned in report["tuned"][cell.backbone].items()
            }
            for cell, report in reports.items()
        },
        "cut": list(cut),
    }


def page(facts: Mapping[str, Any], table: str) -> str:
    """TABLE.md.

    Args:
      table: the preset's, in Markdown; empty without a finished cell.
    """
    return "\n".join(_lines(facts, table)) + "\n"


def _lines(facts: Mapping[str, Any], table: str) -> Iterator[str]:
    yield table
    for cell, found in facts["found"].items():
        yield from (f"## {cell}", "", *found, "")
        for arm, settings in facts["chosen"][cell].items():
            yield f"- {arm}: {', '.join(f'{name} {_told(of)}' for name, of in settings.items())}"
        yield ""
    yield from ("## Cut", "")
    yield from ([f"- {name}" for name in facts["cut"]] or ["Nothing."])


def _told(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(_: list[str]) -> None:
    from slgr_jax.experiments import results

    config: TablesConfig = flags.section_from_flags(TablesConfig)
    out = pathlib.Path(config.out)
    for dataset in idgenrec.DATASETS:
        idgenrec.folder_of(pathlib.Path(config.input), dataset)
    out.mkdir(parents=True, exist_ok=True)
    idgenrec.hold_scale(out / f"{config.table}_scale.txt", config.scale)
    budget = idgenrec.Budget(config.minutes)
    reports, cut = idgenrec.run_all(
        cells(config.table), lambda cell: run_cell(cell, config, budget)
    )
    facts = facts_of(config, reports, [cell.name for cell in cut])
    results.write_json(out / f"{config.table}.json", facts)
    text = page(facts, presets.table(config.table, by_dataset(reports)) if reports else "")
    (out / f"{config.table}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[TablesConfig], required=("input", "out"))
