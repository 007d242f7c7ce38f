"""A comparison of guidance arms on a data set: tune, train, meet the test part, report.

`make_plan` turns what a user asks for into a `ComparisonPlan`; `compare` carries it out; `write`
leaves report.md, report.json and pictures. What is asked for is named as on the command line of
`slgr compare`, and so are the knobs that errors name.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax import config
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import (
    arm_spaces,
    arms,
    pool,
    presets,
    results,
    sampler,
    search_space,
    tuning,
)
from slgr_jax.experiments.arms import ComparisonPlan
from slgr_jax.files import write_atomically

LOGGER = logging.getLogger(__name__)
DEFAULT_ARMS = ("none", "global", "pointwise", "rule", "paper", "calibrated", arms.AUTO)
# Knobs of a run that a comparison sets itself.
SET_HERE = frozenset(
    {
        *("backbone", "guidance", "teacher", "gate", "alpha", "hard_negatives", "seed", "restart"),
        "refit",
        *("init_item_vectors", "init_user_vectors", "item_vectors", "user_vectors"),
        *("item_rows", "user_rows", "adapter_chunks", "train_only"),
    }
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for; None is the preset's, or the default.

    Attributes:
      teacher: product under DATA/teacher; without one no guided arm can be measured.
      vectors: product under DATA/embeddings of `arms.VECTOR_ARMS`.
      preset: shape of a published table, one of `presets.PRESETS`; empty: none.
      backbones: recommenders; mf by default.
      guidance: arms; `DEFAULT_ARMS` by default.
      arm: more arms, each NAME:knob=value,knob=value.
      controls: controls besides; all by default, none of them with a preset.
      matched_to: arm that controls copy; empty: `auto` where it is asked for, else the first gated.
      focus: arm that the verdict is about; empty: `matched_to`.
      seeds: runs of an arm, at least 2.
      search: knob -> what it may be, as `search_space` reads it: in place of what is searched of
        every arm that has the knob.
      options: how every arm is searched.
      refit: also train every run once more, on training and validation; the verdict is theirs.
      knobs: of every run, by their command-line names; what is given is not searched.
    """

    teacher: str = ""
    vectors: str = ""
    preset: str = ""
    backbones: Sequence[str] | None = None
    guidance: Sequence[str] | None = None
    arm: Sequence[str] = ()
    controls: Sequence[str] | None = None
    matched_to: str = ""
    focus: str = ""
    seeds: int = 5
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: config.CompareConfig = dataclasses.field(default_factory=config.CompareConfig)
    refit: bool = False
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset and self.preset not in presets.PRESETS:
            raise ConfigError(f"--preset={self.preset} is not one of: {listing(presets.PRESETS)}")
        if self.seeds < 2:
            raise ConfigError(f"--seeds={self.seeds} is below its minimum 2")
        if fixed := sorted(SET_HERE & set(self.knobs)):
            raise ConfigError(
                f"--{fixed[0]}={self.knobs[fixed[0]]} is set by the arms of a comparison; choose "
                "arms with --guidance, --arm and --backbones instead"
            )
        if fixed := sorted(SET_HERE & set(self.search)):
            raise ConfigError(f"--search: {fixed[0]} is set by the arms of a comparison; drop it")


def _check_chunks(data: str, name: str) -> None:
    """Refuse a product of one vector a row, which the arm `kser` cannot choose among."""
    from slgr_jax.data import schema

    product = pathlib.Path(data) / schema.EMBEDDINGS_DIR / name
    if not schema.read_embedding_manifest(product).fields:
        raise ConfigError(
            f"arm {arms.CHUNKED} chooses among a row's chunks, and --vectors={name} has one vector "
            "a row; make chunks (slgr teach embed --chunks=8), which the other arms read the mean "
            "of, or drop the arm"
        )


