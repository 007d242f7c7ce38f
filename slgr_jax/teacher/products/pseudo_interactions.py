"""Pseudo-interactions: what users take in an LLM's word, each with a weight in (0, 1].

A product of them is a teacher product of scores whose score is the weight (`score_kind="weight"`):
it is checked, controlled, exported and audited as any other. It is made of a file, or derived from
a product of lists; in training `--guidance=interactions` learns them beside the interactions of
the data (guidance/interactions.py). Nothing here looks at validation or test: a user's own training
items are left out, and how rare an item is, training says.

Shape letters: U users, I items, n rows, m rows that are left.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from slgr_jax.config import DeriveConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError
from slgr_jax.teacher.products import answer_files, answers, preferences, training_items
from slgr_jax.teacher.products.rows import Teacher

WEIGHT = "weight"  # the `score_kind` of a product of pseudo-interactions


class Pseudo(NamedTuple):
    """Pseudo-interactions by user, those of a user as a `Teacher` has them: the best last.

    Attributes:
      offsets: [U + 1]; items, scores: [m].
      weighted: scores are weights; otherwise each weighs 1, and scores only order them.
    """

    offsets: Int[np.ndarray, "U1"]
    items: Int[np.ndarray, "m"]
    scores: Float[np.ndarray, "m"]
    weighted: bool


def import_file(
    dataset: Dataset,
    path: pathlib.Path,
    name: str,
    *,
    provenance: preferences.Provenance,
    names: Mapping[str, str],
    unknown: str = "error",
    delimiter: str = ",",
    items_as: str = "ids",
    subtitles: bool = False,
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.TeacherManifest:
    """A file with user, item and optionally weight (1 without one) as the product NAME.

    Args:
      path: Parquet, Arrow, JSON lines or CSV.
      provenance: its `score_kind`, `unlisted` and `training_items` are what they are here.
      names: what the file's columns are called -> user, item, weight.
      unknown, delimiter, items_as, subtitles: as of `answers.read`.

    Raises:
      InputError: the file cannot be used; a weight that is missing or outside (0, 1]; rows that
        give one pair two weights.
    """
    shards.check_target(preferences.product_path(dataset.path, name), overwrite=overwrite)
    titled = items_as == "titles"
    raw = answer_files.read(path, delimiter, titled=titled, names=names, kind="interactions")
    answer_files.kind_of(raw.column_names, path, titled=titled, kind="interactions")
    if "label" in raw.column_names:
        raise InputError(
            f"{path} has a column label, and pseudo-interactions are what users take: import what "
            "they would not take as --scores with user, item, score for --guidance=kd, or as "
            "user, preferred, other for --guidance=pairwise"
        )
    ones = pa.chunked_array([np.ones(raw.num_rows, np.float32)])
    weights = raw.column("weight") if "weight" in raw.column_names else ones
    weighted = raw.select(["user", "item"]).append_column("score", weights)
    table, counts, _ = answers.read(
        path,
        dataset,
        unknown=unknown,
        items_as=items_as,
        subtitles=subtitles,
        raw=weighted,
    )
    _check_weights(table, str(path), dataset)
    table, dropped = training_items.drop(table, dataset, str(path))
    return preferences.write_product(
        dataset,
        name,
        table,
        provenance=dataclasses.replace(
            provenance, score_kind=WEIGHT, unlisted="below", training_items="none"
        ),
        counts={**counts, **dropped},
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
    )


def _check_weights(table: pa.Table, where: str, dataset: Dataset) -> None:
    weights = table.column("score").to_numpy()
    bad = ~((weights > 0) & (weights <= 1))  # NaN, a missing one, is neither
    if not bad.any():
        return
    row = int(np.argmax(bad))
    user = dataset.user_ids[int(table.column("user")[row].as_py())].as_py()
    item = dataset.items.column("item_id")[int(table.column("item")[row].as_py())].as_py()
    said = "no weight" if np.isnan(weights[row]) else f"weight {weights[row]:g}"
    raise InputError(
        f"{where}: {int(bad.sum())} of {bad.size} weights are not above 0 and up to 1: user "
        f"{user!r}, item {item!r} has {said}; leave out what the user would not take"
    )


def derive(dataset: Dataset, common: TeachConfig, options: DeriveConfig) -> schema.TeacherManifest:
    """The first places of the lists of a product as the product NAME.

    Raises:
      ManifestError, ShardError: the product cannot be used.
      InputError: it states pairs, or none of its places is left.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    teacher = preferences.load(dataset, options.lists)
    _refuse_pairs(teacher, f"teacher {options.lists!r}")
    users, items, places = first_places(dataset, teacher, options.places)
    rare = rare_items(dataset, options.rare_items)[items]
    users, items, places = users[rare], items[rare], places[rare]
    if options.users_per_item:
        kept = np.sort(_first_of_each(items, places, users, options.users_per_item))
        users, items, places = users[kept], items[kept], places[kept]
    if not users.size:
        rarity = f" with at most {options.rare_items} training interactions"
        raise InputError(
            f"teacher {options.lists!r} names no item{rarity if options.rare_items >= 0 else ''} "
            f"outside its users' own training items among its first places; raise --rare_items or "
            "--places"
        )
    answers_hash = schema.files_hash(teacher.manifest.files)[:8]
    provenance = preferences.Provenance(
        built_from=teacher.manifest.built_from,
        model=f"interactions of {options.lists} (answers {answers_hash})",
        prompt_hash=teacher.manifest.prompt_hash,
    )
    return write(dataset, common, users, items, weights_of(places, options.weights), provenance)


