"""Training interactions that an LLM takes for noise, as a product: DATA/edits/NAME.

Of each it says how likely it is noise, and perhaps which item the user had rather taken (LLM4DSR,
TOIS 2025). An interaction is named by its place among its user's training interactions; those of
validation and test cannot be named. What becomes of them a run says (`training/edited.py`).

Shape letters: U users, n training interactions, m rows.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from slgr_jax.data import edit_schema, schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError, ManifestError, ShardError, listing
from slgr_jax.teacher.products import answer_files, answers, preferences
from slgr_jax.teacher.products.same_split import refuse_leak, refuse_other_split

PathLike = str | os.PathLike[str]

_MADE_BY = "slgr teach import --edits=FILE --overwrite"
_FROM_TRAINING = "have the LLM read training interactions only, then make them again"


@dataclasses.dataclass(frozen=True)
class Edits:
    """A product in memory, by user, then position.

    Attributes:
      manifest: what it is.
      rows: [m] of `Dataset.train`, which interactions.
      noise: [m] in [0, 1].
      replacements: [m] items; -1 where none was named.
    """

    manifest: edit_schema.EditManifest
    rows: Int[np.ndarray, "m"]
    noise: Float[np.ndarray, "m"]
    replacements: Int[np.ndarray, "m"]


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/edits/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / edit_schema.EDITS_DIR / preferences.product_path(data, name).name


def import_file(
    dataset: Dataset,
    path: pathlib.Path,
    name: str,
    *,
    provenance: preferences.Provenance,
    names: Mapping[str, str],
    unknown: str = "error",
    delimiter: str = ",",
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> edit_schema.EditManifest:
    """A file with user, item or position or both, noise and optionally replacement, as NAME.

    An item without a position names every training interaction of the user with it.

    Args:
      path: Parquet, Arrow, JSON lines or CSV.
      provenance: of it built_from, model and prompt_hash.
      names: what the file's columns are called -> user, item.
      unknown: rows with ids that the dataset lacks, or that name no training interaction: error,
        or drop (and count).

    Raises:
      ManifestError: provenance says that evaluation data were seen.
      InputError: the file cannot be used: a probability that is missing or outside [0, 1], a
        position where training has another item, an item as its own replacement, rows that say two
        things of one interaction.
    """
    shards.check_target(product_path(dataset.path, name), overwrite=overwrite)
    refuse_leak(dataset, provenance.built_from, f"--edits={path}", _FROM_TRAINING)
    raw = answer_files.read(path, delimiter, titled=False, names=names, kind="edits")
    answer_files.kind_of(raw.column_names, path, titled=False, kind="edits")
    if raw.num_rows == 0:
        raise InputError(f"{path} has no rows: edits need at least one interaction")
    noise = answers.numbers_of(raw, "edits", "noise", path)
    _refuse(~((noise >= 0) & (noise <= 1)), path, "has no noise between 0 and 1", "a probability")
    indices, counts = _ids(raw, dataset, path, unknown)
    counts["file_rows"] = raw.num_rows
    named, at = _interactions(raw, indices, dataset, path)
    _refuse_or_count(named, raw.num_rows, dataset, path, unknown, counts)

    columns = (indices["item"], indices["replacement"])
    items, replacements = (column[named] for column in columns)
    _refuse_others(items, at, named, dataset, path)
    trained = dataset.train.items[at]
    same = np.zeros(raw.num_rows, bool)
    same[named[replacements == trained]] = True
    _refuse(same, path, "replaces an item by itself", "another item, or leave it empty")
    kept = _merged(at, noise[named], replacements, named, path)
    counts["merged_rows"] = int(at.size - kept.size)
    return write(
        dataset,
        name,
        at[kept],
        noise[named][kept],
        replacements[kept],
        provenance=provenance,
        counts=counts,
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
    )


def write(
    dataset: Dataset,
    name: str,
    rows: Int[np.ndarray, "m"],
    noise: Float[np.ndarray, "m"],
    replacements: Int[np.ndarray, "m"],
    *,
    provenance: preferences.Provenance,
    counts: Mapping[str, int] | None = None,
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> edit_schema.EditManifest:
    """Write edits as a product; all or nothing. Arguments as of `Edits`, `rows` without repeats."""
    order = np.argsort(rows)
    rows, noise, replacements = rows[order], noise[order], replacements[order]
    users = dataset.train.users[rows]
    columns = [
        pa.array(users, pa.int32()),
        pa.array(dataset.moments("train")[rows], pa.int32()),
        pa.array(dataset.train.items[rows], pa.int32()),
        pa.array(noise, pa.float32()),
        pa.array(replacements, pa.int32(), mask=replacements < 0),
    ]
    facts = {
        "rows": int(rows.size),
        "users": int(np.unique(users).size),
        "replacements": int((replacements >= 0).sum()),
    }
    root = product_path(dataset.path, name)
    with shards.atomic_directory(root, overwrite=overwrite) as staging:
        table = pa.table(columns, schema=edit_schema.EDITS)
        files = shards.write_shards(staging, "part", table, rows_per_shard=rows_per_shard)
        manifest = edit_schema.EditManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            built_from=provenance.built_from,
            model=provenance.model,
            prompt_hash=provenance.prompt_hash,
            counts={**facts, **(counts or {})},
            files={"edits": files},
        )
        return schema.write_manifest(staging, manifest)


def read_manifest(dataset: Dataset, name: str) -> edit_schema.EditManifest:
    """What DATA/edits/NAME is.

    Raises:
      ManifestError: no such product, made for another split or id map, or it has seen evaluation
        data.
    """
    root = product_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        held = sorted(path.parent.name for path in root.parent.glob(f"*/{schema.MANIFEST}"))
        raise ManifestError(
            f"{dataset.path} has no edits {name!r}; it has: {listing(held)}; make them with "
            f"slgr teach import --data={dataset.path} --name={name} --edits=FILE"
        )
    manifest = edit_schema.read_edit_manifest(root)
    refuse_other_split(dataset, manifest, f"the edits {name!r}", f"make them again ({_MADE_BY})")
    refuse_leak(dataset, manifest.built_from, f"the product of edits {name!r}", _FROM_TRAINING)
    return manifest


def load(dataset: Dataset, name: str, *, verify: bool = True) -> Edits:
    """Read DATA/edits/NAME, or refuse it.

    Args:
      dataset: as split; what the product must fit.
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError: as `read_manifest`.
      ShardError: a shard is missing, truncated or corrupt, or says what training does not have.
    """
    manifest, root = read_manifest(dataset, name), product_path(dataset.path, name)
    table = shards.read_shards(root, manifest.files["edits"], edit_schema.EDITS, verify=verify)
    users, position, items, noise = (
        table.column(name).to_numpy() for name in ("user", "position", "item", "noise")
    )
    replacements = table.column("replacement").fill_null(-1).to_numpy()
    rows = _rows_at(users, position, dataset)
    holds = (rows >= 0) & (noise >= 0) & (noise <= 1) & (replacements < dataset.n_items)
    holds[holds] = dataset.train.items[rows[holds]] == items[holds]
    holds[1:] &= rows[1:] > rows[:-1]
    if not holds.all():
        place = int(np.argmax(~holds))
        raise ShardError(
            f"{root}: user {users[place]} has no training interaction with item {items[place]} at "
            f"position {position[place]} that it says anything of once; make it again ({_MADE_BY})"
        )
    return Edits(manifest, rows, noise, replacements)


def report(edits: Edits) -> str:
    """A few lines for people: what the product is and covers, and how sure it is."""
    manifest, counts = edits.manifest, edits.manifest.counts
    lines = [
        f"edits {manifest.name}"
        + (f" by {manifest.model}" if manifest.model else "")
        + f", for {manifest.dataset} split {manifest.split_hash[:8]}",
        f"  {counts['rows']:,} training interactions of {counts['users']:,} users, "
        f"{counts['replacements']:,} with a replacement; built_from={manifest.built_from}",
    ]
    if edits.noise.size:
        at = ", ".join(f"{q:.0%} {np.quantile(edits.noise, q):.2f}" for q in (0.1, 0.5, 0.9))
        lines.append(f"  probability of noise, quantiles: {at}")
    extra = {k: v for k, v in counts.items() if v and k.startswith(("dropped_", "merged_"))}
    if extra:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in extra.items()))
    return "\n".join(lines)


def chosen(
    edits: Edits, users: Int[np.ndarray, "m"], *, above: float, most: int
) -> Int[np.ndarray, "c"]:
    """Places in `edits`, ascending: of each user the `most` likeliest noise, where likelier than
    `above`; of equals the older.

    Args:
      users: of each row.
      most: 0: all.
    """
    wanted = np.flatnonzero(edits.noise > above)
    if not most:
        return wanted
    order = wanted[np.lexsort((wanted, -edits.noise[wanted], users[wanted]))]
    first = np.searchsorted(users[order], users[order], side="left")
    return np.sort(order[np.arange(order.size) - first < most])


def _ids(
    raw: pa.Table, dataset: Dataset, path: pathlib.Path, unknown: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """User, item and replacement of each row as indices (item and replacement -1: not said; user
    -2: a row that names what the dataset does not have), and counts of such rows."""
    counts: dict[str, int] = {}
    texts = {
        name: answers.id_texts(raw.column(name), name, path)
        for name in ("user", "item")
        if name in raw.column_names
    }
    said = np.zeros(raw.num_rows, bool)
    if "replacement" in raw.column_names:
        text = raw.column("replacement").cast(pa.string())
        is_said = pc.fill_null(pc.not_equal(text, ""), False)
        texts["replacement"] = pc.if_else(is_said, text, "-")
        said = is_said.to_numpy()
    indices = answers.indices_of(texts, dataset)
    named = dict(indices)
    if "replacement" in indices:  # what is not said is not unknown
        named["replacement"] = np.where(said, indices["replacement"], 0)
        indices["replacement"] = np.where(said, indices["replacement"], -1)
    keep = answers.known_rows(texts, named, dataset, path, unknown, counts)
    none = np.full(raw.num_rows, -1, np.int32)
    return {
        "user": np.where(keep, indices["user"], -2),
        "item": indices.get("item", none),
        "replacement": indices.get("replacement", none),
    }, counts


def _rows_at(
    users: Int[np.ndarray, "m"], position: np.ndarray, dataset: Dataset
) -> Int[np.ndarray, "m"]:
    """[m] the rows of training at positions of users; -1 where there is none."""
    events = np.bincount(dataset.train.users, minlength=dataset.n_users)
    inside = (users >= 0) & (users < dataset.n_users) & (position >= 0)
    user = np.where(inside, users, 0)
    inside &= position < events[user]
    begins = np.cumsum(events) - events
    return np.where(inside, begins[user] + np.where(inside, position, 0), -1).astype(np.int64)


def _interactions(
    raw: pa.Table, indices: Mapping[str, np.ndarray], dataset: Dataset, path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Which row of the file names which training interaction, as two arrays of the pairs."""
    users, items, train = indices["user"], indices["item"], dataset.train
    if "position" in raw.column_names:
        position = answers.numbers_of(raw, "edits", "position", path)
        whole = (position >= 0) & (position == np.floor(position))
        _refuse(~whole, path, "has no position", "a whole number from 0, the oldest")
        at = _rows_at(users, position, dataset)
        named = np.flatnonzero(at >= 0)
        return named, at[named]
    # Training by (user, item): all interactions of a pair lie side by side.
    keys = train.users.astype(np.int64) * dataset.n_items + train.items
    order = np.argsort(keys, kind="stable")
    wanted = users.astype(np.int64) * dataset.n_items + items
    low, high = (np.searchsorted(keys[order], wanted, side=side) for side in ("left", "right"))
    counts = high - low
    named = np.repeat(np.arange(users.size), counts)
    within = np.arange(named.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return named, order[np.repeat(low, counts) + within]


def _refuse_or_count(
    named: np.ndarray,
    rows: int,
    dataset: Dataset,
    path: pathlib.Path,
    unknown: str,
    counts: dict[str, int],
) -> None:
    """Refuse rows that name no training interaction, or count them."""
    missing = np.ones(rows, bool)
    missing[named] = False
    known = counts["dropped_unknown_user_rows"] + counts["dropped_unknown_item_rows"]
    counts["dropped_rows_outside_training"] = int(missing.sum()) - known
    fix = f"a training interaction of {dataset.path}, or add --unknown=drop"
    _refuse(missing & (unknown == "error"), path, "names no training interaction", fix)
    if missing.all():
        raise InputError(
            f"{path}: none of the {rows} rows names a training interaction of {dataset.path}; "
            "positions count from 0, the oldest, and items are ids of the raw data"
        )


def _refuse_others(
    items: np.ndarray, at: np.ndarray, named: np.ndarray, dataset: Dataset, path: pathlib.Path
) -> None:
    """Refuse a position at which training has another item than the row says."""
    other = (items >= 0) & (items != dataset.train.items[at])
    if other.any():
        place = int(np.argmax(other))
        ids = dataset.items.column("item_id")
        has = ids[int(dataset.train.items[at[place]])].as_py()
        raise InputError(
            f"{path}: row {named[place] + 1} says item {ids[int(items[place])].as_py()!r}, and "
            f"training has {has!r} at that position; positions count from 0, the oldest, by time "
            "and then by item"
        )


def _merged(
    at: np.ndarray,
    noise: np.ndarray,
    replacements: np.ndarray,
    named: np.ndarray,
    path: pathlib.Path,
) -> np.ndarray:
    """The first of the rows of each interaction, which say the same of it."""
    order = np.argsort(at, kind="stable")
    again = np.append(False, np.diff(at[order]) == 0)
    before = np.roll(order, 1)
    differs = (noise[order] != noise[before]) | (replacements[order] != replacements[before])
    if (bad := again & differs).any():
        place = int(np.argmax(bad))
        raise InputError(
            f"{path}: rows {named[before[place]] + 1} and {named[order[place]] + 1} say two things "
            "of one interaction; keep one of them (a user's repeated items: give positions)"
        )
    return order[~again]


def _refuse(bad: np.ndarray, path: pathlib.Path, what: str, fix: str) -> None:
    if bad.any():
        row = int(np.argmax(bad)) + 1
        raise InputError(
            f"{path}: row {row} {what} ({int(bad.sum())} of {bad.size} do); give {fix}"
        )
