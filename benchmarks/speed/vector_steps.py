"""What does a step cost that reads vectors, beside one that does not?

    python benchmarks/speed/vector_steps.py --data=DATA --vectors=NAME [--backbone=dcnv2]

Processor time, all threads of this process, of `none` and of every arm of vectors of slgr compare
that fits the backbone and the product, in turns; of each the median and the least. Of a product of
chunks the arms that choose among them, too, and KSER's extractor alone (--train_only=adapters,
begun from fresh rows here); the others read the mean of a row's chunks. Arms that do not fit are
told, with the reason.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.errors import UserError

ALONE = "kser, alone"  # the extractor alone is trained


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
    shared = {"backbone": given.backbone, "dim": given.dim, "batch_size": given.batch}
    if given.backbone in config.CLICK_BACKBONES:
        shared |= {"history_fields": False}
    asked = given.arms or [arm for arm in arms.VECTOR_ARMS if not arm.endswith("_selective")]
    kinds = {name: dict(arms.ARMS[name]) for name in ("none", *asked)}
    if "kser" in kinds:
        kinds[ALONE] = kinds["kser"] | {"train_only": "adapters"}
    steppers: dict[str, tuple[Callable[[int], float], str]] = {}
    rows: list[dict[str, str]] = []
    for name, of_arm in kinds.items():
        knobs = {k: given.vectors if v == arms.VECTORS else v for k, v in of_arm.items()}
        try:
            steppers[name] = _stepper(given.data, shared | knobs)
        except UserError as error:
            if name == "none":
                raise
            print(f"{name}: {error}")
    taken: dict[str, list[float]] = {name: [] for name in steppers}
    for _turn in range(given.turns):
        for name, (milliseconds, _memory) in steppers.items():
            taken[name].append(milliseconds(given.steps))
    base = taken["none"]
    for name, (_milliseconds, temporaries) in steppers.items():
        ratios = [own / none for own, none in zip(taken[name], base, strict=True)]
        rows.append(
            {
                "arm": name,
                "ms of a step, least": f"{min(taken[name]):.2f}",
                "times none, median": f"{statistics.median(ratios):.2f}",
                "least to most": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "temporaries, MB": temporaries,
            }
        )
    print(tables.markdown_table(rows))


def define() -> tuple[str, ...]:
    """Define the flags; their names."""
    absl_flags.DEFINE_string("data", None, "dataset directory", required=True)
    absl_flags.DEFINE_string("vectors", None, "product under DATA/embeddings", required=True)
    absl_flags.DEFINE_string("backbone", "dcnv2", "recommender")
    absl_flags.DEFINE_list("arms", [], "arms of vectors; all that fit, but for selective ones")
    absl_flags.DEFINE_integer("dim", 32, "width of an embedding", lower_bound=1)
    absl_flags.DEFINE_integer("batch", 2048, "triples of a step", lower_bound=1)
    absl_flags.DEFINE_integer("turns", 5, "turns", lower_bound=1)
    absl_flags.DEFINE_integer("steps", 10, "steps of a turn", lower_bound=1)
    return ("data", "vectors", "backbone", "arms", "dim", "batch", "turns", "steps")


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=(), own=define())
