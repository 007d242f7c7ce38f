"""Train a recommender, guided by a teacher where its gate believes the teacher.

    python launch/train.py --data=DATA --workdir=RUN --backbone=mf --guidance=none
    python launch/train.py --data=DATA --workdir=RUN2 --backbone=mf \\
        --guidance=selective --teacher=NAME --gate=rule --lambda=0.1

Calling it again with the same flags resumes the run; SIGTERM saves and exits. Compiled programs
are kept in ~/.cache/slgr_jax (JAX_COMPILATION_CACHE_DIR moves them): the next run starts sooner.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags

absl_flags.DEFINE_string("data", None, "dataset directory (launch/prepare.py)")
absl_flags.DEFINE_string("workdir", None, "directory of this run: config, log, checkpoints")


def main(_: list[str]) -> None:
    run = flags.run_config_from_flags(flags.FLAGS.data, flags.FLAGS.workdir)
    if run.train.kernels != "xla":
        from slgr_jax.kernels import build

        # Before JAX is imported: a machine's first run waits for what is left to compile.
        build.begin(*build.units_of(run))
    from slgr_jax.training import loop

    outcome = loop.train(run)
    best = "" if outcome.best_metric is None else f" ({outcome.best_metric:.4f})"
    print(
        f"{outcome.status} after epoch {outcome.epoch}, step {outcome.step}, in "
        f"{outcome.seconds:.1f} s; best {run.train.early_stop_metric} at epoch "
        f"{outcome.best_epoch}{best}; run: {run.workdir}"
    )


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(config.sections().values()),
        own=("data", "workdir"),
        required=("data", "workdir"),
    )
