"""Columns of user and item tables, and of interactions, as features: which, of which kind, exact.

--user_features, --item_features and --interaction_features name columns, each with a kind where it
is not plain:

    age:numeric,gender,genres:multi,tags:multi(;)

A column without a kind is categorical where some value is no number, multi where it holds lists
and numeric where it holds fractions. Whole numbers may be either, an age or a code: these need a
kind. A RecBole header has it already: token, float, token_seq.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import features as features_lib
from slgr_jax.data.features import TYPES, Feature
from slgr_jax.data.ingest import columns
from slgr_jax.errors import ConfigError, InputError, listing, printable

_ENTRY = re.compile(r"\s*([^,:()]+?)\s*(?::\s*(\w+)\s*(?:\((.+?)\))?)?\s*(?:,|$)")
SEPARATOR = "|"  # between the values of multi, unless the flag or the layout says another


@dataclasses.dataclass(frozen=True)
class Declared:
    """A feature as a flag or a header names it.

    Attributes:
      kind: one of `features.TYPES`; empty: by the column.
      separator: between values that are one text; empty: the layout's.
    """

    name: str
    kind: str = ""
    separator: str = ""


@dataclasses.dataclass(frozen=True)
class FeatureColumns:
    """Columns of one table of users or items, as they were found.

    Attributes:
      where: the file, for messages.
      ids: [n] external ids; of several rows with the same id the first counts.
      columns: what each is, and its [n] values.
    """

    where: str
    ids: pa.ChunkedArray
    columns: tuple[tuple[Declared, pa.ChunkedArray], ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Whom the values of columns belong to.

    Attributes:
      where: the file or files, for messages.
      name_of: row -> what to call it in messages.
      trained: [R] who has training interactions, or which are.
      known: features of a parent dataset, by name, with whose codes these are to agree.
    """

    side: str
    where: str
    name_of: Callable[[int], str]
    trained: np.ndarray
    decimal: str = "."
    known: Mapping[str, Feature] = dataclasses.field(default_factory=dict)


def role(entry: Declared) -> str:
    """What a feature's column is called among the columns of a file."""
    return f"feature {entry.name}"


def declared(text: str, knob: str) -> tuple[Declared, ...] | None:
    """The features that a flag names, () for `none`; None where it is empty.

    Raises:
      ConfigError: it is no list of NAME or NAME:KIND, or names one twice.
    """
    if not text.strip():
        return None
    if text.strip() == "none":
        return ()
    entries: list[Declared] = []
    place = 0
    while place < len(text):
        match = _ENTRY.match(text, place)
        name, kind, separator = match.groups(default="") if match else ("", "", "")
        if not match or (kind and kind not in TYPES) or (separator and kind != "multi"):
            raise ConfigError(
                f"--{knob}={text!r}: {text[place:]!r} is not NAME, NAME:KIND or "
                f"NAME:multi(SEPARATOR); kinds are {listing(TYPES)}"
            )
        entries.append(Declared(name, kind, separator))
        place = match.end()
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--{knob} names {listing(twice)} more than once")
    return tuple(entries)


def pick(
    wanted: Sequence[Declared] | None, known: Iterable[Declared], present: Iterable[str], where: str
) -> tuple[Declared, ...]:
    """The features to read of a table: those `wanted`, with what is known of their columns.

    Args:
      wanted: of the command line; None: all `known`.
      known: features that the layout states.
      present: the table's columns.

    Raises:
      InputError: the table has no such column.
    """
    by_name = {entry.name: entry for entry in known}
    if wanted is None:
        return tuple(by_name.values())
    names = list(present)
    if missing := [entry.name for entry in wanted if entry.name not in names]:
        raise InputError(
            f"{where} has no column {listing(map(printable, missing))}; columns found: "
            f"{listing(map(printable, names))}"
        )

    def merged(entry: Declared) -> Declared:
        of_layout = by_name.get(entry.name, Declared(entry.name))
        separator = entry.separator or of_layout.separator
        return Declared(entry.name, entry.kind or of_layout.kind, separator)

    return tuple(map(merged, wanted))


def encode(
    table: FeatureColumns | None,
    side: str,
    ids: pa.Array,
    trained: np.ndarray,
    *,
    decimal: str = ".",
    known: Mapping[str, Feature] | None = None,
) -> tuple[Feature, ...]:
    """The features of users or items in index order.

    Args:
      ids: [R] external ids of the data set.
      trained: [R] who has training interactions.
      decimal: the character before the fraction of numbers that are text.
      known: as of `Rows`.

    Raises:
      InputError: no id is in the table, a value is none of its kind, or a kind is not plain.
    """
    if table is None or not table.columns:
        return ()
    present = np.asarray(table.ids.is_valid().to_numpy())
    places = np.flatnonzero(present)
    if not places.size:  # a table of nobody says nothing
        return ()
    label = f"{table.where}: ids"
    (codes,), table_ids = columns.encode_ids([table.ids.filter(pa.array(present))], [label])
    _, first = np.unique(codes, return_index=True)
    rows = pc.index_in(ids, value_set=table_ids)
    if rows.null_count == len(ids):
        raise InputError(
            f"no {side} of the interactions is in {table.where}: their ids are as "
            f"{ids[0].as_py()!r}, those of the table as {table_ids[0].as_py()!r}"
        )
    row_of_id = pa.array(places[first]).take(rows)
    owners = Rows(
        side, table.where, lambda row: f"id {ids[row].as_py()!r}", trained, decimal, known or {}
    )
    return tuple(
        encode_column(entry, column.take(row_of_id), owners) for entry, column in table.columns
    )


