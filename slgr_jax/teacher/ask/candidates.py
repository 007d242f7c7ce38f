"""Whom to ask about what: candidate sets under DATA/candidates.

Sets of (user, item) keys u * I + i, by reason (`schema.REASONS`): the three of S-LLMR (arXiv
2512.21526, section 3.1), hard pairs of a trained run, and calibration: training items that no
prompt of their user shows, so that the teacher's answer on them is known. What a run doubts may be
a training item, too, and is hidden likewise. Only training
interactions are looked at: a validation or test item is drawn, or not, like any item that the
user has not seen.

Shape letters: U users, I items, n keys.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.config import CandidateConfig, SliceConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError, ManifestError, listing
from slgr_jax.teacher.products import preferences

# `collect` asks for it here.
from slgr_jax.teacher.products.same_split import refuse_other_split as refuse_other_split

PathLike = str | os.PathLike[str]

_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class CandidateSet:
    """Pairs to ask about, and what prompts leave out.

    Attributes:
      users, items: [n] int32, by user, then item; no repeats.
      reasons: [n] int32, bit k is set where `schema.REASONS[k]` drew the pair.
      hidden: [U] rows: training items that no prompt of the user shows.
    """

    users: np.ndarray
    items: np.ndarray
    reasons: np.ndarray
    hidden: Csr

    def of_users(self, chosen: np.ndarray) -> CandidateSet:
        """The part of the users where `chosen` [U] is true."""
        keep = chosen[self.users]
        owners = np.repeat(np.arange(self.hidden.counts.size), self.hidden.counts)
        kept = chosen[owners]
        hidden = Csr.from_pairs(owners[kept], self.hidden.indices[kept], chosen.size)
        return CandidateSet(self.users[keep], self.items[keep], self.reasons[keep], hidden)


def draw(
    dataset: Dataset,
    lines: Sequence[str],
    options: CandidateConfig,
    *,
    seed: int,
    space: np.ndarray | None = None,
    proposed: Mapping[str, Csr] | None = None,
) -> CandidateSet:
    """Draw every set that `options` asks for.

    Users without a training item to show cannot be asked about, and a user's own training items
    are candidates only where they are hidden (calibration, doubtful).

    Args:
      dataset: training interactions; validation and test only where `exclude_evaluation`.
      lines: [I] how a prompt shows each item; an item whose line is empty is never shown.
      options: sizes of the sets.
      seed: of all draws.
      space: [I, D] vectors in which cold users' items are spread; None: by popularity alone.
      proposed: by reason (hard_top, hard_uncertain, doubtful) the items [U] that a trained run
        adds; training items among the doubtful ones as far as one of a user's is left to show.

    Raises:
      InputError: nothing is left to ask.
    """
    if space is None:
        order = np.lexsort((np.arange(dataset.n_items), dataset.popularity))
        space = np.empty((dataset.n_items, 1), np.float32)
        space[order, 0] = np.arange(dataset.n_items)

    described = np.array([bool(line) for line in lines], bool)
    events = described_history(dataset, described)
    rng = np.random.default_rng(seed)
    hidden, negatives = _calibration(dataset, described, events, options, rng)
    able = np.unique(events[0])

    keys_by_reason = paper_sets(dataset, able, described, space, options, rng)
    again = _asked_again(dataset, events, hidden, proposed or {})
    keys_by_reason |= _hard_sets(dataset, able, described, proposed or {}, again)
    positives = _keys(hidden, dataset.n_items)
    keys_by_reason["calibration"] = np.concatenate([positives, negatives])
    if options.exclude_evaluation:
        held = _keys(dataset.positives(("valid", "test")), dataset.n_items)
        keys_by_reason = {name: keys[~np.isin(keys, held)] for name, keys in keys_by_reason.items()}
    keys = np.unique(np.concatenate(list(keys_by_reason.values())))
    if not keys.size:
        raise InputError(
            f"{dataset.path}: no pair is left to ask about that has a text and that the user has "
            "not seen; raise --candidates, --cold_candidates or --tail_users"
        )

    reasons = np.zeros(keys.size, np.int32)
    for bit, name in enumerate(schema.REASONS):
        reasons[np.searchsorted(keys, np.unique(keys_by_reason.get(name, keys[:0])))] |= 1 << bit
    users, items = (part.astype(np.int32) for part in np.divmod(keys, dataset.n_items))
    every = np.divmod(np.concatenate([positives, again]), dataset.n_items)
    return CandidateSet(users, items, reasons, Csr.from_pairs(*every, dataset.n_users))


def described_history(
    dataset: Dataset, described: np.ndarray, hidden: Csr | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Training pairs (users, items) whose item has a text and is not hidden, by user, then time.

    A repeated pair stands where it happened last. Without times a user's items are by index.
    """
    users, items = dataset.train.users, dataset.train.items
    keys = users.astype(np.int64) * dataset.n_items + items
    _, from_end = np.unique(keys[::-1], return_index=True)
    last = np.sort(keys.size - 1 - from_end)
    last = last[described[items[last]]]
    if hidden is not None:
        last = last[~np.isin(keys[last], _keys(hidden, dataset.n_items))]
    return users[last], items[last]


