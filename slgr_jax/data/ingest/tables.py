"""What readers of raw files share, and the reader of files with named columns.

A reader finds the file, names its columns and hands them over as they are; `columns.py` turns
them into arrays. Item and user texts are read afterwards, for the ids that are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import shards
from slgr_jax.data.ingest import arrow_files, feature_columns, json_lines, text_lines, texts
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import ID_ROLES, DelimitedFile, FileRows, pick
from slgr_jax.data.ingest.feature_columns import Declared, FeatureColumns
from slgr_jax.data.ingest.raw import Piece, Raw, Stream, nothing
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
# A line of a csv file has at least about so many bytes.
_LINE_BYTES = 16
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}


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


def named_columns(config: PrepareConfig, most_rows: int | None = None) -> Raw:
    """csv, jsonl, parquet: one column per role, named on the command line.

    Args:
      most_rows: csv and Parquet with more rows than this are streamed; features of interactions
        are not, since they are encoded when the split is known. None: nothing is.
    """
    features = interaction_features(config)
    of_features = {feature_columns.role(entry): entry.name for entry in features}
    wanted = {**wanted_columns(config), **of_features}
    # A column that the user named must be there; the default name is taken if it is.
    required = list(dict.fromkeys(["user", "item", *chosen_columns(config), *of_features]))
    opened = [(part, Files(path)) for part, path in inputs(config)]
    is_streamed = most_rows is not None and not features
    if most_rows is not None and is_streamed:
        sizes = [_rows_in(files, config) for _, files in opened]
        is_streamed = None not in sizes and sum(filter(None, sizes)) > most_rows
    read = _named_streams if is_streamed else _named_rows
    pieces: list[Piece] = []
    streams: list[Stream] = []
    for part, files in opened:
        for piece_part, chosen, rows in read(files, config, wanted, required):
            if part and piece_part:
                raise ConfigError(
                    f"{files.path} holds parts of a split (train, test), and --test_input names "
                    "another; give one of them"
                )
            if isinstance(rows, FileRows):
                pieces.append(Piece.of(rows, part or piece_part, chosen))
            else:
                count, batches = rows
                streams.append(Stream(count.where, part or piece_part, chosen, count, batches))
    items, users = named_items(config), _named_users(config)
    tables = {"item": items, "user": users}
    return Raw(
        tuple(pieces),
        (
            *(files for _, files in opened),
            *(table.file for table in tables.values() if table is not None),
        ),
        nothing if items is None else items.texts,
        nothing if users is None else users.texts,
        {side: table.features for side, table in tables.items() if table and table.features},
        of_interactions=features,
        streams=tuple(streams),
    )


_Named = tuple[str | None, dict[str, str], FileRows]
_NamedStream = tuple[str | None, dict[str, str], tuple[LineCount, Iterator[FileRows]]]


def _named_rows(
    files: Files, config: PrepareConfig, wanted: Mapping[str, str], required: Collection[str]
) -> Iterator[_Named]:
    """(part, role -> column, rows) of each file of an input; what it holds decides its format."""
    if config.source == "parquet":
        for part, names in _arrow_parts(files).items():
            yield part, *arrow_files.read(files, names, wanted, required=required)
        return
    name = _text_file(files, config)
    if config.source == "jsonl" or json_lines.is_json(files.head(name)):
        _refuse_features(files, name, interaction_features(config))
        yield None, *_json_rows(files, name, config, wanted, required)
        return
    file, chosen = _delimited(files, name, config, wanted, required)
    yield None, chosen, file.read(chosen, drop=drops(config))


def _named_streams(
    files: Files, config: PrepareConfig, wanted: Mapping[str, str], required: Collection[str]
) -> Iterator[_NamedStream]:
    """`_named_rows`, read some rows at a time; what may be (`_rows_in`)."""
    if config.source == "parquet":
        for part, names in _arrow_parts(files).items():
            yield part, *arrow_files.stream(files, names, wanted, required=required)
        return
    file, chosen = _delimited(files, _text_file(files, config), config, wanted, required)
    yield None, chosen, file.stream(chosen, drop=drops(config))


def _rows_in(files: Files, config: PrepareConfig) -> int | None:
    """About how many rows an input has; None of one that is read as a whole."""
    if config.source == "parquet":
        return sum(arrow_files.rows_in(files, names) for names in _arrow_parts(files).values())
    name = _text_file(files, config)
    if config.source == "jsonl" or json_lines.is_json(files.head(name)):
        return None
    return files.inflated_size(name) // _LINE_BYTES


def _arrow_parts(files: Files) -> dict[str | None, list[str]]:
    if files.single is not None and json_lines.is_json(files.head(files.single, 64)):
        raise InputError(f"{files.path} holds JSON: read it with --source=jsonl")
    return arrow_files.parts_of(files)


def _text_file(files: Files, config: PrepareConfig) -> str:
    """The name of the csv or JSON lines file of an input."""
    endings = (".jsonl", ".json", ".ndjson") if config.source == "jsonl" else (".csv", ".tsv")
    endings = (*endings, *(f"{ending}.gz" for ending in endings))
    kinds = " or ".join(ending.lstrip(".") for ending in endings[: len(endings) // 2])
    name = files.choose(lambda n: n.endswith(endings), f"{kinds} file", config.name)
    if arrow_files.is_arrow(files.head(name)):
        raise InputError(f"{files.where(name)} is Parquet or Arrow: add --source=parquet")
    return name


def _delimited(
    files: Files,
    name: str,
    config: PrepareConfig,
    wanted: Mapping[str, str],
    required: Collection[str],
) -> tuple[DelimitedFile, dict[str, str]]:
    """A file of delimited text, and role -> column."""
    file = DelimitedFile(
        files, name, text_lines.dialect_of(config), column_list(config.columns, "columns")
    )
    return file, pick(file.names, wanted, file.where, required=required, first_line=True)


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
