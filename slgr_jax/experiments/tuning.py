"""Settings by validation: every arm of every backbone gets the same number of runs, of seed 0.

1. `none` of a backbone, and every arm that reads vectors: every point of its grid; where the best
   is at an end of it, one step further; then, at the best, other bases (a width, negatives, a
   loss), each alone, then what helped together, then the grid's points next to it.
2. A guided arm: every lambda at the settings of `none`, one step further from an end; at the best,
   if that leaves a run, its variant (`ComparisonPlan.variants`: another guidance loss).
3. Then, at its best lambda and variant, other points of the grid, those most like the best of
   `none` first, until it has had as many runs as `none` or there is no other point.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.config import ModelConfig, RunConfig
from slgr_jax.errors import ConfigError
from slgr_jax.experiments.arms import AMOUNTS, UNTUNED, ComparisonPlan, Settings

# What a run came to: best_metric, best_epoch, error, ...; see `pool`.
Train = Callable[[Sequence[RunConfig]], list[dict[str, Any]]]
Trial = tuple[str, str, Settings]  # backbone, arm, what is tried of it
# {backbone: {arm: {"tried": [...], "chosen": {...}}}}
Tuned = dict[str, dict[str, dict[str, Any]]]

# Knobs that go further than what was tried, at most so many times; shares stay below 1.
_NUMBERS = ("lr", "l2", "dropout", "lambda", "hard_share")
_SHARES = ("dropout", "hard_share")
_STEPS_FURTHER = 2


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


def tune(plan: ComparisonPlan, train: Train) -> Tuned:
    """Tune every arm that is tuned; copy settings to those that are matched.

    Raises:
      ConfigError: there is no validation part, or every setting of an arm diverged.
    """
    tuned: Tuned = {backbone: {} for backbone in plan.backbones}
    trials: list[Trial] = []
    for backbone in plan.backbones:
        drawn = first_points(plan.grids[backbone], plan.tune_runs)
        trials += [(backbone, arm, point) for arm in plan.searched_arms for point in drawn]
    _try(plan, train, trials, tuned)
    most = dict.fromkeys(plan.backbones, plan.tune_runs or math.inf)
    _widen(plan, train, plan.searched_arms, tuned, most)
    _try_bases(plan, train, tuned, most)

    budgets = {backbone: len(tuned[backbone]["none"]["tried"]) for backbone in plan.backbones}
    guided = [arm for arm in plan.tuned_arms if arm not in plan.searched_arms]
    if guided:
        _try(plan, train, _lambda_trials(plan, guided, tuned), tuned)
        _widen(plan, train, guided, tuned, budgets)
        _try(plan, train, _variant_trials(plan, guided, tuned, budgets), tuned)
        _try(plan, train, _near_trials(plan, guided, tuned, budgets), tuned)

    for backbone, arm in itertools.product(plan.backbones, plan.arms):
        if arm in UNTUNED:
            tuned[backbone][arm] = _matched(plan, backbone, arm, tuned[backbone][plan.matched])
    return tuned


def _lambda_trials(plan: ComparisonPlan, guided: Sequence[str], tuned: Tuned) -> list[Trial]:
    """Every lambda at the settings of `none`."""
    return [
        (backbone, arm, {**tuned[backbone]["none"]["chosen"], **amount})
        for backbone in plan.backbones
        for arm in guided
        for amount in plan.amounts(arm)
    ]


def _left(of_arm: Mapping[str, Any], most: float) -> float:
    """Runs that an arm may have still."""
    return max(most - len(of_arm["tried"]), 0)


def _widen(
    plan: ComparisonPlan,
    train: Train,
    arms: Sequence[str],
    tuned: Tuned,
    most: Mapping[str, float],
) -> None:
    """One step further where the best is an end of what was tried, and once more.

    Args:
      most: backbone -> runs of an arm.
    """
    for _ in range(_STEPS_FURTHER if plan.widen else 0):
        trials: list[Trial] = []
        for backbone, arm in itertools.product(plan.backbones, arms):
            of_arm = tuned[backbone][arm]
            steps = [
                (backbone, arm, {**of_arm["chosen"], name: further(name, values, end)})
                for name, values, end in _ends(arm, of_arm)
                if name in _NUMBERS and further(name, values, end) is not None
            ]
            trials += steps[: int(min(_left(of_arm, most[backbone]), len(steps)))]
        if not trials:
            return
        _try(plan, train, trials, tuned)


def further(name: str, values: Sequence[float], end: float) -> float | None:
    """The value behind an end of `values`, as far as the one before it; None where there is none.

    Args:
      values: ascending, two or more; 0 among them is left out.
    """
    positive = [value for value in values if value > 0]
    if end <= 0 or len(positive) < 2:
        return None
    neighbour = positive[-2] if end == positive[-1] else positive[1]
    step = float(f"{end * end / neighbour:.4g}")
    return step if name not in _SHARES or step < 1 else None


def _try_bases(plan: ComparisonPlan, train: Train, tuned: Tuned, most: Mapping[str, float]) -> None:
    """`none` on each other base at its best point, then on all that helped together; then, where
    one is chosen, the two points of the grid next to it. Other searched arms likewise."""
    searched = list(itertools.product(plan.backbones, plan.searched_arms))
    starts = {(backbone, arm): dict(tuned[backbone][arm]["chosen"]) for backbone, arm in searched}
    bests = {(backbone, arm): _best(tuned[backbone][arm]) for backbone, arm in searched}
    alone: list[Trial] = []
    for backbone, arm in searched:
        bases = plan.bases.get(backbone, ())
        bases = bases[: int(min(_left(tuned[backbone][arm], most[backbone]), len(bases)))]
        alone += [(backbone, arm, {**starts[backbone, arm], **base}) for base in bases]
    if not alone:
        return
    _try(plan, train, alone, tuned)

    together: list[Trial] = []
    for backbone, arm in searched:
        start, of_arm = starts[backbone, arm], tuned[backbone][arm]
        helped = [
            base
            for base in plan.bases.get(backbone, ())
            for row in of_arm["tried"]
            if row.items() >= {**start, **base}.items()
            and (row["valid"] or -math.inf) > bests[backbone, arm]
        ]
        joined = dict(start)
        for base in helped:
            joined |= base
        if len(helped) > 1 and _left(of_arm, most[backbone]):
            together.append((backbone, arm, joined))
    if together:
        _try(plan, train, together, tuned)

    beside: list[Trial] = []
    for backbone, arm in searched:
        of_arm = tuned[backbone][arm]
        grid = _grid(plan, backbone, of_arm)
        base = {name: value for name, value in of_arm["chosen"].items() if name not in grid}
        count = int(min(_left(of_arm, most[backbone]), 2)) if base else 0
        points_beside = near(grid, starts[backbone, arm], count) if count else []
        beside += [(backbone, arm, {**point, **base}) for point in points_beside]
    if beside:
        _try(plan, train, beside, tuned)


def _best(of_arm: Mapping[str, Any]) -> float:
    return max(row["valid"] for row in of_arm["tried"] if row["valid"] is not None)


def _grid(
    plan: ComparisonPlan, backbone: str, of_arm: Mapping[str, Any]
) -> dict[str, tuple[float, ...]]:
    """The backbone's grid, with what an arm tried beyond it."""
    out: dict[str, tuple[float, ...]] = {}
    for name, values in plan.grids[backbone].items():
        beyond = {row[name] for row in of_arm["tried"]} - set(values)
        out[name] = tuple(sorted({*values, *beyond})) if beyond else values
    return out


def _variant_trials(
    plan: ComparisonPlan, guided: Sequence[str], tuned: Tuned, budgets: Mapping[str, int]
) -> list[Trial]:
    """The variants of each arm at its best lambda, where a run is left."""
    return [
        (backbone, arm, {**tuned[backbone][arm]["chosen"], **variant})
        for backbone, arm in itertools.product(plan.backbones, guided)
        if len(tuned[backbone][arm]["tried"]) < budgets[backbone]
        for variant in plan.variants(arm)
    ]


def _near_trials(
    plan: ComparisonPlan, guided: Sequence[str], tuned: Tuned, budgets: Mapping[str, int]
) -> list[Trial]:
    """Points of the grid near the best of `none`, with each arm's lambda and variant."""
    trials: list[Trial] = []
    for backbone, arm in itertools.product(plan.backbones, guided):
        of_arm = tuned[backbone][arm]
        grid = _grid(plan, backbone, tuned[backbone]["none"])
        left = max(budgets[backbone] - len(of_arm["tried"]), 0)
        kept = {name: value for name, value in of_arm["chosen"].items() if name not in grid}
        points_left = near(grid, tuned[backbone]["none"]["chosen"], left)
        trials += [(backbone, arm, {**point, **kept}) for point in points_left]
    return trials


