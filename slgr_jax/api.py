"""The Python API: what the commands do, as functions; `import slgr_jax as sl` has them all.

    import slgr_jax as sl

    sl.prepare(source="csv", input="ratings.csv", out="DATA")
    sl.import_teacher("DATA", "answers.csv", "my_llm", model="some-llm")
    sl.train("DATA", "PLAIN")
    sl.train("DATA", "GUIDED", guidance="pairwise", teacher="my_llm", lambda_=0.3)
    print(sl.evaluate(["PLAIN", "GUIDED"]))

Keyword arguments are the knobs of `slgr ... --help` by their names there, with the same defaults
(`lambda`, a word of Python, is also `lambda_`); lists stand for values with commas. Errors are
`slgr_jax.errors.UserError`s that name a knob as `--knob`.

No flags are parsed and nothing is printed: lines for people go to `logging.getLogger("slgr_jax")`
(`logging.basicConfig(level=logging.INFO)` shows them). Importing this module imports no JAX.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slgr_jax import cluster, config
from slgr_jax.config.keywords import knob_values, section_of
from slgr_jax.config.knobs import Section, flag_name
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset
    from slgr_jax.data.schema import DatasetManifest, TeacherManifest
    from slgr_jax.experiments.comparison import Comparison
    from slgr_jax.experiments.study_results import TuneResult
    from slgr_jax.reports.evaluation import Evaluation
    from slgr_jax.reports.inspection import Inspection
    from slgr_jax.serving.export import Exported
    from slgr_jax.serving.recommendation_files import Written
    from slgr_jax.serving.trained_run import TrainedRun
    from slgr_jax.training.loop import Outcome
    from slgr_jax.training.training_log import TrainingProgress

PathLike = str | os.PathLike[str]

# The knobs of `slgr teach` that an import uses, beside DATA and NAME.
IMPORT_COMMON = ("model", "delimiter", "rows_per_shard", "overwrite", "subtitles")


# --------------------------------------------------------------------- from files to a run


def prepare(*, source: str, input: PathLike, out: PathLike, **knobs: Any) -> DatasetManifest:
    """Raw interactions to a dataset directory; `slgr prepare`.

    Args:
      source: layout of the input, one of `slgr_jax.config.SOURCES`: csv, parquet, movielens, ...
      input: file, folder or zip archive.
      out: dataset directory to write; must not exist unless `overwrite=True`.
      **knobs: of `slgr_jax.config.PrepareConfig`: split, user_column, min_rating, ...;
        `append=DATA` adds the interactions to those of DATA, whose indices stay.

    Returns:
      The manifest: names, counts, what was dropped, hashes of the split and of the ids.

    Raises:
      UserError: the input or a knob cannot be used; nothing is left at `out`.
    """
    from slgr_jax.data.ingest import append
    from slgr_jax.data.ingest import prepare as ingest

    places = {"source": source, "input": input, "out": out}
    values = knob_values((config.PrepareConfig,), {**places, **knobs})
    options = section_of(config.PrepareConfig, values)
    return append.append(options, values) if options.append else ingest.prepare(options)


def import_teacher(
    data: PathLike | Dataset, scores: PathLike, name: str, **knobs: Any
) -> TeacherManifest:
    """Answers of any LLM, in a file, to the product DATA/teacher/NAME; `slgr teach import`.

    Args:
      data: dataset directory, or a loaded `slgr_jax.data.dataset.Dataset`.
      scores: Parquet, Arrow or CSV file with user, item, score (empty: not answered), or user,
        item, rank (1 the best), or user, preferred, other[, margin]; ids as in the raw data, or
        titles of items (items_as="titles").
      name: what training calls the product: `teacher=NAME`.
      **knobs: of `slgr_jax.config.ImportConfig` (built_from, unlisted, unknown, append, ...), and
        model, delimiter, rows_per_shard, overwrite, subtitles.

    Returns:
      The product's manifest: what it is built from, counts, coverage.

    Raises:
      UserError: the file cannot be used; the message names the row.
    """
    from slgr_jax.teacher.products import preferences

    values = knob_values(
        (config.TeachConfig, config.ImportConfig),
        {"scores": scores, "name": name, **knobs},
    )
    common: config.TeachConfig = section_of(config.TeachConfig, values)
    options: config.ImportConfig = section_of(config.ImportConfig, values)
    provenance = preferences.Provenance(
        built_from=options.built_from,
        unlisted=options.unlisted,
        training_items=options.training_items,
        model=common.model,
        prompt_hash=options.prompt_hash,
        score_kind=options.score_kind,
    )
    return preferences.import_scores(
        data,
        options.scores,
        common.name,
        provenance=provenance,
        unknown=options.unknown,
        duplicates=options.duplicates,
        keep_training_items=options.keep_training_items,
        delimiter=common.delimiter,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
        to_existing=options.append,
        items_as=options.items_as,
        subtitles=common.subtitles,
    )


def train(
    data: PathLike | None,
    workdir: PathLike,
    *,
    progress: Callable[[TrainingProgress], None] | None = None,
    workers: int | None = None,
    **knobs: Any,
) -> Outcome:
    """Train a recommender in `workdir`, or resume what is there; `slgr train`.

    With `guidance="auto"` several runs are trained, in WORKDIR/candidates, and the one that
    validation prefers is left in WORKDIR: without guidance, unless a guided one is better by more
    than noise (`slgr_jax.experiments.auto`). With more than one worker they are trained by
    processes that import the calling script: guard it with `if __name__ == "__main__":`.

    Several processes train one run where each calls this with the same arguments and its own
    `process_id` (docs/cluster.md), before anything else in it uses JAX.

    With `refit=RUN` a finished run is trained once more, on training and validation, for serving:
    `train(None, "SERVED", refit="RUN")` (`slgr_jax.training.refit`).

    Args:
      data: dataset directory; of a refit where its run's data are now, None: where they were.
      workdir: directory of the run: config, log, checkpoints.
      progress: called after every dispatch of steps and every validation, from the calling thread;
        what it raises ends training, and the last checkpoint stays. Not of `guidance="auto"`.
      workers: of `guidance="auto"`: processes on a CPU; 0, or None: one per core.
      **knobs: of a run (`slgr_jax.config.sections()`): backbone, guidance, teacher, gate, lr, ...;
        one that is not given has the backbone's own default; and of
        `slgr_jax.config.ClusterConfig`: coordinator, processes, process_id, ...

    Returns:
      How it ended: status (finished, or interrupted by a signal of `agreement.STOPS`, which saves
      first), epoch, best metric. The same call goes on with what was interrupted.

    Raises:
      UserError: bad data, teacher or knobs, or a step that was not finite, each with its fix.
    """
    sections = tuple(config.sections().values())
    values = knob_values((*sections, config.ClusterConfig), knobs)
    job = section_of(config.ClusterConfig, values)
    of_job = {flag_name(field) for field in dataclasses.fields(config.ClusterConfig)}
    values = {name: value for name, value in values.items() if name not in of_job}
    place = cluster.place(job.coordinator, job.processes, job.process_id, job.cluster)
    # Absolute: a run is found from wherever it is evaluated, and resumed.
    data, workdir = os.path.abspath(data) if data else "", os.path.abspath(workdir)
    for name in ("init_from", "refit"):
        if values.get(name):
            values[name] = os.path.abspath(values[name])
    if not data and not values.get("refit"):
        raise ConfigError("missing --data, a dataset directory; only --refit=RUN knows its own")
    if values.get("guidance") == config.AUTO:
        if values.get("refit"):
            raise ConfigError("--refit=RUN repeats a run that was chosen: drop --guidance=auto")
        if place is not None:
            raise ConfigError(
                f"--guidance=auto trains many small runs in one process, and this is one of "
                f"{place.processes}; start it alone, inside a Slurm step with --cluster=none"
            )
        return _train_auto(data, workdir, values, workers)
    if workers is not None:
        raise ConfigError(
            f"--workers={workers} is not used for one run; add --guidance=auto or drop it"
        )
    run = _run_of(data, workdir, values)
    if run.train.kernels != "xla" and place is None:
        from slgr_jax.kernels import build

        # Before JAX is imported: a machine's first run waits for what is left to compile.
        build.begin(*build.units_of(run))
    cluster.start(place, heartbeat_s=job.heartbeat_s, timeout_s=job.start_timeout_s)
    import jax

    from slgr_jax.training import loop, training_log

    def allowed(event: TrainingProgress) -> None:
        assert progress is not None
        with jax.transfer_guard("allow"):  # the loop's own guard is not the callback's
            progress(event)

    with training_log.listening(None if progress is None else allowed):
        return loop.train(run)


def _run_of(data: str, workdir: str, values: Mapping[str, Any]) -> config.RunConfig:
    if source := values.get("refit"):
        from slgr_jax.training import refit

        return refit.config_of(source, workdir, values, data=data)
    run = config.make_run(data, workdir, **values)
    config.check_used(run, values.keys())
    return run


def _train_auto(data: str, workdir: str, values: Mapping[str, Any], workers: int | None) -> Outcome:
    from slgr_jax.experiments import auto

    plan = auto.make_plan(data, pathlib.Path(workdir), values)
    return auto.train(plan, workers=workers or 0, restart=values.get("restart", False))


# --------------------------------------------------------------------- what a run is worth


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

    Returns:
      How many users and rows.

    Raises:
      UserError: a file or an id that cannot be used, or an argument that does nothing.
    """
    from slgr_jax.serving import recommendation_files

    if bool(users) == bool(histories):
        raise ConfigError(
            "give either --users (a file, all, or ids) or --histories=FILE (what new users have "
            "done)"
        )
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
    recommendation_files.check_out(out, overwrite=overwrite)
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

    Raises:
      UserError: what cannot be exported, or an argument that does nothing.
    """
    from slgr_jax.data import shards
    from slgr_jax.serving import export as export_lib

    request = export_lib.ExportRequest(format, index, scorer, k)
    request.check()
    shards.check_target(out, overwrite=overwrite)
    run = _load_with_items(workdir, checkpoint, data, new_items)
    return export_lib.export(run, request, out, overwrite=overwrite)


def _load_with_items(
    workdir: PathLike, checkpoint: str, data: PathLike, items: PathLike
) -> TrainedRun:
    """A run, and the items of a file of vectors behind its own."""
    run = load(workdir, checkpoint, data=data)
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
      **knobs: of `slgr_jax.config.BaselineConfig`: baselines, ease_lambdas, ...

    Raises:
      UserError: there is no such run, metric or baseline.
    """
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    places = [os.fspath(workdir) for workdir in workdirs]
    data, out = os.fspath(data), os.fspath(out)
    options = section_of(config.BaselineConfig, knob_values((config.BaselineConfig,), knobs))

    from slgr_jax.reports import evaluation

    return evaluation.evaluate(places, data, out, metric, checkpoint, options, blend)


