"""From files to a run: `prepare`, `train`, and imports of what an LLM said."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slgr_jax import cluster, config
from slgr_jax.config.keywords import knob_values, section_of
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset
    from slgr_jax.data.edit_schema import EditManifest
    from slgr_jax.data.schema import DatasetManifest, TeacherManifest
    from slgr_jax.training.loop import Outcome
    from slgr_jax.training.training_log import TrainingProgress

PathLike = str | os.PathLike[str]

# The knobs of `slgr teach` that an import uses, beside DATA and NAME.
IMPORT_COMMON = ("model", "delimiter", "rows_per_shard", "overwrite", "subtitles")
# Those of an import that say something of scores alone.
_OF_SCORES = (
    *("scores", "score_column", "score_kind", "unlisted", "training_items"),
    *("keep_training_items", "duplicates", "append"),
)
# Those of scores and interactions that say nothing of edits.
_NOT_OF_EDITS = (*_OF_SCORES, "interactions", "weight_column", "items_as")


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
        titles of items (items_as="titles"). Or a folder with an answer a user, as the model wrote
        it: user_12.txt (`slgr_jax.teacher.collect.answer_folder`).
      name: what training calls the product: `teacher=NAME`.
      **knobs: of `slgr_jax.config.ImportConfig` (built_from, unlisted, unknown, append, ...), and
        model, delimiter, rows_per_shard, overwrite, subtitles.

    Returns:
      The product's manifest: what it is built from, counts, coverage.

    Raises:
      UserError: the file cannot be used; the message names the row.
    """
    from slgr_jax.teacher.collect import answer_folder
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
    names = {
        options.user_column: "user",
        options.item_column: "item",
        options.score_column: "score",
    }
    if len(names) < 3:
        raise ConfigError(
            f"--user_column={options.user_column}, --item_column={options.item_column} and "
            f"--score_column={options.score_column} must be three columns"
        )
    raw = None
    if pathlib.Path(options.scores).is_dir():
        if options.items_as != "titles":
            raise ConfigError(
                f"{options.scores} is a folder: its answers are lists of titles; add "
                "--items_as=titles"
            )
        raw = answer_folder.read(pathlib.Path(options.scores))
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
        raw=raw,
        names=names,
    )


def import_interactions(
    data: PathLike | Dataset, interactions: PathLike, name: str, **knobs: Any
) -> TeacherManifest:
    """What users take in an LLM's word, in a file, to the product DATA/teacher/NAME.

    `slgr teach import --interactions=FILE`; `train(guidance="interactions", teacher=NAME)` learns
    them beside the interactions of DATA.

    Args:
      data: as of `import_teacher`.
      interactions: Parquet, Arrow, JSON lines or CSV file with user, item and optionally weight,
        above 0 and up to 1.
      name: what training calls the product.
      **knobs: of `import_teacher`, but for those of scores.

    Raises:
      UserError: the file cannot be used, or a knob is of scores; the message names the row.
    """
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher.products import preferences, pseudo_interactions

    values = knob_values(
        (config.TeachConfig, config.ImportConfig),
        {"interactions": interactions, "name": name, **knobs},
    )
    common: config.TeachConfig = section_of(config.TeachConfig, values)
    options: config.ImportConfig = section_of(config.ImportConfig, values)
    defaults = config.ImportConfig()
    _refuse_given(options, _OF_SCORES, "--interactions")
    # The column of weights may be missing: it is named only where the user names it.
    names = {options.user_column: "user", options.item_column: "item"}
    if options.weight_column != defaults.weight_column:
        names[options.weight_column] = "weight"
    return pseudo_interactions.import_file(
        data if isinstance(data, dataset_lib.Dataset) else dataset_lib.load(data),
        pathlib.Path(options.interactions),
        common.name,
        provenance=preferences.Provenance(
            built_from=options.built_from, model=common.model, prompt_hash=options.prompt_hash
        ),
        names=names,
        unknown=options.unknown,
        delimiter=common.delimiter,
        items_as=options.items_as,
        subtitles=common.subtitles,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def import_edits(
    data: PathLike | Dataset, edits: PathLike, name: str, **knobs: Any
) -> EditManifest:
    """What an LLM takes for noise among training interactions, to the product DATA/edits/NAME.

    `slgr teach import --edits=FILE`; `train(edits=NAME)` learns without them, with what the LLM
    names in their place, or by their weight.

    Args:
      data: as of `import_teacher`.
      edits: Parquet, Arrow, JSON lines or CSV file with user, item or position (0 the oldest) or
        both, noise (a probability) and optionally replacement (an item).
      name: what training calls the product.
      **knobs: of `import_teacher`, but for those of scores and titles.

    Raises:
      UserError: the file cannot be used, or a knob is not of edits; the message names the row.
    """
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher.products import edits as products
    from slgr_jax.teacher.products import preferences

    values = knob_values(
        (config.TeachConfig, config.ImportConfig), {"edits": edits, "name": name, **knobs}
    )
    common: config.TeachConfig = section_of(config.TeachConfig, values)
    options: config.ImportConfig = section_of(config.ImportConfig, values)
    _refuse_given(options, _NOT_OF_EDITS, "--edits")
    return products.import_file(
        data if isinstance(data, dataset_lib.Dataset) else dataset_lib.load(data),
        pathlib.Path(options.edits),
        common.name,
        provenance=preferences.Provenance(
            built_from=options.built_from, model=common.model, prompt_hash=options.prompt_hash
        ),
        names={options.user_column: "user"}
        | ({options.item_column: "item"} if options.item_column != "item" else {}),
        unknown=options.unknown,
        delimiter=common.delimiter,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def _refuse_given(options: config.ImportConfig, knobs: tuple[str, ...], flag: str) -> None:
    """Refuse knobs that say nothing of what `flag` imports."""
    defaults = config.ImportConfig()
    for name in knobs:
        if (value := getattr(options, name)) != getattr(defaults, name):
            raise ConfigError(
                f"--{name}={value} says nothing of what {flag} imports; drop one of them"
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
    for name in ("init_from", "init_ids_from", "refit"):
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
