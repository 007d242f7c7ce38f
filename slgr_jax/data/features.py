"""What is known of users, items and interactions besides who had what: features, as a dataset holds
them.

    categorical  one value of a vocabulary
    multi        any number of them, in the order of the file, without repeats
    numeric      a number; models read it standardised, (x - mean) / deviation

The vocabulary, the mean and the deviation are those of users (items) with training interactions,
and of training interactions: of any other value nothing could be learned, so that it counts as
missing. Missing is a value of its own, behind those of the vocabulary. Features decide neither the
split nor the ids: a teacher product fits whatever they are.

Features of interactions have a row each, in the order of the parts: train, valid, test.

Shape letters: R users, items or interactions, n values of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, ManifestError, ShardError, listing

INTERACTION = "interaction"
SIDES = ("user", "item", INTERACTION)
CATEGORIES = "categories"  # the feature that the items' categories are, by themselves
_VALUES = "feature_values"
# Kind -> the type of its column: a code, codes, a number; null is missing.
TYPES: Mapping[str, pa.DataType] = {
    "categorical": pa.int32(),
    "multi": pa.list_(pa.int32()),
    "numeric": pa.float32(),
}


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of all users, of all items, or of all interactions.

    Attributes:
      name: as the input has it.
      side: user, item or interaction.
      kind: categorical, multi or numeric.
      column: [R] of `TYPES[kind]`; null is missing.
      values: the vocabulary, in the order of the codes; empty where numeric.
      mean, deviation: of a number over users (items) with training interactions, or over these.
    """

    name: str
    side: str
    kind: str
    column: pa.ChunkedArray
    values: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def missing(self) -> int:
        """How many users (items) have no value."""
        return int(self.column.null_count)

    def ragged(self) -> tuple[np.ndarray, np.ndarray]:
        """([R] how many values each has, [n] their codes, row by row); of no number."""
        if self.kind == "categorical":
            return np.asarray(self.column.is_valid()).astype(np.int64), _ints(self.column)
        counts = pc.fill_null(pc.list_value_length(self.column), 0)
        return np.asarray(counts).astype(np.int64), _ints(pc.list_flatten(self.column))

    def standardised(self) -> np.ndarray:
        """[R] float32 (x - mean) / deviation of a number; NaN where it is missing."""
        numbers = pc.fill_null(self.column.cast(pa.float64()), float("nan")).to_numpy()
        return ((numbers - self.mean) / self.deviation).astype(np.float32)


def _ints(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.drop_null().to_numpy(), np.int64)


def of_texts(
    name: str,
    side: str,
    counts: np.ndarray,
    texts: pa.Array,
    trained: np.ndarray,
    *,
    multi: bool,
    known: Feature | None = None,
) -> Feature:
    """A categorical or multi-valued feature.

    Args:
      counts: [R] how many of `texts` each user (item) has; at most 1 where not multi.
      texts: [n] values, row by row.
      trained: [R] who has training interactions: only their values are in the vocabulary.
      known: a feature whose vocabulary this one's begins with.
    """
    owners = np.repeat(np.arange(counts.size), counts)
    values = pc.unique(texts.filter(pa.array(trained[owners])))
    values = values.take(pc.sort_indices(values))
    if known is not None:
        vocabulary = pa.array(known.values, pa.string())
        unknown = pc.invert(pc.is_in(values, value_set=vocabulary))
        values = pa.concat_arrays([vocabulary, values.filter(unknown)])
    codes = pc.fill_null(pc.index_in(texts, value_set=values), -1).to_numpy().astype(np.int64)

    # Of a value that a row repeats, the first; of one that is in no vocabulary, none.
    _, first = np.unique(owners * (len(values) + 1) + codes, return_index=True)
    kept = np.sort(first)
    kept = kept[codes[kept] >= 0]
    owners, kept_codes = owners[kept], pa.array(codes[kept], pa.int32())
    left = np.bincount(owners, minlength=counts.size)
    column: pa.Array
    if multi:
        offsets = pa.array(np.concatenate([[0], np.cumsum(left)]), pa.int32())
        column = pa.ListArray.from_arrays(offsets, kept_codes, mask=pa.array(left == 0))
    else:
        place = np.cumsum(left) - 1
        column = kept_codes.take(pa.array(place, mask=left == 0))
    kind = "multi" if multi else "categorical"
    return Feature(name, side, kind, pa.chunked_array([column]), tuple(values.to_pylist()))


