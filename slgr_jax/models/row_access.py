"""How a step reads table rows and writes them back: as rows or whole; `dot_access.py` as dot
products of rows.

The step differentiates its loss with respect to *leaves*, whatever `read` returned, and hands
their gradient to `write`. Which of the two it is changes no result but rounding.

  RowAccess  leaves are the rows themselves; of tables that are needed whole (a graph, a softmax
           over the catalogue), all of their rows. Any backbone, any device.
  DotAccess  leaves are s = p . q_c and the squared norms, of backbones that are a dot product
           (and BroadcastDotAccess, on several devices).

Shape letters: N queries, C candidates of a query, D width, R rows of a table.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.mesh import Layout
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.base import (
    AnyBackbone,
    DotBackbone,
    Dropout,
    Ids,
    LosesBeside,
    PairBackbone,
    feature_tables,
    with_features_added,
)
from slgr_jax.models.candidates import (
    Candidates,
    Vectors,
    candidate_ids,
    candidate_losses,
    candidate_scores,
    candidate_vectors,
    pair_vectors,
)
from slgr_jax.models.row_optimizers import RowOptimizer
from slgr_jax.sampling import features as features_lib
from slgr_jax.sampling.context import Context
from slgr_jax.sampling.features import FeatureSlots

Tables = Mapping[str, jax.Array]
Leaves = Any  # a pytree of float arrays
# Table -> the ids of rows [M] and what a pass sees in place of each, [D].
Masked = Mapping[str, tuple[Int[Array, "M"], Float[Array, "D"]]]
NOTHING: Masked = types.MappingProxyType({})


class Reads(NamedTuple):
    """What a loss needs of the tables.

    Attributes:
      candidates: by name: those to score.
      rows: by name: rows themselves.
      whole: names of tables of which it needs every row.
    """

    candidates: Mapping[str, Candidates]
    rows: Mapping[str, Ids]
    whole: frozenset[str] = frozenset()


class View(Protocol):
    """What one forward pass sees of the leaves."""

    def scores(self, name: str, dropout: Dropout) -> Float[Array, "N C"]:
        """Logits of `Reads.candidates[name]`."""
        ...

    def vectors(self, name: str, dropout: Dropout) -> Vectors:
        """The vectors of `Reads.candidates[name]`, of a backbone that is a dot product."""
        ...

    def pair_vectors(self, name: str, dropout: Dropout) -> Float[Array, "N C E"]:
        """The vectors before the logits of `Reads.candidates[name]`, of a `PairBackbone`."""
        ...

    def lost(self, name: str) -> Float[Array, "N C"]:
        """What a `LosesBeside` loses on `Reads.candidates[name]`."""
        ...

    def rows(self, name: str) -> Mapping[str, Float[Array, "... D"]]:
        """The rows of `Reads.rows[name]`, by table, with what features and vectors add; of a side
        of candidates as `name/side`."""
        ...

    def table(self, name: str) -> Float[Array, "R D"]:
        """Every row of one of `Reads.whole`."""
        ...


class Access(Protocol):
    """One way to read and write; see the module's docstring."""

    def read(self, state: Tables, context: Context, reads: Reads) -> Leaves:
        """What the loss is differentiated by."""
        ...

    def view(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        context: Context,
        reads: Reads,
        dropout: Dropout,
        masked: Masked = NOTHING,
    ) -> View:
        """The leaves for one pass.

        Args:
          dropout: of what all candidates share (a graph's edges).
          masked: rows of whole tables that the pass sees otherwise.
        """
        ...

    def squares(
        self, params: Mapping[str, Any], leaves: Leaves, context: Context, reads: Reads
    ) -> dict[str, jax.Array]:
        """By name: [N] sum of the squared entries of all rows that a query and its candidates
        read, and of what vectors come to there."""
        ...

    def finite(self, leaves: Leaves) -> dict[str, Bool[Array, ""]]:
        """Per table: whether every row that was read is finite."""
        ...

    def write(
        self,
        state: Tables,
        slots: Tables,
        context: Context,
        reads: Reads,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The tables and slots after one update of every row that was read."""
        ...


@dataclasses.dataclass(frozen=True)
class RowAccess:
    """Leaves: {"rows": {(name, side): {table: rows}}, "whole": {table: all rows}}.

    Attributes:
      native: whether CPU kernels read and write rows.
      vector_l2: what the squares of what vectors come to are multiplied with.
    """

    backbone: AnyBackbone
    optimizer: RowOptimizer
    layout: Layout
    native: bool
    vector_l2: float = 1.0

    def _whole(self, reads: Reads) -> frozenset[str]:
        backbone = self.backbone
        if isinstance(backbone, DotBackbone) and backbone.whole:
            return frozenset(backbone.tables)
        added = feature_tables(backbone)
        named = reads.whole | {added[name] for name in reads.whole if name in added}
        return named & frozenset(backbone.tables)

    def _whole_vectors(self, context: Context, reads: Reads) -> dict[str, jax.Array]:
        """Name -> stored vectors of every row, where the loss needs every row."""
        backbone = self.backbone
        whole = isinstance(backbone, DotBackbone) and backbone.whole
        return {
            name: embedding_table.every_row(
                context.vectors_of(adapter.side), adapter.stored, self.layout
            )
            for name, adapter in adapters.of(backbone).items()
            if whole or name in reads.whole
        }

    def _ids(self, context: Context, reads: Reads) -> dict[str, Ids]:
        """Every group of ids of trained rows by name, with those of features added to them."""
        groups, added = self._named_ids(context, reads), feature_tables(self.backbone)
        tables = self.backbone.tables
        return {
            group: {
                **{name: ids for name, ids in by_table.items() if name in tables},
                **{
                    added[name]: _slots(context, name).rows[ids]
                    for name, ids in by_table.items()
                    if name in added
                },
            }
            for group, by_table in groups.items()
        }

    def _named_ids(self, context: Context, reads: Reads) -> dict[str, Ids]:
        """Every group of ids that the backbone names; sides of candidates as `name/side`."""
        groups = dict(reads.rows)
        for name, candidates in reads.candidates.items():
            for side, ids in candidate_ids(self.backbone, context, candidates).items():
                groups[f"{name}/{side}"] = ids
        return groups

    def ids_by_table(self, context: Context, reads: Reads) -> dict[str, list[Int[Array, "..."]]]:
        """By table: the ids of all rows that are read, repeats too; each row of whole tables."""
        specs = self.backbone.tables
        by_table = {name: [jnp.arange(specs[name].rows)] for name in sorted(self._whole(reads))}
        whole = frozenset(by_table)
        for group in self._ids(context, reads).values():
            for name, ids in group.items():
                if name not in whole:
                    by_table.setdefault(name, []).append(ids)
        return by_table

    def read(self, state: Tables, context: Context, reads: Reads) -> Leaves:
        whole, specs = self._whole(reads), self.backbone.tables
        ids = self._ids(context, reads)
        return {
            "whole": {
                name: embedding_table.every_row(state[name], specs[name], self.layout)
                for name in sorted(whole)
            },
            "rows": {
                group: {
                    name: embedding_table.lookup(
                        state[name],
                        wanted,
                        specs[name].width,
                        self.layout,
                        of_users=specs[name].of_users,
                    )
                    for name, wanted in by_table.items()
                    if name not in whole
                }
                for group, by_table in ids.items()
            },
        }

    def view(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        context: Context,
        reads: Reads,
        dropout: Dropout,
        masked: Masked = NOTHING,
    ) -> View:
        values = self._propagated(params, leaves, context, reads, dropout, masked)
        ids = self._named_ids(context, reads)
        rows = self._gathered(leaves["rows"], values, ids)
        for name, feature_table in feature_tables(self.backbone).items():
            if name in values:
                continue  # whole tables have theirs
            slots = _slots(context, name)
            for group, by_table in ids.items():
                if name in by_table:
                    of_slots = leaves["rows"][group][feature_table]
                    added = features_lib.total(slots, by_table[name], of_slots)
                    row = rows[group].get(name)
                    rows[group][name] = added if row is None else row + added
        for group, by_table in ids.items():
            vectors = self._vectors(context, by_table, values)
            rows[group] = adapters.added(self.backbone, params, rows[group], vectors)
        return _RowsView(self.backbone, params, context, reads, rows, values)

    def _vectors(
        self, context: Context, ids: Ids, values: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Name -> stored vectors of a group's ids; not of those in `values`, which have theirs."""
        return {
            name: embedding_table.lookup(
                context.vectors_of(adapter.side), ids[name], adapter.stored.width, self.layout
            )
            for name, adapter in adapters.of(self.backbone).items()
            if name in ids and name not in values
        }

    def _propagated(
        self,
        params: Mapping[str, Any],
        leaves: Leaves,
        context: Context,
        reads: Reads,
        dropout: Dropout,
        masked: Masked,
    ) -> Mapping[str, jax.Array]:
        backbone = self.backbone
        values = with_features_added(backbone, leaves["whole"], context)
        vectors = self._whole_vectors(context, reads)
        values = adapters.added_to_all(backbone, params, values, vectors, context.neighbours)
        for name, (ids, instead) in masked.items():
            values[name] = values[name].at[ids].set(instead)
        if isinstance(backbone, DotBackbone) and backbone.whole:
            return backbone.propagate(params, values, context, dropout=dropout)
        return values

    def _gathered(
        self,
        rows: Mapping[str, Mapping[str, jax.Array]],
        values: Mapping[str, jax.Array],
        ids: Mapping[str, Ids],
    ) -> dict[str, dict[str, jax.Array]]:
        """Rows of every group, those of whole tables gathered out of `values`."""

        def gather(name: str, wanted: jax.Array) -> jax.Array:
            return values[name].at[wanted].get(mode="promise_in_bounds")

        return {
            group: {
                name: gather(name, wanted) if name in values else rows[group][name]
                for name, wanted in by_table.items()
                if name in values or name in rows[group]
            }
            for group, by_table in ids.items()
        }

    def squares(
        self, params: Mapping[str, Any], leaves: Leaves, context: Context, reads: Reads
    ) -> dict[str, jax.Array]:
        ids = self._ids(context, reads)
        rows = self._gathered(leaves["rows"], leaves["whole"], ids)
        totals: dict[str, jax.Array] = {}
        for group, by_table in rows.items():
            name = group.split("/")[0]
            for part in _used_slots(by_table, ids[group], context).values():
                squares = jnp.sum(jnp.square(part.reshape(part.shape[0], -1)), axis=1)
                totals[name] = totals[name] + squares if name in totals else squares
        adapted = adapters.of(self.backbone).items()
        free = {name: adapter for name, adapter in adapted if not adapter.penalised}
        for group, named in self._named_ids(context, reads).items():
            vectors = self._vectors(context, named, free)
            made = adapters.added(self.backbone, params, {}, vectors)
            name = group.split("/")[0]
            for part in made.values():
                squares = jnp.sum(jnp.square(part.reshape(part.shape[0], -1)), axis=1)
                squares = np.float32(self.vector_l2) * squares
                totals[name] = totals[name] + squares if name in totals else squares
        return totals

    def finite(self, leaves: Leaves) -> dict[str, jax.Array]:
        squares: dict[str, list[jax.Array]] = {name: [] for name in self.backbone.tables}
        for by_table in (leaves["whole"], *leaves["rows"].values()):
            for name, rows in by_table.items():
                squares[name].append(jnp.sum(jnp.square(rows)))
        return {
            name: jnp.isfinite(jnp.sum(jnp.stack(sums))) if sums else jnp.bool_(True)
            for name, sums in squares.items()
        }

    def write(
        self,
        state: Tables,
        slots: Tables,
        context: Context,
        reads: Reads,
        gradient: Leaves,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        ids = self._ids(context, reads)
        new_tables, new_slots = dict(state), dict(slots)
        rounding = embedding_table.rounding(key, self.backbone.tables)
        for name, spec in self.backbone.tables.items():
            if name in gradient["whole"]:
                whole = gradient["whole"][name]
                new_tables[name] = embedding_table.update_every_row(
                    state[name],
                    whole,
                    self.optimizer,
                    self.layout,
                    rounding[name],
                    of_users=spec.of_users,
                )
                continue
            groups = [group for group, by_table in ids.items() if name in by_table]
            if not groups:
                continue
            flat = [ids[group][name].reshape(-1) for group in groups]
            grads = [gradient["rows"][group][name].reshape(-1, spec.width) for group in groups]
            new_tables[name], new_slots[name] = embedding_table.update(
                state[name],
                slots[name],
                jnp.concatenate(flat),
                jnp.concatenate(grads),
                self.optimizer,
                self.layout,
                rounding[name],
                of_users=spec.of_users,
                native=self.native,
            )
        return new_tables, new_slots


def _slots(context: Context, table: str) -> FeatureSlots:
    """The slots of the features of a table's rows, which the context has where they are read."""
    slots = None if context.features is None else context.features.slots(table)
    assert slots is not None, f"the backbone reads features of {table}"
    return slots


def _used_slots(
    rows: Mapping[str, jax.Array], ids: Ids, context: Context
) -> Mapping[str, jax.Array]:
    """Rows by table, 0 in the slots of features that are not used."""
    if context.features is None:
        return rows
    out = dict(rows)
    for table, feature_table in features_lib.TABLES.items():
        slots = context.features.slots(table)
        if slots is not None and feature_table in rows:
            used = features_lib.is_used(slots, ids[feature_table])
            out[feature_table] = jnp.where(used[..., None], rows[feature_table], 0.0)
    return out


def _sides(
    groups: Mapping[str, Mapping[str, jax.Array]], name: str
) -> dict[str, dict[str, jax.Array]]:
    return {
        group.split("/")[1]: dict(rows)
        for group, rows in groups.items()
        if group.startswith(f"{name}/")
    }


@dataclasses.dataclass(frozen=True)
class _RowsView:
    backbone: AnyBackbone
    params: Mapping[str, Any]
    context: Context
    reads: Reads
    groups: Mapping[str, Mapping[str, jax.Array]]
    values: Mapping[str, jax.Array]

    def scores(self, name: str, dropout: Dropout) -> jax.Array:
        sides, candidates = _sides(self.groups, name), self.reads.candidates[name]
        return candidate_scores(
            self.backbone, self.params, sides, self.context, candidates, dropout
        )

    def vectors(self, name: str, dropout: Dropout) -> Vectors:
        sides, candidates = _sides(self.groups, name), self.reads.candidates[name]
        assert isinstance(self.backbone, DotBackbone), "only a dot product has vectors"
        return candidate_vectors(
            self.backbone, self.params, sides, self.context, candidates, dropout
        )

    def pair_vectors(self, name: str, dropout: Dropout) -> jax.Array:
        sides, candidates = _sides(self.groups, name), self.reads.candidates[name]
        assert isinstance(self.backbone, PairBackbone), "its network leaves no vectors"
        return pair_vectors(self.backbone, self.params, sides, self.context, candidates, dropout)

    def lost(self, name: str) -> jax.Array:
        sides, candidates = _sides(self.groups, name), self.reads.candidates[name]
        assert isinstance(self.backbone, LosesBeside), "it loses nothing by itself"
        return candidate_losses(self.backbone, self.params, sides, self.context, candidates)

    def rows(self, name: str) -> Mapping[str, jax.Array]:
        return self.groups[name]

    def table(self, name: str) -> jax.Array:
        return self.values[name]
