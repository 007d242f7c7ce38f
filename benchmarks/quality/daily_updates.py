"""A day more of data: go on with yesterday's run, train anew, or leave it as it is?

    python benchmarks/quality/daily_updates.py --data=RUN/data --out=DIR

DATA is what quickstart prepared (any dataset with times will do). Its rows in order of time are
cut into a first day, --first_day of them, and --days more. The first day is prepared and trained;
of each further day but the last, which is only predicted,

    update     prepare --append, then train --init_from the run of the day before, --update_epochs
    update, reset    the same in a chain of its own, with --init_slots=reset and --reset_epochs
    anew       train from nothing on the same data, until validation stops it
    unchanged  the run of the day before (of the chain `update`)
    day 0      the first day's run

rank the next day's items for the users of the next day: NDCG@10, everything that is known of the
user masked, over two groups: users with a training history in the first day's data, whom every
run knows, and users with one today (who is not known to a run gets its most popular items).
Differences are over (user, day) pairs, each its mean over --seeds. Writes DIR/daily.json and
DIR/daily.md and prints the latter.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import Any

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob

ARMS = ("update", "update, reset", "anew", "unchanged", "day 0")
GROUPS = ("known on day 0", "known today")
K = 10


@dataclasses.dataclass(frozen=True)
class DailyConfig(Section):
    """What is cut into days, and how it is trained."""

    data: str = knob("", "dataset directory with times")
    out: str = knob("", "folder for the datasets, the runs and the tables; must not exist")
    first_day: float = knob(0.8, "share of the rows, by time, of the first day", above=0, below=1)
    days: int = knob(5, "further days, equal in rows; the last is only predicted", minimum=2)
    seeds: int = knob(3, "runs of each", minimum=1)
    update_epochs: int = knob(5, "most epochs of an update", minimum=1)
    reset_epochs: int = knob(20, "most epochs of an update with --init_slots=reset", minimum=1)
    patience: int = knob(10, "validations without a better one, of training anew", minimum=1)
    backbone: str = knob("mf", "recommender")


def write_days(config: DailyConfig) -> list[pathlib.Path]:
    """A CSV file a day, the first first, and each item's title beside them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv

    from slgr_jax.data import dataset
    from slgr_jax.errors import InputError

    data = dataset.load(config.data)
    parts = [data.train, data.valid, data.test]
    if data.train.timestamps is None:
        raise InputError(f"{config.data} has no times, by which to cut days")
    users = np.concatenate([part.users for part in parts])
    items = np.concatenate([part.items for part in parts])
    times = np.concatenate([part.timestamps for part in parts])
    order = np.lexsort((items, users, times))

    root = pathlib.Path(config.out)
    root.mkdir(parents=True)
    edges = np.linspace(config.first_day, 1, config.days + 1) * order.size
    edges = np.concatenate([[0], edges]).astype(int)
    paths = []
    for day, (low, high) in enumerate(itertools.pairwise(edges)):
        rows = order[low:high]
        table = pa.table(
            {
                "user": data.user_ids.take(users[rows]),
                "item": data.items["item_id"].combine_chunks().take(items[rows]),
                "timestamp": times[rows] // 10**6,
            }
        )
        paths.append(root / f"day{day}.csv")
        pa.csv.write_csv(table, paths[-1])
    return paths


