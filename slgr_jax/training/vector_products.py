"""Which products of vectors a run reads: as arrays, and as hashes for its record.

Vectors that stay beside training (`--item_vectors`) come to an adapter as (z - m) / s: m is the
mean of the vectors of items (users) with training interactions and s, one number, makes their
entries' root mean square 1. Sentence vectors share a large mean, which says nothing of an item.

Of a product of chunks (`--adapter_chunks`) m and s are those of all chunks of these items (users).

Shape letters: R rows, S slots of a row, Z width of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slgr_jax.config import RunConfig, VectorConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones.tower_views import BINS
from slgr_jax.sampling.context import FrozenVectors, VectorSizes
from slgr_jax.teacher.local import chunks, embeddings, nearest
from slgr_jax.teacher.local.vectors import Vectors

_ROWS_AT_ONCE = 1 << 14


class Standard(NamedTuple):
    """What standardises vectors: their mean [Z], and what they are divided by."""

    mean: np.ndarray
    scale: float

    def apply(
        self, vectors: Vectors, dtype: str, rows: int = 0, beside: np.ndarray | None = None
    ) -> np.ndarray:
        """[R, Z + 1] standardised vectors, then 1; zeros where there is none.

        Args:
          beside: a number of each row that comes before the 1, whether it has a vector or not
            (`beside`); rows are one longer then (`Adapter.stored`).
          dtype: float32 or bfloat16.
          rows: R, with rows of zeros behind the vectors; 0: as many as there are vectors.
        """
        count, width = vectors.values.shape
        out = np.zeros((rows or count, width + 1 + (beside is not None)), jnp.dtype(dtype))
        for block in _blocks(count):
            standardised = (vectors.values[block] - self.mean) / self.scale
            has = vectors.has[block, None]
            out[block, :width] = np.where(has, standardised, 0)
            if beside is not None:
                out[block, width] = beside[block]
            out[block, -1:] = has
        return out


def beside(knobs: VectorConfig, side: str, counts: np.ndarray) -> np.ndarray | None:
    """What an adapter reads of rows beside their vectors; None for most.

    Args:
      counts: [R] training interactions of each.
    """
    if knobs.adapter_gate:
        log_counts: np.ndarray = np.log1p(counts)
        return log_counts
    return frequency_bins(counts) if knobs.towers == "three" and side == "item" else None


def frequency_bins(counts: np.ndarray) -> np.ndarray:
    """[R] which tenth of the interactions each item begins in, the most popular first: 0 to 9, and
    10 of items without any.

    An item of n interactions is in tenth floor(10 S(n)), S(n) the share that items with more than
    n have together: equally popular items share a bin, where PAD's program cuts by rank.
    """
    distinct, of_item = np.unique(counts, return_inverse=True)
    held = np.bincount(of_item, weights=counts, minlength=distinct.size)
    above = held.sum() - np.cumsum(held)
    tenths = np.floor((BINS - 1) * above / max(held.sum(), 1.0))
    bins: np.ndarray = np.where(distinct > 0, tenths, BINS - 1)[of_item].astype(np.float32)
    return bins


def _blocks(rows: int) -> Iterator[slice]:
    """Rows a block at a time: a float64 copy of all vectors may be larger than memory."""
    for begin in range(0, rows, _ROWS_AT_ONCE):
        yield slice(begin, min(begin + _ROWS_AT_ONCE, rows))


def named(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Knob -> (product, which of its tables, items or users)."""
    initial = {
        f"init_{table}_vectors": (name, f"{table}s")
        for table, name in run.vectors.init_products.items()
    }
    beside = {f"{side}_vectors": (name, f"{side}s") for side, name in run.vectors.products.items()}
    guiding = {}
    if name := run.guidance.teacher_vectors:
        guiding = {f"teacher_vectors ({side})": (name, side) for side in ("items", "users")}
    return initial | beside | guiding


