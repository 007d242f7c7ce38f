"""Teachers without a language model, and a training part with validation in it.

What `audit_controls.py` compares an LLM's lists with. A product is written as DATA/teacher/NAME
once; a product that is there already is used as it is.

Shape letters: U users, n rows of a product.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax.config import BaselineConfig, PrepareConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines, full_ranking
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.rows import Teacher


def without_echo(dataset: Dataset, teacher: Teacher) -> pa.Table:
    """The lists without what their user interacted with in training."""
    users = _users_of(teacher)
    echo = np.isin(
        users.astype(np.int64) * dataset.n_items + teacher.items,
        _pair_keys(dataset.positives(("train",)), dataset.n_items),
    )
    return _scores(users[~echo], teacher.items[~echo], teacher.scores[~echo])


def training_items(dataset: Dataset, teacher: Teacher) -> pa.Table:
    """Each listed user's own training items, all at the same score: no knowledge at all.

    Against hard negatives this is a recommender that samples its negatives where it is wrong.
    """
    train = dataset.positives(("train",))
    listed = np.diff(teacher.offsets) > 0
    users = np.repeat(np.arange(dataset.n_users, dtype=np.int32), train.counts)
    keep = listed[users]
    return _scores(users[keep], train.indices[keep], np.ones(int(keep.sum()), np.float32))


def consensus(dataset: Dataset, teacher: Teacher) -> pa.Table:
    """One list for everybody: the items that the most users' lists name, ties by item.

    A user's list is as long as the LLM's list for that user without its echo, and leaves out the
    user's training items: nothing in it is about this user.
    """
    votes = np.bincount(teacher.items, minlength=dataset.n_items)
    order = np.lexsort((np.arange(dataset.n_items), -votes)).astype(np.int32)

    def best(user: int, length: int, seen: np.ndarray) -> np.ndarray:
        fresh = order[~np.isin(order, seen)]
        return fresh[votes[fresh] > 0][:length]

    return _lists(dataset, teacher, best)


def ease_lists(dataset: Dataset, teacher: Teacher) -> pa.Table:
    """The items that EASE, fitted on train and tuned on validation, ranks highest outside train.

    Lists are as long as the LLM's without their echo.
    """
    fitted = baselines.tune(baselines.make_baseline("ease", BaselineConfig()), dataset).fitted
    lengths = list_lengths(dataset, teacher)
    users = np.flatnonzero(lengths)
    top = full_ranking.top_k(
        fitted.score_users,
        fitted.state,
        users,
        dataset.positives(("train",)),
        dataset.n_items,
        k=int(lengths.max()),
    )
    row_of = np.full(dataset.n_users, -1)
    row_of[top.users] = np.arange(top.users.size)

    def best(user: int, length: int, seen: np.ndarray) -> np.ndarray:
        items = top.items[row_of[user]]
        return items[items >= 0][:length]

    return _lists(dataset, teacher, best)


# Control -> (rows of its product, what its manifest says of it).
TEACHERS: dict[str, Callable[[Dataset, Teacher], pa.Table]] = {
    "no_echo": without_echo,
    "ease": ease_lists,
    "consensus": consensus,
    "training_items": training_items,
}


def ensure(dataset: Dataset, name: str, control: str) -> str:
    """The name of the product that holds a control of the lists `name`; written if absent.

    Raises:
      ConfigError: `name` does not hold lists.
      ManifestError, ShardError: the product cannot be used.
    """
    product = f"{name}.{control}"
    if product in preferences.products(dataset.path):
        return product
    teacher = preferences.load(dataset, name)
    if teacher.manifest.unlisted != "below":
        raise ConfigError(
            f"--teacher={name} has unlisted={teacher.manifest.unlisted}: the controls are lists; "
            "name a product of lists (slgr teach import --unlisted=below)"
        )
    preferences.write_product(
        dataset,
        product,
        TEACHERS[control](dataset, teacher),
        provenance=preferences.Provenance(
            built_from="train_only",
            unlisted="below",
            model=f"control {control} of {name}",
            score_kind="reciprocal rank",
        ),
    )
    return product


def list_lengths(dataset: Dataset, teacher: Teacher) -> np.ndarray:
    """[U] how many items outside training each user's list names."""
    kept = without_echo(dataset, teacher).column("user").to_numpy()
    return np.bincount(kept, minlength=dataset.n_users)


