"""Numbers of a comparison: means, intervals, paired tests with correction, cost, gates, a verdict.

A number that is undefined is None (null in JSON), never 0.
"""

from __future__ import annotations

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
            (name, metric): _mean_of_users([one.of(name, metric) for one in users])
            for name in results.MAIN_SLICES
            for metric in self.metrics
        }

    def seeds(self, name: str, metric: str) -> np.ndarray:
        """[seeds] values of a slice; NaN where undefined."""
        found = [one.get(name, {}).get(metric) for one in self._slices]
        return np.array([np.nan if value is None else value for value in found], np.float64)

    def users(self, name: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and values of a slice's users, the mean over seeds; None where there are none."""
        return self._users.get((name, metric))

    def count(self, name: str, metric: str) -> int | None:
        """What a slice's metric is over: users, or labelled rows."""
        found = self._slices[0].get(name, {}).get("rows_n" if metric.startswith("rows_") else "n")
        return None if found is None else int(found)


def _mean_of_users(
    found: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> tuple[np.ndarray, np.ndarray] | None:
    first = found[0]
    if first is None:
        return None
    values = []
    for one in found:
        assert one is not None, "runs of one arm write the same files"
        assert np.array_equal(one[0], first[0]), "runs of one arm evaluate the same users"
        values.append(one[1])
    return first[0], np.mean(values, axis=0)


def compare(mine: Cell, other: Cell, name: str, metric: str) -> Row | None:
    """One arm against another on a slice: difference over seeds, its interval, p-values.

    p_seeds: paired t-test over seeds. p_users: over users, the mean over seeds of each; None in
    bins, and where fewer than two users have a value.
    """
    a, b = mine.seeds(name, metric), other.seeds(name, metric)
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
    row["p_users"] = None
    users, theirs = mine.users(name, metric), other.users(name, metric)
    if users is not None and theirs is not None:
        _, at, at_other = np.intersect1d(users[0], theirs[0], return_indices=True)
        between = users[1][at] - theirs[1][at_other]
        row["p_users"] = number(paired_t(between[~np.isnan(between)]))
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
        cells = {arm: Cell(dirs, ks) for (own, arm), dirs in runs.items() if own == backbone}
        first = next(iter(cells.values()))
        for metric in first.metrics:
            for name in first.slices:
                for arm, cell in cells.items():
                    row = _row(cell, name, metric)
                    if row is None:
                        continue
                    against = [] if arm == "none" else [r for r in REFERENCES if r != arm]
                    against += [one for one in controls if arm == focus]
                    for other in against:
                        if other in cells:
                            row[f"vs_{other}"] = compare(cell, cells[other], name, metric)
                    who = {"backbone": backbone, "arm": arm, "slice": name, "metric": metric}
                    rows.append({**who, "primary": metric == primary[backbone], **row})
    _correct(rows)
    return rows


def _row(cell: Cell, name: str, metric: str) -> Row | None:
    """Mean and interval; None of a slice that nobody is in."""
    seeds, count = cell.seeds(name, metric), cell.count(name, metric)
    if not count:
        return None
    there = not np.isnan(seeds).any()
    low, high = t_interval(seeds) if there else (math.nan, math.nan)
    row: Row = {
        "mean": float(np.mean(seeds)) if there else None,
        "low": number(low),
        "high": number(high),
        "sd": float(np.std(seeds, ddof=1)) if there and seeds.size > 1 else None,
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
        tests = [v for k, v in row.items() if k.startswith("vs_") and v and "p_seeds" in v]
        families.setdefault(family, []).extend(tests)
    for tests in families.values():
        for key in ("p_seeds", "p_users"):
            raw = [math.nan if test[key] is None else test[key] for test in tests]
            for test, p in zip(tests, holm(raw), strict=True):
                test[f"{key}_holm"] = number(p)


# --------------------------------------------------------------------- cost and gates


def costs(runs: Runs) -> list[Row]:
    """Mean time of training by backbone and arm, and the fastest epoch's speed beside `none`'s."""
    out: list[Row] = []
    speeds: dict[tuple[str, str], float | None] = {}
    for key, dirs in runs.items():
        found = [results.outcome(workdir) or {} for workdir in dirs]
        rates = [rate for rate in map(results.speed, dirs) if rate]
        speeds[key] = max(rates, default=None)
        base, mine = speeds.get((key[0], "none")), speeds[key]
        out.append(
            {
                "backbone": key[0],
                "arm": key[1],
                "seconds": _mean(one.get("seconds") for one in found),
                "cpu_seconds": _mean(one.get("cpu_seconds") for one in found),
                "epochs": _mean(one.get("epoch") for one in found),
                "triples_per_s": mine,
                "speed_vs_none": mine / base if mine and base else None,
            }
        )
    return out


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def gates(runs: Runs) -> list[Row]:
    """What evaluation says of each arm's gate, over all seeds; no object without a gate.

    Slices are over the known pairs of all seeds; so are reliability bins, in order of alpha.
    """
    out: list[Row] = []
    for (backbone, arm), dirs in runs.items():
        found = [one for one in map(results.gate, dirs) if one]
        if not found:
            continue
        names = dict.fromkeys(name for one in found for name in one.get("slices", {}))
        slices = {
            name: _pooled([one["slices"][name] for one in found if name in one.get("slices", {})])
            for name in names
        }
        bins = [bin_ for one in found for bin_ in one.get("reliability") or ()]
        out.append(
            {
                "backbone": backbone,
                "arm": arm,
                "auc": _mean(one.get("auc") for one in found),
                "calibration_error": _mean(one.get("calibration_error") for one in found),
                "slices": slices,
                "reliability": _merged(bins, max(len(o.get("reliability") or ()) for o in found)),
            }
        )
    return out


def _pooled(found: Sequence[Mapping[str, Any]]) -> Row:
    """A slice's alpha and right, the mean over the known pairs of all seeds; n counts them."""
    out: Row = {"n": sum(int(one.get("n") or 0) for one in found)}
    for key in ("alpha", "right"):
        there = [one for one in found if one.get("n") and one.get(key) is not None]
        weights = [one["n"] for one in there]
        values = [one[key] for one in there]
        out[key] = float(np.average(values, weights=weights)) if there else None
    return out


def _merged(bins: Sequence[Mapping[str, Any]], count: int) -> list[Row]:
    """Bins of several seeds as `count` bins of about as many pairs, by ascending alpha."""
    bins = sorted((one for one in bins if one["n"] and one["right"] is not None),
                  key=lambda one: one["alpha"])  # fmt: skip
    if not bins:
        return []
    n = np.array([one["n"] for one in bins], np.float64)
    middle = np.cumsum(n) - n / 2
    place = np.minimum((middle / n.sum() * count).astype(int), count - 1)
    out = []
    for one in np.unique(place):
        mine = [bin_ for bin_, at in zip(bins, place, strict=True) if at == one]
        weight = n[place == one]
        out.append(
            {
                "low": min(bin_["low"] for bin_ in mine),
                "high": max(bin_["high"] for bin_ in mine),
                "alpha": float(np.average([bin_["alpha"] for bin_ in mine], weights=weight)),
                "right": float(np.average([bin_["right"] for bin_ in mine], weights=weight)),
                "n": int(weight.sum()),
            }
        )
    return out


def alphas(runs: Runs) -> list[Row]:
    """Mean alpha of training by epoch, of the first seed of each arm that has one."""
    out: list[Row] = []
    for (backbone, arm), dirs in runs.items():
        records = [r for r in results.log(dirs[0]) if r.get("train/alpha") is not None]
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
    mine = [r for r in rows if r["primary"] and r["arm"] == focus and r["slice"] in CELL_SLICES]
    if not mine or focus == "none":
        return None
    out: Row = {"focus": focus, "against": {}}
    others = dict.fromkeys(k.removeprefix("vs_") for r in mine for k in r if k.startswith("vs_"))
    for other in others:
        found = [(r, r.get(f"vs_{other}")) for r in mine]
        cells = [(f"{r['backbone']} {r['slice']}", v) for r, v in found if v]
        told: Row = {"cells": len(cells)}
        told["at_least"] = [c for c, v in cells if v["high"] is not None and v["high"] >= 0]
        for word, sign in (("better", 1), ("worse", -1)):
            for over in ("seeds", "users"):
                told[f"{word}_over_{over}"] = [
                    c
                    for c, v in cells
                    if (p := v[f"p_{over}_holm"]) is not None
                    and p < LEVEL
                    and sign * v["difference"] > 0
                ]
            told[f"{word}_over_both"] = [
                c for c in told[f"{word}_over_seeds"] if c in told[f"{word}_over_users"]
            ]
        out["against"][other] = told
    references = [told for other, told in out["against"].items() if other in REFERENCES]
    backbones = list(dict.fromkeys(row["backbone"] for row in mine))
    out["backbones"] = len(backbones)
    out["holds_overall"] = [
        b for b in backbones if all(f"{b} overall" in told["at_least"] for told in references)
    ]
    out["wins_cold_or_tail"] = [
        b
        for b in backbones
        if all(
            {f"{b} cold_users", f"{b} tail_items"}
            & {*told["better_over_seeds"], *told["better_over_users"]}
            for told in references
        )
    ]
    return out
