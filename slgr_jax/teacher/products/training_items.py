"""Answers on a user's own training items: the prompt showed them, and the list gives them back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError

# Counts of a manifest: rows that were dropped, and users who had some.
DROPPED, USERS = "dropped_training_item_rows", "users_with_training_items"


def drop(
    table: pa.Table, dataset: Dataset, where: str, *, hidden: Csr | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """The rows that name no training item of their user, and counts of the others.

    Args:
      table: one of `schema.TEACHER_SCHEMAS`, indices; a preference is dropped where either of its
        items is a training item.
      dataset: training interactions.
      where: names the table in errors.
      hidden: [U] training items that stay: the prompts hid them.

    Raises:
      InputError: every answer is on a training item of its user: nothing would be taught.
    """
    trained = dataset.positives(("train",))
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), trained.counts)
    keys = owners * dataset.n_items + trained.indices  # ascending: rows of a Csr are
    if hidden is not None:
        hiding = np.repeat(np.arange(dataset.n_users, dtype=np.int64), hidden.counts)
        keys = keys[~np.isin(keys, hiding * dataset.n_items + hidden.indices)]

    users = table.column("user").to_numpy()
    echoes = np.zeros(table.num_rows, bool)
    for name in ("item", "preferred", "other"):
        if name in table.column_names:
            wanted = users.astype(np.int64) * dataset.n_items + table.column(name).to_numpy()
            place = np.minimum(np.searchsorted(keys, wanted), max(keys.size - 1, 0))
            echoes |= keys[place] == wanted if keys.size else False

    answered = np.ones(table.num_rows, bool)
    if "score" in table.column_names:
        answered = table.column("score").is_valid().to_numpy()
    if answered.any() and not (answered & ~echoes).any():
        user = int(users[echoes][0])
        raise InputError(
            f"{where}: all {int(answered.sum())} answers are on training items of their own users "
            f"(user {dataset.user_ids[user].as_py()!r} first): they echo the prompt and teach "
            "nothing. If prompts hid these items, say --training_items=hidden; "
            "--keep_training_items keeps them as they are"
        )
    counts = {DROPPED: int(echoes.sum()), USERS: int(np.unique(users[echoes]).size)}
    return table.filter(pa.array(~echoes)), counts
