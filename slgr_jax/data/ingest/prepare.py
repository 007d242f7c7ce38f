"""Raw files to a dataset directory, in one call: read, filter, split, index, write."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import fingerprints, lineage, schema, shards
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest import feature_columns, interactions, sources, split, texts
from slgr_jax.data.ingest.bad_rows import told
from slgr_jax.data.ingest.interactions import Log
from slgr_jax.data.ingest.tables import Raw
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import ConfigError, InputError, printable


def prepare(config: PrepareConfig) -> schema.DatasetManifest:
    """Write the dataset directory `config.out` and return its manifest.

    Nothing appears at `out` unless everything was written. To add to a dataset: `append.append`.

    Raises:
      InputError: a file or a row cannot be used, or nothing is left after the filters.
      ConfigError: knobs that contradict each other or the source.
    """
    assert not config.append, "append.append adds to a dataset"
    rule = _rule(config)
    check_out(config)
    raw = sources.read(config)
    _check_parts(raw, config, rule)
    log, user_ids, item_ids, unit = interactions.read_log(raw, config)
    log, filters = interactions.filtered(log, config)
    log, described = _split(log, config, rule)
    if "repeated_in_eval" in described:
        filters["repeated_in_eval"] = described.pop("repeated_in_eval")
    described["time_unit"] = unit
    log, user_ids, item_ids = _compact(log, user_ids, item_ids)

    user_texts, item_texts, item_ids = read_texts(raw, config, user_ids, item_ids)
    users, users_met = texts.attach(user_ids, user_texts, schema.USERS)
    items, items_met = texts.attach(item_ids, item_texts, schema.ITEMS)
    features = _features(raw, config, log, {"user": user_ids, "item": item_ids})
    source = describe_source(config, raw, (item_texts, user_texts), items_met)
    if config.users_input:
        source["users_in_table"] = users_met
    name = printable(config.name or raw.name or pathlib.Path(config.input).stem)
    return write(config, name, log, users, items, source, described, filters, features=features)


def read_texts(
    raw: Raw, config: PrepareConfig, user_ids: pa.Array, item_ids: pa.Array
) -> tuple[Texts | None, Texts | None, pa.Array]:
    """Texts of users and of items; and the items' ids, with --keep_items all of the table's behind.

    Raises:
      ConfigError: --keep_items without an item table.
    """
    user_texts = raw.users(user_ids)
    item_texts = raw.items(None if config.keep_items else item_ids)
    if not config.keep_items:
        return user_texts, item_texts, item_ids
    if item_texts is None:
        raise ConfigError(
            "--keep_items keeps the items of an item table, and there is none: add "
            "--items_input=FILE"
        )
    return user_texts, item_texts, texts.with_table_ids(item_ids, item_texts)


def describe_source(
    config: PrepareConfig, raw: Raw, tables: tuple[Texts | None, Texts | None], items_met: int
) -> dict[str, Any]:
    """What was read, for the manifest; every line of it is accounted for.

    Args:
      tables: texts of items and of users.
      items_met: how many items of the interactions are in the item table.

    Raises:
      InputError: a line is not accounted for.
    """
    lines = [piece.count for piece in raw.pieces]
    lines += [table.count for table in tables if table is not None]
    for count in lines:
        count.check()
    source: dict[str, Any] = {
        "layout": config.source,
        "files": [entry for files in raw.files for entry in files.record()],
        "lines": [count.record() for count in lines],
    }
    if tables[0] is not None:
        source["items_in_table"] = items_met
    return source


def _features(
    raw: Raw, config: PrepareConfig, log: Log, ids: Mapping[str, pa.Array]
) -> tuple[Feature, ...]:
    """The features of users and items, by the values of those with training interactions, and of
    interactions, by those of training."""
    assert log.parts is not None
    features: list[Feature] = []
    for side, indices in (("user", log.users), ("item", log.items)):
        counts = np.bincount(indices[log.parts == split.TRAIN], minlength=len(ids[side]))
        columns = raw.features.get(side)
        features += feature_columns.encode(
            columns, side, ids[side], counts > 0, decimal=config.decimal
        )
    if any(f.side == "item" and f.name == features_lib.CATEGORIES for f in features):
        raise InputError(
            f"an item feature may not be called {features_lib.CATEGORIES}: the items' categories "
            "(--categories_column) are a feature by that name already"
        )
    of_rows = interactions.features_of(raw, log, config)
    return (*features, *(in_part_order(feature, log) for feature in of_rows))


def in_part_order(feature: Feature, log: Log) -> Feature:
    """A feature of all rows as one of those in the log, in the order of the dataset's parts."""
    assert log.rows is not None
    places = np.concatenate([log.in_order(code) for code in range(len(schema.PARTS))])
    return dataclasses.replace(feature, column=feature.column.take(pa.array(log.rows[places])))


