"""What does a step cost that reads vectors, beside one that does not?

    python benchmarks/speed/vector_steps.py --data=DATA --vectors=NAME [--backbone=dcnv2]

Processor time, all threads of this process, of the arms `none`, `kar` and `kser` of slgr compare,
and of the extractor alone (--train_only=adapters, begun from fresh rows here), in turns; of each
the least. NAME is a product of chunks; `kar` reads their mean.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags


def _stepper(data: str, knobs: dict[str, Any]) -> tuple[Callable[[int], float], str]:
    """Milliseconds of a step, of so many together, and what compiled memory they take."""
    import jax
    import numpy as np

    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.training import build, step
    from slgr_jax.training.state import init_state

    alone = knobs.pop("train_only", "all") == "adapters"
    run = config.make_run(data, "unused", **knobs)
    experiment = build.build(run, dataset_lib.load(data))
    trainer = experiment.trainer
    if alone:  # nothing is read of RUN where a run is not begun by `programs`
        train = dataclasses.replace(run.train, train_only="adapters", init_from="fresh")
        trainer = dataclasses.replace(trainer, config=dataclasses.replace(run, train=train))
    run_steps = step.make_run_steps(trainer)
    key = jax.random.key_data(jax.random.key(1))
    states = [init_state(trainer, 0)]
    program: Any = run_steps
    memory = program.lower(states[0], experiment.arrays, key, np.int32(1)).compile()
    temporaries = memory.memory_analysis().temp_size_in_bytes / 1e6

    def milliseconds(steps: int) -> float:
        began = time.process_time()
        state, sums, _ = run_steps(states.pop(), experiment.arrays, key, np.int32(steps))
        jax.block_until_ready(sums)
        states.append(state)
        return 1e3 * (time.process_time() - began) / steps

    milliseconds(1)
    return milliseconds, f"{temporaries:.0f}"


def main(_: list[str]) -> None:
    from slgr_jax.experiments import arms
    from slgr_jax.reports import tables

    given = flags.FLAGS
    shared = {"backbone": given.backbone, "dim": 32, "batch_size": given.batch}
    if given.backbone in config.CLICK_BACKBONES:
        shared |= {"history_fields": False}
    kinds = {name: dict(arms.ARMS[name]) for name in ("none", "kar", "kser")}
    kinds["kser, alone"] = kinds["kser"] | {"train_only": "adapters"}
    steppers = {}
    for name, of_arm in kinds.items():
        knobs = {k: given.vectors if v == arms.VECTORS else v for k, v in of_arm.items()}
        steppers[name] = _stepper(given.data, shared | knobs)
    least = dict.fromkeys(steppers, float("inf"))
    for _turn in range(given.turns):
        for name, (milliseconds, _) in steppers.items():
            least[name] = min(least[name], milliseconds(given.steps))
    rows = [
        {
            "arm": name,
            "ms of a step": f"{least[name]:.1f}",
            "times none": f"{least[name] / least['none']:.2f}",
            "temporaries, MB": temporaries,
        }
        for name, (_, temporaries) in steppers.items()
    ]
    print(tables.markdown_table(rows))


def define() -> tuple[str, ...]:
    """Define the flags; their names."""
    absl_flags.DEFINE_string("data", None, "dataset directory", required=True)
    absl_flags.DEFINE_string("vectors", None, "product of chunks", required=True)
    absl_flags.DEFINE_string("backbone", "dcnv2", "a click backbone")
    absl_flags.DEFINE_integer("batch", 2048, "triples of a step", lower_bound=1)
    absl_flags.DEFINE_integer("turns", 3, "turns", lower_bound=1)
    absl_flags.DEFINE_integer("steps", 10, "steps of a turn", lower_bound=1)
    return ("data", "vectors", "backbone", "batch", "turns", "steps")


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=(), own=define())
