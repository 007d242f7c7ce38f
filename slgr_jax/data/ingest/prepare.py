"""Raw files to a dataset directory, in one call: read, filter, split, index, write."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import SEQUENCE_SOURCES, SHOWN_SOURCES, PrepareConfig
from slgr_jax.data import features as features_lib
from slgr_jax.data import lineage, schema, shards
from slgr_jax.data.features import Feature
from slgr_jax.data.ingest import feature_columns, interactions, sources, spill, split_rules, texts
from slgr_jax.data.ingest.bad_rows import told
from slgr_jax.data.ingest.log import Log, Ranges
from slgr_jax.data.ingest.memory import Memory
from slgr_jax.data.ingest.raw import Raw
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.data.ingest.write import Numbering, by_shard, compact, write
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
    with contextlib.ExitStack() as stack:
        memory = Memory.of(config, stack)
        raw = sources.read(config, most_rows=memory.rows)
        _check_parts(raw, config, rule)
        rows, user_ids, item_ids, unit = interactions.read(raw, config, memory)
        filters = interactions.filtered(rows, config)
        described = _split(rows, config, rule, user_ids)
        if "repeated_in_eval" in described:
            filters["repeated_in_eval"] = described.pop("repeated_in_eval")
        described["time_unit"] = unit
        numbering, user_ids, item_ids = compact(rows, user_ids, item_ids)
        if config.user_shards:
            numbering, user_ids = by_shard(numbering, user_ids, config.user_shards)
            rows = spill.in_order(rows, numbering, memory)

        user_texts, item_texts, item_ids = read_texts(raw, config, user_ids, item_ids)
        users, users_met = texts.attach(user_ids, user_texts, schema.USERS)
        items, items_met = texts.attach(item_ids, item_texts, schema.ITEMS)
        features = _features(raw, config, rows, numbering, {"user": user_ids, "item": item_ids})
        source = describe_source(config, raw, (item_texts, user_texts), items_met)
        if config.users_input:
            source["users_in_table"] = users_met
        name = printable(config.name or raw.name or pathlib.Path(config.input).stem)
        return write(
            config, name, rows, numbering, users, items, source, described, filters,
            features=features,
        )  # fmt: skip


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
    lines = [piece.count for piece in raw.inputs]
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
    raw: Raw, config: PrepareConfig, rows: Ranges, numbering: Numbering, ids: Mapping[str, pa.Array]
) -> tuple[Feature, ...]:
    """The features of users and items, by the values of those with training interactions, and of
    interactions, by those of training."""
    features: list[Feature] = []
    for side, trained in numbering.with_training().items():
        columns = raw.features.get(side)
        # Items that have no rows may stand behind the others (--keep_items).
        trained = np.append(trained, np.zeros(len(ids[side]) - trained.size, bool))
        features += feature_columns.encode(
            columns, side, ids[side], trained, decimal=config.decimal
        )
    if any(f.side == "item" and f.name == features_lib.CATEGORIES for f in features):
        raise InputError(
            f"an item feature may not be called {features_lib.CATEGORIES}: the items' categories "
            "(--categories_column) are a feature by that name already"
        )
    if not raw.of_interactions:
        return tuple(features)
    log = rows.whole()
    of_rows = interactions.features_of(raw, log, config)
    log = numbering.of(log)
    return (*features, *(in_part_order(feature, log) for feature in of_rows))


def in_part_order(feature: Feature, log: Log) -> Feature:
    """A feature of all rows as one of those in the log, in the order of the dataset's parts."""
    assert log.rows is not None
    assert log.parts is not None
    order = log.order()
    parts = log.parts[order]
    places = np.concatenate([order[parts == code] for code in range(len(schema.PARTS))])
    return dataclasses.replace(feature, column=feature.column.take(pa.array(log.rows[places])))


def _rule(config: PrepareConfig) -> str:
    """The split rule, where the command line alone decides it; else `auto`."""
    premade = bool(config.test_input or config.split_column)
    if config.test_input and config.split_column:
        raise ConfigError("--test_input and --split_column both say what is test; give one")
    if premade and config.split not in ("auto", "premade"):
        flag = "--test_input" if config.test_input else "--split_column"
        raise ConfigError(f"{flag} is a pre-made split; drop it or --split={config.split}")
    # Parts may be files of their own.
    in_folders = config.source in ("recbole", "parquet", *SHOWN_SOURCES)
    if config.split == "premade" and not premade and not in_folders:
        raise ConfigError("--split=premade needs --test_input or --split_column")
    if config.source in SEQUENCE_SOURCES and config.split == "auto":
        return "leave_last"  # places in a line, which are its times, do not compare across users
    return "premade" if premade else config.split


def _check_parts(raw: Raw, config: PrepareConfig, rule: str) -> None:
    """Refuse files that are parts where another rule was asked for, and the reverse."""
    parts = [piece.part for piece in raw.inputs if piece.part is not None]
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


def _split(rows: Ranges, config: PrepareConfig, rule: str, user_ids: pa.Array) -> dict[str, Any]:
    """Give every row its part; says how, for the manifest."""
    if rows.parts:
        return split_rules.premade(rows, config, user_ids)
    if config.valid_from != "auto":
        raise ConfigError(
            f"--valid_from={config.valid_from} is of a pre-made split without a validation part; "
            "drop it, or give --test_input"
        )
    if rule == "auto":
        rule = "global_time" if rows.times else "ratio"
    return split_rules.by_rule(rows, config, rule)


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
    if manifest.user_shards:
        lines.append(f"  users are numbered by {manifest.user_shards} shards: --user_shards")
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
    if count := parent.get("user_shards"):
        lines.append(
            f"  users are no longer numbered by {count} shards, as new ones come behind: with "
            "--user_shards every process of a run reads all training interactions"
        )
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
