"""Several teachers as one: products of the same dataset, fused.

With r the rank of an item among the n items that a teacher answered for a user (1 = highest score,
ties share their mean rank) and s its score, the teacher says of the item

    reciprocal  1 / r
    rrf         1 / (k + r), k = 60     reciprocal rank fusion (Cormack, Clarke, Buettcher 2009)
    borda       1 - (r - 1) / n
    mean        (s - low) / (high - low), the extremes of the whole product; .5 where they are equal
    latest      s itself: of several teachers the last one's, as one that was asked anew

and, but for latest, the fused score is the mean over the teachers; for rrf the number of teachers
times the mean, which is the sum where all of them speak. Who speaks of an item follows from what
the products say of unlisted items:

    all `below`     every teacher: 0 where it does not list the item. The result is `below`.
    some `unknown`  who answered, and a teacher `below` that has a list of the user: 0 where the
                    item is not on it. The result is `unknown`.
    mean, latest    only who answered, in either case: no place on their scales is that of unlisted
                    items.

The product also keeps how far these values agree (`votes.py`).

Shape letters: T teachers, U users, n rows of a teacher, m of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from slgr_jax.config import CombineConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.products import preferences, rows
from slgr_jax.teacher.products.same_split import more_seen
from slgr_jax.teacher.products.votes import share_of

_SAYS = {
    "reciprocal": "reciprocal: mean 1/rank",
    "rrf": "rrf: sum 1/({k} + rank)",
    "borda": "borda: mean 1 - (rank - 1)/length",
    "mean": "mean of scores scaled to 0..1",
    "latest": "score of the last teacher that has one",
}
# Methods of those who answered alone.
_OF_SPEAKERS = ("mean", "latest")


@dataclasses.dataclass(frozen=True)
class TeacherScores:
    """What one teacher answered.

    Attributes:
      offsets: [U + 1]; rows of user u are `offsets[u]:offsets[u + 1]`.
      items: [n] int32 from 0, none twice for a user.
      scores: [n] finite floats, ascending within a user.
      below: unlisted items rank below the list.
    """

    offsets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    below: bool


@dataclasses.dataclass(frozen=True)
class Fused:
    """Every item that some teacher answered, in the order of user, then item.

    Attributes:
      users, items: [m] int32.
      scores: [m] float32, computed in float64.
      votes: [m] int32: how many teachers answered.
      agreement: [m] float32: share of the teachers that speak alike of it (`votes.share_of`).
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    votes: np.ndarray
    agreement: np.ndarray


