"""Rows of a teacher product -> arrays grouped by user; every bad row is refused on the way.

Rows are looked at in pieces that fit a core's cache, on all cores: at 10^8 rows it is passes over
memory that take time, not comparisons.

Shape letters: U users, I items, n answered scores, P stated preferences.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import beaten
from slgr_jax.errors import InputError, ShardError

PIECE = 65_536  # rows looked at together: a quarter of a megabyte per column
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A product in memory; the arrays of the other kind are empty.

    Attributes:
      manifest: what the product is.
      offsets: [U + 1] int64; rows of user u are `offsets[u]:offsets[u + 1]`, for either kind.
      items, scores: kind scores, [n] int32 and float32: answered entries, within a user by
        score ascending, then item: equal scores are one run, and the entries that entry k is
        preferred over are the first `beaten(...)[k]` of its user's slice.
      users, preferred, other, margin: kind preferences, [P] int32 (margin float32), by user.
    """

    manifest: schema.TeacherManifest
    offsets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    preferred: np.ndarray
    other: np.ndarray
    margin: np.ndarray


def usable_pairs(teacher: Teacher, *, min_gap: float = 0.0) -> np.ndarray:
    """[U] int64: ordered pairs that the teacher states for each user among listed items.

    Scores: pairs of answered items whose scores differ by at least `min_gap`; a tie is no pair.
    Preferences: rows with at least that margin. Pairs of a listed with an unlisted item
    (`manifest.unlisted == "below"`) are not counted.
    """
    offsets = teacher.offsets
    if teacher.manifest.kind != "scores" and min_gap <= 0:
        return np.diff(offsets)
    pairs = np.zeros(offsets.size - 1, np.int64)

    def count(first: int, last: int) -> None:
        low, high = offsets[first], offsets[last]
        if teacher.manifest.kind == "scores":
            local = offsets[first : last + 1] - low
            per_row = beaten(local, teacher.scores[low:high], min_gap)
        else:
            per_row = (teacher.margin[low:high] >= min_gap).astype(np.int64)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_row)])
        pairs[first:last] = np.diff(sums[offsets[first : last + 1] - low])

    over_users(offsets, count)
    return pairs


def ranks(users: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[n] float64: rank of each score among those of its user, the highest 1; ties share their
    mean rank. `users` ascend, and the scores of a user."""
    last, new = np.ones((2, users.size), bool)  # the last row of its user; the first of its ties
    last[:-1] = users[1:] != users[:-1]
    new[1:] = last[:-1] | (scores[1:] != scores[:-1])
    ends, ties = np.flatnonzero(last), np.flatnonzero(new)
    after = np.repeat(ends + 1, np.diff(ends, prepend=-1))
    widths = np.diff(ties, append=users.size)
    return after - np.repeat(ties + (widths - 1) / 2, widths)


def over_users(offsets: np.ndarray, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` for ranges of users that cover all rows, on all cores.

    A range has about PIECE rows, more where one user has more; users without rows at the end
    are in none.
    """
    starts = np.searchsorted(offsets, np.arange(0, offsets[-1], PIECE), side="right") - 1
    bounds = np.append(np.unique(starts), offsets.size - 1)
    shards.on_all_cores(lambda pair: work(pair[0], pair[1]), itertools.pairwise(bounds.tolist()))


# --- reading ------------------------------------------------------------------------------------


def gather(
    kind: str, tables: Sequence[pa.Table], n_users: int, n_items: int, where: str
) -> tuple[Arrays, np.ndarray]:
    """The rows of `tables` in one place, by user, checked.

    Args:
      kind: of `schema.TEACHER_SCHEMAS`, whose columns the tables have.
      tables: in any order; what this project wrote needs no sort.
      where: names them in errors.

    Returns:
      Columns, and offsets [U + 1] int64. Scores: within a user by score, then item; NaN, after
      all scores, is an item without an answer. Preferences of a user keep the order of the tables.

    Raises:
      ShardError: an index outside the id maps, a number that is not finite, a margin that is not
        above 0, an item preferred over itself, or the same pair twice.
    """
    names = schema.TEACHER_SCHEMAS[kind].names
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    arrays: Arrays = {
        name: np.empty(starts[-1], np.float32 if name in ("score", "margin") else np.int32)
        for name in names
    }
    check = _checker(kind, n_users, n_items, where)

    def fill(job: tuple[pa.Table, int]) -> None:
        table, row = job
        for batch in table.to_batches(max_chunksize=PIECE):
            piece = {name: arrays[name][row : row + batch.num_rows] for name in names}
            for name in names:
                _copy(batch.column(name), piece[name], name, where)
            check(piece)
            row += batch.num_rows

    shards.on_all_cores(fill, zip(tables, starts[:-1].tolist(), strict=True))
    users = arrays["user"]
    if not _ascends(users):
        order = np.argsort(users, kind="stable")  # a merge where the tables are sorted themselves
        arrays = {name: _taken(column, order) for name, column in arrays.items()}
        users = arrays["user"]
    # int32 like `users`: searchsorted would copy them to the wider type.
    offsets = np.searchsorted(users, np.arange(n_users + 1, dtype=np.int32)).astype(np.int64)
    settle = _settle_scores if kind == "scores" else _settle_preferences

    def settle_users(first: int, last: int) -> None:
        piece = {name: column[offsets[first] : offsets[last]] for name, column in arrays.items()}
        settle(piece, n_items, where)

    over_users(offsets, settle_users)
    return arrays, offsets


def make(
    manifest: schema.TeacherManifest, arrays: Mapping[str, np.ndarray], offsets: np.ndarray
) -> Teacher:
    """A `Teacher` of what `gather` returned; rows without an answer are left out."""
    none, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    if manifest.kind == "preferences":
        return Teacher(
            manifest,
            offsets,
            none,
            floats,
            users=arrays["user"],
            preferred=arrays["preferred"],
            other=arrays["other"],
            margin=arrays["margin"],
        )

    items, scores = arrays["item"], arrays["score"]
    answered = ~np.isnan(scores)
    if not answered.all():
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(answered)])
        offsets, items, scores = before[offsets], items[answered], scores[answered]
    return Teacher(manifest, offsets, items, scores, none, none, none, floats)


