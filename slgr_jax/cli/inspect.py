"""Show what a run or a dataset directory is, and check every byte of it.

    slgr inspect --workdir=RUN
    slgr inspect --data=DATA
    slgr inspect --workdir=RUN --workdir=RUN2 --data=DATA --json

Of a run: settings, progress, best validation, the arrays of its checkpoint. Of a dataset directory:
counts, split, and the teachers, vectors, candidates, requests and answers under it. Nothing is
written. Exits with 2 where something is damaged or missing, and names each file.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api
from slgr_jax.cli import flags
from slgr_jax.errors import listing

USAGE = __doc__ or ""


def define() -> None:
    """Define the command's flags."""
    absl_flags.DEFINE_multi_string("workdir", [], "directory of a run")
    absl_flags.DEFINE_string("data", "", "dataset directory, as slgr prepare wrote it")
    absl_flags.DEFINE_bool("json", False, "print a JSON object a directory, a line each")


def main(_: list[str]) -> None:
    """Inspect what is named, print it, and fail where there are faults."""
    given = flags.FLAGS
    if not given.workdir and not given.data:
        flags.fail("missing --workdir or --data; see slgr inspect --help")

    inspections = [api.inspect(workdir=workdir) for workdir in given.workdir]
    if given.data:
        inspections.append(api.inspect(data=given.data))
    for inspection in inspections:
        print(inspection.to_json() if given.json else inspection)
    faults = [fault for inspection in inspections for fault in inspection.faults]
    if faults:
        flags.fail(f"damaged: {listing(faults, limit=3)}")


def run() -> None:
    """`slgr inspect`."""
    flags.run(main, usage=USAGE, name="slgr inspect", define=define)