def compare(
    data: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    teacher: str = "",
    preset: str = "",
    backbones: Sequence[str] | None = None,
    guidance: Sequence[str] | None = None,
    arm: Sequence[str] = (),
    controls: Sequence[str] | None = None,
    matched_to: str = "",
    focus: str = "",
    seeds: int = 5,
    tune_runs: int = 0,
    tune: Mapping[str, Sequence[float]] | None = None,
    tune_lambda: Sequence[float] | None = None,
    tune_guidance_loss: bool = True,
    tune_base: bool = True,
    refit: bool = False,
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
      preset: shape of a published table, table2 or table3.
      backbones: recommenders; mf by default.
      guidance: arms; none, global, pointwise, rule, paper and calibrated by default.
      arm: more arms, each `NAME:knob=value,knob=value`.
      controls: controls besides: constant, shuffled, consensus, popularity, item_item, ease,
        ials; all but ials by default.
      matched_to: arm that controls copy; empty: the first that has a gate.
      focus: arm that the verdict is about; empty: `matched_to`.
      seeds: runs of an arm, at least 2.
      tune_runs: most tuning runs of an arm; 0: as many as `none` takes, its grid and `tune_base`.
      tune: lr, l2, dropout -> values tried, in place of the backbone's own.
      tune_lambda: values of lambda tried.
      tune_guidance_loss: also try an arm's other loss, at its best lambda.
      tune_base: also try other bases of `none`, and go beyond ends of what was tried.
      refit: also train every run once more, on training and validation; the verdict is theirs.
      workers: processes on a CPU; 0: one per core.
      **knobs: of every run; one that is tuned is then fixed.

    Raises:
      UserError: what is asked for cannot be compared; said before the first run.
    """
    from slgr_jax.experiments import arms, comparison

    request = comparison.Request(
        teacher=teacher,
        preset=preset,
        backbones=backbones,
        guidance=guidance,
        arm=arm,
        controls=controls,
        matched_to=matched_to,
        focus=focus,
        seeds=seeds,
        tune_runs=tune_runs,
        tune=tune or {},
        tune_lambda=arms.LAMBDAS if tune_lambda is None else tune_lambda,
        tune_guidance_loss=tune_guidance_loss,
        tune_base=tune_base,
        refit=refit,
        knobs=knob_values(tuple(config.sections().values()), knobs),
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
        search_space.split_text(search) if isinstance(search, str) else search,
        {name: value for name, value in values.items() if name not in names},
        section_of(config.TuneConfig, values),
    )
    return study.tune(plan)
