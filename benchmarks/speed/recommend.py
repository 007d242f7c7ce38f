"""Does `slgr recommend` keep up with evaluation?

    python benchmarks/speed/recommend.py
    python benchmarks/speed/recommend.py --memory --listed=200000

The world of `ranking.py`: random factors (width 64), 20,000 of 138,000 users ranked over 27,000
items, about 100 seen and 10 relevant items each. Users/s of evaluation of the test part (without
the pooled AUC, which is a second pass) and of files of the ten best items in each format, without
and with an item filter, taking turns. Median, minimum and maximum over repeats after a warm-up;
`ratio` is the first row's median over this one's, `processor ms` the median of a call's processor
time, which other work on the machine disturbs less, `processor ratio` its ratio.

--memory measures instead what a file of `--listed` users costs where there are 10^6 users and 10^5
items (width 16, 20 items seen by each): peak memory of the process once the run is there, and what
the lists add to it.
"""

from __future__ import annotations

import pathlib
import resource
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
import ranking_peers
import turns
from absl import app
from absl import flags as absl_flags

from slgr_jax.config import EvaluationConfig, ModelConfig, RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset, Part
from slgr_jax.mesh import make_layout
from slgr_jax.models.scoring import ServingState
from slgr_jax.reports import tables
from slgr_jax.serving import recommendation_files
from slgr_jax.serving.recommendation_files import Request
from slgr_jax.serving.trained_run import TrainedRun
from slgr_jax.training.restore import RestoredRun, backbone_and_context
from slgr_jax.training.state import Learner

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_integer("repeats", 5, "timed repeats", lower_bound=1)
absl_flags.DEFINE_enum("size", "large", list(ranking_peers.SIZES), "what to rank")
absl_flags.DEFINE_bool("memory", False, "peak memory at 10^6 users x 10^5 items in place of speed")
absl_flags.DEFINE_integer("listed", 1_000_000, "--memory: users that get a list", lower_bound=1)

MILLION = ranking_peers.Size(1_000_000, 100_000, 1_000_000, 20, 0)


def make_run(
    size: ranking_peers.Size, width: int = ranking_peers.WIDTH
) -> tuple[TrainedRun, np.ndarray]:
    """A run with the factors of the world, and the users that are ranked."""
    world = ranking_peers.make(size, width)

    def part(pairs: tuple[np.ndarray, np.ndarray]) -> Part:
        csr = Csr.from_pairs(*pairs, size.users)
        return Part(csr.owners().astype(np.int32), csr.indices, None, None)

    nothing = (np.zeros(0, np.int32), np.zeros(0, np.int32))
    ids = [f"item-{item:07d}" for item in range(size.items)]
    dataset = Dataset(
        path=pathlib.Path("synthetic"),
        manifest=schema.DatasetManifest("synthetic", "", {}, {}, {}, {}, "", "", {}),
        train=part(world.seen),
        valid=part(nothing),
        test=part(world.relevant),
        user_ids=pa.array([f"user-{user:07d}" for user in range(size.users)]),
        items=pa.table({"item_id": ids}),
    )
    evaluation = EvaluationConfig(pooled_auc=False)
    model = ModelConfig(dim=width)
    config = RunConfig("synthetic", "synthetic", model=model, evaluation=evaluation)
    backbone, context = backbone_and_context(config, dataset, native=False)
    tables = dict(zip(("user", "item"), map(jax.device_put, world.factors), strict=True))
    learner = Learner(config, backbone, None, make_layout())
    restored = RestoredRun(learner, dataset, ServingState({}, tables), context)
    return TrainedRun("synthetic", restored), world.users


class Timed:
    """A call that serves `users` users, as a player; compiled when made."""

    def __init__(self, users: int, call: Callable[[], object]) -> None:
        self._users, self._call = users, call
        self.processor: list[float] = []  # seconds of each turn
        call()

    def turn(self) -> turns.Turn:
        """One repeat."""
        begin = time.process_time()
        seconds = turns.timed(self._call)
        self.processor.append(time.process_time() - begin)
        return turns.Turn(self._users, seconds)


def measure_memory(listed: int) -> None:
    """Print the peak of the process before and after a file of lists, and how long it took."""

    def peak() -> int:  # kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    run, users = make_run(MILLION, width=16)
    run.seen.counts.sum()  # the items that are masked are part of what has to be there
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        names = (f"user-{user:07d}\n" for user in users[:listed])
        (folder / "users.txt").write_text("".join(names))
        before, begin = peak(), time.perf_counter()
        request = Request(users=str(folder / "users.txt"))
        written = recommendation_files.recommend(run, request, folder / "out.parquet")
        seconds = time.perf_counter() - begin
    print(
        f"{MILLION.users:,} users x {MILLION.items:,} items, {written.users:,} listed: peak "
        f"{before:,} MiB before, {peak():,} MiB after; {seconds:.0f} s"
    )


def main(_: list[str]) -> None:
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    if FLAGS.memory:
        measure_memory(FLAGS.listed)
        return
    run, users = make_run(ranking_peers.SIZES[FLAGS.size])
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "users.txt").write_text("".join(f"user-{user:07d}\n" for user in users))
        (folder / "deny.txt").write_text(
            "".join(f"item-{item:07d}\n" for item in range(0, run.dataset.n_items, 3))
        )

        def write(ending: str, deny: str = "") -> Callable[[], object]:
            request = Request(users=str(folder / "users.txt"), deny=deny)
            return lambda: recommendation_files.recommend(run, request, folder / f"out{ending}")

        calls = {
            "evaluate": lambda: run.evaluate("test"),
            "recommend .parquet": write(".parquet"),
            "recommend .csv": write(".csv"),
            "recommend .jsonl": write(".jsonl"),
            "recommend .parquet, a third denied": write(".parquet", str(folder / "deny.txt")),
        }
        players = [Timed(users.size, call) for call in calls.values()]
        taken = turns.interleave(players, FLAGS.repeats)

    medians = [float(np.median([turn.rate for turn in of_call])) for of_call in taken]
    processor = [float(np.median(player.processor)) for player in players]
    rows = [
        {
            "what": name,
            "users/s": round(median),
            "min": round(min(turn.rate for turn in of_call)),
            "max": round(max(turn.rate for turn in of_call)),
            "ratio": round(medians[0] / median, 2),
            "processor ms": round(1e3 * cost, 1),
            "processor ratio": round(cost / processor[0], 2),
        }
        for name, median, of_call, cost in zip(calls, medians, taken, processor, strict=True)
    ]
    print(tables.markdown_table(rows))


if __name__ == "__main__":
    app.run(main)
