"""What every reader of raw files shares, and the reader of files with named columns.

A reader finds the file, names its columns and hands them over as they are; `columns.py` turns
them into arrays. Item and user texts are read afterwards, for the ids that are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import shards
from slgr_jax.data.ingest import arrow_files, feature_columns, json_lines, text_lines, texts
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import ID_ROLES, DelimitedFile, FileRows, pick
from slgr_jax.data.ingest.feature_columns import Declared, FeatureColumns
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import ConfigError, InputError, printable

ROLES = ("user", "item", "timestamp", "rating", "split")
_ROLE_KNOBS = {
    "user": "user_column",
    "item": "item_column",
    "timestamp": "time_column",
    "rating": "rating_column",
    "split": "split_column",
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Interactions of one file, columns as they were found.

    Attributes:
      where: the file, for messages.
      part: train, valid or test where the file is one part; None where a rule decides.
      columns: role (`ROLES`) -> column; user and item always, the others where present; and those
        of features (`feature_columns.role`).
      names: role -> the column's name in the file.
      count: the lines of the file.
      numbers: [n] the rows' numbers in the file, from 1; None: 1 to n.
    """

    where: str
    part: str | None
    columns: Mapping[str, pa.ChunkedArray]
    names: Mapping[str, str]
    count: LineCount
    numbers: np.ndarray | None = None

    @classmethod
    def of(cls, rows: FileRows, part: str | None, names: Mapping[str, str]) -> Piece:
        """The piece of what was read from a file."""
        return cls(rows.count.where, part, rows.columns, names, rows.count, rows.numbers)

    def label(self, role: str) -> str:
        """The file and the column, for messages."""
        return f"{self.where}: column {printable(self.names[role])}"

    def __len__(self) -> int:
        return len(self.columns["user"])


@dataclasses.dataclass(frozen=True)
class Raw:
    """All interactions of an input, and how to read the texts that belong to them."""

    pieces: tuple[Piece, ...]
    files: tuple[Files, ...]
    # Wanted ids (None: all of the table) -> rows of schema.ITEMS, any order.
    items: Callable[[pa.Array | None], Texts | None]
    users: Callable[[pa.Array], Texts | None]  # wanted ids -> rows of schema.USERS
    features: Mapping[str, FeatureColumns] = dataclasses.field(default_factory=dict)  # by side
    of_interactions: tuple[Declared, ...] = ()  # features, whose columns each piece has
    name: str = ""  # what the files call the data set; empty if nothing better than --input


def nothing(wanted: pa.Array | None) -> None:
    """No texts."""
    return None


def inputs(config: PrepareConfig) -> list[tuple[str | None, str]]:
    """(part, path) of each file that the command line names; part None: a rule decides."""
    if not config.test_input:
        if config.valid_input:
            raise ConfigError("--valid_input needs --test_input: a pre-made split has a test part")
        return [(None, config.input)]
    pairs: list[tuple[str | None, str]] = [("train", config.input), ("test", config.test_input)]
    return [*pairs, ("valid", config.valid_input)] if config.valid_input else pairs


def drops(config: PrepareConfig) -> bool:
    """Whether bad rows are left out."""
    return config.bad_rows == "drop"


# --- files with named columns --------------------------------------------------------------


def wanted_columns(config: PrepareConfig) -> dict[str, str]:
    """Role -> column name on the command line."""
    return {role: getattr(config, knob) for role, knob in _ROLE_KNOBS.items()}


def chosen_columns(config: PrepareConfig) -> dict[str, str]:
    """`wanted_columns` of the roles whose column the user named, other than the default."""
    wanted = wanted_columns(config)
    return {
        role: wanted[role]
        for role, knob in _ROLE_KNOBS.items()
        if wanted[role] and wanted[role] != _DEFAULTS[knob]
    }


def interaction_features(config: PrepareConfig) -> tuple[Declared, ...]:
    """The columns of the interactions that are to be features.

    Raises:
      ConfigError: one has another role, and what it says is no context of the interaction.
    """
    features = feature_columns.declared(config.interaction_features, "interaction_features") or ()
    by_column = {column: role for role, column in wanted_columns(config).items() if column}
    for entry in features:
        if (taken := by_column.get(entry.name)) is not None:
            raise ConfigError(
                f"--interaction_features={config.interaction_features}: {entry.name} is the column "
                f"of the {taken}, which is no feature; write what may be known before the "
                "interaction (as the hour of its time) to a column of its own"
            )
    return features