def join_validation(dataset: Dataset, out: pathlib.Path) -> Dataset:
    """The data set with validation moved into train; test is as it was. Written to `out`, once.

    One validation interaction stays where it was, as a data set must have some.

    Raises:
      ConfigError: `out` holds another data set, or the ids got other numbers.
    """
    if not (out / schema.MANIFEST).is_file():
        _write_joined(dataset, out)
    joined = dataset_lib.load(out)
    if joined.manifest.id_map_hash != dataset.manifest.id_map_hash or len(joined.test) != len(
        dataset.test
    ):
        raise ConfigError(
            f"{out} has id map {joined.manifest.id_map_hash[:8]} and {len(joined.test)} test "
            f"pairs, {dataset.path} has {dataset.manifest.id_map_hash[:8]} and "
            f"{len(dataset.test)}; remove {out}, and it is written anew"
        )
    return joined


def _write_joined(dataset: Dataset, out: pathlib.Path) -> None:
    tables = [_rows_of(dataset, part) for part in schema.PARTS]
    split = ["train"] * (len(dataset.train) + len(dataset.valid)) + ["test"] * len(dataset.test)
    split[len(dataset.train)] = "valid"
    table = pa.concat_tables(tables).append_column("split", pa.array(split))

    out.parent.mkdir(parents=True, exist_ok=True)
    raw = out.with_name(out.name + ".parquet")
    pq.write_table(table, raw)
    prepare.prepare(
        PrepareConfig(
            source="parquet",
            input=str(raw),
            out=str(out),
            name=f"{dataset.manifest.name}_train_valid",
            split="premade",
            split_column="split",
        )
    )


def _rows_of(dataset: Dataset, part: str) -> pa.Table:
    """The interactions of a part with external ids, as `prepare` reads them."""
    rows = dataset.part(part)
    item_ids = dataset.items.column("item_id").combine_chunks()
    columns = {
        "user": dataset.user_ids.take(pa.array(rows.users)),
        "item": item_ids.take(pa.array(rows.items)),
    }
    if rows.timestamps is not None:
        columns["timestamp"] = pa.array(rows.timestamps).cast(pa.timestamp("us"))
    if rows.ratings is not None:
        columns["rating"] = pa.array(rows.ratings)
    return pa.table(columns)


def _lists(
    dataset: Dataset, teacher: Teacher, best: Callable[[int, int, np.ndarray], np.ndarray]
) -> pa.Table:
    """Rows of `best(user, length, training items)`, best first, scored 1/rank."""
    train = dataset.positives(("train",))
    lengths = list_lengths(dataset, teacher)
    users, items, scores = [], [], []
    for user in map(int, np.flatnonzero(lengths)):
        chosen = best(user, int(lengths[user]), train.row(user))
        users.append(np.full(chosen.size, user, np.int32))
        items.append(chosen.astype(np.int32))
        scores.append((1 / np.arange(1, chosen.size + 1)).astype(np.float32))
    return _scores(np.concatenate(users), np.concatenate(items), np.concatenate(scores))


def _users_of(teacher: Teacher) -> np.ndarray:
    """[n] int32: the user of each row."""
    counts = np.diff(teacher.offsets)
    return np.repeat(np.arange(counts.size, dtype=np.int32), counts)


def _pair_keys(pairs: Csr, n_items: int) -> np.ndarray:
    users = np.repeat(np.arange(pairs.counts.size, dtype=np.int64), pairs.counts)
    return users * n_items + pairs.indices


def _scores(users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> pa.Table:
    return pa.table([users, items, scores], schema=schema.TEACHER_SCORES)