def _rule(config: PrepareConfig) -> str:
    """The split rule, where the command line alone decides it; else `auto`."""
    premade = bool(config.test_input or config.split_column)
    if config.test_input and config.split_column:
        raise ConfigError("--test_input and --split_column both say what is test; give one")
    if premade and config.split not in ("auto", "premade"):
        flag = "--test_input" if config.test_input else "--split_column"
        raise ConfigError(f"{flag} is a pre-made split; drop it or --split={config.split}")
    in_folders = config.source in ("recbole", "parquet")  # parts may be files of their own
    if config.split == "premade" and not premade and not in_folders:
        raise ConfigError("--split=premade needs --test_input or --split_column")
    if config.source == "s3rec" and config.split == "auto":
        return "leave_last"  # places in a line, which are its times, do not compare across users
    return "premade" if premade else config.split


def _check_parts(raw: Raw, config: PrepareConfig, rule: str) -> None:
    """Refuse files that are parts where another rule was asked for, and the reverse."""
    parts = [piece.part for piece in raw.pieces if piece.part is not None]
    if parts and rule not in ("auto", "premade"):
        raise ConfigError(
            f"{config.input} is a pre-made split ({', '.join(parts)}); drop --split={rule}, or "
            "name one of its folders or files as --input"
        )
    if parts and config.split_column:
        raise ConfigError(
            f"{config.input} is a pre-made split ({', '.join(parts)}); drop --split_column"
        )
    if rule == "premade" and not parts and not config.split_column:
        raise ConfigError(
            "--split=premade needs --test_input or --split_column, or a folder of parts"
        )


def check_out(config: PrepareConfig) -> None:
    """Refuse before the work what would fail after it."""
    shards.check_target(config.out, overwrite=config.overwrite)
    teachers = pathlib.Path(config.out) / schema.TEACHER_DIR
    if teachers.is_dir() and any(teachers.iterdir()):
        raise InputError(
            f"{teachers} holds teacher products that --overwrite would delete; move them away or "
            "choose another --out"
        )


def _split(log: Log, config: PrepareConfig, rule: str) -> tuple[Log, dict[str, Any]]:
    """Give every row its part; also say how, for the manifest."""
    if log.parts is not None:
        return _premade(log, config)
    if rule == "auto":
        rule = "global_time" if log.times is not None else "ratio"
    return split_by_rule(log, config, rule)


def split_by_rule(log: Log, config: PrepareConfig, rule: str) -> tuple[Log, dict[str, Any]]:
    """Give every row its part by `rule` (global_time, leave_last or ratio); also say how.

    Raises:
      InputError: the rule needs times and there are none, or leaves a part empty.
    """
    if rule in ("global_time", "leave_last") and log.times is None:
        raise InputError(
            f"--split={rule} needs times and the input has no column for them; name one with "
            "--time_column (any increasing number will do) or use --split=ratio"
        )
    described: dict[str, Any] = {"rule": rule}
    valid, test = config.valid_fraction, config.test_fraction
    fractions = {"valid_fraction": valid, "test_fraction": test}
    if rule == "global_time":
        assert log.times is not None
        parts, cuts = split.global_time(log.times, valid, test)
        described |= {**fractions, "cutoffs": _cutoffs(cuts)}
    elif rule == "leave_last":
        assert log.times is not None
        parts = split.leave_last(log.users, log.items, log.times)
    else:
        described |= {**fractions, "seed": config.seed, "by": config.ratio_by}
        if config.ratio_by == "user":
            parts = split.ratio_by_user(log.users, valid, test, config.seed)
        else:
            parts = split.ratio(len(log), valid, test, config.seed)
    return dataclasses.replace(log, parts=parts), described


