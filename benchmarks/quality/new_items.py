"""What an item that training never saw is worth when its text vector scores it.

    python benchmarks/quality/new_items.py --data=DATA --out=DIR

DATA has item titles and a validation and a test part by user, the last ones of each (leave-last).
A share of the items is taken out: DIR/without has none of their interactions and does not know
them; DIR/with has all. Of a sample of users, those whose test item is one that was held out are
asked for it. NDCG@10 and Recall@10, among the held items alone and over the whole catalogue
(items of training and validation masked), of

    text        trained without them, items are their vectors alone (--noitem_rows), with_items
    id+text     trained without them, rows and vectors, with_items
    trained     id+text, trained with them (the ceiling of the two above)
    id          trained with them, no vectors
    popular     by training interactions of DIR/with, which a new item does not have yet
    random      the expectation of a random order

Vectors are of the local embedder (slgr teach embed). Called again it goes on with what is trained.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob

K = 10
KNOBS: dict[str, Any] = {"backbone": "mf", "epochs": 100, "eval_every": 10, "patience": 2}
VECTORS = "text"


@dataclasses.dataclass(frozen=True)
class NewItemsConfig(Section):
    """What is compared."""

    data: str = knob("", "dataset directory with titles")
    out: str = knob("", "directory of the copies, the runs and the table")
    users: int = knob(0, "users that are kept, drawn; 0 = all", minimum=0)
    share: float = knob(0.1, "items held out, of those with interactions", above=0, below=1)
    seeds: int = knob(3, "seeds of held items and of training", minimum=1)


def prepare_both(config: NewItemsConfig, seed: int) -> tuple[pathlib.Path, np.ndarray]:
    """Write the two datasets of a seed; its directory, and the ids that were held out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import slgr_jax
    from slgr_jax.config import EmbedConfig, TeachConfig
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher.local import embeddings

    root = pathlib.Path(config.out) / f"seed{seed}"
    data, rng = dataset_lib.load(config.data), np.random.default_rng(seed)
    parts = {name: getattr(data, name) for name in ("train", "valid", "test")}
    kept = np.ones(data.n_users, bool)
    if config.users:
        kept[:] = False
        kept[rng.choice(data.n_users, min(config.users, data.n_users), replace=False)] = True
    in_use = np.unique(parts["train"].items[kept[parts["train"].users]])
    held = np.zeros(data.n_items, bool)
    held[rng.choice(in_use, round(config.share * in_use.size), replace=False)] = True
    ids = np.array(data.items.column("item_id").to_pylist())
    if (root / "with").is_dir():
        return root, ids[held]

    users = np.array(data.user_ids.to_pylist())
    rows = {"user": [], "item": [], "time": [], "part": []}  # type: ignore[var-annotated]
    for number, (name, part) in enumerate(parts.items()):
        chosen = kept[part.users]
        rows["user"].append(users[part.users[chosen]])
        rows["item"].append(part.items[chosen])
        order = number * len(data.train) + np.arange(len(part))
        rows["time"].append(order[chosen])
        rows["part"].append(np.repeat(name, chosen.sum()))
    user, item, time, part_name = (np.concatenate(column) for column in rows.values())
    for name, usable in (("with", np.ones(item.size, bool)), ("without", ~held[item])):
        folder = root / f"raw_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"user": user, "item": ids[item], "time": time, "part": part_name}
        table = pa.table({key: pa.array(column[usable]) for key, column in columns.items()})
        pq.write_table(table, folder / "log.parquet")
        titles = data.items.select(["item_id", "title"]).rename_columns(["item", "title"])
        pq.write_table(titles, folder / "items.parquet")
        slgr_jax.prepare(
            source="parquet", input=folder / "log.parquet", out=root / name,
            items_input=str(folder / "items.parquet"), user_column="user", item_column="item",
            time_column="time", split="premade", split_column="part", name=name,
        )  # fmt: skip
        made = dataset_lib.load(root / name)
        embeddings.embed(made, TeachConfig(name=VECTORS), EmbedConfig())
    return root, ids[held]