def named_columns(config: PrepareConfig) -> Raw:
    """csv, jsonl, parquet: one column per role, named on the command line."""
    features = interaction_features(config)
    of_features = {feature_columns.role(entry): entry.name for entry in features}
    wanted = {**wanted_columns(config), **of_features}
    # A column that the user named must be there; the default name is taken if it is.
    required = list(dict.fromkeys(["user", "item", *chosen_columns(config), *of_features]))
    pieces, opened = [], []
    for part, path in inputs(config):
        files = Files(path)
        opened.append(files)
        for piece_part, chosen, rows in _named_rows(files, config, wanted, required):
            if part and piece_part:
                raise ConfigError(
                    f"{path} holds parts of a split (train, test), and --test_input names "
                    "another; give one of them"
                )
            pieces.append(Piece.of(rows, part or piece_part, chosen))
    items, users = named_items(config), _named_users(config)
    tables = {"item": items, "user": users}
    return Raw(
        tuple(pieces),
        (*opened, *(table.file for table in tables.values() if table is not None)),
        nothing if items is None else items.texts,
        nothing if users is None else users.texts,
        {side: table.features for side, table in tables.items() if table and table.features},
        of_interactions=features,
    )


_Named = tuple[str | None, dict[str, str], FileRows]


def _named_rows(
    files: Files, config: PrepareConfig, wanted: Mapping[str, str], required: Collection[str]
) -> Iterator[_Named]:
    """(part, role -> column, rows) of each file of an input; what it holds decides its format."""
    if config.source == "parquet":
        if files.single is not None and json_lines.is_json(files.head(files.single, 64)):
            raise InputError(f"{files.path} holds JSON: read it with --source=jsonl")
        for part, names in arrow_files.parts_of(files).items():
            yield part, *arrow_files.read(files, names, wanted, required=required)
        return

    endings = (".jsonl", ".json", ".ndjson") if config.source == "jsonl" else (".csv", ".tsv")
    endings = (*endings, *(f"{ending}.gz" for ending in endings))
    kinds = " or ".join(ending.lstrip(".") for ending in endings[: len(endings) // 2])
    name = files.choose(lambda n: n.endswith(endings), f"{kinds} file", config.name)
    head = files.head(name)
    if arrow_files.is_arrow(head):
        raise InputError(f"{files.where(name)} is Parquet or Arrow: add --source=parquet")
    if config.source == "jsonl" or json_lines.is_json(head):
        _refuse_features(files, name, interaction_features(config))
        yield None, *_json_rows(files, name, config, wanted, required)
        return
    file = DelimitedFile(
        files, name, text_lines.dialect_of(config), column_list(config.columns, "columns")
    )
    chosen = pick(file.names, wanted, file.where, required=required, first_line=True)
    yield None, chosen, file.read(chosen, drop=drops(config))


def column_list(text: str, knob: str) -> list[str] | None:
    """The names in --columns or --items_columns; None where it is empty."""
    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--{knob}={text!r} has an empty name; name columns that are not read _")
    return names


def _json_rows(
    files: Files,
    name: str,
    config: PrepareConfig,
    wanted: Mapping[str, str],
    required: Collection[str],
) -> tuple[dict[str, str], FileRows]:
    names = json_lines.field_names(files, name, config.encoding)
    chosen = pick(names, wanted, files.where(name), required=required)
    return chosen, json_lines.read(
        files, name, chosen, encoding=config.encoding, drop=drops(config), ids=ID_ROLES
    )


# --- item and user tables ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NamedTable:
    """A table of items or users with named columns."""

    file: Files
    texts: Callable[[pa.Array | None], Texts]
    features: FeatureColumns | None = None


def named_items(config: PrepareConfig) -> NamedTable | None:
    """--items_input, one column per role; None where there is none.

    Raises:
      InputError: it lacks the column of ids or of a feature, or cannot be read.
    """
    if not config.items_input:
        return None
    files = Files(config.items_input)
    wanted = {
        "item": config.item_column,
        "title": config.title_column,
        "text": config.text_column,
        "categories": config.categories_column,
    }
    features = feature_columns.declared(config.item_features, "item_features") or ()
    if (name := _json_of(files)) is not None:
        _refuse_features(files, name, features)
        return NamedTable(files, _json_items(files, name, config, wanted))

    rows, of_features = _named_rows_of(files, config, wanted, features, config.items_columns)
    label = f"{files.path}: column {printable(wanted['item'])}"
    items = texts.of_rows(rows, label, separator="|", drop=drops(config))
    return NamedTable(files, lambda wanted_ids: items, of_features)


def _named_users(config: PrepareConfig) -> NamedTable | None:
    """--users_input: ids, text and features; None where there is none."""
    if not config.users_input:
        return None
    files = Files(config.users_input)
    features = feature_columns.declared(config.user_features, "user_features") or ()
    if (name := _json_of(files)) is not None:
        raise InputError(f"{files.where(name)} holds JSON; write the user table as csv or Parquet")
    wanted = {"user": config.user_column, "text": config.text_column}
    rows, of_features = _named_rows_of(files, config, wanted, features, config.users_columns)
    label = f"{files.path}: column {printable(wanted['user'])}"
    users = texts.users_of_rows(rows, label, drop=drops(config))
    return NamedTable(files, lambda wanted_ids: users, of_features)


def _json_of(files: Files) -> str | None:
    """The name of a table that is one file of JSON; None if it is none."""
    name = files.single
    return name if name is not None and json_lines.is_json(files.head(name, 64)) else None


def _refuse_features(files: Files, name: str, features: Collection[Declared]) -> None:
    if features:
        raise InputError(
            f"{files.where(name)} holds JSON; features are read from a csv, Parquet or Arrow table"
        )


def _named_rows_of(
    files: Files,
    config: PrepareConfig,
    wanted: Mapping[str, str],
    features: tuple[Declared, ...],
    header: str,
) -> tuple[FileRows, FeatureColumns]:
    """The rows of a table whose first role is that of its ids, and its features.

    Args:
      header: the command line's names of its columns; empty: its first line.
    """
    side = next(iter(wanted))
    roles = {**wanted, **{feature_columns.role(entry): entry.name for entry in features}}
    name = files.single
    if name is None or arrow_files.is_arrow(files.head(name, 64)):
        names = [name for held in arrow_files.parts_of(files).values() for name in held]
        present = shards.column_names(files.path_of(names[0]))
        feature_columns.pick(features, (), present, files.where(names[0]))
        _, rows = arrow_files.read(files, names, roles, required=[side])
    else:
        rows = _delimited_rows(files, name, config, roles, features, header)
    read = tuple((entry, rows.columns[feature_columns.role(entry)]) for entry in features)
    return rows, FeatureColumns(rows.count.where, rows.columns[side], read)


def _delimited_rows(
    files: Files,
    name: str,
    config: PrepareConfig,
    roles: Mapping[str, str],
    features: tuple[Declared, ...],
    header: str,
) -> FileRows:
    side = next(iter(roles))
    dialect = dialect_of_texts(files, name, text_lines.dialect_of(config), config)
    file = DelimitedFile(files, name, dialect, column_list(header, f"{side}s_columns"))
    chosen = pick(file.names, roles, file.where, required=[side], first_line=True)
    feature_columns.pick(features, (), file.names, file.where)
    rows = file.read(chosen, drop=drops(config), ids=(), is_log=False)
    if dialect.encoding != "utf-8-sig":
        rows.count.note = f"read as {dialect.encoding}"
    return rows


def dialect_of_texts(files: Files, name: str, dialect: Dialect, config: PrepareConfig) -> Dialect:
    """`dialect` in the encoding of a file of texts (`text_lines.encoding_of_texts`)."""
    with files.open(name) as stream, reading(files.where(name)):
        encoding = text_lines.encoding_of_texts(stream, config.encoding)
    return dataclasses.replace(dialect, encoding=encoding)


def _json_items(
    files: Files, name: str, config: PrepareConfig, wanted: Mapping[str, str]
) -> Callable[[pa.Array | None], Texts]:
    where = files.where(name)
    names = json_lines.field_names(files, name, config.encoding)
    chosen = pick(names, {"item": wanted["item"]}, where, required=["item"])
    fields = {
        "item_id": [chosen["item"]],
        **{column: [wanted[column]] for column in ("title", "text", "categories")},
    }

    def read(wanted_ids: pa.Array | None) -> Texts:
        count = LineCount(where)
        return texts.of_records(
            json_lines.objects(files, name, config.encoding, count, drop=drops(config)),
            fields,
            count,
            wanted=None if wanted_ids is None else set(wanted_ids.to_pylist()),
            separator="|",
            drop=drops(config),
        )

    return read
