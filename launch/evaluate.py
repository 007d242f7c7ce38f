"""Rank the whole catalogue for every user of a run: metrics, slices, tables, a picture.

    python launch/evaluate.py --workdir=RUN
    python launch/evaluate.py --workdir=RUN --workdir=RUN2 --metric=recall@20 --out=COMPARISON

Writes metrics.json and per_user.parquet into each run and prints the tables. Training items
are masked; test also masks validation items. With several runs of one data set, each is
tested against the first, user by user.
"""

from __future__ import annotations

import pathlib

from absl import flags as absl_flags

from slgr_jax import flags
from slgr_jax.errors import ConfigError

absl_flags.DEFINE_multi_string("workdir", [], "directory of a run")
absl_flags.DEFINE_string("metric", "", "metric to draw and to test; ndcg@10 unless given")
absl_flags.DEFINE_string("out", "", "directory of metrics.png; the first workdir unless given")
absl_flags.DEFINE_bool("bins", False, "also print the history and popularity bins")
absl_flags.DEFINE_string("checkpoint", "best", "state to evaluate: best or last")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    if given.checkpoint not in ("best", "last"):
        raise ConfigError(f"--checkpoint={given.checkpoint!r} is not one of: best, last")
    from slgr_jax import report, runs

    labels, metric = report.labels(given.workdir), given.metric
    for workdir in given.workdir:
        metric = report.choose_metric(metric, runs.read_config(workdir).evaluation.ks)
    evaluated = [
        runs.evaluate_run(workdir, label, given.checkpoint)
        for workdir, label in zip(given.workdir, labels, strict=True)
    ]
    print(report.render(evaluated, metric, bins=given.bins))
    picture = report.draw(
        evaluated, metric, pathlib.Path(given.out or given.workdir[0], report.PICTURE)
    )
    print(f"wrote {report.METRICS} and {report.PER_USER} in each run, and {picture}")


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        own=("workdir", "metric", "out", "bins", "checkpoint"),
        required=("workdir",),
    )
