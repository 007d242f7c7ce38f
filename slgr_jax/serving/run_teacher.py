"""A finished run as a teacher: its lists as a product that costs nothing."""

from __future__ import annotations

import os

from slgr_jax.config import TeachConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import teacher_lists
from slgr_jax.serving.trained_run import TrainedRun, load
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.products import preferences


def from_run(
    dataset: Dataset, common: TeachConfig, workdir: str, length: int
) -> schema.TeacherManifest:
    """The `length` best items of each user by a run of `dataset`, as DATA/teacher/NAME.

    They are those of the moment before validation; training items are left out. A run that learned
    from a teacher has seen what that teacher has seen, and its lists say so.

    Raises:
      ConfigError: not a run of `dataset`, or one that has learned from validation.
      InputError: the product is there, without --overwrite.
    """
    run = load(workdir, data=str(dataset.path)).whole
    if not len(run.dataset.valid) and len(dataset.valid):
        raise ConfigError(
            f"{workdir} learned from validation, too: its lists would show validation to whoever "
            "learns from them; name a run that was trained on training interactions alone"
        )
    guided = f", guided by {run.config.guided_by}" if run.config.guided else ""
    return teacher_lists.write(
        dataset,
        common,
        run.score_users,
        run.restored.scoring("valid"),
        length=length,
        model=f"run {os.path.basename(os.path.abspath(workdir))} ({run.config.model.backbone}"
        f"{guided})",
        built_from=built_from(run),
    )


def built_from(run: TrainedRun) -> str:
    """What the run has seen: training, or what its teacher saw if that is more."""
    if not run.config.guided:
        return "train_only"
    if run.config.aligns:
        return embeddings.read_manifest(run.dataset, run.config.guided_by).built_from
    root = preferences.product_path(run.config.data, run.config.guidance.teacher)
    if not (root / schema.MANIFEST).is_file():
        raise ConfigError(
            f"{run.workdir} learned from the teacher {run.config.guidance.teacher!r}, which "
            f"{run.config.data} no longer has: nobody knows what its lists were built from"
        )
    return schema.read_teacher_manifest(root).built_from
