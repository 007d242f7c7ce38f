"""RecBole atomic files: .inter with `name:type` headers, .item and .user beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import feature_columns, tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.delimited import DelimitedFile, FileRows, pick
from slgr_jax.data.ingest.feature_columns import Declared, FeatureColumns
from slgr_jax.data.ingest.raw import Piece, Raw
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import InputError, listing

_PRESPLIT = re.compile(r"\.(train|valid|test)\.inter$")
_TABS = Dialect(delimiter="\t", quote="")
# Types of a header -> kinds of features; float_seq, a vector, is none.
_KINDS = {"token": "categorical", "token_seq": "multi", "float": "numeric"}


def atomic_files(config: PrepareConfig) -> Raw:
    """NAME.inter or its pre-split parts, with NAME.item and NAME.user where they are."""
    pieces, opened, main = [], [], ""
    wanted = tables.interaction_features(config)
    of_interactions: tuple[Declared, ...] = ()
    for part, path in tables.inputs(config):
        files = Files(path)
        opened.append(files)
        for piece_part, name in _inter_files(files, part, config):
            main = main or name
            piece, of_interactions = _interactions(files, name, piece_part, config, wanted)
            pieces.append(piece)
    files = opened[0]
    stem = re.sub(r"(\.(train|valid|test))?\.inter$", "", main)
    return Raw(
        tuple(pieces),
        tuple(opened),
        lambda wanted: items(files, f"{stem}.item", config),
        lambda wanted: _users(files, f"{stem}.user", config),
        _features(files, stem, config),
        of_interactions,
        name=stem.rsplit("/", 1)[-1],
    )


def _inter_files(
    files: Files, part: str | None, config: PrepareConfig
) -> list[tuple[str | None, str]]:
    """(part, name) of the .inter files that are meant."""
    if config.split == "premade" and part is None and not config.split_column:
        return _presplit(files, config.name)
    if files.single is None and not any(map(_is_inter, files.names)):
        presplit = [name for name in files.names if _PRESPLIT.search(name)]
        if presplit:
            raise InputError(
                f"{files.path} holds only pre-split files ({listing(presplit)}); add "
                "--split=premade"
            )
    return [(part, files.choose(_is_inter, ".inter file", config.name))]


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


class _AtomicFile:
    """A tab-separated file whose header gives each field a name and a type.

    Attributes:
      kinds: field name -> type, in order.
    """

    def __init__(self, files: Files, name: str, dialect: Dialect) -> None:
        self._file = DelimitedFile(files, name, dialect)
        self.where = self._file.where
        fields = [field.split(":") for field in self._file.names]
        if any(len(field) != 2 for field in fields):
            raise InputError(
                f"{self.where}: the header must be tab-separated name:type, found "
                f"{listing(self._file.names)}"
            )
        self.kinds = {field[0]: field[1] for field in fields}
        if len(self.kinds) < len(fields):
            twice = [n for n in self.kinds if sum(field[0] == n for field in fields) > 1]
            raise InputError(f"{self.where} has column {listing(twice)} more than once")

    def log(self, columns: Mapping[str, str], *, drop: bool) -> FileRows:
        """Interactions by role -> field name."""
        return self._file.read(self._full(columns), drop=drop)

    def texts(self, columns: Mapping[str, str], *, drop: bool) -> FileRows:
        """Texts by role -> field name."""
        return self._file.read(self._full(columns), drop=drop, ids=(), is_log=False)

    def _full(self, columns: Mapping[str, str]) -> dict[str, str]:
        return {role: f"{field}:{self.kinds[field]}" for role, field in columns.items()}


def _interactions(
    files: Files, name: str, part: str | None, config: PrepareConfig, features: tuple[Declared, ...]
) -> tuple[Piece, tuple[Declared, ...]]:
    """An .inter file, and `features` with what its header says of them."""
    dialect = Dialect(delimiter="\t", quote="", encoding=config.encoding)
    file = _AtomicFile(files, name, dialect)
    wanted = tables.wanted_columns(config)
    for role in ("user", "item"):
        if wanted[role] not in file.kinds:
            wanted[role] = f"{role}_id"
    required = ["user", "item", *(["split"] if config.split_column else [])]
    _refuse_vectors(file, features)
    known = [
        Declared(field, _KINDS[kind], " ") for field, kind in file.kinds.items() if kind in _KINDS
    ]
    features = feature_columns.pick(features, known, file.kinds, file.where)
    wanted |= {feature_columns.role(entry): entry.name for entry in features}
    chosen = pick(list(file.kinds), wanted, file.where, required=required)
    return Piece.of(file.log(chosen, drop=tables.drops(config)), part, chosen), features


def _text_file(files: Files, name: str, key: str, config: PrepareConfig) -> _AtomicFile | None:
    """A file of texts by the column `key`; None where there is none."""
    if name not in files.names:
        return None
    file = _AtomicFile(files, name, tables.dialect_of_texts(files, name, _TABS, config))
    if key not in file.kinds:
        raise InputError(f"{file.where} has no column {key}; columns found: {listing(file.kinds)}")
    return file


def items(files: Files, name: str, config: PrepareConfig) -> Texts | None:
    """The texts of an .item file; None where there is none."""
    file = _text_file(files, name, "item_id", config)
    if file is None:
        return None
    fields = {"item": "item_id", **_item_roles(file.kinds)}
    drop = tables.drops(config)
    rows = file.texts(fields, drop=drop)
    if not rows.count.rows:
        return None
    years = rows.columns.pop("year", None)
    if years is not None and "title" in rows.columns:
        rows.columns["title"] = _with_year(rows.columns["title"], years)
    label = f"{file.where}: column item_id"
    return texts.of_rows(rows, label, separator=" ", drop=drop)


def _item_roles(kinds: Mapping[str, str]) -> dict[str, str]:
    """title, text, categories, year -> the field of an .item file that is it, where one is."""

    def first(words: tuple[str, ...], allowed: tuple[str, ...]) -> str | None:
        for field, kind in kinds.items():
            if field != "item_id" and kind in allowed and any(w in field for w in words):
                return field
        return None

    fields = {
        "title": first(("title", "name"), ("token", "token_seq")),
        "text": first(("description", "overview", "text"), ("token", "token_seq")),
        "categories": first(("class", "genre", "categor", "tag"), ("token_seq",)),
        "year": first(("year",), ("token", "float")),
    }
    return {role: field for role, field in fields.items() if field}


def _features(files: Files, stem: str, config: PrepareConfig) -> dict[str, FeatureColumns]:
    """The fields of .user and .item that are features, by side."""
    by_side: dict[str, FeatureColumns] = {}
    for side, flag in (("user", config.user_features), ("item", config.item_features)):
        wanted = feature_columns.declared(flag, f"{side}_features")
        file = _text_file(files, f"{stem}.{side}", f"{side}_id", config)
        if file is None and wanted:
            raise InputError(
                f"--{side}_features={flag}: {files.path} has no {stem.rsplit('/', 1)[-1]}.{side}"
            )
        if file is not None:
            by_side[side] = _feature_columns(file, side, wanted, tables.drops(config))
    return by_side


def _feature_columns(
    file: _AtomicFile, side: str, wanted: Collection[Declared] | None, drop: bool
) -> FeatureColumns:
    """The features of a file: those wanted, or all but texts, categories and postal codes."""
    kinds = {field: kind for field, kind in file.kinds.items() if field != f"{side}_id"}
    _refuse_vectors(file, wanted or ())
    left_out: Collection[str] = [field for field in kinds if "zip" in field]
    if side == "item":
        roles = _item_roles(file.kinds)
        left_out = [*left_out, *(field for role, field in roles.items() if role != "year")]
    known = [
        Declared(field, _KINDS[kind], " ")
        for field, kind in kinds.items()
        if kind in _KINDS and (wanted is not None or field not in left_out)
    ]
    chosen = feature_columns.pick(
        None if wanted is None else tuple(wanted), known, kinds, file.where
    )
    rows = file.texts({f: f for f in (f"{side}_id", *(e.name for e in chosen))}, drop=drop)
    return FeatureColumns(
        file.where, rows.columns[f"{side}_id"], tuple((e, rows.columns[e.name]) for e in chosen)
    )


def _refuse_vectors(file: _AtomicFile, wanted: Collection[Declared]) -> None:
    vectors = [entry.name for entry in wanted if file.kinds.get(entry.name) == "float_seq"]
    if vectors:
        raise InputError(f"{file.where}: column {listing(vectors)} is float_seq, not a feature")


def _with_year(titles: pa.ChunkedArray, years: pa.ChunkedArray) -> pa.ChunkedArray:
    """`Title (1995)`, as MovieLens itself writes it: text models read the decade off it."""
    is_year = pc.match_substring_regex(years, r"^[12][0-9]{3}$")
    both = pc.binary_join_element_wise(titles, " (", years, ")", "")
    return pc.if_else(pc.fill_null(is_year, False), both, titles)


def _users(files: Files, name: str, config: PrepareConfig) -> Texts | None:
    file = _text_file(files, name, "user_id", config)
    if file is None:
        return None
    # Postal codes are left out: they name people more than tastes.
    shown = [field for field in file.kinds if field != "user_id" and "zip" not in field]
    fields = {field: field for field in ("user_id", *shown)}
    rows = file.texts(fields, drop=tables.drops(config))
    cells = {field: column.to_pylist() for field, column in rows.columns.items()}
    people = [
        {
            "user_id": user,
            "text": "; ".join(f"{field}: {cells[field][k]}" for field in shown if cells[field][k])
            or None,
        }
        for k, user in enumerate(cells["user_id"])
    ]
    return texts.beside(people, schema.USERS, rows.count)
