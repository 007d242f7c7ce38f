"""How far the several answers that a teacher's word is made of agree: votes in [0, 1].

A word on (user, item) may be the mean of T answers: of permutations and samples of one LLM, or of
several LLMs. With v_t >= 0 what answer t says of the item (the value whose mean the score is, 0
where it leaves the item out),

    votes = (sum_t v_t)^2 / (T sum_t v_t^2)

which is 1 where all say the same and k / T where k of them name the item alike and the others do
not (the fairness index of Jain, Chiu and Hawe 1984). A gate reads it: `--gate_inputs=votes`.

Shape letters: m pairs of user and item, n values.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.teacher.products import preferences


def share_of(
    total: np.ndarray, squares: np.ndarray, answers: np.ndarray | int | float
) -> np.ndarray:
    """[m] float32 votes; 1 where every value is 0.

    Args:
      total, squares: [m] the sums of v_t and of their squares.
      answers: T, of each or of all.
    """
    most = np.asarray(answers * squares, np.float64)
    share = np.divide(total.astype(np.float64) ** 2, most, out=np.ones(most.shape), where=most > 0)
    return np.minimum(share, 1.0).astype(np.float32)


def of_answers(
    keys: np.ndarray, place: np.ndarray, values: np.ndarray, n_items: int
) -> pa.Table | None:
    """`schema.TEACHER_VOTES` of pairs with an answer; None where none has two.

    Args:
      keys: [m] user * n_items + item.
      place: [n] of which pair each answer is; values: [n] what it says, scaled here from the
        lowest, 0, to the highest, 1.
    """
    answers = np.bincount(place, minlength=keys.size)
    if answers.max(initial=0) < 2:
        return None
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.ones(values.size)
    total = np.bincount(place, scaled, keys.size)
    votes = share_of(total, np.bincount(place, scaled**2, keys.size), answers)
    return table(keys[answers > 0], votes[answers > 0], n_items)


def table(keys: np.ndarray, votes: np.ndarray, n_items: int) -> pa.Table:
    """`schema.TEACHER_VOTES` of pairs user * n_items + item."""
    pairs = [pa.array(part.astype(np.int32)) for part in np.divmod(keys, n_items)]
    return pa.table([*pairs, pa.array(votes)], schema=schema.TEACHER_VOTES)


def load(dataset: Dataset, name: str, *, verify: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Keys user * I + item of a product, [m] ascending, and their votes, [m].

    Raises:
      ConfigError: the product's answers are not made of several.
      ManifestError, ShardError: there is no such product, or it is damaged.
    """
    root = preferences.product_path(dataset.path, name)
    manifest = schema.read_teacher_manifest(root)
    if not manifest.votes:
        raise ConfigError(
            f"--gate_inputs=votes: teacher {name} does not hold how far several answers agree; "
            "make it of several (slgr teach combine, or slgr teach requests --permutations=2 and "
            "collect), or drop votes"
        )
    columns = shards.read_shards(root, manifest.votes, schema.TEACHER_VOTES, verify=verify)
    users, items, votes = (columns.column(field).to_numpy() for field in columns.column_names)
    keys = users.astype(np.int64) * dataset.n_items + items
    order = np.argsort(keys, kind="stable")
    return keys[order], votes[order]
