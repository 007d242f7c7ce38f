"""What the models of RecBole and RecTools reach on a dataset directory, for a table beside ours.

    python benchmarks/quality/peer_quality.py --data=DATA --models=DeepFM,DCNV2 --peer_python=PYTHON
    python benchmarks/quality/peer_quality.py --data=DATA --models=DeepFM --features=all ...
    python benchmarks/quality/peer_quality.py --data=DATA --models=GRU4Rec --rows=next_item ...
    python benchmarks/quality/peer_quality.py --data=DATA --models=DIN --rows=clicks_in_order ...
    python benchmarks/quality/peer_quality.py --data=DATA --peer=rectools --models=SASRec \\
        --rows=next_item

--rows says what is learned and evaluated; `--options` is JSON over the settings printed. RecBole
runs with its own evaluator and its own early stopping on validation. RecTools has no early stopping
of that kind: its own fit_partial, a few epochs at a time, and the same metrics of its recommended
lists.

  clicks           labels are rating >= --rating_threshold, features are user and item and those
                   of --features, parts are those of DATA; AUC and log-loss of pooled rows
  clicks_in_order  the same labels and features, each row with the items its user rated before; each
                   user's last two rows are left out (as --split=leave_last)
  next_item        all interactions, each user's last two left out; full ranking
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from slgr_jax.cli import flags
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.data.features import Feature
from slgr_jax.errors import ConfigError, InputError, UserError, listing

HERE = pathlib.Path(__file__).parent

absl_flags.DEFINE_string("data", "", "dataset directory")
absl_flags.DEFINE_enum("peer", "recbole", ["recbole", "rectools"], "whose models")
absl_flags.DEFINE_list("models", [], "the peer's names of its models")
absl_flags.DEFINE_enum(
    "rows",
    "clicks",
    ["clicks", "clicks_in_order", "next_item"],
    "what is learned and evaluated",
)
absl_flags.DEFINE_string(
    "features", "none", "of clicks: features of users and items, as slgr train's --features"
)
absl_flags.DEFINE_float("rating_threshold", 4.0, "clicks: label 1 from this rating on")
absl_flags.DEFINE_string("options", "{}", "the peer's settings as JSON, over those printed")
absl_flags.DEFINE_string("peer_python", "python", "the interpreter that has the peer")

COMMON: dict[str, Any] = {
    "embedding_size": 64, "seed": 2020, "reproducibility": True, "learning_rate": 1e-3,
    "train_batch_size": 2048, "eval_batch_size": 4096, "epochs": 300, "stopping_step": 10,
    "field_separator": "\t", "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp", "worker": 0, "use_gpu": False,
}  # fmt: skip
CLICKS: dict[str, Any] = {
    "benchmark_filename": ["train", "valid", "test"], "LABEL_FIELD": "label",
    "load_col": {"inter": ["user_id", "item_id", "label"]}, "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC", "eval_args": {"mode": "labeled", "order": "RO"}, "threshold": None,
    "train_neg_sample_args": None, "mlp_hidden_size": [200, 80],
}  # fmt: skip
IN_ORDER: dict[str, Any] = {
    "eval_args": {
        "split": {"LS": "valid_and_test"}, "order": "TO", "mode": "labeled", "group_by": None,
    },
    "load_col": {"inter": ["user_id", "item_id", "label", "timestamp"]},
    "benchmark_filename": None, "MAX_ITEM_LIST_LENGTH": 20,
}  # fmt: skip
NEXT_ITEM: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 50,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "metrics": ["Recall", "NDCG"], "topk": [10, 20], "valid_metric": "NDCG@10",
    "train_neg_sample_args": None, "loss_type": "CE",
}  # fmt: skip
RECTOOLS: dict[str, Any] = {
    "epochs": 60, "eval_step": 5, "stopping_step": 2, "topk": [10, 20], "seed": 2020,
    "model": {"n_factors": 64, "session_max_len": 50},
}  # fmt: skip
SETTINGS = {"clicks": CLICKS, "clicks_in_order": CLICKS | IN_ORDER, "next_item": NEXT_ITEM}
_KINDS = {"label": "label:float", "timestamp": "timestamp:float"}
_FEATURE_KINDS = {"categorical": "token", "multi": "token_seq", "numeric": "float"}


def write_rows(
    data: dataset_lib.Dataset, folder: pathlib.Path, rows: str, threshold: float
) -> None:
    """Atomic files with the columns that `SETTINGS[rows]` loads: one a part, or one of all rows.

    Args:
      threshold: a label is 1 from this rating on.
    """
    (folder / "rows").mkdir()
    settings = SETTINGS[rows]
    columns = settings["load_col"]["inter"][2:]
    lines: dict[str, list[str]] = {}
    for name in ("train", "valid", "test"):
        part = data.part(name)
        values = {"timestamp": part.timestamps, "label": part.ratings}
        if missing := [column for column in columns if values[column] is None]:
            raise InputError(f"{data.path} has no values to make {listing(missing)} of")
        if "label" in columns:
            values["label"] = (np.asarray(part.ratings) >= threshold).astype(np.int64)
        every = [part.users.tolist(), part.items.tolist()]
        every += [np.asarray(values[column]).tolist() for column in columns]
        suffix = f".{name}" if settings.get("benchmark_filename") else ""
        texts = ("\t".join(map(str, row)) for row in zip(*every, strict=True))
        lines.setdefault(suffix, []).extend(texts)

    for suffix, texts_of_file in lines.items():
        header = "\t".join(["user_id:token", "item_id:token", *(_KINDS[x] for x in columns)])
        text = "\n".join([header, *texts_of_file])
        (folder / "rows" / f"rows{suffix}.inter").write_text(text + "\n", encoding="utf-8")


def write_features(
    features: Sequence[Feature], rows: Mapping[str, int], folder: pathlib.Path
) -> dict[str, list[str]]:
    """Write rows.user and rows.item, values by their codes; the columns to load, by side."""
    columns_of: dict[str, list[str]] = {}
    for side, count in rows.items():
        of_side = [feature for feature in features if feature.side == side]
        if not of_side:
            continue
        columns = [list(map(str, range(count))), *map(_texts_of, of_side)]
        header = [f"{side}_id:token", *(f"{f.name}:{_FEATURE_KINDS[f.kind]}" for f in of_side)]
        lines = ["\t".join(row) for row in (header, *zip(*columns, strict=True))]
        (folder / "rows" / f"rows.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        columns_of[side] = [f"{side}_id", *(feature.name for feature in of_side)]
    return columns_of


def _texts_of(feature: Feature) -> list[str]:
    if feature.kind == "numeric":
        return [f"{number:g}" for number in np.nan_to_num(feature.standardised())]
    counts, codes = feature.ragged()
    rows = np.split(codes, np.cumsum(counts)[:-1])
    return [" ".join(map(str, row.tolist())) for row in rows]


def main(_: list[str]) -> None:
    given = flags.FLAGS
    if given.peer == "rectools" and given.rows != "next_item":
        raise ConfigError(f"--rows={given.rows}: RecTools has sequence models; use next_item")
    if given.rows == "next_item" and given.features != "none":
        raise ConfigError("--rows=next_item: features go with --rows=clicks or clicks_in_order")
    data = dataset_lib.load(given.data)
    with tempfile.TemporaryDirectory() as name:
        write_rows(data, pathlib.Path(name), given.rows, given.rating_threshold)
        settings = RECTOOLS if given.peer == "rectools" else COMMON | SETTINGS[given.rows]
        if given.features != "none":
            chosen = features_lib.choose(data.known_features, given.features, data.path)
            counts = {"user": data.n_users, "item": data.n_items}
            loaded = write_features(chosen, counts, pathlib.Path(name))
            settings = settings | {"load_col": settings["load_col"] | loaded}
        settings = settings | json.loads(given.options)
        options = settings | {"checkpoint_dir": f"{name}/saved"}
        print(json.dumps(settings), flush=True)
        for model in given.models:
            command = [given.peer_python, str(HERE / f"{given.peer}_child.py"), name, model]
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
        own=(
            *("data", "peer", "models", "rows", "features", "rating_threshold", "options"),
            "peer_python",
        ),
        required=("data", "models"),
    )