def sizes(run: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """The fields of `Sizes` that shape adapters.

    Raises:
      ManifestError: a product is not there, or not for this dataset.
      ConfigError: chunks are to be chosen among, and rows have one vector.
    """
    of_sides, knobs = {}, run.vectors
    fields: tuple[int, ...]
    for side, name in knobs.products.items():
        manifest, fields = embeddings.read_manifest(dataset, name), ()
        if knobs.reads_chunks(side):
            if not manifest.fields:
                knob = "--adapter_chunks" if knobs.adapter_chunks else "--user_fusion=attention"
                instead = "drop it" if knobs.adapter_chunks else "take --user_fusion=concat"
                raise ConfigError(
                    f"{knob} chooses among a row's chunks, and --{side}_vectors={name} "
                    f"has one vector a row; make chunks (slgr teach embed --chunks=8), or {instead}"
                )
            fields = tuple(manifest.fields[f"{side}s"].values())
        of_sides[f"{side}_vectors"] = VectorSizes(
            manifest.dim, knobs.alone(side), knobs.event_vectors, fields
        )
    return of_sides


def frozen(run: RunConfig, dataset: Dataset, layout: Layout) -> FrozenVectors | None:
    """The vectors that stay beside training, as host arrays with the padding of tables; None
    without any.

    Raises:
      ManifestError, ShardError: as `embeddings.load`.
      InputError: the vectors of items (users) with training interactions are all alike.
    """
    tables: dict[str, Any] = {}  # host arrays, standing in for what `device_put` makes of them
    for side, name in run.vectors.products.items():
        dtype = run.vectors.vector_dtype
        counts = dataset.popularity if side == "item" else dataset.history
        column = beside(run.vectors, side, counts)
        fused = side == "user" and run.vectors.fuses_users
        if run.vectors.reads_chunks(side):
            table = _of_chunks(dataset, side, name, dtype, layout)
        else:
            vectors = of_side(dataset, side, name)
            rows = layout.padded_rows(vectors.has.size)
            before = None if fused else column
            table = standard(dataset, side, vectors).apply(vectors, dtype, rows, before)
        if fused and column is not None:  # behind all of a row's vectors
            behind = np.zeros((len(table), 1), table.dtype)
            behind[: column.size, 0] = column
            table = np.concatenate([table, behind], axis=1)
        tables[side] = table.view(np.uint16) if dtype == "bfloat16" else table  # see `RowFormat`
    return FrozenVectors(**tables) if tables else None


def neighbours(run: RunConfig, dataset: Dataset) -> Any:
    """[I, k] (a host array) the items with the largest cosine of standardised vectors to each, -1
    past the last; None where nothing reads them. Compares all items with all."""
    count = run.vectors.adapter_neighbours
    if not count or not run.vectors.item_vectors:
        return None
    vectors = of_side(dataset, "item", run.vectors.item_vectors)
    values = standard(dataset, "item", vectors).apply(vectors, "float32")[:, :-1]
    standardised = Vectors(values, vectors.has)
    return nearest.table(standardised, standardised, count)


def of_side(dataset: Dataset, side: str, name: str) -> Vectors:
    """The vectors of items, or of users, of a product."""
    product = embeddings.load(dataset, name)
    return product.items if side == "item" else product.users


def standard(dataset: Dataset, side: str, vectors: Vectors) -> Standard:
    """What standardises the vectors of a side."""
    trained = vectors.has & _has_interactions(dataset, side)

    def of_trained() -> Iterator[np.ndarray]:
        for block in _blocks(trained.size):
            yield vectors.values[block][trained[block]]

    return _standard(side, vectors.values.shape[1], of_trained)


def _has_interactions(dataset: Dataset, side: str) -> np.ndarray:
    return (dataset.popularity if side == "item" else dataset.history) > 0


def _standard(side: str, width: int, blocks: Callable[[], Iterator[np.ndarray]]) -> Standard:
    """The mean and the scale of vectors, which `blocks` gives some at a time, twice."""
    count, total, squares = 0, np.zeros(width), 0.0
    for block in blocks():
        count += len(block)
        total += block.sum(axis=0, dtype=np.float64)
    mean = total / max(count, 1)
    for block in blocks():
        squares += float(np.square(block - mean).sum())
    if not squares:
        raise InputError(
            f"--{side}_vectors: {count} vectors of {side}s with training interactions, "
            "and all of these are alike; make vectors that tell them apart"
        )
    return Standard(mean, math.sqrt(squares / (count * width)))


def _of_chunks(dataset: Dataset, side: str, name: str, dtype: str, layout: Layout) -> np.ndarray:
    """[R, S (Z + 1)]: of each slot the standardised chunk, then 1; zeros where it is empty."""
    trained = _has_interactions(dataset, side)
    manifest = embeddings.read_manifest(dataset, name)
    verified = False

    def blocks() -> Iterator[chunks.Block]:
        nonlocal verified
        yield from embeddings.load_chunks(dataset, name, f"{side}s", verify=not verified)
        verified = True

    def of_trained() -> Iterator[np.ndarray]:
        for block in blocks():
            yield block.values[block.real & trained[block.rows][:, None]]

    scaling = _standard(side, manifest.dim, of_trained)
    slots = sum(manifest.fields[f"{side}s"].values())
    rows = layout.padded_rows(trained.size)
    out = np.zeros((rows, slots, manifest.dim + 1), jnp.dtype(dtype))
    for block in blocks():
        standardised = (block.values - scaling.mean) / scaling.scale
        out[block.rows, :, :-1] = np.where(block.real[..., None], standardised, 0)
        out[block.rows, :, -1] = block.real
    return out.reshape(rows, -1)


def hashes(run: RunConfig, dataset: Dataset) -> dict[str, str]:
    """Knob -> SHA-256 over the checksums of the vectors that it names.

    Raises:
      ManifestError: a product is not there, or not for this dataset.
    """
    return {
        knob: schema.files_hash(embeddings.read_manifest(dataset, name).files[side])
        for knob, (name, side) in named(run).items()
    }


def record(run: RunConfig, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What run.json says of them: knob -> product, hash, how many rows have none."""
    rows = {"items": dataset.n_items, "users": dataset.n_users}
    digests = hashes(run, dataset)
    return {
        knob: {
            "product": name,
            "hash": digests[knob],
            "without": rows[side] - embeddings.read_manifest(dataset, name).counts[side],
        }
        for knob, (name, side) in named(run).items()
    }


def changed(run: RunConfig, dataset: Dataset, recorded: Mapping[str, Any] | None) -> str:
    """The knob whose product holds other vectors than the run began with; empty for none.

    Args:
      recorded: run.json of the run; None: it has none.
    """
    was = (recorded or {}).get("vectors", {})
    for knob, digest in hashes(run, dataset).items() if was else ():
        if was[knob]["hash"] != digest:
            return f"--{knob}: {was[knob]['product']} holds other vectors now"
    return ""
