"""MovieLens 100K (u.data), 1M and 10M (ratings.dat), 20M and later (ratings.csv).

The layouts are those that the README files of the data sets state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import DelimitedFile, pick
from slgr_jax.data.ingest.tables import Piece, Raw
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import InputError, listing

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
_ROLES = ("user", "item", "rating", "timestamp")
_CSV_COLUMNS = {
    "user": "userId",
    "item": "movieId",
    "rating": "rating",
    "timestamp": "timestamp",
}
_FILES = ("u.data", "ratings.dat", "ratings.csv")


def ratings(config: PrepareConfig) -> Raw:
    """The ratings of any release; movies and users where they lie beside them."""
    pieces, opened, main = [], [], ""
    for part, path in tables.inputs(config):
        files = Files(path)
        name = files.choose(lambda n: n in _FILES, listing(_FILES), config.name)
        main = main or name
        pieces.append(_ratings(files, name, part, config))
        opened.append(files)
    files = opened[0]
    return Raw(
        tuple(pieces),
        tuple(opened),
        lambda wanted: _items(files, main, config),
        lambda wanted: _users(files, main, config),
    )


def _ratings(files: Files, name: str, part: str | None, config: PrepareConfig) -> Piece:
    head = files.head(name)
    if not head.strip():
        raise InputError(f"{files.where(name)} is empty")
    first = head.split(b"\n")[0]
    dialect = Dialect(quote="", encoding=config.encoding)
    drop = tables.drops(config)
    if b"::" in first or b"\t" in first:
        if b"::" in first:
            # Arrow splits at one character, so each `::` makes an empty column.
            names = ["user", "_1", "item", "_2", "rating", "_3", "timestamp"]
            dialect = dialect.with_delimiter(":", quote="")
        else:
            names, dialect = list(_ROLES), dialect.with_delimiter("\t", quote="")
        roles = {role: role for role in _ROLES}
        rows = DelimitedFile(files, name, dialect, names).read(roles, drop=drop)
        return Piece.of(rows, part, roles)
    file = DelimitedFile(files, name, dialect.with_delimiter(",", quote='"'))
    chosen = pick(file.names, _CSV_COLUMNS, file.where, required=_CSV_COLUMNS)
    return Piece.of(file.read(chosen, drop=drop), part, chosen)


# --- movies and users ----------------------------------------------------------------------

Fields = Iterator[list[str]]
Rows = Iterator[Mapping[str, object]]


def _items(files: Files, main: str, config: PrepareConfig) -> Texts | None:
    if name := files.beside(main, "u.item"):
        return _texts(files, name, config, "|", 24, _movies_100k, schema.ITEMS)
    if name := files.beside(main, "movies.dat"):
        return _texts(files, name, config, "::", 3, _movies_1m, schema.ITEMS)
    if name := files.beside(main, "movies.csv"):
        return _movies_csv(files, name, config)
    return None


def _users(files: Files, main: str, config: PrepareConfig) -> Texts | None:
    if name := files.beside(main, "u.user"):
        return _texts(files, name, config, "|", 5, _people_100k, schema.USERS)
    if name := files.beside(main, "users.dat"):
        return _texts(files, name, config, "::", 5, _people_1m, schema.USERS)
    return None


def _texts(
    files: Files,
    name: str,
    config: PrepareConfig,
    separator: str,
    least: int,
    rows_of: Callable[[Fields], Rows],
    layout: pa.Schema,
) -> Texts | None:
    """Texts of a file of lines that are split at `separator`, into at least `least` fields."""
    count = LineCount(files.where(name))
    text, count.note = files.text(name, config.encoding)
    fields = split_lines(text, separator, least, count, drop=tables.drops(config))
    return texts.beside(list(rows_of(fields)), layout, count)


def split_lines(
    text: str, separator: str, least: int, count: LineCount, *, drop: bool
) -> Iterator[list[str]]:
    """The fields of each line; lines with fewer than `least`, or no id, are bad rows."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        count.lines += 1
        line = line.rstrip("\r")
        if not line:
            count.blank += 1
            continue
        fields = line.split(separator)
        if len(fields) >= least and fields[0]:
            count.rows += 1
            yield fields
            continue
        reason = f"{len(fields)} fields, expected {least}" if fields[0] else "the id is missing"
        message = f"{count.where}, line {count.lines}: {reason}"
        if not drop:
            raise InputError(f"{message}; --bad_rows=drop leaves out rows that cannot be used")
        count.drop(message)


def _movies_100k(lines: Fields) -> Rows:
    for fields in lines:
        flags = zip(_GENRES_100K, fields[5:], strict=False)
        genres = [genre for genre, flag in flags if flag == "1"]
        yield {"item_id": fields[0], "title": fields[1], "categories": genres}


def _movies_1m(lines: Fields) -> Rows:
    for fields in lines:
        # The title may hold the separator; the id and the genres do not.
        title, genres = "::".join(fields[1:-1]), _genres(fields[-1])
        yield {"item_id": fields[0], "title": title, "categories": genres}


def _movies_csv(files: Files, name: str, config: PrepareConfig) -> Texts | None:
    file = DelimitedFile(files, name, tables.dialect_of_texts(files, name, Dialect(), config))
    wanted = {"item": "movieId", "title": "title", "categories": "genres"}
    chosen = pick(file.names, wanted, file.where, required=["item"])
    rows = file.read(chosen, drop=tables.drops(config), ids=(), is_log=False)
    cells = {role: column.to_pylist() for role, column in rows.columns.items()}
    blank = [None] * rows.count.rows
    movies = [
        {"item_id": item, "title": title, "categories": _genres(genres or "")}
        for item, title, genres in zip(
            cells["item"], cells.get("title", blank), cells.get("categories", blank), strict=True
        )
    ]
    return texts.beside(movies, schema.ITEMS, rows.count)


def _genres(text: str) -> list[str]:
    return [] if text == "(no genres listed)" else [part for part in text.split("|") if part]


# Postal codes are left out: they name people more than tastes.
def _people_100k(lines: Fields) -> Rows:
    for fields in lines:
        text = f"age: {fields[1]}; gender: {fields[2]}; occupation: {fields[3]}"
        yield {"user_id": fields[0], "text": text}


def _people_1m(lines: Fields) -> Rows:
    for fields in lines:
        age = _AGES_1M.get(fields[2], fields[2])
        is_job = fields[3].isdecimal() and len(fields[3]) < 3 and int(fields[3]) < len(_JOBS_1M)
        job = _JOBS_1M[int(fields[3])] if is_job else fields[3]
        yield {"user_id": fields[0], "text": f"age: {age}; gender: {fields[1]}; occupation: {job}"}
