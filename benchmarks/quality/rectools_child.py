"""Train one RecTools model on atomic files; `peer_quality.py` runs it where RecTools is installed.

    python rectools_child.py FOLDER MODEL JSON

FOLDER/rows/rows.inter holds all interactions. The last one of each user by time is test, the one
before it validation; both are ranked over the whole catalogue without what the user has seen
before. Every `eval_step` epochs validation is ranked; the best of them is what test is read at,
with validation added to the histories. Prints one line of JSON: results of that epoch.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as lightning
from rectools import models
from rectools.dataset import Dataset


def main() -> None:
    folder, name, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    frame = pd.read_csv(pathlib.Path(folder, "rows", "rows.inter"), sep="\t")
    frame.columns = ["user_id", "item_id", "datetime"]
    frame["datetime"] = pd.to_datetime(frame["datetime"], unit="us")
    frame["weight"] = 1
    frame = frame.sort_values(["user_id", "datetime"], kind="stable")
    after = frame.groupby("user_id").cumcount(ascending=False)
    train, valid, test = frame[after >= 2], frame[after == 1], frame[after == 0]
    seen = {"valid": Dataset.construct(train), "test": Dataset.construct(frame[after >= 1])}

    lightning.seed_everything(options["seed"])
    folder_of_logs = tempfile.mkdtemp(dir=folder)
    epochs, step = options["epochs"], options["eval_step"]
    model = getattr(models, f"{name}Model")(
        epochs=step,
        get_trainer_func=lambda: lightning.Trainer(
            max_epochs=step,
            min_epochs=step,
            accelerator="cpu",
            default_root_dir=folder_of_logs,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        ),
        **options["model"],
    )
    best: dict[str, Any] = {}
    waited, epoch = 0, 0
    while epoch < epochs and waited < options["stopping_step"]:
        model.fit_partial(seen["valid"], min_epochs=step, max_epochs=step)
        epoch += step
        found = ranked(model, seen["valid"], valid, options["topk"])
        print(f"epoch {epoch}: {found}", file=sys.stderr, flush=True)
        waited += 1
        if not best or found["ndcg@10"] > best["valid"]["ndcg@10"]:
            on_test = ranked(model, seen["test"], test, options["topk"])
            best, waited = {"epoch": epoch, "valid": found, "test": on_test}, 0
    print(json.dumps({"model": name} | best, default=float))


def ranked(model: Any, seen: Dataset, held: pd.DataFrame, topk: list[int]) -> dict[str, float]:
    """Recall@k and NDCG@k of one held-out item a user; 0 where it is not recommended."""
    lists = model.recommend(
        users=held["user_id"].to_numpy(), dataset=seen, k=max(topk), filter_viewed=True
    )
    hits = held.merge(lists, on=["user_id", "item_id"], how="left")["rank"].to_numpy()
    found = {}
    for k in topk:
        found[f"recall@{k}"] = float(np.mean(hits <= k))
        found[f"ndcg@{k}"] = float(np.where(hits <= k, 1 / np.log2(hits + 1), 0.0).mean())
    return found


if __name__ == "__main__":
    main()
