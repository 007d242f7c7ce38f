"""A product of vectors as a teacher: which of two items it puts nearer to a user.

    s_ui = cos(z_u, z_i)

That is what a gate is taught by and asked about where a guidance reads vectors and no lists: its
margins are differences of cosines, and it has a word on any two items that have a vector.

Shape letters: R users or items, Z numbers of a vector.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.models.backbones.base import unit_rows
from slgr_jax.sampling.teacher_arrays import TeacherLists, teacher_lists
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import unit

# Items outside all of a user's that stand for what a chosen item of a part is compared with.
_OTHERS = 20
_ENTRIES_AT_ONCE = 1 << 14


def cosines(a: Float[Array, "*N Z"], b: Float[Array, "*N Z"]) -> Float[Array, "*N"]:
    """Cosine of each two vectors; 0 where one is zero."""
    return jnp.sum(unit_rows(a) * unit_rows(b), axis=-1)


def lists(dataset: Dataset, name: str, part: str) -> TeacherLists:
    """Cosines of users with their items of a part, and with `_OTHERS` that are no items of theirs.

    The others are drawn with a fixed seed; users and items without a vector are left out.

    Args:
      name: product under DATA/embeddings.
      part: valid or test.

    Raises:
      ManifestError, ShardError: as `embeddings.load`.
    """
    product = embeddings.load(dataset, name)
    parts = ("train", "valid") if part == "valid" else ("train", "valid", "test")
    everything, chosen = dataset.positives(parts), dataset.part(part)
    users = np.unique(chosen.users)
    rng = np.random.default_rng(0)
    drawn = rng.integers(dataset.n_items, size=(users.size, _OTHERS))
    drawn_by = np.repeat(users, _OTHERS)
    outside = ~everything.contains(drawn_by, drawn.ravel())
    pairs = np.concatenate(
        [
            np.stack([chosen.users, chosen.items], axis=1),
            np.stack([drawn_by[outside], drawn.ravel()[outside]], axis=1),
        ]
    )
    pairs = np.unique(
        pairs[product.users.has[pairs[:, 0]] & product.items.has[pairs[:, 1]]], axis=0
    )

    scores = np.empty(len(pairs), np.float32)
    for begin in range(0, len(pairs), _ENTRIES_AT_ONCE):
        some = slice(begin, begin + _ENTRIES_AT_ONCE)
        of_users, of_items = (
            product.users.values[pairs[some, 0]],
            product.items.values[pairs[some, 1]],
        )
        scores[some] = np.sum(unit(of_users) * unit(of_items), axis=1)
    order = np.lexsort((scores, pairs[:, 0]))
    pairs, scores = pairs[order], scores[order]
    offsets = np.searchsorted(pairs[:, 0], np.arange(dataset.n_users + 1))
    return teacher_lists(
        offsets,
        pairs[:, 1],
        scores,
        min_gap=0.0,
        unlisted_share=0.0,
        unlisted_below=False,
        positives=Csr.from_pairs(pairs[:0, 0], pairs[:0, 1], dataset.n_users),
        n_items=dataset.n_items,
    )
