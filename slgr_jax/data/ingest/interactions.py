"""Pieces of raw files as one log of aligned arrays, and the filters on it.

Order: bad rows, unused rows, `min_rating`, repeated pairs, k-core. Ratings decide before
repeats do: of a pair that was rated low and then high, the high rating is there to be kept. A
part that was made elsewhere is not thinned by the k-core: its rows are what others report
numbers on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import schema
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest import columns, feature_columns, split, tables, times
from slgr_jax.data.ingest.bad_rows import Sieve
from slgr_jax.data.ingest.feature_columns import Declared, Rows
from slgr_jax.data.ingest.log import Log, Ranges
from slgr_jax.data.ingest.memory import Memory
from slgr_jax.data.ingest.raw import Piece, Raw, stretches
from slgr_jax.data.ingest.spill import Spill
from slgr_jax.errors import ConfigError, InputError, listing, printable

_PART_CODES = {name: code for code, name in enumerate(schema.PARTS)}


@dataclasses.dataclass(frozen=True)
class _Values:
    """One piece's rows that can be used."""

    users: pa.ChunkedArray
    items: pa.ChunkedArray
    times: np.ndarray | None
    unit: str | None
    ratings: np.ndarray | None
    parts: np.ndarray | None
    rows: np.ndarray  # of the piece, each as it was counted


def read(
    raw: Raw, config: PrepareConfig, memory: Memory
) -> tuple[Ranges, pa.Array, pa.Array, str | None]:
    """All rows, the sorted user and item ids, and the unit that the times were in.

    What is read at once fits into memory; where that is not all, the rows are in files.

    Raises:
      InputError: a value cannot be used, no row can, or the pieces are not alike.
    """
    if not raw.streams:
        log, user_ids, item_ids, unit = read_log(raw, config)
        return Ranges.of(log), user_ids, item_ids, unit
    spill = Spill(memory.scratch())
    unit = None
    for pieces in stretches(raw, memory.rows):
        log, user_ids, item_ids, unit = _log_of(pieces, raw, config, unit)
        spill.add(log, user_ids, item_ids)
        del log, user_ids, item_ids
    by_time = raw.has("timestamp") and config.split in ("auto", "global_time", "leave_last")
    is_premade = raw.has("split") or any(piece.part for piece in raw.inputs)
    return *spill.ranges(memory.rows, numbered=is_premade or not by_time), unit


def read_log(raw: Raw, config: PrepareConfig) -> tuple[Log, pa.Array, pa.Array, str | None]:
    """`read` of pieces that are in memory."""
    assert not raw.streams
    return _log_of(raw.pieces, raw, config)


def _log_of(
    pieces: Sequence[Piece], raw: Raw, config: PrepareConfig, unit: str | None = None
) -> tuple[Log, pa.Array, pa.Array, str | None]:
    """Some pieces as one log, their ids, and the unit of times; `unit`: of those before them.

    The ids of a stretch are in no order: those of all stretches are sorted at the end.
    """
    ordered = not raw.streams
    values = [_values(piece, config, unit) for piece in pieces]
    labels = {role: [piece.label(role) for piece in pieces] for role in ("user", "item")}
    users, user_ids = columns.encode_ids(
        [value.users for value in values], labels["user"], ordered=ordered
    )
    items, item_ids = columns.encode_ids(
        [value.items for value in values], labels["item"], ordered=ordered
    )
    units = {p.where: v.unit for p, v in zip(pieces, values, strict=True) if v.unit is not None}
    if len({*units.values(), *([unit] if unit else [])}) > 1:
        shown = ", ".join(f"{where}: {unit}" for where, unit in units.items())
        shown += f", before: {unit}" if unit else ""
        raise InputError(f"the input files have times of different units ({shown})")
    log = Log(
        np.concatenate(users),
        np.concatenate(items),
        _joined([value.times for value in values], "times"),
        _joined([value.ratings for value in values], "ratings"),
        _joined([value.parts for value in values], "parts"),
    )
    if raw.of_interactions:
        first = np.cumsum([0, *map(len, pieces)])[:-1]
        rows = [begin + value.rows for begin, value in zip(first, values, strict=True)]
        log = dataclasses.replace(log, rows=np.concatenate(rows))
    return log, user_ids, item_ids, next(iter(units.values()), None)


