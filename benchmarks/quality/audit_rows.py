"""The rows of `audit_controls.py`: how each is trained, what is measured of it, the table.

Slices and masks are those of the audited data set, whatever a row was trained on.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import audit_teachers
import numpy as np

from slgr_jax import config
from slgr_jax.config import BaselineConfig, RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines, full_ranking
from slgr_jax.evaluation.ranking_metrics import PartResult
from slgr_jax.evaluation.significance import holm, paired_t
from slgr_jax.experiments import pool, results
from slgr_jax.experiments.arms import ARMS as GUIDED
from slgr_jax.experiments.summary import number
from slgr_jax.reports.tables import markdown_table
from slgr_jax.training import restore

if TYPE_CHECKING:
    from audit_controls import AuditConfig

METRIC = "ndcg@10"
SLICES = ("overall", "cold_users", "warm_users", "tail_items")
TESTED = ("overall", "cold_users", "tail_items")


# --------------------------------------------------------------------- runs


def run_directory(audit: AuditConfig, arm: str, weight: float, seed: int) -> pathlib.Path:
    """Where a run is kept."""
    setting = f"_lambda{weight:g}" if weight else ""
    return pathlib.Path(audit.out) / "runs" / f"{arm}{setting}_seed{seed}"


def guidance_knobs(audit: AuditConfig, arm: str, reference: str) -> dict[str, Any]:
    """The knobs that make an arm of its teacher's lists, without the teacher's name.

    Args:
      reference: the directory of `none` of the same seed.
    """
    if arm == "global":
        return {**GUIDED["global"], "guidance_loss": "logistic"}
    name = "global_hard_negatives" if arm == "training_items" else audit.method
    knobs = dict(GUIDED[name])
    if "reference_runs" in knobs:
        knobs["reference_runs"] = reference
    return knobs


def make_run(audit: AuditConfig, arm: str, weight: float, seed: int) -> RunConfig:
    """The run of an arm; that of `none_train_valid` needs `none` of the same seed finished."""
    knobs: dict[str, Any] = {
        "lr": audit.learning_rate,
        "l2": audit.l2_plain,
        "batch_size": audit.triples,
        "epochs": audit.epochs,
        "eval_every": audit.eval_every,
        "patience": audit.patience,
    }
    reference = run_directory(audit, "none", 0.0, seed)
    data = audit.data
    if arm == "none_train_valid":
        outcome = results.outcome(reference)
        assert outcome is not None, "none of this seed was trained first"
        # One validation, at the end: its one interaction must not choose the epoch.
        knobs |= {"epochs": outcome["best_epoch"], "eval_every": outcome["best_epoch"]}
        data = str(pathlib.Path(audit.out) / "train_valid")
    elif arm != "none":
        knobs |= guidance_knobs(audit, arm, str(reference))
        control = f".{arm}" if arm in audit_teachers.TEACHERS else ""
        knobs |= {"lambda": weight, "teacher": f"{audit.teacher}{control}"}
        knobs["l2"] = audit.l2_plain if audit.l2_guided < 0 else audit.l2_guided
    workdir = str(run_directory(audit, arm, weight, seed))
    return config.make_run(data, workdir, backbone=audit.recommender, seed=seed, **knobs)


def train(runs: Sequence[RunConfig], out: str) -> list[dict[str, Any]]:
    """Outcomes of runs, trained one after the other with all cores.

    Raises:
      ConfigError: a run diverged.
    """
    outcomes = pool.train_runs(runs, workers=1, root=pathlib.Path(out))
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome["error"]:
            raise ConfigError(f"{run.workdir}: {outcome['error']}")
    return outcomes


def choose_weight(audit: AuditConfig, arm: str) -> float:
    """The lambda with the best validation of seed 0; the only one, if there is one."""
    weights = audit.weights(arm)
    if len(weights) == 1:
        return weights[0]
    outcomes = train([make_run(audit, arm, weight, 0) for weight in weights], audit.out)
    best = int(np.argmax([outcome["best_metric"] for outcome in outcomes]))
    return weights[best]


# --------------------------------------------------------------------- what is measured


@dataclasses.dataclass
class Row:
    """An arm or a baseline on the test part.

    Attributes:
      name: of the arm.
      setting: what validation or the command line chose, for the report.
      parts: the test part by seed; a baseline has one.
    """

    name: str
    setting: str
    parts: list[PartResult]

    def by_seed(self, part: str, seeds: int) -> np.ndarray:
        """[seeds] NDCG@10 of a slice; a baseline's value for each seed. NaN where nobody is in."""
        values = [result.slices[part].get(METRIC) for result in self.parts]
        values = [np.nan if value is None else value for value in values]
        return np.array(values * (seeds if len(values) == 1 else 1), np.float64)

    def by_user(self, part: str) -> np.ndarray:
        """[n] NDCG@10 of a slice's users, the mean over seeds; users in order."""
        kind = "tail" if part == "tail_items" else "all"
        tables = [result.users[kind] for result in self.parts]
        order = np.argsort(tables[0].users)
        keep = order[self._members(part)[tables[0].users[order]]]
        return np.mean([table.values[METRIC][keep] for table in tables], axis=0)

    def _members(self, part: str) -> np.ndarray:
        masks: Mapping[str, np.ndarray] = self.parts[0].data.masks.users
        return masks.get(part, np.ones(next(iter(masks.values())).size, bool))


