"""What would a GPU run? The train step, compiled for a GPU that this machine does not have.

    pip install 'jax[cuda13]'
    python benchmarks/speed/gpu_program.py --target=h200.txtpb

XLA compiles for a GPU from its description, without a driver. That is a GpuTargetConfigProto in
text form: xla/backends/gpu/target_config/specs of https://github.com/openxla/xla has some. Needs
ptxas (of the package nvidia-cuda-nvcc) on the PATH. Matrix factorisation on the large synthetic
set, per configuration:
  kernels   of one step, and how many of them are small: not one byte a triple
  sorts, table copies   in the whole program: should be none
  bytes     that these kernels read and write, per triple: rows count as often as they are gathered,
            updated rows as read and written
  floor     every row of the triple (and of its preference) read and written once
What caches save is not in it, and no time is: that takes the GPU (benchmarks/speed/throughput.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.config import GUIDANCE, TABLE_DTYPES, TABLE_OPTIMIZERS
from slgr_jax.errors import ConfigError, InputError

FLAGS = absl_flags.FLAGS
_SIZES = {"pred": 1, "u8": 1, "s8": 1, "u16": 2, "s16": 2, "bf16": 2, "f16": 2, "u64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Op:
    """One line of an HLO computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Of all arrays of its shape."""
        arrays = re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", self.shape)
        return sum(
            _SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in arrays
        )


def computations(text: str) -> dict[str, list[Op]]:
    """The computations of an HLO module in text form, by name."""
    parts: dict[str, list[Op]] = {}
    for part in re.split(r"\n(?=%|ENTRY )", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", part)
        assert name is not None
        parts[name.group(1)] = list(_ops(re.sub(r"/\*.*?\*/", "", part)))
    return parts


def _ops(part: str) -> Iterator[Op]:
    pattern = r"^ +(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$"
    for name, shape, kind, operands, rest in re.findall(pattern, part, flags=re.M):
        shape = re.sub(r"\{[^}]*\}", "", shape)
        yield Op(name, shape, kind, tuple(re.findall(r"%([\w.\-]+)", operands)), rest)


def traffic(fused: list[Op]) -> int:
    """Bytes that a fusion reads and writes: of what it gathers or slices, the parts that it takes;
    of what it scatters to, the rows twice."""
    by_name = {op.name: op for op in fused}

    def source(name: str) -> str:
        while by_name[name].kind in ("bitcast", "reshape"):
            (name,) = by_name[name].operands
        return name

    total = 0
    for parameter in (op for op in fused if op.kind == "parameter"):
        parts = 0
        for op in fused:
            uses = [k for k, name in enumerate(op.operands) if source(name) == parameter.name]
            if op.kind in ("bitcast", "reshape") or not uses:
                continue
            if op.kind in ("gather", "dynamic-slice", "slice") and uses == [0]:
                parts += op.bytes
            elif op.kind != "scatter" or uses != [0]:
                parts = parameter.bytes
                break
        total += parts
    scatters = [op for op in fused if op.kind == "scatter"]
    total += sum(2 * by_name[source(op.operands[2])].bytes for op in scatters)
    return total + (0 if scatters else fused[-1].bytes)


def facts(text: str, batch: int, tables: set[str]) -> dict[str, Any]:
    """What the module docstring says of one program.

    Args:
      tables: shapes of the tables.
    """
    parts = computations(text)
    # The loop over steps is the one that scatters to a table.
    every = list(itertools.chain.from_iterable(parts.values()))
    called = {op.name: re.findall(r"calls=%([\w.\-]+)", op.rest) for op in every}
    steps = max(
        parts.values(),
        key=lambda ops: sum(op.kind == "fusion" and op.shape in tables for op in ops),
    )
    kernels = [
        op for op in steps if op.kind in ("fusion", "custom-call", "copy", "scatter", "sort")
    ]
    long = [op for op in kernels if traffic_of(op, parts, called) > batch]
    return {
        "kernels": len(kernels),
        "small": len(kernels) - len(long),
        "sorts": sum(op.kind == "sort" for op in every),
        "table copies": sum(op.kind == "copy" and op.shape in tables for op in every),
        "bytes": round(sum(traffic_of(op, parts, called) for op in long) / batch),
    }


def traffic_of(op: Op, parts: dict[str, list[Op]], called: dict[str, list[str]]) -> int:
    """Bytes that a kernel reads and writes."""
    return sum(traffic(parts[name]) for name in called[op.name]) or 2 * op.bytes


def define_flags() -> tuple[str, ...]:
    """Defines this script's flags and returns their names."""
    absl_flags.DEFINE_string("target", None, "description of the GPU")
    absl_flags.DEFINE_integer("batch_size", 65_536, "triples per step", lower_bound=1)
    for name, default, known, text in (
        ("guidance", ["none", "pairwise"], GUIDANCE, "uses of the teacher"),
        ("dtype", ["float32"], TABLE_DTYPES, "types of the tables"),
        ("optimizer", ["sgd", "adagrad"], TABLE_OPTIMIZERS, "row optimisers"),
    ):
        absl_flags.DEFINE_multi_enum(name, default, known, text)
    return "target", "batch_size", "guidance", "dtype", "optimizer"


