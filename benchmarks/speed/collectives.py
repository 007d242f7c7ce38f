"""How many bytes does a step move between devices?

    python benchmarks/speed/collectives.py [--meshes=2x1,8x1,8x8] [--batch_size=8192]

Read off the program that XLA compiles for virtual CPU devices; nothing runs, and a program for GPUs
or TPUs has the same collectives between the same arrays. Per device and step, in kilobytes, by
collective: the larger of what goes into one and what comes out, all-reduces twice (they are a
reduce-scatter and an all-gather). In a ring of N devices each sends (N - 1) / N of that.
Collectives of a loop whose length is in the program count as often as it runs; those that draw
the batches of S steps at once an S-th. Where the program chooses (rows that are spread too unevenly
to be exchanged are gathered), `kB` is of the cheapest choice and `at most` of the dearest.

A mesh DxT has D devices, T of them to one copy of the tables (--table_shards=T).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import gpu_program
from absl import flags as absl_flags
from gpu_program import Op

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.errors import ConfigError, listing

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Count = dict[str, float]  # kind -> bytes


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that collectives move per device, by kind.

    Attributes:
      least, most: where a conditional chooses, of the cheapest branch and of the dearest.
    """

    least: Count
    most: Count

    def __add__(self, other: Moved) -> Moved:
        return Moved(_sum(self.least, other.least), _sum(self.most, other.most))

    def times(self, factor: float) -> Moved:
        """So many times as much."""
        return Moved(
            {kind: bytes_ * factor for kind, bytes_ in self.least.items()},
            {kind: bytes_ * factor for kind, bytes_ in self.most.items()},
        )


NOTHING = Moved({}, {})


def _sum(one: Count, other: Count) -> Count:
    return dict(collections.Counter(one) + collections.Counter(other))


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
    return [by_depth.get(depth, NOTHING) for depth in range(max(by_depth, default=0) + 1)]


def per_step(text: str, drawn_together: int) -> Moved:
    """What one step of `training.step.make_run_steps` moves.

    Args:
      drawn_together: S, the steps whose batches are drawn in one trip of the outer loop.
    """
    _, drawing, *steps = moved(text)
    return sum(steps, drawing.times(1 / drawn_together))


def _of_computation(parts: Mapping[str, list[Op]], name: str) -> dict[int, Moved]:
    """By depth, what a computation moves with all that it calls."""
    ops = parts[name]
    sizes = {op.name: op.bytes for op in ops}
    total: dict[int, Moved] = {0: NOTHING}

    def add(found: Mapping[int, Moved], deeper: int = 0, times: int = 1) -> None:
        for depth, bytes_ in found.items():
            before = total.get(depth + deeper, NOTHING)
            total[depth + deeper] = before + bytes_.times(times)

    for op in ops:
        kind = op.kind.removesuffix("-start")
        if kind in KINDS:
            add({0: _of_collective(op, kind, sizes)})
        elif op.kind == "while":
            (body,) = re.findall(r"body=%?([\w.\-]+)", op.rest)
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
            of_body = _of_computation(parts, body)
            add(of_body, 0, int(trips[1])) if trips else add(of_body, 1)
        elif op.kind == "conditional":
            named = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", op.rest)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", op.rest):
                named += re.findall(r"%?([\w.\-]+)", several)
            add(_chosen([_of_computation(parts, branch) for branch in named]))
        elif op.kind in ("call", "async-start"):
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", op.rest):
                add(_of_computation(parts, called))
    return total


def _of_collective(op: Op, kind: str, sizes: Mapping[str, int]) -> Moved:
    operands = sum(sizes[name] for name in op.operands)
    # What starts one gives both its operands and its results.
    results = op.bytes - operands if op.kind.endswith("-start") else op.bytes
    bytes_ = max(operands, results) * (2 if kind == "all-reduce" else 1)
    return Moved({kind: float(bytes_)}, {kind: float(bytes_)})


def _chosen(branches: list[dict[int, Moved]]) -> dict[int, Moved]:
    """One of several: by depth, the cheapest and the dearest."""

    def pick(depth: int, choose: Callable[..., Count], which: str) -> Count:
        counts = [getattr(branch.get(depth, NOTHING), which) for branch in branches]
        return choose(counts, key=lambda count: sum(count.values()))

    depths = {depth for branch in branches for depth in branch}
    return {depth: Moved(pick(depth, min, "least"), pick(depth, max, "most")) for depth in depths}


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


def row_of(devices: int, shards: int, found: Moved) -> dict[str, Any]:
    """What one program moves, in kilobytes."""
    kinds = {kind: round(found.least.get(kind, 0) / 1e3) for kind in KINDS}
    return {
        "devices": devices,
        "table shards": shards,
        "kB": round(sum(found.least.values()) / 1e3),
        "at most": round(sum(found.most.values()) / 1e3),
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
