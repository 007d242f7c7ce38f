"""A comparison of guidance arms on a data set: tune, train, meet the test part, report.

`planning.make_plan` turns what a user asks for into a `ComparisonPlan`; `compare` carries it out;
`write` leaves report.md, report.json and pictures.
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
    tuning,
)
from slgr_jax.experiments.arms import ComparisonPlan
from slgr_jax.experiments.planning import Request, make_plan
from slgr_jax.files import write_atomically

LOGGER = logging.getLogger(__name__)
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
    streams = functools.partial(pool.train_streams, workers=workers, root=plan.out)
    tuned = tuning.tune(plan, streams)
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


def _train_seeds(plan: ComparisonPlan, tuned: tuning.Tuned, train: pool.Train) -> _Runs:
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


def _refit(plan: ComparisonPlan, runs: _Runs, train: pool.Train) -> _Runs:
    """Every run once more, on training and validation, with the teacher that was made anew of
    these, where there is one; their configs."""
    from slgr_jax.training import refit

    LOGGER.info("refitting %d runs on training and validation", sum(map(len, runs.values())))
    refitted = {
        (backbone, arm): [
            refit.config_of(
                run.workdir,
                str(plan.refit_dir(backbone, arm, seed)),
                {"teacher": plan.refit_teacher_of(arm)} if run.guidance.teacher else {},
            )
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
    no_llm = {*arms.CONTROLS, *arms.REFERENCES}
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
        "refit_teacher": plan.refit_teacher,
        "vectors": plan.vectors,
        "products": dict(plan.products),
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
    from slgr_jax.teacher.products import controls, edit_controls

    if "edited_random" in plan.arms:
        edits = plan.products[arms.EDITS]
        LOGGER.info("control %s", edit_controls.ensure(dataset.load(plan.data), edits))
    wanted = [arm for arm in plan.arms if arm in controls.CONTROLS]
    if wanted or plan.factors_width:
        data = dataset.load(plan.data)
        for control in wanted:
            LOGGER.info("control %s", teacher_lists.ensure_control(data, plan.teacher, control))
            if plan.refit_teacher:
                both, anew = data.with_validation(), plan.refit_teacher
                LOGGER.info("control %s", teacher_lists.ensure_control(both, anew, control))
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
