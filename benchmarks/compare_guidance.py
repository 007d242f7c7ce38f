"""Does guidance help? No guidance, global distillation and gates on one data set, many seeds.

    python benchmarks/compare_guidance.py --data=DATA --teacher=NAME --out=DIR

1. `none` is tuned over --tune_lr x --tune_l2 on validation (seed 0); all arms take its lr.
2. Every guided arm is tuned on validation (seed 0) over --tune_lambda at the l2 of `none`, then
   over --tune_l2 at the best lambda: with the defaults as many runs as `none` had.
3. Every arm is trained with --seeds seeds and meets the test part once.

Arms: none; global = constant gate, alpha 1; rule; paper. Called again it goes on where it was.
Beside them, without tests: most popular and EASE (tuned on validation).
Writes DIR/report.md, DIR/report.json and DIR/report.png. Knobs of a run (--batch_size, ...)
apply to every arm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from slgr_jax import config, flags
from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError, listing

ARMS = {
    "none": {},
    "global": {"gate": "constant", "alpha": 1.0},
    "rule": {"gate": "rule"},
    "paper": {"gate": "paper"},
}
SLICES = ("overall", "cold_users", "warm_users", "tail_items", "head_items")

absl_flags.DEFINE_string("data", None, "dataset directory (launch/prepare.py)")
absl_flags.DEFINE_string("out", None, "directory of the runs and the report")
absl_flags.DEFINE_list("arms", list(ARMS), f"arms to compare: {', '.join(ARMS)}")
absl_flags.DEFINE_integer("seeds", 5, "seeds per arm", lower_bound=2)
absl_flags.DEFINE_list("tune_lr", ["0.05", "0.1"], "learning rates tried for `none`")
absl_flags.DEFINE_list("tune_l2", ["0.005", "0.01", "0.02", "0.05"], "L2 tried for every arm")
absl_flags.DEFINE_list("tune_lambda", ["0.03", "0.1", "0.3", "1"], "lambda tried for each gate")
OWN = ("data", "out", "arms", "seeds", "tune_lr", "tune_l2", "tune_lambda")


def arm_config(base: RunConfig, arm: str, teacher: str, workdir: pathlib.Path) -> RunConfig:
    """`base` as the named arm, in `workdir`."""
    guidance = {"guidance": "none", "teacher": ""}
    if arm != "none":
        guidance = {"guidance": "selective", "teacher": teacher}
    return dataclasses.replace(
        base,
        workdir=str(workdir),
        guidance=dataclasses.replace(base.guidance, **guidance),
        gate=dataclasses.replace(base.gate, **ARMS[arm]),
    )


def with_knobs(base: RunConfig, **knobs: Any) -> RunConfig:
    """`base` with lr, l2, weight or seed changed."""
    sections: dict[str, dict[str, Any]] = {}
    homes = {"lr": "optimizer", "l2": "optimizer", "weight": "guidance", "seed": "train"}
    for name, value in knobs.items():
        sections.setdefault(homes[name], {})[name] = value
    return dataclasses.replace(
        base,
        **{home: dataclasses.replace(getattr(base, home), **new) for home, new in sections.items()},
    )


def fit(run: RunConfig) -> float:
    """Train (or finish) a run, its lines into RUN/train.log; its best validation metric."""
    from slgr_jax import train

    root = pathlib.Path(run.workdir)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "train.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        outcome = train.train(run)
    if outcome.status != "finished":
        raise SystemExit("interrupted; call again to go on")
    if outcome.best_metric is None:
        raise ConfigError("--data has no validation part: nothing to tune on")
    print(f"  {root.name}: {outcome.best_metric:.4f} (epoch {outcome.best_epoch})", flush=True)
    return outcome.best_metric


def tune(base: RunConfig, out: pathlib.Path, arms: Sequence[str], teacher: str) -> dict[str, Any]:
    """The validation grids and what won in each: {arm: {"tried": [...], "chosen": {...}}}."""
    given = flags.FLAGS
    found: dict[str, Any] = {}
    l2s, weights = [float(x) for x in given.tune_l2], [float(x) for x in given.tune_lambda]

    def grid(arm: str, knobs: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        tried = []
        for one in knobs:
            name = "_".join([arm, *(f"{key}{value:g}" for key, value in one.items())])
            run = with_knobs(arm_config(base, arm, teacher, out / "tune" / name), **one, seed=0)
            tried.append(one | {"valid": fit(run)})
        return tried

    def best(tried: Sequence[dict[str, float]]) -> dict[str, float]:
        chosen = max(tried, key=lambda row: row["valid"])
        return {key: value for key, value in chosen.items() if key != "valid"}

    print("tuning none", flush=True)
    tried = grid("none", [{"lr": float(lr), "l2": l2} for lr in given.tune_lr for l2 in l2s])
    shared = best(tried)
    found["none"] = {"tried": tried, "chosen": shared}
    for arm in (one for one in arms if one != "none"):
        print(f"tuning {arm}", flush=True)
        tried = grid(arm, [shared | {"weight": weight} for weight in weights])
        weight = best(tried)["weight"]
        tried += grid(
            arm, [shared | {"l2": l2, "weight": weight} for l2 in l2s if l2 != shared["l2"]]
        )
        found[arm] = {"tried": tried, "chosen": best(tried)}
    return found


def measure(
    base: RunConfig, out: pathlib.Path, tuned: dict[str, Any], teacher: str, seeds: int
) -> dict[str, list[pathlib.Path]]:
    """Train and test every arm and seed: arm -> run directories with metrics and per-user rows."""
    from slgr_jax import report, runs

    found: dict[str, list[pathlib.Path]] = {}
    for arm, result in tuned.items():
        print(f"seeds of {arm} at {result['chosen']}", flush=True)
        for seed in range(seeds):
            workdir = out / "runs" / f"{arm}_seed{seed}"
            run = with_knobs(arm_config(base, arm, teacher, workdir), **result["chosen"], seed=seed)
            done = workdir / report.PER_USER
            if not (done.is_file() and runs.read_config(str(workdir)) == run):
                fit(run)
                runs.evaluate_run(str(workdir), workdir.name)
            found.setdefault(arm, []).append(workdir)
    return found


def baseline_directories(
    base: RunConfig, out: pathlib.Path, taken: Sequence[str]
) -> dict[str, list[pathlib.Path]]:
    """Most popular and, where it takes seconds, EASE: name -> directory of its per-user rows."""
    from slgr_jax import baselines
    from slgr_jax.config import BaselineConfig
    from slgr_jax.data import dataset

    data = dataset.load(base.data, verify=base.train.verify_checksums)
    made = baselines.evaluate_baselines(BaselineConfig(), base, data, out, taken=taken)
    return {one.label: [pathlib.Path(one.workdir)] for one in made}


def user_values(workdirs: Sequence[pathlib.Path], slice_name: str, metric: str) -> Any:
    """[seeds, users] test values of one slice, users in one order."""
    import numpy as np
    import pyarrow.parquet as pq

    from slgr_jax import report

    kind = slice_name.removesuffix("_items") if slice_name.endswith("_items") else "all"
    rows = []
    for workdir in workdirs:
        table = pq.read_table(workdir / report.PER_USER)
        keep = np.array(table["part"].to_pylist()) == "test"
        keep &= np.array(table["items"].to_pylist()) == kind
        cold = table["cold"].to_numpy()
        if slice_name in ("cold_users", "warm_users"):
            keep &= cold == (slice_name == "cold_users")
        order = np.argsort(np.array(table["user"].to_pylist())[keep])
        rows.append(table[metric].to_numpy()[keep][order])
    return np.stack(rows)


def summarize(found: dict[str, list[pathlib.Path]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One object per arm, slice and metric; p-values against none and against global.

    p_seeds: paired t-test over seeds. p_users: paired t-test over users, each user's metric
    averaged over seeds. Both Holm-corrected over all rows of a metric.
    """
    import numpy as np

    from slgr_jax.stats import holm, paired_t

    rows = []
    for metric in metrics:
        values = {
            (arm, name): user_values(dirs, name, metric)
            for arm, dirs in found.items()
            for name in SLICES
        }
        own = []
        for (arm, name), x in values.items():
            seeds = x.mean(axis=1)
            row: dict[str, Any] = {
                "arm": arm,
                "slice": name,
                "metric": metric,
                "users": x.shape[1],
                "seeds": x.shape[0],
                "mean": float(seeds.mean()),
                "sd": float(seeds.std(ddof=1)) if seeds.size > 1 else None,
            }
            for other in ("none", "global"):
                if other in found and arm in ARMS and arm not in (other, "none"):
                    y = values[other, name]
                    gain = float(seeds.mean() - y.mean())
                    row[f"vs_{other}"] = gain
                    row[f"relative_vs_{other}"] = gain / y.mean() if y.mean() else None
                    row[f"p_seeds_vs_{other}"] = paired_t(seeds - y.mean(axis=1))
                    row[f"p_users_vs_{other}"] = paired_t(x.mean(axis=0) - y.mean(axis=0))
            own.append(row)
        for key in ("p_seeds_vs_none", "p_users_vs_none", "p_seeds_vs_global", "p_users_vs_global"):
            tested = [row for row in own if key in row]
            corrected = holm([row[key] for row in tested])
            for row, p in zip(tested, corrected, strict=True):
                row[key] = None if np.isnan(p) else p
        rows += own
    return rows