def _premade(log: Log, config: PrepareConfig) -> tuple[Log, dict[str, Any]]:
    parts = log.parts
    assert parts is not None
    described: dict[str, Any] = {"rule": "premade", "column": config.split_column or None}
    for code in (split.TRAIN, split.TEST):
        if not (parts == code).any():
            raise InputError(f"the pre-made split has no {schema.PARTS[code]} rows")
    if not (parts == split.VALID).any():
        parts = parts.copy()
        rows = np.flatnonzero(parts == split.TRAIN)
        described["valid_fraction_of_train"] = config.valid_fraction
        if log.times is not None and np.unique(log.times[rows]).size > 1:
            parts[rows], cuts = split.carve_by_time(log.times[rows], config.valid_fraction)
            described |= {"valid": "carved from train by time", "cutoffs": _cutoffs(cuts)}
        else:
            parts[rows] = split.ratio(rows.size, config.valid_fraction, 0.0, config.seed, least=2)
            described |= {"valid": "carved from train by ratio", "seed": config.seed}
    keep = split.drop_seen(log.users, log.items, parts)
    dropped = {
        schema.PARTS[code]: int(np.count_nonzero(~keep & (parts == code)))
        for code in (split.VALID, split.TEST)
    }
    log = dataclasses.replace(log, parts=parts).where(keep)
    assert log.parts is not None
    for code, name in enumerate(schema.PARTS):
        if not (log.parts == code).any():
            raise InputError(f"all {name} pairs of the pre-made split are also in earlier parts")
    described["repeated_in_eval"] = dropped
    return log, described


def _cutoffs(cuts: split.TimeCuts) -> dict[str, str]:
    moments = {"valid_from": cuts.valid_from, "test_from": cuts.test_from}
    return {key: _iso(value) for key, value in moments.items() if value is not None}


def _iso(microseconds: int) -> str:
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (start + datetime.timedelta(microseconds=microseconds)).isoformat()


def _compact(log: Log, user_ids: pa.Array, item_ids: pa.Array) -> tuple[Log, pa.Array, pa.Array]:
    """Number the users and items that are left 0, 1, ... in id order."""

    def renumber(codes: np.ndarray, ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
        used = np.bincount(codes, minlength=len(ids)) > 0
        return (np.cumsum(used, dtype=np.int32) - 1)[codes], ids.filter(pa.array(used))

    users, user_ids = renumber(log.users, user_ids)
    items, item_ids = renumber(log.items, item_ids)
    return dataclasses.replace(log, users=users, items=items), user_ids, item_ids


def _interactions(log: Log, code: int) -> pa.Table:
    """The rows of one part as `schema.INTERACTIONS`, sorted by user, time, item."""
    part = log.where(log.in_order(code))
    n = len(part)
    times, ratings = part.times, part.ratings
    return pa.table(
        [
            pa.array(part.users),
            pa.array(part.items),
            pa.nulls(n, schema.TIMESTAMP)
            if times is None
            else pa.array(times).cast(pa.timestamp("us")).cast(schema.TIMESTAMP),
            pa.nulls(n, pa.float32()) if ratings is None else pa.array(ratings),
        ],
        schema=schema.INTERACTIONS,
    )


def write(
    config: PrepareConfig,
    name: str,
    log: Log,
    users: pa.Table,
    items: pa.Table,
    source: Mapping[str, Any],
    described: Mapping[str, Any],
    filters: Mapping[str, Any],
    parents: tuple[lineage.Parent, ...] = (),
    features: tuple[Feature, ...] = (),
) -> schema.DatasetManifest:
    """Write the dataset directory `config.out`, its manifest last.

    Args:
      log: every row with its part.
      source, described, filters: what was read, how it was split, what was left out.
      parents: the datasets that it was appended to.
    """
    assert log.parts is not None
    pairs = {
        part: (log.users[log.parts == code], log.items[log.parts == code])
        for code, part in enumerate(schema.PARTS)
    }
    with shards.atomic_directory(config.out, overwrite=config.overwrite) as root:
        tables = {"users": users, "items": items}
        files = {
            key: shards.write_shards(root, key, table, rows_per_shard=config.rows_per_shard)
            for key, table in tables.items()
        }
        files |= features_lib.write(root, features, rows_per_shard=config.rows_per_shard)
        for code, part in enumerate(schema.PARTS):
            table = _interactions(log, code)
            files[part] = shards.write_shards(
                root, f"{part}/part", table, rows_per_shard=config.rows_per_shard
            )
        manifest = schema.DatasetManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source=source,
            split=described,
            filters=filters,
            counts=_counts(pairs, users, items),
            id_map_hash=fingerprints.id_map_hash(users.column(0), items.column(0)),
            split_hash=fingerprints.split_hash(pairs),
            files=files,
            parents=parents,
            features=features_lib.described(features),
        )
        schema.write_manifest(root, manifest)
    return manifest