def _try(plan: ComparisonPlan, train: Train, trials: Sequence[Trial], tuned: Tuned) -> None:
    """Train the trials; add them to what was tried, and choose anew."""
    runs = [_trial_run(plan, trial, tuned) for trial in trials]
    for (backbone, arm, settings), outcome in zip(trials, train(runs), strict=True):
        of_arm = tuned[backbone].setdefault(arm, {"tried": [], "chosen": {}})
        if outcome["best_metric"] is None and not outcome["error"]:
            raise ConfigError(f"{plan.data} has no validation part: nothing to tune on")
        row = {**settings, "valid": outcome["best_metric"], "epoch": outcome["best_epoch"]}
        of_arm["tried"].append(row)

        # A run that diverged has no value: it is tried, and cannot be chosen.
        finished = [row for row in of_arm["tried"] if row["valid"] is not None]
        if finished:
            best = max(finished, key=lambda row: row["valid"])
            of_arm["chosen"] = {k: v for k, v in best.items() if k not in ("valid", "epoch")}

    for backbone, arm, _ in trials:
        if not tuned[backbone][arm]["chosen"]:
            raise ConfigError(
                f"every setting of arm {arm} of {backbone} diverged; lower --tune_lr or "
                "--tune_lambda"
            )


def _trial_run(plan: ComparisonPlan, trial: Trial, tuned: Tuned) -> RunConfig:
    backbone, arm, settings = trial
    workdir = plan.tune_dir(backbone, arm, settings)
    unguided = tuned[backbone].get("none")
    if arm == "none" or not unguided:
        return plan.config(backbone, arm, settings, workdir)
    reference = plan.run_dir(backbone, "none", unguided, 0)
    return plan.config(backbone, arm, settings, workdir, reference=reference)


def _matched(
    plan: ComparisonPlan, backbone: str, arm: str, tuned: Mapping[str, Any]
) -> dict[str, Any]:
    """A control with the settings of the arm that it is matched to, tuned as `tuned` says."""
    settings = dict(tuned["chosen"])
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


def at_an_end(arm: str, tuned: Mapping[str, Any]) -> list[str]:
    """What an arm chose that is the least or the greatest of what it tried: `lambda 0.3, the
    greatest`. A wider grid may choose otherwise. 0 is the end of a range, not of a grid.

    Args:
      tuned: what was tried and chosen; of guided arms the amount alone has a grid of its own.
    """
    return [
        f"{name} {end:.4g}, the {'greatest' if end == values[-1] else 'least'}"
        for name, values, end in _ends(arm, tuned)
    ]


def _ends(arm: str, of_arm: Mapping[str, Any]) -> list[tuple[str, list[float], float]]:
    """(knob, what was tried of it in ascending order, what was chosen) where that is an end."""
    amount = AMOUNTS.get(arm, ("lambda", ()))[0]
    whole = amount not in of_arm["chosen"]
    ends = []
    for name, value in of_arm["chosen"].items():
        if isinstance(value, str) or not (whole or name == amount):
            continue
        tried = {row[name] for row in of_arm["tried"] if name in row}
        if name == "dim":  # rows without it have the default
            tried.add(ModelConfig.dim)
        if len(tried) > 1 and value in (min(tried), max(tried)) and value != 0:
            ends.append((name, sorted(tried), value))
    return ends


def as_text(settings: Settings) -> str:
    """`lr 0.1, lambda 0.3`."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else format(value, '.4g')}"
        for key, value in settings.items()
    )
