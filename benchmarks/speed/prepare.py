"""What memory and time does `slgr prepare` take, with all rows in memory and with some at a time?

    python benchmarks/speed/prepare.py --sizes=2m,20m --memory=8,0.5
    python benchmarks/speed/prepare.py --sizes=200m --memory=2 --load --folder=SCRATCH

A log (`interaction_log.py`) is written once a size, as Parquet or CSV, and prepared in a process of
its own per --memory. Peak memory is what the system says of the process when it has ended
(resident, pages of mapped files among it); processor seconds are those of all its threads. The
datasets must be equal: `split` is the beginning of the split's hash. --load also loads each dataset
in a process of its own. The folder needs about 70 bytes a row while a size is measured.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import interaction_log
from absl import app
from absl import flags as absl_flags

from slgr_jax.data import schema
from slgr_jax.reports import tables

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_list("sizes", ["200k", "2m"], f"of {', '.join(interaction_log.SIZES)}")
absl_flags.DEFINE_list("memory", ["8", "0.1"], "values of --memory, gigabytes")
absl_flags.DEFINE_enum("format", "parquet", ["parquet", "csv"], "of the log")
absl_flags.DEFINE_string("split", "auto", "rule of the split")
absl_flags.DEFINE_bool("load", False, "measure loading too")
absl_flags.DEFINE_string("folder", "", "where files are put meanwhile; empty: the system's place")

# The peak of a process is at least that of the one that began it, so that one is small.
_WATCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
processor = usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss, processor]))
"""
_LOAD = "import sys; from slgr_jax.data import dataset; dataset.load(sys.argv[1])"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took."""

    mib: float
    seconds: float
    processor_seconds: float

    def columns(self, label: str = "") -> dict[str, str]:
        """For a table."""
        return {
            f"{label}peak MiB": f"{self.mib:,.0f}",
            f"{label}s": f"{self.seconds:,.1f}",
            f"{label}processor s": f"{self.processor_seconds:,.1f}",
        }


def cost_of(command: list[str]) -> Cost:
    """Run a command to its end.

    Raises:
      SystemExit: it failed; it has said why.
    """
    begun = time.monotonic()
    watch = [sys.executable, "-c", _WATCH, *command]
    status, peak, processor = json.loads(
        subprocess.run(watch, check=True, stdout=subprocess.PIPE).stdout
    )
    if status:
        sys.exit(status)
    unit = 1 if sys.platform == "darwin" else 2**10
    return Cost(peak * unit / 2**20, time.monotonic() - begun, processor)


def measured(name: str, folder: pathlib.Path) -> list[dict[str, str]]:
    """The rows of the table for one size."""
    size = interaction_log.SIZES[name]
    log = folder / f"{name}.{FLAGS.format}"
    if not log.exists():
        interaction_log.write(log, size)
    rows = []
    for memory in FLAGS.memory:
        out = folder / f"{name}-{memory}"
        prepare = [sys.executable, "-m", "slgr_jax.cli", "prepare", f"--source={FLAGS.format}"]
        prepare += [
            f"--input={log}",
            f"--out={out}",
            f"--memory={memory}",
            f"--split={FLAGS.split}",
        ]
        cost = cost_of(prepare)
        manifest = schema.read_dataset_manifest(out)
        row = {"rows": f"{size.rows:,}", "--memory": memory, **cost.columns()}
        row["split"] = manifest.split_hash[:12]
        if FLAGS.load:
            row |= cost_of([sys.executable, "-c", _LOAD, str(out)]).columns("load: ")
        rows.append(row)
        shutil.rmtree(out)
    log.unlink()
    return rows


def main(_: list[str]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=FLAGS.folder or None) as name:
        rows = [row for size in FLAGS.sizes for row in measured(size, pathlib.Path(name))]
    print(tables.text_table(rows))


if __name__ == "__main__":
    app.run(main)
