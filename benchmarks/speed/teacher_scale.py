"""How long do writing, adding to and loading a large teacher product take, and how much memory?

    python benchmarks/speed/teacher_scale.py [--rows=100000000] [--kind=scores] [--folder=DIR]

A product with --rows random rows, --per_user of each user, is written to a temporary folder that
is removed at the end. Each line is a process of its own; the seconds are those of the one library
call, the memory is the most that the process held of its own or mapped.
  write      preferences.write_product: check, measure, write and hash
  append     preferences.append of 1 % more rows, of users who are in it already
  load       preferences.load: cold (files dropped from the page cache first) or warm
  resident   teacher_product.teacher_arrays: load, and the host arrays that training draws from
  reader     preferences.load of the second of eight processes
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import resource
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import synthetic
import synthetic_dataset
from absl import app
from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.reports import tables
from slgr_jax.teacher.products import preferences

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_integer("rows", 100_000_000, "rows of the product", lower_bound=1000)
absl_flags.DEFINE_integer("per_user", 100, "rows of each user", lower_bound=1)
absl_flags.DEFINE_integer("items", 100_000, "items of the catalogue", lower_bound=1000)
absl_flags.DEFINE_enum("kind", "preferences", sorted(schema.TEACHER_SCHEMAS), "what the rows are")
absl_flags.DEFINE_string("folder", "", "where to make the temporary folder; empty: the system's")

Job = tuple[str, str, int, int, int]  # kind, folder, rows, per user, items


def dataset_of(job: Job) -> Dataset:
    """As many users as the rows need, and one training interaction of each."""
    _, folder, rows, per_user, items = job
    users = np.arange(-(-rows // per_user), dtype=np.int32)
    pairs = synthetic.Pairs(users.size, items, users, users % items)
    return synthetic_dataset.from_pairs(pairs, folder)


def table_of(job: Job, *, part: int = 0, share: float = 1.0) -> pa.Table:
    """Random rows; different parts have no pair in common."""
    kind, _, rows, per_user, items = job
    each, n_users = max(1, int(per_user * share)), -(-rows // per_user)
    rng = np.random.default_rng(part)
    # One item out of each of `each` stretches of half a catalogue: a user has none twice.
    edges = np.arange(each + 1, dtype=np.int32) * (items // 2) // each
    item = rng.integers(edges[:-1], edges[1:], (n_users, each), np.int32).ravel() * 2 + part
    users = np.repeat(np.arange(n_users, dtype=np.int32), each)
    number = rng.random(item.size, np.float32) + np.float32(1e-6)
    if kind == "scores":
        return pa.table([users, item, number], schema=schema.TEACHER_SCORES)
    other = rng.integers(0, items // 2 - 1, item.size, np.int32) * 2 + part
    other += 2 * (other >= item)  # any but the item itself
    return pa.table([users, item, other, number], schema=schema.TEACHER_PREFERENCES)


def write(job: Job) -> Callable[[], object]:
    dataset, table = dataset_of(job), table_of(job)
    provenance = preferences.Provenance(model="random numbers")
    return lambda: preferences.write_product(dataset, "big", table, provenance=provenance)


def append(job: Job) -> Callable[[], object]:
    dataset, table = dataset_of(job), table_of(job, part=1, share=0.01)
    return lambda: preferences.append(dataset, "big", table)


def load(job: Job) -> Callable[[], object]:
    dataset = dataset_of(job)
    return lambda: preferences.load(dataset, "big")


def load_unverified(job: Job) -> Callable[[], object]:
    dataset = dataset_of(job)
    return lambda: preferences.load(dataset, "big", verify=False)


def load_cold(job: Job) -> Callable[[], object]:
    for path in (pathlib.Path(job[1]) / schema.TEACHER_DIR / "big").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return load(job)


def reader(job: Job) -> Callable[[], object]:
    dataset = dataset_of(job)
    users = dataset.n_users // 8, 2 * dataset.n_users // 8
    return lambda: preferences.load(dataset, "big", users=users)


def resident(job: Job) -> Callable[[], object]:
    from slgr_jax.guidance import teacher_product
    from slgr_jax.guidance.base import Sources
    from slgr_jax.models.backbones import make_backbone
    from slgr_jax.sampling.context import Sizes

    dataset = dataset_of(job)
    run = config.RunConfig("", "", guidance=config.GuidanceConfig("pairwise", "big"))
    backbone = make_backbone(run.model, Sizes(dataset.n_users, dataset.n_items))
    sources = Sources(run, dataset, backbone)
    return lambda: teacher_product.teacher_arrays(sources)


STEPS: dict[str, Callable[[Job], Callable[[], object]]] = {
    "write": write,
    "load, warm": load,
    "load, cold": load_cold,
    "load, warm, --noverify_checksums": load_unverified,
    "resident, warm": resident,
    "reader 2 of 8, warm": reader,
    "append 1 %": append,
    "load after append, warm": load,
}


def measure(name: str, job: Job) -> tuple[float, float, float]:
    """(seconds on the clock, of processors, GiB) of one step."""
    call = STEPS[name](job)
    begin, busy = time.perf_counter(), time.process_time()
    call()
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(_: list[str]) -> None:
    folder = tempfile.mkdtemp(prefix="teacher_scale-", dir=FLAGS.folder or None)
    job = (FLAGS.kind, folder, FLAGS.rows, FLAGS.per_user, FLAGS.items)
    lines = []
    try:
        for name in STEPS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured = pool.apply(measure, (name, job))
            shown = [f"{value:.2f}" for value in measured]
            names = ("step", "clock s", "processor s", "peak GiB")
            lines.append(dict(zip(names, (name, *shown), strict=True)))
            print(lines[-1], flush=True)
        files = (pathlib.Path(folder) / schema.TEACHER_DIR / "big").iterdir()
        size = sum(path.stat().st_size for path in files)
    finally:
        shutil.rmtree(folder)
    print(f"{FLAGS.rows:,} {FLAGS.kind}, {size / 1e9:.2f} GB on disk, {os.cpu_count()} cores")
    print(tables.text_table(lines))


if __name__ == "__main__":
    app.run(main)
