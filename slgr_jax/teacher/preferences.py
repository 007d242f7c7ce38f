"""Teacher scores and preferences: files with external ids <-> products under DATA/teacher.

A teacher is an LLM that somebody ran offline. `import_scores` turns its answers into a
product: Arrow shards, and a manifest that ties them to one dataset and says what the teacher
had seen. `load` gives a run the arrays, or refuses them and says why.

Shape letters: U users, I items, n answered scores, P stated preferences.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.config import SliceConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset, beaten
from slgr_jax.data.dataset import load as load_dataset
from slgr_jax.errors import ConfigError, ManifestError, ShardError, listing
from slgr_jax.teacher import answers

PathLike = str | os.PathLike[str]

ROWS_PER_SHARD = 4_194_304
_MADE_BY = "python launch/teach.py import --data={data} --scores=FILE --name={name} --overwrite"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the maker of a product states about it; nothing in the scores can prove it.

    Attributes:
      built_from: one of `schema.BUILT_FROM`.
      unlisted: one of `schema.UNLISTED`.
      model, prompt_hash, score_kind: free text for reports.
    """

    built_from: str = "train_only"
    unlisted: str = "unknown"
    model: str = ""
    prompt_hash: str = ""
    score_kind: str = "score"

    def __post_init__(self) -> None:
        for name, choices in (("built_from", schema.BUILT_FROM), ("unlisted", schema.UNLISTED)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"--{name}={getattr(self, name)!r} is not one of: {listing(choices)}"
                )


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A product in memory; the arrays of the other kind are empty.

    Attributes:
      manifest: what the product is.
      offsets: [U + 1] int64; rows of user u are `offsets[u]:offsets[u + 1]`, for either kind.
      items, scores: kind scores, [n] int32 and float32: answered entries, within a user by
        score ascending, then item: equal scores are one run, and the entries that entry k is
        preferred over are the first `beaten(...)[k]` of its user's slice.
      users, preferred, other, margin: kind preferences, [P] int32 (margin float32), by user.
    """

    manifest: schema.TeacherManifest
    offsets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    preferred: np.ndarray
    other: np.ndarray
    margin: np.ndarray


def usable_pairs(teacher: Teacher, *, min_gap: float = 0.0) -> np.ndarray:
    """[U] int64: ordered pairs that the teacher states for each user among listed items.

    Scores: pairs of answered items whose scores differ by at least `min_gap`; a tie is no pair.
    Preferences: rows with at least that margin. Pairs of a listed with an unlisted item
    (`manifest.unlisted == "below"`) are not counted.
    """
    if teacher.manifest.kind == "scores":
        per_row = beaten(teacher.offsets, teacher.scores, min_gap)
    else:
        per_row = (teacher.margin >= min_gap).astype(np.int64)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_row)])
    return sums[teacher.offsets[1:]] - sums[teacher.offsets[:-1]]


# --- reading a product -------------------------------------------------------------------------


def load(dataset: Dataset, name: str, *, verify: bool = True) -> Teacher:
    """Read the product `name` of `dataset`, or refuse it.

    Args:
      dataset: what the product must fit: same id map, same split.
      name: directory under DATA/teacher.
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError: no such product, made for another split or id map, or the teacher has
        seen evaluation data.
      ShardError: a shard is missing, truncated or corrupt, or holds an index outside the id
        maps, a score that is not finite, or the same pair twice.
    """
    root = product_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        raise ManifestError(
            f"{dataset.path} has no teacher {name!r}; it has: {listing(products(dataset.path))}"
        )
    manifest = schema.read_teacher_manifest(root)
    if manifest.kind not in schema.TEACHER_SCHEMAS:
        known = listing(schema.TEACHER_SCHEMAS)
        raise ManifestError(f"{root}: kind {manifest.kind!r} is not one of: {known}")
    again = _MADE_BY.format(data=dataset.path, name=name)
    for what in ("id_map_hash", "split_hash"):
        built, found = getattr(manifest, what), getattr(dataset.manifest, what)
        if built != found:
            thing = {"id_map_hash": "id map", "split_hash": "split"}[what]
            raise ManifestError(
                f"teacher {name!r} was built for {thing} {built[:8]}, {dataset.path} has {thing} "
                f"{found[:8]}; rebuild it: {again}"
            )
    if manifest.built_from not in schema.BUILT_FROM or manifest.built_from == "includes_eval":
        raise ManifestError(
            f"teacher {name!r} says built_from={manifest.built_from}: training on it would leak "
            "evaluation data; have the LLM answer from training interactions only, then rebuild "
            f"it: {again}"
        )
    if manifest.unlisted not in schema.UNLISTED:
        known = listing(schema.UNLISTED)
        raise ManifestError(f"{root}: unlisted {manifest.unlisted!r} is not one of: {known}")
    expected = schema.TEACHER_SCHEMAS[manifest.kind]
    table = shards.read_shards(root, manifest.files, expected, verify=verify)
    return _teacher(manifest, table, dataset.n_users, dataset.n_items, str(root))


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/teacher/NAME; a name that is not one plain directory name is a `ConfigError`."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise ConfigError(
            f"{name!r} cannot name a teacher product: use letters, digits and . _ + -, e.g. gpt4o"
        )
    return pathlib.Path(data) / schema.TEACHER_DIR / name


def products(data: PathLike) -> list[str]:
    """Names of the finished products under DATA/teacher, sorted."""
    found = (pathlib.Path(data) / schema.TEACHER_DIR).glob(f"*/{schema.MANIFEST}")
    return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))


def _teacher(
    manifest: schema.TeacherManifest, table: pa.Table, n_users: int, n_items: int, where: str
) -> Teacher:
    table = table.combine_chunks()
    arrays = {name: table.column(name).to_numpy() for name in table.column_names if name != "score"}
    for name, bound in (("user", n_users), *((n, n_items) for n in ("item", "preferred", "other"))):
        ids = arrays.get(name)
        if ids is not None and ids.size and (ids.min() < 0 or ids.max() >= bound):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ShardError(f"{where}: {name} index {bad} is outside the id map of {bound}")
    users, none = arrays["user"], np.zeros(0, np.int32)
    if manifest.kind == "scores":
        _refuse_repeats(users, arrays["item"], n_items, where)
        answered = table.column("score").is_valid().to_numpy()
        users, items = users[answered], arrays["item"][answered]
        scores = table.column("score").drop_null().to_numpy()
        _refuse_non_finite(scores, "score", where)
        order = np.lexsort((items, scores, users))
        offsets = _offsets(users, n_users)
        floats = np.zeros(0, np.float32)
        return Teacher(manifest, offsets, items[order], scores[order], none, none, none, floats)
    preferred, other, margin = arrays["preferred"], arrays["other"], arrays["margin"]
    _refuse_non_finite(margin, "margin", where)
    if margin.size and margin.min() <= 0:
        raise ShardError(f"{where}: margin {margin.min()} is not greater than 0")
    if (preferred == other).any():
        item = preferred[preferred == other][0]
        raise ShardError(f"{where}: item {item} is preferred over itself")
    if (users[1:] < users[:-1]).any():
        order = np.argsort(users, kind="stable")
        users, preferred, other, margin = (
            array[order] for array in (users, preferred, other, margin)
        )
    offsets, scores = _offsets(users, n_users), np.zeros(0, np.float32)
    return Teacher(manifest, offsets, none, scores, users, preferred, other, margin)


def _offsets(users: np.ndarray, n_users: int) -> np.ndarray:
    offsets = np.zeros(n_users + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=n_users), out=offsets[1:])
    return offsets


def _refuse_repeats(users: np.ndarray, items: np.ndarray, n_items: int, where: str) -> None:
    keys = users.astype(np.int64) * n_items + items
    if (keys[1:] <= keys[:-1]).any():  # what this project writes is sorted: nothing to sort then
        keys = np.sort(keys)
        repeated = keys[1:][keys[1:] == keys[:-1]]
        if repeated.size:
            user, item = divmod(int(repeated[0]), n_items)
            raise ShardError(f"{where}: user {user}, item {item} has two scores")


def _refuse_non_finite(values: np.ndarray, name: str, where: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        bad = values[~finite][0]
        raise ShardError(f"{where}: a {name} is {bad}; an item without an answer must be null")


# --- writing a product -------------------------------------------------------------------------


def import_scores(
    data: PathLike | Dataset,
    scores_file: PathLike,
    name: str,
    *,
    provenance: Provenance | None = None,
    unknown: str = "error",
    duplicates: str = "error",
    delimiter: str = ",",
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.TeacherManifest:
    """Turn a file of teacher answers with external ids into the product DATA/teacher/NAME.

    Columns user, item, score make a product of kind scores; user, preferred, other and
    optionally margin (default 1) one of kind preferences. Ids are compared as exact text,
    integers as their decimal digits. An empty score is an item the teacher did not answer.
    Scores are stored as float32; scores that agree in float32 are a tie.

    Args:
      data: dataset directory, or the loaded dataset.
      scores_file: Parquet, Arrow (file or stream) or CSV; the content decides which.
      name: directory under DATA/teacher.
      provenance: what the teacher had seen, and facts for reports.
      unknown: rows with an id that the dataset does not have: error, or drop (and count).
      duplicates: rows that contradict each other about one pair: error, or mean. Opposite
        preferences are such rows; their mean has the sign of the stronger, none if equal.
      delimiter: CSV column separator.
      rows_per_shard: most rows in one shard.
      overwrite: replace the product if there is one.

    Raises:
      InputError: the file cannot be used; the message names the row.
    """
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    shards.check_target(product_path(dataset.path, name), overwrite=overwrite)
    table, counts = answers.read(
        scores_file, dataset, unknown=unknown, duplicates=duplicates, delimiter=delimiter
    )
    return write_product(
        dataset,
        name,
        table,
        provenance=provenance or Provenance(),
        counts=counts,
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
    )


def write_product(
    dataset: Dataset,
    name: str,
    table: pa.Table,
    *,
    provenance: Provenance,
    counts: Mapping[str, int] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.TeacherManifest:
    """Write `table` (indices; one of `schema.TEACHER_SCHEMAS`, sorted by user) as a product.

    The manifest is written last, and the directory appears only when it is whole.
    """
    kind = next(kind for kind, known in schema.TEACHER_SCHEMAS.items() if table.schema == known)
    manifest = schema.TeacherManifest(
        name=name,
        kind=kind,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dataset=dataset.manifest.name,
        id_map_hash=dataset.manifest.id_map_hash,
        split_hash=dataset.manifest.split_hash,
        **dataclasses.asdict(provenance),
        counts={},
        coverage={},
        files=(),
    )
    root = product_path(dataset.path, name)
    teacher = _teacher(manifest, table, dataset.n_users, dataset.n_items, str(root))
    facts, coverage = _measure(dataset, teacher)
    rows = {"rows": table.num_rows, "unanswered": table.num_rows - facts["answered"]}
    with shards.atomic_directory(root, overwrite=overwrite) as staging:
        files = shards.write_shards(staging, "part", table, rows_per_shard=rows_per_shard)
        manifest = dataclasses.replace(
            manifest, files=files, counts={**rows, **facts, **(counts or {})}, coverage=coverage
        )
        schema.write_manifest(staging, manifest)
    return manifest


def _measure(dataset: Dataset, teacher: Teacher) -> tuple[dict[str, int], dict[str, float]]:
    pairs, lengths = usable_pairs(teacher), np.diff(teacher.offsets)
    per_row = np.repeat(np.arange(dataset.n_users), lengths)
    useful = pairs > 0
    if teacher.manifest.kind == "scores":
        if teacher.manifest.unlisted == "below":
            useful = (lengths > 0) & (lengths < dataset.n_items)
        # Where two of a user's scores differ, every item of that user differs from one of them.
        named, named_users = teacher.items, per_row
        used = teacher.items[useful[per_row]]
    else:
        named = np.concatenate([teacher.preferred, teacher.other])
        named_users, used = np.concatenate([per_row, per_row]), named
    has_item = np.zeros(dataset.n_items, bool)
    has_item[used] = True
    slices = dataset.slices(SliceConfig())
    counts = {
        "answered": int(per_row.size),
        "users": int((lengths > 0).sum()),
        "items": int(np.unique(named).size),
        "preferences": int(pairs.sum()),
    }
    for part in schema.PARTS:
        held = dataset.positives((part,))
        owners = np.repeat(np.arange(dataset.n_users), held.counts)
        found = np.isin(
            np.unique(named_users * dataset.n_items + named),
            owners * dataset.n_items + held.indices,
        )
        counts[f"{part}_pairs"] = int(found.sum())
    coverage = {
        "users": _share(useful, None),
        "items": _share(has_item, None),
        "cold_users": _share(useful, slices.cold_users),
        "tail_items": _share(has_item, slices.tail_items),
    }
    return counts, coverage


def _share(has: np.ndarray, among: np.ndarray | None) -> float:
    chosen = has if among is None else has[among]
    return round(float(chosen.mean()), 6) if chosen.size else 0.0


def report(manifest: schema.TeacherManifest) -> str:
    """A few lines for people: what the product is, covers and assumes."""
    counts, share = manifest.counts, manifest.coverage
    stated = {
        "train_only": "you state that the teacher saw training interactions only",
        "prefix": "you state that the teacher saw only what came before each interaction",
        "includes_label": "the teacher may have seen the answers of training pairs: its scores on "
        "them flatter it",
        "includes_eval": "the teacher has seen evaluation data: training will refuse this product",
    }[manifest.built_from]
    unlisted = {
        "unknown": "unlisted items were never asked about",
        "below": "unlisted items rank below the list",
    }[manifest.unlisted]
    extra = {
        key: value
        for key, value in counts.items()
        if value and key.startswith(("dropped_", "merged_", "unanswered"))
    }
    lines = [
        f"teacher {manifest.name}: {manifest.kind} ({manifest.score_kind})"
        + (f" by {manifest.model}" if manifest.model else "")
        + f", for {manifest.dataset} split {manifest.split_hash[:8]}",
        f"  {counts['rows']:,} rows in {len(manifest.files)} shards: {counts['answered']:,} "
        f"answers on {counts['users']:,} users and {counts['items']:,} items, "
        f"{counts['preferences']:,} preferences",
        f"  coverage: users {share['users']:.1%} (cold {share['cold_users']:.1%}), "
        f"items {share['items']:.1%} (tail {share['tail_items']:.1%})",
        f"  answered pairs that are interactions: {counts['train_pairs']:,} train, "
        f"{counts['valid_pairs']:,} valid, {counts['test_pairs']:,} test",
        f"  assumed: built_from={manifest.built_from}: {stated}; {unlisted}",
    ]
    if extra:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in extra.items()))
    if not share["users"]:
        lines.append("  warning: no usable preference in it; training will refuse it")
    return "\n".join(lines)
