"""Small worlds that tests share: data sets in memory and on disk, and one-device layouts."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from slgr_jax import api
from slgr_jax.config import RunConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.data import fingerprints, schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.features import Feature
from slgr_jax.errors import ConfigError
from slgr_jax.kernels import build
from slgr_jax.mesh import Layout, make_layout
from slgr_jax.teacher.products import preferences
from slgr_jax.training import restore


def one_device(**options: int) -> Layout:
    """A layout on a single device, whatever the test process has."""
    return make_layout(devices=jax.devices()[:1], **options)


@contextlib.contextmanager
def runs_on(count: int) -> Iterator[None]:
    """Runs are trained, restored and evaluated on the first `count` devices."""
    layout = functools.partial(make_layout, devices=jax.devices()[:count])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "make_layout", layout)
        yield


def random_pairs(seed: int, n_users: int, n_items: int, per_user: int) -> np.ndarray:
    """[n, 2] distinct (user, item) pairs, `per_user` each, items drawn by a power law."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / (np.arange(n_items) + 3.0)
    rows = [
        np.stack(
            [
                np.full(per_user, user),
                rng.choice(n_items, per_user, replace=False, p=weights / weights.sum()),
            ],
            axis=1,
        )
        for user in range(n_users)
    ]
    return np.concatenate(rows)


def write_dataset(
    path: pathlib.Path,
    train: np.ndarray,
    valid: np.ndarray,
    test: np.ndarray,
    *,
    n_users: int,
    n_items: int,
    timed: bool = True,
    parts_in_time: bool = False,
    ratings: bool = False,
    categories: int = 0,
    features: Sequence[Feature] = (),
) -> Dataset:
    """A finished dataset directory from [n, 2] index pairs; external ids are `u0`, `i0`, ...

    Args:
      timed: the order of a part's pairs is their order in time.
      parts_in_time: validation is later than training, test later than both.
      ratings: 1 to 5, a function of the pair.
      categories: item i has categories `c{i % categories}` and, if i is even, `c{i // 2 % ...}`.
      features: of all users and items (`features.of_texts`, `features.numeric`).
    """
    parts = {"train": train, "valid": valid, "test": test}
    files = {}
    path.mkdir(parents=True)
    begin = 0
    for name, pairs in parts.items():
        when = begin + np.arange(len(pairs)) if timed else pairs[:, 1]
        begin += len(pairs) if parts_in_time else 0
        order = np.lexsort((when, pairs[:, 0]))
        users, listed = pairs[order, 0], pairs[order, 1]
        times, rated = pa.nulls(len(pairs), pa.int64()), pa.nulls(len(pairs), pa.float32())
        table = pa.table(
            {
                "user": pa.array(users, pa.int32()),
                "item": pa.array(listed, pa.int32()),
                "timestamp": (pa.array(when[order]) if timed else times).cast(schema.TIMESTAMP),
                "rating": pa.array((users + 2 * listed) % 5 + 1.0) if ratings else rated,
            }
        ).cast(schema.INTERACTIONS)
        files[name] = shards.write_shards(path, f"{name}/part", table, rows_per_shard=1000)
    users = pa.table({"user_id": [f"u{u}" for u in range(n_users)]})
    users = users.append_column("text", pa.nulls(n_users, pa.string())).cast(schema.USERS)
    items = pa.table(
        {
            "item_id": [f"i{i}" for i in range(n_items)],
            "title": [f"item {i}" for i in range(n_items)],
            "text": pa.nulls(n_items, pa.string()),
            "categories": pa.array(
                [_categories(i, categories) for i in range(n_items)], pa.list_(pa.string())
            ),
        }
    ).cast(schema.ITEMS)
    files["users"] = shards.write_shards(path, "users", users, rows_per_shard=10**6)
    files["items"] = shards.write_shards(path, "items", items, rows_per_shard=10**6)
    files |= features_lib.write(path, features, rows_per_shard=10**6)
    manifest = schema.DatasetManifest(
        features=features_lib.described(features),
        name="world",
        created="2026-01-01T00:00:00+00:00",
        source={},
        split={"rule": "premade"},
        filters={},
        counts={"users": n_users, "items": n_items},
        id_map_hash=fingerprints.id_map_hash(users["user_id"].combine_chunks(), items["item_id"]),
        split_hash=fingerprints.split_hash({k: (v[:, 0], v[:, 1]) for k, v in parts.items()}),
        files=files,
    )
    schema.write_manifest(path, manifest)
    return dataset_lib.load(path)


def feature(
    name: str, side: str, rows: Sequence[Sequence[str]], *, trained: np.ndarray | None = None
) -> Feature:
    """A feature from the values of each user (item): multi-valued where one has several."""
    counts = np.array([len(row) for row in rows])
    texts = pa.array([text for row in rows for text in row], pa.string())
    known = np.ones(len(rows), bool) if trained is None else trained
    return features_lib.of_texts(name, side, counts, texts, known, multi=bool(counts.max() > 1))


def _categories(item: int, count: int) -> list[str] | None:
    if not count:
        return None
    return [f"c{item % count}", f"c{item // 2 % count}"][: 1 + (item % 2 == 0)]


def random_dataset(
    path: pathlib.Path,
    *,
    seed: int = 0,
    n_users: int = 40,
    n_items: int = 30,
    per_user: int = 10,
    **more: Any,
) -> Dataset:
    """Random pairs, 60 % train, 20 % validation, 20 % test."""
    pairs = random_pairs(seed, n_users, n_items, per_user)
    pairs = np.random.default_rng(seed + 1).permutation(pairs)
    cut = len(pairs) // 5
    return write_dataset(
        path,
        pairs[2 * cut :],
        pairs[:cut],
        pairs[cut : 2 * cut],
        n_users=n_users,
        n_items=n_items,
        **more,
    )


def dataset_by_shard(
    folder: pathlib.Path, count: int, *, per_user: int = 10, n_users: int = 40, n_items: int = 30
) -> Dataset:
    """`random_pairs` whose users have 5 to `per_user` items, prepared with --user_shards; in
    `folder` is also `by_id`, the same without."""
    pairs = random_pairs(0, n_users, n_items, per_user)
    pairs = pairs[np.arange(len(pairs)) % per_user < 5 + pairs[:, 0] % (per_user - 4)]
    rows = {"user": pairs[:, 0], "item": pairs[:, 1], "timestamp": np.arange(len(pairs)) + 10**9}
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(rows), folder / "log.parquet")
    given = {"source": "parquet", "input": folder / "log.parquet", "split": "leave_last"}
    api.prepare(**given, out=folder / "by_id")
    api.prepare(**given, out=folder / "by_shard", user_shards=count)
    return dataset_lib.load(folder / "by_shard")


def checkerboard(path: pathlib.Path, size: int = 40) -> Dataset:
    """User u likes item i iff u + i is even; the diagonal is withheld as validation and test.

    Every recommender must rank the withheld item of a user first among the unseen ones. Likes
    come in any order of time.
    """
    users, items = np.divmod(np.arange(size * size), size)
    liked = (users + items) % 2 == 0
    diagonal = users == items
    pairs = np.stack([users, items], axis=1)
    held = pairs[liked & diagonal]
    train = np.random.default_rng(0).permutation(pairs[liked & ~diagonal])
    return write_dataset(
        path,
        train,
        held[::2],
        held[1::2],
        n_users=size,
        n_items=size,
    )


def teach(
    dataset: Dataset,
    users: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    *,
    name: str = "t",
    **provenance: Any,
) -> None:
    """A teacher product of scored items, sorted by user."""
    table = pa.table([users, items, scores], names=["user", "item", "score"])
    preferences.write_product(
        dataset,
        name,
        table.cast(schema.TEACHER_SCORES),
        provenance=preferences.Provenance(**provenance),
    )


def run_config(dataset: Dataset, workdir: pathlib.Path | str, **sections: object) -> RunConfig:
    """A config for `dataset`; sections by name."""
    return RunConfig(str(dataset.path), str(workdir), **sections)  # type: ignore[arg-type]


def pairs_of(users: np.ndarray, items: np.ndarray) -> set[tuple[int, int]]:
    """The set of (user, item)."""
    return set(zip(np.asarray(users).tolist(), np.asarray(items).tolist(), strict=True))


def names(values: Sequence[object]) -> list[str]:
    """Each as text."""
    return [str(value) for value in values]


def need_native_kernels() -> None:
    """Skip the test where the CPU kernels cannot be built, saying why."""
    try:
        build.choose("native", platform="cpu", devices=1)
    except ConfigError as error:
        pytest.skip(str(error))
