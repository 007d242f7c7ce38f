"""The examples that a run reads (`--examples`): as arrays, and as hashes for its record.

Similarity is by vectors of items less the mean of those with training interactions, as of nearest
items (`vector_products`); reasoning is divided by one number, so that its entries are about 1.

Shape letters: m examples, E of a label, L events of a history, Z width of an item's vector, R of a
reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.sampling import examples as examples_lib
from slgr_jax.sampling.context import ExampleSizes
from slgr_jax.sampling.examples import NOBODY, Examples, Pool
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local import examples as products
from slgr_jax.teacher.local.vectors import unit
from slgr_jax.training import vector_products

_ROWS_AT_ONCE = 1 << 14


def timed(dataset: Dataset) -> bool:
    """Whether rows have moments, so that some of a user's own may be shown to others of them."""
    return dataset.train.timestamps is not None


def sizes(run: RunConfig, dataset: Dataset) -> ExampleSizes | None:
    """What shapes the network; None without examples.

    Raises:
      ManifestError: a product is not there, or not for this dataset.
      ConfigError: it has no reasoning, or other labels than the run's rows.
    """
    knobs, threshold = run.examples, run.loss.rating_threshold
    if not knobs.product:
        return None
    manifest = products.read_manifest(dataset, knobs.product)
    if manifest.threshold != threshold:
        raise ConfigError(
            f"--examples={knobs.product} have label 1 {_label(manifest.threshold)}, and this "
            f"run's rows {_label(threshold)}; make them with "
            f"--liked_from={threshold:g}, or train with --rating_threshold={manifest.threshold:g}"
        )
    if knobs.reasoning and not manifest.width:
        raise ConfigError(
            f"--examples={knobs.product} are rows and labels without an LLM's reasoning; add "
            "--noexample_reasoning, or give it (slgr teach examples --examples=FILE)"
        )
    return ExampleSizes(manifest.width if knobs.reasoning else 1, timed(dataset))


def _label(threshold: float) -> str:
    return f"from rating {threshold:g} on" if threshold else "for interactions"


def arrays(run: RunConfig, dataset: Dataset, length: int) -> Examples | None:
    """What is resident of them, as host arrays; None without examples.

    Args:
      length: L.

    Raises:
      ManifestError, ShardError: as `products.load`, `embeddings.load`.
      InputError: the vectors of items with training interactions are all alike.
    """
    if not run.examples.product:
        return None
    held = products.load(dataset, run.examples.product)
    given = vector_products.of_side(dataset, "item", run.examples.vectors)
    scaling = vector_products.standard(dataset, "item", given)
    vectors = unit(scaling.apply(given, "float32")[:, :-1])
    histories = np.zeros((len(held.users), vectors.shape[1]), np.float32)
    if timed(dataset):
        histories = _histories(dataset, held, vectors, length)
    reasoning = np.zeros((len(held.users), 1), np.float32)
    if run.examples.reasoning:
        scale = np.sqrt(np.square(held.reasoning, dtype=np.float64).mean())
        reasoning = (held.reasoning / max(scale, 1e-12)).astype(np.float32)

    def pool(chosen: np.ndarray) -> Pool:
        at = np.flatnonzero(chosen)
        block = examples_lib.BLOCK
        more = -at.size % block if at.size > block else 0

        def filled(x: np.ndarray, value: int = 0) -> Any:  # stands in for the device array
            widths = ((0, more), *((0, 0),) * (x.ndim - 1))
            return np.pad(x[at], widths, constant_values=value)

        as_of = filled(held.positions) if timed(dataset) else None
        ids = filled(held.users, NOBODY), filled(held.items)
        return Pool(*ids, as_of, filled(histories), filled(reasoning))

    resident: Any = vectors
    return Examples(pool(held.clicked), pool(~held.clicked), resident)


def _histories(
    dataset: Dataset, held: products.Examples, vectors: np.ndarray, length: int
) -> np.ndarray:
    """[m, Z] what `examples.history_vectors` is of each example, as of its position."""
    begins = np.searchsorted(dataset.train.users, held.users)
    back = np.arange(1, length + 1)
    pieces = []
    for first in range(0, len(begins), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        place = held.positions[some, None] - back
        event = begins[some, None] + np.maximum(place, 0)
        items = dataset.train.items[np.minimum(event, len(dataset.train) - 1)]
        total = np.zeros((len(items), vectors.shape[1]))
        for column in range(length):  # all L at once would be L times the product
            total += np.where(place[:, column, None] >= 0, vectors[items[:, column]], 0)
        pieces.append(unit(total))
    return np.concatenate(pieces)


def record(run: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What run.json says of them: the products and their hashes; {} without examples."""
    if not run.examples.product:
        return {}
    manifest = products.read_manifest(dataset, run.examples.product)
    of_items = embeddings.read_manifest(dataset, run.examples.vectors)
    return {
        "examples": {
            "product": manifest.name,
            "hash": schema.files_hash(manifest.files["examples"]),
        },
        "example_vectors": {
            "product": of_items.name,
            "hash": schema.files_hash(of_items.files["items"]),
        },
        "counts": dict(manifest.counts),
    }


def changed(run: RunConfig, dataset: Dataset, recorded: Mapping[str, Any] | None) -> str:
    """The knob whose product holds something else than the run began with; empty for none.

    Args:
      recorded: run.json of the run; None: it has none.
    """
    was = (recorded or {}).get("examples_read", {})
    now = record(run, dataset) if was else {}
    for knob in ("examples", "example_vectors") if was else ():
        if was[knob]["hash"] != now[knob]["hash"]:
            return f"--{knob}: {was[knob]['product']} holds something else now"
    return ""
