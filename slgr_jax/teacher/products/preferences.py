"""Teacher scores and preferences: files with external ids <-> products under DATA/teacher.

A teacher is an LLM that somebody ran offline. `import_scores` turns its answers into a
product: Arrow shards, and a manifest that ties them to one dataset and says what the teacher
had seen. `append` adds to one. `load` gives a run the arrays, or refuses them and says why.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import re
from collections.abc import Mapping

import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.dataset import load as load_dataset
from slgr_jax.errors import ConfigError, InputError, ManifestError, listing
from slgr_jax.teacher.products import answers, product_files, rows, titles, training_items
from slgr_jax.teacher.products.coverage import measure
from slgr_jax.teacher.products.rows import Teacher, usable_pairs
from slgr_jax.teacher.products.same_split import able_to_read, refuse_leak, refuse_other_split

__all__ = [
    "Provenance",
    "ROWS_PER_SHARD",
    "Teacher",
    "append",
    "import_scores",
    "load",
    "product_path",
    "products",
    "report",
    "stored",
    "usable_pairs",
    "write_product",
]

PathLike = str | os.PathLike[str]

ROWS_PER_SHARD = 4_194_304
_ADDED = "append-"  # what `append` names its shards with
COMBINED = "combined: "  # what the `model` of a product made of several begins with
_MADE_BY = "slgr teach import --data={data} --scores=FILE --name={name} --overwrite"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the maker of a product states about it; nothing in the scores can prove it.

    Attributes:
      built_from: one of `schema.BUILT_FROM`.
      unlisted: one of `schema.UNLISTED`.
      training_items: one of `schema.TRAINING_ITEMS`.
      model, prompt_hash, score_kind: free text for reports.
      carried_from: split hash of the parent dataset whose product this was; empty otherwise.
    """

    built_from: str = "train_only"
    unlisted: str = "unknown"
    model: str = ""
    prompt_hash: str = ""
    score_kind: str = "score"
    training_items: str = "shown"
    carried_from: str = ""

    def __post_init__(self) -> None:
        for name, choices in (
            ("built_from", schema.BUILT_FROM),
            ("unlisted", schema.UNLISTED),
            ("training_items", schema.TRAINING_ITEMS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"--{name}={getattr(self, name)!r} is not one of: {listing(choices)}"
                )


# --- reading a product -------------------------------------------------------------------------


def load(
    dataset: Dataset,
    name: str,
    *,
    verify: bool = True,
    users: tuple[int, int] | None = None,
) -> Teacher:
    """Read the product `name` of `dataset`, or refuse it.

    Args:
      dataset: what the product must fit: same id map, same split.
      name: directory under DATA/teacher.
      verify: also compare each shard's SHA-256.
      users: (first, end): the rows of users from the one to before the other; others have none.
        No other shards are read, hashed and checked than those that hold some. None: of all.

    Raises:
      ManifestError: no such product, made for another split or id map, or the teacher has
        seen evaluation data.
      ShardError: a shard is missing, truncated or corrupt, or holds an index outside the id
        maps, a score that is not finite, or the same pair twice.
    """
    root, manifest = _find(dataset, name)
    tables = product_files.read(root, manifest, verify=verify, users=users)
    arrays, offsets = rows.gather(
        manifest.kind, tables, dataset.n_users, dataset.n_items, str(root)
    )
    return rows.make(manifest, arrays, offsets)


def checked(dataset: Dataset, name: str) -> schema.TeacherManifest:
    """The manifest of a product of which every row was read; of one of training and validation,
    too.

    Raises:
      ManifestError, ShardError: as `load`.
    """
    root = product_path(dataset.path, name)
    if (root / schema.MANIFEST).is_file():
        dataset = able_to_read(dataset, schema.read_teacher_manifest(root).built_from)
    return load(dataset, name).manifest


def stored(dataset: Dataset, name: str) -> tuple[pa.Table, schema.TeacherManifest]:
    """Every row of the product `name`, unanswered ones too, checked and ordered as by `load`.

    Raises:
      ManifestError, ShardError: as `load`.
    """
    root, manifest = _find(dataset, name)
    tables = product_files.read(root, manifest, verify=True)
    arrays, _ = rows.gather(manifest.kind, tables, dataset.n_users, dataset.n_items, str(root))
    return rows.table_of(manifest.kind, arrays), manifest


def _find(dataset: Dataset, name: str) -> tuple[pathlib.Path, schema.TeacherManifest]:
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
    refuse_other_split(dataset, manifest, f"teacher {name!r}", fix=f"rebuild it: {again}")
    refuse_leak(
        dataset,
        manifest.built_from,
        f"teacher {name!r}",
        "have the LLM answer from training interactions only, then rebuild it: " + again,
    )

    if manifest.unlisted not in schema.UNLISTED:
        known = listing(schema.UNLISTED)
        raise ManifestError(f"{root}: unlisted {manifest.unlisted!r} is not one of: {known}")
    if manifest.training_items not in schema.TRAINING_ITEMS:
        known = listing(schema.TRAINING_ITEMS)
        raise ManifestError(
            f"{root}: training_items {manifest.training_items!r} is not one of: {known}"
        )
    return root, manifest


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/teacher/NAME; a name that is not one plain directory name is a `ConfigError`."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise ConfigError(
            f"{name!r} cannot name a teacher product: use letters, digits and . _ + -, e.g. gpt4o"
        )
    return pathlib.Path(data) / schema.TEACHER_DIR / name


