"""Train a recommender, guided by a teacher where its gate believes the teacher.

    slgr train --data=DATA --workdir=RUN --backbone=mf --guidance=none
    slgr train --data=DATA --workdir=RUN2 --backbone=mf \\
        --guidance=pairwise --teacher=NAME --gate=rule --lambda=0.1
    slgr train --data=DATA --workdir=RUN3 --guidance=auto --teacher=NAME

--guidance=auto trains several runs in RUN3/candidates: none; pairwise with everything believed,
through the calibrated gate and through the paper's; against hard negatives where unlisted items
rank below the teacher's lists; each at a few lambdas, or at --lambda. It leaves in RUN3 the run
without guidance, unless a guided one is better on validation by more than noise (a paired test over
users, corrected for all that were tried, and once more with the next seed). RUN3/auto.json has the
numbers; the last line is the command that trains the kept run directly.

Calling it again with the same flags resumes the run. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2
save and exit. Exit status: 0 finished, 2 an error to mend, 75 interrupted: the same command
goes on, so that a scheduler may requeue it. --verbosity=-1 leaves out the lines of epochs. Compiled
programs are kept in ~/.cache/slgr_jax (JAX_COMPILATION_CACHE_DIR moves them): the next run starts
sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from slgr_jax import api, config
from slgr_jax.cli import console, flags

USAGE = __doc__ or ""
SECTIONS = tuple(config.sections().values())


def define() -> None:
    """Define the flags that are no knobs of a run."""
    absl_flags.DEFINE_string("data", None, "dataset directory that slgr prepare wrote")
    absl_flags.DEFINE_string("workdir", None, "directory of this run: config, log, checkpoints")
    absl_flags.DEFINE_integer(
        "workers",
        None,
        "guidance=auto: processes on a CPU; 0 = one per core; accelerators take one",
        lower_bound=0,
    )


def main(_: list[str]) -> None:
    """Train, with a progress bar on a terminal, and say how it ended."""
    given = flags.FLAGS
    knobs = flags.given_knobs(*SECTIONS)
    if knobs.get("guidance") == config.AUTO:
        _train_auto(knobs)
        return
    with console.progress_bar() as progress:
        outcome = api.train(
            given.data, given.workdir, progress=progress, workers=given.workers, **knobs
        )

    metric = config.make_run(given.data, given.workdir, **knobs).train.early_stop_metric
    best = "" if outcome.best_metric is None else f" ({outcome.best_metric:.4f})"
    print(
        f"{outcome.status} after epoch {outcome.epoch}, step {outcome.step}, in "
        f"{outcome.seconds:.1f} s; best {metric} at epoch {outcome.best_epoch}{best}; "
        f"run: {given.workdir}"
    )
    if outcome.status == "interrupted":
        raise SystemExit(flags.EXIT_INTERRUPTED)


def _train_auto(knobs: Mapping[str, Any]) -> None:
    """Choose a guidance, and say which and why."""
    given = flags.FLAGS
    outcome = api.train(given.data, given.workdir, workers=given.workers, **knobs)
    if outcome.status == "interrupted":
        print("interrupted; the same command goes on")
        raise SystemExit(flags.EXIT_INTERRUPTED)
    from slgr_jax.experiments import auto

    print(auto.read(given.workdir))


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