def encode_column(entry: Declared, column: pa.ChunkedArray, rows: Rows) -> Feature:
    """A column, [R] as it was found, as a feature.

    Raises:
      InputError: a value is none of its kind, or the kind is not plain.
      ConfigError: the parent's feature of that name is of another kind.
    """
    values, name = columns.decoded(column), entry.name
    where = f"{rows.where}: column {printable(name)}"
    known = rows.known.get(name)
    if known is not None and entry.kind not in ("", known.kind):
        raise ConfigError(
            f"{where} is {entry.kind}, and the feature {name} of the dataset that this is appended "
            f"to is {known.kind}: say {name}:{known.kind}, or prepare all rows anew"
        )
    kind = known.kind if known is not None else entry.kind
    kind = kind or _kind_of(values, where, name, rows.decimal)
    if kind == "numeric":
        numbers = _numbers(values, rows, where)
        return features_lib.numeric(name, rows.side, numbers, rows.trained, known=known)
    multi = kind == "multi"
    lists = _lists(values, where, entry.separator or SEPARATOR, multi=multi)
    counts, texts = features_lib.flat(lists)
    return features_lib.of_texts(
        name, rows.side, counts, texts, rows.trained, multi=multi, known=known
    )


def _kind_of(column: pa.ChunkedArray, where: str, name: str, decimal: str) -> str:
    """The kind of a column for which none was given, where it is plain."""
    kind = column.type
    if columns.is_list(kind):
        return "multi"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numeric"
    if pa.types.is_boolean(kind):
        return "categorical"
    if columns.is_text(kind):
        texts = _stripped(column, decimal)
        if texts.null_count < len(texts) and columns.fails(texts, pa.float64()):
            return "categorical"
    raise InputError(
        f"{where} holds numbers alone, which may be amounts or codes: say {name}:numeric or "
        f"{name}:categorical"
    )


def _stripped(column: pa.ChunkedArray, decimal: str) -> pa.ChunkedArray:
    """Texts as `float` reads them; empty ones are null."""
    texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    if decimal != ".":
        texts = pc.replace_substring(texts, pattern=decimal, replacement=".")
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)


def _numbers(column: pa.ChunkedArray, rows: Rows, where: str) -> np.ndarray:
    """[R] float64, NaN where there is none."""
    kind = column.type
    if columns.is_text(kind):
        column = _stripped(column, rows.decimal)
        bad = columns.failures(column, pa.float64())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        bad = np.zeros(len(column), bool)
    elif pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    else:
        raise InputError(f"{where} has type {kind}; numeric features must be numbers")
    numbers = np.full(len(column), np.nan)
    if not bad.any():
        numbers = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy()
        bad = np.abs(np.nan_to_num(numbers, nan=0.0, posinf=np.inf)) > np.finfo(np.float32).max
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{where}: {columns.quoted(column[row])} of {rows.name_of(row)} is no finite "
            f"number ({int(bad.sum())} such); leave it empty where there is none, or say "
            "NAME:categorical"
        )
    return numbers


def _lists(column: pa.ChunkedArray, where: str, separator: str, *, multi: bool) -> pa.ChunkedArray:
    """[R] lists of text: of one value each where not multi."""
    kind = column.type
    if columns.is_list(kind):
        if not multi:
            raise InputError(f"{where} holds lists: say NAME:multi")
        return column.cast(pa.list_(pa.string()))
    if pa.types.is_floating(kind):
        raise InputError(
            f"{where} has type {kind}, whose values have no exact text: say NAME:numeric, or cast "
            "it to integers or text"
        )
    if not (columns.is_text(kind) or pa.types.is_primitive(kind) or pa.types.is_null(kind)):
        raise InputError(f"{where} has type {kind}; features must be text, numbers or lists")
    texts = column.cast(pa.string())
    if multi:
        return pc.split_pattern(texts, separator)
    offsets = np.arange(len(texts) + 1)
    whole = texts.combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), whole)])


def summary(described: Mapping[str, Sequence[Mapping[str, object]]]) -> list[str]:
    """Lines for the terminal, of what a manifest says of features."""

    def shown(entry: Mapping[str, object]) -> str:
        if entry["kind"] == "numeric":
            text = f"numeric, {entry['mean']:.4g} +- {entry['deviation']:.3g}"
        else:
            text = f"{entry['kind']}, {entry['values']:,} values"
        return f"{entry['name']} ({text}, {entry['missing']:,} missing)"

    return [f"{side} features: {', '.join(map(shown, rows))}" for side, rows in described.items()]