def render(rows: Sequence[dict[str, Any]], tuned: dict[str, Any], title: str) -> str:
    """The report as Markdown."""
    from slgr_jax import report

    lines = [f"# {title}", "", "## Tuned on validation (seed 0)", ""]
    for arm, result in tuned.items():
        tried = "; ".join(
            ", ".join(f"{'lambda' if k == 'weight' else k} {v:.4g}" for k, v in row.items())
            for row in result["tried"]
        )
        chosen = {("lambda" if k == "weight" else k): v for k, v in result["chosen"].items()}
        lines.append(f"- {arm}: {tried}. Chosen: {chosen}")
    lines += ["", "## Test, mean over users; p: paired t, Holm over the rows of a metric", ""]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        table = []
        for name in SLICES:
            for row in (r for r in rows if (r["metric"], r["slice"]) == (metric, name)):
                shown = {"slice": name, "arm": row["arm"], "users": row["users"]}
                shown |= {metric: row["mean"], "sd": row["sd"]}
                for other in ("none", "global"):
                    shown[f"vs {other}"] = row.get(f"vs_{other}")
                    shown[f"p seeds {other}"] = row.get(f"p_seeds_vs_{other}")
                    shown[f"p users {other}"] = row.get(f"p_users_vs_{other}")
                table.append(shown)
        lines += [report.markdown_table(table), ""]
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], metric: str, path: pathlib.Path, title: str) -> None:
    """Bars of `metric` by slice and arm, with the standard deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from slgr_jax.picture import COLORS

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(2.2 * len(SLICES), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(SLICES)), SLICES, strict=True):
        mine = [r for r in rows if (r["metric"], r["slice"]) == (metric, name)]
        axes.bar(
            [row["arm"] for row in mine],
            [row["mean"] for row in mine],
            yerr=[row["sd"] or 0.0 for row in mine],
            color=[COLORS[arm % len(COLORS)] for arm in range(len(arms))],
            capsize=3,
        )
        axes.set_title(f"{name.replace('_', ' ')} (n = {mine[0]['users']})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: test {metric}, mean and spread over seeds", fontsize=10)
    figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
    given = flags.FLAGS
    unknown = [arm for arm in given.arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"--arms: {listing(unknown)} is not one of: {listing(ARMS)}")
    teacher, out = given.teacher, pathlib.Path(given.out)
    if not teacher and set(given.arms) != {"none"}:
        raise ConfigError("missing --teacher; without one only --arms=none can be measured")
    given.teacher = ""  # `none` takes no teacher; arms that do are given it by arm_config
    base = flags.run_config_from_flags(given.data, "")
    arms = list(dict.fromkeys(["none", *given.arms]))
    tuned = tune(base, out, arms, teacher)
    found = measure(base, out, tuned, teacher, given.seeds)
    found |= baseline_directories(base, out, tuple(found))
    ks = base.evaluation.ks
    rows = summarize(found, [f"{name}@{k}" for name in ("ndcg", "recall") for k in ks])
    title = json.loads((pathlib.Path(given.data) / "manifest.json").read_text())["name"]
    title += f", teacher {teacher}" if teacher else ""
    text = render(rows, tuned, title)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(
        json.dumps({"tuned": tuned, "rows": rows}, indent=2) + "\n", encoding="utf-8"
    )
    draw(rows, base.train.early_stop_metric, out / "report.png", title)
    print(text)


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(config.sections().values()),
        own=OWN,
        required=("data", "out"),
    )
