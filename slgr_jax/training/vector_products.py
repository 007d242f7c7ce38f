"""Which products of vectors a run reads: as arrays, and as hashes for its record.

Vectors that stay beside training (`--item_vectors`) come to an adapter as (z - m) / s: m is the
mean of the vectors of items (users) with training interactions and s, one number, makes their
entries' root mean square 1. Sentence vectors share a large mean, which says nothing of an item.

Shape letters: R rows, Z width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
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


class Standard(NamedTuple):
    """What standardises vectors: their mean [Z], and what they are divided by."""

    mean: np.ndarray
    scale: float

    def apply(self, vectors: Vectors) -> np.ndarray:
        """[R, Z + 1] float32: standardised, then 1; zeros throughout where there is no vector."""
        rows = np.ones((vectors.has.size, vectors.values.shape[1] + 1), np.float32)
        rows[:, :-1] = (vectors.values - self.mean) / self.scale
        rows[~vectors.has] = 0
        return rows


def named(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Knob -> (product, which of its tables, items or users)."""
    initial = {
        f"init_{table}_vectors": (name, f"{table}s")
        for table, name in run.vectors.init_products.items()
    }
    beside = {f"{side}_vectors": (name, f"{side}s") for side, name in run.vectors.products.items()}
    return initial | beside


def sizes(run: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """The fields of `Sizes` that shape adapters."""
    return {
        f"{side}_vectors": VectorSizes(
            embeddings.read_manifest(dataset, name).dim, run.vectors.alone(side)
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
        rows = standard(dataset, side, vectors).apply(vectors)
        rows = np.pad(rows, ((0, layout.padded_rows(rows.shape[0]) - rows.shape[0]), (0, 0)))
        if run.vectors.vector_dtype == "bfloat16":
            rows = rows.astype(jnp.bfloat16).view(np.uint16)  # as `RowFormat` packs it
        tables[side] = rows
    return FrozenVectors(**tables) if tables else None


def of_side(dataset: Dataset, side: str, name: str) -> Vectors:
    """The vectors of items, or of users, of a product."""
    product = embeddings.load(dataset, name)
    return product.items if side == "item" else product.users


def standard(dataset: Dataset, side: str, vectors: Vectors) -> Standard:
    """What standardises the vectors of a side."""
    counts = dataset.popularity if side == "item" else dataset.history
    trained = vectors.values[vectors.has & (counts > 0)].astype(np.float64)
    if trained.size:
        mean = trained.mean(axis=0)
        scale = float(np.sqrt(np.square(trained - mean).mean()))
    if not trained.size or not scale:
        raise InputError(
            f"--{side}_vectors: {len(trained)} {side}s with training interactions have a vector, "
            "and all of these are alike; make vectors that tell them apart"
        )
    return Standard(mean, scale)


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
