"""A dataset and new interactions to another dataset, in which every index still means the same.

The parent's rows are read from its shards, the new ones as for any dataset; filters and split are
the parent's, over both together:

    rating filter     the new rows; the parent's have passed it
    repeated pairs    the parent's rule over all rows, the parent's before the new ones; counts of
                      repeats are added up
    k-core            of all rows. Those of the parent stay: a core within more rows is as large or
                      larger. What its own core dropped is not in its shards, and stays lost
    global_time, leave_last    anew over all rows: yesterday's test becomes training
    ratio             the parent's rows keep their part, the new ones are drawn (`more_by_ratio`)

The parent's features stay, and are read of the new users, items and rows, by the parent's
vocabularies, means and deviations: a value keeps its code, new ones come behind the others. What a
new table says of somebody known holds where it says something. No feature is added.

Users keep their numbers and new ones come behind them, so that a parent's shards of users
(--user_shards) are no ranges any more: the child has none.

A pre-made split has no rule, and places in a line (s3rec) begin at 0 again: both are refused.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.config import SEQUENCE_SOURCES, PrepareConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.data import lineage, schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest import (
    feature_columns,
    interactions,
    prepare,
    sources,
    split,
    split_rules,
    texts,
    times,
)
from slgr_jax.data.ingest.log import Log, Ranges
from slgr_jax.data.ingest.raw import Raw
from slgr_jax.data.ingest.write import compact, write
from slgr_jax.errors import ConfigError, InputError, listing, printable

# Settings of a dataset that one made from it shares, with what stands for "as it was".
_SETTINGS = (
    *("split", "valid_fraction", "test_fraction", "ratio_by", "seed"),
    *("user_core", "item_core", "min_rating", "keep", "count_repeats"),
)
_PREMADE = ("test_input", "valid_input", "split_column")


def append(config: PrepareConfig, given: Collection[str] = ()) -> schema.DatasetManifest:
    """Write `config.out`: the dataset `config.append` and the interactions of `config.input`.

    Args:
      config: as for `prepare.prepare`.
      given: names of the knobs that a user gave: one that is not the parent's is refused.

    Raises:
      InputError: a file or a row cannot be used, or the rows are not of the parent's kind.
      ConfigError: a knob contradicts the parent, or its split cannot be extended.
      ManifestError, ShardError: the parent is no dataset, or is damaged.
    """
    manifest = schema.read_dataset_manifest(config.append)
    settings = _with_features(manifest, _settings(manifest, config, given))
    _check_target(config)
    prepare.check_out(settings)
    parent = dataset_lib.load(config.append)

    raw = sources.read(settings)
    if any(piece.part is not None for piece in raw.pieces):
        raise ConfigError(
            f"{config.input} is a pre-made split; --append takes interactions without one: name "
            "one of its files as --input"
        )
    log, new_users, new_items, unit = interactions.read_log(raw, settings)
    _check_alike(parent, log, unit, config)
    counts: dict[str, Any] = {
        "parent_rows": sum(manifest.counts[part] for part in schema.PARTS),
        "rows_read": len(log),
    }
    rows = Ranges.of(log)
    interactions.well_rated(rows, settings, counts)
    log, user_ids, item_ids = _joined(
        parent, rows.whole(), new_users, new_items, settings.count_repeats
    )

    old = _pairs_of(parent, len(item_ids))
    rows = Ranges.of(_without_repeats(log, old, len(item_ids), settings, counts))
    if settings.user_core > 1 or settings.item_core > 1:
        interactions.core(rows, settings, counts)
    log, user_ids, item_ids = _without_unused(parent, rows.whole(), user_ids, item_ids)
    old_parts = _known_parts(log, _pairs_of(parent, len(item_ids)), len(item_ids))
    log, described = _split(log, old_parts, settings, len(manifest.parents) + 1)
    described["time_unit"] = manifest.split.get("time_unit", unit)
    rows = Ranges.of(log)
    numbering, user_ids, item_ids = compact(rows, user_ids, item_ids, keep_all=True)

    user_texts, item_texts, item_ids = prepare.read_texts(raw, settings, user_ids, item_ids)
    users, items, met, changed = _texts(parent, user_ids, item_ids, user_texts, item_texts)
    source = prepare.describe_source(settings, raw, (item_texts, user_texts), met)
    features, changed_features = _features(
        parent, raw, settings, log, {"user": user_ids, "item": item_ids}
    )
    source["texts_changed"] = changed | changed_features
    return write(
        settings,
        printable(config.name or manifest.name),
        rows,
        numbering,
        users,
        items,
        source,
        described,
        counts,
        parents=lineage.record(manifest, _moved(log, old_parts)),
        features=features,
    )


# --- what the parent decides ----------------------------------------------------------------


def _settings(
    manifest: schema.DatasetManifest, config: PrepareConfig, given: Collection[str]
) -> PrepareConfig:
    """`config` with the parent's settings.

    Raises:
      ConfigError: a given knob contradicts them, or the split has no rule to apply.
    """
    rule, where = manifest.split.get("rule"), config.append
    if rule == "premade":
        raise ConfigError(
            f"{where} is a pre-made split, which says nothing of rows that came later; prepare all "
            "rows anew, with the new parts as --input and --test_input, or with "
            "--split=global_time"
        )
    layouts = (manifest.source.get("layout"), config.source)
    if sequences := [layout for layout in SEQUENCE_SOURCES if layout in layouts]:
        raise ConfigError(
            f"--append does not go with --source={sequences[0]}: its times are places in a line, "
            "which begin at 0 again; write the new lines behind the old ones and prepare them anew"
        )
    if config.user_shards:
        raise ConfigError(
            f"--user_shards={config.user_shards} numbers users anew, and --append keeps "
            f"the numbers of {where}: drop it, or prepare all rows anew without --append"
        )
    premade = [name for name in _PREMADE if getattr(config, name)]
    if premade:
        raise ConfigError(
            f"--{premade[0]} is a pre-made split; --append applies {where}'s: drop it"
        )

    of_parent = _settings_of(manifest)
    asked = {name: getattr(config, name) for name in _SETTINGS if name in given}
    if asked.get("split") == "auto":
        del asked["split"]
    for name, value in asked.items():
        if value != of_parent[name]:
            raise ConfigError(
                f"--{name}={value} contradicts {where}, which was prepared with --{name}="
                f"{of_parent[name]}; drop it, or prepare all rows anew without --append"
            )
    return dataclasses.replace(config, **of_parent)


def _with_features(manifest: schema.DatasetManifest, config: PrepareConfig) -> PrepareConfig:
    """`config`, which names the parent's features where it names none and can read them.

    Raises:
      ConfigError: it names a feature that the parent has not.
    """
    tables = {
        "user": config.users_input,
        "item": config.items_input,
        features_lib.INTERACTION: config.input,
    }
    for side, table in tables.items():
        knob = f"{side}_features"
        of_parent = {entry["name"]: entry["kind"] for entry in manifest.features.get(side, ())}
        wanted = feature_columns.declared(getattr(config, knob), knob)
        odd = [entry.name for entry in wanted or () if entry.name not in of_parent]
        if odd:
            raise ConfigError(
                f"--{knob}: {config.append} has no {side} feature {listing(odd)} (it has "
                f"{listing(of_parent)}); --append adds none: prepare all rows anew to have more"
            )
        if wanted is None and table and of_parent:
            text = ",".join(f"{name}:{kind}" for name, kind in of_parent.items())
            named: dict[str, Any] = {knob: text}
            config = dataclasses.replace(config, **named)
    return config


def _settings_of(manifest: schema.DatasetManifest) -> dict[str, Any]:
    """The knobs that decided a dataset's rows and parts, by name."""
    defaults = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    rule, filters = manifest.split, manifest.filters
    core = filters.get("k_core", {})
    stated = {
        "split": rule["rule"],
        "ratio_by": rule.get("by"),
        **{name: rule.get(name) for name in ("valid_fraction", "test_fraction", "seed")},
        **{name: core.get(name) for name in ("user_core", "item_core")},
        **{name: filters.get(name) for name in ("min_rating", "keep")},
        "count_repeats": "most_repeats" in filters,
    }
    return {name: defaults[name] if stated[name] is None else stated[name] for name in _SETTINGS}