def numeric(
    name: str, side: str, numbers: np.ndarray, trained: np.ndarray, *, known: Feature | None = None
) -> Feature:
    """A feature from the number of each user (item), NaN where there is none.

    Args:
      known: a feature whose mean and deviation this one has.
    """
    column = pa.array(numbers.astype(np.float32), from_pandas=True)  # NaN becomes null
    if known is not None:
        return dataclasses.replace(known, column=pa.chunked_array([column]))
    stated = numbers[trained & ~np.isnan(numbers)]
    mean = float(stated.mean()) if stated.size else 0.0
    deviation = float(stated.std()) if stated.size else 0.0
    # A number that is always the same says nothing: 0 for everybody.
    return Feature(name, side, "numeric", pa.chunked_array([column]), (), mean, deviation or 1.0)


def extended(feature: Feature, rows: int) -> Feature:
    """The feature of `rows` users or items, the first of which are those it has: the rest have no
    value."""
    more = pa.nulls(rows - len(feature.column), feature.column.type)
    column = pa.chunked_array([*feature.column.chunks, more], feature.column.type)
    return dataclasses.replace(feature, column=column)


def taken(feature: Feature, rows: np.ndarray) -> Feature:
    """The feature of these rows, in this order."""
    return dataclasses.replace(feature, column=feature.column.take(pa.array(rows)))


def joined(old: Feature, new: Feature) -> tuple[Feature, int]:
    """`new`, whose first rows are those of `old`, with what only `old` says; and how many of these
    rows say something else in `new`.

    Args:
      new: with `old` as what it is `known` by, so that codes mean the same in both.
    """
    rows = len(new.column)
    both = pa.chunked_array([*extended(old, rows).column.chunks, *new.column.chunks])
    says = np.asarray(new.column.is_valid())
    column = both.take(pa.array(np.arange(rows) + rows * says))
    was, now = old.column.to_pylist(), column.slice(0, len(old.column)).to_pylist()
    changed = sum(a is not None and a != b for a, b in zip(was, now, strict=True))
    return dataclasses.replace(new, column=column), changed


def categories(items: pa.Table, trained: np.ndarray) -> Feature | None:
    """The items' categories as a feature; None where no item has any."""
    counts, names = flat(items.column("categories"))
    if not len(names):
        return None
    return of_texts(CATEGORIES, "item", counts, names, trained, multi=True)


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """([R] counts, [n] texts, row by row) of lists of text, without empty ones and nulls."""
    counts = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    texts = pc.list_flatten(lists)
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    full = np.asarray(pc.fill_null(pc.not_equal(texts, ""), False).to_numpy(zero_copy_only=False))
    owners = np.repeat(np.arange(counts.size), counts)[full]
    return np.bincount(owners, minlength=counts.size), texts.filter(pa.array(full))


def choose(known: Sequence[Feature], names: str, where: object) -> tuple[Feature, ...]:
    """The features that --features names: none, all, or names; one that several sides share means
    all of these.

    Raises:
      ConfigError: there is none of that name, or none at all.
    """
    if names == "none":
        return ()
    if not known:
        raise ConfigError(
            f"--features={names}: {where} has no features; prepare it again with --user_features, "
            "--item_features or --interaction_features"
        )
    if names == "all":
        return tuple(known)
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in {feature.name for feature in known}]
    if unknown:
        raise ConfigError(
            f"--features={names}: {where} has no feature {listing(map(repr, unknown))}; it has "
            f"{listing(dict.fromkeys(feature.name for feature in known))}"
        )
    return tuple(feature for feature in known if feature.name in wanted)


def of_values(
    features: Sequence[Feature], values: Mapping[str, object], where: object
) -> tuple[Feature, ...]:
    """`features` of a single row, which has the values given by name; the others are missing.

    Args:
      where: whose features they are, for messages.

    Raises:
      ConfigError: there is no such feature, or no such value of it.
    """
    names = [feature.name for feature in features]
    if unknown := [name for name in values if name not in names]:
        raise ConfigError(
            f"{where} reads no feature of interactions called {listing(map(repr, unknown))}; it "
            f"reads {listing(names)}"
        )
    return tuple(_of_value(feature, values.get(feature.name)) for feature in features)


def _of_value(feature: Feature, value: object) -> Feature:
    content: Any = None
    if value is not None and feature.kind == "numeric":
        try:
            content = float(str(value))
        except ValueError:
            content = float("nan")
        if not np.isfinite(content):
            raise ConfigError(f"{feature.name}={value!r} is no finite number")
    elif value is not None:
        several = feature.kind == "multi" and isinstance(value, list | tuple)
        texts = [str(each) for each in value] if several else [str(value)]  # type: ignore[attr-defined]
        if odd := [text for text in texts if text not in feature.values]:
            raise ConfigError(
                f"{feature.name}={odd[0]!r}: no training interaction has this value; there are "
                f"{listing(feature.values, limit=8)} ({len(feature.values)} in all)"
            )
        codes = [feature.values.index(text) for text in texts]
        content = (codes or None) if feature.kind == "multi" else codes[0]
    column = pa.chunked_array([pa.array([content], TYPES[feature.kind])])
    return dataclasses.replace(feature, column=column)


