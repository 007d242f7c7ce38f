"""How long until a command answers, and until the first epoch is done?

    python benchmarks/speed/startup.py --data=DATA
    python benchmarks/speed/startup.py --data=DATA --peer=torch,keras_rs \\
        --peer_python=PEERS/bin/python

Whole processes, one at a time and alternating; every number is the median of --runs, with the
least and the most. Three tables:
  --help     of every launch script, wall and processor seconds
  training   launch/train.py with one epoch, from the start of the process until the epoch's steps
             are finished, until its validation is, and until the exit (checkpoint on disk). The
             user's cache holds nothing (first), the native kernels (cold), or also the programs
             of a run before (warm). A peer does the same steps with --peer_python; it has no
             cache, validates nothing and saves nothing.
  where      the seconds between one moment and the next of the same runs, what JAX spent on
             lowering and on compiling (or reading the cache) up to the epoch's end, and programs
It ends with what `import slgr_jax.training.loop` loads, by package (python -X importtime, which
itself slows it down).
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.errors import ConfigError, listing

REPO = pathlib.Path(__file__).resolve().parents[2]
CHILDREN = pathlib.Path(__file__).with_name("startup_children.py")
SCRIPTS = ("prepare", "teach", "train", "evaluate", "quickstart")
PEERS = ("torch", "keras_rs")
# Each mark of startup_children.py and what the time before it went into.
PHASES = {
    "main": "python, flags",
    "imported": "imports",
    "loaded": "data set",
    "built": "kernels, arrays",
    "ready": "state",
    "steps": "steps",
    "valid": "validation",
    "saved": "checkpoint",
    "exit": "exit",
}
# Variables that would put a cache elsewhere; the parent's own `flags.run` sets the first.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "SLGR_KERNEL_CACHE")
Run = dict[str, dict[str, float]]  # mark -> seconds since the start, and totals up to then

absl_flags.DEFINE_string("data", None, "dataset directory (launch/prepare.py)")
absl_flags.DEFINE_integer("runs", 5, "timed runs of each kind", lower_bound=1)
absl_flags.DEFINE_integer("batch_size", 2048, "triples per step", lower_bound=1)
absl_flags.DEFINE_string("peer_python", "", "interpreter that has the peers' packages")
absl_flags.DEFINE_list("peer", list(PEERS), f"peers to time with --peer_python: {listing(PEERS)}")
OWN = ("data", "runs", "batch_size", "peer_python", "peer")


def timed(command: Sequence[str], cache: pathlib.Path) -> tuple[float, float]:
    """Wall and processor seconds of a whole process, with `cache` as the user's cache."""
    environment = {k: v for k, v in os.environ.items() if k not in CACHES}
    before, start = os.times(), time.perf_counter()
    subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def marked(scratch: pathlib.Path, command: Sequence[str], cache: pathlib.Path) -> Run:
    """One process of startup_children.py: when it reached each mark.

    Args:
      scratch: folder for the marks.
      command: interpreter, kind of child, its arguments.
      cache: the user's cache.
    """
    marks = scratch / "marks"
    marks.unlink(missing_ok=True)
    python, kind, *arguments = command
    child = [python, str(CHILDREN), kind, str(marks), *arguments]
    start = time.time()
    wall, _ = timed(child, cache)
    found: Run = {}
    for line in marks.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        name = values.pop("mark")
        found[name] = {"s": values.pop("at") - start, **values}
    found["exit"] = {"s": wall}
    return found


def measure(given: absl_flags.FlagValues, scratch: pathlib.Path) -> dict[str, list[Run]]:
    """`--runs` processes of each kind, alternating, after an untimed one that fills the caches."""
    train = [sys.executable, "ours", str(REPO / "launch" / "train.py"), f"--data={given.data}",
             "--epochs=1", f"--batch_size={given.batch_size}"]  # fmt: skip
    # What is removed from the user's cache before a run of each kind.
    removed = {"first": ".", "cold": "slgr_jax/xla", "warm": ""}

    def ours(kind: str) -> Run:
        cache, workdir = scratch / kind, scratch / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        if removed[kind]:
            shutil.rmtree(cache / removed[kind], ignore_errors=True)
        return marked(scratch, [*train, f"--workdir={workdir}"], cache)

    def peer(name: str) -> Run:
        return marked(scratch, [given.peer_python, name, str(pairs)], scratch / "peer")

    kinds: dict[str, Callable[[str], Run]] = dict.fromkeys(removed, ours)
    if given.peer_python:
        pairs = write_pairs(given.data, given.batch_size, scratch)
        kinds |= dict.fromkeys(given.peer, peer)
    for name, run in kinds.items():
        run(name)
    found: dict[str, list[Run]] = {name: [] for name in kinds}
    for _ in range(given.runs):
        for name, run in kinds.items():
            found[name].append(run(name))
    return found