def _check_target(config: PrepareConfig) -> None:
    out, parent = (pathlib.Path(path).resolve() for path in (config.out, config.append))
    if out == parent or parent in out.parents:
        raise ConfigError(
            f"--out={config.out} is in --append={config.append}, which stays as it is (its runs "
            "and teachers belong to it); choose another --out"
        )


def _check_alike(parent: Dataset, log: Log, unit: str | None, config: PrepareConfig) -> None:
    """Refuse rows with columns that the parent has not, or without those that it has."""
    train, was = parent.train, parent.manifest.split.get("time_unit")
    counted = "most_repeats" in parent.manifest.filters
    ratings = None if counted else train.ratings
    pairs = (
        ("times", "time", train.timestamps, log.times),
        ("ratings", "rating", ratings, log.ratings),
    )
    for noun, column, of_parent, of_new in pairs:
        if (of_parent is None) == (of_new is None):
            continue
        if counted and noun == "ratings":
            fix = f"the ratings of {config.append} count repeats: add --rating_column="
        elif of_parent is None:
            fix = f"leave them out with --{column}_column=, or prepare all rows anew"
        else:
            fix = f"name their column with --{column}_column, or prepare all rows anew"
        has, lacks = (
            (config.input, config.append) if of_parent is None else (config.append, config.input)
        )
        raise InputError(f"{has} has {noun} and {lacks} has none; {fix}")
    if unit is not None and was is not None and times.ORDINAL in (unit, was) and unit != was:
        raise InputError(
            f"the times of {config.input} are of unit {unit}, those of {config.append} of unit "
            f"{was}: places in an order do not compare with moments; write both alike"
        )


