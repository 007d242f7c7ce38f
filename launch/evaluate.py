"""Rank the whole catalogue for every user of a run: metrics, slices, tables, a picture.

    python launch/evaluate.py --workdir=RUN
    python launch/evaluate.py --workdir=RUN --workdir=RUN2 --metric=recall@20 --out=COMPARISON
    python launch/evaluate.py --data=DATA --out=COMPARISON --baselines=popular,ease,ials

Writes metrics.json and per_user.parquet into each run and prints the tables. Training items
are masked; test also masks validation items. With several runs of one data set, each is
tested against the first, user by user. Baselines, fitted on the first run's data, stand beside
the runs; their files go to OUT/baselines/NAME.
"""

from __future__ import annotations

import pathlib

from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.config import BaselineConfig, RunConfig
from slgr_jax.errors import ConfigError

absl_flags.DEFINE_multi_string("workdir", [], "directory of a run")
absl_flags.DEFINE_string("data", "", "without a run: dataset directory to fit baselines on")
absl_flags.DEFINE_string("metric", "", "metric to draw and to test; ndcg@10 unless given")
absl_flags.DEFINE_string(
    "out", "", "directory of metrics.png and of baselines; the first workdir unless given"
)
absl_flags.DEFINE_bool("bins", False, "also print the history and popularity bins")
absl_flags.DEFINE_string("checkpoint", "best", "state to evaluate: best or last")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    if given.checkpoint not in ("best", "last"):
        raise ConfigError(f"--checkpoint={given.checkpoint!r} is not one of: best, last")
    if given.workdir and given.data:
        raise ConfigError("--data is for baselines without a run; drop it, or --workdir")
    if not given.workdir and not (given.data and given.out):
        raise ConfigError("missing --workdir, or --data and --out in its place; see --help")
    options = flags.section_from_flags(BaselineConfig)
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.evaluation import baselines
    from slgr_jax.reports import plots, tables
    from slgr_jax.training import build, run_directory

    labels, metric = tables.labels(given.workdir), given.metric
    configs = [run_directory.read_config(workdir) for workdir in given.workdir]
    configs = configs or [RunConfig(given.data, given.out)]
    for config in configs:
        metric = tables.choose_metric(metric, config.evaluation)
    evaluated = [
        build.evaluate_run(workdir, label, given.checkpoint)
        for workdir, label in zip(given.workdir, labels, strict=True)
    ]
    dataset = evaluated[0].dataset if evaluated else dataset_lib.load(given.data)
    out = pathlib.Path(given.out or given.workdir[0])
    evaluated += baselines.evaluate_baselines(options, configs[0], dataset, out, taken=labels)
    if not evaluated:
        raise ConfigError("--baselines=none without --workdir leaves nothing to evaluate")
    print(tables.render(evaluated, metric, bins=given.bins))
    drawn = plots.draw(evaluated, metric, out / tables.PICTURE)
    print(f"wrote {tables.METRICS} and {tables.PER_USER} in each run, and {drawn}")


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=(BaselineConfig,),
        own=("workdir", "data", "metric", "out", "bins", "checkpoint"),
    )
