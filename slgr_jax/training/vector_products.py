"""Which products of vectors a run reads: their hashes, for its record and for its resumption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slgr_jax.config import RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.local import embeddings


def named(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Knob -> (product, which of its tables, items or users)."""
    return {
        f"init_{table}_vectors": (name, f"{table}s")
        for table, name in run.vectors.init_products.items()
    }


def hashes(run: RunConfig, dataset: Dataset) -> dict[str, str]:
    """Knob -> SHA-256 over the checksums of the vectors that it names.

    Raises:
      ManifestError: a product is not there, or not for this dataset.
    """
    return {
        knob: schema.files_hash(embeddings.read_manifest(dataset, name).files[side])
        for knob, (name, side) in named(run).items()
    }


def record(run: RunConfig, dataset: Dataset) -> dict[str, dict[str, str]]:
    """What run.json says of them: knob -> product and hash."""
    return {
        knob: {"product": named(run)[knob][0], "hash": digest}
        for knob, digest in hashes(run, dataset).items()
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