def _counts(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], users: pa.Table, items: pa.Table
) -> dict[str, int]:
    counts = {"users": users.num_rows, "items": items.num_rows}
    counts |= {part: int(pair[0].size) for part, pair in pairs.items()}
    seen_users = np.zeros(users.num_rows, bool)
    seen_items = np.zeros(items.num_rows, bool)
    seen_users[pairs["train"][0]] = True
    seen_items[pairs["train"][1]] = True
    counts["train_users"] = int(np.count_nonzero(seen_users))
    counts["train_items"] = int(np.count_nonzero(seen_items))
    for part in ("valid", "test"):
        evaluated = np.unique(pairs[part][0])
        counts[f"{part}_users"] = int(evaluated.size)
        counts[f"{part}_users_without_train"] = int(np.count_nonzero(~seen_users[evaluated]))
    evaluated_items = [pairs[part][1] for part in ("valid", "test")]
    for of_part in evaluated_items:
        seen_items[of_part] = True
    counts["items_without_interactions"] = int(np.count_nonzero(~seen_items))
    counts["items_with_title"] = int(items.num_rows - items.column("title").null_count)
    return counts


def summary(manifest: schema.DatasetManifest) -> str:
    """What was written and what was left out, for the terminal."""
    counts, filters, described = manifest.counts, manifest.filters, manifest.split
    lines = [
        f"{manifest.name}: {counts['users']:,} users, {counts['items']:,} items "
        f"({counts['items_with_title']:,} with a title), split {manifest.split_hash[:12]}"
    ]
    for part in schema.PARTS:
        line = f"  {part:5} {counts[part]:>12,} interactions, {counts[f'{part}_users']:,} users"
        without = counts.get(f"{part}_users_without_train")
        lines.append(line + (f" ({without:,} without training history)" if without else ""))
    shown = {k: v for k, v in described.items() if v is not None and k != "cutoffs"}
    lines.append("  split: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    for key, value in described.get("cutoffs", {}).items():
        lines.append(f"  {key}: {value}")
    if manifest.parents:
        lines += _added(manifest)
    lines += [f"  {line}" for line in told(manifest.source["lines"])]
    lines += _dropped(filters)
    if "items_in_table" in manifest.source:
        met = manifest.source["items_in_table"]
        share = 100 * met / max(1, counts["items"])
        lines.append(f"  items in the item table: {met:,} of {counts['items']:,} ({share:.1f} %)")
    if alone := counts.get("items_without_interactions"):
        lines.append(f"  items without interactions, candidates all the same: {alone:,}")
    lines += [f"  {line}" for line in feature_columns.summary(manifest.features)]
    if core := filters.get("k_core"):
        lines.append(
            f"  k-core: {core['user_core']} per user, {core['item_core']} per item, "
            f"{core['rounds']} rounds, dropped {core['users']:,} users and {core['items']:,} items"
            + (" (training part only)" if described["rule"] == "premade" else "")
        )
    return "\n".join(lines)


# Of `filters`, what is no number of dropped rows.
_NOT_DROPPED = (
    *("rows_read", "min_rating", "k_core", "keep", "most_repeats"),
    *("parent_rows", "replaced_parent_rows"),
)


def _added(manifest: schema.DatasetManifest) -> list[str]:
    """What became of the dataset that this one was appended to."""
    parent, counts, filters = manifest.parents[0], manifest.counts, manifest.filters
    users, items = (counts[key] - parent["counts"][key] for key in ("users", "items"))
    lines = [
        f"  added to {parent['name']}, split {parent['split_hash'][:12]}, "
        f"{filters['parent_rows']:,} rows: {users:,} new users, {items:,} new items; "
        f"{filters['already_there']:,} rows name pairs that were there, "
        f"{filters['replaced_parent_rows']:,} replace them"
    ]
    if parent["moved"]:
        moved = ", ".join(f"{count:,} {key}" for key, count in parent["moved"].items())
        lines.append(f"  rows that were there and changed part: {moved}")
    if backward := lineage.moved_backward(manifest.parents[:1]):
        lines.append(
            f"  warning: {sum(backward.values()):,} of them went back to an evaluated part; a run "
            "or a teacher of the parent has seen them and is refused here"
        )
    if changed := manifest.source.get("texts_changed"):
        shown = ", ".join(f"{count:,} {name}" for name, count in changed.items())
        lines.append(
            f"  differ from the parent's: {shown} (the newer hold; of categories the older)"
        )
    return lines


def _dropped(filters: Mapping[str, Any]) -> list[str]:
    dropped = {key: value for key, value in filters.items() if key not in _NOT_DROPPED}
    repeated = dropped.pop("repeated_in_eval", {})
    dropped |= {f"{part} pairs seen earlier": n for part, n in repeated.items()}
    reasons = [f"{key.replace('_', ' ')} {value:,}" for key, value in dropped.items() if value]
    lines = [f"  rows read: {filters['rows_read']:,}; dropped: {', '.join(reasons) or 'none'}"]
    if "most_repeats" in filters:
        lines.append(f"  ratings are counts of repeats, at most {filters['most_repeats']:,}")
    return lines
