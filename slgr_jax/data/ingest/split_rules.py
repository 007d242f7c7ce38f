"""Every row gets its part by the rule of --split, a range of users after the other."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import SHOWN_SOURCES, PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import split
from slgr_jax.data.ingest.log import Log, Ranges
from slgr_jax.errors import ConfigError, InputError

_LABEL = "split"


def by_rule(rows: Ranges, config: PrepareConfig, rule: str) -> dict[str, Any]:
    """Give every row its part by `rule` (global_time, leave_last or ratio); says how.

    Raises:
      InputError: the rule needs times and there are none, or leaves a part empty.
    """
    if rule in ("global_time", "leave_last") and not rows.times:
        raise InputError(
            f"--split={rule} needs times and the input has no column for them; name one with "
            "--time_column (any increasing number will do) or use --split=ratio"
        )
    described: dict[str, Any] = {"rule": rule}
    valid, test = config.valid_fraction, config.test_fraction
    fractions = {"valid_fraction": valid, "test_fraction": test}
    if rule == "global_time":
        cuts = split.global_cuts(_sorted_times(rows, _all), valid, test)
        _set_parts(rows, lambda log: cuts.parts(_times(log)))
        return described | {**fractions, "cutoffs": _cutoffs(cuts)}
    if rule == "leave_last":
        _set_parts(rows, lambda log: split.last_two(_local(log), log.items, _times(log)))
        split.check_leave_last(_counts(rows)[split.TEST] > 0)
        return described

    described |= {**fractions, "seed": config.seed, "by": config.ratio_by}
    ranks = rows.ranks(_all)
    if config.ratio_by == "all":
        drawn = split.ratio(len(rows), valid, test, config.seed)
        _set_parts(rows, lambda log: drawn[ranks(log)])
        return described
    draws = np.random.default_rng(config.seed).random(len(rows))
    _set_parts(rows, lambda log: split.by_user_draws(_local(log), draws[ranks(log)], valid, test))
    counts = _counts(rows)
    split.check_ratio_by_user(bool(counts[split.VALID] and counts[split.TEST]))
    return described


def premade(rows: Ranges, config: PrepareConfig, user_ids: pa.Array) -> dict[str, Any]:
    """Complete a split that the rows came with: validation rows where it has none, and no pair in
    a part that an earlier part has too; says how.

    Args:
      user_ids: of the users of `rows`, by index.

    Raises:
      InputError: a part has no row, or none that is not in an earlier part.
    """
    described: dict[str, Any] = {"rule": "premade", "column": config.split_column or None}
    counts = _counts(rows)
    for code in (split.TRAIN, split.TEST):
        if not counts[code]:
            raise InputError(f"the pre-made split has no {schema.PARTS[code]} rows")
    from_test = config.valid_from == "test" or (
        config.valid_from == "auto" and config.source in SHOWN_SOURCES
    )
    if counts[split.VALID]:
        if config.valid_from != "auto":
            raise ConfigError(
                f"--valid_from={config.valid_from}: the pre-made split has a validation part; drop "
                "it"
            )
    elif from_test:
        described |= _halve_test(rows, config, user_ids, int(counts[split.TEST]))
    else:
        described |= _carve(rows, config, int(counts[split.TRAIN]))
    before = _counts(rows)
    rows.keep(lambda log: split.drop_seen(log.users, log.items, _parts(log)), "pairs seen earlier")
    after = _counts(rows)
    for code, name in enumerate(schema.PARTS):
        if not after[code]:
            raise InputError(f"all {name} pairs of the pre-made split are also in earlier parts")
    described["repeated_in_eval"] = {
        schema.PARTS[code]: int(before[code] - after[code]) for code in (split.VALID, split.TEST)
    }
    return described


def _halve_test(
    rows: Ranges, config: PrepareConfig, user_ids: pa.Array, n_test: int
) -> dict[str, Any]:
    """Make half of each user's test rows validation, as `split.halves` has them."""
    tested = np.zeros(len(user_ids), bool)
    for log in rows.logs():
        tested[log.users[_is_test(log)]] = True
    users = np.flatnonzero(tested)
    users = users[np.argsort(_number_order(user_ids)[users])]
    rng = np.random.default_rng(config.seed)
    draws = rng.random(n_test)
    odd = np.zeros(len(user_ids), np.int64)
    odd[users] = rng.integers(0, 2, users.size)
    ranks = rows.ranks(_is_test)

    def halved(log: Log) -> np.ndarray:
        parts, test = _parts(log).copy(), np.flatnonzero(_is_test(log))
        owners = log.users[test]
        parts[test[split.half_by_draws(owners, draws[ranks(log)], odd[owners])]] = split.VALID
        return parts

    _set_parts(rows, halved)
    left = _counts(rows)
    if not (left[split.VALID] and left[split.TEST]):
        raise InputError(
            f"--valid_from=test: {n_test} test rows of {users.size} users leave a part empty; try "
            "another --seed, or --valid_from=train"
        )
    return {"valid": "half of each user's test rows", "seed": config.seed}


