"""Which products of vectors a run reads: as arrays, and as hashes for its record.

Vectors that stay beside training (`--item_vectors`) come to an adapter as (z - m) / s: m is the
mean of the vectors of items (users) with training interactions and s, one number, makes their
entries' root mean square 1. Sentence vectors share a large mean, which says nothing of an item.

Shape letters: R rows, Z width of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError
from slgr_jax.mesh import Layout
from slgr_jax.sampling.context import FrozenVectors, VectorSizes
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors

_ROWS_AT_ONCE = 1 << 14


class Standard(NamedTuple):
    """What standardises vectors: their mean [Z], and what they are divided by."""

    mean: np.ndarray
    scale: float

    def apply(self, vectors: Vectors, dtype: str, rows: int = 0) -> np.ndarray:
        """[R, Z + 1] standardised vectors, then 1; zeros throughout where there is none.

        Args:
          dtype: float32 or bfloat16.
          rows: R, with rows of zeros behind the vectors; 0: as many as there are vectors.
        """
        count, width = vectors.values.shape
        out = np.zeros((rows or count, width + 1), jnp.dtype(dtype))
        for block in _blocks(count):
            standardised = (vectors.values[block] - self.mean) / self.scale
            has = vectors.has[block, None]
            out[block, :-1] = np.where(has, standardised, 0)
            out[block, -1:] = has
        return out


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
    """The fields of `Sizes` that shape adapters."""
    return {
        f"{side}_vectors": VectorSizes(
            embeddings.read_manifest(dataset, name).dim,
            run.vectors.alone(side),
            run.vectors.event_vectors,
        )
        for side, name in run.vectors.products.items()
    }


def frozen(run: RunConfig, dataset: Dataset, layout: Layout) -> FrozenVectors | None:
    """The vectors that stay beside training, as host arrays with the padding of tables; None
    without any.

    Raises:
      ManifestError, ShardError: as `embeddings.load`.
      InputError: the vectors of items (users) with training interactions are all alike.
    """
    tables: dict[str, Any] = {}  # host arrays, standing in for what `device_put` makes of them
    for side, name in run.vectors.products.items():
        vectors = of_side(dataset, side, name)
        rows = layout.padded_rows(vectors.has.size)
        dtype = run.vectors.vector_dtype
        table = standard(dataset, side, vectors).apply(vectors, dtype, rows)
        tables[side] = table.view(np.uint16) if dtype == "bfloat16" else table  # see `RowFormat`
    return FrozenVectors(**tables) if tables else None


def of_side(dataset: Dataset, side: str, name: str) -> Vectors:
    """The vectors of items, or of users, of a product."""
    product = embeddings.load(dataset, name)
    return product.items if side == "item" else product.users


def standard(dataset: Dataset, side: str, vectors: Vectors) -> Standard:
    """What standardises the vectors of a side."""
    counts = dataset.popularity if side == "item" else dataset.history
    trained = vectors.has & (counts > 0)
    rows, width = int(trained.sum()), vectors.values.shape[1]
    mean, squares = np.zeros(width), 0.0
    for block in _blocks(trained.size):
        mean += vectors.values[block][trained[block]].sum(axis=0, dtype=np.float64) / max(rows, 1)
    for block in _blocks(trained.size):
        squares += float(np.square(vectors.values[block][trained[block]] - mean).sum())
    if not squares:
        raise InputError(
            f"--{side}_vectors: {rows} {side}s with training interactions have a vector, "
            "and all of these are alike; make vectors that tell them apart"
        )
    return Standard(mean, math.sqrt(squares / (rows * width)))


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
