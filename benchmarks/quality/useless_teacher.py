"""What does a teacher that knows nothing cost on a shop's log: a fixed recipe, --guidance=auto.

    python benchmarks/quality/useless_teacher.py --out=DIR [--seeds=1]

The log is made here: 2,000 customers of 12 tastes, 600 items by a power law, a year of purchases of
which 28 % repeat an earlier one of the same customer. The teacher scores 25 random items of each
customer at random. Prints NDCG@10 of validation and test: without guidance, through the
calibrated gate at lambda 0.3, everything believed at lambda 0.3, and as auto leaves it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import pathlib

import numpy as np

import slgr_jax as sl

USERS, ITEMS, TASTES, ASKED, REPEATS = 2000, 600, 12, 25, 0.28
RECIPES = {
    "none": {},
    "calibrated": {"guidance": "pairwise", "gate": "calibrated", "lambda_": 0.3},
    "global": {"guidance": "pairwise", "gate": "constant", "lambda_": 0.3},
    "auto": {"guidance": "auto"},
}


def write_log(path: pathlib.Path, rng: np.random.Generator) -> None:
    """customer, sku, date: a row a purchase."""
    popular = 1.0 / (rng.permutation(ITEMS) + 3.0)
    item_taste, taste_of = rng.integers(0, TASTES, ITEMS), rng.integers(0, TASTES, USERS)
    start = datetime.date(2025, 1, 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("customer", "sku", "date"))
        for user in range(USERS):
            weight = popular * np.where(item_taste == taste_of[user], 8.0, 1.0)
            first = rng.choice(ITEMS, 4 + rng.poisson(rng.pareto(2.0) * 8), p=weight / weight.sum())
            first = first[np.sort(np.unique(first, return_index=True)[1])]
            again = rng.choice(first, rng.binomial(round(len(first) / (1 - REPEATS)), REPEATS))
            days = np.sort(rng.integers(0, 365, first.size + again.size))
            for item, day in zip((*first, *again), days, strict=True):
                rows.writerow((f"c{user}", f"s{item}", start + datetime.timedelta(int(day))))


def write_answers(path: pathlib.Path, rng: np.random.Generator) -> None:
    """user, item, score: random scores of random items."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("user", "item", "score"))
        for user in range(USERS):
            for item in rng.choice(ITEMS, ASKED, replace=False):
                rows.writerow((f"c{user}", f"s{item}", round(float(rng.random()), 3)))


def main() -> None:
    """Make the log, train by every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    out: pathlib.Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    if not data.exists():
        rng = np.random.default_rng(0)
        write_log(out / "orders.csv", rng)
        write_answers(out / "answers.csv", rng)
        columns = {"user_column": "customer", "item_column": "sku", "time_column": "date"}
        manifest = sl.prepare(source="csv", input=out / "orders.csv", out=data, **columns)
        print(manifest.counts)
        sl.import_teacher(data, out / "answers.csv", "random", unknown="drop")

    print(f"{'seed':>4}  {'recipe':12}{'valid':>8}{'test':>8}")
    for seed in range(arguments.seeds):
        for name, knobs in RECIPES.items():
            workdir = out / f"{name}_{seed}"
            teacher = {"teacher": "random"} if knobs else {}
            sl.train(data, workdir, seed=seed, **knobs, **teacher)
            (run,) = sl.evaluate(workdir, baselines="none").runs
            values = [run.parts[part].slices["overall"]["ndcg@10"] for part in ("valid", "test")]
            print(f"{seed:4}  {name:12}" + "".join(f"{value:8.4f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