def make_plan(data: str, out: pathlib.Path, request: Request) -> ComparisonPlan:
    """What is compared on one data set.

    Raises:
      ConfigError: an arm, a control or a knob that there is not, or nothing to tune.
    """
    from slgr_jax.data import schema

    request = _with_preset(request)
    asked = request.guidance or ()
    if not request.teacher and not set(asked) <= set(arms.UNTAUGHT):
        known = ",".join(arms.UNTAUGHT)
        raise ConfigError(f"missing --teacher; without one --guidance is some of: {known}")
    reads_vectors = [arm for arm in asked if arm in arms.VECTOR_ARMS]
    if bool(reads_vectors) != bool(request.vectors):
        fix = (
            f"missing --vectors=NAME (slgr teach embed), which arm {reads_vectors[0]} reads"
            if reads_vectors
            else f"--vectors={request.vectors} is read by no arm; add init, adapter, "
            "rlmrec_con or another of vectors to --guidance"
        )
        raise ConfigError(fix)
    if arms.CHUNKED in asked:
        _check_chunks(data, request.vectors)
    arms_asked = DEFAULT_ARMS if request.guidance is None else request.guidance
    controls = arms.DEFAULT_CONTROLS if request.controls is None else request.controls
    more_arms = dict(map(arms.own_arm, request.arm))
    if not request.teacher:
        arms_asked, controls, more_arms = tuple(request.guidance or ("none",)), (), {}
    chosen, matched, focus = arms.choose(
        arms_asked, controls, request.matched_to, request.focus, more_arms
    )

    backbones, knobs = request.backbones or ("mf",), request.knobs
    search = search_space.make_space(request.search, knobs) if request.search else {}
    counts = schema.read_dataset_manifest(data).counts
    plan = ComparisonPlan(
        data=data,
        out=out,
        knobs=knobs,
        teacher=request.teacher,
        backbones=tuple(dict.fromkeys(backbones)),
        arms=chosen,
        matched=matched,
        focus=focus,
        seeds=request.seeds,
        options=request.options,
        search=search,
        softmax=arm_spaces.softmax_of(counts["items"]),
        variants=arm_spaces.variants_of(data, request.teacher) if arms.AUTO in chosen else (),
        own_arms=more_arms,
        vectors=request.vectors,
        refit=request.refit,
        backbone_knobs=_backbone_knobs(request),
        factors_width=arm_spaces.factors_width(counts, knobs) if request.options.ease_start else 0,
    )
    arm_spaces.check(plan)
    return plan


def _with_preset(request: Request) -> Request:
    """The request with what its preset says where it says nothing itself."""
    if not request.preset:
        return request
    preset = presets.PRESETS[request.preset]
    arms_asked = request.guidance
    # Whether a teacher is missing depends on what the user asked for, not on the preset.
    if arms_asked is None and request.teacher:
        arms_asked = presets.arms_of(preset, request.vectors)
    return dataclasses.replace(
        request,
        backbones=preset.backbones if request.backbones is None else request.backbones,
        guidance=arms_asked,
        controls=() if request.controls is None else request.controls,
        knobs={**preset.knobs, **request.knobs},
    )


def _backbone_knobs(request: Request) -> Mapping[str, Mapping[str, Any]]:
    """What the preset says of single backbones, but for what is given."""
    if not request.preset:
        return {}
    return {
        backbone: {name: value for name, value in knobs.items() if name not in request.knobs}
        for backbone, knobs in presets.PRESETS[request.preset].backbone_knobs.items()
    }


# --------------------------------------------------------------------- one data set


def compare(plan: ComparisonPlan, workers: int, command: str = "") -> dict[str, Any]:
    """Tune, train and test everything; what report.json holds.

    Args:
      plan: what is compared.
      workers: processes that train.
      command: how it was called, for the report.
    """
    train = functools.partial(pool.train_runs, workers=workers, root=plan.out)
    LOGGER.info("tuning %s of %s", listing(plan.arms, 99), listing(plan.backbones, 99))
    tuned = tuning.tune(plan, train)
    LOGGER.info("%d seeds of each", plan.seeds)
    runs = _train_seeds(plan, tuned, train)
    every = [run for seeds in runs.values() for run in seeds]

    LOGGER.info("meeting the test part")
    pool.evaluate_runs(every, workers=workers)
    report = _report(plan, tuned, runs, command)
    if plan.refit:
        refitted = _refit(plan, runs, train)
        pool.evaluate_runs([run for seeds in refitted.values() for run in seeds], workers=workers)
        report["refit"] = _refit_report(plan, refitted)
        report["verdict"] = report["refit"]["verdict"]
    return report


