"""Which runs a run begins as (--init_from, --init_ids_from), and three towers of several.

PAD trains an encoder on ids, then one on rows and texts together, and begins its three towers with
both. Here each phase is a run: what RUN has of a tower, rows, encoder and maps of vectors, is what
the tower begins with. `warm_start` reads and checks the runs.

Shape letters: R rows, D width of a tower's rows, W numbers of a packed row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Num

from slgr_jax import config
from slgr_jax.errors import ConfigError, listing
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.tower_views import ALIGNED, IDS
from slgr_jax.models.backbones.towers import ThreeTowers
from slgr_jax.models.embedding_table import RowFormat
from slgr_jax.training import run_directory
from slgr_jax.training.state import Learner, TrainState


class Part(NamedTuple):
    """A run that is named, and what of this one begins as it.

    Attributes:
      knob: that names it.
      tower: one of `tower_views.TOWERS`; empty: everything.
      learner: what this run's part would be as a run of its own.
    """

    knob: str
    tower: str
    learner: Learner


def parts(learner: Learner) -> list[Part]:
    """The runs that this one begins as.

    Raises:
      ConfigError: --init_ids_from beside a run that is no aligned tower, or one with vectors.
    """
    run, backbone = learner.config, learner.backbone
    if not isinstance(backbone, ThreeTowers):
        return [Part("init_from", "", learner)]
    of_run = run_directory.read_config(run.train.init_from).vectors
    first = ALIGNED if of_run.towers == ALIGNED else "" if of_run.products else IDS
    named = {"init_from": (run.train.init_from, first)}
    if ids := run.train.init_ids_from:
        if first != ALIGNED:
            raise ConfigError(
                f"--init_ids_from={ids} is beside a run with --towers=aligned, and --init_from="
                f"{run.train.init_from} is none; name that one there, or --init_from={ids} alone"
            )
        products = run_directory.read_config(ids).vectors.products
        if products:
            raise ConfigError(
                f"--init_ids_from={ids} reads the vectors {listing(products.values())}, and the "
                "tower of rows reads none; name a run without"
            )
        named["init_ids_from"] = (ids, IDS)
    parts = []
    for knob, (workdir, tower) in named.items():
        if not tower:
            return [Part(knob, "", learner)]
        vectors = config.VectorConfig()
        if tower == ALIGNED:
            vectors = dataclasses.replace(run.vectors, towers=ALIGNED)
        train = dataclasses.replace(run.train, init_from=workdir, init_ids_from="")
        alone = dataclasses.replace(run, vectors=vectors, train=train)
        of_tower = Learner(alone, backbone.alone(tower), learner.guidance, learner.layout)
        parts.append(Part(knob, tower, of_tower))
    return parts


def in_tower(
    part: Part,
    state: TrainState,
    tables: Mapping[str, Num[Array, "R W"]],
    params: Mapping[str, Any],
    places: Mapping[str, np.ndarray],
) -> TrainState:
    """A state in which a tower's half of each row, encoder and maps are RUN's.

    Args:
      tables, params, places: what RUN has (`warm_start`).
    """
    tower, begun = part.tower, dict(params["backbone"])
    backbone = dict(state.params["backbone"])
    if adapters.PARAMS in begun:
        maps = {**backbone[adapters.PARAMS]["item"], tower: begun.pop(adapters.PARAMS)["item"]}
        backbone[adapters.PARAMS] = {**backbone[adapters.PARAMS], "item": maps}
    backbone[tower] = begun
    grown = {
        name: _half(part, name, state.tables[name], rows, places.get(name))
        for name, rows in tables.items()
    }
    changed: TrainState = state.replace(  # type: ignore[attr-defined]
        tables=grown, params={**state.params, "backbone": backbone}
    )
    return changed


def _half(
    part: Part, name: str, fresh: jax.Array, rows: jax.Array, places: np.ndarray | None
) -> jax.Array:
    """`fresh`, rows side by side, with the values of `rows` as the tower's half; slots as fresh."""
    width = part.learner.backbone.tables[name].width
    begin = 0 if part.tower == IDS else width
    known = np.arange(len(rows)) if places is None else np.flatnonzero(places >= 0)
    at = known if places is None else places[known]

    def put(table: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        row_format = RowFormat.of(table, 2 * width)
        values, slots = row_format.unpack(table[at])
        own, _ = RowFormat.of(rows, width).unpack(rows)
        values = values.at[:, begin : begin + width].set(own)
        return table.at[at].set(row_format.pack(values, slots))

    split = part.learner.layout.table_sharding
    return jax.jit(put, donate_argnums=0, out_shardings=split)(fresh, at, rows[known])
