"""Train a recommender, guided by a teacher where its gate believes the teacher.

    slgr train --data=DATA --workdir=RUN --backbone=mf --guidance=none
    slgr train --data=DATA --workdir=RUN2 --backbone=mf \\
        --guidance=pairwise --teacher=NAME --gate=rule --lambda=0.1
    slgr train --data=DATA --workdir=RUN3 --guidance=auto --teacher=NAME
    slgr train --refit=RUN3 --workdir=SERVED

--guidance=auto trains several runs in RUN3/candidates: none; pairwise with everything believed,
through the calibrated gate and through the paper's; against hard negatives where unlisted items
rank below the teacher's lists; each at a few lambdas, or at --lambda. It leaves in RUN3 the run
without guidance, unless a guided one is better on validation by more than noise (a paired test over
users, corrected for all that were tried, and once more with the next seed). RUN3/auto.json has the
numbers; the last line is the command that trains the kept run directly.

--refit=RUN trains a finished run once more for serving, with its settings, on training and
validation, for as many epochs as its best validation came after; its gate is RUN's and learns no
more. Nothing is validated, and slgr evaluate ranks the test part alone.

--plan trains nothing: it prints what the run would take of memory on one device and on several that
need not be there, with tables on every device and split over all (or as --table_shards says).

Calling it again with the same flags resumes the run. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2
save and exit, in the middle of a validation too, which is done again. Exit status: 0 finished, 2 an
error to mend, 75 interrupted: the same command goes on, so that a scheduler may requeue it.
--verbosity=-1 leaves out the lines of epochs. Compiled programs are kept in ~/.cache/slgr_jax
(JAX_COMPILATION_CACHE_DIR moves them): the next run starts sooner.

Several processes train one run when each is started with the same flags and
--coordinator=HOST:PORT --processes=N --process_id=0..N-1, or by srun or on the hosts of a TPU
slice, where these are found. --data and --workdir must be on a file system that all share. A signal
to any of them stops all; one that is lost ends the others with status 75 (docs/cluster.md).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from slgr_jax import api, cluster, config
from slgr_jax.cli import console, flags, job
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.training.loop import Outcome
    from slgr_jax.training.training_log import TrainingProgress

USAGE = __doc__ or ""
MOST_PLANNED = 1024  # devices; XLA takes a stack for each
SECTIONS = (*config.sections().values(), config.ClusterConfig)


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
    absl_flags.DEFINE_bool(
        "plan", False, "print what the run would take of memory, by part, and stop; no --workdir"
    )
    absl_flags.DEFINE_list(
        "plan_devices", ["1", "2", "4", "8"], "--plan: numbers of devices, which need not be there"
    )


def main(_: list[str]) -> None:
    """Train, with a progress bar on a terminal, and say how it ended."""
    job.guarded(_train, "interrupted before anything was saved")


def _train() -> None:
    given = flags.FLAGS
    knobs = flags.given_knobs(*SECTIONS)
    if given.plan:
        _plan(knobs)
        return
    if knobs.get("guidance") == config.AUTO:
        _train_auto(knobs)
        return
    with console.progress_bar() as show:

        def progress(event: TrainingProgress) -> None:
            if cluster.is_first():
                show(event)

        outcome = api.train(
            given.data, given.workdir, progress=progress, workers=given.workers, **knobs
        )

    if cluster.is_first():
        _say(outcome, knobs)
    if outcome.status == "interrupted":
        raise SystemExit(flags.EXIT_INTERRUPTED)


def _say(outcome: Outcome, knobs: Mapping[str, Any]) -> None:
    """One line of how a run ended."""
    given = flags.FLAGS
    if knobs.get("refit"):
        best = f"as {knobs['refit']} on training and validation"
    else:
        of_job = {field.name for field in dataclasses.fields(config.ClusterConfig)}
        run_knobs = {name: value for name, value in knobs.items() if name not in of_job}
        metric = config.make_run(given.data, given.workdir, **run_knobs).train.early_stop_metric
        best = f"best {metric} at epoch {outcome.best_epoch}"
        best += "" if outcome.best_metric is None else f" ({outcome.best_metric:.4f})"
    print(
        f"{outcome.status} after epoch {outcome.epoch}, step {outcome.step}, in "
        f"{outcome.seconds:.1f} s; {best}; run: {given.workdir}"
    )


def _plan(knobs: Mapping[str, Any]) -> None:
    """What the run takes of memory, on devices that need not be there."""
    given = flags.FLAGS
    if knobs.get("refit") or knobs.get("guidance") == config.AUTO:
        raise ConfigError(
            "--plan is of one run: name a --guidance, and of a refit plan the run that it refits"
        )
    counts = [int(text) if text.isdecimal() else 0 for text in given.plan_devices]
    if not all(counts) or not counts or max(counts) > MOST_PLANNED:
        raise ConfigError(
            f"--plan_devices={','.join(given.plan_devices)}: expected numbers from 1 to "
            f"{MOST_PLANNED}, e.g. 1,8,64"
        )
    of_job = {field.name for field in dataclasses.fields(config.ClusterConfig)}
    of_run = {name: value for name, value in knobs.items() if name not in of_job}
    run = config.make_run(given.data, given.workdir or "", **of_run)
    config.check_used(run, of_run.keys())
    shards = run.train.table_shards
    meshes = [
        (count, split)
        for count in counts
        for split in dict.fromkeys([shards] if shards > 1 else [1, count])
    ]
    # Before JAX is imported: so many devices, each a part of the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(max(counts))
    from slgr_jax.reports import tables
    from slgr_jax.training import memory_plan, restore

    plans = memory_plan.make_plans(run, restore.load_data(run), meshes)
    print("MB; of a device unless it says host or checkpoint\n")
    print(tables.text_table(memory_plan.as_rows(plans)))


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
        stand_ins={"data": ("refit",), "workdir": ("plan",)},
    )
