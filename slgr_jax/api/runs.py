"""What a run gives: `load`, `recommend`, `export`, `inspect`, `evaluate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slgr_jax import cluster, config
from slgr_jax.config.keywords import knob_values, section_of
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.reports.evaluation import Evaluation
    from slgr_jax.reports.inspection import Inspection
    from slgr_jax.serving.export import Exported
    from slgr_jax.serving.recommendation_files import Written
    from slgr_jax.serving.trained_run import TrainedRun

PathLike = str | os.PathLike[str]


def load(workdir: PathLike, checkpoint: str = "best", *, data: PathLike = "") -> TrainedRun:
    """A trained run, ready to score, to recommend and to evaluate.

    Args:
      workdir: directory of a run that `train` has written.
      checkpoint: state to load, best or last.
      data: where its dataset is now, if it was moved.

    Raises:
      UserError: there is no such run, or its data are not what it was trained on.
    """
    from slgr_jax.serving import trained_run

    return trained_run.load(os.fspath(workdir), checkpoint, data=os.fspath(data) or None)


def recommend(
    workdir: PathLike,
    users: PathLike = "",
    out: PathLike = "",
    *,
    histories: PathLike = "",
    k: int = 10,
    mask_seen: bool = True,
    allow: PathLike = "",
    deny: PathLike = "",
    unknown: str = "refuse",
    user_column: str = "",
    item_column: str = "",
    new_items: PathLike = "",
    data: PathLike = "",
    checkpoint: str = "best",
    context: Mapping[str, object] | None = None,
    overwrite: bool = False,
    **job: Any,
) -> Written:
    """The best items of users, as a file; `slgr recommend`. In memory: `load(workdir).recommend`.

    Args:
      workdir: directory of a run that `train` has written.
      users: file of ids (text lines, CSV, Parquet), `all`, or ids separated by commas.
      histories: in place of `users`: file of new users' events, with columns user, item and
        perhaps a time, who are folded in (`TrainedRun.fold_in`).
      out: file to write; its ending, .parquet, .csv or .jsonl, says the format.
      k: items a user.
      mask_seen: leave out what a user has in training and validation.
      allow, deny: files of the only items to list, and of items not to; or of (user, item).
      unknown: ids that the run does not know: refuse, or skip (and count).
      user_column, item_column: names of columns in CSV and Parquet files; user and item if empty.
      new_items: file of vectors of items that the run has never seen, which may be listed too
        (`TrainedRun.with_items`).
      data, checkpoint: as of `load`.
      context: features of interactions to ask in, by name (`TrainedRun.in_context`).
      overwrite: replace `out` where it is there.
      **job: of `slgr_jax.config.ClusterConfig`: several processes recommend together, as they
        evaluate; the first of them writes.

    Returns:
      How many users and rows.

    Raises:
      UserError: a file or an id that cannot be used, or an argument that does nothing.
    """
    _join(knob_values((config.ClusterConfig,), job))
    from slgr_jax.serving import recommendation_files
    from slgr_jax.training import agreement

    request = recommendation_files.Request(
        users=os.fspath(users) or "all",
        k=k,
        mask_seen=mask_seen,
        allow=os.fspath(allow),
        deny=os.fspath(deny),
        unknown=unknown,
        user_column=user_column,
        item_column=item_column,
    )
    alone = _by_whole_tables(new_items)
    if histories:
        alone[f"--histories={os.fspath(histories)}"] = "folds users in, by whole tables"
    with cluster.session():
        if bool(users) == bool(histories):
            raise ConfigError(
                "give either --users (a file, all, or ids) or --histories=FILE (what new users "
                "have done)"
            )
        agreement.refuse_in_a_job("recommend", alone)
        _by_first(lambda: recommendation_files.check_out(out, overwrite=overwrite))
        asked = {name: str(value) for name, value in (context or {}).items()}
        agreement.refuse_unequal(
            {"--workdir": os.fspath(workdir), "--checkpoint": checkpoint, "--context": asked}
        )
        run = _load_with_items(workdir, checkpoint, data, new_items).in_context(context or {})
        if not histories:
            return recommendation_files.recommend(run, request, out)
        from slgr_jax.serving import read_histories

        named = {"user_column": user_column or "user", "item_column": item_column or "item"}
        folded = run.fold_in(read_histories(histories, **named), unknown=unknown)
        if not (allow or deny):  # then no other file has columns
            request = dataclasses.replace(request, user_column="", item_column="")
        written = recommendation_files.recommend(folded.run, request, out)
        return dataclasses.replace(written, skipped={**folded.skipped, **written.skipped})


def export(
    workdir: PathLike,
    out: PathLike,
    *,
    format: str = "parquet",
    index: str = "none",
    scorer: bool = False,
    k: int | None = None,
    new_items: PathLike = "",
    data: PathLike = "",
    checkpoint: str = "best",
    overwrite: bool = False,
    **job: Any,
) -> Exported:
    """Vectors, an index of them, and the scorer, as files; `slgr export`.

    Args:
      workdir: directory of a run that `train` has written.
      out: directory to write.
      format: of the vectors: parquet, npy, safetensors; none for no vectors.
      index: of the item vectors: none, or usearch.
      scorer: write the scorer as StableHLO, with its weights.
      k: length of the scorer's lists and of those that judge the index; None: 10.
      new_items: as of `recommend`.
      data, checkpoint: as of `load`.
      overwrite: replace `out` where it is an export.
      **job: of `slgr_jax.config.ClusterConfig`: several processes make vectors together, as they
        evaluate; the first of them writes.

    Raises:
      UserError: what cannot be exported, or an argument that does nothing.
    """
    _join(knob_values((config.ClusterConfig,), job))
    from slgr_jax.data import shards
    from slgr_jax.serving import export as export_lib
    from slgr_jax.training import agreement

    request = export_lib.ExportRequest(format, index, scorer, k)
    with cluster.session():
        request.check()
        agreement.refuse_in_a_job("export", request.of_one_process() | _by_whole_tables(new_items))
        agreement.refuse_unequal(
            {"--workdir": os.fspath(workdir), "--checkpoint": checkpoint, "--format": format}
        )
        _by_first(lambda: shards.check_target(out, overwrite=overwrite))
        run = _load_with_items(workdir, checkpoint, data, new_items)
        return export_lib.export(run, request, out, overwrite=overwrite)


def _join(values: Mapping[str, Any]) -> None:
    """Take part in the job that knobs of `ClusterConfig` name, if there is one."""
    job = section_of(config.ClusterConfig, values)
    place = cluster.place(job.coordinator, job.processes, job.process_id, job.cluster)
    cluster.start(place, heartbeat_s=job.heartbeat_s, timeout_s=job.start_timeout_s)


def _by_first(check: Callable[[], object]) -> None:
    """A check that only the process can make which writes; all hear of what it refuses."""
    cluster.together(lambda: check() if cluster.is_first() else None)


def _by_whole_tables(new_items: PathLike) -> dict[str, str]:
    """Why a job of several processes has no new items, where they are asked for."""
    flag = f"--new_items={os.fspath(new_items)}"
    return {flag: "puts items behind whole tables"} if new_items else {}


def _load_with_items(
    workdir: PathLike, checkpoint: str, data: PathLike, items: PathLike
) -> TrainedRun:
    """A run, by all processes of a job, and the items of a file of vectors behind its own."""
    from slgr_jax.serving import job

    run = job.load(os.fspath(workdir), checkpoint, data=os.fspath(data) or None)
    if not items:
        return run
    from slgr_jax.serving import new_items

    return run.with_items(*new_items.read_items(items))


def inspect(*, workdir: PathLike = "", data: PathLike = "") -> Inspection:
    """What a run or a dataset directory is, every byte of it checked; `slgr inspect`.

    Args:
      workdir: directory of a run; or
      data: dataset directory.

    Returns:
      `facts`, and `faults`: what is damaged or missing, empty where nothing is.

    Raises:
      UserError: there is no such run or dataset, or its first file is damaged.
    """
    from slgr_jax.reports import inspection

    if bool(os.fspath(workdir)) == bool(os.fspath(data)):
        raise ConfigError("give one of workdir=RUN and data=DATA")
    if workdir:
        return inspection.inspect_run(os.fspath(workdir))
    return inspection.inspect_data(os.fspath(data))


def evaluate(
    workdirs: PathLike | Sequence[PathLike] = (),
    *,
    data: PathLike = "",
    out: PathLike = "",
    metric: str = "",
    checkpoint: str = "best",
    blend: str = "",
    **knobs: Any,
) -> Evaluation:
    """Rank the whole catalogue for every user, in validation and test; `slgr evaluate`.

    Writes metrics.json and per_user.parquet into each run, and those of baselines into
    OUT/baselines/NAME. Training items are masked; test also masks validation items.

    Args:
      workdirs: a run, or several: each is tested against the first, user by user.
      data: with a run: where its dataset is now, if it was moved (checked by its hashes); without
        one: dataset directory to fit baselines on.
      out: directory of the picture and of baselines; the first run's unless given.
      metric: metric to test and to draw; ndcg@10 unless given.
      checkpoint: state to evaluate, best or last.
      blend: name of a teacher; each run and baseline is also shown with w / rank in the teacher's
        list added to its scores, w by validation: nothing is trained.
      **knobs: of `slgr_jax.config.BaselineConfig`: baselines, ease_lambdas, ...; and of
        `slgr_jax.config.ClusterConfig`: several processes evaluate together where each calls this
        with the same arguments and its own `process_id`, before it uses JAX. The first of them
        writes, and no baselines stand beside the runs.

    Raises:
      UserError: there is no such run, metric or baseline.
    """
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    places = [os.fspath(workdir) for workdir in workdirs]
    data, out = os.fspath(data), os.fspath(out)
    values = knob_values((config.BaselineConfig, config.ClusterConfig), knobs)
    options = section_of(config.BaselineConfig, values)
    _join(values)

    from slgr_jax.reports import evaluation

    return evaluation.evaluate(places, data, out, metric, checkpoint, options, blend)
