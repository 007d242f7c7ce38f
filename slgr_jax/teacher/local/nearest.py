"""Each user's nearest items by text, as a recommender's list: what vectors know of a catalogue.

    s_ui = <user vector, item vector> / (|user vector| |item vector|)

The L best items of the whole catalogue outside the user's training items are the list; every other
item ranks below it (`unlisted="below"`), as with an LLM that writes its recommendations freely.
Vectors are those of `scorers.Cosine` (token vectors by field, whitened), or an embedding product,
centred first.

Shape letters: U users, I items, D width of a vector, L length of a list.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from slgr_jax import progress
from slgr_jax.config import NearestConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.local import embeddings, scorers
from slgr_jax.teacher.local.vectors import Vectors, unit
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.same_split import more_seen, seen_in

# Scores of some users for the whole catalogue that exist at once, in bytes.
_SCORED_BYTES = 1 << 28


def nearest(
    items: Vectors, users: Vectors, seen: Csr, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users, items, cosines) [n]: the `length` nearest items of each user, best first.

    Args:
      items, users: vectors; a row without one lists nothing and is not listed.
      seen: per user the items that are left out.
      length: L; a user with fewer items left lists those.
    """
    usable = np.flatnonzero(items.has)
    length = min(length, usable.size)
    column = np.full(items.has.size, -1, np.int64)
    column[usable] = np.arange(usable.size)

    catalogue = unit(items.values[usable]).T
    able = np.flatnonzero(users.has) if usable.size else np.zeros(0, np.int64)
    histories = seen.matrix(items.has.size, np.int8)
    chunk = max(1, _SCORED_BYTES // (4 * max(usable.size, 1)))

    pieces = []
    for begin in progress.over(range(0, able.size, chunk), "part", label="nearest"):
        owners = able[begin : begin + chunk]
        scores = unit(users.values[owners]) @ catalogue
        rows, hidden = histories[owners].nonzero()
        known = column[hidden] >= 0
        scores[rows[known], column[hidden[known]]] = -np.inf
        best = np.argpartition(-scores, length - 1, axis=1)[:, :length]
        values = np.take_along_axis(scores, best, axis=1)
        # Equal cosines in the order of the items (which of them the list ends with is left open).
        order = np.lexsort((best, -values), axis=1)
        best, values = (np.take_along_axis(x, order, axis=1) for x in (best, values))
        kept = np.isfinite(values)
        pieces.append((np.repeat(owners, kept.sum(axis=1)), usable[best[kept]], values[kept]))

    kinds = (np.int32, np.int32, np.float32)
    if not pieces:
        return tuple(np.zeros(0, kind) for kind in kinds)  # type: ignore[return-value]
    columns = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return tuple(x.astype(kind) for x, kind in zip(columns, kinds, strict=True))  # type: ignore[return-value]


def table(among: Vectors, of: Vectors, count: int) -> Int[np.ndarray, "R N"]:
    """The `count` rows of `among` with the largest cosine to each of `of`, but for itself; -1 past
    the last."""
    every = np.arange(of.has.size)
    oneself = Csr.from_pairs(every, every, of.has.size)
    owners, others, _ = nearest(among, of, oneself, count)
    out = np.full((of.has.size, count), -1, np.int32)
    out[owners, np.arange(owners.size) - np.searchsorted(owners, owners)] = others
    return out


def centred(
    items: Vectors, users: Vectors, seen: Csr, *, users_from: str
) -> tuple[Vectors, Vectors]:
    """Both without the mean vector that all items (all users) share.

    Vectors of most language models lie in a narrow cone: their mean makes every cosine near 1, and
    lists of everybody the items nearest to it (Mu and Viswanath 2018, arXiv 1702.01417).

    Args:
      users_from: of the embedding product; history: users are made anew of the centred items.
    """
    items = _without_mean(items)
    if users_from == "history":
        return items, embeddings.mean_of_history(seen, items)
    return items, _without_mean(users)


def _without_mean(vectors: Vectors) -> Vectors:
    if not vectors.has.any():
        return vectors
    directions = unit(vectors.values.astype(np.float32))
    values = np.where(vectors.has[:, None], directions - directions[vectors.has].mean(axis=0), 0)
    return Vectors(values.astype(np.float32), vectors.has & (values != 0).any(axis=1))


def vectors_of(
    dataset: Dataset, options: NearestConfig
) -> tuple[Vectors, Vectors, preferences.Provenance]:
    """Vectors of items and users, and what they are: of `--embeddings`, or of the item texts.

    Raises:
      UserError: the extra `llm` is not installed.
      ManifestError, ShardError: the embeddings do not fit or are damaged.
      ConfigError: --nocentre without --embeddings.
    """
    if not (options.centre or options.embeddings):
        raise ConfigError(
            "--nocentre is for --embeddings=NAME: the vectors of the item texts are centred and "
            "whitened field by field; drop it"
        )
    seen = dataset.positives(("train",))
    if not options.embeddings:
        cosine = scorers.Cosine(dataset, scorers.WordLlama())
        items = Vectors(cosine.vectors, cosine.described)
        provenance = preferences.Provenance(
            built_from=seen_in(dataset),
            model=cosine.name,
            prompt_hash=cosine.prompt_hash,
            score_kind="cosine",
        )
        return items, embeddings.mean_of_history(seen, items), provenance

    product = embeddings.load(dataset, options.embeddings)
    items, users, manifest = product.items, product.users, product.manifest
    if options.centre:
        items, users = centred(items, users, seen, users_from=manifest.users_from)
    elif manifest.users_from == "history" and dataset.as_split is not None:
        users = embeddings.mean_of_history(seen, items)
    return (
        items,
        users,
        preferences.Provenance(
            built_from=more_seen(manifest.built_from, seen_in(dataset)),
            model=manifest.model,
            prompt_hash=manifest.prompt_hash,
            score_kind="cosine of centred vectors" if options.centre else "cosine",
        ),
    )


def write(dataset: Dataset, common: TeachConfig, options: NearestConfig) -> schema.TeacherManifest:
    """Write DATA/teacher/NAME from texts (wordllama), or from DATA/embeddings/`--embeddings`.

    Raises:
      UserError: as `vectors_of`.
      InputError: there is nothing to list.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )

    seen = dataset.positives(("train",))
    items, users, provenance = vectors_of(dataset, options)
    columns = nearest(items, users, seen, options.listed)

    if not columns[0].size:
        raise InputError(
            f"{dataset.path}: no user has an item to list: {int(users.has.sum())} of "
            f"{dataset.n_users} users and {int(items.has.sum())} of {dataset.n_items} items have "
            "vectors"
        )

    provenance = dataclasses.replace(
        provenance,
        unlisted="below",
        training_items="none",
        score_kind=f"{provenance.score_kind}, nearest {options.listed}",
    )
    return preferences.write_product(
        dataset,
        common.name,
        pa.table(list(columns), schema=schema.TEACHER_SCORES),
        provenance=provenance,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )
