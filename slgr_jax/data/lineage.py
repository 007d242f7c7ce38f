"""Which dataset was appended to which: indices that still hold, rows that changed their part.

A dataset made by `slgr prepare --append` records its parents, the nearest first, each with what
it took to get from it to its child:

    name, split_hash, id_map_hash   of the parent
    counts                          of the parent: users, items, train, ...
    moved                           "train to test" and so on -> its rows in another part now
    files                           what the parent itself was read from
    user_shards                     shards that the parent's users are numbered by, 0 for none

The users and items of a parent are the first ones of its child, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax.data.schema import PARTS, DatasetManifest

Parent = Mapping[str, Any]


def moved_key(old: int, new: int) -> str:
    """The key of `moved` for rows of part `old` that are in part `new` now."""
    return f"{PARTS[old]} to {PARTS[new]}"


# Rows that were learned from, or chosen by, and are evaluated later.
BACKWARD = tuple(moved_key(old, new) for old, new in ((0, 1), (0, 2), (1, 2)))


def record(parent: DatasetManifest, moved: Mapping[str, int]) -> tuple[Parent, ...]:
    """The `parents` of a child of `parent`."""
    entry = {
        "name": parent.name,
        "split_hash": parent.split_hash,
        "id_map_hash": parent.id_map_hash,
        "counts": dict(parent.counts),
        "moved": {key: count for key, count in moved.items() if count},
        "files": parent.source.get("files", []),
        "user_shards": parent.user_shards,
    }
    return (entry, *parent.parents)


def line_from(manifest: DatasetManifest, hashes: Mapping[str, Any]) -> Sequence[Parent] | None:
    """The parents of a dataset back to the one with these hashes; [] for itself, None for others.

    Args:
      manifest: of the descendant.
      hashes: `split_hash` and `id_map_hash` of the dataset that is looked for.
    """
    wanted = (hashes["split_hash"], hashes["id_map_hash"])
    if (manifest.split_hash, manifest.id_map_hash) == wanted:
        return ()
    for generation, parent in enumerate(manifest.parents, start=1):
        if (parent["split_hash"], parent["id_map_hash"]) == wanted:
            return manifest.parents[:generation]
    return None


def validation_left(line: Sequence[Parent], manifest: DatasetManifest) -> int:
    """How many validation rows of the dataset at the end of a line may be evaluated still.

    Those that did not become training in the next generation: what later ones did with them is
    not looked at.
    """
    if not line:
        return sum(file.rows for file in manifest.files["valid"])
    parent = line[-1]
    return int(parent["counts"].get("valid", 0)) - int(parent["moved"].get(moved_key(1, 0), 0))


def moved_backward(line: Sequence[Parent]) -> dict[str, int]:
    """How many rows went from a part to a later one on the way; {} where none did."""
    totals = {key: sum(int(parent["moved"].get(key, 0)) for parent in line) for key in BACKWARD}
    return {key: count for key, count in totals.items() if count}
