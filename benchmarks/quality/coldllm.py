"""ColdLLM's simulated interactions of cold items (CiteULike), as its repository ships them."""

from __future__ import annotations

import csv
import pathlib
import random
from collections.abc import Sequence

from reproduction import Arm, Column, Product, Question, Target, clone_file, write_pairs

REPOSITORY = "ColdLLM-Team/ColdLLM-repo"
_FOLDER = "data/CiteULike"
_ANSWERS = f"{_FOLDER}/CiteULike_askllama_llamawidetower20_0105.csv"
_PARTS = {
    "train": ("warm_emb",),
    "valid": ("warm_val", "cold_item_val"),
    "test": ("warm_test", "cold_item_test"),
}
_PER_ITEM = 20  # users whom the filter leaves of each cold item
# Pairs of each product over training pairs: as if training drew from both alike.
_FILTERED, _ANSWERED = 67_920 / 132_073, 58_382 / 132_073


def read(clone: pathlib.Path, raw: pathlib.Path) -> Sequence[pathlib.Path]:
    """Write the three parts and the pairs of each arm.

    filter: all pairs of the coupled filter; yes: those that the LLM kept; thinned: as many of the
    filter's, drawn; random: as many users of each cold item as the filter has, drawn.
    """
    files, users = [], set()
    for part, names in _PARTS.items():
        pairs: list[tuple[str, str]] = []
        for name in names:
            path = clone_file(clone, f"{_FOLDER}/{name}.csv", REPOSITORY)
            files.append(path)
            pairs += [(row["user"], row["item"]) for row in _rows(path)]
        users |= {user for user, _ in pairs}
        write_pairs(raw / f"{part}.csv", pairs)

    path = clone_file(clone, _ANSWERS, REPOSITORY)
    asked = [(row["user_id"], row["item_id"], row["clk/no"]) for row in _rows(path)]
    filtered = [(user, item) for user, item, _ in asked]
    answered = [(user, item) for user, item, answer in asked if answer == "Yes"]
    draw = random.Random(0)
    by_chance = [
        (user, item)
        for item in sorted({item for _, item in filtered})
        for user in draw.sample(sorted(users), _PER_ITEM)
    ]
    write_pairs(raw / "filter.csv", filtered)
    write_pairs(raw / "yes.csv", answered)
    write_pairs(raw / "thinned.csv", draw.sample(filtered, len(answered)))
    write_pairs(raw / "random.csv", by_chance)
    return [*files, path]


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _learned(name: str, share: float) -> tuple[tuple[str, ...], Product]:
    """Flags and product of an arm that learns pairs as interactions, with their edges."""
    command = (
        *("teach", "import", "--data={data}", f"--name={name}"),
        *(f"--interactions={{raw}}/{name}.csv", "--model=llama2-7b", "--built_from=train_only"),
    )
    flags = ("--guidance=interactions", f"--teacher={name}", "--interactions_edges")
    return (*flags, f"--lambda={share:.4f}"), Product(f"teacher/{name}", (command,))


_ALL, _COLD, _WARM = (f"Recall@20, {group}" for group in ("all", "cold", "warm"))
TARGET = Target(
    name="coldllm",
    title="ColdLLM: users simulated for cold items (CiteULike, LightGCN)",
    repository=REPOSITORY,
    source="printed: WSDM 2025; the split and the LLM's answers are its own",
    read=read,
    flags=(
        *("--backbone=lightgcn", "--dim=64", "--layers=3", "--lr=0.01", "--l2=0.0001"),
        *("--batch_size=8192", "--epochs=80", "--eval_every=20", "--patience=0", "--ks=10,20"),
        *("--early_stop_metric=ndcg@20", "--nopooled_auc", "--tail_item_popularity=0"),
        "--rank_apart",
    ),
    columns=(
        Column(_ALL, "overall", "recall@20"),
        Column(_COLD, "tail_items_apart", "recall@20"),
        Column(_WARM, "head_items_apart", "recall@20"),
        Column("NDCG@20, all", "overall", "ndcg@20"),
        Column("NDCG@20, cold", "tail_items_apart", "ndcg@20"),
        Column("NDCG@20, warm", "head_items_apart", "ndcg@20"),
    ),
    arms=(
        Arm(
            "none",
            "no simulation",
            printed={
                **{_ALL: 0.0812, _COLD: 0.0041, _WARM: 0.2528},
                **{"NDCG@20, all": 0.0622, "NDCG@20, cold": 0.0019, "NDCG@20, warm": 0.1541},
            },
        ),
        Arm("filter", "the filter's pairs", *_learned("filter", _FILTERED)),
        Arm(
            "yes",
            "those the LLM kept",
            *_learned("yes", _ANSWERED),
            printed={
                **{_ALL: 0.2285, _COLD: 0.3601, _WARM: 0.3252},
                **{"NDCG@20, all": 0.1747, "NDCG@20, cold": 0.2126, "NDCG@20, warm": 0.2156},
            },
        ),
        Arm("thinned", "as many of the filter's, drawn", *_learned("thinned", _ANSWERED)),
        Arm("random", "20 users of each item, drawn", *_learned("random", _FILTERED)),
    ),
    questions=(
        Question("ColdLLM on no simulation", "yes", "none", _COLD),
        Question("ColdLLM on no simulation", "yes", "none", _ALL),
        Question("ColdLLM on no simulation", "yes", "none", _WARM),
        Question("the filter on no simulation", "filter", "none", _COLD),
        Question("the LLM on the filter", "yes", "filter", _COLD),
        Question(
            "the LLM on as many pairs, drawn",
            "yes",
            "thinned",
            _COLD,
        ),
        Question("drawn users on no simulation", "random", "none", _COLD),
    ),
    differs=(
        "64 numbers a vector and not 200; batches of 8,192 at a learning rate of .01 for 80 "
        "epochs, where theirs are 2,048 at .001 until 100 epochs bring nothing (at most 3,000).",
        "all users are tested; their program tests the first 2,000, for all items together only "
        "those who have both warm and cold items in the test part.",
        "pairs of the LLM are drawn beside the data's by lambda = pairs / training pairs, theirs "
        "are rows of the training file.",
        "their towers are not trained here: both products are the files of the repository.",
        "why Recall@20 of all items without simulation is above the printed is not known; who is "
        "tested is not the reason (benchmarks/LOG.md).",
    ),
)
