"""What the list of a checkpoint's files costs beside saving it: seconds and processor seconds.

    python benchmarks/speed/checkpoint.py --rows=165000,2000000

A table of R rows, 64 values and two optimiser slots each, and the values again as the best state.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slgr_jax.models.scoring import ServingState
from slgr_jax.training import checkpoint_manifest
from slgr_jax.training.checkpoint import Checkpoints, Progress
from slgr_jax.training.state import TrainState

WIDTH, SLOTS = 64, 2


def timed(name: str, work: Callable[[], object]) -> None:
    """Run `work` and print what it took."""
    begin, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - begin, time.process_time() - processor
    print(f"  {name:28} {wall:8.3f} s  {processor:8.3f} processor s")


def measure(rows: int, root: pathlib.Path) -> None:
    """Save, list, verify and restore one checkpoint."""
    table = jax.random.normal(jax.random.key(0), (rows, WIDTH * (1 + SLOTS)))
    state = TrainState(jnp.int32(1), {"user": table}, {"backbone": {}}, ())
    best = ServingState({}, {"user": table[:, :WIDTH]}, {})
    jax.block_until_ready((state, best))
    saved = Checkpoints(str(root), writable=True)

    def save() -> None:
        saved.save(state, best, Progress(step=1))
        saved.wait()

    print(f"{rows} rows x {WIDTH}, {SLOTS} slots")
    timed("save, the list included", save)
    directory = root / checkpoint_manifest.DIRECTORY / "1"
    manifest = checkpoint_manifest.read(directory)
    print(f"  {manifest.bytes / 2**20:,.0f} MiB in {len(manifest.files)} files")
    timed(
        "the list",
        lambda: checkpoint_manifest.write(directory, manifest.progress, manifest.arrays),
    )
    timed("verify", lambda: checkpoint_manifest.verify(directory))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        (state, best),
    )
    timed("restore, verified", lambda: jax.block_until_ready(saved.restore(*abstract)))
    saved.close()


def main() -> None:
    """Measure each number of rows in a directory of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="165000,2000000", help="rows, separated by commas")
    parser.add_argument("--root", default=None, help="where to write; the temporary directory")
    arguments = parser.parse_args()
    for rows in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.root) as root:
            measure(rows, pathlib.Path(root))


if __name__ == "__main__":
    main()
