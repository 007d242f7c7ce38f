"""Pieces of raw files as one log of aligned arrays, and the filters on it.

Order: bad rows, unused rows, `min_rating`, repeated pairs, k-core. Ratings decide before
repeats do: of a pair that was rated low and then high, the high rating is there to be kept. A
part that was made elsewhere is not thinned by the k-core: its rows are what others report
numbers on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from slgr_jax.data.ingest.tables import Piece, Raw
from slgr_jax.errors import ConfigError, InputError, listing, printable

_PART_CODES = {name: code for code, name in enumerate(schema.PARTS)}


@dataclasses.dataclass(frozen=True)
class Log:
    """Interactions as aligned arrays of length n, in input order.

    `users` and `items` index the sorted ids; `parts` is None until a split is known. `rows` says
    which row each was, counted through all pieces, where its features are to be found.
    """

    users: np.ndarray  # [n] int32
    items: np.ndarray  # [n] int32
    times: np.ndarray | None  # [n] int64 microseconds
    ratings: np.ndarray | None  # [n] float32
    parts: np.ndarray | None  # [n] int8
    rows: np.ndarray | None = None  # [n] int64; None where interactions have no features

    def __len__(self) -> int:
        return int(self.users.size)

    def where(self, keep: np.ndarray) -> Log:
        """The rows of a bool mask or an index array, in its order."""
        return Log(
            self.users[keep],
            self.items[keep],
            None if self.times is None else self.times[keep],
            None if self.ratings is None else self.ratings[keep],
            None if self.parts is None else self.parts[keep],
            None if self.rows is None else self.rows[keep],
        )

    def in_order(self, code: int) -> np.ndarray:
        """Where the rows of a part are, sorted by user, time, item: as a dataset has them."""
        places = np.flatnonzero(self.parts == code)
        users, items = self.users[places], self.items[places]
        keys = (items, users) if self.times is None else (items, self.times[places], users)
        return places[np.lexsort(keys)]


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


def read_log(raw: Raw, config: PrepareConfig) -> tuple[Log, pa.Array, pa.Array, str | None]:
    """All pieces as one log, the sorted user and item ids, and the unit that the times were in.

    Raises:
      InputError: a value cannot be used, no row can, or the pieces are not alike.
    """
    pieces = raw.pieces
    values = [_values(piece, config) for piece in pieces]
    users, user_ids = columns.encode_ids(
        [value.users for value in values], [piece.label("user") for piece in pieces]
    )
    items, item_ids = columns.encode_ids(
        [value.items for value in values], [piece.label("item") for piece in pieces]
    )
    units = {p.where: v.unit for p, v in zip(pieces, values, strict=True) if v.unit is not None}
    if len(set(units.values())) > 1:
        shown = ", ".join(f"{where}: {unit}" for where, unit in units.items())
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


def _values(piece: Piece, config: PrepareConfig) -> _Values:
    """The columns of a piece as arrays, without its bad rows."""
    sieve = Sieve(
        len(piece), count=piece.count if tables.drops(config) else None, numbers=piece.numbers
    )
    micros = ratings = parts = unit = None
    for role in ("user", "item"):
        columns.check_ids(piece.columns[role], piece.label(role), sieve)
    if "timestamp" in piece.columns:
        micros, unit = times.to_microseconds(
            piece.columns["timestamp"],
            piece.label("timestamp"),
            sieve,
            time_format=config.time_format,
            decimal=config.decimal,
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


def filtered(log: Log, config: PrepareConfig) -> tuple[Log, dict[str, Any]]:
    """The rows that are left of unused rows, low ratings, repeated pairs and the k-core.

    Returns:
      The log, and for the manifest how many rows each filter dropped.

    Raises:
      InputError: no row is left.
      ConfigError: a filter needs ratings and there are none, or the reverse.
    """
    counts: dict[str, Any] = {"rows_read": len(log)}
    if log.parts is not None:
        log = _kept(log, log.parts != columns.UNUSED, "unused_in_split_column", counts)
    log = _well_rated(log, config, counts)
    log = _without_repeats(log, config, counts)
    if config.user_core > 1 or config.item_core > 1:
        log = core(log, config, counts)
    return log, counts


def well_rated(log: Log, config: PrepareConfig) -> tuple[Log, dict[str, Any]]:
    """The rows that are rated high enough, and counts as of `filtered`."""
    counts: dict[str, Any] = {"rows_read": len(log)}
    return _well_rated(log, config, counts), counts


def _well_rated(log: Log, config: PrepareConfig, counts: dict[str, Any]) -> Log:
    if config.min_rating == float("-inf"):
        return log
    if log.ratings is None:
        raise ConfigError("--min_rating is set, but the input has no ratings")
    counts["min_rating"] = config.min_rating
    return _kept(log, log.ratings >= config.min_rating, "below_min_rating", counts)


def _kept(log: Log, mask: np.ndarray, reason: str, counts: dict[str, Any]) -> Log:
    counts[reason] = int(mask.size - np.count_nonzero(mask))
    if not mask.any():
        raise InputError(f"no interaction is left: {reason} dropped all {mask.size}")
    return log if mask.all() else log.where(mask)


def _without_repeats(log: Log, config: PrepareConfig, counts: dict[str, Any]) -> Log:
    if config.keep == "highest" and log.ratings is None:
        raise ConfigError("--keep=highest needs ratings, and the input has none; use first or last")
    if config.count_repeats:
        if log.ratings is not None:
            raise ConfigError(
                "--count_repeats writes counts in place of the input's ratings; to leave these "
                "out, add --rating_column="
            )
        repeats = split.times_repeated(log.users, log.items, log.parts)
        counts["most_repeats"] = int(repeats.max())
        log = dataclasses.replace(log, ratings=repeats.astype(np.float32))
    if config.keep != "first":
        counts["keep"] = config.keep
    keep = split.distinct_pairs(
        log.users, log.items, log.times, log.parts, keep=config.keep, ratings=log.ratings
    )
    return _kept(log, keep, "duplicates", counts)


def core(log: Log, config: PrepareConfig, counts: dict[str, Any]) -> Log:
    """The rows in the k-core; what it dropped is added to `counts`."""
    # Evaluation parts made elsewhere stay as they are.
    rows = np.arange(len(log)) if log.parts is None else np.flatnonzero(log.parts == 0)
    users, items = log.users[rows], log.items[rows]
    core, rounds = split.k_core(users, items, config.user_core, config.item_core)
    if not core.any():
        raise InputError(
            f"no interaction is left: --user_core={config.user_core} "
            f"--item_core={config.item_core} dropped all {rows.size}"
        )
    counts["k_core"] = {
        "user_core": config.user_core,
        "item_core": config.item_core,
        "rounds": rounds,
        "users": int(np.unique(users).size - np.unique(users[core]).size),
        "items": int(np.unique(items).size - np.unique(items[core]).size),
    }
    mask = np.ones(len(log), bool)
    mask[rows] = core
    return _kept(log, mask, "outside_k_core", counts)