# --- calibration and hard pairs ----------------------------------------------------------------


def _calibration(
    dataset: Dataset,
    described: np.ndarray,
    events: tuple[np.ndarray, np.ndarray],
    options: CandidateConfig,
    rng: Any,
) -> tuple[Csr, np.ndarray]:
    """Hidden training items of the chosen users, and keys of the items asked beside them."""
    users, items = events
    counts = np.bincount(users, minlength=dataset.n_users)
    eligible = np.flatnonzero(counts >= 2)
    chosen = np.sort(rng.permutation(eligible)[: options.calibration_users])
    end = np.cumsum(counts)
    pool = np.flatnonzero(described)
    history = dataset.positives(("train",))
    random = options.calibration_pick == "random" or dataset.train.timestamps is None

    picked: list[np.ndarray] = [np.zeros(0, np.int64)]
    beside: list[np.ndarray] = [np.zeros(0, np.int64)]
    for user in chosen:
        of_user = items[end[user] - counts[user] : end[user]]
        size = min(options.calibration_positives, of_user.size - 1)
        taken = rng.permutation(of_user)[:size] if random else of_user[-size:]
        trained = history.row(user)
        wanted = min(pool.size, options.calibration_negatives + trained.size)
        lot = rng.choice(pool, size=wanted, replace=False)
        others = lot[~np.isin(lot, trained)][: options.calibration_negatives]
        picked.append(int(user) * dataset.n_items + taken.astype(np.int64))
        beside.append(int(user) * dataset.n_items + others.astype(np.int64))

    rows, hidden = np.divmod(np.concatenate(picked), dataset.n_items)
    return Csr.from_pairs(rows, hidden, dataset.n_users), np.concatenate(beside)


def _asked_again(
    dataset: Dataset,
    events: tuple[np.ndarray, np.ndarray],
    hidden: Csr,
    proposed: Mapping[str, Csr],
) -> np.ndarray:
    """Keys of the training items that a run doubts; of each user one is left to show."""
    if "doubtful" not in proposed:
        return np.zeros(0, np.int64)
    users, items = events
    keys = users.astype(np.int64) * dataset.n_items + items
    free = ~np.isin(keys, _keys(hidden, dataset.n_items))
    wanted = free & np.isin(keys, _keys(proposed["doubtful"], dataset.n_items))
    before: np.ndarray = np.cumsum(wanted) - wanted  # of all users
    first = np.searchsorted(users, users, side="left")
    room = np.bincount(users[free], minlength=dataset.n_users) - 1
    return keys[wanted & (before - before[first] < room[users])]


def _hard_sets(
    dataset: Dataset,
    able: np.ndarray,
    described: np.ndarray,
    proposed: Mapping[str, Csr],
    again: np.ndarray,
) -> dict[str, np.ndarray]:
    """Keys of what a run proposes, where it can be asked about.

    Args:
      again: of training items that prompts hide for it.
    """
    seen = np.setdiff1d(_keys(dataset.positives(("train",)), dataset.n_items), again)
    can_be_asked = np.zeros(dataset.n_users, bool)
    can_be_asked[able] = True
    keys_by_reason = {}
    for reason, items_of_user in proposed.items():
        keys = _keys(items_of_user, dataset.n_items)
        users, items = np.divmod(keys, dataset.n_items)
        keys_by_reason[reason] = keys[can_be_asked[users] & described[items] & ~np.isin(keys, seen)]
    return keys_by_reason


# --- the paper's sets --------------------------------------------------------------------------


