"""The scorer of a run as StableHLO (`jax.export`): runs without this package, on any platform.

Two programs of a batch of any size, whose tables and parameters are their first argument:

    scores(weights, *queries, items)  -> logits
    top_k(weights, *queries, exclude) -> items, logits

What stands for a query depends on the backbone. mf and LightGCN, and click models, which look up
their history in the weights: `users` [n] int32, indices. Sequence models: `histories` [n, L] int32,
the latest L item indices, oldest first, -1 in front of a shorter one; so they serve users that
training never saw. Those with vectors of users (--user_fusion) take `users` [n] behind them,
indices, -1 for one without a vector. `items` is [n] int32, `exclude` [n, m] int32 item indices not
to list, m >= 1, -1 for none.

Only XLA operations are inside, no kernel of this package.

Shape letters: n queries, L history length, m excluded items, I items, K cut-off.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int

from slgr_jax.models.backbones import AnyBackbone, DotBackbone
from slgr_jax.models.backbones.base import (
    USER,
    FusesUsers,
    JointBackbone,
    SequenceBackbone,
    dots,
)
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import (
    Scoring,
    catalogue_vectors,
    pair_scores,
    query_vectors,
    rows_of,
    score_users,
)
from slgr_jax.sampling.context import Histories, Queries

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

PLATFORMS = ("cpu", "cuda", "tpu")
_SOURCE_LINES = "jax_traceback_in_locations_limit"  # of jax.config
Weights = dict[str, Any]
Program = Callable[..., Any]


class Exported(NamedTuple):
    """A scorer to be written.

    Attributes:
      weights: the first argument of each program.
      programs: name -> serialized StableHLO.
      signatures: name -> {"inputs": {name: type}, "outputs": {name: type}}, weights left out.
    """

    weights: dict[str, np.ndarray]
    programs: dict[str, bytes]
    signatures: dict[str, dict[str, dict[str, str]]]


def export_scorer(run: TrainedRun, k: int) -> Exported:
    """The programs `scores` and `top_k`, as of the end of validation; no device of a platform is
    needed.

    Args:
      k: K; the catalogue's size where that is smaller.
    """
    backbone, scoring = run.restored.backbone, _served(run)
    k = min(k, run.dataset.n_items)
    named, structure = jax.tree_util.tree_flatten_with_path(scoring)
    weights = {
        "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path): leaf
        for path, leaf in named
    }
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in weights.items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}

    def with_weights(program: Program) -> Program:
        def call(weights: Weights, *rest: jax.Array) -> Any:
            leaves = [weights[name] for name in shapes]
            return program(jax.tree_util.tree_unflatten(structure, leaves), *rest)

        return call

    n, m = export.symbolic_shape("n, m")
    query: dict[str, tuple[Any, ...]] = {"users": (n,)}
    if isinstance(backbone, SequenceBackbone):
        query = {"histories": (n, backbone.length)} | (query if _fuses(backbone) else {})
    pairs, lists = query | {"items": (n,)}, query | {"exclude": (n, m)}
    listed = {
        "items": f"int32 [n, {k}], best first, -1 past the last",
        "scores": f"float32 [n, {k}]",
    }
    programs, signatures = {}, {}
    for name, program, inputs, outputs in (
        ("scores", scores_of(backbone), pairs, {"scores": "float32 [n]"}),
        ("top_k", top_k_of(backbone, k), lists, listed),
    ):
        specs = [jax.ShapeDtypeStruct(shape, np.int32) for shape in inputs.values()]
        with _without_source_lines():
            export_for = export.export(jax.jit(with_weights(program)), platforms=PLATFORMS)
            programs[name] = bytes(export_for(shapes, *specs).serialize())
        types = {key: f"int32 [{', '.join(map(str, shape))}]" for key, shape in inputs.items()}
        signatures[name] = {"inputs": types, "outputs": outputs}
    return Exported(arrays, programs, signatures)


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Lower without the paths of this machine, which would end up in the file."""
    before = getattr(jax.config, _SOURCE_LINES)
    jax.config.update(_SOURCE_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_SOURCE_LINES, before)


