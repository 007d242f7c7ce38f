"""Plans and run directories of comparisons, for the tests of slgr_jax/experiments."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax import config
from slgr_jax.experiments import arms, results

# What leaves the learning rate alone to search of `none`.
GIVEN = {"l2": 0.01, "dropout": 0.0, "dim": 8, "loss": "bpr", "negatives": "uniform"}
USERS, SEEDS = 24, 4
KINDS = {"overall": "all", "cold_users": "all", "warm_users": "all", "tail_items": "tail",
         "head_items": "head"}  # fmt: skip
PRIMARY = {"mf": "ndcg@10", "dcnv2": "rows_auc"}


def plan_of(path, *, asked=("none", "global", "paper"), controls=(), own_arms=None, **more):
    own_arms = own_arms or {}
    chosen, matched, focus = arms.choose(asked, controls, "", "", own_arms)
    fields = {
        "knobs": {},
        "teacher": "llm",
        "backbones": ("mf",),
        "seeds": 3,
        "options": config.CompareConfig(trials=8, widen=False, base=False),
        "data": str(path / "data"),
        "out": path / "out",
    } | more
    return arms.ComparisonPlan(
        arms=chosen, matched=matched, focus=focus, own_arms=own_arms, **fields
    )


def write_run(root, seed, gain, *, clicks=False, undefined=False):
    """Files of an evaluated run with random values; returns slice -> values of its users."""
    rng = np.random.default_rng([seed, int(1000 * gain)])
    base = np.random.default_rng(0).random((3, USERS))
    kinds, cold = np.repeat(["all", "tail", "head"], USERS), np.tile(np.arange(USERS) < 9, 3)
    values = (base + gain + 0.1 * rng.normal(size=(3, USERS))).reshape(-1)
    metric = "auc" if clicks else "ndcg@10"
    shuffled = rng.permutation(values.size)  # rows come in any order
    columns = {
        "part": np.repeat("test", 3 * USERS), "items": kinds, "cold": cold, metric: values,
        "user": np.tile([f"u{u}" for u in range(USERS)], 3),
    }  # fmt: skip
    table = pa.table({name: column[shuffled] for name, column in columns.items()})
    valid = table.set_column(0, "part", pa.array(["valid"] * table.num_rows))
    root.mkdir(parents=True)
    name = results.ROWS_PER_USER if clicks else results.PER_USER
    pq.write_table(pa.concat_tables([valid, table]), root / name)
    by_slice = {}
    for slice_name, kind in KINDS.items():
        keep = kinds == kind
        if slice_name in ("cold_users", "warm_users"):
            keep &= cold == (slice_name == "cold_users")
        by_slice[slice_name] = values[keep]
    means = {
        name: {"n": of_users.size, metric: of_users.mean()} for name, of_users in by_slice.items()
    }
    means["history<=5"] = {"n": 5, metric: float(values[:5].mean())}
    means["popularity>9"] = {"n": 0, metric: None}
    if undefined:
        means["tail_items"][metric] = None
    results.write_json(root / results.METRICS, {} if clicks else {"test": means})
    results.write_json(root / results.ROWS, means if clicks else {})
    return by_slice


def pick(rows, backbone, arm, name, metric):
    wanted = (backbone, arm, name, metric)
    (row,) = [r for r in rows if (r["backbone"], r["arm"], r["slice"], r["metric"]) == wanted]
    return row
