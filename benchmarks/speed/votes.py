"""What do the votes of several processes cost a dispatch of steps?

    python benchmarks/speed/votes.py --data=DATA [--steps=1,16]

Two processes of two virtual CPU devices train mf on DATA, gloo between them. Turns with votes and
without (`training/agreement.py`: a wish cast with every dispatch, read one dispatch later)
alternate in the same processes, over the same state: as many dispatches a turn as take --seconds.
Printed: the median time of a dispatch with votes over that of the turn without before it, with
quartiles, for each of --steps a dispatch. One is the most that votes can cost: a run's own
dispatches take about a second (--steps_per_dispatch).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags as absl_flags

from slgr_jax import cluster
from slgr_jax.cli import flags


def define() -> None:
    """Define the flags."""
    absl_flags.DEFINE_string("data", None, "dataset directory that slgr prepare wrote")
    absl_flags.DEFINE_integer("repeats", 15, "pairs of turns", lower_bound=2)
    absl_flags.DEFINE_float("seconds", 2.0, "of a turn", lower_bound=0.1)
    absl_flags.DEFINE_list("steps", ["1", "16"], "steps a dispatch")
    absl_flags.DEFINE_string("place", "", "of a child: HOST:PORT/process")


def child(data: str, place: str, lengths: list[int], repeats: int, seconds: float) -> None:
    """One of the processes; the first prints a line of JSON a dispatch length."""
    address, process = place.split("/")
    cluster.start(cluster.Place(address, 2, int(process)))
    import jax
    import numpy as np

    from slgr_jax.config import make_run
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.training import agreement, programs, step
    from slgr_jax.training.build import build

    experiment = build(make_run(data, "/nowhere", backbone="mf"), dataset_lib.load(data))
    trainer = experiment.trainer
    made = programs.make_programs(experiment)
    state, key = made.init(np.int32(0)), made.key(np.int32(0))
    jitted: Any = step.make_run_steps(trainer)
    run_steps = jitted.lower(
        state, experiment.arrays, key, programs.put_number(trainer, 1)
    ).compile()
    cluster.first("compiled")
    votes = agreement.make_agreement(trainer.layout, threading.Event(), lambda: False)

    def turn(count: int, dispatches: int, *, voting: bool) -> float:
        """Seconds a dispatch; each waits for the one before it, as in training."""
        nonlocal state
        begin, before = time.perf_counter(), None
        for _ in range(dispatches):
            number = programs.put_number(trainer, count)
            state, sums, _ = run_steps(state, experiment.arrays, key, number)
            cast = votes.cast() if voting else None
            if before is not None:
                jax.device_get(before[0])
                votes.count(before[1]) if voting else None
            before = (sums, cast)
        jax.block_until_ready((state, before))
        return (time.perf_counter() - begin) / dispatches

    for count in lengths:
        turn(count, 3, voting=True)
        estimate = float(cluster.first(str(turn(count, 3, voting=False))))
        dispatches = max(int(seconds / estimate), 3)
        pairs = [
            (turn(count, dispatches, voting=False), turn(count, dispatches, voting=True))
            for _ in range(repeats)
        ]
        if cluster.is_first():
            print(
                json.dumps({"steps": count, "dispatches": dispatches, "pairs": pairs}), flush=True
            )


def main(_: list[str]) -> None:
    """Start both processes; show what the first says."""
    given = absl_flags.FLAGS
    if given.place:
        lengths = [int(text) for text in given.steps]
        child(given.data, given.place, lengths, given.repeats, given.seconds)
        return
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--place={address}/{process}"],
            env=environ,
            stdout=None if process else subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    output = children[0].communicate()[0]
    if any(process.wait() for process in children):
        raise SystemExit(1)
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        ratios = [voting / without for without, voting in found["pairs"]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        without = statistics.median(pair[0] for pair in found["pairs"])
        print(
            f"{found['steps']} steps a dispatch, {found['dispatches']} dispatches a turn, "
            f"{len(ratios)} pairs of turns: {without * 1e3:.2f} ms a dispatch without votes; "
            f"with them {middle:.3f} times as long (quartiles {low:.3f}, {high:.3f})"
        )


if __name__ == "__main__":
    flags.run(main, usage=__doc__ or "", define=define, required=("data",))
