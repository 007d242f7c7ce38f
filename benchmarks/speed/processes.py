"""What do a second device and a second process bring? Steps on N devices, with their efficiency.

    python benchmarks/speed/processes.py [--backbones=mf,sasrec] [--json=FILE]

Arrangements of P processes x M devices take turns of so many steps, each in processes of its own
that stay alive, synthetic data (138,000 x 27,000). CPU devices are virtual: each gets one core, a
process is held to the cores of its devices (sched_setaffinity, before JAX starts its threads), and
process k begins at core k M. So 1 x 1 has one core, 1 x 2 and 2 x 1 have two; one line gives 1 x 1
both. `strong` keeps the batch of all devices, `weak` that of each; tables are whole on every device
or split over them (--table_shards). Native kernels serve one device alone.

Efficiency is (triples/s) / (N * triples/s of 1 x 1 by the same programs), N = P M, of the turns of
the same round; `work` the same of processor seconds a triple: what is lost there is work that is
done more than once or that waiting costs, what is lost beside it was spent idle. On a machine that
others use, all devices of a step wait for the one whose core was taken: wall times are then a lower
bound, and --json has every turn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import turns
from turns import Contestant, Facts, Player, Turn

T = TypeVar("T")
BATCH = {"mf": 8192, "sasrec": 128}
STEPS = {"mf": 8, "sasrec": 4}  # of a turn by XLA's programs
NATIVE = 8  # times as many by the CPU kernels, which would be done too soon
MORE = {"sasrec": {"max_history": 20, "layers": 1, "dropout": 0.0}}
INTERACTIONS = 2_000_000


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Who takes a turn.

    Attributes:
      processes, devices: P, and M of each process.
      batch: of all devices.
      kernels: native or xla.
      scaling: strong, weak; one device is neither.
      table_shards: parts of the tables; 1: whole on every device.
      cores: held to; 0: one a device.
    """

    processes: int
    devices: int
    batch: int
    kernels: str = "xla"
    scaling: str = ""
    table_shards: int = 1
    cores: int = 0


def arrangements(batch: int) -> list[Arrangement]:
    """The first is what the others are compared with."""
    several = [
        Arrangement(processes, devices, size, scaling=scaling, table_shards=shards)
        for processes, devices in ((1, 2), (2, 1))
        for shards in (1, 2)
        for scaling, size in (("strong", batch), ("weak", 2 * batch))
    ]
    native = [Arrangement(1, 1, batch, "native"), Arrangement(1, 1, batch, "native", cores=2)]
    return [Arrangement(1, 1, batch), *native, *several]


# --- a process of an arrangement -----------------------------------------------------------------


def prepare(job: Facts) -> Contestant:
    """Join the others, build the trainer, compile; a turn is `job["steps"]` steps."""
    os.sched_setaffinity(0, job["cores"])
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(job["devices"])}
    from slgr_jax import cluster

    if job["processes"] > 1:
        cluster.start(cluster.Place(job["coordinator"], job["processes"], job["process"]))
    import synthetic
    import synthetic_dataset
    import worker

    from slgr_jax.config import make_run
    from slgr_jax.models.backbones import reads_of
    from slgr_jax.training import build

    run = make_run(job["folder"], "", **job["knobs"])
    pairs = synthetic.Pairs.load(job["folder"])
    dataset = synthetic_dataset.from_pairs(pairs, run.data, reads_of(run.model))
    experiment = build.build(run, dataset)
    stepper = worker.Stepper(experiment.trainer, experiment.arrays)
    stepper.run(job["steps"])
    processor: list[float] = []

    def turn() -> Turn:
        begin = time.process_time()
        taken = stepper.turn(job["steps"])
        processor.append(time.process_time() - begin)
        return taken

    return Contestant({}, turn, lambda: {"processor_s": processor})


# --- the process that compares -------------------------------------------------------------------


