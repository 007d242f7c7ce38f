"""PAD's networks (SIGIR 2025): an encoder of merged items, and three towers weighed by frequency.

    aligned (second phase)    s_ui = <Encoder(x of the history), x_i>,   x = MLP([e ; A(z)])
    three (third phase)       s_ui = sum_m w_m(i) <Encoder_m(v_m of the history), v_m,i>
                              v = [e_1 ; x of e_2 ; B(z)]:  rows alone, both, texts alone

with an encoder and rows of its own for each tower. The sum is one dot product, of
[u_1 ; u_2 ; u_3] with [w_1 v_1 ; w_2 v_2 ; w_3 v_3], so that a catalogue is ranked, exported and
guided as that of any model of vectors. w is a function of the candidate's bin of training frequency
alone, learned with the rest: events enter the encoders unweighed. `tower_views` makes x, v and w,
here and in serving. The encoder is the whole of a sequence backbone, its positions with it.

Shape letters: N sequences, W windows, L places, D width of a view, M = 3 towers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.base import (
    Dropout,
    Ids,
    ItemTableBackbone,
    Params,
    SequenceBackbone,
    TableRows,
    Window,
)
from slgr_jax.models.backbones.gru4rec import GRU4Rec
from slgr_jax.models.backbones.sasrec import SASRec
from slgr_jax.models.backbones.tower_views import ALIGNED, IDS, TOWERS, ThreeViews
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling.context import Context, Queries


class _Tower(ItemTableBackbone):
    """What both networks take of the sequence backbone that encodes histories."""

    factor_model = None

    def __init__(self, encoder: Any) -> None:
        self._encoder: SequenceBackbone = adapters.without_vectors(encoder)
        self._dim = encoder.tables["item"].width
        self.tables, self.reads, self.dropout = encoder.tables, encoder.reads, encoder.dropout
        self.feature_tables, self.adapters = encoder.feature_tables, encoder.adapters
        self.length = encoder.length

    def query_ids(self, context: Context, queries: Queries) -> Ids:
        return self._encoder.query_ids(context, queries)


class AlignedTower(_Tower):
    """A sequence backbone that reads merged items (`tower_views.MergedView`).

    Its parameters are the encoder's, so that it may begin as a run on ids ended (--init_from).
    """

    def init(self, key: jax.Array) -> Params:
        return self._encoder.init(key)

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout,
    ) -> Float[Array, "N D"]:
        merged = {"item": self.item_vectors(params, rows)}
        return self._encoder.query_vectors(params, merged, context, queries, dropout=dropout)

    def item_vectors(self, params: Params, rows: TableRows) -> Float[Array, "... D"]:
        return rows["item"][..., : self._dim]

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D3"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """The encoder's, of merged events."""
        return self._encoder.window(params, events[..., : self._dim], real, key=key)


class ThreeTowers(_Tower):
    """Three sequence backbones side by side; see the module's docstring.

    Its tables are twice as wide as the encoder's: [e_1 ; e_2], each with entries as those are.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self._alone = encoder
        self.tables = {name: _twice(spec) for name, spec in encoder.tables.items()}

    def alone(self, tower: str) -> Any:
        """The model of the phase that IDS or ALIGNED begins with: of one tower, no other."""
        if tower == IDS:
            return self._encoder
        views = self.adapters["item"]
        assert isinstance(views, ThreeViews)
        of_aligned = copy.copy(self._alone)
        of_aligned.adapters = {"item": views.aligned}
        return AlignedTower(of_aligned)

    def init(self, key: jax.Array) -> Params:
        keys = jax.random.split(key, len(TOWERS))
        return {tower: self._encoder.init(each) for tower, each in zip(TOWERS, keys, strict=True)}

    def query_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        *,
        dropout: Dropout,
    ) -> Float[Array, "N D3"]:
        states = [
            self._encoder.query_vectors(
                params[tower],
                {"item": view},
                context,
                queries,
                dropout=dropout and (dropout[0], jax.random.fold_in(dropout[1], number)),
            )
            for number, (tower, view) in enumerate(self._views(rows["item"]))
        ]
        return jnp.concatenate(states, axis=-1)

    def item_vectors(self, params: Params, rows: TableRows) -> Float[Array, "... D3"]:
        """[w_1 v_1 ; w_2 v_2 ; w_3 v_3]."""
        made = rows["item"]
        weights = made[..., -len(TOWERS) :]
        weighed = [
            weights[..., number, None] * view for number, (_, view) in enumerate(self._views(made))
        ]
        return jnp.concatenate(weighed, axis=-1)

    def window(
        self,
        params: Params,
        events: Float[Array, "W L1 D33"],
        real: Bool[Array, "W L1"],
        *,
        key: jax.Array,
    ) -> Window:
        """Each tower's window, with noise of its own: all predict the same places."""
        windows = [
            self._encoder.window(params[tower], view, real, key=jax.random.fold_in(key, number))
            for number, (tower, view) in enumerate(self._views(events))
        ]
        states = jnp.concatenate([window.states for window in windows], axis=-1)
        return windows[0]._replace(states=states)

    def _views(self, made: Float[Array, "... D33"]) -> list[tuple[str, Float[Array, "... D"]]]:
        """Each tower with what it reads of items."""
        views = jnp.split(made[..., : -len(TOWERS)], len(TOWERS), axis=-1)
        return list(zip(TOWERS, views, strict=True))


def _twice(spec: TableSpec) -> TableSpec:
    """Two rows side by side, each drawn as those of `spec`."""
    return dataclasses.replace(spec, width=2 * spec.width, init_std=spec.init_std * math.sqrt(2.0))


def with_towers(backbone: Any, towers: str) -> AlignedTower | ThreeTowers:
    """A backbone whose items have a view for each tower as what reads these.

    Args:
      towers: aligned | three.

    Raises:
      ConfigError: it is none of those whose places look back alone.
    """
    if not isinstance(backbone, SASRec | GRU4Rec):
        raise ConfigError(
            f"--towers={towers} reads histories from their first event on, and "
            f"{type(backbone).__name__} does not; use --backbone=sasrec or gru4rec, or drop it"
        )
    return AlignedTower(backbone) if towers == ALIGNED else ThreeTowers(backbone)