def table_of(kind: str, arrays: Mapping[str, np.ndarray]) -> pa.Table:
    """What `gather` returned as a table of `schema.TEACHER_SCHEMAS[kind]`; NaN becomes null."""
    columns = []
    for name in schema.TEACHER_SCHEMAS[kind].names:
        missing = np.isnan(arrays[name]) if name == "score" else np.zeros(0, bool)
        columns.append(pa.array(arrays[name], mask=missing if missing.any() else None))
    return pa.table(columns, schema=schema.TEACHER_SCHEMAS[kind])


def slice_users(table: pa.Table, first: int, last: int) -> pa.Table:
    """The rows of users from `first` to before `last`, not copied; `table` ascends by user."""
    kept = []
    for batch in table.to_batches():
        low, high = np.searchsorted(
            batch.column("user").to_numpy(), np.array([first, last], np.int32)
        )
        if low < high:
            kept.append(batch.slice(low, high - low))
    return pa.Table.from_batches(kept, schema=table.schema)


def only_users(table: pa.Table, first: int, last: int) -> pa.Table:
    """The rows of users from `first` to before `last` of a table in any order."""
    users = table.column("user").to_numpy()
    return table.filter(pa.array((users >= first) & (users < last)))


def refuse_known(
    tables: Sequence[pa.Table], added: Mapping[str, np.ndarray], n_items: int, where: str
) -> None:
    """Refuse (`InputError`) a pair in `added` (as `gather` returns it) that `tables` have already.

    A pair is a user and an item, or a user and two items in either order.
    """

    def look(batch: pa.RecordBatch) -> None:
        users = batch.column("user").to_numpy()
        ends = np.array([users.min(), users.max() + 1])
        first, last = np.searchsorted(added["user"], ends)
        between = slice(first, last)
        added_users = added["user"][between]
        if not added_users.size:
            return

        pairs = _pairs({name: column[between] for name, column in added.items()}, n_items)
        # A short number for each pair that is asked about, then for each with its user.
        known, number = np.unique(pairs, return_inverse=True)
        wanted = np.sort((added_users - users.min()).astype(np.int64) * known.size + number)

        columns = {name: batch.column(name).to_numpy() for name in batch.schema.names[:-1]}
        pairs_of_rows = _pairs(columns, n_items)
        place = np.minimum(np.searchsorted(known, pairs_of_rows), known.size - 1)
        keys = (users - users.min()).astype(np.int64) * known.size + place
        again = wanted[np.minimum(np.searchsorted(wanted, keys), wanted.size - 1)] == keys
        if (again := again & (known[place] == pairs_of_rows)).any():
            low, high = divmod(int(pairs_of_rows[again][0]), n_items)
            items_text = f"item {low}" if low == high else f"items {low} and {high}"
            raise InputError(
                f"{where} has user {users[again][0]}, {items_text} already, answered or not; leave "
                "it out of what is added, or write the product anew with --overwrite"
            )

    batches = [b for t in tables for b in t.to_batches(max_chunksize=PIECE) if b.num_rows]
    shards.on_all_cores(look, batches)


def _pairs(columns: Mapping[str, np.ndarray], n_items: int) -> np.ndarray:
    """[rows] int64: the item (twice), or the two items, the lower one first, as one number."""
    if "other" in columns:
        first, second = columns["preferred"], columns["other"]
    else:
        first = second = columns["item"]
    return np.minimum(first, second).astype(np.int64) * n_items + np.maximum(first, second)