def main(_: list[str]) -> None:
    # What is not compiled for the GPU runs on the CPU. The version checks need a driver, and a
    # program for a GPU that is not there can be written to the cache but not read back.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    import jax
    import jax.numpy as jnp
    import synthetic
    import synthetic_dataset
    from cases import Case
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from slgr_jax.mesh import Layout
    from slgr_jax.reports import tables as tables_lib
    from slgr_jax.training import build, step
    from slgr_jax.training.state import init_state

    try:
        with open(FLAGS.target, encoding="utf-8") as file:
            described = file.read()
    except OSError as error:
        raise InputError(f"--target={FLAGS.target}: {error.strerror}") from error
    try:
        device = topologies.get_topology_desc(
            "gpu", "cuda", target_config=described, topology="1x1x1"
        ).devices[0]
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"JAX cannot compile for a GPU here: {why}; pip install 'jax[cuda13]'"
        ) from error
    target = f"compiled for {device.device_kind}"
    print(f"jax {jax.__version__}, {target}; batch {FLAGS.batch_size}, d = 64")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic_dataset.from_pairs(synthetic.make(synthetic.SIZES["large"]), folder)
        synthetic_dataset.write_teachers(dataset)
        for guidance, dtype, optimizer in itertools.product(
            FLAGS.guidance, FLAGS.dtype, FLAGS.optimizer
        ):
            case = Case("large", "mf", guidance, dtype, FLAGS.batch_size)
            run = case.config({"table_optimizer": optimizer, "kernels": "xla"}, folder)
            experiment = build.build(run, dataset)
            here, resident = experiment.trainer, experiment.arrays
            mesh = here.layout.mesh
            there = Layout(Mesh(np.full(mesh.devices.shape, device), mesh.axis_names))
            trainer = dataclasses.replace(here, layout=there)
            arguments = (init_state(here, 0), resident, jnp.zeros(2, jnp.uint32), jnp.int32(1))
            abstract = jax.tree.map(
                lambda x, at=there.replicated: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                arguments,
            )
            compiled = step.make_run_steps(trainer).lower(*abstract).compile()
            tables = list(abstract[0].tables.values())
            kinds = {"float32": "f32", "uint16": "u16"}
            shapes = {f"{kinds[x.dtype.name]}[{x.shape[0]},{x.shape[1]}]" for x in tables}
            found = facts(compiled.as_text(), FLAGS.batch_size, shapes)
            lanes = 1 if guidance == "none" else 2
            row_bytes = tables[0].shape[1] * tables[0].dtype.itemsize
            rows.append(
                {"guidance": guidance, "dtype": dtype, "optimizer": optimizer}
                | found
                | {"floor": 2 * 3 * lanes * row_bytes}
            )
    print(tables_lib.markdown_table(rows))


if __name__ == "__main__":
    flags.run(main, usage=__doc__, own=define_flags(), required=("target",))