def _number_order(ids: pa.Array) -> np.ndarray:
    """[ids] the place of each by its number, as tables that hold numbers sort; where one is no
    number, as they are."""
    try:
        numbers = ids.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return np.arange(len(ids))
    places = np.empty(len(ids), np.int64)
    places[np.argsort(numbers, kind="stable")] = np.arange(len(ids))
    return places


def _carve(rows: Ranges, config: PrepareConfig, n_train: int) -> dict[str, Any]:
    """Make some of the training rows validation."""
    described: dict[str, Any] = {"valid_fraction_of_train": config.valid_fraction}
    ordered = _sorted_times(rows, _is_train) if rows.times else np.zeros(0, np.int64)
    if ordered.size and ordered[0] != ordered[-1]:
        cut = split.carving_cut(ordered, config.valid_fraction)
        described |= {"valid": "carved from train by time", "cutoffs": _cutoffs(cut)}

        def of_train(log: Log) -> np.ndarray:
            return cut.parts(_times(log)[_is_train(log)])

    else:
        drawn = split.ratio(n_train, config.valid_fraction, 0.0, config.seed, least=2)
        ranks = rows.ranks(_is_train)
        described |= {"valid": "carved from train by ratio", "seed": config.seed}

        def of_train(log: Log) -> np.ndarray:
            return drawn[ranks(log)]

    def carved(log: Log) -> np.ndarray:
        parts = _parts(log).copy()
        parts[_is_train(log)] = of_train(log)
        return parts

    _set_parts(rows, carved)
    return described


def _set_parts(rows: Ranges, parts: Callable[[Log], np.ndarray]) -> None:
    rows.change(lambda log: dataclasses.replace(log, parts=parts(log)), _LABEL)


def _sorted_times(rows: Ranges, chosen: Callable[[Log], np.ndarray]) -> np.ndarray:
    times = np.empty(len(rows), np.int64)
    n = 0
    for log in rows.logs("times"):
        of_range = _times(log)[chosen(log)]
        times[n : n + of_range.size] = of_range
        n += of_range.size
    times = times[:n]
    times.sort()
    return times


def _counts(rows: Ranges) -> np.ndarray:
    """[3] rows of each part."""
    counts = np.zeros(len(schema.PARTS), np.int64)
    for log in rows.logs():
        counts += np.bincount(_parts(log), minlength=counts.size)
    return counts


def _all(log: Log) -> np.ndarray:
    return np.ones(len(log), bool)


def _is_train(log: Log) -> np.ndarray:
    return np.asarray(_parts(log) == split.TRAIN)


def _is_test(log: Log) -> np.ndarray:
    return np.asarray(_parts(log) == split.TEST)


def _times(log: Log) -> np.ndarray:
    assert log.times is not None
    return log.times


def _parts(log: Log) -> np.ndarray:
    assert log.parts is not None
    return log.parts


def _local(log: Log) -> np.ndarray:
    """Users counted from the first of the range: counts by user stay as short as the range."""
    return log.users - log.users.min() if len(log) else log.users


def _cutoffs(cuts: split.TimeCuts) -> dict[str, str]:
    moments = {"valid_from": cuts.valid_from, "test_from": cuts.test_from}
    return {key: _iso(value) for key, value in moments.items() if value is not None}


def _iso(microseconds: int) -> str:
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (start + datetime.timedelta(microseconds=microseconds)).isoformat()
