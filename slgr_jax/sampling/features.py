"""Features on the devices: which rows of a feature table each user (item, interaction) has, how
weighed.

All features of a side share one table; each has its values' rows, then one for missing. A user's
slots name rows of it, and what a feature comes to is the weighted sum over its slots:

    categorical  e_v                         one slot, weight 1
    multi        (1 / n) sum_v e_v           at most M slots, weight 1 / n; of n values the first M
    numeric      z e, z standardised         one slot, weight z
    missing      e_missing                   of any kind

(mean pooling and value times embedding, as RecBole and DeepCTR have them). Slots that are not used
repeat one that is, with weight 0: they touch no other row.

Shape letters: R users, items or interactions, S slots of one, F features, T rows of the table,
D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.data.features import INTERACTION, Feature

# Side -> the table of its features; users' and items' own rows are in the table of that name.
TABLES = {
    "user": "user_feature",
    "item": "item_feature",
    INTERACTION: "interaction_feature",
}


@struct.dataclass
class FeatureSlots:
    """The slots of every user, of every item, or of every interaction.

    Attributes:
      rows: [R, S] rows of the feature table.
      weights: [R, S] what each is multiplied by; 0 where the slot is not used.
      widths: how many slots each feature has; their sum is S.
    """

    rows: Int[Array, "R S"]
    weights: Float[Array, "R S"]
    widths: tuple[int, ...] = struct.field(pytree_node=False)

    def of(self, chosen: np.ndarray) -> FeatureSlots:
        """[n, S] those of some (host arrays); a number past the last one is the last one's."""
        places = np.minimum(chosen, self.rows.shape[0] - 1)
        return FeatureSlots(self.rows[places], self.weights[places], self.widths)


@struct.dataclass
class Features:
    """The slots by side; None where a side has no features."""

    user: FeatureSlots | None
    item: FeatureSlots | None
    interaction: FeatureSlots | None = None  # ordered as `context.interaction_rows` says

    def slots(self, table: str) -> FeatureSlots | None:
        """Those of a side: their rows are added to, or stand beside, rows of `user` or `item`."""
        by_side = {"user": self.user, "item": self.item, INTERACTION: self.interaction}
        return by_side.get(table)


@dataclasses.dataclass(frozen=True)
class FeatureSizes:
    """What shapes the tables of one side.

    Attributes:
      rows: T.
      features: F.
    """

    rows: int
    features: int


def make_slots(
    features: Sequence[Feature], most: int
) -> tuple[FeatureSlots | None, FeatureSizes | None]:
    """The slots (host arrays) of the features of one side; None without any.

    Args:
      most: M, values kept of a multi-valued feature.
    """
    if not features:
        return None, None
    rows, weights, first = [], [], 0
    for feature in features:
        if feature.kind == "numeric":
            numbers = feature.standardised()[:, None]
            missing = np.isnan(numbers)
            rows.append(first + missing.astype(np.int64))
            weights.append(np.where(missing, 1.0, numbers))
            first += 2
            continue
        counts, codes = feature.ragged()
        kept, chosen = padded(counts, codes, most)
        used = np.arange(chosen.shape[1])[None, :] < np.maximum(kept, 1)[:, None]
        missing = kept[:, None] == 0
        rows.append(first + np.where(missing, len(feature.values), chosen))
        weights.append(used / np.maximum(kept, 1)[:, None])
        first += len(feature.values) + 1
    slots = FeatureSlots(
        _host(np.concatenate(rows, axis=1), np.int32),
        _host(np.concatenate(weights, axis=1), np.float32),
        tuple(part.shape[1] for part in rows),
    )
    return slots, FeatureSizes(first, len(features))


def padded(counts: np.ndarray, codes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """([R] how many are kept, [R, S] the first codes of each row), S = max(1, longest, <= most).

    Places past a row's last code repeat it, so that they touch no other row; 0 where it has none.

    Args:
      counts: [R] codes of each row.
      codes: [n] row by row.
    """
    width = max(1, min(int(counts.max(initial=0)), most))
    kept = np.minimum(counts, width)
    if not codes.size:
        return kept, np.zeros((counts.size, width), np.int64)
    start = np.cumsum(counts) - counts
    place = np.minimum(np.arange(width)[None, :], np.maximum(kept - 1, 0)[:, None])
    entry = np.minimum(start[:, None] + place, codes.size - 1)
    return kept, np.where(kept[:, None] > 0, codes[entry], 0)


def _host(x: np.ndarray, dtype: type) -> Any:
    return np.ascontiguousarray(x, dtype)


# --- in a step -----------------------------------------------------------------------------


def each(slots: FeatureSlots, ids: Int[Array, "..."], rows: Float[Array, "... S D"]) -> jax.Array:
    """[..., F, D] what each feature of `ids` comes to, from the rows of their slots."""
    weighed = rows * slots.weights[ids][..., None]
    ends = np.cumsum(slots.widths)
    parts = [
        jnp.sum(weighed[..., end - width : end, :], axis=-2)
        for end, width in zip(ends, slots.widths, strict=True)
    ]
    return jnp.stack(parts, axis=-2)


def total(
    slots: FeatureSlots, ids: Int[Array, "..."], rows: Float[Array, "... S D"]
) -> Float[Array, "... D"]:
    """The sum of all features of `ids`, from the rows of their slots."""
    return jnp.sum(rows * slots.weights[ids][..., None], axis=-2)


def total_of_all(slots: FeatureSlots, table: Float[Array, "T D"]) -> Float[Array, "R D"]:
    """`total` of every user (item): a slot at a time, so that memory does not grow with S."""

    def add(sums: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, weights = slot
        return sums + weights[:, None] * table.at[rows].get(mode="promise_in_bounds"), None

    zeros = jnp.zeros((slots.rows.shape[0], table.shape[1]), table.dtype)
    return jax.lax.scan(add, zeros, (slots.rows.T, slots.weights.T))[0]


def is_used(slots: FeatureSlots, rows: Int[Array, "... S"]) -> Bool[Array, "... S"]:
    """Which slots count, of those that name `rows`: not those that repeat the one before."""
    first = np.zeros(sum(slots.widths), bool)
    first[np.cumsum((0, *slots.widths[:-1]))] = True
    return jnp.where(jnp.broadcast_to(first, rows.shape), True, rows != jnp.roll(rows, 1, axis=-1))
