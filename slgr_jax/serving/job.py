"""A run that the processes of a job read together: to evaluate, to recommend, to export."""

from __future__ import annotations

from slgr_jax import cluster
from slgr_jax.serving import trained_run
from slgr_jax.serving.trained_run import TrainedRun
from slgr_jax.training import agreement, checkpoint_manifest


def load(workdir: str, which: str = "best", *, data: str | None = None) -> TrainedRun:
    """`trained_run.load` by every process, each with its own devices' part of what is split.

    Raises:
      ConfigError: they see other checkpoints.
      UserError: it failed on one of them, whose line this is on all.
    """
    if cluster.processes() > 1:
        progress = cluster.together(lambda: checkpoint_manifest.progress_of(workdir))
        agreement.refuse_other_progress(workdir, progress)
    return cluster.together(lambda: trained_run.load(workdir, which, data=data))