def fuse(teachers: Sequence[TeacherScores], method: str, *, rrf_k: int = 60) -> Fused:
    """The fused scores of what `teachers` (one or more, of the same U users) answered.

    Args:
      method: one of `config.FUSIONS`, see above.
      rrf_k: k of rrf.
    """
    bound = 1 + max(int(teacher.items.max(initial=0)) for teacher in teachers)
    extremes = [
        (float(teacher.scores.min(initial=np.inf)), float(teacher.scores.max(initial=-np.inf)))
        for teacher in teachers
    ]
    all_below = all(teacher.below for teacher in teachers)
    pieces_by_first: dict[int, tuple[np.ndarray, ...]] = {}

    def fuse_users(first: int, last: int) -> None:
        keys, said, unknown = [], [], []
        lists = np.zeros(last - first, np.int64)  # of each user, by teachers `below`
        for teacher, (low, high) in zip(teachers, extremes, strict=True):
            lengths = np.diff(teacher.offsets[first : last + 1])
            users = np.repeat(np.arange(last - first, dtype=np.int64), lengths)
            span = slice(teacher.offsets[first], teacher.offsets[last])
            keys.append(users * bound + teacher.items[span])
            unknown.append(np.full(users.size, float(not teacher.below)))
            lists += teacher.below & (lengths > 0)
            scores = teacher.scores[span]
            if method in _OF_SPEAKERS:
                said.append(_scaled(scores, low, high) if method == "mean" else scores)
            else:
                said.append(_of_ranks(rows.ranks(users, scores), lengths, method, rrf_k))

        pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
        owners, items = np.divmod(pairs, bound)
        values = np.concatenate(said)
        total = np.bincount(place, values)
        votes = np.bincount(place)

        if method in _OF_SPEAKERS:
            speakers = votes
        elif all_below:
            speakers = np.full(pairs.size, len(teachers))
        else:
            speakers = np.bincount(place, np.concatenate(unknown)) + lists[owners]
        fused = total / speakers
        if method == "rrf":
            fused = total * (len(teachers) / speakers)  # to the bit the sum where all speak
        if method == "latest":
            fused[place] = values  # of values at one place the last one stays

        pieces_by_first[first] = (
            *(x.astype(np.int32) for x in (owners + first, items)),
            fused.astype(np.float32),
            votes.astype(np.int32),
            share_of(total, np.bincount(place, values**2), speakers),
        )

    rows.over_users(np.sum([teacher.offsets for teacher in teachers], axis=0), fuse_users)
    kinds = (np.int32, np.int32, np.float32, np.int32, np.float32)
    pieces = [tuple(np.zeros(0, kind) for kind in kinds)]
    pieces += [pieces_by_first[first] for first in sorted(pieces_by_first)]
    return Fused(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _scaled(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    """[n] float64: scores of one teacher from its lowest, 0, to its highest, 1; .5 if all equal."""
    if high <= low:
        return np.full(scores.size, 0.5)
    return (scores.astype(np.float64) - low) / (high - low)


def _of_ranks(ranks: np.ndarray, lengths: np.ndarray, method: str, rrf_k: int) -> np.ndarray:
    """[n] float64: what `method` gives for ranks in lists of these `lengths` (one per user)."""
    if method == "borda":
        return 1 - (ranks - 1) / np.repeat(lengths, lengths)
    return 1 / (ranks + (rrf_k if method == "rrf" else 0))


def combine(
    dataset: Dataset, common: TeachConfig, options: CombineConfig
) -> schema.TeacherManifest:
    """Write the products `options.names` of `dataset`, fused, as the product `common.name`.

    `built_from` is that of the part that has seen the most, `training_items` likewise. `model`
    names each part, its model and a hash of its answers; `score_kind` the method. An item that
    fewer than `min_votes` teachers answered is not in the result: unlisted.

    Raises:
      ConfigError: fewer than two names, one of them twice, the result's own among them, or more
        votes than teachers.
      InputError: a part holds preferences, the result exists, or nothing would be in it.
      ManifestError, ShardError: a part cannot be used, as for `preferences.load`.
    """
    names = _names(dataset, common.name, options)
    root = preferences.product_path(dataset.path, common.name)
    shards.check_target(root, overwrite=common.overwrite)

    parts = [_load(dataset, name) for name in names]
    manifests = [part.manifest for part in parts]
    answers = [
        TeacherScores(part.offsets, part.items, part.scores, part.manifest.unlisted == "below")
        for part in parts
    ]

    fused = fuse(answers, options.method, rrf_k=options.rrf_k)
    kept = fused.votes >= options.min_votes
    if not kept.any():
        most = fused.votes.max(initial=0)
        raise InputError(
            f"no item of a user has an answer of {options.min_votes} of {listing(names)}, the most "
            f"is {most}: " + ("lower --min_votes" if most else "combine others")
        )

    columns = [
        x if kept.all() else x[kept]
        for x in (fused.users, fused.items, fused.scores, fused.agreement)
    ]
    of_pairs, scores, agreement = columns[:2], columns[2], columns[3]
    below = all(part.below for part in answers)
    return preferences.write_product(
        dataset,
        common.name,
        pa.table([*of_pairs, scores], schema=schema.TEACHER_SCORES),
        provenance=preferences.Provenance(
            built_from=more_seen(*(m.built_from for m in manifests)),
            unlisted="below" if below else "unknown",
            model=preferences.COMBINED + ", ".join(map(_origin, manifests)),
            prompt_hash="+".join(dict.fromkeys(m.prompt_hash for m in manifests if m.prompt_hash)),
            score_kind=_score_kind(options, len(names), below=below),
            training_items=_training_items(manifests),
        ),
        counts={"dropped_by_min_votes": int(kept.size - kept.sum())},
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
        votes=pa.table([*of_pairs, agreement], schema=schema.TEACHER_VOTES),
    )


def _names(dataset: Dataset, result: str, options: CombineConfig) -> list[str]:
    names = [name.strip() for name in options.names.split(",") if name.strip()]
    choices = listing(preferences.products(dataset.path))
    if len(names) < 2:
        raise ConfigError(
            f"--names={options.names!r} names {len(names)} of the two or more teachers to combine; "
            f"{dataset.path} has: {choices}"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"--names has {listing(repeated)} more than once; {dataset.path} has: {choices}"
        )
    if result in names:
        raise ConfigError(f"--name={result} is one of --names; write the result under another name")
    if options.min_votes > len(names):
        raise ConfigError(
            f"--min_votes={options.min_votes} is more than the {len(names)} teachers of --names"
        )
    return names


def _load(dataset: Dataset, name: str) -> preferences.Teacher:
    teacher = preferences.load(dataset, name)
    if teacher.manifest.kind != "scores":
        raise InputError(
            f"teacher {name!r} holds {teacher.manifest.kind}, combine takes scores: leave it out "
            "of --names, or collect its answers again with --pairs_to=scores"
        )
    return teacher


def _origin(part: schema.TeacherManifest) -> str:
    """A part as the result's manifest names it."""
    model = f"{part.model}, " if part.model else ""
    return f"{part.name} ({model}answers {schema.files_hash(part.files)[:8]})"


def _training_items(parts: Sequence[schema.TeacherManifest]) -> str:
    most_seen = max((part.training_items for part in parts), key=schema.TRAINING_ITEMS.index)
    # What was hidden from one teacher may have been history to another, who left it off its list
    # for that; where unlisted is below, this counts against the item and tests nobody.
    if most_seen == "hidden" and any(part.unlisted == "below" for part in parts):
        return "shown"
    return most_seen


def _score_kind(options: CombineConfig, teachers: int, *, below: bool) -> str:
    text = _SAYS[options.method].format(k=options.rrf_k)
    if below and options.method not in _OF_SPEAKERS:
        text += ", 0 where a teacher does not list the item"
    if options.min_votes > 1:
        text += f", answered by at least {options.min_votes} of {teachers}"
    return text