_Runs = Mapping[tuple[str, str], Sequence[config.RunConfig]]


def _train_seeds(plan: ComparisonPlan, tuned: tuning.Tuned, train: tuning.Train) -> _Runs:
    """A run a seed of every arm; where it has finalists, the one that is best on that seed's
    validation, which is added to `tuned`.

    Raises:
      ConfigError: a run diverged, and so did the other finalist, where there is one.
    """
    candidates = {
        (backbone, arm, seed): plan.candidates(backbone, arm, of_arms, seed)
        for backbone, of_arms in tuned.items()
        for arm in plan.arms
        for seed in range(plan.seeds)
    }
    every = [run for of_seed in candidates.values() for run in of_seed]
    outcomes = {run.workdir: outcome for run, outcome in zip(every, train(every), strict=True)}
    runs: dict[tuple[str, str], list[config.RunConfig]] = {}
    for (backbone, arm, _), of_seed in candidates.items():
        valid = {run: outcomes[run.workdir]["best_metric"] for run in of_seed}
        finished = [run for run in of_seed if outcomes[run.workdir]["error"] is None]
        if not finished:
            raise ConfigError(f"{of_seed[0].workdir}: {outcomes[of_seed[0].workdir]['error']}")
        best = max(finished, key=lambda run: valid[run] or 0.0)
        runs.setdefault((backbone, arm), []).append(best)
        if finalists := tuned[backbone][arm].get("finalists"):
            names = [finalist["chosen"]["variant"] for finalist in finalists]
            choice = {"variant": names[of_seed.index(best)]}
            choice["valid"] = dict(zip(names, valid.values(), strict=True))
            tuned[backbone][arm].setdefault("by_seed", []).append(choice)
    return runs


def _refit(plan: ComparisonPlan, runs: _Runs, train: tuning.Train) -> _Runs:
    """Every run once more, on training and validation; their configs."""
    from slgr_jax.training import refit

    LOGGER.info("refitting %d runs on training and validation", sum(map(len, runs.values())))
    refitted = {
        (backbone, arm): [
            refit.config_of(run.workdir, str(plan.refit_dir(backbone, arm, seed)))
            for seed, run in enumerate(seeds)
        ]
        for (backbone, arm), seeds in runs.items()
    }
    every = [run for seeds in refitted.values() for run in seeds]
    for run, outcome in zip(every, train(every), strict=True):
        if outcome["error"]:
            raise ConfigError(f"{run.workdir}: {outcome['error']}")
    return refitted


def _refit_report(plan: ComparisonPlan, runs: _Runs) -> dict[str, Any]:
    """What report.json holds of the refitted runs: rows, baselines beside them, verdict."""
    from slgr_jax.data import dataset
    from slgr_jax.experiments import summary

    firsts = {backbone: seeds[0] for (backbone, arm), seeds in runs.items() if arm == "none"}
    primary = {backbone: run.train.early_stop_metric for backbone, run in firsts.items()}
    rows = _rows(plan, runs, primary)
    data = dataset.load(plan.data, verify=False).with_validation()
    return {
        "rows": rows,
        "tests": _count_tests(rows),
        "verdict": summary.verdict(rows, plan.focus),
        "baselines": _baselines(plan.out / "refit", list(firsts.values()), data, primary),
    }


def _rows(plan: ComparisonPlan, runs: _Runs, primary: Mapping[str, str]) -> list[dict[str, Any]]:
    """Means and tests of every arm; the focus is also tested against what learns from no LLM."""
    from slgr_jax.experiments import summary

    first = next(iter(runs.values()))[0]
    where = {key: [pathlib.Path(run.workdir) for run in seeds] for key, seeds in runs.items()}
    no_llm = {*arms.CONTROLS, *arms.UNTAUGHT[1:]} - {*arms.ALIGNED}
    controls = [arm for arm in plan.arms if arm in no_llm and arm != plan.focus]
    return summary.rows_of(where, first.evaluation.ks, primary, plan.focus, controls)


def _report(
    plan: ComparisonPlan,
    tuned: tuning.Tuned,
    runs: Mapping[tuple[str, str], Sequence[config.RunConfig]],
    command: str,
) -> dict[str, Any]:
    from slgr_jax.data import dataset
    from slgr_jax.experiments import summary

    data = dataset.load(plan.data, verify=False)
    firsts = {backbone: seeds[0] for (backbone, arm), seeds in runs.items() if arm == "none"}
    primary = {backbone: run.train.early_stop_metric for backbone, run in firsts.items()}
    first = next(iter(firsts.values()))

    where = {key: [pathlib.Path(run.workdir) for run in seeds] for key, seeds in runs.items()}
    rows = _rows(plan, runs, primary)
    protocol = _protocol(plan, tuned, command)
    protocol |= {"data": data.manifest.name, "split_hash": data.manifest.split_hash}
    protocol |= {"primary": primary, "tests": _count_tests(rows)}
    protocol["thresholds"] = _thresholds(data.slices(first.slices))
    return {
        "protocol": protocol,
        "tuned": tuned,
        "rows": rows,
        "verdict": summary.verdict(rows, plan.focus),
        "cost": summary.costs(where),
        "gate": summary.gates(where),
        "alpha_by_epoch": summary.alphas(where),
        "baselines": _baselines(plan.out, list(firsts.values()), data, primary),
    }


def _protocol(plan: ComparisonPlan, tuned: tuning.Tuned, command: str) -> dict[str, Any]:
    return {
        "teacher": plan.teacher,
        "vectors": plan.vectors,
        "command": command,
        "backbones": list(plan.backbones),
        "arms": list(plan.arms),
        "matched_to": plan.matched,
        "focus": plan.focus,
        "seeds": plan.seeds,
        "search": dataclasses.asdict(plan.options),
        "budget": {
            backbone: {arm: len(its["tried"]) for arm, its in of_arms.items() if its["tried"]}
            for backbone, of_arms in tuned.items()
        },
    }


def _thresholds(slices: Any) -> dict[str, Any]:
    return {
        "cold_user_history": slices.cold_user_history,
        "tail_item_popularity": slices.tail_item_popularity,
        "cold users": int(slices.cold_users.sum()),
        "tail items": int(slices.tail_items.sum()),
    }


def _count_tests(rows: Sequence[Mapping[str, Any]]) -> int:
    """Paired tests on primary metrics."""
    return sum(
        bool(value) and "p_seeds" in value
        for row in rows
        if row["primary"]
        for key, value in row.items()
        if key.startswith("vs_")
    )


