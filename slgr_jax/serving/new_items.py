"""New items without training: what a run's adapter makes of their vectors.

    run.with_items(["i1", "i2"], vectors).recommend(["u1"], k=10)

A run with `--item_vectors` has learned what vectors come to (`models.backbones.adapters`). An item
that it has never seen has a vector and no row, and is scored by

    A(z)             mf, sequence and click models: as an item without a row of its own
    A(z) / (K + 1)   lightgcn of K layers: as a node without neighbours

with z standardised as the run's own vectors are. Nothing that was trained changes, and no score of
a known item does.

Shape letters: n new items, I known ones, Z width of a vector.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.models.backbones import AnyBackbone, DotBackbone, adapters
from slgr_jax.models.backbones.lightgcn import LightGCN
from slgr_jax.sampling.context import Context, Fields
from slgr_jax.teacher.local import vector_files
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import run_directory, vector_products

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun


def read_items(path: str | os.PathLike[str]) -> tuple[list[str], Float[np.ndarray, "n Z"]]:
    """Ids and vectors of a file: Parquet or Arrow with columns item and vector, npz with ids and
    vectors, or batch-API results.

    Raises:
      InputError, ShardError: as `vector_files.read_vectors`.
    """
    ids, values, _ = vector_files.read_ids(path, "item")
    return ids, values


def with_items(
    run: TrainedRun, ids: Sequence[str], vectors: Float[np.ndarray, "n Z"]
) -> TrainedRun:
    """`run` with these items behind its own, to be asked as it is.

    Args:
      ids: external ids that the run does not know, each once.
      vectors: made as those of the run's --item_vectors were.

    Raises:
      ConfigError: the run has no adapter of items, its product holds other vectors now, or it
        reads of an item what a new one does not have.
      InputError: an id that is known or there twice, vectors of another width or not finite.
    """
    _check(run, ids, vectors)
    backbone, serving = run.restored.backbone, run.restored.serving
    made = _made(run, np.asarray(vectors, np.float32))
    known = run.dataset.n_items
    values = dict(serving.values)
    values |= {
        name: jnp.concatenate([values[name], jnp.asarray(rows)]) for name, rows in made.items()
    }
    if "item" in values and "item" not in made:  # a click model's: an id of its own, untrained
        nothing = jnp.zeros((len(ids), values["item"].shape[1]), values["item"].dtype)
        values["item"] = jnp.concatenate([values["item"], nothing])

    restored = run.restored
    learner = dataclasses.replace(restored.learner, backbone=_with_rows(backbone, known + len(ids)))
    items = pa.table(
        {
            field.name: pa.array(list(ids), pa.string())
            if field.name == "item_id"
            else pa.nulls(len(ids), field.type)
            for field in schema.ITEMS
        },
        schema=schema.ITEMS,
    )
    dataset = dataclasses.replace(
        restored.dataset, items=pa.concat_tables([restored.dataset.items, items])
    )
    return dataclasses.replace(
        run,
        restored=dataclasses.replace(
            restored,
            learner=learner,
            dataset=dataset,
            serving=dataclasses.replace(serving, values=values),
            context=_with_fields(restored.context, len(ids)),
        ),
    )


def _check(run: TrainedRun, ids: Sequence[str], vectors: np.ndarray) -> None:
    backbone, product = run.restored.backbone, run.config.vectors.item_vectors
    if not product:
        raise ConfigError(
            f"{run.workdir} was trained without --item_vectors: it has no adapter to score new "
            "items with; train one with it"
        )
    if run.config.vectors.adapter_chunks:
        raise ConfigError(
            f"{run.workdir} selects chunks (--adapter_chunks) by an item's row, which a new item "
            "has none of; train a run without it to score new items"
        )
    if run.config.vectors.item_side_weight:
        raise ConfigError(
            f"{run.workdir} adds texts of items behind the graph (--item_side_weight), which new "
            "items are no part of; train a run without it to score new items"
        )
    if run.config.vectors.adapter_neighbours:
        raise ConfigError(
            f"{run.workdir} lets items read their neighbours (--adapter_neighbours), which a new "
            "item has none of; train a run without it to score new items"
        )
    if run.config.examples.product:
        raise ConfigError(
            f"{run.workdir} finds examples by items' vectors (--examples), and has none of a new "
            "item's; train a run without it to score new items"
        )
    changed = vector_products.changed(
        run.config, run.dataset, run_directory.read_record(run.workdir)
    )
    if changed:
        raise ConfigError(f"{run.workdir}: {changed}, and new ones are standardised as those were")
    if not isinstance(backbone, DotBackbone) and run.restored.context.features is not None:
        raise ConfigError(
            f"--features={run.config.model.features} are fields of --backbone="
            f"{run.config.model.backbone}, and a new item's are not known; train without features"
        )
    if vectors.ndim != 2 or len(ids) != len(vectors) or not len(ids):
        raise InputError(f"{len(ids)} ids and vectors of shape {vectors.shape}; give one an id")
    width = adapters.of(backbone)[_rows_name(backbone)].vectors
    if vectors.shape[1] != width:
        raise InputError(
            f"new items have vectors of {vectors.shape[1]} numbers, --item_vectors={product} has "
            f"{width}; make them as those were made"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InputError(f"the vector of item {ids[int(np.argmin(finite))]!r} is not finite")
    counts = collections.Counter(run.dataset.items.column("item_id").to_pylist())
    counts.update(ids)
    if twice := [item for item in dict.fromkeys(ids) if counts[item] > 1]:
        raise InputError(
            f"new items {listing(map(repr, twice))} are items of the run already, or there twice; "
            "leave them out"
        )


def _rows_name(backbone: AnyBackbone) -> str:
    """The name of the rows that the adapter of items makes."""
    by_name = adapters.of(backbone).items()
    return next(name for name, adapter in by_name if adapter.side == "item")


def _made(run: TrainedRun, values: Float[np.ndarray, "n Z"]) -> dict[str, jax.Array]:
    """Name -> the rows of the new items."""
    backbone, knobs = run.restored.backbone, run.config.vectors
    trained = vector_products.of_side(run.dataset, "item", knobs.item_vectors)
    standard = vector_products.standard(run.dataset, "item", trained)
    new = Vectors(values, np.ones(len(values), bool))
    no_interaction = np.zeros(len(values), np.int64)
    column = vector_products.beside(knobs, "item", no_interaction)
    stored = standard.apply(new, knobs.vector_dtype, beside=column)
    stored = stored.astype(np.float32)  # rounded as known ones are
    name, params = _rows_name(backbone), run.restored.serving.params
    rows = adapters.made_of(backbone, params, name, jnp.asarray(stored))
    if isinstance(backbone, LightGCN):
        rows = rows / (run.config.model.layers + 1)
    elif isinstance(backbone, DotBackbone) and backbone.whole:
        raise ConfigError(
            f"--backbone={run.config.model.backbone} propagates its tables; new items are known "
            "for lightgcn, and no other that does: train anew"
        )
    return {name: rows}


def _with_rows(backbone: AnyBackbone, rows: int) -> AnyBackbone:
    """A copy of a backbone for so many items."""
    grown = copy.copy(backbone)
    assert isinstance(grown, adapters.Adapted)
    grown.adapters = {
        name: dataclasses.replace(adapter, rows=rows) if adapter.side == "item" else adapter
        for name, adapter in adapters.of(backbone).items()
    }
    grown.tables = {
        name: dataclasses.replace(spec, rows=rows) if name == "item" else spec
        for name, spec in backbone.tables.items()
    }
    return grown


def _with_fields(context: Context, count: int) -> Context:
    """The context in which new items have no categories."""
    if context.fields is None:
        return context
    fields = context.fields
    more = ((0, count), (0, 0))
    grown = Fields(jnp.pad(fields.categories, more), jnp.pad(fields.counts, (0, count)))
    return dataclasses.replace(context, fields=grown)