# --- rows -----------------------------------------------------------------------------------


def _joined(
    parent: Dataset, log: Log, new_users: pa.Array, new_items: pa.Array, counted: bool
) -> tuple[Log, pa.Array, pa.Array]:
    """The parent's rows, then those of `log`, by the parent's indices; and the ids of both."""
    user_ids, users = _extended(parent.user_ids, new_users)
    item_ids, items = _extended(parent.items.column("item_id").combine_chunks(), new_items)
    parts = [parent.part(name) for name in schema.PARTS]

    def both(of_parent: list[np.ndarray | None], of_new: np.ndarray | None) -> np.ndarray | None:
        present = [column for column in of_parent if column is not None]
        return None if of_new is None else np.concatenate([*present, of_new])

    ratings = log.ratings
    if counted:  # how often each row stands for its pair
        ratings = np.ones(len(log), np.float32)
    rows = None
    if any(feature.side == features_lib.INTERACTION for feature in parent.features):
        n_old = sum(map(len, parts))
        new_rows = np.arange(len(log)) if log.rows is None else log.rows
        rows = np.concatenate([np.arange(n_old), n_old + new_rows])
    joined = Log(
        np.concatenate([*(part.users for part in parts), users[log.users]]),
        np.concatenate([*(part.items for part in parts), items[log.items]]),
        both([part.timestamps for part in parts], log.times),
        both([part.ratings for part in parts], ratings),
        None,
        rows,
    )
    return joined, user_ids, item_ids