def _baselines(
    out: pathlib.Path, runs: Sequence[config.RunConfig], data: Any, primary: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Most popular and, where it takes seconds, EASE, by slice, of each backbone's primary metric:
    of the ranking, or of the labelled rows of those that stop by them."""
    from slgr_jax.evaluation import baseline_evaluation

    of_metric = {primary[run.model.backbone]: run for run in reversed(runs)}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for metric, run in of_metric.items():
        for baseline in baseline_evaluation.evaluate_baselines(
            config.BaselineConfig(), run, data, out
        ):
            by_rows = metric.startswith("rows_")
            by_slice = baseline.rows["test"] if by_rows else baseline.parts["test"].slices
            for name in results.MAIN_SLICES:
                values = by_slice[name]
                row: dict[str, Any] = {"baseline": baseline.label, "slice": name}
                row |= {"rows" if by_rows else "users": values["n"]}
                row[metric] = values.get(metric.removeprefix("rows_"))
                rows.setdefault((baseline.label, name), {}).update(row)
    return list(rows.values())


def write(report: Mapping[str, Any], out: pathlib.Path) -> str:
    """Write report.json, pictures, summary.md, .csv, .tex and report.md; the text of the last.

    A report of another teacher that is there moves to OUT/reports/TEACHER.
    """
    from slgr_jax.experiments import plots, render
    from slgr_jax.reports import tables

    _keep_other(out, report["protocol"]["teacher"])
    results.write_json(out / "report.json", report)
    pictures = plots.draw(report, out)
    text = render.render(report, pictures)
    write_atomically(out / "report.md", text)
    protocol = report["protocol"]
    title = f"{protocol['data']}, test, mean of {protocol['seeds']} seeds"
    note = "".join(f"{line}\n" for line in render.short_verdict(report))
    tables.write_summary(render.short_rows(report), out, title=title, note=note)
    return text


def _keep_other(out: pathlib.Path, teacher: str) -> None:
    """Move the report of another teacher out of the way."""
    other = results.read_json(out / "report.json") if (out / "report.json").is_file() else None
    if other is None or other["protocol"]["teacher"] == teacher:
        return
    kept = out / "reports" / (other["protocol"]["teacher"] or "none")
    kept.mkdir(parents=True, exist_ok=True)
    for pattern in ("report.*", "summary.*", "*.png"):
        for path in out.glob(pattern):
            path.replace(kept / path.name)
    LOGGER.info("moved the report that was there to %s", kept)


def make_products(plan: ComparisonPlan) -> None:
    """Write the control products, and the factors that rows may begin with, that are not there."""
    from slgr_jax.data import dataset
    from slgr_jax.evaluation import factors, teacher_lists
    from slgr_jax.teacher.products import controls

    wanted = [arm for arm in plan.arms if arm in controls.CONTROLS]
    if wanted or plan.factors_width:
        data = dataset.load(plan.data)
        for control in wanted:
            LOGGER.info("control %s", teacher_lists.ensure_control(data, plan.teacher, control))
        if plan.factors_width:
            factors.ensure(data, arm_spaces.FACTORS, plan.factors_width)


# --------------------------------------------------------------------- several data sets


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_all` leaves.

    Attributes:
      reports: data set -> what its report.json holds.
      texts: data set -> its report.md.
      table: the preset's table over all data sets, as Markdown; empty without a preset.
    """

    reports: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str]
    table: str = ""

    def __str__(self) -> str:
        """Of each data set the small table and the verdict."""
        from slgr_jax.experiments import render

        short = [render.short(report) for report in self.reports.values()]
        return "\n".join([*short, *([self.table] if self.table else [])])


def compare_all(
    data: Sequence[str], out: pathlib.Path, request: Request, *, workers: int = 0, command: str = ""
) -> Comparison:
    """Compare on each data set, in OUT or, of several, in OUT/NAME.

    Args:
      data: dataset directories.
      out: directory of the runs and of the reports; it is held against other processes.
      request: what to compare.
      workers: processes on a CPU; 0: one per core; accelerators take one.
      command: how it was called, for the reports.

    Raises:
      UserError: what is asked for cannot be compared; said before the first run.
    """
    from slgr_jax.data import shards

    sampler.require("slgr compare", "optuna")
    names = [pool.check_data(path) for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data: {listing(names)}: two data sets of one name")
    places = [out] if len(names) == 1 else [out / name for name in names]
    plans = [make_plan(path, place, request) for path, place in zip(data, places, strict=True)]
    processes = pool.workers(workers)

    out.mkdir(parents=True, exist_ok=True)
    reports, texts = {}, {}
    with shards.locked(out):  # a second comparison would train over the runs of the first
        for plan in plans:
            make_products(plan)
        for name, plan in zip(names, plans, strict=True):
            reports[name] = compare(plan, processes, command)
            texts[name] = write(reports[name], plan.out)
            LOGGER.info("wrote %s and summary.md, .csv, .tex beside it", plan.out / "report.md")

    table = presets.table(request.preset, reports) if request.preset else ""
    if table:
        write_atomically(out / f"{request.preset}.md", table)
    return Comparison(reports, texts, table)
