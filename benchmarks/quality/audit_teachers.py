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

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import teacher_lists
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


# Control -> rows of its product. Others are those of `slgr compare` (teacher/products/controls.py).
_OWN: dict[str, Callable[[Dataset, Teacher], pa.Table]] = {
    "no_echo": without_echo,
    "training_items": training_items,
}
TEACHERS = (*_OWN, "ease", "consensus")


def ensure(dataset: Dataset, name: str, control: str) -> str:
    """The name of the product that holds a control of the lists `name`; written if absent.

    Raises:
      ConfigError: `name` does not hold lists.
      ManifestError, ShardError: the product cannot be used.
    """
    product = f"{name}.{control}"
    if control in _OWN and product in preferences.products(dataset.path):
        return product
    teacher = preferences.load(dataset, name)
    if teacher.manifest.unlisted != "below":
        raise ConfigError(
            f"--teacher={name} has unlisted={teacher.manifest.unlisted}: the controls are lists; "
            "name a product of lists (slgr teach import --unlisted=below)"
        )
    if control not in _OWN:
        return teacher_lists.ensure_control(dataset, name, control)
    preferences.write_product(
        dataset,
        product,
        _OWN[control](dataset, teacher),
        provenance=preferences.Provenance(
            built_from="train_only",
            unlisted="below",
            model=f"control {control} of {name}",
            score_kind="reciprocal rank",
        ),
    )
    return product


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


def _users_of(teacher: Teacher) -> np.ndarray:
    """[n] int32: the user of each row."""
    counts = np.diff(teacher.offsets)
    return np.repeat(np.arange(counts.size, dtype=np.int32), counts)


def _pair_keys(pairs: Csr, n_items: int) -> np.ndarray:
    users = np.repeat(np.arange(pairs.counts.size, dtype=np.int64), pairs.counts)
    return users * n_items + pairs.indices


def _scores(users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> pa.Table:
    return pa.table([users, items, scores], schema=schema.TEACHER_SCORES)
