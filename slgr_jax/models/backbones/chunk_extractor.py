"""A KSER-style extractor: which chunks of a text matter to a query, and where they enter it.

Of the chunks k_fc of the fields f of a text, a query q, and a recommender's fields X:

    k~_fc = LN(W_p k_fc)
    a_fc  = softmax over the chunks c of f of MLP([k~_fc ; q])          which chunks
    r_f   = sigmoid(MLP([sum_c a_fc k~_fc ; q])) sum_c a_fc k~_fc       how much of the field
    Z     = softmax((X W_Q) (R W_K)' / sqrt(d)) R W_V W_O               attention over all r_f

and X + Z goes on in place of X. W_O begins with zeros, so that a model begins as it would be
without texts. A chunk that is not there has weight 0, a field without chunks no part in R, and
Z = 0 where R is empty.

After KSER (arXiv 2508.07223), of which only the abstract could be read: it names a selection
network over chunks, a field at a time, and an attention that aligns what is selected with the
recommender's features. **The equations are ours**; nothing of it is reproduced.

Shape letters: S slots of a row (all fields' chunks), Z numbers of a vector, D width d, F fields,
Q numbers of a query, T fields of the recommender, H width of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_EPSILON = 1e-6  # beside a variance, of which a missing chunk has none


def init_selection(
    key: jax.Array, *, vectors: int, width: int, query: int, hidden: Sequence[int]
) -> dict[str, Any]:
    """Fresh parameters of W_p and of both perceptrons of a side.

    Args:
      vectors, width, query: Z, D and Q.
      hidden: widths of the perceptrons' hidden layers, at least one.
    """
    for_map, for_chunks, for_fields = jax.random.split(key, 3)
    return {
        "map": jax.random.normal(for_map, (vectors, width)) / np.float32(np.sqrt(vectors)),
        "chunk": _init_perceptron(for_chunks, width + query, hidden),
        "field": _init_perceptron(for_fields, width + query, hidden),
    }


def init_alignment(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Fresh W_Q, W_K, W_V, and a W_O of zeros."""
    std = np.float32(1 / np.sqrt(width))
    drawn = std * jax.random.normal(key, (3, width, width))
    return {
        **dict(zip(("query", "key", "value"), drawn, strict=True)),
        "output": jnp.zeros((width, width)),
    }


def _init_perceptron(key: jax.Array, inputs: int, hidden: Sequence[int]) -> dict[str, Any]:
    """Weights ~ N(0, 2 / inputs) before a relu, N(0, 1 / inputs) of the last layer; biases 0."""
    layers = {}
    sizes = zip((inputs, *hidden), (*hidden, 1), strict=True)
    for number, (above, below) in enumerate(sizes):
        gain = 1.0 if number == len(hidden) else 2.0
        drawn = jax.random.normal(jax.random.fold_in(key, number), (above, below))
        std = np.float32(np.sqrt(gain / above))
        layers[f"layer_{number}"] = {"kernel": std * drawn, "bias": jnp.zeros(below)}
    return layers


def mapped(params: Mapping[str, Any], stored: Float[Array, "... S Z1"]) -> Float[Array, "... S D1"]:
    """k~ of stored chunks and, behind it, 1 where there is a chunk; zeros where there is none.

    Args:
      params: as of `init_selection`.
      stored: Z numbers, then 1, or 0 where a slot holds no chunk.
    """
    vectors, has = stored[..., :-1], stored[..., -1:]
    x = jnp.dot(vectors, params["map"])
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)
    return jnp.concatenate([x * has, has], axis=-1)


def selected(
    params: Mapping[str, Any],
    chunks: Float[Array, "... S D1"],
    query: Float[Array, "... Q"],
    fields: Sequence[int],
) -> tuple[Float[Array, "... F D"], Bool[Array, "... F"]]:
    """r_f of every field, and which fields have a chunk.

    Args:
      params: as of `init_selection`.
      chunks: as of `mapped`; leading axes broadcast with the query's.
      query: q.
      fields: [F] how many slots each field has, in the order of the slots.
    """
    values, real = chunks[..., :-1], chunks[..., -1] > 0
    logits = _perceptron(params["chunk"], values, query)
    pooled, has = [], []
    begin = 0
    for count in fields:
        slots = slice(begin, begin + count)
        begin += count
        weights = _masked_softmax(logits[..., slots], real[..., slots])
        pooled.append(jnp.einsum("...s,...sd->...d", weights, values[..., slots, :]))
        has.append(jnp.any(real[..., slots], axis=-1))
    of_fields = jnp.stack(pooled, axis=-2)
    share = jax.nn.sigmoid(_perceptron(params["field"], of_fields, query))
    present = jnp.broadcast_to(jnp.stack(has, axis=-1), of_fields.shape[:-1])
    return share[..., None] * of_fields, present


def aligned(
    params: Mapping[str, jax.Array],
    x: Float[Array, "... T D"],
    of_fields: Float[Array, "... F D"],
    present: Bool[Array, "... F"],
) -> Float[Array, "... T D"]:
    """Z of the recommender's fields X; zeros where no field is present.

    Args:
      params: as of `init_alignment`.
      of_fields, present: as of `selected`, all sides' fields in a row.
    """
    asked, keys = jnp.dot(x, params["query"]), jnp.dot(of_fields, params["key"])
    logits = jnp.einsum("...td,...fd->...tf", asked, keys) * np.float32(x.shape[-1] ** -0.5)
    weights = _masked_softmax(logits, present[..., None, :])
    mixed = jnp.einsum("...tf,...fd->...td", weights, jnp.dot(of_fields, params["value"]))
    return jnp.dot(mixed, params["output"])


def _perceptron(
    layers: Mapping[str, Any], values: Float[Array, "... S D"], query: Float[Array, "... Q"]
) -> Float[Array, "... S"]:
    """MLP([value ; q]) of every value, the query's part of the first layer once a query."""
    width = values.shape[-1]
    first = layers["layer_0"]
    of_query = _biased(jnp.dot(query, first["kernel"][width:]), first["bias"])
    x = jnp.dot(values, first["kernel"][:width]) + of_query[..., None, :]
    for number in range(1, len(layers)):
        layer = layers[f"layer_{number}"]
        x = _biased(jnp.dot(jax.nn.relu(x), layer["kernel"]), layer["bias"])
    return x[..., 0]


def _biased(x: Float[Array, "... H"], bias: Float[Array, "H"]) -> Float[Array, "... H"]:
    return x + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


def _masked_softmax(
    logits: Float[Array, "... K"], real: Bool[Array, "... K"]
) -> Float[Array, "... K"]:
    """Softmax over the last axis of what is real; zeros where nothing is, and no NaN."""
    logits = jnp.where(real, logits, np.finfo(np.float32).min)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(real, jnp.exp(logits - top), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), np.float32(1e-30))
