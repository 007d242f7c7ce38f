"""Arrow schemas and manifests: the only place that names columns and files.

A dataset directory:

    manifest.json                  written last: a directory without it is not a dataset
    users.arrow                    row u is user u: external id, optional text
    items.arrow                    row i is item i: external id, title, text, categories
    user_features.arrow            row u is user u: a column a feature; item_features.arrow likewise
    feature_values.arrow           the vocabularies of features, in the order of their codes
    train/part-00000-of-00002.arrow   valid/...   test/...
    user_shards.arrow              row v is shard v of the users: its first; where these are ranges
    history.arrow                  with it: row u is how many training items user u has
    popularity.arrow               with it: row i is how many training users item i has
    teacher/NAME/manifest.json     teacher products built for this split
    teacher/NAME/part-...
    candidates/NAME/manifest.json  whom to ask about what; hidden/...: what their prompts leave out
    requests/NAME/requests.json    prompts as batch-API files, with an index of what each shows
    embeddings/NAME/manifest.json  vectors of items and users
    answers/NAME/manifest.json     parsed answers of an LLM: only ever appended to
    texts/NAME/manifest.json       what an LLM wrote about users or items
    edits/NAME/manifest.json       training interactions taken for noise (edit_schema.py)

Indices are int32 and start at 0; external ids are strings, kept exactly as in the input
(leading zeros, spaces inside, any Unicode). Interactions of a part are sorted by user,
then time, then item, so a user's history is one slice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa

from slgr_jax import config, files, json_files
from slgr_jax.data import manifest_json
from slgr_jax.errors import ManifestError, listing

MANIFEST = manifest_json.MANIFEST
PARTS = ("train", "valid", "test")
TEACHER_DIR = "teacher"
CANDIDATES_DIR = "candidates"
REQUESTS_DIR = "requests"
ANSWERS_DIR = "answers"
EMBEDDINGS_DIR = "embeddings"
TEXTS_DIR = "texts"
REQUESTS_MANIFEST = "requests.json"
DATASET_FORMAT = "slgr_jax.dataset"
TEACHER_FORMAT = "slgr_jax.teacher"
CANDIDATES_FORMAT = "slgr_jax.candidates"
REQUESTS_FORMAT = "slgr_jax.requests"
ANSWERS_FORMAT = "slgr_jax.answers"
EMBEDDINGS_FORMAT = "slgr_jax.embeddings"
TEXTS_FORMAT = "slgr_jax.texts"
VERSION = 1

TIMESTAMP = pa.timestamp("us", tz="UTC")
_PAIR = [pa.field("user", pa.int32(), nullable=False), pa.field("item", pa.int32(), nullable=False)]

INTERACTIONS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("timestamp", TIMESTAMP),  # null where the source has no times
        pa.field("rating", pa.float32()),  # null where the source has no ratings
    ]
)
USERS = pa.schema([pa.field("user_id", pa.string(), nullable=False), pa.field("text", pa.string())])
ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
    ]
)
# Where users are numbered shard by shard: what is known of everybody without reading interactions.
USER_SHARDS = pa.schema([pa.field("first_user", pa.int32(), nullable=False)])
HISTORY = pa.schema([pa.field("items", pa.int32(), nullable=False)])
POPULARITY = pa.schema([pa.field("users", pa.int32(), nullable=False)])
# One row per value of a categorical or multi-valued feature of users or items (`side`).
FEATURE_VALUES = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("side", "feature", "value")]
)
# One row per (user, item) the teacher was asked about, sorted by user; a null score is an item
# the teacher did not answer: it is masked and never forms a preference.
TEACHER_SCORES = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("score", pa.float32()),
    ]
)
# One row per stated preference, sorted by user: `preferred` over `other`, by `margin` > 0.
TEACHER_PREFERENCES = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("preferred", pa.int32(), nullable=False),
        pa.field("other", pa.int32(), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
    ]
)
# One row per answer that was made of several: which share of these speak alike of the item.
TEACHER_VOTES = pa.schema([*_PAIR, pa.field("votes", pa.float32(), nullable=False)])
TEACHER_SCHEMAS: Mapping[str, pa.Schema] = {
    "scores": TEACHER_SCORES,
    "preferences": TEACHER_PREFERENCES,
}

# One row per (user, item) to ask about, sorted; `reasons` has bit k set where set k of
# `REASONS` drew it.
REASONS = ("popular", "cold", "tail", "hard_top", "hard_uncertain", "calibration", "doubtful")
CANDIDATES = pa.schema([*_PAIR, pa.field("reasons", pa.int32(), nullable=False)])
# Training items that no prompt of the user shows as history: what calibration asks about, and what
# a run doubts.
HIDDEN = pa.schema(_PAIR)
# One row per request, in the order of the request files; `items` as the prompt shows them. `user`
# is -1 where a text about an item is asked for, which is then the only one in `items`.
REQUESTS = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("custom_id", pa.string(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("permutation", pa.int32(), nullable=False),
        pa.field("items", pa.list_(pa.int32()), nullable=False),
    ]
)
# One row per item that an accepted answer was asked about, `position` counted from 0 as shown; a
# null score is an item that the answer left out. Where two items were compared, one row: `item`
# was shown first, `other` second, and `score` is the probability that `item` is preferred.
ANSWERS = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("other", pa.int32()),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("permutation", pa.int32(), nullable=False),
        pa.field("score", pa.float32()),
    ]
)
# One row per title of an accepted answer that is a free list, as it was written, `position` counted
# from 0, the best first. Which item it means is derived anew each time.
TITLES = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("permutation", pa.int32(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
    ]
)
# One row per field, at `position`, of an accepted answer about a user or item; may be empty.
WRITTEN = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        *(TITLES.field(name) for name in ("position", "permutation")),
        pa.field("text", pa.string(), nullable=False),
    ]
)
# One row per text about a user or an item, by its index and then by field; none is empty.
TEXTS = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("id", "field", "text")),
    ]
)
# One row per accepted answer, in the order of ANSWERS, TITLES or WRITTEN (where rows with position
# 0 begin an answer); `sample` counts the answers that one request asked for (n > 1), `cut` is one
# that ended too early, `digest` is of scores, titles or texts, tokens are null where not told. Of
# several rows of a (request, sample) the last holds.
ANSWERED = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("cut", pa.bool_(), nullable=False),
        pa.field("digest", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
    ]
)


def vectors(dim: int, dtype: str) -> pa.Schema:
    """One row per item (or user) in index order; a null has no vector."""
    kind = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    return pa.schema([pa.field("vector", pa.list_(kind, dim))])


def chunks(numbers: int, fields: int) -> pa.Schema:
    """One row per item (or user) in index order: the numbers of all its chunks, zeros where there
    are fewer; and how many chunks each field has."""
    return pa.schema(
        [
            pa.field("vector", pa.list_(pa.float16(), numbers), nullable=False),
            pa.field("counts", pa.list_(pa.int16(), fields), nullable=False),
        ]
    )


# Path of a shard whose rows ascend by user -> its first user and its last. Of a shard that is not
# named nothing is known.
UserRanges = Mapping[str, tuple[int, int]]
BUILT_FROM = config.BUILT_FROM
UNLISTED = config.UNLISTED
TRAINING_ITEMS = config.TRAINING_ITEMS


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One shard as the manifest records it; `path` is relative to the manifest."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetManifest:
    """What a dataset directory holds and how it was made.

    `id_map_hash` covers the external ids in index order, `split_hash` the (user, item) pairs
    of each part; a teacher product carries both and is refused where they differ. `parents` are
    the datasets that this one was appended to, the nearest first (`data.lineage`).
    """

    name: str
    created: str
    source: Mapping[str, Any]
    split: Mapping[str, Any]
    filters: Mapping[str, Any]
    counts: Mapping[str, int]
    id_map_hash: str
    split_hash: str
    files: Mapping[str, tuple[ShardFile, ...]]  # keys: train, valid, test, users, items, ...
    parents: tuple[Mapping[str, Any], ...] = ()
    # Of users and items, what each feature is (`features.described`), in the order of columns.
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Shards that users are numbered by, each a range of them in files of its own; 0: by their ids.
    user_shards: int = 0
    user_ranges: UserRanges = dataclasses.field(default_factory=dict)  # of the training files
    # With user_shards: of timestamp and rating those that every training interaction has.
    train_columns: tuple[str, ...] = ()
    format: str = DATASET_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class TeacherManifest:
    """What a teacher product is, what it was built from and which dataset it fits.

    A field with a default may be missing from a manifest: it was written before there was one.
    """

    name: str
    kind: str  # scores | preferences
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    built_from: str
    unlisted: str
    model: str
    prompt_hash: str
    score_kind: str  # logit | prob | rating | rank | cosine | ...: for reports
    counts: Mapping[str, int]  # rows, answered, users, items, dropped_...
    coverage: Mapping[str, float]  # users: share with at least one preference; items: likewise
    files: tuple[ShardFile, ...]
    training_items: str = "shown"  # one of TRAINING_ITEMS
    order: str = ""  # user: the rows of each shard ascend by user; empty: nothing is promised
    carried_from: str = ""  # split hash of the parent dataset whose product this was
    votes: tuple[ShardFile, ...] = ()  # TEACHER_VOTES; () where answers are not of several
    user_ranges: UserRanges = dataclasses.field(default_factory=dict)  # of `files`
    format: str = TEACHER_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class CandidateManifest:
    """What a candidate set holds and how it was drawn."""

    name: str
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    seed: int
    options: Mapping[str, Any]  # config.CandidateConfig
    evaluation: str  # drawn: validation and test items are drawn like any other; excluded: never
    diversity: str  # the space in which cold users' items are spread
    counts: Mapping[str, int]  # pairs, users, items, hidden, a count a reason
    files: Mapping[str, tuple[ShardFile, ...]]  # keys: pairs, hidden
    format: str = CANDIDATES_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class RequestManifest:
    """What the request files of a directory ask, and how far they are written.

    `fingerprint` is a hash of everything that decides their bytes; `custom_id`s begin with it.
    """

    fingerprint: str
    complete: bool
    dataset: str
    id_map_hash: str
    split_hash: str
    candidates: str
    candidates_hash: str
    training_items: str  # none | hidden: see TeacherManifest
    prompt: str  # one of config.PROMPTS
    template_hash: str
    model: str
    options: Mapping[str, Any]  # config.RequestConfig
    plan: Mapping[str, Any]  # requests, users, estimated tokens and cost, what the budget cut
    files: Mapping[str, tuple[ShardFile, ...]]  # keys: requests (jsonl), index
    format: str = REQUESTS_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class AnswerManifest:
    """What an answer log holds. Shards are added; none is ever rewritten."""

    name: str
    dataset: str
    id_map_hash: str
    split_hash: str
    sources: tuple[Mapping[str, Any], ...]  # a request directory each: what was asked, and how
    counts: Mapping[str, int]
    files: Mapping[str, tuple[ShardFile, ...]]  # keys: answers, answered, quarantine (jsonl)
    format: str = ANSWERS_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class EmbeddingManifest:
    """What an embedding product holds, what it was built from and which dataset it fits."""

    name: str
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    built_from: str
    model: str
    prompt_hash: str
    users_from: str  # history: mean of the training items' vectors; text; file; factors
    dim: int
    dtype: str  # float32 | float16
    counts: Mapping[str, int]  # items, users: rows with a vector; dropped_...
    files: Mapping[str, tuple[ShardFile, ...]]  # keys: items, users; row = index
    # items, users: of rows of several vectors field -> its slots, by name; {}: one vector a row
    fields: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    format: str = EMBEDDINGS_FORMAT
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class TextManifest:
    """What texts about users or items say, what their prompts showed, which dataset they fit."""

    name: str
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    built_from: str
    model: str
    prompt: str  # one of config.TEXT_PROMPTS
    prompt_hash: str  # of its template
    side: str  # user | item; shown: what prompts showed, for people
    shown: str
    fields: tuple[str, ...]
    counts: Mapping[str, int]  # rows with a text, texts, empty_texts, states of requests, tokens
    files: Mapping[str, tuple[ShardFile, ...]]  # texts
    format: str = TEXTS_FORMAT
    version: int = VERSION


class Manifest(Protocol):
    """Any of them, and those of other modules: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Written = TypeVar("Written", bound=Manifest)


