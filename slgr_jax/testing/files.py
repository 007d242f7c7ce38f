"""A simulated world as a dataset directory with its teacher's products."""

from __future__ import annotations

import dataclasses
import datetime
import os

import numpy as np
import pyarrow as pa

from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import fingerprints, schema, shards
from slgr_jax.data.dataset import Dataset, Part
from slgr_jax.errors import ConfigError
from slgr_jax.teacher.products import preferences
from slgr_jax.testing.world import FIRST_DAYS, START, World

PAIRS, LISTS = "pairs", "lists"  # products that `write` writes
ROWS_PER_SHARD = 4_194_304


def write(
    world: World, path: str | os.PathLike[str], *, lists: int = 0, overwrite: bool = False
) -> Dataset:
    """Write a dataset directory and the teacher product `pairs`; load it.

    Args:
      path: the directory; must not exist.
      lists: also write the product `lists` (kind scores): that many items for each user, drawn
        by the config's seed.
      overwrite: replace the directory if it is a dataset.
    """
    config = world.config
    users = _table(schema.USERS, user_id=_names("u", config.n_users))
    items = _table(schema.ITEMS, item_id=_names("i", config.n_items))
    tables = {"users": ("users", users), "items": ("items", items)}
    tables |= {name: (f"{name}/part", _events(world.part(name))) for name in schema.PARTS}
    counts = {"users": config.n_users, "items": config.n_items}
    counts |= {name: len(world.part(name)) for name in schema.PARTS}
    settings = dataclasses.asdict(config) | {"reliability": repr(config.reliability)}
    cutoffs = {
        f"{name}_from": (START + datetime.timedelta(days=FIRST_DAYS[name])).isoformat()
        for name in ("valid", "test")
    }

    with shards.atomic_directory(path, overwrite=overwrite) as root:
        files = {
            key: shards.write_shards(root, prefix, table, rows_per_shard=ROWS_PER_SHARD)
            for key, (prefix, table) in tables.items()
        }
        manifest = schema.DatasetManifest(
            name="simulated",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source={"layout": "simulated", "files": [], "world": settings},
            split={"rule": "simulated", "cutoffs": cutoffs},
            filters={},
            counts=counts,
            id_map_hash=fingerprints.id_map_hash(
                users.column(0).combine_chunks(), items.column(0).combine_chunks()
            ),
            split_hash=_split_hash(world),
            files=files,
        )
        schema.write_manifest(root, manifest)

    dataset = dataset_lib.load(path)
    write_pairs(world, dataset, PAIRS)
    if lists:
        rng = np.random.default_rng([config.seed, 1])
        users_listing, items_listed, scores = world.lists(rng, lists)
        write_lists(world, dataset, LISTS, users_listing, items_listed, scores)
    return dataset


def write_pairs(
    world: World, dataset: Dataset, name: str, *, overwrite: bool = False
) -> schema.TeacherManifest:
    """Write `world.pairs` as the product `name` of `dataset`, which has the same interactions.

    Several teachers on one dataset are worlds whose configs differ in the teacher alone.
    """
    stated = world.pairs
    table = pa.table(
        {
            "user": stated.users,
            "preferred": stated.preferred,
            "other": stated.other,
            "margin": stated.margin,
        }
    ).cast(schema.TEACHER_PREFERENCES)
    provenance = preferences.Provenance(
        unlisted="unknown",
        training_items="hidden" if world.config.hidden_per_user else "none",
        model=f"simulated {world.config.reliability!r}",
        score_kind="margin",
    )
    return _write_product(world, dataset, name, table, provenance, overwrite)


def write_lists(
    world: World,
    dataset: Dataset,
    name: str,
    users: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    *,
    overwrite: bool = False,
) -> schema.TeacherManifest:
    """Write lists of `World.lists` as a product of kind scores; what is not listed ranks below."""
    columns = {"user": users, "item": items, "score": scores}
    table = pa.table(columns).cast(schema.TEACHER_SCORES)
    provenance = preferences.Provenance(
        unlisted="below",
        training_items="none",
        model=f"simulated {world.config.reliability!r}",
        score_kind="noisy utility",
    )
    return _write_product(world, dataset, name, table, provenance, overwrite)


def _write_product(
    world: World,
    dataset: Dataset,
    name: str,
    table: pa.Table,
    provenance: preferences.Provenance,
    overwrite: bool,
) -> schema.TeacherManifest:
    of_world, of_dataset = _split_hash(world), dataset.manifest.split_hash
    if of_world != of_dataset:
        raise ConfigError(
            f"{dataset.path} has split {of_dataset[:8]}, the world has {of_world[:8]}: other "
            "interactions; "
            "worlds on one dataset may differ in the teacher's settings alone"
        )
    return preferences.write_product(
        dataset, name, table, provenance=provenance, overwrite=overwrite
    )


def _split_hash(world: World) -> str:
    parts = {name: world.part(name) for name in schema.PARTS}
    return fingerprints.split_hash({name: (part.users, part.items) for name, part in parts.items()})


def _names(prefix: str, n: int) -> pa.Array:
    """External ids whose order as text is that of the indices."""
    width = len(str(n - 1))
    return pa.array([f"{prefix}{k:0{width}d}" for k in range(n)])


def _table(layout: pa.Schema, **columns: pa.Array) -> pa.Table:
    n = len(next(iter(columns.values())))
    filled = [columns.get(field.name, pa.nulls(n, field.type)) for field in layout]
    return pa.table(filled, schema=layout)


def _events(part: Part) -> pa.Table:
    return pa.table(
        [
            pa.array(part.users),
            pa.array(part.items),
            pa.array(part.timestamps).cast(pa.timestamp("us")).cast(schema.TIMESTAMP),
            pa.nulls(len(part), pa.float32()),
        ],
        schema=schema.INTERACTIONS,
    )