def measure(root: pathlib.Path, held: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Arm -> metrics of one seed."""
    import slgr_jax
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher.local import embeddings

    whole = dataset_lib.load(root / "with")
    vectors = embeddings.load(whole, VECTORS).items
    index = {item: place for place, item in enumerate(whole.items.column("item_id").to_pylist())}
    new = [item for item in held.tolist() if item in index and vectors.has[index[item]]]
    arms = {
        "text": ("without", {"item_vectors": VECTORS, "item_rows": False}),
        "id+text": ("without", {"item_vectors": VECTORS}),
        "trained": ("with", {"item_vectors": VECTORS}),
        "id": ("with", {}),
    }
    scores, users, items = {}, {}, {}
    for arm, (data, knobs) in arms.items():
        slgr_jax.train(root / data, root / "runs" / arm, seed=seed, **KNOBS, **knobs)
        run = slgr_jax.load(root / "runs" / arm)
        if data == "without":
            run = run.with_items(new, vectors.values[[index[item] for item in new]])
        scores[arm] = run.vectors()
        users[arm] = {name: row for row, name in enumerate(run.dataset.user_ids.to_pylist())}
        items[arm] = {
            name: row for row, name in enumerate(run.dataset.items.column("item_id").to_pylist())
        }

    is_new, seen = set(new), whole.positives(("train", "valid"))
    names, own_ids = list(index), whole.user_ids.to_pylist()
    asked = [
        (user, item)
        for user, item in zip(whole.test.users.tolist(), whole.test.items.tolist(), strict=True)
        if names[item] in is_new and own_ids[user] in users["text"]
    ]
    metrics: dict[str, dict[str, list[float]]] = {}

    def add(arm: str, among: str, rank: float) -> None:
        of_arm = metrics.setdefault(arm, {})
        of_arm.setdefault(f"ndcg {among}", []).append(rank < K and 1 / np.log2(rank + 2))
        of_arm.setdefault(f"recall {among}", []).append(float(rank < K))

    new_rows = np.array([index[item] for item in new])
    for user, target in asked:
        unseen = np.ones(whole.n_items, bool)
        unseen[seen.row(user)] = False
        for arm in (*arms, "popular"):
            if arm == "popular":
                of_all = whole.popularity.astype(float)
            else:
                of_all = np.full(whole.n_items, -np.inf)
                made = scores[arm].users[users[arm][own_ids[user]]] @ scores[arm].items.T
                places = [index[name] for name in items[arm] if name in index]
                rows = [row for name, row in items[arm].items() if name in index]
                of_all[places] = made[rows]
            ahead = (of_all > of_all[target]) & unseen
            add(arm, "all", int(ahead.sum()))
            add(arm, "new", int(ahead[new_rows].sum()))
    table = {
        arm: {name: float(np.mean(values)) for name, values in of_arm.items()}
        for arm, of_arm in metrics.items()
    }
    chance = {"new": len(new), "all": whole.n_items}
    table["random"] = {
        name: value
        for among, count in chance.items()
        for name, value in (
            (f"ndcg {among}", float((1 / np.log2(np.arange(K) + 2)).sum() / count)),
            (f"recall {among}", K / count),
        )
    }
    return {"sizes": {"asked": len(asked), "new": len(new), "items": whole.n_items}, **table}


def main(_: list[str]) -> None:
    """A table of the mean over seeds, and table.json with each."""
    config = flags.section_from_flags(NewItemsConfig)
    results = []
    for seed in range(config.seeds):
        root, held = prepare_both(config, seed)
        results.append(measure(root, held, seed))
        print(json.dumps(results[-1]), flush=True)
    (pathlib.Path(config.out) / "table.json").write_text(json.dumps(results, indent=2) + "\n")
    columns = [f"{metric} {among}" for among in ("new", "all") for metric in ("ndcg", "recall")]
    print("| scored by |", " | ".join(columns), "|\n|---|" + "---:|" * len(columns))
    for arm in results[0]:
        if arm != "sizes":
            cells = (f"{np.mean([each[arm][name] for each in results]):.4f}" for name in columns)
            print(f"| {arm} |", " | ".join(cells), "|")


if __name__ == "__main__":
    flags.run(main, usage=__doc__ or "", name="new_items", sections=(NewItemsConfig,),
              required=("data", "out"))  # fmt: skip