def write(
    dataset: Dataset,
    common: TeachConfig,
    users: Int[np.ndarray, "n"],
    items: Int[np.ndarray, "n"],
    weights: Float[np.ndarray, "n"],
    provenance: preferences.Provenance,
) -> schema.TeacherManifest:
    """Pseudo-interactions, none of them a training interaction, as the product NAME."""
    columns = [users.astype(np.int32), items.astype(np.int32), weights.astype(np.float32)]
    return preferences.write_product(
        dataset,
        common.name,
        pa.table(columns, schema=schema.TEACHER_SCORES),
        provenance=dataclasses.replace(
            provenance, score_kind=WEIGHT, unlisted="below", training_items="none"
        ),
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def rare_items(dataset: Dataset, most: int) -> Bool[np.ndarray, "I"]:
    """Items with at most so many training interactions; -1: every item."""
    return np.asarray(dataset.popularity <= most) if most >= 0 else np.ones(dataset.n_items, bool)


def weights_of(places: Int[np.ndarray, "n"], weights: str) -> Float[np.ndarray, "n"]:
    """What each weighs by its place, 1 the first; see `DeriveConfig.weights`."""
    if weights == "one":
        return np.ones(places.size, np.float32)
    return (1 / np.log2(1 + places)).astype(np.float32)


def first_places(
    dataset: Dataset, teacher: Teacher, most: int
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Users, items and places (1 the best) of the first `most` of each list; 0: of all.

    A user's own training items have no place. Of equal scores the lower item comes first.
    """
    places = _places(dataset, teacher)
    kept = _among_first(places, most)
    return _owners(teacher)[kept], teacher.items[kept], places[kept]


def of_teacher(
    dataset: Dataset, teacher: Teacher, places: int, *, knob: str, whole: bool = True
) -> Pseudo:
    """The pseudo-interactions that a product states.

    Args:
      places: of lists, the first so many of each; 0: all.
      knob: who asks, for errors.
      whole: take a product of weights whole, whatever `places`.

    Raises:
      InputError: it states pairs, lists of which it is not known how unlisted items rank, or
        weights outside (0, 1].
    """
    manifest = teacher.manifest
    where = f"{knob}: teacher {manifest.name!r}"
    _refuse_pairs(teacher, where)
    weighted = manifest.score_kind == WEIGHT
    if weighted and not ((teacher.scores > 0) & (teacher.scores <= 1)).all():
        low, high = teacher.scores.min(), teacher.scores.max()
        raise InputError(
            f"{where} has weights from {low:g} to {high:g}; they must be above 0 and up to 1: "
            "import its file anew (slgr teach import --interactions=FILE --overwrite)"
        )
    if manifest.unlisted != "below":
        raise InputError(
            f"{where} scores items that it was asked about, and does not say that users take them "
            f"(its manifest says unlisted={manifest.unlisted}): derive interactions from it with "
            f"slgr teach interactions --lists={manifest.name} --places=K, or use --guidance=kd"
        )
    kept = _among_first(_places(dataset, teacher), 0 if weighted and whole else places)
    counts = np.bincount(_owners(teacher)[kept], minlength=dataset.n_users)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Pseudo(offsets, teacher.items[kept], teacher.scores[kept], weighted)


def _refuse_pairs(teacher: Teacher, where: str) -> None:
    if teacher.manifest.kind != "scores":
        raise InputError(
            f"{where} states {teacher.manifest.kind}, of which no item is one that its user takes; "
            "use --guidance=pairwise with --guidance_loss=logistic"
        )


def _owners(teacher: Teacher) -> Int[np.ndarray, "n"]:
    counts = np.diff(teacher.offsets)
    return np.repeat(np.arange(counts.size), counts)


def _places(dataset: Dataset, teacher: Teacher) -> Int[np.ndarray, "n"]:
    """Place of each row among those of its user that are no training items; 0: it is one."""
    owners = _owners(teacher)
    outside = ~dataset.positives(("train",)).contains(owners, teacher.items)
    best_first = np.lexsort((teacher.items, -teacher.scores, owners))
    counted = outside[best_first].astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counted)])
    place = before[1:] - before[teacher.offsets[owners[best_first]]]
    places = np.empty(owners.size, np.int64)
    places[best_first] = place * counted
    return places


def _among_first(places: Int[np.ndarray, "n"], most: int) -> Bool[np.ndarray, "n"]:
    return (places > 0) & ((places <= most) if most else True)


def _first_of_each(
    items: Int[np.ndarray, "n"],
    places: Int[np.ndarray, "n"],
    users: Int[np.ndarray, "n"],
    most: int,
) -> Int[np.ndarray, "m"]:
    """Rows of the first `most` users of each item, by place, then user."""
    order = np.lexsort((users, places, items))
    starts = np.searchsorted(items[order], items[order], side="left")
    return order[np.arange(order.size) - starts < most]
