"""What does a device hold, and a process, where users are split over them?

    python benchmarks/speed/user_shards.py [--size=large] [--user_shards=128] [--devices=1,2,4,8]

mf, d = 64, Adagrad, guided by lists through a calibrated gate, on synthetic pairs. A child process
for each number of virtual CPU devices makes the arrays, the state and the serving state of a run,
as training does, and adds up what each device really holds of them (`addressable_shards`), with
--user_shards and without; then one, two and four processes, gloo between them, that read the data
from disk as training does: whole, by shards of users that are dealt out while it is read, and by
those that they were numbered by (`slgr prepare --user_shards`). Printed: megabytes of a device by
part, the same on all of them, and of a process; beside them what `slgr train --plan` says of the
same parts. Of a process also what it has in memory of the dataset; the megabytes that it read from
files until its arrays were made (/proc/self/io: each file that is checked is read once, what is
mapped later is not counted), and in how many processor seconds it read dataset and teacher; and how
much more memory than before it had at its greatest (VmHWM: pages of mapped files are among it).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import synthetic
from absl import flags as absl_flags

from slgr_jax import cluster
from slgr_jax.cli import flags

PARTS = ("user table", "item table", "interactions", "teacher", "serving")


def define() -> tuple[str, ...]:
    """Define the flags; their names."""
    absl_flags.DEFINE_enum("size", "large", sorted(synthetic.SIZES), "of the pairs")
    absl_flags.DEFINE_integer("user_shards", 128, "parts that users are cut in", lower_bound=1)
    absl_flags.DEFINE_list("devices", ["1", "2", "4", "8"], "numbers of devices")
    absl_flags.DEFINE_list("processes", ["1", "2", "4"], "numbers of processes of two devices")
    absl_flags.DEFINE_string("child", "", "FOLDER,SHARDS,DEVICES[,HOST:PORT/process/processes]")
    return ("size", "user_shards", "devices", "processes")


def child(folder: str, user_shards: int, devices: int, place: str) -> None:
    """One process; prints a line of JSON: bytes by part of each of its devices, and the plan's."""
    if place:
        address, process, processes = place.split("/")
        if int(processes) > 1:
            cluster.start(cluster.Place(address, int(processes), int(process)))
    import jax
    import synthetic_dataset

    from slgr_jax.config import make_run
    from slgr_jax.teacher.products import preferences
    from slgr_jax.training import build, loop, memory_plan, state

    seconds = [0.0]
    load_teacher = preferences.load

    def timed(work: Any, *args: Any, **named: Any) -> Any:
        begin = time.process_time()
        result = work(*args, **named)
        seconds[0] += time.process_time() - begin
        return result

    preferences.load = functools.partial(timed, load_teacher)

    run = make_run(
        folder, "", user_shards=user_shards, kernels="xla", guidance="pairwise", gate="calibrated",
        teacher=synthetic_dataset.TEACHER, labelled_per_step=4096,
    )  # fmt: skip
    jax.devices()
    before, read_before = _peak(), _bytes_read()
    if place:
        dataset = timed(loop.load_data, run)
    else:
        pairs = synthetic.Pairs.load(folder)
        dataset = synthetic_dataset.from_pairs(pairs, folder, validation=True)
    made = build.build(run, dataset)
    peak, from_files = _peak() - before, _bytes_read() - read_before
    begin = state.init_state(made.trainer, 0)
    serving = state.make_serving_state(made.trainer)(begin, made.arrays.context)
    trees = (
        begin.tables["user"],
        begin.tables["item"],
        made.arrays.interactions,
        made.arrays.guidance,
        serving,
    )
    held: dict[str, list[int]] = {}
    for name, tree in zip(PARTS, trees, strict=True):
        by_device: dict[Any, int] = {}
        for leaf in jax.tree.leaves(tree):
            for part in leaf.addressable_shards:
                by_device[part.device] = by_device.get(part.device, 0) + part.data.nbytes
        held[name] = list(by_device.values())
    planned = {}
    if not place:
        (plan,) = memory_plan.make_plans(run, dataset, [(devices, 1)])
        names = ("tables", "interactions", "teacher", "step", "draws", "device")
        planned = {name: getattr(plan, name) for name in names}
    facts = {
        "dataset": memory_plan.of_dataset(dataset),
        "from files": from_files,
        "seconds": seconds[0],
        "peak": peak,
    }
    print(json.dumps({"held": held, "plan": planned, "facts": facts}))