def _joined(arrays: list[np.ndarray | None], noun: str) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    if present and len(present) < len(arrays):
        raise InputError(f"some input files have {noun} and some have none; make them alike")
    return np.concatenate(present) if present else None


def _values(piece: Piece, config: PrepareConfig, unit: str | None) -> _Values:
    """The columns of a piece as arrays, without its bad rows."""
    sieve = Sieve(
        len(piece),
        count=piece.count if tables.drops(config) else None,
        numbers=piece.numbers,
        first=piece.first,
    )
    micros = ratings = parts = None
    for role in ("user", "item"):
        columns.check_ids(piece.columns[role], piece.label(role), sieve)
    if "timestamp" in piece.columns:
        micros, unit = times.to_microseconds(
            piece.columns["timestamp"],
            piece.label("timestamp"),
            sieve,
            time_format=config.time_format,
            decimal=config.decimal,
            unit=unit,
        )
    if "rating" in piece.columns:
        ratings = columns.to_ratings(
            piece.columns["rating"], piece.label("rating"), sieve, decimal=config.decimal
        )
    if "split" in piece.columns:
        parts = columns.to_parts(piece.columns["split"], piece.label("split"), sieve)
    elif piece.part is not None:
        parts = np.full(len(piece), _PART_CODES[piece.part], np.int8)

    users, items = piece.columns["user"], piece.columns["item"]
    keep = sieve.keep
    rows = np.flatnonzero(keep)
    if rows.size == keep.size:
        return _Values(users, items, micros, unit, ratings, parts, rows)
    if not keep.any():
        raise InputError(f"{piece.where} has no rows left: {piece.count.examples[0]}")
    mask = pa.array(keep)
    return _Values(
        users.filter(mask),
        items.filter(mask),
        None if micros is None else micros[keep],
        unit,
        None if ratings is None else ratings[keep],
        None if parts is None else parts[keep],
        rows,
    )


def features_of(
    raw: Raw,
    log: Log,
    config: PrepareConfig,
    known: Mapping[str, Feature] | None = None,
    *,
    first: int = 0,
) -> tuple[Feature, ...]:
    """The features of the rows of all pieces, by the values of those that are training rows.

    Args:
      known: of a parent dataset, by name.
      first: rows of `log` below this number are in no piece; the pieces' begin here.

    Raises:
      InputError: a value is none of its kind, or the kind is not plain.
    """
    if not raw.of_interactions:
        return ()
    assert log.rows is not None
    assert log.parts is not None
    trained = np.zeros(sum(map(len, raw.pieces)), bool)
    of_training = log.rows[log.parts == split.TRAIN] - first
    trained[of_training[of_training >= 0]] = True
    owners = Rows(
        features_lib.INTERACTION,
        raw.pieces[0].where if len(raw.pieces) == 1 else str(config.input),
        lambda row: f"row {row + 1}",
        trained,
        config.decimal,
        known or {},
    )

    def column(entry: Declared) -> pa.ChunkedArray:
        of_pieces = [columns.decoded(p.columns[feature_columns.role(entry)]) for p in raw.pieces]
        kinds = {str(piece.type) for piece in of_pieces}
        if len(kinds) > 1:
            raise InputError(
                f"column {printable(entry.name)} has types {listing(sorted(kinds))} in the input "
                "files; make them alike"
            )
        return pa.chunked_array([chunk for piece in of_pieces for chunk in piece.chunks])

    return tuple(
        feature_columns.encode_column(entry, column(entry), owners) for entry in raw.of_interactions
    )


def filtered(rows: Ranges, config: PrepareConfig) -> dict[str, Any]:
    """Leave out unused rows, low ratings, repeated pairs and what is outside the k-core.

    Returns:
      For the manifest, how many rows each filter dropped.

    Raises:
      InputError: no row is left.
      ConfigError: a filter needs ratings and there are none, or the reverse.
    """
    counts: dict[str, Any] = {"rows_read": len(rows)}
    if rows.parts:
        _keep(rows, lambda log: _parts(log) != columns.UNUSED, "unused_in_split_column", counts)
    well_rated(rows, config, counts)
    _without_repeats(rows, config, counts)
    if config.user_core > 1 or config.item_core > 1:
        core(rows, config, counts)
    return counts


