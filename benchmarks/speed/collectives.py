"""How many bytes does a step move between devices?

    python benchmarks/speed/collectives.py [--meshes=2x1,8x1,8x8] [--batch_size=8192]

Read off the program that XLA compiles for virtual CPU devices; nothing runs. Per device and step,
in kilobytes, by collective: the larger of what goes into one and what comes out, all-reduces twice
(they are a reduce-scatter and an all-gather). In a ring of N devices each sends (N - 1) / N of it.
Collectives of a loop whose length is in the program count as often as it runs, those that draw the
batches of S steps at once an S-th, and those of a loop inside a step once: rows are exchanged in
one round unless they are spread unevenly (models/row_exchange.py). Of branches the dearest counts.

A mesh DxT has D devices, T of them to one copy of the tables (--table_shards=T).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import gpu_program
from absl import flags as absl_flags
from gpu_program import Op

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.errors import ConfigError, listing

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Moved = collections.Counter[str]  # kind -> bytes


def moved(text: str) -> list[Moved]:
    """What a compiled program moves, by how many loops of unknown length are around it.

    Args:
      text: of the optimised HLO module, `jitted.lower(...).compile().as_text()`.

    Returns:
      [0] outside of such loops; [k] in one trip of the k-th, with what its own loops of known
      length do.
    """
    parts = gpu_program.computations(text)
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, flags=re.M)
    by_depth = _of_computation(parts, entry)
    return [by_depth[depth] for depth in range(max(by_depth, default=0) + 1)]


def per_step(text: str, drawn_together: int) -> dict[str, float]:
    """Bytes that one step of `training.step.make_run_steps` moves, by kind.

    Args:
      drawn_together: S, the steps whose batches are drawn in one trip of the outer loop.
    """
    _, drawing, *steps = moved(text)
    total = sum(steps, Moved())
    return {
        kind: total[kind] + drawing[kind] / drawn_together
        for kind in KINDS
        if (total + drawing)[kind]
    }


def _of_computation(
    parts: Mapping[str, list[Op]], name: str
) -> collections.defaultdict[int, Moved]:
    """By depth, what a computation moves with all that it calls."""
    ops = parts[name]
    sizes = {op.name: op.bytes for op in ops}
    total: collections.defaultdict[int, Moved] = collections.defaultdict(Moved)

    def add(found: Mapping[int, Moved], deeper: int = 0, times: int = 1) -> None:
        for depth, moved_ in found.items():
            for kind, bytes_ in moved_.items():
                total[depth + deeper][kind] += bytes_ * times

    for op in ops:
        kind = op.kind.removesuffix("-start")
        if kind in KINDS:
            total[0][kind] += _of_collective(op, kind, sizes)
        elif op.kind == "while":
            (body,) = re.findall(r"body=%?([\w.\-]+)", op.rest)
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
            of_body = _of_computation(parts, body)
            add(of_body, 0, int(trips[1])) if trips else add(of_body, 1)
        elif op.kind == "conditional":
            named = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", op.rest)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", op.rest):
                named += re.findall(r"%?([\w.\-]+)", several)
            branches = [_of_computation(parts, branch) for branch in named]
            add(max(branches, key=lambda found: sum(sum(each.values()) for each in found.values())))
        elif op.kind in ("call", "async-start"):
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", op.rest):
                add(_of_computation(parts, called))
    return total


def _of_collective(op: Op, kind: str, sizes: Mapping[str, int]) -> int:
    operands = sum(sizes[name] for name in op.operands)
    # What starts one gives both its operands and its results.
    results = op.bytes - operands if op.kind.endswith("-start") else op.bytes
    return max(operands, results) * (2 if kind == "all-reduce" else 1)


def compiled_step(run: config.RunConfig, dataset: Any, layout: Any) -> tuple[str, int]:
    """The text of a run's compiled program on a layout, and its `drawn_together`."""
    import jax
    import jax.numpy as jnp

    from slgr_jax.training import build, state, step

    experiment = build.build(run, dataset, layout)
    trainer = experiment.trainer
    key, count = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    arguments = state.abstract_state(trainer), experiment.arrays, key, count
    run_steps: Any = step.make_run_steps(trainer)
    return run_steps.lower(*arguments).compile().as_text(), trainer.drawn_together


def row_of(devices: int, shards: int, found: Mapping[str, float]) -> dict[str, Any]:
    """What one program moves, in kilobytes."""
    kinds = {kind: round(bytes_ / 1e3) for kind, bytes_ in found.items()}
    return {
        "devices": devices,
        "table shards": shards,
        "kB": round(sum(found.values()) / 1e3),
    } | {kind: kilobytes for kind, kilobytes in kinds.items() if kilobytes}


def define_flags() -> tuple[str, ...]:
    """Define this command's own flags; their names, for --help."""
    absl_flags.DEFINE_list(
        "meshes", ["2x1", "2x2", "4x1", "4x4", "8x1", "8x4", "8x8"], "DEVICESxTABLE_SHARDS of each"
    )
    return ("meshes",)


def _parsed(meshes: list[str]) -> list[tuple[int, int]]:
    """(devices, table shards) of each."""
    wrong = [text for text in meshes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text)]
    if wrong or not meshes:
        raise ConfigError(
            f"--meshes: {listing(wrong) or 'none given'}: expected DEVICESxSHARDS, e.g. 8x4"
        )
    return [(int(text.split("x")[0]), int(text.split("x")[1])) for text in meshes]


def main(_: list[str]) -> None:
    meshes = _parsed(flags.FLAGS.meshes)
    # As many devices as are asked for, each a part of the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(max(devices for devices, _ in meshes))
    import jax
    import synthetic
    import synthetic_dataset

    from slgr_jax.mesh import make_layout
    from slgr_jax.models.backbones import reads_of
    from slgr_jax.reports import tables

    base = flags.run_config_from_flags("", "")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = synthetic.make(synthetic.SIZES["ml100k"])
        dataset = synthetic_dataset.from_pairs(pairs, folder, reads_of(base.model))
        run = dataclasses.replace(base, data=folder)
        for devices, shards in meshes:
            layout = make_layout(table_shards=shards, devices=jax.devices()[:devices])
            found = per_step(*compiled_step(run, dataset, layout))
            rows.append(row_of(devices, shards, found))
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(
        f"jax {jax.__version__}; {run.model.backbone}, batch {run.sampler.batch_size}, "
        f"d = {run.model.dim}; a device and step\n"
    )
    print(tables.markdown_table([{name: row.get(name, 0) for name in names} for row in rows]))


if __name__ == "__main__":
    sections = config.sections()
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(sections[n] for n in sections if n not in ("slices", "evaluation")),
        own=define_flags(),
    )
