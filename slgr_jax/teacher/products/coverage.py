"""What a teacher product covers: the counts and shares that its manifest carries."""

from __future__ import annotations

import numpy as np

from slgr_jax.config import SliceConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.products.rows import Teacher, over_users, usable_pairs


def useful(dataset: Dataset, teacher: Teacher) -> tuple[np.ndarray, np.ndarray]:
    """([U] bool, [I] bool): in a preference that the teacher states (see `usable_pairs`).

    Where unlisted items rank below, a list of one item states some, too.
    """
    users, lengths = usable_pairs(teacher) > 0, np.diff(teacher.offsets)
    items = np.zeros(dataset.n_items, bool)
    if teacher.manifest.kind == "preferences":
        items[teacher.preferred] = items[teacher.other] = True
        return users, items
    if teacher.manifest.unlisted == "below":
        users = (lengths > 0) & (lengths < dataset.n_items)

    def look(first: int, last: int) -> None:
        rows = slice(teacher.offsets[first], teacher.offsets[last])
        # Where two of a user's scores differ, every item of it differs from one of them.
        items[teacher.items[rows][np.repeat(users[first:last], lengths[first:last])]] = True

    over_users(teacher.offsets, look)
    return users, items


def measure(dataset: Dataset, teacher: Teacher) -> tuple[dict[str, int], dict[str, float]]:
    """Counts, and shares of users and items with at least one usable preference.

    Counts: answered (rows with an answer), users and items (with a row), preferences (see
    `usable_pairs`), and of each part how many of its interactions the teacher names.
    """
    lengths = np.diff(teacher.offsets)
    useful_users, useful_items = useful(dataset, teacher)
    held = {part: dataset.positives((part,)) for part in schema.PARTS}
    named_items = np.zeros(dataset.n_items, bool)
    interactions_named = {part: np.zeros(dataset.n_users, np.int64) for part in schema.PARTS}

    def look(first: int, last: int) -> None:
        rows = slice(teacher.offsets[first], teacher.offsets[last])
        users = np.repeat(np.arange(last - first, dtype=np.int64), lengths[first:last])
        if teacher.manifest.kind == "scores":
            items = teacher.items[rows]
        else:
            items = np.concatenate([teacher.preferred[rows], teacher.other[rows]])
            users = np.concatenate([users, users])
        named_items[items] = True
        named_keys = np.sort(users * dataset.n_items + items)
        for part, csr in held.items():
            inside = slice(csr.offsets[first], csr.offsets[last])
            owners = np.repeat(np.arange(last - first, dtype=np.int64), csr.counts[first:last])
            if owners.size:
                keys = owners * dataset.n_items + csr.indices[inside]
                place = np.minimum(np.searchsorted(named_keys, keys), named_keys.size - 1)
                interactions_named[part][first] = int((named_keys[place] == keys).sum())

    over_users(teacher.offsets, look)
    slices = dataset.slices(SliceConfig())
    counts = {
        "answered": int(teacher.offsets[-1]),
        "users": int((lengths > 0).sum()),
        "items": int(named_items.sum()),
        "preferences": int(usable_pairs(teacher).sum()),
        **{f"{part}_pairs": int(interactions_named[part].sum()) for part in schema.PARTS},
    }
    coverage = {
        "users": _share(useful_users, None),
        "items": _share(useful_items, None),
        "cold_users": _share(useful_users, slices.cold_users),
        "tail_items": _share(useful_items, slices.tail_items),
    }

    return counts, coverage


def _share(has: np.ndarray, among: np.ndarray | None) -> float:
    chosen = has if among is None else has[among]
    return round(float(chosen.mean()), 6) if chosen.size else 0.0
