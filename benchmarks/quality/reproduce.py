"""Printed numbers of papers whose data and products are public, beside ours.

    git clone https://github.com/ColdLLM-Team/ColdLLM-repo
    python benchmarks/quality/reproduce.py --target=coldllm --input=ColdLLM-repo --out=DIR
    git clone https://github.com/SeongKu-Kang/Topology_Distillation_KDD21 HTD
    python benchmarks/quality/reproduce.py --target=kd_family --input=HTD --out=DIR

Reads the repository's own split and products, trains an arm after the other and evaluates it: each
step is a command of `slgr`, which is shown. Called again it goes on; when --minutes are over, the
rest is cut. Writes DIR/reproduction.json, of all targets that were run into DIR, which
benchmarks/results has, and prints the target's section of docs/results.md.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping

import coldllm
import idgenrec
import kd_family
import reproduction

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob
from slgr_jax.files import write_atomically

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import results_page

TARGETS: Mapping[str, reproduction.Target] = {
    target.name: target for target in (coldllm.TARGET, kd_family.TARGET)
}
FILE = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class ReproduceConfig(Section):
    """What is reproduced, from where, to where."""

    target: str = knob("", "what to reproduce", choices=("", *TARGETS))
    input: str = knob("", "a clone of the target's repository, as above")
    out: str = knob("", "directory of the data, the runs and the numbers; goes on where it was")
    seeds: int = knob(1, "runs of each arm", minimum=1)
    minutes: float = knob(0.0, "stop after so many; 0 = when all arms are done", minimum=0)


def main(_: list[str]) -> None:
    config: ReproduceConfig = flags.section_from_flags(ReproduceConfig)
    target, out = TARGETS[config.target], pathlib.Path(config.out)
    budget = idgenrec.Budget(config.minutes)
    facts = reproduction.run(
        target, pathlib.Path(config.input), out / target.name, config.seeds, budget
    )
    path = out / FILE
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held[target.name] = facts
    write_atomically(path, json.dumps(held, indent=1) + "\n")
    print("\n".join(results_page.reproduced(facts)))


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[ReproduceConfig], required=("target", "input", "out"))
