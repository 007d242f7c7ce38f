"""What RecBole's models reach on the parts of a dataset directory, for a table beside ours.

    python benchmarks/recbole_quality.py --data=DATA --models=DeepFM,DCNV2 --peer_python=PYTHON
    python benchmarks/recbole_quality.py --data=DATA --models=GRU4Rec --sequences ...

Click models: labels are rating >= --rating_threshold, features are user and item, parts are those
of DATA, metrics AUC and log-loss of pooled rows. Sequence models: all interactions, each user's
last two left out in time order (as --split=leave_last), full ranking. RecBole's own evaluator and
early stopping on validation. `--options` is JSON over the settings printed.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile

import numpy as np
from absl import flags as absl_flags

from slgr_jax import flags
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import InputError, UserError

HERE = pathlib.Path(__file__).parent

absl_flags.DEFINE_string("data", "", "dataset directory")
absl_flags.DEFINE_list("models", [], "RecBole's names of its models")
absl_flags.DEFINE_bool("sequences", False, "sequence models instead of click prediction")
absl_flags.DEFINE_float("rating_threshold", 4.0, "click prediction: label 1 from this rating on")
absl_flags.DEFINE_string("options", "{}", "RecBole settings as JSON")
absl_flags.DEFINE_string("peer_python", "python", "the interpreter that has recbole")

COMMON = {
    "embedding_size": 64, "seed": 2020, "reproducibility": True, "learning_rate": 1e-3,
    "train_batch_size": 2048, "eval_batch_size": 4096, "epochs": 300, "stopping_step": 10,
    "field_separator": "\t", "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp", "worker": 0, "use_gpu": False,
}  # fmt: skip
CLICK = {
    "benchmark_filename": ["train", "valid", "test"], "LABEL_FIELD": "label",
    "load_col": {"inter": ["user_id", "item_id", "label"]}, "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC", "eval_args": {"mode": "labeled", "order": "RO"}, "threshold": None,
    "train_neg_sample_args": None, "mlp_hidden_size": [200, 80],
}  # fmt: skip
SEQUENCES = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 50,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "metrics": ["Recall", "NDCG"], "topk": [10, 20], "valid_metric": "NDCG@10",
    "train_neg_sample_args": None, "loss_type": "CE",
}  # fmt: skip


def write_rows(data: dataset_lib.Dataset, folder: pathlib.Path, threshold: float | None) -> None:
    """Atomic files: one a part with labels, or (threshold None) one of all interactions."""
    (folder / "rows").mkdir()
    lines: dict[str, list[str]] = {}
    for name in ("train", "valid", "test"):
        part = data.part(name)
        where = "" if threshold is None else f".{name}"
        last = part.timestamps if threshold is None else part.ratings
        if last is None:
            raise InputError(f"{data.path} has no {'times' if threshold is None else 'ratings'}")
        if threshold is not None:
            last = (last >= threshold).astype(np.int64)
        rows = zip(part.users.tolist(), part.items.tolist(), last.tolist(), strict=True)
        lines.setdefault(where, []).extend(f"{u}\t{i}\t{x}" for u, i, x in rows)
    kind = "timestamp:float" if threshold is None else "label:float"
    for where, found in lines.items():
        text = "\n".join([f"user_id:token\titem_id:token\t{kind}", *found])
        (folder / "rows" / f"rows{where}.inter").write_text(text + "\n", encoding="utf-8")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    data = dataset_lib.load(given.data)
    with tempfile.TemporaryDirectory() as name:
        write_rows(data, pathlib.Path(name), None if given.sequences else given.rating_threshold)
        own = SEQUENCES if given.sequences else CLICK
        options = COMMON | own | {"checkpoint_dir": f"{name}/saved"} | json.loads(given.options)
        shown = {key: value for key, value in options.items() if key != "checkpoint_dir"}
        print(json.dumps(shown), flush=True)
        for model in given.models:
            command = [given.peer_python, str(HERE / "recbole_child.py"), name, model]
            done = subprocess.run(
                [*command, json.dumps(options)], capture_output=True, text=True, cwd=name
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{model} in {given.peer_python}: {last}")
            print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        own=("data", "models", "sequences", "rating_threshold", "options", "peer_python"),
        required=("data", "models"),
    )