def measure(run: RunConfig, dataset: Dataset) -> PartResult:
    """The test part of `dataset`, ranked by a finished run of it or of train + validation.

    Slices and masked items are those of `dataset`, whatever the run was trained on.
    """
    trained = restore.restore_run(run.workdir)
    parts = full_ranking.evaluate_dataset(
        trained.score_users,
        trained.scoring("test"),
        dataset,
        run.slices,
        run.evaluation,
        parts=("test",),
    )
    return parts["test"]


def baseline_rows(run: RunConfig, dataset: Dataset, joined: Dataset | None) -> list[Row]:
    """Most popular and EASE, tuned on validation; EASE fitted on train + validation, too.

    EASE is left out where a run's evaluation leaves it out by default: of large catalogues.
    """

    def ranked(fitted: baselines.Fitted) -> PartResult:
        parts = full_ranking.evaluate_dataset(
            fitted.score_users, fitted.state, dataset, run.slices, run.evaluation, parts=("test",)
        )
        return parts["test"]

    options = BaselineConfig()
    popular = baselines.tune(baselines.make_baseline("popular", options), dataset)
    rows = [Row("popular", "", [ranked(popular.fitted)])]
    if "ease" not in baselines.chosen(options, dataset.n_items):
        return rows  # its time grows with the cube of the catalogue

    ease = baselines.tune(baselines.make_baseline("ease", options), dataset)
    l2 = int(ease.settings["lambda"])
    rows.append(Row("EASE itself", f"l2 {l2}", [ranked(ease.fitted)]))
    if joined is not None:
        again = baselines.Ease((l2,))
        fitted = next(again.fit(joined, again.grid))
        rows.append(Row("EASE, train + validation", f"l2 {l2}", [ranked(fitted)]))
    return rows


def measure_arms(audit: AuditConfig, dataset: Dataset) -> list[Row]:
    """Train what is not trained yet, and let it meet the test part."""
    seeds = range(audit.seeds)
    plain = [make_run(audit, "none", 0.0, seed) for seed in seeds]
    train(plain, audit.out)
    joined = None
    if "none_train_valid" in audit.asked:
        joined = audit_teachers.join_validation(dataset, pathlib.Path(audit.out) / "train_valid")

    rows = []
    for arm in audit.asked:
        if arm in audit_teachers.TEACHERS:
            audit_teachers.ensure(dataset, audit.teacher, arm)
        weight = choose_weight(audit, arm)
        runs = [make_run(audit, arm, weight, seed) for seed in seeds]
        train(runs, audit.out)
        setting = f"lambda {weight:g}" if weight else ""
        rows.append(Row(arm, setting, [measure(run, dataset) for run in runs]))
    return rows + baseline_rows(plain[0], dataset, joined)


