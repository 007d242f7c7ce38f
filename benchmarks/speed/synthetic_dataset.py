"""Synthetic pairs as a dataset in memory, and a teacher and a reference run for them on disk.

    pairs = synthetic.make(synthetic.SIZES["ml100k"])
    dataset = synthetic_dataset.from_pairs(pairs, folder)
    synthetic_dataset.write_teachers(dataset)
    synthetic_dataset.write_reference(dataset)

Teachers are written to folder/teacher, where `build.build` finds them, the run to folder/reference.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import synthetic

from slgr_jax import config
from slgr_jax.data import schema, shards, user_ranges
from slgr_jax.data.dataset import Dataset, Part
from slgr_jax.sampling.context import FIELDS, HISTORY
from slgr_jax.teacher.products import preferences, product_files
from slgr_jax.training import build, checkpoint, loop, run_directory
from slgr_jax.training.programs import make_programs
from slgr_jax.training.step import make_run_steps
from slgr_jax.user_shards import UserShards

# Of the first nothing is known of what it did not score; the other names its favourites.
TEACHER, LISTS = "random", "random_lists"
REFERENCE = "reference"


def from_pairs(
    pairs: synthetic.Pairs,
    folder: str | os.PathLike[str],
    reads: Collection[str] = (),
    *,
    validation: bool = False,
) -> Dataset:
    """The pairs as the training part, nothing to test on, no names, no texts.

    Args:
      reads: what a backbone looks up (`reads_of`): HISTORY gives the pairs times, FIELDS gives
        the items categories.
      validation: hold one random item of each user back to validate on, and to teach gates with.
    """
    held_back = _nothing()
    if validation:
        pairs, held_back = _hold_back(pairs)
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
        valid=held_back,
        test=_nothing(),
        user_ids=pa.nulls(pairs.n_users, pa.string()),
        items=table,
    )


def by_shard(dataset: Dataset, folder: str | os.PathLike[str], count: int) -> Dataset:
    """The dataset with users numbered by `count` shards, as `slgr prepare --user_shards` does."""
    dealt = UserShards.deal(dataset.history, count)
    shard = dealt.row // dealt.rows
    number = np.empty(dataset.n_users, np.int32)
    number[np.argsort(shard, kind="stable")] = np.arange(dataset.n_users)

    def renumbered(part: Part) -> Part:
        users = number[part.users]
        order = np.lexsort((part.items, users))
        return Part(users[order], part.items[order], None, None)

    return dataclasses.replace(
        dataset,
        path=pathlib.Path(folder),
        train=renumbered(dataset.train),
        valid=renumbered(dataset.valid),
        user_bounds=np.cumsum([0, *np.bincount(shard, minlength=count)]),
        manifest=dataclasses.replace(
            dataset.manifest, user_shards=count, id_map_hash=f"{count} shards"
        ),
    )


def write(dataset: Dataset, *, rows_per_shard: int = 1 << 20) -> None:
    """The directory that `dataset.load` reads it from, as `slgr prepare` would have made it."""
    files = {}
    offsets = np.searchsorted(dataset.train.users, np.arange(dataset.n_users + 1))
    for name in schema.PARTS:
        part = dataset.part(name)
        bounds = dataset.user_bounds if name == "train" else None
        columns = {"user": part.users, "item": part.items}
        nothing = {
            "timestamp": pa.nulls(len(part), schema.TIMESTAMP),
            "rating": pa.nulls(len(part), pa.float32()),
        }
        table = pa.table(columns | nothing).cast(schema.INTERACTIONS)
        files[name] = shards.write_shards(
            dataset.path,
            f"{name}/part",
            table,
            rows_per_shard=rows_per_shard,
            parts=None if bounds is None else user_ranges.rows_of_shards(bounds, offsets),
        )
    for name, side, count in (
        ("users", schema.USERS, dataset.n_users),
        ("items", schema.ITEMS, dataset.n_items),
    ):
        columns = {
            field.name: pa.nulls(count, field.type)
            if field.nullable
            else pa.array(np.arange(count).astype(str)).cast(field.type)
            for field in side
        }
        table = pa.table(columns, schema=side)
        files[name] = shards.write_shards(dataset.path, name, table, rows_per_shard=rows_per_shard)
    ranges: schema.UserRanges = {}
    if dataset.user_bounds is not None:
        files |= user_ranges.write(
            dataset.path,
            dataset.user_bounds,
            dataset.history,
            dataset.popularity,
            rows_per_shard=rows_per_shard,
        )
        ranges = user_ranges.of_files(files["train"], offsets)
    manifest = dataclasses.replace(dataset.manifest, files=files, user_ranges=ranges)
    schema.write_manifest(dataset.path, manifest)


def _nothing() -> Part:
    return Part(np.zeros(0, np.int32), np.zeros(0, np.int32), None, None)


def _hold_back(pairs: synthetic.Pairs) -> tuple[synthetic.Pairs, Part]:
    """The pairs without a random one of each user, and these."""
    ends = np.cumsum(pairs.counts)
    chosen = ends - 1 - np.random.default_rng(1).integers(0, pairs.counts)
    kept = np.ones(len(pairs), bool)
    kept[chosen] = False
    left = dataclasses.replace(pairs, users=pairs.users[kept], items=pairs.items[kept])
    return left, Part(pairs.users[chosen], pairs.items[chosen], None, None)


def write_teachers(dataset: Dataset, *, per_user: int = 20, seed: int = 0) -> None:
    """Two teachers that gave about `per_user` random items of every user random scores, among them
    what is held back of the user; of one what it leaves out ranks below."""
    per_user = min(per_user, dataset.n_items)
    rng = np.random.default_rng(seed)
    # One item out of each of `per_user` stretches of the catalogue: distinct by construction.
    edges = np.arange(per_user + 1) * dataset.n_items // per_user
    items = rng.integers(edges[:-1], edges[1:], (dataset.n_users, per_user))
    held_back = dataset.valid
    stretch = np.searchsorted(edges, held_back.items, side="right") - 1
    items[held_back.users, stretch] = held_back.items
    table = pa.table(
        {
            "user": np.repeat(np.arange(dataset.n_users), per_user),
            "item": items.ravel(),
            "score": rng.random(items.size, np.float32),
        }
    ).cast(schema.TEACHER_SCORES)
    _write_teacher(dataset, TEACHER, table, "unknown")
    _write_teacher(dataset, LISTS, table, "below")


def _write_teacher(dataset: Dataset, name: str, table: pa.Table, unlisted: str) -> None:
    # Without `preferences.write_product`'s statistics, which nobody reads here.
    root = preferences.product_path(dataset.path, name)
    about = preferences.Provenance(model="random numbers", unlisted=unlisted)
    offsets = np.searchsorted(table["user"].to_numpy(), np.arange(dataset.n_users + 1))
    with shards.atomic_directory(root, overwrite=False) as folder:
        files, ranges = product_files.write(
            folder, "part", table, offsets, dataset, preferences.ROWS_PER_SHARD
        )
        manifest = schema.TeacherManifest(
            name=name,
            kind="scores",
            created="",
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            **dataclasses.asdict(about),
            counts={},
            coverage={},
            files=files,
            order="user",
            user_ranges=ranges,
        )
        schema.write_manifest(folder, manifest)


def write_reference(dataset: Dataset) -> None:
    """A run without guidance, of one epoch: what --reference_runs reads."""
    run = config.make_run(str(dataset.path), str(dataset.path / REFERENCE), backbone="mf")
    experiment = build.build(run, dataset)
    programs = make_programs(experiment)
    seed = np.int32(run.train.seed)
    state, _, _ = make_run_steps(experiment.trainer)(
        programs.init(seed), experiment.arrays, programs.key(seed), np.int32(programs.per_epoch)
    )
    serving = programs.serving(state, experiment.arrays.context)
    progress = checkpoint.Progress(epoch=1, step=programs.per_epoch)
    with run_directory.opened(run, dataset):
        saved = checkpoint.Checkpoints(run.workdir, writable=True)
        loop.write_record(experiment, run, programs)
        saved.save(state, serving, progress)
        saved.close()