def files_hash(files: Sequence[ShardFile]) -> str:
    """SHA-256 over the checksums of shards, in their order: what a product says, as one word."""
    return hashlib.sha256(" ".join(file.sha256 for file in files).encode()).hexdigest()


def write_manifest(directory: str | os.PathLike[str], manifest: Written) -> Written:
    """Write a manifest, flushed to disk: the last file of a directory that is whole; returns it.

    It appears only when it is whole, so that one which is there can be replaced.
    """
    values = json_files.sealed(dataclasses.asdict(manifest))
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    name = REQUESTS_MANIFEST if isinstance(manifest, RequestManifest) else MANIFEST
    files.write_atomically(pathlib.Path(directory) / name, text, durable=True)
    return manifest


def read_dataset_manifest(directory: str | os.PathLike[str]) -> DatasetManifest:
    """Read a dataset's manifest; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, DatasetManifest, "slgr prepare")
    where = pathlib.Path(directory) / MANIFEST
    if missing := sorted({*PARTS, "users", "items"} - set(raw["files"])):
        raise ManifestError(f"{where} is damaged: it lists no files of {listing(missing)}")
    raw["files"] = {key: _shard_files(value, where) for key, value in raw["files"].items()}
    for name in ("parents", "train_columns"):
        raw[name] = tuple(raw.get(name, ()))
    raw["user_ranges"] = _user_ranges(raw, where)
    return DatasetManifest(**raw)


def read_teacher_manifest(directory: str | os.PathLike[str]) -> TeacherManifest:
    """Read a teacher product's manifest; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, TeacherManifest, "slgr teach")
    where = pathlib.Path(directory) / MANIFEST
    raw |= {key: _shard_files(raw.get(key, []), where) for key in ("files", "votes")}
    raw["user_ranges"] = _user_ranges(raw, where)
    return TeacherManifest(**raw)