def _peak() -> int:
    """Bytes of memory that this process had at its greatest."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _bytes_read() -> int:
    """Bytes that this process asked the system for, without pages of mapped files."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def _start(folder: str, user_shards: int, devices: int, place: str = "") -> subprocess.Popen[str]:
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    words = ",".join([folder, str(user_shards), str(devices), place])
    command = [sys.executable, __file__, f"--child={words}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    read: dict[str, Any] = json.loads(out.splitlines()[-1])
    return read


def main(_: list[str]) -> None:
    given = flags.FLAGS
    if given.child:
        folder, shards, devices, *place = given.child.split(",")
        child(folder, int(shards), int(devices), "".join(place))
        return
    from slgr_jax.reports import tables

    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        by_shard = _write(folder, given.size, given.user_shards)
        for shards in (0, given.user_shards):
            for devices in given.devices if shards else given.devices[-1:]:
                read = _read(_start(folder, shards, int(devices)))
                held = {name: sizes[0] for name, sizes in read["held"].items()}
                assert all(len(set(sizes)) == 1 for sizes in read["held"].values())
                held["of these, --plan"] = sum(
                    read["plan"][name] for name in ("tables", "interactions", "teacher")
                )
                rows.append(_row(str(shards), f"1 x {devices}", "device", held))
        layouts = (
            ("0", folder, 0),
            (f"{given.user_shards}, dealt", folder, given.user_shards),
            (f"{given.user_shards}, by number", by_shard, given.user_shards),
        )
        for (name, data, shards), count in itertools.product(layouts, map(int, given.processes)):
            with socket.create_server(("localhost", 0)) as server:
                address = f"localhost:{server.getsockname()[1]}"
            places = [f"{address}/{number}/{count}" for number in range(count)]
            started = [_start(data, shards, 2, place) for place in places]
            read, *_ = [_read(process) for process in started]
            held = {part: sum(sizes) for part, sizes in read["held"].items()} | read["facts"]
            rows.append(_row(name, f"{count} x 2", "process", held))
    print("MB\n")
    print(tables.markdown_table(rows))


def _write(folder: str, size: str, count: int) -> str:
    """Pairs, their dataset and teachers in `folder`; and, below it, the same by shards of users."""
    import synthetic_dataset

    pairs = synthetic.make(synthetic.SIZES[size])
    pairs.save(folder)
    dataset = synthetic_dataset.from_pairs(pairs, folder, validation=True)
    by_shard = synthetic_dataset.by_shard(dataset, f"{folder}/by_shard", count)
    for each in (dataset, by_shard):
        synthetic_dataset.write(each)
        synthetic_dataset.write_teachers(each)
    return str(by_shard.path)


def _row(shards: str, mesh: str, of: str, held: dict[str, float]) -> dict[str, str]:
    total = sum(held[name] for name in PARTS)
    row = {"--user_shards": shards, "processes x devices": mesh, "of a": of}
    row |= {name: f"{held[name] / 1e6:.1f}" for name in PARTS}
    row["all of these"] = f"{total / 1e6:.1f}"
    for name, what in (
        ("of these, --plan", "--plan of all but serving"),
        ("dataset", "dataset in memory"),
        ("from files", "read from files"),
        ("peak", "peak less before"),
    ):
        row[what] = f"{held[name] / 1e6:.1f}" if name in held else ""
    row["processor s to read"] = f"{held['seconds']:.1f}" if "seconds" in held else ""
    return row


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=(), own=define())