class Ranker:
    """A run's best items for users by their ids, its most popular ones for whom it does not know.

    Args:
      workdir: of the run.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        import slgr_jax

        run = slgr_jax.load(workdir)
        vectors, data = run.vectors(), run.dataset
        self.items = data.items["item_id"].to_pylist()
        self._place = {item: place for place, item in enumerate(self.items)}
        self._vectors = vectors
        self._popularity = data.popularity
        trained = data.history > 0
        self.users = {
            user: index for index, user in enumerate(data.user_ids.to_pylist()) if trained[index]
        }

    def ndcg(self, user: str, relevant: set[str], seen: set[str]) -> float:
        """NDCG@K of the items that are relevant, without those that were seen."""
        import numpy as np

        scores = self._popularity.astype(np.float64)
        if (index := self.users.get(user)) is not None:
            scores = self._vectors.items @ self._vectors.users[index]
        scores[[self._place[item] for item in seen if item in self._place]] = -np.inf
        top = np.argsort(-scores, kind="stable")[:K]
        gains = [self.items[item] in relevant for item in top]
        discounts = 1 / np.log2(np.arange(2, K + 2))
        return float(gains @ discounts[: len(gains)] / discounts[: min(K, len(relevant))].sum())


def read_rows(path: pathlib.Path) -> dict[str, set[str]]:
    """User -> the items of a day."""
    import csv

    rows: dict[str, set[str]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["user"], set()).add(row["item"])
    return rows


def measure(config: DailyConfig) -> dict[str, Any]:
    """Prepare, train and rank, day by day: seconds, and NDCG by group, arm, (day, user), seed."""
    import time

    import slgr_jax

    paths, root = write_days(config), pathlib.Path(config.out)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> Any:
        begin = time.monotonic()
        result = work()
        seconds.setdefault(name, []).append(time.monotonic() - begin)
        return result

    def train(name: str, data: pathlib.Path, workdir: pathlib.Path, **knobs: Any) -> None:
        outcome = timed(
            f"train {name}",
            lambda: slgr_jax.train(data, workdir, backbone=config.backbone, **knobs),
        )
        seconds.setdefault(f"epochs {name}", []).append(outcome.epoch)

    ratio = {"source": "csv", "split": "ratio"}  # as quickstart prepares it
    day0 = root / "data0"
    timed("prepare day 0", lambda: slgr_jax.prepare(input=paths[0], out=day0, **ratio))
    for seed in range(config.seeds):
        train("day 0", day0, root / f"update0-{seed}", seed=seed, patience=config.patience)

    seen = read_rows(paths[0])
    results: dict[str, dict[str, dict[str, list[float]]]] = {group: {} for group in GROUPS}
    for day in range(1, config.days):
        data, before = root / f"data{day}", root / f"data{day - 1}"
        new = {"source": "csv", "input": paths[day]}
        timed("append", lambda n=new, d=data, b=before: slgr_jax.prepare(**n, out=d, append=b))
        for user, items in read_rows(paths[day]).items():
            seen.setdefault(user, set()).update(items)
        tomorrow = read_rows(paths[day + 1])
        for seed in range(config.seeds):
            today = {name: root / f"{name}{day}-{seed}" for name in ("update", "reset", "anew")}
            chains = {
                "update": (config.update_epochs, "keep"),
                "reset": (config.reset_epochs, "reset"),
            }
            for name, (epochs, slots) in chains.items():
                before_it = root / f"{name if day > 1 else 'update'}{day - 1}-{seed}"
                knobs = {"init_from": before_it, "init_slots": slots, "epochs": epochs}
                train(name, data, today[name], seed=seed, **knobs)
            train("anew", data, today["anew"], seed=seed, patience=config.patience)
            older = [root / f"update{earlier}-{seed}" for earlier in (day - 1, 0)]
            runs = dict(zip(ARMS, [*today.values(), *older], strict=True))
            rank(results, {arm: Ranker(run) for arm, run in runs.items()}, day, tomorrow, seen)
    return {"seconds": seconds, "ndcg": results}


def rank(
    results: dict[str, dict[str, dict[str, list[float]]]],
    rankers: dict[str, Ranker],
    day: int,
    tomorrow: dict[str, set[str]],
    seen: dict[str, set[str]],
) -> None:
    """Add the NDCG of every arm, for every user of tomorrow whom today's data know."""
    for user, items in tomorrow.items():
        known = seen.get(user, set())
        relevant = items - known
        if user not in rankers["anew"].users or not relevant:
            continue
        for arm, ranker in rankers.items():
            value = ranker.ndcg(user, relevant, known)
            groups = GROUPS if user in rankers["day 0"].users else GROUPS[1:]
            for group in groups:
                by_pair = results[group].setdefault(arm, {})
                by_pair.setdefault(f"{day} {user}", []).append(value)


def table(measured: dict[str, Any]) -> str:
    """The tables as Markdown."""
    import numpy as np
    from scipy import stats

    lines = ["| NDCG@10 of the next day | " + " | ".join(GROUPS) + " |", "|---|---:|---:|"]
    means = {
        group: {
            arm: np.array([np.mean(values) for values in by_pair.values()])
            for arm, by_pair in measured["ndcg"][group].items()
        }
        for group in GROUPS
    }
    counts = [f"{means[group]['update'].size}" for group in GROUPS]
    lines.append("| (user, day) pairs | " + " | ".join(counts) + " |")
    for arm in ARMS:
        cells = [f"{means[group][arm].mean():.4f}" for group in GROUPS]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for arm in ARMS[1:]:
        cells = []
        for group in GROUPS:
            difference = means[group]["update"] - means[group][arm]
            p = stats.ttest_1samp(difference, 0).pvalue
            cells.append(f"{difference.mean():+.4f}, p {p:.3f}")
        lines.append(f"| update - {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| seconds, epochs | mean | least | most |", "|---|---:|---:|---:|"]
    for name, values in measured["seconds"].items():
        lines.append(f"| {name} | {np.mean(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Measure, and write the tables."""
    import json

    config = flags.section_from_flags(DailyConfig)
    measured = measure(config)
    root = pathlib.Path(config.out)
    text = table(measured)
    (root / "daily.json").write_text(json.dumps(measured, indent=1) + "\n")
    (root / "daily.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    flags.run(main, usage=__doc__ or "", sections=[DailyConfig], required=["data", "out"])
