"""When can an LLM be believed, and what does the gate do about it? A world where it is known.

    python benchmarks/believe.py --out=DIR

A simulated world (slgr_jax/simulate): the teacher is right more often about users with a short
history and about unpopular items. No guidance, global distillation, the paper's gate and the
calibrated one, each at three lambdas, and a teacher that tosses a coin. Nothing is tuned: the
teacher was asked about validation items, which so cannot tell lambdas apart. Prints test NDCG@10
of all and writes, of the smallest lambda, DIR/alpha.png (alpha beside the truth),
DIR/reliability.png (is alpha a probability?) and DIR/collapse.png (mean alpha while training).

Then the same teacher, and the coin, write a list of 30 items for each user, and what is listed is
drawn against anything else, or against hard negatives: what the run without guidance would
recommend.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags as absl_flags

from slgr_jax.cli import flags

absl_flags.DEFINE_string("out", None, "folder for the world, the runs and the pictures")
absl_flags.DEFINE_integer("users", 2000, "users of the world", lower_bound=50)
absl_flags.DEFINE_integer("epochs", 40, "epochs of every run", lower_bound=2)

_SHARED = {"batch_size": 1024, "lr": 0.1, "eval_every": 2, "patience": 0, "pooled_auc": False}
_GUIDED = {"guidance": "pairwise", "teacher": "pairs"}
LAMBDAS = (1.0, 0.3, 0.1)
_CALIBRATED = {"gate": "calibrated", "gate_inputs": "history,popularity"}
ARMS = {
    "no guidance": {},
    "global": _GUIDED | {"gate": "constant", "guidance_loss": "logistic"},
    "paper": _GUIDED | {"gate": "paper", "guidance_loss": "logistic"},
    "calibrated": _GUIDED | _CALIBRATED,
    "global, coin": _GUIDED | {"gate": "constant", "guidance_loss": "logistic", "teacher": "coin"},
    "calibrated, coin": _GUIDED | _CALIBRATED | {"teacher": "coin"},
}
LISTED = 30
LAMBDAS_OF_LISTS = (0.1, 1.0, 10.0)
_LISTS = {"guidance": "pairwise", "teacher": "lists"}
_RIVALS = {"hard_negatives": 100, "gate_inputs": "reference,history,popularity,teacher"}
ARMS_OF_LISTS = {
    "global": _LISTS | {"gate": "constant"},
    "calibrated": _LISTS | {"gate": "calibrated"},
    "hard_negatives": _LISTS | {"gate": "calibrated"} | _RIVALS,
    "global, coin": _LISTS | {"gate": "constant", "teacher": "coin_lists"},
    "calibrated, coin": _LISTS | {"gate": "calibrated", "teacher": "coin_lists"},
    "hard negatives, coin": _LISTS | {"gate": "calibrated", "teacher": "coin_lists"} | _RIVALS,
}


def main(_: list[str]) -> None:
    from slgr_jax import config, testing
    from slgr_jax.evaluation.results import MAIN_SLICES
    from slgr_jax.reports import calibration, tables
    from slgr_jax.reports.run_evaluation import evaluate_run
    from slgr_jax.serving import load
    from slgr_jax.training import loop

    given = flags.FLAGS
    out = pathlib.Path(given.out)
    made = testing.WorldConfig(n_users=given.users, known_per_valid=4)
    world = testing.simulate(made)
    dataset = testing.write(world, out / "world", lists=LISTED)
    coin = testing.simulate(dataclasses.replace(made, reliability=testing.TEACHERS["shuffled"]))
    testing.write_pairs(coin, dataset, "coin")
    lists = coin.lists(np.random.default_rng(0), LISTED)
    testing.write_lists(coin, dataset, "coin_lists", *lists)

    def trained(name: str, knobs: Mapping[str, Any], weight: float, workdir: str) -> dict[str, Any]:
        own = {**knobs, "lambda": weight} if knobs else {}
        run = config.make_run(str(dataset.path), workdir, epochs=given.epochs, **_SHARED, **own)
        loop.train(run)
        found = evaluate_run(workdir, name).parts["test"].slices
        scores = {key: found[key]["ndcg@10"] for key in MAIN_SLICES[:3]}
        return {"run": name, "lambda": weight if knobs else None, **scores}

    rows, alphas, bins = [], {}, {}
    said = world.judge(np.random.default_rng(0), "test", per_positive=4)
    for name, knobs in ARMS.items():
        for weight in LAMBDAS if knobs else (0.0,):
            workdir = str(out / f"{name} {weight:g}".replace(", ", " ").replace(" ", "_"))
            rows.append(trained(name, knobs, weight, workdir))
        text = (pathlib.Path(workdir) / "log.jsonl").read_text(encoding="utf-8")
        log = [json.loads(line) for line in text.splitlines()]
        if knobs:
            alphas[name] = [(row["epoch"], row["train/alpha"]) for row in log]
        if name in ("paper", "calibrated"):
            alpha = load(workdir).believe(said.users, said.items, said.margin)
            bins[name] = calibration.reliability_bins(alpha, said.right)
            if name == "calibrated":
                calibration.draw_alpha_against_truth(
                    *(alpha, said.reliability, world.history[said.users]),
                    *(world.popularity[said.items].mean(axis=1), out / "alpha.png"),
                    title="The calibrated gate's alpha beside how often the teacher is right",
                )
                error = calibration.calibration_error(alpha, said.reliability)
                own = calibration.auc(alpha, said.right)
                best = calibration.auc(said.reliability, said.right)
                print(
                    f"calibrated gate: calibration error {error:.3f} against the true "
                    f"reliability; AUC {own:.3f}, of the true reliability {best:.3f}"
                )
    calibration.draw_reliability(bins, out / "reliability.png")
    draw_collapse(alphas, out / "collapse.png")
    print(tables.markdown_table(rows))
    print(f"lists of {LISTED} items:")
    plain, rows = str(out / "no_guidance_0"), rows[:1]
    for name, knobs in ARMS_OF_LISTS.items():
        for weight in LAMBDAS_OF_LISTS:
            workdir = str(out / f"lists {name} {weight:g}".replace(", ", " ").replace(" ", "_"))
            own = knobs | {"reference_runs": plain} if "hard_negatives" in knobs else knobs
            rows.append(trained(name, own, weight, workdir))
    print(tables.markdown_table(rows))


def draw_collapse(alphas: dict[str, list[tuple[int, float]]], path: pathlib.Path) -> None:
    """Mean alpha of the drawn preferences by epoch, a line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from slgr_jax.reports.plots import COLORS

    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (name, points) in zip(COLORS, alphas.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color=color, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean alpha")
    axes.set_ylim(-0.02, 1.05)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How far each gate believes, while it trains", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=(), own=("out", "users", "epochs"), required=("out",))
