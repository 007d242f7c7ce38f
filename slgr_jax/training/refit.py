"""A tuned run trained once more, on training and validation: `slgr train --refit=RUN`.

    settings   RUN's
    epochs     as many as RUN's best validation came after; nothing is validated
    data       `Dataset.with_validation`: what is counted stays that of training alone
    gate       RUN's best, which learns no more: of the validation interactions that taught it none
               is held back from the recommender now. Training items that RUN kept for its gate
               (--labelled_preferences=hidden) are trained on
    references the runs of RUN's --reference_runs, as they were: they know training alone
    teacher    RUN's; or, by --teacher, the same made anew of training and validation (slgr teach
               nearest --with_validation): lists of what is beside a user's items know the newest
               ones, too, as they will where they are served

It is what one serves, and what an arm is worth with all the data that RUN was given: labelled
preferences come from validation, so that a guided run has seen more than one without guidance.
RUN is read once, when the refit begins; a refit that is resumed, evaluated or served needs it no
more.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slgr_jax import config
from slgr_jax.config.knobs import flag_name
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, listing
from slgr_jax.guidance import make_guidance
from slgr_jax.teacher.products import preferences
from slgr_jax.training import checkpoint, checkpoint_manifest, epochs, run_directory
from slgr_jax.training.state import Learner, TrainState, abstract_serving

# Knobs in which a refit may differ from its run.
OWN = frozenset({*run_directory.RESUMABLE, "seed", "refit", "teacher"}) - {"patience"}


def config_of(
    source: str, workdir: str, knobs: Mapping[str, Any] | None = None, *, data: str = ""
) -> config.RunConfig:
    """The refit of the run in `source`.

    Args:
      knobs: by command-line name, of `OWN` but epochs, or as in the run.
      data: where its dataset is now; empty: where it was trained.

    Raises:
      ConfigError: `source` is no finished run with a validation, or a knob differs from it.
    """
    tuned = run_directory.read_config(source)
    best = _best_epoch(source, tuned)
    given = {"refit": source, "epochs": best, **(knobs or {})}
    if given["epochs"] != best:
        raise ConfigError(
            f"--epochs={given['epochs']}: a refit has as many epochs as its run took to its best "
            f"validation, {best} for {source}; drop it"
        )
    sections = {}
    for name, section in config.sections().items():
        names = {flag_name(field): field.name for field in dataclasses.fields(section)}
        changes = {names[flag]: value for flag, value in given.items() if flag in names}
        sections[name] = dataclasses.replace(getattr(tuned, name), **changes)
    run = dataclasses.replace(tuned, data=data or tuned.data, workdir=workdir, **sections)
    _refuse_changes(tuned, run)
    return run


def check(run: config.RunConfig) -> None:
    """Refuse a run that is not the refit it says it is.

    Raises:
      ConfigError: as of `config_of`; or it has another number of epochs.
    """
    source = run.train.refit
    tuned = run_directory.read_config(source)
    _refuse_changes(tuned, run)
    if run.train.epochs != (best := _best_epoch(source, tuned)):
        raise ConfigError(
            f"--epochs={run.train.epochs}: a refit has as many epochs as its run took to its best "
            f"validation, {best} for {source}"
        )
    if other := run_directory.other_reference_runs(source, run):
        raise ConfigError(f"--reference_runs: those of {source} are others now ({other})")


def beginning(
    learner: Learner, fresh: Callable[[np.int32], TrainState]
) -> Callable[[np.int32], TrainState]:
    """Seed -> the state that a refit begins with: a fresh one with its run's gate."""
    if learner.guidance is None:
        return fresh

    @functools.cache
    def gate() -> dict[str, Any]:
        tuned = run_directory.read_config(learner.config.train.refit)
        of_run = Learner(tuned, learner.backbone, make_guidance(tuned), learner.layout)
        saved = checkpoint.Checkpoints(learner.config.train.refit, writable=False)
        try:
            return saved.restore_best(abstract_serving(of_run)).guidance
        finally:
            saved.close()

    def begin(seed: np.int32) -> TrainState:
        state = fresh(seed)
        begun: TrainState = state.replace(  # type: ignore[attr-defined]
            params={**state.params, "guidance": gate()}
        )
        return begun

    return begin


def _refuse_changes(tuned: config.RunConfig, run: config.RunConfig) -> None:
    changes = [
        text
        for text in config.differences(tuned, run)
        if text.removeprefix("--").partition(":")[0] not in OWN
    ]
    if changes:
        raise ConfigError(
            f"--refit={run.train.refit} keeps the settings of that run ({listing(changes)}); drop "
            "them, or train and validate a run with them first"
        )
    if run.guidance.teacher != tuned.guidance.teacher:
        _refuse_teacher(tuned, run)


def _refuse_teacher(tuned: config.RunConfig, run: config.RunConfig) -> None:
    """Refuse another teacher than the tuned run's, but for one that has seen validation.

    Raises:
      ConfigError: it is not one, or its answers are of another form.
      ManifestError: there is no such product, or a damaged one.
    """
    given = f"--refit={run.train.refit} --teacher={run.guidance.teacher}"
    now, was = (
        schema.read_teacher_manifest(preferences.product_path(run.data, name))
        for name in (run.guidance.teacher, tuned.guidance.teacher)
    )
    if now.built_from != "includes_valid":
        raise ConfigError(
            f"{given}: built_from={now.built_from}; a refit has the teacher of its run, "
            f"{tuned.guidance.teacher}, or the same made anew with validation "
            "(built_from=includes_valid; slgr teach nearest --with_validation, from_baseline, "
            "similar, combine, or slgr teach import --built_from=includes_valid)"
        )
    for name in ("kind", "unlisted", "score_kind"):
        if (new := getattr(now, name)) != (old := getattr(was, name)):
            raise ConfigError(
                f"{given}: its {name} is {new}, that of {tuned.guidance.teacher} {old}: it is not "
                "the same teacher made anew; make it with the same settings"
            )


def _best_epoch(source: str, tuned: config.RunConfig) -> int:
    """The epoch of a finished run's best validation.

    Raises:
      ConfigError: it is a refit, has not ended, validated nothing, or never got better.
    """
    if tuned.train.refit:
        raise ConfigError(
            f"--refit={source} is a refit itself, of {tuned.train.refit}; name that one"
        )
    root = pathlib.Path(source) / checkpoint_manifest.DIRECTORY
    manifest = checkpoint_manifest.newest(root, checkpoint_manifest.read)
    if manifest is None:
        raise ConfigError(f"--refit={source} holds no finished checkpoint; train it first")
    progress = manifest.progress
    if not epochs.over(tuned.train, progress):
        raise ConfigError(
            f"--refit={source} is not finished: epoch {progress.epoch} of at most "
            f"{tuned.train.epochs}; let the same slgr train go on first"
        )
    if progress.best_metric is None:
        raise ConfigError(
            f"--refit={source} had nothing to validate on: it was trained on all there is; serve "
            "it as it is"
        )
    if not progress.best_epoch:
        raise ConfigError(
            f"--refit={source} was best before its first epoch, as --init_from="
            f"{os.path.basename(tuned.train.init_from)} left it: there is nothing to repeat"
        )
    return progress.best_epoch