# --------------------------------------------------------------------- the report


def difference(first: Row, second: Row, part: str, seeds: int) -> dict[str, float | None]:
    """first - second on a slice, with p of paired t-tests over seeds and over users.

    None where nobody is in the slice, or a test has fewer than two pairs.
    """
    by_seed = first.by_seed(part, seeds) - second.by_seed(part, seeds)
    by_user = first.by_user(part) - second.by_user(part)
    return {
        "difference": number(float(np.mean(by_seed))),
        "p_seeds": number(paired_t(by_seed)),
        "p_users": number(paired_t(by_user[~np.isnan(by_user)])),
    }


def tests(rows: Sequence[Row], seeds: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Row -> slice -> `llm` minus that row, with Holm's p over the table; {} without `llm`."""
    by_name = {row.name: row for row in rows}
    if "llm" not in by_name:
        return {}
    others = [row for row in rows if row.name != "llm"]
    table = {
        row.name: {part: difference(by_name["llm"], row, part, seeds) for part in TESTED}
        for row in others
    }
    cells = [cell for by_part in table.values() for cell in by_part.values()]
    for family in ("p_seeds", "p_users"):
        raw = [math.nan if (p := cell[family]) is None else p for cell in cells]
        for cell, corrected in zip(cells, holm(raw), strict=True):
            cell[f"{family}_holm"] = number(corrected)
    return table


def report(audit: AuditConfig, dataset: Dataset, rows: Sequence[Row]) -> dict[str, Any]:
    """What audit.json holds: the protocol, means by slice with their spread, tests."""
    compared = tests(rows, audit.seeds)
    settings = dataclasses.asdict(audit)
    protocol = {name: settings[name] for name in settings if name not in ("data", "out")}
    return {
        "data": dataset.manifest.name,
        "split_hash": dataset.manifest.split_hash,
        "metric": METRIC,
        "protocol": protocol,
        "rows": [
            {
                "arm": row.name,
                "setting": row.setting,
                "seeds": len(row.parts),
                "mean": {part: _mean(row, part, audit.seeds) for part in SLICES},
                "sd": {part: _spread(row, part) for part in SLICES},
                "llm_minus_this": compared.get(row.name, {}),
            }
            for row in rows
        ],
    }


def _mean(row: Row, part: str, seeds: int) -> float | None:
    return number(float(np.mean(row.by_seed(part, seeds))))


def _spread(row: Row, part: str) -> float | None:
    """The standard deviation over seeds; None of fewer than two."""
    values = row.by_seed(part, 1)
    return number(float(np.std(values, ddof=1))) if values.size > 1 else None


def render(facts: Mapping[str, Any]) -> str:
    """audit.json as a Markdown table."""
    lines = []
    for row in facts["rows"]:
        line = {"row": row["arm"], "setting": row["setting"]}
        line |= {part.replace("_", " "): row["mean"][part] for part in SLICES}
        for part in TESTED:
            cell = row["llm_minus_this"].get(part)
            line[f"llm - this, {part.replace('_', ' ')}"] = _cell(cell) if cell else ""
        lines.append(line)
    protocol = facts["protocol"]
    title = (
        f"{facts['data']}, {protocol['recommender']}, {protocol['teacher']} through "
        f"{protocol['method']}: test NDCG@10, {protocol['seeds']} seeds; in brackets p over seeds, "
        "over users (Holm)"
    )
    return f"{title}\n\n{markdown_table(lines)}\n"


def _cell(cell: Mapping[str, float | None]) -> str:
    if cell["difference"] is None:
        return "-"

    def text(p: float | None) -> str:
        if p is None:
            return "-"
        return "< .001" if p < 0.001 else f"{p:.3f}"

    return f"{cell['difference']:+.4f} ({text(cell['p_seeds_holm'])}, {text(cell['p_users_holm'])})"
