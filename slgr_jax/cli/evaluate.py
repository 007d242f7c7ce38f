"""Rank the whole catalogue for every user of a run: metrics, slices, tables, picture.

    slgr evaluate --workdir=RUN
    slgr evaluate --workdir=RUN --workdir=RUN2 --metric=recall@20 --out=COMPARISON
    slgr evaluate --data=DATA --out=COMPARISON --baselines=popular,ease,ials
    slgr evaluate --workdir=RUN --blend=TEACHER

Writes metrics.json and per_user.parquet into each run, prints the tables and ends with the one to
read first, which OUT/summary.md, .csv and .tex hold too, and what was found, in words. Training
items are masked; test also masks validation items. With several runs of one data set, each is
tested against the first, user by user. Baselines, fitted on the first run's data, stand beside
the runs; their files go to OUT/baselines/NAME. With --blend each is also shown with w / rank in
TEACHER's list added to its scores (OUT/blends): the cheapest use of a list, which guidance must
beat.

Several processes evaluate together as they train (docs/cluster.md), each the users of its devices
where these are split by --user_shards: --coordinator=HOST:PORT --processes=N --process_id=0..N-1,
or srun. The first of them writes and prints; baselines, --blend and the gate's report are left to
one process.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api, cluster
from slgr_jax.cli import flags, job
from slgr_jax.config import BaselineConfig, ClusterConfig

USAGE = __doc__ or ""
SECTIONS = (BaselineConfig, ClusterConfig)


def define() -> None:
    """Define the flags that are no knobs of baselines."""
    absl_flags.DEFINE_multi_string("workdir", [], "directory of a run")
    absl_flags.DEFINE_string(
        "data",
        "",
        "where the dataset of the runs is now, if it was moved; without a run: dataset directory "
        "to fit baselines on",
    )
    absl_flags.DEFINE_string("metric", "", "metric to draw and to test; ndcg@10 unless given")
    absl_flags.DEFINE_string(
        "out", "", "directory of metrics.png and of baselines; the first workdir unless given"
    )
    absl_flags.DEFINE_bool("bins", False, "also print the history and popularity bins")
    absl_flags.DEFINE_bool("definitions", False, "also print how each metric is defined")
    absl_flags.DEFINE_string(
        "blend",
        "",
        "teacher under DATA/teacher whose lists are added when scoring: score + w / rank, w by "
        "validation ndcg@10",
    )
    absl_flags.DEFINE_string("checkpoint", "best", "state to evaluate: best or last")


def main(_: list[str]) -> None:
    """Evaluate, draw the picture, print the tables; what was found comes last."""
    job.guarded(_evaluate, "interrupted; what was written before is whole")


def _evaluate() -> None:
    given = flags.FLAGS
    evaluation = api.evaluate(
        given.workdir,
        data=given.data,
        out=given.out,
        metric=given.metric,
        checkpoint=given.checkpoint,
        blend=given.blend,
        **flags.given_knobs(*SECTIONS),
    )
    if not cluster.is_first():
        return
    from slgr_jax.evaluation import results

    picture, summary = evaluation.draw(), evaluation.write_summary()
    print(
        f"wrote {results.METRICS} and {results.PER_USER} in each run, {picture} and "
        f"{summary[0]} (.csv, .tex)\n"
    )
    print(evaluation.table(bins=given.bins, definitions=given.definitions), end="")


def run() -> None:
    """`slgr evaluate`."""
    flags.run(main, usage=USAGE, name="slgr evaluate", sections=SECTIONS, define=define)