def _taken(column: np.ndarray, order: np.ndarray) -> np.ndarray:
    out = np.empty_like(column)

    def take(low: int) -> None:
        np.take(column, order[low : low + PIECE], out=out[low : low + PIECE], mode="clip")

    shards.on_all_cores(take, range(0, order.size, PIECE))
    return out


def _packed(columns: Sequence[tuple[np.ndarray, int]]) -> np.ndarray | None:
    """[rows] int64 in the order of (values, bound) columns, first ones first; None: too large."""
    if math.prod(bound for _, bound in columns) >= 2**63:
        return None
    keys = columns[0][0].astype(np.int64)
    for values, bound in columns[1:]:
        keys = keys * bound + values
    return keys


def _order_of(columns: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """[rows]: what sorts the rows by `columns` (see `_packed`)."""
    keys = _packed(columns)
    if keys is None:
        return np.lexsort([values for values, _ in reversed(columns)])
    return np.argsort(keys)


def _ascends(values: np.ndarray) -> bool:
    pieces = (values[low : low + PIECE + 1] for low in range(0, values.size, PIECE))
    return all((piece[1:] >= piece[:-1]).all() for piece in pieces)


def _copy(column: pa.Array, out: np.ndarray, name: str, where: str) -> None:
    values = (column.drop_null() if column.null_count else column).to_numpy()
    if values.dtype == np.float32 and not (finite := np.isfinite(values)).all():
        bad = values[~finite][0]
        raise ShardError(f"{where}: a {name} is {bad}; an item without an answer must be null")
    if values.size == out.size:
        out[:] = values
    else:
        out[:] = np.nan
        out[column.is_valid().to_numpy(zero_copy_only=False)] = values


def _checker(kind: str, n_users: int, n_items: int, where: str) -> Callable[[Arrays], None]:
    bounds = {
        name: n_users if name == "user" else n_items
        for name in schema.TEACHER_SCHEMAS[kind].names
        if name not in ("score", "margin")
    }

    def check(piece: Arrays) -> None:
        for name, bound in bounds.items():
            low, high = piece[name].min(initial=0), piece[name].max(initial=0)
            if low < 0 or high >= max(bound, 1):
                bad = low if low < 0 else high
                raise ShardError(f"{where}: {name} index {bad} is outside the id map of {bound}")

        if kind == "scores":
            return
        if (lowest := piece["margin"].min(initial=np.inf)) <= 0:
            raise ShardError(f"{where}: margin {lowest} is not greater than 0")
        if (same := piece["preferred"] == piece["other"]).any():
            item = piece["preferred"][same][0]
            raise ShardError(f"{where}: item {item} is preferred over itself")

    return check


def _settle_scores(piece: Arrays, n_items: int, where: str) -> None:
    """Refuse an item with two scores; then put each user's rows in order of score, then item."""
    users, items, scores = piece["user"], piece["item"], piece["score"]
    keys = (users - users[0]).astype(np.int64) * n_items + items
    if not (keys[1:] > keys[:-1]).all():
        if keys.max() < 2**32:  # a third of the time
            keys = keys.astype(np.uint32)
        keys.sort()
        if (repeated := keys[1:] == keys[:-1]).any():
            user, item = divmod(int(keys[1:][repeated][0]), n_items)
            raise ShardError(f"{where}: user {user + users[0]}, item {item} has two scores")
    ranks = np.where(np.isnan(scores), np.float32(np.inf), scores + np.float32(0))  # -0.0 is 0.0
    after = (ranks[1:] > ranks[:-1]) | ((ranks[1:] == ranks[:-1]) & (items[1:] > items[:-1]))
    if not (after | (users[1:] > users[:-1])).all():
        bits = ranks.view(np.int32).astype(np.int64)
        places = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) + 2**31  # in the order of floats
        local = (users - users[0], int(users[-1] - users[0]) + 1)
        order = _order_of((local, (places, 2**32), (items, n_items)))
        items[:], scores[:] = items[order], scores[order]


def _settle_preferences(piece: Arrays, n_items: int, where: str) -> None:
    """Refuse a preference that is stated twice."""
    users, preferred, other = piece["user"], piece["preferred"], piece["other"]
    pairs = preferred.astype(np.int64) * n_items + other
    if ((pairs[1:] > pairs[:-1]) | (users[1:] > users[:-1])).all():
        return

    columns = ((users - users[0], int(users[-1] - users[0]) + 1), (pairs, n_items**2))
    keys = _packed(columns)
    if keys is None:
        order = _order_of(columns)
        same = (np.diff(users[order]) == 0) & (np.diff(pairs[order]) == 0)
        twice = order[1:][same]
    else:
        ordered = np.sort(keys)  # a third of the time of argsort
        same = ordered[1:] == ordered[:-1]
        twice = np.flatnonzero(keys == ordered[1:][same][0]) if same.any() else np.zeros(0, int)

    if twice.size:
        k = twice[0]
        raise ShardError(
            f"{where}: user {users[k]} prefers item {preferred[k]} over {other[k]} twice"
        )
