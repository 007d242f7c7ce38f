"""Synthetic pairs as a dataset in memory, and a teacher for them on disk.

    pairs = synthetic.make(synthetic.SIZES["ml100k"])
    dataset = synthetic_dataset.from_pairs(pairs, folder)
    synthetic_dataset.write_teacher(dataset)

The teacher is written to folder/teacher/random, where `build.build` finds it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import synthetic

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset, Part
from slgr_jax.sampling.context import FIELDS, HISTORY
from slgr_jax.teacher.products import preferences

TEACHER = "random"


def from_pairs(
    pairs: synthetic.Pairs, folder: str | os.PathLike[str], reads: Collection[str] = ()
) -> Dataset:
    """The pairs as the training part; nothing to validate or test on, no names, no texts.

    Args:
      reads: what a backbone looks up (`reads_of`): HISTORY gives the pairs times, FIELDS gives
        the items categories.
    """
    items, times = pairs.items, None
    if HISTORY in reads:
        times = synthetic.moments(pairs)
        order = np.lexsort((times, pairs.users))
        items, times = items[order], times[order]
    table = pa.table({"item_id": pa.nulls(pairs.n_items, pa.string())})
    if FIELDS in reads:
        offsets, codes = synthetic.categories(pairs.n_items)
        names = pa.array(codes.astype(str))
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)
        table = table.append_column("categories", lists)
    nothing = Part(np.zeros(0, np.int32), np.zeros(0, np.int32), None, None)
    manifest = schema.DatasetManifest(
        name="synthetic",
        created="",
        source={},
        split={},
        filters={},
        counts={},
        id_map_hash=f"{pairs.n_users} users, {pairs.n_items} items",
        split_hash=f"{len(pairs)} pairs",
        files={},
    )
    return Dataset(
        path=pathlib.Path(folder),
        manifest=manifest,
        train=Part(pairs.users, items, times, None),
        valid=nothing,
        test=nothing,
        user_ids=pa.nulls(pairs.n_users, pa.string()),
        items=table,
    )


def write_teacher(dataset: Dataset, *, per_user: int = 20, seed: int = 0) -> None:
    """A teacher that has scored about `per_user` random items of every user, at random."""
    per_user = min(per_user, dataset.n_items)
    rng = np.random.default_rng(seed)
    # One item out of each of `per_user` stretches of the catalogue: distinct by construction.
    edges = np.arange(per_user + 1) * dataset.n_items // per_user
    items = rng.integers(edges[:-1], edges[1:], (dataset.n_users, per_user))
    table = pa.table(
        {
            "user": np.repeat(np.arange(dataset.n_users), per_user),
            "item": items.ravel(),
            "score": rng.random(items.size, np.float32),
        }
    ).cast(schema.TEACHER_SCORES)
    # Without `preferences.write_product`'s statistics, which nobody reads here.
    root = preferences.product_path(dataset.path, TEACHER)
    with shards.atomic_directory(root, overwrite=False) as folder:
        files = shards.write_shards(folder, "part", table, rows_per_shard=table.num_rows)
        manifest = schema.TeacherManifest(
            name=TEACHER,
            kind="scores",
            created="",
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            **dataclasses.asdict(preferences.Provenance(model="random numbers")),
            counts={},
            coverage={},
            files=files,
        )
        schema.write_manifest(folder, manifest)
