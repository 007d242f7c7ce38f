"""Users' lists out of lists of items beside an item: what an item-to-item recommender hands over.

    s_ui = 1 / |T_u| sum_{j in T_u} w_ji

with T_u the training items of u and w_ji the score of item i in the list of item j, 0 outside it
(item-based top-N recommendation, Deshpande and Karypis 2004, "Item-Based Top-N Recommendation
Algorithms"). Where the file has ranks w_ji = 1 / rank, where it has neither w_ji = 1. The L best
items of a user outside T_u are its list; every other item ranks below it.

Shape letters: U users, I items, L length of a list.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import scipy.sparse

from slgr_jax.config import ImportConfig, NearestConfig, SimilarConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError, listing
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.same_split import more_seen, seen_in

_USERS_AT_ONCE = 4096


def lists(
    seen: Csr, weights: scipy.sparse.csr_matrix, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users, items, scores) [n] of the `length` best items of each user, best first.

    Args:
      seen: [U] rows of training items, which are not listed.
      weights: [I, I]; w_ji in row j.
      length: L; of equal scores the lower item comes first. A user with fewer items lists those.
    """
    histories = seen.matrix(weights.shape[0], np.float32)
    pieces = []
    for begin in range(0, histories.shape[0], _USERS_AT_ONCE):
        own = histories[begin : begin + _USERS_AT_ONCE]
        scores = (own @ weights).tocoo()
        pairs, own_pairs = (
            x.row.astype(np.int64) * weights.shape[1] + x.col for x in (scores, own.tocoo())
        )
        known = np.isin(pairs, own_pairs)
        rows, items, values = (x[~known] for x in (scores.row, scores.col, scores.data))
        order = np.lexsort((items, -values, rows))
        rows, items, values = rows[order], items[order], values[order]
        place = np.arange(rows.size) - np.searchsorted(rows, rows)  # among its user's
        kept = place < length
        values = values / np.asarray(own.sum(axis=1)).reshape(-1)[rows]
        pieces.append((begin + rows[kept], items[kept], values[kept]))
    columns = (np.concatenate(part) for part in zip(*pieces, strict=True))
    kinds = (np.int32, np.int32, np.float32)
    users, items, scores = (x.astype(kind) for x, kind in zip(columns, kinds, strict=True))
    return users, items, scores


def read_weights(
    path: pathlib.Path, dataset: Dataset, *, unknown: str, delimiter: str
) -> tuple[scipy.sparse.csr_matrix, dict[str, int]]:
    """w [I, I] of a file with item, other and perhaps score or rank, and what was left out.

    Raises:
      InputError, ShardError: the file cannot be read; an unknown id, a number that is missing or
        not finite, a rank below 1, an item beside itself, a pair with two numbers.
    """
    table = _read(path, delimiter)
    known = dataset.items.column("item_id").combine_chunks()
    rows, columns = (
        pc.fill_null(pc.index_in(table.column(name), value_set=known), -1)
        for name in ("item", "other")
    )
    rows, columns = rows.to_numpy(), columns.to_numpy()
    foreign = (rows < 0) | (columns < 0)
    if foreign.any() and (unknown == "error" or foreign.all()):
        row = int(np.argmax(foreign))
        name = "item" if rows[row] < 0 else "other"
        fix = "" if foreign.all() else "; add --unknown=drop to leave such rows out"
        raise InputError(
            f"{path}: {int(foreign.sum())} of {foreign.size} rows name no item of {dataset.path}, "
            f"row {row + 1} {table.column(name)[row].as_py()!r}{fix}"
        )
    values = _numbers(table, path)
    kept = ~foreign
    rows, columns, values = rows[kept], columns[kept], values[kept]
    _refuse(path, rows == columns, np.flatnonzero(kept), "names an item beside itself; drop it")
    pairs = rows.astype(np.int64) * dataset.n_items + columns
    order = np.argsort(pairs, kind="stable")
    again = np.zeros(pairs.size, bool)
    again[order[1:]] = np.diff(pairs[order]) == 0
    _refuse(path, again, np.flatnonzero(kept), "repeats a pair of items; give each once")
    shape = (dataset.n_items, dataset.n_items)
    weights = scipy.sparse.csr_matrix((values, (rows, columns)), shape=shape)
    return weights, {"dropped_unknown": int(foreign.sum())}


def _read(path: pathlib.Path, delimiter: str) -> pa.Table:
    """The table of a file, its ids as text."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give Parquet, Arrow or CSV with item and other")
    if path.suffix in (".parquet", ".arrow", ".feather"):
        table = shards.read_table(path)
    else:
        texts = dict.fromkeys(("item", "other"), pa.string())
        try:
            table = pacsv.read_csv(
                path,
                parse_options=pacsv.ParseOptions(delimiter={"\\t": "\t"}.get(delimiter, delimiter)),
                convert_options=pacsv.ConvertOptions(column_types=texts),
            )
        except (pa.ArrowInvalid, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read as CSV: {reason}") from error
    if not {"item", "other"} <= set(table.column_names):
        raise InputError(
            f"{path} has columns {listing(table.column_names)}; expected item, other, and perhaps "
            "score or rank (1 the best)"
        )
    if not table.num_rows:
        raise InputError(f"{path} has no row: lists need at least one pair of items")
    for name in ("item", "other"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, table.column(name).cast(pa.string()))
    return table


def _numbers(table: pa.Table, path: pathlib.Path) -> np.ndarray:
    """w of each row [n] float32."""
    name = next((name for name in ("score", "rank") if name in table.column_names), None)
    if name is None:
        return np.ones(table.num_rows, np.float32)
    try:
        values = table.column(name).cast(pa.float64()).fill_null(np.nan).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: a {name} is no number: {str(error)[:120]}") from error
    everywhere = np.arange(values.size)
    _refuse(path, ~np.isfinite(values), everywhere, f"has no finite {name}; leave the row out")
    if name == "score":
        return values.astype(np.float32)
    _refuse(path, values < 1, everywhere, "has a rank below 1; the best item of a list has 1")
    return (1.0 / values).astype(np.float32)


def _refuse(path: pathlib.Path, bad: np.ndarray, rows: np.ndarray, what: str) -> None:
    if bad.any():
        row = int(rows[int(np.argmax(bad))])
        raise InputError(f"{path}: row {row + 1} of {int(bad.sum())} such rows {what}")


def write(
    dataset: Dataset,
    common: TeachConfig,
    options: SimilarConfig,
    reading: ImportConfig,
    nearest: NearestConfig,
) -> schema.TeacherManifest:
    """Write DATA/teacher/NAME.

    Raises:
      InputError: as of `read_weights`; no user has an item to list.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    path = pathlib.Path(options.similar)
    weights, counts = read_weights(
        path, dataset, unknown=reading.unknown, delimiter=common.delimiter
    )
    columns = lists(dataset.positives(("train",)), weights, nearest.listed)
    if not columns[0].size:
        raise InputError(
            f"{path}: none of its {weights.nnz} pairs begins with a training item of a user and "
            "leads to another item"
        )
    return preferences.write_product(
        dataset,
        common.name,
        pa.table(list(columns), schema=schema.TEACHER_SCORES),
        provenance=preferences.Provenance(
            built_from=more_seen(reading.built_from, seen_in(dataset)),
            model=common.model,
            score_kind=f"beside training items, first {nearest.listed}",
            unlisted="below",
            training_items="none",
        ),
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )
