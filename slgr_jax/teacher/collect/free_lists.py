"""Free lists of an answer log -> one ranked list a user, over the items that their titles mean.

Shape letters: n titles of the log, U users, I items.
"""

from __future__ import annotations

import collections

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError, ManifestError
from slgr_jax.teacher.ask import candidates
from slgr_jax.teacher.products import titles, training_items, votes
from slgr_jax.teacher.products.titles import TitleIndex


def hidden_items(dataset: Dataset, log: schema.AnswerManifest) -> Csr | None:
    """[U] training items that the prompts of a log hid; None where nobody knows any more.

    The candidate sets that were asked with say so, if they are still what they were.
    """
    none = np.zeros(0, np.int64)
    users, items = [none], [none]
    for source in log.sources:
        if source["training_items"] != "hidden":
            continue
        try:
            drawn, manifest = candidates.load(dataset, str(source["candidates"]))
        except ManifestError:
            return None
        if candidates.content_hash(manifest) != source["candidates_hash"]:
            return None
        users.append(np.repeat(np.arange(dataset.n_users), drawn.hidden.counts))
        items.append(drawn.hidden.indices.astype(np.int64))
    keys = np.unique(np.concatenate(users) * dataset.n_items + np.concatenate(items))
    return Csr.from_pairs(*np.divmod(keys, dataset.n_items), dataset.n_users)


def scores(
    rows: pa.Table, dataset: Dataset, hidden: Csr | None, *, subtitles: bool
) -> tuple[pa.Table, pa.Table | None, dict[str, int]]:
    """The lists of a log as scores, how far its answers agree, what became of their titles.

    The score of an item is minus the mean of its places over a user's answers; an answer of m
    titles that leaves it out has it at place m + 1, as what is not listed ranks below.

    Args:
      rows: [n] schema.TITLES.
      dataset: its titles and training interactions.
      hidden: [U] training items that prompts hid: the other ones repeat the prompt, and are
        dropped. None: all are.
      subtitles: see `TitleIndex.match`.

    Returns:
      schema.TEACHER_SCORES; schema.TEACHER_VOTES, None where no user has two answers; the counts
      of `titles.counts` and of `training_items`.

    Raises:
      InputError: no title is of an item that its user may choose.
    """
    catalogue = TitleIndex.of(dataset)
    user_of, written = rows.column("user").to_numpy(), rows.column("title").to_pylist()
    starts = np.flatnonzero(rows.column("position").to_numpy() == 0)
    ends = np.append(starts[1:], rows.num_rows)
    how: collections.Counter[str] = collections.Counter()
    keys: list[int] = []
    above_the_rest: list[int] = []  # places of an item above those that its answer leaves out
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        listed: set[int] = set()
        matches = catalogue.match(written[start:end], subtitles=subtitles)
        for place, match in enumerate(matches, start=1):
            repeated = match.item in listed
            how["repeated" if repeated else match.how] += 1
            if match.item >= 0 and not repeated:
                listed.add(match.item)
                keys.append(int(user_of[start]) * dataset.n_items + match.item)
                above_the_rest.append(end - start + 1 - place)

    table, agreement = _mean_places(
        np.array(keys, np.int64), np.array(above_the_rest), user_of[starts], ends - starts, dataset
    )
    where = f"answer log of {rows.num_rows:,} titles"
    if not table.num_rows:
        raise InputError(f"{where}: none is of the catalogue of {dataset.path}")
    table, dropped = training_items.drop(table, dataset, where, hidden=hidden)
    return table, agreement, {**titles.counts(how), **dropped}


def _mean_places(
    keys: np.ndarray,
    above_the_rest: np.ndarray,
    users: np.ndarray,
    lengths: np.ndarray,
    dataset: Dataset,
) -> tuple[pa.Table, pa.Table | None]:
    """Minus the mean place of each (user, item), and their votes; `users` and `lengths` are of
    every answer."""
    answers = np.bincount(users, minlength=dataset.n_users)
    below_all = np.bincount(users, lengths + 1, dataset.n_users)
    pairs, pair = np.unique(keys, return_inverse=True)
    owners, items = np.divmod(pairs, dataset.n_items)
    above = np.bincount(pair, above_the_rest, pairs.size)
    places = below_all[owners] - above
    columns = [
        owners.astype(np.int32),
        items.astype(np.int32),
        (-places / answers[owners]).astype(np.float32),
    ]
    agreement = None
    if answers.max(initial=0) > 1:
        squares = np.bincount(pair, np.square(above_the_rest, dtype=np.float64), pairs.size)
        share = votes.share_of(above, squares, answers[owners])
        agreement = votes.table(pairs, share, dataset.n_items)
    return pa.table(columns, schema=schema.TEACHER_SCORES), agreement
