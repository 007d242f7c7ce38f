"""MovieLens 100K (u.data), 1M and 10M (ratings.dat), 20M and later (ratings.csv).

The layouts are those that the README files of the data sets state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import feature_columns, tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import DelimitedFile, pick
from slgr_jax.data.ingest.feature_columns import Declared, FeatureColumns
from slgr_jax.data.ingest.raw import Piece, Raw
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
        _features(files, main, config),
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
        return movies_csv(files, name, config)
    return None


def _users(files: Files, main: str, config: PrepareConfig) -> Texts | None:
    if name := files.beside(main, "u.user"):
        return _texts(files, name, config, "|", 5, _described_100k, schema.USERS)
    if name := files.beside(main, "users.dat"):
        return _texts(files, name, config, "::", 5, _described_1m, schema.USERS)
    return None


def _features(files: Files, main: str, config: PrepareConfig) -> dict[str, FeatureColumns]:
    """Age, gender and occupation of users; what is known of movies are their categories."""
    wanted = feature_columns.declared(config.user_features, "user_features")
    if items := feature_columns.declared(config.item_features, "item_features"):
        raise InputError(
            f"--item_features={config.item_features}: MovieLens has no column {items[0].name}; its "
            "genres are the feature categories anyway"
        )
    age, rows_of, separator = "numeric", _people_100k, "|"
    name = files.beside(main, "u.user")
    if name is None:
        age, rows_of, separator = "categorical", _people_1m, "::"
        name = files.beside(main, "users.dat")
    if name is None:
        if wanted:
            raise InputError(f"--user_features={config.user_features}: {files.path} has no users")
        return {}
    count = LineCount(files.where(name))
    lines = split_lines(
        files.text(name, config.encoding)[0], separator, 5, count, drop=tables.drops(config)
    )
    people = pa.Table.from_pylist(list(rows_of(lines)), schema=_PEOPLE)
    known = (
        Declared("age", age),
        Declared("gender", "categorical"),
        Declared("occupation", "categorical"),
    )
    chosen = feature_columns.pick(wanted, known, _PEOPLE.names[1:], count.where)
    columns = tuple((entry, people.column(entry.name)) for entry in chosen)
    return {"user": FeatureColumns(count.where, people.column("user_id"), columns)}


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


def movies_csv(files: Files, name: str, config: PrepareConfig) -> Texts | None:
    """movies.csv of the later releases: titles and genres."""
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
_PEOPLE = pa.schema([(name, pa.string()) for name in ("user_id", "age", "gender", "occupation")])


def _people_100k(lines: Fields) -> Rows:
    for fields in lines:
        yield dict(zip(_PEOPLE.names, fields, strict=False))


def _people_1m(lines: Fields) -> Rows:
    for user, gender, age, job, *_ in lines:
        is_job = job.isdecimal() and len(job) < 3 and int(job) < len(_JOBS_1M)
        yield {
            "user_id": user,
            "age": _AGES_1M.get(age, age),
            "gender": gender,
            "occupation": _JOBS_1M[int(job)] if is_job else job,
        }


def _described_100k(lines: Fields) -> Rows:
    return map(_described, _people_100k(lines))


def _described_1m(lines: Fields) -> Rows:
    return map(_described, _people_1m(lines))


def _described(person: Mapping[str, object]) -> Mapping[str, object]:
    text = "; ".join(f"{name}: {person[name]}" for name in _PEOPLE.names[1:])
    return {"user_id": person["user_id"], "text": text}