def read_candidate_manifest(directory: str | os.PathLike[str]) -> CandidateManifest:
    """Read a candidate set's manifest; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, CandidateManifest, "slgr teach candidates")
    return CandidateManifest(**with_files(raw, ("pairs", "hidden"), directory))


def read_request_manifest(directory: str | os.PathLike[str]) -> RequestManifest:
    """Read requests.json; a missing, foreign or damaged one is a `ManifestError`."""
    maker = "slgr teach requests --overwrite"
    raw = manifest_json.read(directory, RequestManifest, maker, file_name=REQUESTS_MANIFEST)
    return RequestManifest(**with_files(raw, ("requests", "index"), directory))


def read_answer_manifest(directory: str | os.PathLike[str]) -> AnswerManifest:
    """Read an answer log's manifest; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, AnswerManifest, "slgr teach collect")
    raw["sources"] = tuple(raw["sources"])
    return AnswerManifest(**with_files(raw, ("answers", "answered", "quarantine"), directory))


def read_embedding_manifest(directory: str | os.PathLike[str]) -> EmbeddingManifest:
    """Read an embedding product's manifest; a missing or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, EmbeddingManifest, "slgr teach embed")
    raw["fields"] = {
        name: dict(sorted(of_table.items())) for name, of_table in raw.get("fields", {}).items()
    }
    return EmbeddingManifest(**with_files(raw, ("items", "users"), directory))


def read_text_manifest(directory: str | os.PathLike[str]) -> TextManifest:
    """Read a manifest of texts; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, TextManifest, "slgr teach collect")
    raw["fields"] = tuple(raw["fields"])
    return TextManifest(**with_files(raw, ("texts",), directory))