class Group:
    """The processes of an arrangement, which take their turn together."""

    def __init__(self, arrangement: Arrangement, folder: str, backbone: str) -> None:
        self.arrangement = arrangement
        self._pool = ThreadPoolExecutor(arrangement.processes)
        with socket.create_server(("localhost", 0)) as server:
            coordinator = f"localhost:{server.getsockname()[1]}"
        cores = arrangement.cores or arrangement.devices
        knobs = {"backbone": backbone, "batch_size": arrangement.batch}
        knobs |= {"kernels": arrangement.kernels, "table_shards": arrangement.table_shards}
        knobs |= MORE.get(backbone, {})
        jobs = [
            {
                "folder": folder,
                "knobs": knobs,
                "steps": STEPS[backbone] * (NATIVE if arrangement.kernels == "native" else 1),
                "coordinator": coordinator,
                "processes": arrangement.processes,
                "process": process,
                "devices": arrangement.devices,
                "cores": list(range(process * cores, (process + 1) * cores)),
            }
            for process in range(arrangement.processes)
        ]
        command = [sys.executable, __file__, "--serve"]
        self._players = self._each(lambda job: Player(command, job), jobs)

    def _each(self, work: Callable[[Any], T], of: Sequence[Any]) -> list[T]:
        """`work` of all at once: each may wait for the others."""
        return list(self._pool.map(work, of))

    def turn(self) -> Turn:
        """Their turn; each counts the triples of all."""
        taken = self._each(Player.turn, self._players)
        return Turn(taken[0].triples, max(turn.seconds for turn in taken))

    def finish(self) -> list[float]:
        """Processor seconds of all processes together, of each turn."""
        told = self._each(Player.finish, self._players)
        self._pool.shutdown()
        return [
            sum(of_turn) for of_turn in zip(*(facts["processor_s"] for facts in told), strict=True)
        ]


def measure(backbone: str, folder: str, repeats: int) -> list[dict[str, Any]]:
    """A row an arrangement: its turns, with processor seconds."""
    groups = [Group(each, folder, backbone) for each in arrangements(BATCH[backbone])]
    taken = turns.interleave(groups, repeats)
    return [
        {
            "backbone": backbone,
            **dataclasses.asdict(group.arrangement),
            "triples": [turn.triples for turn in of_group],
            "seconds": [turn.seconds for turn in of_group],
            "processor_s": group.finish(),
        }
        for group, of_group in zip(groups, taken, strict=True)
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Median (quartiles)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the table; the first of `rows` is what the others are compared with."""

    def rates(row: dict[str, Any], of: str) -> list[float]:
        return [t / s for t, s in zip(row["triples"], row[of], strict=True)]

    lines = []
    for row in rows:
        wall, work = (
            [a / b for a, b in zip(rates(row, of), rates(rows[0], of), strict=True)]
            for of in ("seconds", "processor_s")
        )
        devices = row["processes"] * row["devices"]
        lines.append(
            {
                "backbone": row["backbone"],
                "processes x devices": f"{row['processes']} x {row['devices']}",
                "cores": row["cores"] or devices,
                "tables": "split" if row["table_shards"] > 1 else "whole",
                "programs": row["kernels"],
                "batch": f"{row['batch']} {row['scaling']}".strip(),
                "1,000 triples/s": spread([rate / 1e3 for rate in rates(row, "seconds")], 1),
                "times 1 x 1": spread(wall, 2),
                "efficiency": f"{statistics.median(wall) / devices:.2f}",
                "work": f"{statistics.median(work):.2f}",
            }
        )
    return lines


def define() -> None:
    """Define the flags."""
    from absl import flags as absl_flags

    absl_flags.DEFINE_list("backbones", ["mf", "sasrec"], f"of: {', '.join(BATCH)}")
    absl_flags.DEFINE_integer("repeats", 9, "rounds of turns", lower_bound=2)
    absl_flags.DEFINE_string("json", "", "also write every turn to this file")


def main(_: list[str]) -> None:
    """Measure, and print the table."""
    import synthetic

    from slgr_jax.cli import flags
    from slgr_jax.errors import ConfigError, listing
    from slgr_jax.reports import tables

    given = flags.FLAGS
    unknown = [name for name in given.backbones if name not in BATCH]
    if unknown:
        raise ConfigError(f"--backbones: {listing(unknown)} is not one of: {listing(BATCH)}")
    if len(os.sched_getaffinity(0)) < 2:
        raise ConfigError("this process may use one core, and two devices take two")
    rows: list[dict[str, Any]] = []
    size = dataclasses.replace(synthetic.SIZES["large"], interactions=INTERACTIONS, fewest=0)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.make(size).save(folder)
        for backbone in given.backbones:
            of_backbone = measure(backbone, folder, given.repeats)
            print(tables.markdown_table(shown(of_backbone)), flush=True)
            rows += of_backbone
    if given.json:
        text = json.dumps(rows, indent=1) + "\n"
        pathlib.Path(given.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        turns.serve(prepare)
    else:
        from slgr_jax.cli import flags

        flags.run(main, usage=__doc__ or "", define=define)
