"""The one protocol every recommender follows.

Shape letters: B batch, C candidates per user, D width, U users, I items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from slgr_jax.tables import Rows, TableSpec


@dataclasses.dataclass(frozen=True)
class FactorModel:
    """A backbone whose score is a dot product of two rows: s_ui = p_u . q_i, nothing else.

    Attributes:
      user_table, item_table: whose rows, of the same width, p_u and q_i are.
      unit: the last entry of p_u counts as 1, so that the last of q_i is the item's bias.
    """

    user_table: str
    item_table: str
    unit: bool


class Backbone(Protocol):
    """A recommender as pure functions; its tables and parameters live in the train state."""

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """Name -> size of each embedding table."""
        ...

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        """The dense parameters (a Flax `params` collection; {} where there are none)."""
        ...

    def ids(
        self, users: Int[Array, "B"], items: Int[Array, "B C"]
    ) -> Mapping[str, Int[Array, "..."]]:
        """Table name -> ids of the rows that scoring (users, items) reads, any shape."""
        ...

    def score(
        self,
        params: Mapping[str, Any],
        rows: Rows,
        users: Int[Array, "B"],
        items: Int[Array, "B C"],
        *,
        dropout: tuple[float, jax.Array] | None = None,
    ) -> Float[Array, "B C"]:
        """Logits of the candidates.

        Args:
          params: what `init` made.
          rows: table name -> values [*ids.shape, D] of the rows that `ids` names.
          dropout: (rate, key) for a stochastic pass; None for a deterministic one.
        """
        ...

    @property
    def dropout(self) -> float:
        """The dropout rate of a training pass; 0 for none."""
        ...

    @property
    def factor_model(self) -> FactorModel | None:
        """How to score without writing rows out, where a deterministic score is a dot product."""
        ...

    def factors(
        self, params: Mapping[str, Any], values: Mapping[str, Float[Array, "R D"]]
    ) -> tuple[Float[Array, "U E"], Float[Array, "I E"]]:
        """User and item vectors whose dot product is `score`, for full ranking and export."""
        ...