def paper_sets(
    dataset: Dataset,
    able: np.ndarray,
    described: np.ndarray,
    space: np.ndarray,
    options: CandidateConfig,
    rng: Any,
) -> dict[str, np.ndarray]:
    """Keys of the paper's sets, without the users' own training items.

    Args:
      dataset: training interactions.
      able: users that can be asked about, ascending.
      described: [I] bool, items that have a text.
      space: [I, D] vectors of the items; where nearby items are alike, cells of it are diverse.
      options: `candidates` per user are drawn without repeats from the `popular_pool` items with
        most training users; `cold_candidates` per cold user (default `SliceConfig`), one item from
        each of that many equally large cells of `space`; each item in the least popular share
        `tail_fraction` is paired with `tail_users` random users.
      rng: of all draws.
    """
    history = dataset.positives(("train",))
    slices = dataset.slices(SliceConfig(tail_item_fraction=options.tail_fraction))
    order = np.lexsort((np.arange(dataset.n_items), -dataset.popularity.astype(np.int64)))
    pool = order[described[order]][: options.popular_pool]
    cold = able[slices.cold_users[able]]
    tail = np.flatnonzero(slices.tail_items & described)

    keys_by_set = {
        "popular": _from_pool(able, pool, options.candidates, history, dataset.n_items, rng),
        "cold": _from_cells(cold, space, described, options.cold_candidates, dataset.n_items, rng),
        "tail": _random_users(tail, able, options.tail_users, dataset.n_items, rng),
    }

    trained = _keys(history, dataset.n_items)
    return {name: keys[~np.isin(keys, trained)] for name, keys in keys_by_set.items()}


def _keys(pairs: Csr, n_items: int) -> np.ndarray:
    """[n] int64: u * I + i of every entry, ascending."""
    owners = np.repeat(np.arange(pairs.offsets.size - 1, dtype=np.int64), pairs.counts)
    return owners * n_items + pairs.indices


def _from_pool(
    users: np.ndarray, pool: np.ndarray, size: int, history: Csr, n_items: int, rng: Any
) -> np.ndarray:
    place = np.full(n_items, -1)
    place[pool] = np.arange(pool.size)
    out = [np.zeros(0, np.int64)]
    for start in range(0, users.size if size else 0, _CHUNK):
        chunk = users[start : start + _CHUNK]
        lot = rng.random((chunk.size, pool.size), dtype=np.float32)
        rows = np.repeat(np.arange(chunk.size), history.counts[chunk])
        columns = place[np.concatenate([history.row(u) for u in chunk])]
        lot[rows[columns >= 0], columns[columns >= 0]] = 2  # own items come last, are cut later
        drawn = np.argsort(lot, axis=1)[:, :size]
        out.append((chunk[:, None].astype(np.int64) * n_items + pool[drawn]).ravel())
    return np.concatenate(out)


def _from_cells(
    users: np.ndarray,
    vectors: np.ndarray,
    described: np.ndarray,
    size: int,
    n_items: int,
    rng: Any,
) -> np.ndarray:
    if not size:
        return np.zeros(0, np.int64)
    out = [np.zeros(0, np.int64)]
    for cell in _cells(np.flatnonzero(described), vectors, size):
        if cell.size:
            out.append(users.astype(np.int64) * n_items + rng.choice(cell, size=users.size))
    return np.concatenate(out)


def _cells(items: np.ndarray, vectors: np.ndarray, count: int) -> list[np.ndarray]:
    """Split items into `count` cells of about equal size along leading directions."""
    if count == 1 or items.size <= 1:
        return [items]
    centred = vectors[items] - vectors[items].mean(0)
    axis = centred[np.argmax(np.linalg.norm(centred, axis=1))]
    for _ in range(10):  # power iteration: any spread-out direction will do
        axis = centred.T @ (centred @ axis)
        axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    order = items[np.argsort(centred @ axis, kind="stable")]
    left = count // 2
    cut = items.size * left // count
    return _cells(order[:cut], vectors, left) + _cells(order[cut:], vectors, count - left)


def _random_users(
    items: np.ndarray, users: np.ndarray, size: int, n_items: int, rng: Any
) -> np.ndarray:
    if not size or not items.size or not users.size:
        return np.zeros(0, np.int64)
    drawn = rng.choice(users, size=(items.size, size)).astype(np.int64)
    return (drawn * n_items + items[:, None]).ravel()


