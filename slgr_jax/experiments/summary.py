"""Numbers of a comparison: means, intervals, paired tests with correction, cost, gates, a verdict.

A number that is undefined is None (null in JSON), never 0.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.evaluation.significance import holm, paired_t, t_interval
from slgr_jax.experiments import results

Row = dict[str, Any]
# (backbone, arm) -> the run directories, seed by seed
Runs = Mapping[tuple[str, str], Sequence[pathlib.Path]]
REFERENCES = ("none", "global")
CELL_SLICES = ("overall", "cold_users", "tail_items")
LEVEL = 0.05


def number(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number."""
    return None if value is None or not math.isfinite(value) else float(value)


class Cell:
    """The runs of one arm of one backbone.

    Attributes:
      metrics: what is compared, greater is better.
      slices: names, as the first run has them.
    """

    def __init__(self, workdirs: Sequence[pathlib.Path], ks: Sequence[int]) -> None:
        self._slices = [results.slices(workdir) for workdir in workdirs]
        self.metrics = results.metrics_of(self._slices[0], ks)
        self.slices = list(self._slices[0])
        users = [results.Users(workdir, self.metrics) for workdir in workdirs]
        self._users = {
            (name, metric): _mean_of_users([of_run.of(name, metric) for of_run in users])
            for name in results.MAIN_SLICES
            for metric in self.metrics
        }

    def seeds(self, name: str, metric: str) -> np.ndarray:
        """[seeds] values of a slice; NaN where undefined."""
        values = [of_run.get(name, {}).get(metric) for of_run in self._slices]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def users(self, name: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and values of a slice's users, the mean over seeds; None where there are none."""
        return self._users.get((name, metric))

    def count(self, name: str, metric: str) -> int | None:
        """How many a slice's metric is over: users, or labelled rows."""
        key = "rows_n" if metric.startswith("rows_") else "n"
        count = self._slices[0].get(name, {}).get(key)
        return None if count is None else int(count)


def _mean_of_users(
    runs: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and values of users, the mean over the runs of an arm."""
    first = runs[0]
    if first is None:
        return None
    values = []
    for run in runs:
        assert run is not None, "runs of one arm write the same files"
        assert np.array_equal(run[0], first[0]), "runs of one arm evaluate the same users"
        values.append(run[1])
    return first[0], np.mean(values, axis=0)


def compare(cell: Cell, other: Cell, name: str, metric: str) -> Row | None:
    """`cell` against `other` on a slice: difference over seeds, its interval, p-values.

    p_seeds: paired t-test over seeds. p_users: over users, the mean over seeds of each, and the
    interval of that difference, low_users to high_users; None in bins, and where fewer than two
    users have a value.
    """
    a, b = cell.seeds(name, metric), other.seeds(name, metric)
    d = a - b
    if np.isnan(d).any():
        return None

    low, high = t_interval(d)
    base = float(np.mean(b))
    row = {
        "difference": float(np.mean(d)),
        "low": number(low),
        "high": number(high),
        "relative": float(np.mean(d)) / base if base else None,
    }
    if name not in results.MAIN_SLICES:
        return row

    row["p_seeds"] = number(paired_t(d))
    row |= dict.fromkeys(("p_users", "low_users", "high_users"))
    users, users_other = cell.users(name, metric), other.users(name, metric)
    if users is not None and users_other is not None:
        # Users of both arms, and where they are in each.
        _, places, places_other = np.intersect1d(users[0], users_other[0], return_indices=True)
        between = users[1][places] - users_other[1][places_other]
        between = between[~np.isnan(between)]
        row["p_users"] = number(paired_t(between))
        row["low_users"], row["high_users"] = map(number, t_interval(between))
    return row


def rows_of(
    runs: Runs,
    ks: Sequence[int],
    primary: Mapping[str, str],
    focus: str = "",
    controls: Sequence[str] = (),
) -> list[Row]:
    """One object per backbone, arm, slice and metric.

    Args:
      runs: run directories, every arm with the same seeds in the same order.
      ks: cut-offs.
      primary: backbone -> the metric that it was tuned on.
      focus: the arm that is also tested against `controls`.
      controls: arms.
    """
    rows: list[Row] = []
    for backbone in dict.fromkeys(backbone for backbone, _ in runs):
        cells = {arm: Cell(workdirs, ks) for arm, workdirs in _arms(runs, backbone).items()}
        against = {arm: _references(arm, focus, controls) for arm in cells}
        first = next(iter(cells.values()))
        for metric, name, arm in itertools.product(first.metrics, first.slices, cells):
            row = _row(cells[arm], name, metric)
            if row is None:
                continue
            for other in against[arm]:
                if other in cells:
                    row[f"vs_{other}"] = compare(cells[arm], cells[other], name, metric)
            labels = {"backbone": backbone, "arm": arm, "slice": name, "metric": metric}
            rows.append({**labels, "primary": metric == primary[backbone], **row})
    _correct(rows)
    return rows


def _arms(runs: Runs, backbone: str) -> dict[str, Sequence[pathlib.Path]]:
    return {arm: workdirs for (name, arm), workdirs in runs.items() if name == backbone}


def _references(arm: str, focus: str, controls: Sequence[str]) -> list[str]:
    """The arms that `arm` is tested against."""
    if arm == "none":
        return []
    others = [reference for reference in REFERENCES if reference != arm]
    return [*others, *controls] if arm == focus else others


def _row(cell: Cell, name: str, metric: str) -> Row | None:
    """Mean and interval; None of a slice that nobody is in."""
    seeds, count = cell.seeds(name, metric), cell.count(name, metric)
    if not count:
        return None

    defined = not np.isnan(seeds).any()
    low, high = t_interval(seeds) if defined else (math.nan, math.nan)
    row: Row = {
        "mean": float(np.mean(seeds)) if defined else None,
        "low": number(low),
        "high": number(high),
        "sd": float(np.std(seeds, ddof=1)) if defined and seeds.size > 1 else None,
        "seeds": int(seeds.size),
    }
    users = cell.users(name, metric)
    if metric.startswith("rows_"):
        row["rows"] = count
        row["users"] = None if users is None else int(np.sum(~np.isnan(users[1])))
    else:
        row["users"] = count
    return row


def _correct(rows: Sequence[Row]) -> None:
    """Add Holm's p-values: over all tests of the primary metrics, and over those of each other
    metric; tests over seeds and tests over users are two families."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        family = "primary" if row["primary"] else row["metric"]
        tests = [
            test
            for name, test in row.items()
            if name.startswith("vs_") and test and "p_seeds" in test
        ]
        families.setdefault(family, []).extend(tests)

    for tests in families.values():
        for key in ("p_seeds", "p_users"):
            raw = [math.nan if test[key] is None else test[key] for test in tests]
            for test, p in zip(tests, holm(raw), strict=True):
                test[f"{key}_holm"] = number(p)


# --------------------------------------------------------------------- cost and gates


def costs(runs: Runs) -> list[Row]:
    """Mean time of training by backbone and arm, and the fastest epoch's speed beside `none`'s;
    how many seeds were best at their last epoch."""
    out: list[Row] = []
    speeds: dict[tuple[str, str], float | None] = {}
    for (backbone, arm), workdirs in runs.items():
        outcomes = [results.outcome(workdir) or {} for workdir in workdirs]
        speed = max((rate for rate in map(results.speed, workdirs) if rate), default=None)
        speeds[backbone, arm] = speed
        base = speeds.get((backbone, "none"))
        out.append(
            {
                "backbone": backbone,
                "arm": arm,
                "seconds": _mean(outcome.get("seconds") for outcome in outcomes),
                "cpu_seconds": _mean(outcome.get("cpu_seconds") for outcome in outcomes),
                "epochs": _mean(outcome.get("epoch") for outcome in outcomes),
                "best_at_the_end": sum(map(_best_at_the_end, outcomes)),
                "triples_per_s": speed,
                "speed_vs_none": speed / base if speed and base else None,
            }
        )
    return out


def _best_at_the_end(outcome: Mapping[str, Any]) -> bool:
    """Whether the last epoch was the best so far: more might have been better."""
    return outcome.get("best_epoch") is not None and outcome["best_epoch"] == outcome["epoch"]


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def gates(runs: Runs) -> list[Row]:
    """What evaluation says of each arm's gate, over all seeds; no object without a gate.

    Slices are over the known pairs of all seeds; so are reliability bins, in order of alpha.
    """
    out: list[Row] = []
    for (backbone, arm), workdirs in runs.items():
        of_seeds = [gate for gate in map(results.gate, workdirs) if gate]
        if not of_seeds:
            continue

        by_slice: dict[str, list[Mapping[str, Any]]] = {}
        for gate in of_seeds:
            for name, values in gate.get("slices", {}).items():
                by_slice.setdefault(name, []).append(values)
        bins = [gate.get("reliability") or () for gate in of_seeds]

        out.append(
            {
                "backbone": backbone,
                "arm": arm,
                "auc": _mean(gate.get("auc") for gate in of_seeds),
                "calibration_error": _mean(gate.get("calibration_error") for gate in of_seeds),
                "slices": {name: _pooled(values) for name, values in by_slice.items()},
                "reliability": _merged(list(itertools.chain(*bins)), max(map(len, bins))),
            }
        )
    return out


def _pooled(of_seeds: Sequence[Mapping[str, Any]]) -> Row:
    """A slice's alpha and right, the mean over the known pairs of all seeds; n counts them."""
    out: Row = {"n": sum(int(values.get("n") or 0) for values in of_seeds)}
    for key in ("alpha", "right"):
        defined = [values for values in of_seeds if values.get("n") and values.get(key) is not None]
        weights = [values["n"] for values in defined]
        means = [values[key] for values in defined]
        out[key] = float(np.average(means, weights=weights)) if defined else None
    return out


def _merged(bins: Sequence[Mapping[str, Any]], count: int) -> list[Row]:
    """Bins of several seeds as `count` bins of about as many pairs, by ascending alpha."""
    bins = [bin_ for bin_ in bins if bin_["n"] and bin_["right"] is not None]
    bins = sorted(bins, key=lambda bin_: bin_["alpha"])
    if not bins:
        return []

    # A bin goes where its middle pair is among all pairs, cut into `count` equal parts.
    n = np.array([bin_["n"] for bin_ in bins], np.float64)
    middle = np.cumsum(n) - n / 2
    place = np.minimum((middle / n.sum() * count).astype(int), count - 1)

    out = []
    for wanted in np.unique(place):
        inside = [bins[i] for i in np.flatnonzero(place == wanted)]
        weights = n[place == wanted]
        out.append(
            {
                "low": min(bin_["low"] for bin_ in inside),
                "high": max(bin_["high"] for bin_ in inside),
                "alpha": float(np.average([bin_["alpha"] for bin_ in inside], weights=weights)),
                "right": float(np.average([bin_["right"] for bin_ in inside], weights=weights)),
                "n": int(weights.sum()),
            }
        )
    return out


def alphas(runs: Runs) -> list[Row]:
    """Mean alpha of training by epoch, of the first seed of each arm that has one."""
    out: list[Row] = []
    for (backbone, arm), workdirs in runs.items():
        log = results.log(workdirs[0])
        records = [record for record in log if record.get("train/alpha") is not None]
        if records:
            epochs = [int(record["epoch"]) for record in records]
            values = [float(record["train/alpha"]) for record in records]
            out.append({"backbone": backbone, "arm": arm, "epochs": epochs, "alpha": values})
    return out


# --------------------------------------------------------------------- the verdict


def verdict(rows: Sequence[Row], focus: str) -> Row | None:
    """In how many cells (backbone x overall, cold users, tail items) `focus` holds its own.

    at_least: the 95 % interval of the difference over seeds reaches 0 or above. better, worse: the
    difference has that sign and p < .05 after correction, over seeds, over users, over both.
    holds_overall: backbones in which `focus` is at least as good as every reference overall.
    wins_cold_or_tail: backbones in which it is better, over seeds or users, than every reference on
    cold users or on tail items.
    """
    of_focus = [
        row
        for row in rows
        if row["primary"] and row["arm"] == focus and row["slice"] in CELL_SLICES
    ]
    if not of_focus or focus == "none":
        return None

    others = dict.fromkeys(
        name.removeprefix("vs_") for row in of_focus for name in row if name.startswith("vs_")
    )
    against = {other: _counts(of_focus, other) for other in others}
    references = [against[other] for other in others if other in REFERENCES]
    backbones = list(dict.fromkeys(row["backbone"] for row in of_focus))
    return {
        "focus": focus,
        "against": against,
        "backbones": len(backbones),
        "holds_overall": [
            backbone
            for backbone in backbones
            if all(f"{backbone} overall" in counts["at_least"] for counts in references)
        ],
        "wins_cold_or_tail": [
            backbone
            for backbone in backbones
            if all(_wins_cold_or_tail(backbone, counts) for counts in references)
        ],
    }


def _counts(of_focus: Sequence[Row], other: str) -> Row:
    """The cells in which the focus is at least as good as `other`, better, worse."""
    tests = {
        f"{row['backbone']} {row['slice']}": row[f"vs_{other}"]
        for row in of_focus
        if row.get(f"vs_{other}")
    }
    counts: Row = {
        "cells": len(tests),
        "at_least": [
            cell for cell, test in tests.items() if test["high"] is not None and test["high"] >= 0
        ],
    }
    for word, sign in (("better", 1), ("worse", -1)):
        for over in ("seeds", "users"):
            counts[f"{word}_over_{over}"] = [
                cell for cell, test in tests.items() if _significant(test, over, sign)
            ]
        over_users = counts[f"{word}_over_users"]
        counts[f"{word}_over_both"] = [
            cell for cell in counts[f"{word}_over_seeds"] if cell in over_users
        ]
    return counts


def _significant(test: Row, over: str, sign: int) -> bool:
    """Whether the difference has that sign and p < .05 after correction."""
    p = test[f"p_{over}_holm"]
    return p is not None and p < LEVEL and sign * test["difference"] > 0


def _wins_cold_or_tail(backbone: str, counts: Row) -> bool:
    better = {*counts["better_over_seeds"], *counts["better_over_users"]}
    return bool({f"{backbone} cold_users", f"{backbone} tail_items"} & better)