def products(data: PathLike) -> list[str]:
    """Names of the finished products under DATA/teacher, sorted."""
    manifests = (pathlib.Path(data) / schema.TEACHER_DIR).glob(f"*/{schema.MANIFEST}")
    return sorted(path.parent.name for path in manifests if not path.parent.name.startswith("."))


# --- writing a product -------------------------------------------------------------------------


def import_scores(
    data: PathLike | Dataset,
    scores_file: PathLike,
    name: str,
    *,
    provenance: Provenance | None = None,
    unknown: str = "error",
    duplicates: str = "error",
    keep_training_items: bool = False,
    delimiter: str = ",",
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    to_existing: bool = False,
    items_as: str = "ids",
    subtitles: bool = False,
    raw: tuple[pa.Table, Mapping[str, int]] | None = None,
    names: Mapping[str, str] | None = None,
) -> schema.TeacherManifest:
    """Turn a file of teacher answers with external ids into the product DATA/teacher/NAME.

    Columns user, item, score (or rank, 1 the best) make a product of kind scores; user,
    preferred, other and optionally margin (default 1) one of kind preferences. Ids are compared as
    exact text, integers as their decimal digits. An empty score is an item the teacher did not
    answer. Scores are stored as float32; scores that agree in float32 are a tie.

    Args:
      data: dataset directory, or the loaded dataset.
      scores_file: Parquet, Arrow (file or stream) or CSV; the content decides which.
      name: directory under DATA/teacher.
      provenance: what the teacher had seen, and facts for reports.
      unknown: rows with an id that the dataset does not have: error, or drop (and count).
      keep_training_items: keep answers on a user's own training items. By default they are
        dropped and counted: they echo the prompt, and teach nothing that interactions do not.
        Where the prompts hid them (`training_items="hidden"`) they test the teacher and stay.
      duplicates: rows that contradict each other about one pair: error, or mean. Opposite
        preferences are such rows; their mean has the sign of the stronger, none if equal.
      delimiter: CSV column separator.
      rows_per_shard: most rows in one shard.
      overwrite: replace the product if there is one.
      to_existing: add to the product that there is, see `append`; its provenance stays.
      items_as: ids, or titles (see `titles.TitleIndex`; what names no item or two is dropped and
        counted); subtitles: see `TitleIndex.match`.
      raw: what `scores_file` holds, and counts of it, where it is no such file and was read
        already (`collect.answer_folder`).
      names: what the file's columns are called -> user, item or score, where that is something
        else.

    Raises:
      InputError: the file cannot be used; the message names the row.
      ConfigError: --append and --overwrite at once.
    """
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    provenance = provenance or Provenance()
    hidden = _hides_training_items(dataset, name, provenance, overwrite, to_existing)
    table, counts, score_kind = answers.read(
        scores_file,
        dataset,
        score_kind=provenance.score_kind,
        unknown=unknown,
        duplicates=duplicates,
        delimiter=delimiter,
        items_as=items_as,
        subtitles=subtitles,
        raw=None if raw is None else raw[0],
        names=names,
    )
    if raw is not None:
        counts |= raw[1]
    if not (keep_training_items or hidden):
        table, dropped = training_items.drop(table, dataset, str(scores_file))
        counts |= dropped

    if to_existing:
        return append(dataset, name, table, counts=counts, rows_per_shard=rows_per_shard)
    return write_product(
        dataset,
        name,
        table,
        provenance=dataclasses.replace(provenance, score_kind=score_kind),
        counts=counts,
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
    )