# --- on disk -----------------------------------------------------------------------------------


def set_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/candidates/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / schema.CANDIDATES_DIR / preferences.product_path(data, name).name


def write(
    dataset: Dataset,
    name: str,
    drawn: CandidateSet,
    options: CandidateConfig,
    *,
    seed: int,
    diversity: str,
    counts: Mapping[str, int] | None = None,
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.CandidateManifest:
    """Write DATA/candidates/NAME: pairs, hidden items, manifest; all or nothing."""
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int32), drawn.hidden.counts)
    tables = {
        "pairs": pa.table([drawn.users, drawn.items, drawn.reasons], schema=schema.CANDIDATES),
        "hidden": pa.table([owners, drawn.hidden.indices], schema=schema.HIDDEN),
    }

    facts = {
        "pairs": int(drawn.users.size),
        "users": int(np.unique(drawn.users).size),
        "items": int(np.unique(drawn.items).size),
        "hidden": int(drawn.hidden.indices.size),
    }
    for bit, reason in enumerate(schema.REASONS):
        facts[reason] = int((drawn.reasons >> bit & 1).sum())

    with shards.atomic_directory(set_path(dataset.path, name), overwrite=overwrite) as staging:
        manifest = schema.CandidateManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            seed=seed,
            options=dataclasses.asdict(options),
            evaluation="excluded" if options.exclude_evaluation else "drawn",
            diversity=diversity,
            counts={**facts, **(counts or {})},
            files={
                key: shards.write_shards(
                    staging, f"{key}/part", table, rows_per_shard=rows_per_shard
                )
                for key, table in tables.items()
            },
        )
        schema.write_manifest(staging, manifest)
    return manifest


def load(dataset: Dataset, name: str) -> tuple[CandidateSet, schema.CandidateManifest]:
    """Read DATA/candidates/NAME, or refuse it.

    Raises:
      ManifestError: there is none, or it was drawn for another split or id map.
      ShardError: a shard is missing, truncated or corrupt.
    """
    root = set_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        available = sorted(path.parent.name for path in root.parent.glob(f"*/{schema.MANIFEST}"))
        raise ManifestError(
            f"{dataset.path} has no candidate set {name!r}; it has: {listing(available)}; draw "
            f"one: slgr teach candidates --data={dataset.path} --name={name}"
        )

    manifest = schema.read_candidate_manifest(root)
    refuse_other_split(dataset, manifest, f"candidate set {name!r}")
    pairs = shards.read_shards(root, manifest.files["pairs"], schema.CANDIDATES)
    left_out = shards.read_shards(root, manifest.files["hidden"], schema.HIDDEN)
    users, items, reasons = (pairs.column(k).to_numpy() for k in schema.CANDIDATES.names)
    owners, hidden = (left_out.column(k).to_numpy() for k in schema.HIDDEN.names)
    rows = Csr.from_pairs(owners, hidden, dataset.n_users)
    return CandidateSet(users, items, reasons, rows), manifest


def content_hash(manifest: schema.CandidateManifest) -> str:
    """SHA-256 over the checksums of a candidate set's shards."""
    files = [file for key in sorted(manifest.files) for file in manifest.files[key]]
    return schema.files_hash(files)


def report(manifest: schema.CandidateManifest) -> str:
    """A few lines for people: what was drawn."""
    counts = manifest.counts
    drawn = ", ".join(f"{name} {counts[name]:,}" for name in schema.REASONS if counts.get(name))
    evaluation = {
        "drawn": "validation and test items are drawn like any other item",
        "excluded": "a user's own validation and test items are never asked about: what is not "
        "asked about is then more likely one of them",
    }[manifest.evaluation]
    without_text = ""
    if untold := counts.get("items_without_text"):
        without_text = (
            f"\n  {untold:,} items have no title and no text: no teacher is asked about them, the "
            "recommender ranks them like any other"
        )
    return (
        f"candidates {manifest.name}: {counts['pairs']:,} pairs of {counts['users']:,} users and "
        f"{counts['items']:,} items, for {manifest.dataset} split {manifest.split_hash[:8]}\n"
        f"  by reason: {drawn}\n"
        f"  {counts['hidden']:,} training items are hidden from prompts, to test the teacher on\n"
        f"  {evaluation}; cold users' items are spread over {manifest.diversity}{without_text}"
    )
