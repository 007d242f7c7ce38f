"""A file of teacher answers with external ids -> rows of indices, checked.

Parquet, the Arrow file and stream formats, JSON lines and CSV are read; the first bytes decide.
Every refusal names the file, a row (counted from 1, a CSV header not counted) and the fix.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing

PathLike = str | os.PathLike[str]

# Columns of each kind: the user, the items, then the number.
_ITEM_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "scores": ("item",),
    "preferences": ("preferred", "other"),
}
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "scores": ("score", "rank"),
    "preferences": ("margin",),
}
_ITEM_NAMES = frozenset(itertools.chain.from_iterable(_ITEM_COLUMNS.values()))
RANK = "rank"  # the score_kind, and the column, of numbers of which 1 is the best
_BINARY_HEADS = (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")


class AnswerTable(NamedTuple):
    """What a file of answers holds.

    Attributes:
      rows: of `schema.TEACHER_SCHEMAS`, by user, then item(s), without repeats.
      counts: what was left out, for the manifest.
      score_kind: rank where ranks were turned into scores, else as given.
    """

    rows: pa.Table
    counts: dict[str, int]
    score_kind: str


def read(
    path: PathLike,
    dataset: Dataset,
    *,
    score_kind: str = "score",
    unknown: str = "error",
    duplicates: str = "error",
    delimiter: str = ",",
) -> AnswerTable:
    """The answers in `path` as a table of indices, and what was left out.

    Args:
      path: columns user, item, score (an empty score: not answered), or user, item, rank (1 the
        best; the score is then -rank), or user, preferred, other and optionally margin (1 where
        there is no such column).
      dataset: whose ids they are; compared as exact text, integers as decimal digits.
      score_kind: rank: the column score holds ranks, too.
      unknown: rows with an id that `dataset` does not have: error, or drop.
      duplicates: rows that disagree about one pair: error, or mean. For preferences the mean
        is over signed margins, so opposite rows of equal margin cancel and are dropped.
      delimiter: CSV column separator.

    Raises:
      InputError, ShardError: the file cannot be used.
      ConfigError: `unknown` or `duplicates` is none of its choices.
    """
    for name, value, choices in (
        ("unknown", unknown, ("error", "drop")),
        ("duplicates", duplicates, ("error", "mean")),
    ):
        if value not in choices:
            raise ConfigError(f"--{name}={value!r} is not one of: {listing(choices)}")

    path = pathlib.Path(path)
    raw = _read_any(path, delimiter)
    kind = _kind(raw.column_names, path)
    if raw.num_rows == 0:
        raise InputError(f"{path} has no rows: a teacher needs at least one answer")
    column = _number_column(raw.column_names, kind, score_kind)
    numbers = _numbers(raw, kind, column, path)
    ranked = kind == "scores" and RANK in (column, score_kind)
    if ranked:
        numbers = _turned(numbers, column, path)

    texts, indices = _indices(raw, kind, dataset, path)
    counts = {"file_rows": raw.num_rows}
    keep = _known(texts, indices, dataset, path, unknown, counts)
    rows = np.flatnonzero(keep)
    columns = {name: values[rows] for name, values in indices.items()}

    merge = _merge_scores if kind == "scores" else _merge_preferences
    table = merge(columns, numbers[rows], rows + 1, dataset.n_items, duplicates == "mean", path)
    counts["merged_rows"] = int(rows.size - table.num_rows)
    return AnswerTable(table, counts, RANK if ranked else score_kind)


def _indices(
    raw: pa.Table, kind: str, dataset: Dataset, path: pathlib.Path
) -> tuple[dict[str, pa.ChunkedArray], dict[str, np.ndarray]]:
    """By column of ids: their texts, and their indices in `dataset`; -1 where it has none."""
    item_ids = dataset.items.column("item_id").combine_chunks()
    ids = {"user": dataset.user_ids, **dict.fromkeys(_ITEM_COLUMNS[kind], item_ids)}
    texts = {name: _text(raw.column(name), name, path) for name in ids}
    indices = {
        name: pc.fill_null(pc.index_in(text, value_set=ids[name]), -1).to_numpy()
        for name, text in texts.items()
    }

    if kind == "preferences":
        same = pc.equal(texts["preferred"], texts["other"]).to_numpy(zero_copy_only=False)
        if same.any():
            row = _first(same)
            raise InputError(
                f"{path}: row {row} prefers item {texts['other'][row - 1].as_py()!r} over itself"
            )
    return texts, indices


def _number_column(columns: Sequence[str], kind: str, score_kind: str) -> str:
    """The column of numbers: score before rank, unless ranks are meant."""
    choices = [name for name in _NUMBERS[kind] if name in columns]
    if score_kind == RANK and RANK in choices:
        return RANK
    return choices[0] if choices else _NUMBERS[kind][0]


def _turned(ranks: np.ndarray, column: str, path: pathlib.Path) -> np.ndarray:
    """[rows] scores of which more is better: -rank; NaN stays."""
    if (negative := ranks < 0).any():
        row = _first(negative)
        raise InputError(
            f"{path}: row {row} has {column} {ranks[row - 1]:g}; ranks count up from 1, the best. "
            "If more is better, name the column score and leave --score_kind=rank out"
        )
    return -ranks


def _read_any(path: pathlib.Path, delimiter: str) -> pa.Table:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a Parquet, Arrow or CSV file with answers")

    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise InputError(f"{path} is empty: a teacher needs at least one answer")
    if head in _BINARY_HEADS:
        return shards.read_table(path)

    if head.startswith(b"{"):
        return _read_json_lines(path)

    separator = {"\\t": "\t"}.get(delimiter, delimiter)
    numbers = itertools.chain.from_iterable(_NUMBERS.values())
    item_columns = itertools.chain.from_iterable(_ITEM_COLUMNS.values())
    wanted = {"user", *numbers, *item_columns}
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            header = next(csv.reader(text, delimiter=separator), [])
        if len(set(header)) != len(header):
            raise InputError(f"{path} names a column twice: {listing(header)}")
        _kind(header, path)
        return pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter=separator),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()),
                include_columns=[name for name in header if name in wanted] or None,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "; save it as UTF-8" if "utf-8" in reason.lower() else ""
        raise InputError(
            f"{path} cannot be read as CSV, Parquet or Arrow: {reason}{fix}"
        ) from error


def _read_json_lines(path: pathlib.Path) -> pa.Table:
    """A JSON object a line; ids are text or whole numbers, numbers may be null."""
    number_names = {*itertools.chain.from_iterable(_NUMBERS.values())}
    records: list[dict[str, object]] = []
    with open(path, encoding="utf-8") as lines:
        try:
            for line in lines:
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise InputError(f"{path}: row {len(records) + 1} is no JSON object")
                    records.append(record)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: row {len(records) + 1} is not JSON: {error}") from error

    columns = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(records)):
        values = [record.get(name) for record in records]
        is_id = name == "user" or name in _ITEM_NAMES
        texts = [_json_text(value, is_id=is_id) for value in values]
        for row, (value, text) in enumerate(zip(values, texts, strict=True), start=1):
            if text is None and value is not None and (is_id or name in number_names):
                wanted = "text or a whole number" if is_id else "a number"
                raise InputError(
                    f"{path}: row {row} has {name} {json.dumps(value)[:80]}; give {wanted}"
                )
        columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def _json_text(value: object, *, is_id: bool) -> str | None:
    """A JSON text or number as text, exactly; None for what is neither, or no id."""
    if isinstance(value, str):
        return value
    kinds = int if is_id else int | float
    return repr(value) if isinstance(value, kinds) and not isinstance(value, bool) else None


def _kind(columns: Sequence[str], path: pathlib.Path) -> str:
    names = set(columns)
    if {"user", "item"} <= names and names & set(_NUMBERS["scores"]):
        return "scores"
    if {"user", "preferred", "other"} <= names:
        return "preferences"
    raise InputError(
        f"{path} has columns {listing(columns)}; expected user, item, score, or "
        "user, item, rank (1 the best), or user, preferred, other and optionally margin"
        + _other_delimiter(columns)
    )


def _other_delimiter(columns: Sequence[str]) -> str:
    """What to add where one column holds the names of all; empty elsewhere."""
    for mark, flag in ((";", "';'"), ("\t", "'\\t'"), ("|", "'|'"), (",", ",")):
        if len(columns) == 1 and mark in columns[0]:
            return f"; the first line holds {mark!r}: add --delimiter={flag}"
    return ""


def _text(column: pa.ChunkedArray, name: str, path: pathlib.Path) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_integer(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        column = column.cast(pa.string())
    elif not pa.types.is_string(kind):
        raise InputError(f"{path}: column {name} is {kind}; ids must be text or integers")
    missing = pc.fill_null(pc.equal(column, ""), True).to_numpy()
    if missing.any():
        raise InputError(f"{path}: row {_first(missing)} has no {name} id")
    return column


def _numbers(table: pa.Table, kind: str, name: str, path: pathlib.Path) -> np.ndarray:
    """[rows] float32 of the column `name`; NaN where there is no score."""
    if name not in table.column_names:
        return np.ones(table.num_rows, np.float32)
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)

    try:
        doubles = column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise InputError(f"{path}: column {name} is {column.type}, not a number") from error
        row = _first_unparsable(column)
        raise InputError(
            f"{path}: row {row} has {name} {column[row - 1].as_py()!r}, not a number; leave it "
            "empty where the teacher did not answer"
        ) from error

    with np.errstate(over="ignore"):
        values = doubles.to_numpy().astype(np.float32)  # Arrow's null becomes NaN
    answered = doubles.is_valid().to_numpy()
    bad = answered & ~np.isfinite(values)
    if bad.any():
        row = _first(bad)
        raise InputError(
            f"{path}: row {row} has {name} {column[row - 1].as_py()}; it must be a finite float32, "
            "and empty (null) where the teacher did not answer"
        )

    if kind == "scores" and not answered.any():
        raise InputError(f"{path}: all {values.size} {name}s are empty: nothing was answered")
    if kind == "preferences" and not (values > 0).all():  # a missing margin is NaN here
        row = _first(~(values > 0))
        shown = column[row - 1].as_py()
        raise InputError(f"{path}: row {row} has margin {shown}; a margin must be greater than 0")
    return values


def _first(mask: np.ndarray) -> int:
    return int(np.argmax(mask)) + 1


def _first_unparsable(column: pa.ChunkedArray) -> int:
    low, high = 0, len(column)  # the first `low` values parse, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            column.slice(low, middle - low).cast(pa.float64())
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low + 1


def _known(
    texts: Mapping[str, pa.ChunkedArray],
    indices: Mapping[str, np.ndarray],
    dataset: Dataset,
    path: pathlib.Path,
    unknown: str,
    counts: dict[str, int],
) -> np.ndarray:
    """[rows] bool: rows whose ids the dataset has; the others are counted or refused."""
    no_user = indices["user"] < 0
    no_item = np.zeros_like(no_user)
    strangers: dict[str, None] = {}
    for name, known in indices.items():
        if name != "user":
            no_item |= known < 0
            strangers.update(dict.fromkeys(_distinct(texts[name], known < 0)))
    users, items = _distinct(texts["user"], no_user), list(strangers)
    keep = ~(no_user | no_item)

    if unknown == "error" and not keep.all():
        parts = [
            f"{len(ids)} {noun}{'s' if len(ids) > 1 else ''} ({listing(map(repr, ids), 3)})"
            for noun, ids in (("user", users), ("item", items))
            if ids
        ]
        raise InputError(
            f"{path}: {int((~keep).sum())} of {keep.size} rows name ids that {dataset.path} does "
            f"not have: {' and '.join(parts)}; "
            f"{_title_hint(items, dataset) or 'correct the file or add --unknown=drop'}"
        )
    if not keep.any():
        raise InputError(
            f"{path}: none of the {keep.size} rows names a user and an item of {dataset.path}; "
            f"{_title_hint(items, dataset) or 'the ids are external ids, not indices'}"
        )

    counts["dropped_unknown_user_rows"] = int(no_user.sum())
    counts["dropped_unknown_item_rows"] = int((no_item & ~no_user).sum())
    counts["unknown_users"], counts["unknown_items"] = len(users), len(items)
    return keep


def _title_hint(strangers: Sequence[str], dataset: Dataset) -> str:
    """What to do where texts that are no ids are titles; empty where none of them is."""
    ids = dataset.items.column("item_id").to_pylist()
    titles = dataset.items.column("title").to_pylist()
    item_of = {
        " ".join(title.split()).casefold(): item
        for item, title in zip(ids, titles, strict=True)
        if title
    }
    meant = {text: item_of.get(" ".join(text.split()).casefold()) for text in strangers}
    matches = [text for text, item in meant.items() if item is not None]
    if not matches:
        return ""
    return (
        f"{len(matches)} of these are titles ({matches[0]!r} is item {meant[matches[0]]!r}): give "
        "the ids of the raw data in their place, or prepare the data with titles as ids"
    )


def _distinct(texts: pa.ChunkedArray, mask: np.ndarray) -> list[str]:
    return pc.unique(texts.filter(pa.array(mask))).to_pylist()


def _merge_scores(
    columns: Mapping[str, np.ndarray],
    scores: np.ndarray,
    rows: np.ndarray,
    n_items: int,
    mean: bool,
    path: pathlib.Path,
) -> pa.Table:
    keys = columns["user"].astype(np.int64) * n_items + columns["item"]
    keys, scores = _merge(keys, scores, rows, mean, path, "two different scores")
    if np.isnan(scores).all():
        raise InputError(f"{path}: every score on a known user and item is empty")
    arrays = [
        pa.array((keys // n_items).astype(np.int32)),
        pa.array((keys % n_items).astype(np.int32)),
        pa.array(scores, mask=np.isnan(scores)),
    ]
    return pa.table(arrays, schema=schema.TEACHER_SCORES)


def _merge_preferences(
    columns: Mapping[str, np.ndarray],
    margins: np.ndarray,
    rows: np.ndarray,
    n_items: int,
    mean: bool,
    path: pathlib.Path,
) -> pa.Table:
    # One row per unordered pair: the margin is negative where the higher index is preferred.
    low = np.minimum(columns["preferred"], columns["other"]).astype(np.int64)
    high = np.maximum(columns["preferred"], columns["other"]).astype(np.int64)
    signed = np.where(columns["preferred"] == low, margins, -margins)
    pairs, pair_of_row = np.unique(low * n_items + high, return_inverse=True)
    keys = columns["user"].astype(np.int64) * pairs.size + pair_of_row
    keys, signed = _merge(keys, signed, rows, mean, path, "contradicting preferences")

    stated = signed != 0
    keys, signed = keys[stated], signed[stated]
    if not keys.size:
        raise InputError(f"{path}: every preference is contradicted by an equal opposite one")

    users, pair = keys // pairs.size, pairs[keys % pairs.size]
    preferred = np.where(signed > 0, pair // n_items, pair % n_items)
    other = np.where(signed > 0, pair % n_items, pair // n_items)
    order = np.lexsort((other, preferred, users))
    arrays = [pa.array(ids[order].astype(np.int32)) for ids in (users, preferred, other)]
    arrays.append(pa.array(np.abs(signed[order])))
    return pa.table(arrays, schema=schema.TEACHER_PREFERENCES)


def _merge(
    keys: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    mean: bool,
    path: pathlib.Path,
    conflict: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct `keys` and their one value; NaN is no value and conflicts with one."""
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if starts.size == keys.size:
        return keys, values

    absent = np.isnan(values)
    differs = np.zeros(keys.size, bool)
    differs[1:] = (values[1:] != values[:-1]) & ~(absent[1:] & absent[:-1])
    differs[starts] = False
    if not mean and differs.any():
        second = int(np.argmax(differs))
        raise InputError(
            f"{path}: rows {rows[order[second - 1]]} and {rows[order[second]]} are {conflict} of "
            "one user on the same items; correct the file or add --duplicates=mean"
        )

    sums = np.add.reduceat(np.where(absent, 0, values).astype(np.float64), starts)
    answers = np.add.reduceat((~absent).astype(np.int64), starts)
    with np.errstate(invalid="ignore"):
        merged = (sums / answers).astype(np.float32)  # 0 / 0 is NaN: no answer
    # A mean of equal float32 values may round; where nothing differs, keep the value itself.
    return keys[starts], np.where(np.add.reduceat(differs, starts) > 0, merged, values[starts])