def _hides_training_items(
    dataset: Dataset, name: str, provenance: Provenance, overwrite: bool, to_existing: bool
) -> bool:
    """Whether the prompts of the product to write hid training items; refuses a wrong target."""
    if to_existing and overwrite:
        raise ConfigError("--append adds to a product and --overwrite replaces it: drop one")
    if to_existing:
        _, product = _find(dataset, name)
        return product.training_items == "hidden"
    shards.check_target(product_path(dataset.path, name), overwrite=overwrite)
    return provenance.training_items == "hidden"


def write_product(
    dataset: Dataset,
    name: str,
    table: pa.Table,
    *,
    provenance: Provenance,
    counts: Mapping[str, int] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    votes: pa.Table | None = None,
) -> schema.TeacherManifest:
    """Write `table` (indices; one of `schema.TEACHER_SCHEMAS`, in any order) as a product.

    Rows are stored in the order of `Teacher`, so that reading sorts nothing. The manifest is
    written last, and the directory appears only when it is whole.

    Args:
      votes: `schema.TEACHER_VOTES`, where answers were made of several (`products/votes.py`).

    Raises:
      ShardError: rows that `load` would refuse.
    """
    kind = _kind_of(table)
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
        order="user",
    )

    root = product_path(dataset.path, name)
    arrays, offsets = rows.gather(kind, [table], dataset.n_users, dataset.n_items, str(root))
    manifest = _measured(dataset, rows.make(manifest, arrays, offsets), table.num_rows, counts)

    with shards.atomic_directory(root, overwrite=overwrite) as staging:
        files, ranges = product_files.write(
            staging, "part", rows.table_of(kind, arrays), offsets, dataset, rows_per_shard
        )
        of_votes: tuple[schema.ShardFile, ...] = ()
        if votes is not None:
            of_votes = shards.write_shards(staging, "votes", votes, rows_per_shard=rows_per_shard)
        manifest = dataclasses.replace(manifest, files=files, votes=of_votes, user_ranges=ranges)
        schema.write_manifest(staging, manifest)
    return manifest