def well_rated(rows: Ranges, config: PrepareConfig, counts: dict[str, Any]) -> None:
    """Keep the rows that are rated high enough; what it dropped is added to `counts`."""
    if config.min_rating == float("-inf"):
        return
    if not rows.ratings:
        raise ConfigError("--min_rating is set, but the input has no ratings")
    counts["min_rating"] = config.min_rating
    _keep(rows, lambda log: _ratings(log) >= config.min_rating, "below_min_rating", counts)


def _keep(
    rows: Ranges, mask: Callable[[Log], np.ndarray], reason: str, counts: dict[str, Any]
) -> None:
    n = len(rows)
    counts[reason] = rows.keep(mask, reason.replace("_", " "))
    if counts[reason] == n:
        raise InputError(f"no interaction is left: {reason} dropped all {n}")


def _without_repeats(rows: Ranges, config: PrepareConfig, counts: dict[str, Any]) -> None:
    if config.keep == "highest" and not rows.ratings:
        raise ConfigError("--keep=highest needs ratings, and the input has none; use first or last")
    if config.count_repeats:
        if rows.ratings:
            raise ConfigError(
                "--count_repeats writes counts in place of the input's ratings; to leave these "
                "out, add --rating_column="
            )
        counts["most_repeats"] = 0

        def counted(log: Log) -> Log:
            repeats = split.times_repeated(log.users, log.items, log.parts)
            counts["most_repeats"] = max(counts["most_repeats"], int(repeats.max(initial=0)))
            return dataclasses.replace(log, ratings=repeats.astype(np.float32))

        rows.change(counted, "repeats")
    if config.keep != "first":
        counts["keep"] = config.keep

    def distinct(log: Log) -> np.ndarray:
        return split.distinct_pairs(
            log.users, log.items, log.times, log.parts, keep=config.keep, ratings=log.ratings
        )

    _keep(rows, distinct, "duplicates", counts)


def core(rows: Ranges, config: PrepareConfig, counts: dict[str, Any]) -> None:
    """Keep the rows in the k-core; what it dropped is added to `counts`."""

    # Evaluation parts made elsewhere stay as they are.
    def thinned() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not rows.parts:
            yield from rows.pairs("k-core")
            return
        for log in rows.logs("k-core"):
            of_train = _parts(log) == split.TRAIN
            yield log.users[of_train], log.items[of_train]

    masks, rounds = split.k_core_of_ranges(thinned, config.user_core, config.item_core)
    if not any(mask.any() for mask in masks):
        raise InputError(
            f"no interaction is left: --user_core={config.user_core} "
            f"--item_core={config.item_core} dropped all {sum(mask.size for mask in masks)}"
        )
    n_users, n_items = _distinct(thinned(), [np.ones(mask.size, bool) for mask in masks])
    users_left, items_left = _distinct(thinned(), masks)
    counts["k_core"] = {
        "user_core": config.user_core,
        "item_core": config.item_core,
        "rounds": rounds,
        "users": n_users - users_left,
        "items": n_items - items_left,
    }
    of_ranges = iter(masks)

    def inside(log: Log) -> np.ndarray:
        mask = np.ones(len(log), bool)
        mask[slice(None) if log.parts is None else log.parts == split.TRAIN] = next(of_ranges)
        return mask

    _keep(rows, inside, "outside_k_core", counts)


def _distinct(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], masks: Sequence[np.ndarray]
) -> tuple[int, int]:
    """How many users and items there are in the rows of masks."""
    n_users, seen = 0, np.zeros(0, bool)
    for (users, items), mask in zip(pairs, masks, strict=True):
        n_users += np.unique(users[mask]).size
        used = np.bincount(items[mask]) > 0
        if used.size > seen.size:
            used, seen = seen, used
        seen[: used.size] |= used
    return n_users, int(np.count_nonzero(seen))


def _parts(log: Log) -> np.ndarray:
    assert log.parts is not None
    return log.parts


def _ratings(log: Log) -> np.ndarray:
    assert log.ratings is not None
    return log.ratings