def with_files(
    raw: dict[str, Any], keys: tuple[str, ...], directory: str | os.PathLike[str]
) -> dict[str, Any]:
    """A manifest's fields with its `files` read; a `ManifestError` where those of `keys` lack."""
    where = pathlib.Path(directory)
    if missing := sorted(set(keys) - set(raw["files"])):
        raise ManifestError(f"{where} is damaged: it lists no files of {listing(missing)}")
    return raw | {"files": {key: _shard_files(raw["files"][key], where) for key in keys}}


def _shard_files(values: list[Any], where: pathlib.Path) -> tuple[ShardFile, ...]:
    kinds = {"path": str, "rows": int, "bytes": int, "sha256": str}
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != kinds:
            shown = json.dumps(value)[:80]
            raise ManifestError(f"{where} is damaged: {shown} does not describe a shard")
    return tuple(ShardFile(**value) for value in values)


def _user_ranges(raw: Mapping[str, Any], where: pathlib.Path) -> UserRanges:
    ranges = raw.get("user_ranges", {})
    for path, users in ranges.items():
        if not isinstance(users, list) or [type(user) for user in users] != [int, int]:
            raise ManifestError(
                f"{where} is damaged: {json.dumps(users)[:80]} is not the first and last user of "
                f"{path}"
            )
    return {path: (first, last) for path, (first, last) in ranges.items()}