def append(
    dataset: Dataset,
    name: str,
    table: pa.Table,
    *,
    counts: Mapping[str, int] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> schema.TeacherManifest:
    """Add the rows of `table` (as for `write_product`) to a product, as new shards.

    No shard is written again. The manifest is replaced last: who reads meanwhile, or after a
    crash, finds the product as it was, and the next `append` removes what the crash left behind.
    Counts and coverage are measured anew over all rows; other counts are added up.

    Raises:
      ManifestError: there is no such product, or it does not fit `dataset`.
      InputError: the product is of the other kind, is combined of several, has one of the pairs
        already (answered or not; a preference: in either order), or is being appended to by
        another process.
      ShardError: rows that `load` would refuse, or the product is damaged.
    """
    root, _ = _find(dataset, name)
    kind, n_users, n_items = _kind_of(table), dataset.n_users, dataset.n_items
    with shards.locked(root):
        _, manifest = _find(dataset, name)
        if kind != manifest.kind:
            raise InputError(f"teacher {name!r} holds {manifest.kind}, not {kind}; use another")
        if manifest.model.startswith(COMBINED):
            raise InputError(
                f"teacher {name!r} is {manifest.model}: more answers would change its ranks and "
                "means; add them to one of these, or import them under a name of their own, and "
                "combine anew"
            )

        listed = {file.path for file in manifest.files}
        for path in root.glob(f"{_ADDED}*"):
            if path.name not in listed:
                path.unlink()

        tables = product_files.read(root, manifest, verify=True)
        added, of_added = rows.gather(kind, [table], n_users, n_items, f"what is added to {root}")
        rows.refuse_known(tables, added, n_items, str(root))
        table = rows.table_of(kind, added)
        arrays, offsets = rows.gather(kind, [*tables, table], n_users, n_items, str(root))
        everything = rows.make(manifest, arrays, offsets)

        n_rows = sum(file.rows for file in manifest.files) + table.num_rows
        manifest = _measured(dataset, everything, n_rows, counts)
        numbers = [path.split("-")[1] for path in listed if path.startswith(_ADDED)]
        number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
        prefix = f"{_ADDED}{number:05d}-part"
        files, ranges = product_files.write(root, prefix, table, of_added, dataset, rows_per_shard)
        shards.sync(root)
        # What is added is not made of several answers: votes would say nothing of it.
        outdated = [root / file.path for file in manifest.votes]
        manifest = dataclasses.replace(
            manifest,
            files=(*manifest.files, *files),
            votes=(),
            user_ranges={**manifest.user_ranges, **ranges},
        )
        schema.write_manifest(root, manifest)
        for path in outdated:
            path.unlink()
        shards.sync(root)

    return manifest


def _kind_of(table: pa.Table) -> str:
    kinds = [kind for kind, known in schema.TEACHER_SCHEMAS.items() if table.schema == known]
    if not kinds:
        raise InputError(f"a table with columns {listing(table.column_names)} is no teacher")
    return kinds[0]


def _measured(
    dataset: Dataset, teacher: Teacher, n_rows: int, counts: Mapping[str, int] | None
) -> schema.TeacherManifest:
    """The manifest with the teacher's counts; those of `counts` are added to what it had."""
    facts, coverage = measure(dataset, teacher)
    facts |= {"rows": n_rows, "unanswered": n_rows - facts["answered"]}
    had, new = teacher.manifest.counts, counts or {}
    others = {key: had.get(key, 0) + new.get(key, 0) for key in {**had, **new} if key not in facts}
    return dataclasses.replace(teacher.manifest, counts={**facts, **others}, coverage=coverage)


def report(manifest: schema.TeacherManifest) -> str:
    """A few lines for people: what the product is, covers and assumes."""
    counts, share = manifest.counts, manifest.coverage
    stated = {
        "train_only": "you state that the teacher saw training interactions only",
        "prefix": "you state that the teacher saw only what came before each interaction",
        "includes_label": "the teacher may have seen the answers of training pairs: its scores on "
        "them flatter it",
        "includes_valid": "the teacher has seen validation: for refits alone (slgr train "
        "--refit=RUN --teacher=NAME)",
        "includes_eval": "the teacher has seen evaluation data: training will refuse this product",
    }[manifest.built_from]
    unlisted = {
        "unknown": "unlisted items were never asked about",
        "below": "unlisted items rank below the list",
    }[manifest.unlisted]
    extra = {
        key: value
        for key, value in counts.items()
        if value
        and key.startswith(("dropped_", "merged_", "unanswered"))
        and key != training_items.DROPPED
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

    if manifest.carried_from:
        lines.append(f"  carried over from split {manifest.carried_from[:8]}")
    if echoed := counts.get(training_items.DROPPED, 0):
        lines.append(
            f"  {echoed:,} answers of {counts[training_items.USERS]:,} users on their own training "
            "items were dropped: they echo the prompt (import --keep_training_items keeps them)"
        )
    if read := counts.get("answers", 0):
        lines.append(f"  {read:,} answers read, {counts['answers_unread']:,} without a list")
    if of_titles := titles.report(counts):
        lines.append(f"  {of_titles}")
    if extra:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in extra.items()))
    if not share["users"]:
        lines.append("  warning: no usable preference in it; training will refuse it")
    return "\n".join(lines)