def digest(features: Sequence[Feature]) -> str:
    """SHA-256 over what models read of features; empty of none."""
    if not features:
        return ""
    sha256 = hashlib.sha256()
    for feature in features:
        described = [feature.side, feature.name, feature.kind, feature.values]
        sha256.update(json.dumps([*described, feature.mean, feature.deviation]).encode())
        arrays = (feature.standardised(),) if feature.kind == "numeric" else feature.ragged()
        for array in arrays:
            sha256.update(array.size.to_bytes(8, "little"))
            sha256.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha256.hexdigest()


# --- on disk -------------------------------------------------------------------------------


def described(features: Sequence[Feature]) -> dict[str, Any]:
    """What a manifest says of features: side -> one object each, in the order of columns."""
    by_side: dict[str, Any] = {}
    for feature in features:
        facts = {"name": feature.name, "kind": feature.kind, "missing": feature.missing}
        if feature.kind == "numeric":
            facts |= {"mean": feature.mean, "deviation": feature.deviation}
        else:
            facts |= {"values": len(feature.values)}
        by_side.setdefault(feature.side, []).append(facts)
    return by_side


def write(
    root: os.PathLike[str], features: Sequence[Feature], *, rows_per_shard: int
) -> dict[str, tuple[schema.ShardFile, ...]]:
    """Write features and their vocabularies under `root`; shards by their key in a manifest."""
    tables: dict[str, pa.Table] = {}
    for side in SIDES:
        columns = {f.name: f.column for f in features if f.side == side}
        if columns:
            tables[f"{side}_features"] = pa.table(columns)
    if features:
        rows = [(f.side, f.name, value) for f in features for value in f.values]
        columns_of_values = zip(*rows, strict=True) if rows else ([], [], [])
        tables[_VALUES] = pa.table(
            [pa.array(column, pa.string()) for column in columns_of_values],
            schema=schema.FEATURE_VALUES,
        )
    return {
        key: shards.write_shards(root, key, table, rows_per_shard=rows_per_shard)
        for key, table in tables.items()
    }


def read(
    root: os.PathLike[str], manifest: schema.DatasetManifest, rows: Mapping[str, int], *,
    verify: bool,
) -> tuple[Feature, ...]:  # fmt: skip
    """The features of a dataset directory.

    Args:
      rows: side -> how many users, items, interactions there are.

    Raises:
      ManifestError: the manifest does not say what they are.
      ShardError: a shard is missing, damaged, or holds codes past its vocabulary.
    """
    if not manifest.features:
        return ()
    where = os.path.join(root, schema.MANIFEST)
    sides = [side for side in SIDES if side in manifest.features]
    keys = {_VALUES, *(f"{side}_features" for side in sides)}
    if missing := sorted(keys - set(manifest.files)):
        raise ManifestError(f"{where} is damaged: it lists no files of {listing(missing)}")
    listed = shards.read_shards(root, manifest.files[_VALUES], schema.FEATURE_VALUES, verify=verify)
    vocabularies: dict[tuple[str, str], list[str]] = {}
    for side, name, value in zip(*(column.to_pylist() for column in listed.columns), strict=True):
        vocabularies.setdefault((side, name), []).append(value)

    features: list[Feature] = []
    for side in sides:
        entries, key = manifest.features[side], f"{side}_features"
        try:
            layout = [(entry["name"], TYPES[entry["kind"]]) for entry in entries]
        except (TypeError, KeyError) as error:
            raise ManifestError(f"{where} is damaged: features of {side}s: {error}") from error
        table = shards.read_shards(root, manifest.files[key], pa.schema(layout), verify=verify)
        if table.num_rows != rows[side]:
            raise ShardError(f"{root}/{key} has {table.num_rows} rows for {rows[side]} {side}s")
        for entry in entries:
            name, kind = entry["name"], entry["kind"]
            values = tuple(vocabularies.get((side, name), ()))
            mean, deviation = entry.get("mean", 0.0), entry.get("deviation", 1.0)
            feature = Feature(name, side, kind, table.column(name), values, mean, deviation)
            _check_codes(feature, f"{root}/{key}")
            features.append(feature)
    return tuple(features)


def _check_codes(feature: Feature, where: str) -> None:
    if feature.kind == "numeric":
        return
    codes = feature.ragged()[1]
    if codes.size and (codes.min() < 0 or codes.max() >= len(feature.values)):
        raise ShardError(
            f"{where}: feature {feature.name} holds code {codes.max()}, its vocabulary has "
            f"{len(feature.values)} values"
        )
