"""Settings by validation: every arm of every backbone gets the same number of runs, of seed 0.

1. `none` of a backbone: every point of its grid.
2. A guided arm: every lambda at the settings of `none`; at the best, if that leaves a run, its
   variant (`arms.Plan.variants`: another guidance loss).
3. Then, at its best lambda and variant, other points of the grid, those most like the best of
   `none` first, until it has had as many runs as `none`.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.experiments.arms import UNTUNED, Plan, Settings

# What a run came to: best_metric, best_epoch, error, ...; see `pool`.
Train = Callable[[Sequence[RunConfig]], list[dict[str, Any]]]
# {backbone: {arm: {"tried": [...], "chosen": {...}}}}
Tuned = dict[str, dict[str, dict[str, Any]]]


def points(grid: Mapping[str, tuple[float, ...]]) -> list[dict[str, float]]:
    """Every combination of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def first_points(grid: Mapping[str, tuple[float, ...]], budget: int) -> list[dict[str, float]]:
    """`budget` points of the grid, all if that is 0 or too many; drawn with a fixed seed."""
    every = points(grid)
    if not 0 < budget < len(every):
        return every
    chosen = np.random.default_rng(0).choice(len(every), budget, replace=False)
    return [every[i] for i in sorted(chosen)]


def near(
    grid: Mapping[str, tuple[float, ...]], settings: Settings, count: int
) -> list[dict[str, float]]:
    """The `count` points of the grid most like `settings`, that point itself left out.

    Fewer knobs that differ come first, then the later knobs of the grid, then nearer values.
    """

    def unlike(point: Mapping[str, float]) -> tuple[Any, ...]:
        steps = [abs(grid[k].index(point[k]) - grid[k].index(settings[k])) for k in grid]
        return sum(map(bool, steps)), *map(bool, steps), *steps

    return sorted(points(grid), key=unlike)[1 : 1 + count]


def tune(plan: Plan, train: Train) -> Tuned:
    """Tune every arm that is tuned; copy settings to those that are matched.

    Raises:
      ConfigError: there is no validation part, or every setting of an arm diverged.
    """
    found: Tuned = {backbone: {} for backbone in plan.backbones}
    budgets = {}
    asked: list[tuple[str, str, Settings]] = []
    for backbone in plan.backbones:
        tried = first_points(plan.grids[backbone], plan.tune_runs)
        budgets[backbone] = len(tried)
        asked += [(backbone, "none", point) for point in tried]
    _try(plan, train, asked, found)
    guided = [arm for arm in plan.tuned_arms if arm != "none"]
    if guided:
        asked = [
            (backbone, arm, {**found[backbone]["none"]["chosen"], "lambda": weight})
            for backbone in plan.backbones
            for arm in guided
            for weight in plan.lambdas
        ]
        _try(plan, train, asked, found)
        each = list(itertools.product(plan.backbones, guided))
        asked = [
            (backbone, arm, {**found[backbone][arm]["chosen"], **variant})
            for backbone, arm in each
            if len(found[backbone][arm]["tried"]) < budgets[backbone]
            for variant in plan.variants(arm)
        ]
        _try(plan, train, asked, found)
        asked = []
        for backbone, arm in each:
            mine = found[backbone][arm]
            left = budgets[backbone] - len(mine["tried"])
            more = near(plan.grids[backbone], found[backbone]["none"]["chosen"], max(left, 0))
            kept = {k: v for k, v in mine["chosen"].items() if k not in plan.grids[backbone]}
            asked += [(backbone, arm, {**point, **kept}) for point in more]
        _try(plan, train, asked, found)
    for backbone, arm in itertools.product(plan.backbones, plan.arms):
        if arm in UNTUNED:
            found[backbone][arm] = _matched(plan, backbone, arm, found[backbone][plan.matched])
    return found


def _try(
    plan: Plan, train: Train, asked: Sequence[tuple[str, str, Settings]], found: Tuned
) -> None:
    """Train what is asked for; add it to what was tried, and choose anew."""

    def run(backbone: str, arm: str, settings: Settings) -> RunConfig:
        where = plan.tune_dir(backbone, arm, settings)
        plain = found[backbone].get("none")
        reference = plan.run_dir(backbone, "none", plain, 0) if arm != "none" and plain else None
        return plan.config(backbone, arm, settings, where, reference=reference)

    runs = [run(*one) for one in asked]
    for (backbone, arm, settings), outcome in zip(asked, train(runs), strict=True):
        mine = found[backbone].setdefault(arm, {"tried": [], "chosen": {}})
        if outcome["best_metric"] is None and not outcome["error"]:
            raise ConfigError(f"{plan.data} has no validation part: nothing to tune on")
        row = {**settings, "valid": outcome["best_metric"], "epoch": outcome["best_epoch"]}
        mine["tried"].append(row)
        best = [row for row in mine["tried"] if row["valid"] is not None]
        if best:
            top = max(best, key=lambda row: row["valid"])
            mine["chosen"] = {k: v for k, v in top.items() if k not in ("valid", "epoch")}
    for backbone, arm, _ in asked:
        if not found[backbone][arm]["chosen"]:
            raise ConfigError(
                f"every setting of arm {arm} of {backbone} diverged; lower --tune_lr or "
                "--tune_lambda"
            )


def _matched(plan: Plan, backbone: str, arm: str, like: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(like["chosen"])
    if arm == "constant":
        settings["alpha"] = mean_alpha(plan.tune_dir(backbone, plan.matched, settings))
    return {"tried": [], "chosen": settings, "settings_of": plan.matched}


def mean_alpha(workdir: pathlib.Path) -> float:
    """The mean alpha of a run's training in its best epoch, from its log.

    Raises:
      ConfigError: the log has none.
    """
    from slgr_jax.experiments import results

    outcome = results.outcome(workdir) or {}
    for record in results.log(workdir):
        if record.get("epoch") == outcome.get("best_epoch") and "train/alpha" in record:
            return min(max(float(record["train/alpha"]), 0.0), 1.0)
    raise ConfigError(
        f"{workdir}/log.jsonl has no train/alpha of epoch {outcome.get('best_epoch')}: the control "
        "`constant` needs it; leave it out of --controls"
    )


def at_an_end(arm: str, found: Mapping[str, Any]) -> list[str]:
    """What an arm chose that is the least or the greatest of what it tried: `lambda 0.3, the
    greatest`. A wider grid may choose otherwise. 0 is the end of a range, not of a grid.

    Args:
      found: what was tried and chosen; of guided arms lambda alone has a grid of its own.
    """
    ends = []
    for name, value in found["chosen"].items():
        if isinstance(value, str) or not (arm == "none" or name == "lambda"):
            continue
        tried = {row[name] for row in found["tried"] if name in row}
        if len(tried) > 1 and value in (min(tried), max(tried)) and value != 0:
            which = "greatest" if value == max(tried) else "least"
            ends.append(f"{name} {value:.4g}, the {which}")
    return ends


def as_text(settings: Settings) -> str:
    """`lr 0.1, lambda 0.3`."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else format(value, '.4g')}"
        for key, value in settings.items()
    )
