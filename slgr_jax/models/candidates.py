"""What is scored: queries with candidates, as scores or as the vectors that these come from.

Shape letters: N queries, C candidates of a query, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.models.backbones.base import (
    AnyBackbone,
    DotBackbone,
    Dropout,
    Ids,
    LosesBeside,
    PairBackbone,
    dots,
)
from slgr_jax.sampling.context import Context, Queries


@struct.dataclass
class Candidates:
    """Queries [N] and candidates [N, C] whose scores the loss needs."""

    queries: Queries
    items: Int[Array, "N C"]


class Vectors(NamedTuple):
    """What scores are the dot products of: queries and their candidates."""

    queries: Float[Array, "N E"]
    items: Float[Array, "N C E"]


def candidate_ids(
    backbone: AnyBackbone, context: Context, candidates: Candidates
) -> dict[str, Ids]:
    """The rows that scoring candidates reads: those of the query's side, of the item's, or of
    both."""
    if isinstance(backbone, DotBackbone):
        return {
            "query": backbone.query_ids(context, candidates.queries),
            "item": backbone.item_ids(context, candidates.items),
        }
    return {"both": backbone.ids(context, candidates.queries, candidates.items)}


def candidate_vectors(
    backbone: DotBackbone,
    params: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, jax.Array]],
    context: Context,
    candidates: Candidates,
    dropout: Dropout,
) -> Vectors:
    """The vectors of candidates from the rows that `candidate_ids` names."""
    states = backbone.query_vectors(
        params, rows["query"], context, candidates.queries, dropout=dropout
    )
    return Vectors(states, backbone.item_vectors(params, rows["item"]))


def pair_vectors(
    backbone: PairBackbone,
    params: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, jax.Array]],
    context: Context,
    candidates: Candidates,
    dropout: Dropout,
) -> Float[Array, "N C E"]:
    """What the logits of candidates are a linear function of, from the same rows."""
    return backbone.pair_vectors(
        params, rows["both"], context, candidates.queries, candidates.items, dropout=dropout
    )


def candidate_losses(
    backbone: LosesBeside,
    params: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, jax.Array]],
    context: Context,
    candidates: Candidates,
) -> Float[Array, "N C"]:
    """What the backbone loses by itself on candidates, from the same rows."""
    return backbone.lost(params, rows["both"], context, candidates.queries, candidates.items)


def candidate_scores(
    backbone: AnyBackbone,
    params: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, jax.Array]],
    context: Context,
    candidates: Candidates,
    dropout: Dropout,
) -> Float[Array, "N C"]:
    """Logits of candidates from the rows that `candidate_ids` names."""
    if isinstance(backbone, DotBackbone):
        return dots(*candidate_vectors(backbone, params, rows, context, candidates, dropout))
    return backbone.score(
        params, rows["both"], context, candidates.queries, candidates.items, dropout=dropout
    )
