"""Public layouts: MovieLens, RecBole atomic files, Amazon Reviews, S3-Rec. See `tables.Raw`.

Layouts as their own README files state them: MovieLens 100K, 1M, 10M and the csv releases;
RecBole's `name:type` headers; Amazon Reviews 2014, 2018 and 2023.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import s3rec, tables
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.tables import Piece, Raw, delimited, header, pick
from slgr_jax.errors import ConfigError, InputError, listing

Rows = Iterable[Mapping[str, object]]


def read(config: PrepareConfig) -> Raw:
    """Read the interactions of `config.input` (and of the pre-made parts).

    Raises:
      InputError: a file is missing, empty, damaged, or lacks a column.
      ConfigError: knobs that do not fit the source.
    """
    readers: Mapping[str, Callable[[PrepareConfig], Raw]] = {
        "movielens": movielens,
        "recbole": recbole,
        "amazon": amazon,
        "s3rec": s3rec.sequences,
        "csv": tables.named_columns,
        "parquet": tables.named_columns,
    }
    if config.source not in readers:
        raise ConfigError(f"--source={config.source!r} is not one of: {listing(readers)}")
    if config.split_column and config.source in ("movielens", "amazon", "s3rec"):
        raise ConfigError(f"--split_column is not used with --source={config.source}")
    if config.items_input and config.source in ("movielens", "recbole", "s3rec"):
        raise ConfigError(
            f"--items_input is not used with --source={config.source}: item texts are found "
            "beside the interactions"
        )
    raw = readers[config.source](config)
    for piece in raw.pieces:
        if not len(piece):
            raise InputError(f"{piece.where} has no rows")
    return raw


# --- MovieLens ----------------------------------------------------------------------------

# fmt: off
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
_AGES_1M = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56+",
}
_JOBS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student",
    "customer service", "doctor/health care", "executive/managerial", "farmer", "homemaker",
    "K-12 student", "lawyer", "programmer", "retired", "sales/marketing", "scientist",
    "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed", "writer",
)
# fmt: on
_ML_ROLES = ("user", "item", "rating", "timestamp")
_ML_FILES = ("u.data", "ratings.dat", "ratings.csv")


def movielens(config: PrepareConfig) -> Raw:
    """MovieLens 100K (u.data), 1M and 10M (ratings.dat), 20M and later (ratings.csv)."""
    pieces, opened, main = [], [], ""
    for part, path in tables.inputs(config):
        files = Files(path)
        name = files.choose(lambda n: n in _ML_FILES, listing(_ML_FILES), config.name)
        main = main or name
        pieces.append(_ml_ratings(files, name, part))
        opened.append(files)
    files = opened[0]
    return Raw(
        tuple(pieces),
        tuple(opened),
        lambda wanted: _items(_ml_items(files, main)),
        lambda wanted: _users(_ml_users(files, main)),
    )


def _ml_ratings(files: Files, name: str, part: str | None) -> Piece:
    head = files.head(name)
    where = files.where(name)
    if not head.strip():
        raise InputError(f"{where} is empty")
    first = head.split(b"\n")[0]
    if b"::" in first:
        # Arrow splits at one character, so each `::` makes an empty column.
        names = ["user", "_1", "item", "_2", "rating", "_3", "timestamp"]
        delimiter = ":"
    elif b"\t" in first:
        names, delimiter = list(_ML_ROLES), "\t"
    else:
        wanted = {
            "user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"
        }  # fmt: skip
        chosen = pick(header(files, name, ","), wanted, where, required=wanted)
        return Piece(where, part, delimited(files, name, chosen, delimiter=","), chosen)
    roles = {role: role for role in _ML_ROLES}
    columns = delimited(files, name, roles, delimiter=delimiter, names=names, quoting=False)
    return Piece(where, part, columns, roles)


def _split_lines(files: Files, name: str, separator: str, least: int) -> Iterator[list[str]]:
    for number, line in enumerate(files.text(name).split("\n"), 1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split(separator)
        if len(fields) < least:
            raise InputError(
                f"{files.where(name)}, line {number}: {len(fields)} fields, expected {least}"
            )
        yield fields


def _ml_items(files: Files, main: str) -> Iterator[Mapping[str, object]]:
    if name := files.beside(main, "u.item"):
        for fields in _split_lines(files, name, "|", 24):
            flags = zip(_GENRES_100K, fields[5:], strict=False)
            genres = [genre for genre, flag in flags if flag == "1"]
            yield {"item_id": fields[0], "title": fields[1], "categories": genres}
    elif name := files.beside(main, "movies.dat"):
        for fields in _split_lines(files, name, "::", 3):
            # The title may hold the separator; the id and the genres do not.
            title, genres = "::".join(fields[1:-1]), _genres(fields[-1])
            yield {"item_id": fields[0], "title": title, "categories": genres}
    elif name := files.beside(main, "movies.csv"):
        rows = csv.DictReader(io.StringIO(files.text(name)))
        pick(rows.fieldnames or [], {"item": "movieId"}, files.where(name), required=["item"])
        for row in rows:
            genres = _genres(row.get("genres") or "")
            yield {"item_id": row["movieId"], "title": row.get("title"), "categories": genres}


def _genres(text: str) -> list[str]:
    return [] if text == "(no genres listed)" else [part for part in text.split("|") if part]


def _ml_users(files: Files, main: str) -> Iterator[Mapping[str, object]]:
    # Postal codes are left out: they name people more than tastes.
    if name := files.beside(main, "u.user"):
        for fields in _split_lines(files, name, "|", 5):
            text = f"age: {fields[1]}; gender: {fields[2]}; occupation: {fields[3]}"
            yield {"user_id": fields[0], "text": text}
    elif name := files.beside(main, "users.dat"):
        for fields in _split_lines(files, name, "::", 5):
            age = _AGES_1M.get(fields[2], fields[2])
            known = fields[3].isdigit() and int(fields[3]) < len(_JOBS_1M)
            job = _JOBS_1M[int(fields[3])] if known else fields[3]
            text = f"age: {age}; gender: {fields[1]}; occupation: {job}"
            yield {"user_id": fields[0], "text": text}


def _items(rows: Rows) -> pa.Table | None:
    found = pa.Table.from_pylist(list(rows), schema=schema.ITEMS)
    if not found.num_rows:
        return None
    columns = {"item": found["item_id"], **{c: found[c] for c in schema.ITEMS.names[1:]}}
    return tables.item_table(columns, "item texts: item id", separator="|")


def _users(rows: Rows) -> pa.Table | None:
    found = {str(row["user_id"]): row for row in rows}
    return pa.Table.from_pylist(list(found.values()), schema=schema.USERS) if found else None


# --- RecBole ------------------------------------------------------------------------------

_PRESPLIT = re.compile(r"\.(train|valid|test)\.inter$")


def recbole(config: PrepareConfig) -> Raw:
    """RecBole atomic files: .inter, and .item and .user where they lie beside it."""
    pieces, opened, main = [], [], ""
    for part, path in tables.inputs(config):
        files = Files(path)
        opened.append(files)
        if config.split == "premade" and part is None and not config.split_column:
            found = _presplit(files, config.name)
        else:
            if files.single is None and not any(map(_is_inter, files.names)):
                presplit = [name for name in files.names if _PRESPLIT.search(name)]
                if presplit:
                    raise InputError(
                        f"{path} holds only pre-split files ({listing(presplit)}); add "
                        "--split=premade"
                    )
            found = [(part, files.choose(_is_inter, ".inter file", config.name))]
        for piece_part, name in found:
            main = main or name
            pieces.append(_atomic(files, name, piece_part, config))
    files = opened[0]
    stem = re.sub(r"(\.(train|valid|test))?\.inter$", "", main)
    return Raw(
        tuple(pieces),
        tuple(opened),
        lambda wanted: _atomic_items(files, f"{stem}.item"),
        lambda wanted: _atomic_users(files, f"{stem}.user"),
        name=stem.rsplit("/", 1)[-1],
    )


def _is_inter(name: str) -> bool:
    return name.endswith(".inter") and not _PRESPLIT.search(name)


def _presplit(files: Files, wanted: str) -> list[tuple[str | None, str]]:
    """NAME.train.inter, NAME.test.inter and, where there is one, NAME.valid.inter."""
    train = files.choose(lambda n: n.endswith(".train.inter"), "NAME.train.inter file", wanted)
    if not train.endswith(".train.inter"):
        raise InputError(
            f"{files.where(train)} is not called NAME.train.inter; --split=premade reads "
            "NAME.train.inter and NAME.test.inter, or --test_input, or --split_column"
        )
    stem = train.removesuffix(".train.inter")
    if f"{stem}.test.inter" not in files.names:
        raise InputError(f"{files.where(stem)}.test.inter is missing; --split=premade needs it")
    parts: list[tuple[str | None, str]] = [("train", train), ("test", f"{stem}.test.inter")]
    if f"{stem}.valid.inter" in files.names:
        parts.append(("valid", f"{stem}.valid.inter"))
    return parts


def _typed_header(files: Files, name: str) -> dict[str, str]:
    """Field name -> type of an atomic file, in order."""
    fields = [field.split(":") for field in header(files, name, "\t", quoting=False)]
    if any(len(field) != 2 for field in fields):
        shown = listing(":".join(field) for field in fields)
        raise InputError(
            f"{files.where(name)}: the header must be tab-separated name:type, found {shown}"
        )
    return {field[0]: field[1] for field in fields}


def _atomic(files: Files, name: str, part: str | None, config: PrepareConfig) -> Piece:
    where = files.where(name)
    kinds = _typed_header(files, name)
    wanted = tables.wanted_columns(config)
    for role in ("user", "item"):
        if wanted[role] not in kinds:
            wanted[role] = f"{role}_id"
    required = ["user", "item", *(["split"] if config.split_column else [])]
    chosen = pick(list(kinds), wanted, where, required=required)
    full = {role: f"{column}:{kinds[column]}" for role, column in chosen.items()}
    columns = delimited(files, name, full, delimiter="\t", quoting=False)
    return Piece(where, part, columns, chosen)


def _atomic_table(files: Files, name: str, fields: Mapping[str, str]) -> dict[str, pa.ChunkedArray]:
    return delimited(files, name, fields, delimiter="\t", quoting=False, ids=())


def _atomic_items(files: Files, name: str) -> pa.Table | None:
    if name not in files.names:
        return None
    kinds = _typed_header(files, name)
    where = files.where(name)
    if not kinds or "item_id" not in kinds:
        raise InputError(f"{where} has no column item_id; columns found: {listing(kinds)}")

    def first(words: tuple[str, ...], allowed: tuple[str, ...]) -> str | None:
        for field, kind in kinds.items():
            if field != "item_id" and kind in allowed and any(w in field for w in words):
                return field
        return None

    chosen = {
        "item": "item_id",
        "title": first(("title", "name"), ("token", "token_seq")),
        "text": first(("description", "overview", "text"), ("token", "token_seq")),
        "categories": first(("class", "genre", "categor", "tag"), ("token_seq",)),
    }
    year = first(("year",), ("token", "float"))
    full = {role: f"{field}:{kinds[field]}" for role, field in chosen.items() if field}
    columns = _atomic_table(files, name, full | ({"year": f"{year}:{kinds[year]}"} if year else {}))
    if year and "title" in columns:
        columns["title"] = _with_year(columns["title"], columns.pop("year"))
    return tables.item_table(columns, f"{where}: column item_id", separator=" ")


def _with_year(titles: pa.ChunkedArray, years: pa.ChunkedArray) -> pa.ChunkedArray:
    """`Title (1995)`, as MovieLens itself writes it: text models read the decade off it."""
    known = pc.match_substring_regex(years, r"^[12][0-9]{3}$")
    both = pc.binary_join_element_wise(titles, " (", years, ")", "")
    return pc.if_else(pc.fill_null(known, False), both, titles)


def _atomic_users(files: Files, name: str) -> pa.Table | None:
    if name not in files.names:
        return None
    kinds = _typed_header(files, name)
    if "user_id" not in kinds:
        raise InputError(f"{files.where(name)} has no column user_id: {listing(kinds)}")
    # Postal codes are left out: they name people more than tastes.
    shown = [field for field in kinds if field != "user_id" and "zip" not in field]
    full = {field: f"{field}:{kinds[field]}" for field in ("user_id", *shown)}
    table = {key: column.to_pylist() for key, column in _atomic_table(files, name, full).items()}
    ids = table.pop("user_id")
    texts = (
        "; ".join(f"{k}: {table[k][i]}" for k in shown if table[k][i]) for i in range(len(ids))
    )
    rows = ({"user_id": i, "text": text or None} for i, text in zip(ids, texts, strict=True))
    return _users(rows)


# --- Amazon Reviews -----------------------------------------------------------------------

# Field names of 2023, then of 2014 and 2018.
_AMAZON_FIELDS = (
    {"user": "user_id", "item": "parent_asin", "timestamp": "timestamp", "rating": "rating"},
    {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime", "rating": "overall"},
)
_ASIN = re.compile(r"^(B[0-9A-Z]{9}|[0-9]{9}[0-9X])$")
_REVIEWER = re.compile(r"^A[0-9A-Z]{9,20}$")


def amazon(config: PrepareConfig) -> Raw:
    """Amazon Reviews: jsonl of 2014, 2018, 2023; csv of 2023; ratings-only csv of 2014, 2018."""
    pieces, opened = [], []
    for part, path in tables.inputs(config):
        files = Files(path)
        name = files.choose(_is_amazon, "Amazon review file", config.name)
        head = files.head(name)
        if not head.strip():
            raise InputError(f"{files.where(name)} is empty")
        read_one = _reviews if head.lstrip()[:1] == b"{" else _amazon_csv
        pieces.append(read_one(files, name, head, part))
        opened.append(files)
    if not config.items_input:
        return Raw(tuple(pieces), tuple(opened), tables.nothing, tables.nothing)
    metadata = Files(config.items_input)
    name = metadata.choose(lambda n: "meta" in n, "metadata jsonl (meta...)", config.name)
    return Raw(
        tuple(pieces),
        (*opened, metadata),
        lambda wanted: _items(_metadata(metadata, name, set(wanted.to_pylist()))),
        tables.nothing,
    )


def _is_amazon(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz"))


def _reviews(files: Files, name: str, head: bytes, part: str | None) -> Piece:
    where = files.where(name)
    try:
        first = json.loads(head.split(b"\n")[0])
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not one JSON object a line: {error}") from error
    fields = next((f for f in _AMAZON_FIELDS if f["item"] in first and f["user"] in first), None)
    if fields is None:
        expected = " or ".join(f"{f['user']} and {f['item']}" for f in _AMAZON_FIELDS)
        raise InputError(f"{where} has no fields {expected}; fields found: {listing(first)}")
    types = {"timestamp": pa.int64(), "rating": pa.float64()}
    layout = pa.schema([(field, types.get(role, pa.string())) for role, field in fields.items()])
    with files.open(name) as file, reading(where):
        table = pajson.read_json(
            file,
            read_options=pajson.ReadOptions(block_size=1 << 25),  # over the longest review
            parse_options=pajson.ParseOptions(
                explicit_schema=layout, unexpected_field_behavior="ignore"
            ),
        )
    columns = {role: table.column(field) for role, field in fields.items()}
    return Piece(where, part, columns, fields)


def _amazon_csv(files: Files, name: str, head: bytes, part: str | None) -> Piece:
    where = files.where(name)
    found = header(files, name, ",")
    if _AMAZON_FIELDS[0]["user"] in found:
        chosen = pick(found, _AMAZON_FIELDS[0], where, required=("user", "item"))
        return Piece(where, part, delimited(files, name, chosen, delimiter=","), chosen)
    # No header: 2014 is user,item,rating,time and 2018 is item,user,rating,time.
    lines = head.decode("utf-8", errors="replace").split("\n")[:-1] or [",".join(found)]
    rows = [line.rstrip("\r").split(",") for line in lines]
    full = [row for row in rows if len(row) == 4]

    def share(pattern: re.Pattern[str], column: int) -> float:
        return sum(bool(pattern.match(row[column])) for row in full) / max(1, len(rows))

    if share(_REVIEWER, 0) > 0.9 and share(_ASIN, 1) > 0.9:
        names = ["user", "item", "rating", "timestamp"]
    elif share(_ASIN, 0) > 0.9 and share(_REVIEWER, 1) > 0.9:
        names = ["item", "user", "rating", "timestamp"]
    else:
        raise InputError(
            f"{where}: no header with user_id and parent_asin, and the first lines are neither "
            "user,item,rating,time nor item,user,rating,time with Amazon ids; add a header line "
            "and use --source=csv"
        )
    roles = {role: role for role in names}
    columns = delimited(files, name, roles, delimiter=",", names=names)
    return Piece(where, part, columns, roles)


def _metadata(files: Files, name: str, wanted: set[str]) -> Iterator[Mapping[str, object]]:
    """Title, description and categories of the wanted items of a metadata jsonl file."""
    where = files.where(name)
    with files.open(name) as file, reading(where):
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = "; the 2014 files hold Python literals" if "'asin'" in line else ""
                raise InputError(f"{where}, line {number} is not JSON: {error}{hint}") from error
            item = row.get("parent_asin") or row.get("asin")
            if item in wanted:
                categories = row.get("categories") or row.get("category") or []
                yield {
                    "item_id": item,
                    "title": row.get("title"),
                    "text": " ".join(_texts(row.get("description"))) or None,
                    "categories": _texts(categories),
                }


def _texts(value: object) -> list[str]:
    """The strings in a string, a list, or a list of lists, in order."""
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) and value else []
