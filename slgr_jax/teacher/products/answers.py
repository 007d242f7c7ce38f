"""A file of teacher answers with external ids -> rows of indices, checked.

Parquet, the Arrow file and stream formats, JSON lines and CSV are read; the first bytes decide.
Every refusal names the file, a row (counted from 1, a CSV header not counted) and the fix.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.products import answer_files, titled_answers, titles
from slgr_jax.teacher.products.answer_files import ITEM_COLUMNS, NUMBERS
from slgr_jax.teacher.products.titles import TitleIndex

PathLike = str | os.PathLike[str]

RANK = "rank"  # the score_kind, and the column, of numbers of which 1 is the best


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
    items_as: str = "ids",
    subtitles: bool = False,
    raw: pa.Table | None = None,
    names: Mapping[str, str] | None = None,
) -> AnswerTable:
    """The answers in `path` as a table of indices, and what was left out.

    Args:
      path: columns user, item, score (an empty score: not answered), or user, item, rank (1 the
        best; the score is then -rank), or user, preferred, other and optionally margin (1 where
        there is no such column). Titles may be in a column title in place of item.
      dataset: whose ids they are; compared as exact text, integers as decimal digits.
      score_kind: rank: the column score holds ranks, too.
      unknown: rows with an id that `dataset` does not have: error, or drop.
      duplicates: rows that disagree about one pair: error, or mean. For preferences the mean
        is over signed margins, so opposite rows of equal margin cancel and are dropped.
      delimiter: CSV column separator.
      items_as: what names the items: ids, or titles. Rows whose title means no item or two are
        dropped and counted; of a user's titles of one item the best score counts.
      subtitles: see `TitleIndex.match`.
      raw: what `path` holds, as text, where it is no such file and was read already.
      names: what its columns are called -> user, item or score, where that is something else.

    Raises:
      InputError, ShardError: the file cannot be used.
      ConfigError: `unknown`, `duplicates` or `items_as` is none of its choices.
    """
    for name, value, choices in (
        ("unknown", unknown, ("error", "drop")),
        ("duplicates", duplicates, ("error", "mean")),
        ("items_as", items_as, ("ids", "titles")),
    ):
        if value not in choices:
            raise ConfigError(f"--{name}={value!r} is not one of: {listing(choices)}")

    path = pathlib.Path(path)
    titled = items_as == "titles"
    if raw is None:
        raw = answer_files.read(path, delimiter, titled=titled, names=names)
    kind = answer_files.kind_of(raw.column_names, path, titled=titled)
    if raw.num_rows == 0:
        raise InputError(f"{path} has no rows: a teacher needs at least one answer")
    column = _number_column(raw.column_names, kind, score_kind)
    numbers = numbers_of(raw, kind, column, path)
    ranked = kind == "scores" and RANK in (column, score_kind)
    if ranked:
        numbers = _turned(numbers, column, path)

    counts = {"file_rows": raw.num_rows}
    texts = {name: id_texts(raw.column(name), name, path) for name in ("user", *ITEM_COLUMNS[kind])}
    indices = indices_of(texts, dataset, only="user" if titled else "")
    rows = np.arange(raw.num_rows)
    if titled:
        users, names = texts["user"], {name: texts[name] for name in ITEM_COLUMNS[kind]}
        scores = numbers if kind == "scores" else None
        named, of_titles = titled_answers.items_of(
            users, names, scores, dataset, subtitles=subtitles
        )
        indices |= named
        counts |= of_titles
        rows = _rows_with_items(named, path, counts)
        texts = {name: column.take(pa.array(rows)) for name, column in texts.items()}
        indices = {name: values[rows] for name, values in indices.items()}
    _refuse_itself(indices, texts, rows, path)

    keep = known_rows(texts, indices, dataset, path, unknown, counts)
    columns = {name: values[keep] for name, values in indices.items()}
    rows = rows[keep]

    merge = _merge_scores if kind == "scores" else _merge_preferences
    table = merge(columns, numbers[rows], rows + 1, dataset.n_items, duplicates == "mean", path)
    counts["merged_rows"] = int(rows.size - table.num_rows)
    return AnswerTable(table, counts, RANK if ranked else score_kind)


def indices_of(
    texts: Mapping[str, pa.ChunkedArray], dataset: Dataset, *, only: str = ""
) -> dict[str, np.ndarray]:
    """By column of ids (one of them, or all): their indices in `dataset`; -1 where it has none."""
    item_ids = dataset.items.column("item_id").combine_chunks()
    return {
        name: pc.fill_null(
            pc.index_in(text, value_set=dataset.user_ids if name == "user" else item_ids), -1
        ).to_numpy()
        for name, text in texts.items()
        if only in ("", name)
    }


def _rows_with_items(
    items: Mapping[str, np.ndarray], path: pathlib.Path, counts: Mapping[str, int]
) -> np.ndarray:
    """Rows whose titles all mean an item, ascending."""
    named = np.all([column >= 0 for column in items.values()], axis=0)
    if not named.any():
        raise InputError(
            f"{path}: no row names an item of the catalogue by its title; {titles.report(counts)}. "
            "If the column holds ids, leave --items_as=titles out"
        )
    return np.flatnonzero(named)


def _refuse_itself(
    indices: Mapping[str, np.ndarray],
    texts: Mapping[str, pa.ChunkedArray],
    rows: np.ndarray,
    path: pathlib.Path,
) -> None:
    if "other" not in texts:
        return
    same = pc.equal(texts["preferred"], texts["other"]).to_numpy(zero_copy_only=False)
    same = same | ((indices["preferred"] == indices["other"]) & (indices["other"] >= 0))
    if same.any():
        place = int(np.argmax(same))
        raise InputError(
            f"{path}: row {rows[place] + 1} prefers item {texts['other'][place].as_py()!r} over "
            "itself"
        )


def _number_column(columns: Sequence[str], kind: str, score_kind: str) -> str:
    """The column of numbers: score before rank, unless ranks are meant."""
    choices = [name for name in NUMBERS[kind] if name in columns]
    if score_kind == RANK and RANK in choices:
        return RANK
    return choices[0] if choices else NUMBERS[kind][0]


def _turned(ranks: np.ndarray, column: str, path: pathlib.Path) -> np.ndarray:
    """[rows] scores of which more is better: -rank; NaN stays."""
    if (negative := ranks < 0).any():
        row = _first(negative)
        raise InputError(
            f"{path}: row {row} has {column} {ranks[row - 1]:g}; ranks count up from 1, the best. "
            "If more is better, name the column score and leave --score_kind=rank out"
        )
    return -ranks


def id_texts(column: pa.ChunkedArray, name: str, path: pathlib.Path) -> pa.ChunkedArray:
    """Ids as text, integers as decimal digits; `InputError` where one is missing."""
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


def numbers_of(table: pa.Table, kind: str, name: str, path: pathlib.Path) -> np.ndarray:
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


def known_rows(
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
    ids = dataset.items.column("item_id")
    matches = TitleIndex.of(dataset).match(strangers)
    meant = [(text, match.item) for text, match in zip(strangers, matches, strict=True)]
    meant = [(text, item) for text, item in meant if item >= 0]
    if not meant:
        return ""
    text, item = meant[0]
    return (
        f"{len(meant)} of these are titles ({text!r} is item {ids[item].as_py()!r}): add "
        "--items_as=titles, or give the ids of the raw data in their place"
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