def _extended(old: pa.Array, new: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """`old`, then those of `new` that it has not; and the index there of each of `new`."""
    place = pc.index_in(new, value_set=old)
    unknown = place.is_null()
    index = pc.fill_null(place, -1).to_numpy().astype(np.int32)
    fresh = index < 0
    index[fresh] = len(old) + np.arange(np.count_nonzero(fresh), dtype=np.int32)
    return pa.concat_arrays([old, new.filter(unknown)]), index


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """The parent's (user, item) pairs as ascending numbers, and the part of each."""

    keys: np.ndarray  # [n] int64
    parts: np.ndarray  # [n] int8

    def place(self, keys: np.ndarray) -> np.ndarray:
        """[m] where each key is among the pairs; -1 where it is not."""
        if not self.keys.size:
            return np.full(keys.size, -1)
        place = np.minimum(np.searchsorted(self.keys, keys), self.keys.size - 1)
        return np.where(self.keys[place] == keys, place, -1)


def _pairs_of(parent: Dataset, n_items: int) -> _Pairs:
    parts = [parent.part(name) for name in schema.PARTS]
    keys = np.concatenate([part.users.astype(np.int64) * n_items + part.items for part in parts])
    codes = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
    order = np.argsort(keys)
    return _Pairs(keys[order], codes[order])


def _keys(log: Log, n_items: int) -> np.ndarray:
    return log.users.astype(np.int64) * n_items + log.items


def _without_repeats(
    log: Log, old: _Pairs, n_items: int, config: PrepareConfig, counts: dict[str, Any]
) -> Log:
    """One row a pair, by the parent's rule; the parent's rows come first in `log`."""
    keys = _keys(log, n_items)
    if config.count_repeats:
        assert log.ratings is not None
        _, inverse = np.unique(keys, return_inverse=True)
        sums = np.bincount(inverse, log.ratings)[inverse]
        counts["most_repeats"] = int(sums.max())
        log = dataclasses.replace(log, ratings=sums.astype(np.float32))
    if config.keep != "first":
        counts["keep"] = config.keep
    keep = split.distinct_pairs(
        log.users, log.items, log.times, keep=config.keep, ratings=log.ratings
    )
    n_old = old.keys.size
    counts["already_there"] = int(np.count_nonzero(old.place(keys[n_old:]) >= 0))
    counts["duplicates"] = int(np.count_nonzero(~keep)) - counts["already_there"]
    counts["replaced_parent_rows"] = int(np.count_nonzero(~keep[:n_old]))
    return log.where(keep)


def _without_unused(
    parent: Dataset, log: Log, user_ids: pa.Array, item_ids: pa.Array
) -> tuple[Log, pa.Array, pa.Array]:
    """Without the new ids that no row has any more; those of the parent stay."""

    def renumber(codes: np.ndarray, ids: pa.Array, n_old: int) -> tuple[np.ndarray, pa.Array]:
        used = np.bincount(codes, minlength=len(ids)) > 0
        used[:n_old] = True
        return (np.cumsum(used, dtype=np.int32) - 1)[codes], ids.filter(pa.array(used))

    users, user_ids = renumber(log.users, user_ids, parent.n_users)
    items, item_ids = renumber(log.items, item_ids, parent.n_items)
    return dataclasses.replace(log, users=users, items=items), user_ids, item_ids


def _known_parts(log: Log, old: _Pairs, n_items: int) -> np.ndarray:
    """[n] int8: the part that the parent has each pair in; `split.NEW` where it has not."""
    place = old.place(_keys(log, n_items))
    if not old.parts.size:
        return np.full(len(log), split.NEW, np.int8)
    return np.where(place >= 0, old.parts[place], split.NEW).astype(np.int8)


def _split(
    log: Log, old_parts: np.ndarray, config: PrepareConfig, generation: int
) -> tuple[Log, dict[str, Any]]:
    """Give every row its part; also say how, for the manifest."""
    if config.split != "ratio":
        rows = Ranges.of(log)
        described = split_rules.by_rule(rows, config, config.split)
        return rows.whole(), described
    fractions = {
        "valid_fraction": config.valid_fraction,
        "test_fraction": config.test_fraction,
    }
    seed = (config.seed, generation)
    if config.ratio_by == "user":
        parts = split.more_by_user_ratio(log.users, old_parts, **fractions, seed=seed)
    else:
        parts = split.more_by_ratio(old_parts, **fractions, seed=seed)
    described = {"rule": "ratio", **fractions, "seed": config.seed, "by": config.ratio_by}
    return dataclasses.replace(log, parts=parts), described


def _moved(log: Log, old_parts: np.ndarray) -> dict[str, int]:
    """How many of the parent's pairs went from which part to which."""
    assert log.parts is not None
    return {
        lineage.moved_key(old, new): int(np.count_nonzero((old_parts == old) & (log.parts == new)))
        for old in range(len(schema.PARTS))
        for new in range(len(schema.PARTS))
        if old != new
    }


# --- features -------------------------------------------------------------------------------


def _features(
    parent: Dataset, raw: Raw, config: PrepareConfig, log: Log, ids: Mapping[str, pa.Array]
) -> tuple[tuple[Feature, ...], dict[str, int]]:
    """The parent's features with what the new tables and rows say; what differs, as of `_texts`."""
    features: list[Feature] = []
    changed: dict[str, int] = {}
    assert log.parts is not None
    for side, indices in (("user", log.users), ("item", log.items)):
        of_parent = {feature.name: feature for feature in parent.features if feature.side == side}
        columns = raw.features.get(side)
        if columns is not None:
            kept = tuple(entry for entry in columns.columns if entry[0].name in of_parent)
            columns = dataclasses.replace(columns, columns=kept)
        counts = np.bincount(indices[log.parts == split.TRAIN], minlength=len(ids[side]))
        encoded = feature_columns.encode(
            columns, side, ids[side], counts > 0, decimal=config.decimal, known=of_parent
        )
        stated = {feature.name: feature for feature in encoded}
        for name, feature in of_parent.items():
            if name not in stated:
                features.append(features_lib.extended(feature, len(ids[side])))
                continue
            both, differ = features_lib.joined(feature, stated[name])
            features.append(both)
            changed |= {f"{side} feature {name}": differ} if differ else {}
    return (*features, *_of_interactions(parent, raw, config, log)), changed


def _of_interactions(
    parent: Dataset, raw: Raw, config: PrepareConfig, log: Log
) -> Iterator[Feature]:
    """The parent's features of interactions, of its rows and of the new ones."""
    of_parent = [f for f in parent.features if f.side == features_lib.INTERACTION]
    if not of_parent:
        return
    n_old, n_new = len(of_parent[0].column), sum(map(len, raw.pieces))
    encoded = interactions.features_of(
        raw, log, config, {feature.name: feature for feature in of_parent}, first=n_old
    )
    stated = {feature.name: feature for feature in encoded}
    for feature in of_parent:
        if new := stated.get(feature.name):
            column = pa.chunked_array([*feature.column.chunks, *new.column.chunks])
            everything = dataclasses.replace(new, column=column)
        else:
            everything = features_lib.extended(feature, n_old + n_new)
        yield prepare.in_part_order(everything, log)


# --- texts ----------------------------------------------------------------------------------


def _texts(
    parent: Dataset,
    user_ids: pa.Array,
    item_ids: pa.Array,
    user_texts: texts.Texts | None,
    item_texts: texts.Texts | None,
) -> tuple[pa.Table, pa.Table, int, dict[str, int]]:
    """Users and items with their texts, how many items are in the new table, and what changed."""
    new_users, _ = texts.attach(user_ids, user_texts, schema.USERS)
    new_items, met = texts.attach(item_ids, item_texts, schema.ITEMS)
    old_users = shards.read_shards(
        parent.path, parent.manifest.files["users"], schema.USERS, verify=False
    )
    users, changed_users = texts.merged(old_users, new_users)
    items, changed_items = texts.merged(parent.items, new_items)
    changed: Mapping[str, int] = changed_items | {f"user {k}": v for k, v in changed_users.items()}
    return users, items, met, {name: count for name, count in changed.items() if count}
