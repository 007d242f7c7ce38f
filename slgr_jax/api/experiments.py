"""Many runs: `compare` guidances, `tune` knobs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slgr_jax import config
from slgr_jax.config.keywords import knob_values, section_of
from slgr_jax.config.knobs import Section, flag_name

if TYPE_CHECKING:
    from slgr_jax.experiments.comparison import Comparison
    from slgr_jax.experiments.study_results import TuneResult

PathLike = str | os.PathLike[str]


def compare(
    data: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    teacher: str = "",
    vectors: str = "",
    edits: str = "",
    insert: str = "",
    keep_hard: str = "",
    preset: str = "",
    backbones: Sequence[str] | None = None,
    guidance: Sequence[str] | None = None,
    arm: Sequence[str] = (),
    controls: Sequence[str] | None = None,
    matched_to: str = "",
    focus: str = "",
    seeds: int = 5,
    search: str | Mapping[str, Any] = "",
    refit: bool | None = None,
    refit_teacher: str = "",
    workers: int = 0,
    **knobs: Any,
) -> Comparison:
    """Compare guidance arms and controls, tuned alike, over many seeds; `slgr compare`.

    Called again it goes on where it was. With more than one worker the runs are trained by
    processes that import the calling script: guard it with `if __name__ == "__main__":`.

    Args:
      data: dataset directory, or several.
      out: directory of the runs, report.md, report.json and pictures.
      teacher: product under DATA/teacher; without one only the arm none can be measured.
      vectors, edits, insert, keep_hard: products that arms without a teacher read, by the flags of
        `slgr compare`.
      preset: shape of a published table, table2 or table3.
      backbones: recommenders; mf by default.
      guidance: arms; none, global, pointwise, rule, paper, calibrated and auto by default.
      arm: more arms, each `NAME:knob=value,knob=value`.
      controls: controls besides: constant, shuffled, consensus, popularity, item_item, ease,
        ials; all but ials by default.
      matched_to: arm that controls copy; empty: auto, or without it the first that has a gate.
      focus: arm that the verdict is about; empty: `matched_to`.
      seeds: runs of an arm, at least 2.
      search: ranges in place of the usual ones, or of more knobs, written as for `tune`.
      refit: also train every run once more, on training and validation; the verdict is theirs.
        By default it is so, but not with a preset.
      refit_teacher: the same teacher, made anew of training and validation, for these.
      workers: processes on a CPU; 0: one per core.
      **knobs: of `slgr_jax.config.CompareConfig` (trials, widen, ease_start, sampler,
        sampler_seed), and of every run; what is given is not searched.

    Raises:
      UserError: what is asked for cannot be compared; said before the first run.
    """
    from slgr_jax.experiments import comparison, planning, search_space

    sections: tuple[type[Section], ...] = (config.CompareConfig, *config.sections().values())
    values = knob_values(sections, knobs)
    names = {flag_name(field) for field in dataclasses.fields(config.CompareConfig)}
    request = planning.Request(
        teacher=teacher,
        vectors=vectors,
        edits=edits,
        insert=insert,
        keep_hard=keep_hard,
        preset=preset,
        backbones=backbones,
        guidance=guidance,
        arm=arm,
        controls=controls,
        matched_to=matched_to,
        focus=focus,
        seeds=seeds,
        search=search_space.as_mapping(search),
        options=section_of(config.CompareConfig, values),
        refit=refit,
        refit_teacher=refit_teacher,
        knobs={name: value for name, value in values.items() if name not in names},
    )
    paths = [data] if isinstance(data, str | os.PathLike) else data
    places = [os.fspath(path) for path in paths]
    where = pathlib.Path(out)
    command = f"slgr_jax.compare({places}, {os.fspath(out)!r}, ...)"
    return comparison.compare_all(places, where, request, workers=workers, command=command)


def tune(
    data: PathLike, out: PathLike, search: str | Mapping[str, Any], **knobs: Any
) -> TuneResult:
    """Search hyperparameters by validation, with Optuna (the extra tune); `slgr tune`.

    Called again it goes on where it was. With more than one job the runs are trained by processes
    that import the calling script: guard it with `if __name__ == "__main__":`.

    Args:
      data: dataset directory.
      out: directory of the study: study.journal, the trials' runs, best.toml.
      search: knob -> what it may be: `"1e-3..1e-1:log"`, `[32, 64]`, `{"low": 1, "high": 4}`; or
        all of it as text, `"lr=1e-3..1e-1:log,dim=32|64"`.
      **knobs: of `slgr_jax.config.TuneConfig` (trials, timeout, jobs, seeds, pruner, ...), and of
        every run; none that is searched.

    Returns:
      All trials, best first, and where the best one's settings are; `print` shows them.

    Raises:
      UserError: the space or a knob cannot be used; said before the first trial. Also what ends a
        run for another reason than that it diverged.
    """
    from slgr_jax.experiments import search_space, study

    sections: tuple[type[Section], ...] = (config.TuneConfig, *config.sections().values())
    values = knob_values(sections, knobs)
    names = {flag_name(field) for field in dataclasses.fields(config.TuneConfig)}
    plan = study.make_plan(
        os.path.abspath(data),
        pathlib.Path(out),
        search_space.as_mapping(search),
        {name: value for name, value in values.items() if name not in names},
        section_of(config.TuneConfig, values),
    )
    return study.tune(plan)
