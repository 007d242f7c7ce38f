"""Amazon Reviews: jsonl of 2014, 2018, 2023; csv of 2023; ratings-only csv of 2014 and 2018."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest import json_lines, tables, text_lines, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import DelimitedFile, pick
from slgr_jax.data.ingest.raw import Piece, Raw, nothing
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import InputError, listing

# Field names of 2023, then of 2014 and 2018.
_FIELDS = (
    {"user": "user_id", "item": "parent_asin", "timestamp": "timestamp", "rating": "rating"},
    {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime", "rating": "overall"},
)
_METADATA_FIELDS = {
    "item_id": ("parent_asin", "asin"),
    "title": ("title",),
    "text": ("description",),
    "categories": ("categories", "category"),
}
_ASIN = re.compile(r"^(B[0-9A-Z]{9}|[0-9]{9}[0-9X])$")
_REVIEWER = re.compile(r"^A[0-9A-Z]{9,20}$")


def reviews(config: PrepareConfig) -> Raw:
    """The reviews of any release, with titles from --items_input."""
    pieces, opened = [], []
    for part, path in tables.inputs(config):
        files = Files(path)
        name = files.choose(_is_amazon, "Amazon review file", config.name)
        head = files.head(name)
        if not head.strip():
            raise InputError(f"{files.where(name)} is empty")
        read = _json_reviews if json_lines.is_json(head) else _csv_reviews
        pieces.append(read(files, name, part, config))
        opened.append(files)
    if not config.items_input:
        return Raw(tuple(pieces), tuple(opened), nothing, nothing)
    items, source = _items(config)
    return Raw(tuple(pieces), (*opened, source), items, nothing)


def _is_amazon(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz"))


def _json_reviews(files: Files, name: str, part: str | None, config: PrepareConfig) -> Piece:
    where = files.where(name)
    present = json_lines.field_names(files, name, config.encoding)
    chosen = tables.chosen_columns(config)
    layouts = [fields | chosen for fields in _FIELDS] + [tables.wanted_columns(config)]
    fields = next((f for f in layouts if {f["item"], f["user"]} <= set(present)), None)
    if fields is None:
        expected = " or ".join(f"{f['user']} and {f['item']}" for f in layouts[:2])
        raise InputError(
            f"{where} has no fields {expected}; fields found: {listing(present)}; name them with "
            "--user_column and --item_column"
        )
    fields = {role: field for role, field in fields.items() if field in present or role in chosen}
    rows = json_lines.read(files, name, fields, encoding=config.encoding, drop=tables.drops(config))
    return Piece.of(rows, part, fields)


def _csv_reviews(files: Files, name: str, part: str | None, config: PrepareConfig) -> Piece:
    dialect = Dialect(encoding=config.encoding)
    names = tables.column_list(config.columns, "columns")
    file = DelimitedFile(files, name, dialect, names)
    drop = tables.drops(config)
    wanted = _FIELDS[0] | tables.chosen_columns(config)
    if names is not None or wanted["user"] in file.names:
        wanted = wanted if wanted["user"] in file.names else tables.wanted_columns(config)
        chosen = pick(file.names, wanted, file.where, required=("user", "item"), first_line=True)
        return Piece.of(file.read(chosen, drop=drop), part, chosen)

    names = _headerless(files, name, file)
    roles = {role: role for role in names}
    rows = DelimitedFile(files, name, dialect, names).read(roles, drop=drop)
    return Piece.of(rows, part, roles)


def _headerless(files: Files, name: str, file: DelimitedFile) -> list[str]:
    """Roles in order: 2014 is user,item,rating,time and 2018 is item,user,rating,time."""
    text = files.head(name).decode("utf-8", errors="replace")
    lines = text.split("\n")[:-1] or [",".join(file.names)]
    rows = [line.rstrip("\r").split(",") for line in lines]
    full = [row for row in rows if len(row) == 4]

    def share(pattern: re.Pattern[str], column: int) -> float:
        return sum(bool(pattern.match(row[column])) for row in full) / max(1, len(rows))

    if share(_REVIEWER, 0) > 0.9 and share(_ASIN, 1) > 0.9:
        return ["user", "item", "rating", "timestamp"]
    if share(_ASIN, 0) > 0.9 and share(_REVIEWER, 1) > 0.9:
        return ["item", "user", "rating", "timestamp"]
    raise InputError(
        f"{file.where}: no header with user_id and parent_asin, and the first lines are neither "
        "user,item,rating,time nor item,user,rating,time with Amazon ids; name the columns, as "
        "--columns=user,item,rating,timestamp"
    )


def _items(config: PrepareConfig) -> tuple[Callable[[pa.Array | None], Texts], Files]:
    """How to read --items_input (metadata, or a table with named columns), and its file."""
    metadata = Files(config.items_input)
    name = metadata.choose(lambda n: "meta" in n, "metadata jsonl (meta...)", config.name)
    if not json_lines.is_json(metadata.head(name, 64)):
        item_reader = tables.named_items(config)
        assert item_reader is not None  # there is an --items_input
        return item_reader.texts, item_reader.file
    return _metadata_reader(metadata, name, config), metadata


def _metadata_reader(
    files: Files, name: str, config: PrepareConfig
) -> Callable[[pa.Array | None], Texts]:
    text_lines.check_encoding(config.encoding)
    fields: Mapping[str, tuple[str, ...]] = _METADATA_FIELDS
    chosen = tables.chosen_columns(config)
    if "item" in chosen:
        fields = {**fields, "item_id": (chosen["item"], *fields["item_id"])}

    def read(wanted: pa.Array | None) -> Texts:
        count = LineCount(files.where(name))
        drop = tables.drops(config)
        return texts.of_records(
            json_lines.objects(files, name, config.encoding, count, drop=drop),
            fields,
            count,
            wanted=None if wanted is None else set(wanted.to_pylist()),
            separator=None,
            drop=drop,
        )

    return read