def write_pairs(data: str, batch: int, scratch: pathlib.Path) -> pathlib.Path:
    """The training pairs as a peer reads them, with a negative each."""
    from slgr_jax.data import dataset as dataset_lib

    dataset = dataset_lib.load(data)
    path = scratch / "pairs.npz"
    np.savez(
        path,
        users=dataset.train.users,
        items=dataset.train.items,
        others=np.random.default_rng(0).integers(
            0, dataset.n_items, len(dataset.train), dtype=np.int32
        ),
        n_users=dataset.n_users,
        n_items=dataset.n_items,
        batch=batch,
    )
    return path


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def help_rows(runs: int, scratch: pathlib.Path) -> list[dict[str, str]]:
    """`--help` of each launch script."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SCRIPTS}
    for _ in range(runs):
        for name, found in times.items():
            command = [sys.executable, str(REPO / "launch" / f"{name}.py"), "--help"]
            found.append(timed(command, scratch))
    return [
        {"--help of": name, "wall s": spread([wall for wall, _ in found]),
         "processor s": spread([used for _, used in found])}
        for name, found in times.items()
    ]  # fmt: skip


def training_rows(found: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """Seconds from the start of the process to each end."""
    columns = {"steps": "first epoch s", "valid": "validation s", "exit": "exit s"}
    return [
        {"what": kind}
        | {
            column: spread([run[mark]["s"] for run in runs])
            for mark, column in columns.items()
            if mark in runs[0]
        }
        for kind, runs in found.items()
    ]


def where_rows(found: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """Seconds between marks, and what JAX did, for the kinds of run that are ours."""
    rows: list[dict[str, str]] = []
    for kind, runs in found.items():
        if "saved" not in runs[0]:
            continue  # a peer
        row = {"where": kind}
        before = [0.0] * len(runs)
        for mark, text in PHASES.items():
            reached = [run[mark]["s"] for run in runs]
            row[text] = f"{np.median(np.subtract(reached, before)):.2f}"
            before = reached
        for name in ("lower_s", "compile_s"):
            row[name] = f"{np.median([run['steps'].get(name, 0.0) for run in runs]):.2f}"
        row["programs"] = f"{runs[0]['saved'].get('programs', 0):.0f}"
        row["from cache"] = f"{runs[0]['saved'].get('hits', 0):.0f}"
        rows.append(row)
    return rows


def import_rows(most: int = 8) -> list[dict[str, str]]:
    """Milliseconds of `import slgr_jax.training.loop` in the modules of each package."""
    text = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import slgr_jax.training.loop"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    own: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        microseconds, _, name = line.removeprefix("import time:").split("|")
        if microseconds.strip().isdigit():
            own[name.strip().split(".")[0]] += int(microseconds)
    rows = [{"package": name, "ms": f"{spent / 1e3:.0f}"} for name, spent in own.most_common(most)]
    return [*rows, {"package": "all", "ms": f"{own.total() / 1e3:.0f}"}]


def main(_: list[str]) -> None:
    given = flags.FLAGS
    unknown = sorted(set(given.peer) - set(PEERS))
    if unknown:
        raise ConfigError(f"--peer={listing(unknown)} is not one of: {listing(PEERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        helped = help_rows(given.runs, pathlib.Path(scratch))
        found = measure(given, pathlib.Path(scratch))
    from slgr_jax.reports.tables import markdown_table

    for rows in (helped, training_rows(found), where_rows(found), import_rows()):
        print(markdown_table(rows))


if __name__ == "__main__":
    flags.run(main, usage=__doc__, own=OWN, required=("data",))
