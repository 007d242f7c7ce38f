"""Train a recommender, guided by a teacher where its gate believes the teacher.

    slgr train --data=DATA --workdir=RUN --backbone=mf --guidance=none
    slgr train --data=DATA --workdir=RUN2 --backbone=mf \\
        --guidance=pairwise --teacher=NAME --gate=rule --lambda=0.1

Calling it again with the same flags resumes the run. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2
save and exit. Exit status: 0 finished, 2 an error to mend, 75 interrupted: the same command
goes on, so that a scheduler may requeue it. --verbosity=-1 leaves out the lines of epochs. Compiled
programs are kept in ~/.cache/slgr_jax (JAX_COMPILATION_CACHE_DIR moves them): the next run starts
sooner.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api, config
from slgr_jax.cli import console, flags

USAGE = __doc__ or ""
SECTIONS = tuple(config.sections().values())


def define() -> None:
    """Define the flags that are no knobs of a run."""
    absl_flags.DEFINE_string("data", None, "dataset directory that slgr prepare wrote")
    absl_flags.DEFINE_string("workdir", None, "directory of this run: config, log, checkpoints")


def main(_: list[str]) -> None:
    """Train, with a progress bar on a terminal, and say how it ended."""
    given = flags.FLAGS
    knobs = flags.given_knobs(*SECTIONS)
    with console.progress_bar() as progress:
        outcome = api.train(given.data, given.workdir, progress=progress, **knobs)

    metric = config.make_run(given.data, given.workdir, **knobs).train.early_stop_metric
    best = "" if outcome.best_metric is None else f" ({outcome.best_metric:.4f})"
    print(
        f"{outcome.status} after epoch {outcome.epoch}, step {outcome.step}, in "
        f"{outcome.seconds:.1f} s; best {metric} at epoch {outcome.best_epoch}{best}; "
        f"run: {given.workdir}"
    )
    if outcome.status == "interrupted":
        raise SystemExit(flags.EXIT_INTERRUPTED)


def run() -> None:
    """`slgr train`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr train",
        sections=SECTIONS,
        define=define,
        required=("data", "workdir"),
    )