def _served(run: TrainedRun) -> Scoring:
    """What the programs read: no gate, and no histories where these are an argument."""
    scoring = run.whole.restored.scoring("test")
    context, as_of = scoring.context, scoring.as_of
    if isinstance(run.restored.backbone, SequenceBackbone):
        context, as_of = dataclasses.replace(context, histories=None), None
    return Scoring(dataclasses.replace(scoring.serving, guidance={}), context, as_of)


def with_histories(scoring: Scoring, histories: Int[Array, "n L"]) -> tuple[Scoring, Queries]:
    """A scoring that knows users 0 .. n - 1 by their histories, and queries of them all."""
    count, length = histories.shape
    users = jnp.arange(count, dtype=jnp.int32)
    as_of = jnp.sum(histories >= 0, axis=1, dtype=jnp.int32)
    start = users * length + (length - as_of)  # events are the last ones of a row
    offsets = jnp.concatenate([start, jnp.full((1,), count * length, jnp.int32)])
    events = jnp.maximum(histories, 0).reshape(-1)
    known = dataclasses.replace(scoring.context, histories=Histories(offsets, events, as_of))
    return Scoring(scoring.serving, known, as_of), Queries(users, as_of)


def _fuses(backbone: AnyBackbone) -> bool:
    return isinstance(backbone, FusesUsers)


def _asked(backbone: AnyBackbone, scoring: Scoring, *query: jax.Array) -> tuple[Scoring, Queries]:
    """What to score with, and the queries that the arguments of a program stand for."""
    if not isinstance(backbone, SequenceBackbone):
        return scoring, scoring.queries(*query)
    scoring, queries = with_histories(scoring, query[0])
    if _fuses(backbone):
        users, values = query[1], scoring.serving.values
        rows = jnp.where((users >= 0)[:, None], values[USER][jnp.maximum(users, 0)], 0.0)
        serving = dataclasses.replace(scoring.serving, values={**values, USER: rows})
        scoring = dataclasses.replace(scoring, serving=serving)
    return scoring, queries


def scores_of(backbone: AnyBackbone) -> Program:
    """(scoring, *queries, items [n]) -> logits [n]."""

    def by_vectors(scoring: Scoring, *query_and_items: jax.Array) -> Float[Array, "n"]:
        assert isinstance(backbone, DotBackbone)
        *query, items = query_and_items
        scoring, queries = _asked(backbone, scoring, *query)
        rows = rows_of(scoring.serving.values, backbone.item_ids(scoring.context, items))
        vectors = backbone.item_vectors(scoring.serving.params, rows)
        states = query_vectors(backbone, scoring, queries)
        return dots(states, vectors[:, None, :])[:, 0]

    def by_network(scoring: Scoring, users: jax.Array, items: jax.Array) -> Float[Array, "n"]:
        # A pair at a time: networks plan blocks by the number of rows, which is not known here.
        def score(user: jax.Array, item: jax.Array) -> jax.Array:
            candidates = Candidates(scoring.queries(user[None]), item[None, None])
            return pair_scores(backbone, scoring, candidates)[0, 0]

        return jax.vmap(score)(users, items)

    return by_network if isinstance(backbone, JointBackbone) else by_vectors


def top_k_of(backbone: AnyBackbone, k: int) -> Program:
    """(scoring, *queries, exclude [n, m]) -> items [n, K], logits [n, K]; ties by item index."""

    def catalogue(scoring: Scoring, *query: jax.Array) -> Float[Array, "n I"]:
        if not isinstance(backbone, DotBackbone):
            return score_users(backbone)(scoring, *query)
        scoring, queries = _asked(backbone, scoring, *query)
        states = query_vectors(backbone, scoring, queries)
        return states @ catalogue_vectors(backbone, scoring).T

    def top(
        scoring: Scoring, *query_and_exclude: jax.Array
    ) -> tuple[Int[Array, "n K"], Float[Array, "n K"]]:
        *query, exclude = query_and_exclude
        scores = catalogue(scoring, *query)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k tells -0.0 from 0.0
        row = jnp.arange(exclude.shape[0], dtype=jnp.int32)[:, None]
        hidden = jnp.where(exclude < 0, scores.shape[1], exclude)
        scores = scores.at[row, hidden].set(-jnp.inf, mode="drop")
        values, items = jax.lax.top_k(scores, k)
        return jnp.where(values == -jnp.inf, -1, items), values

    return top
