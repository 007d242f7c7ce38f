"""Examples in context: LLM-CF (CIKM 2024, arXiv 2403.17688) around any click model.

Beside each row (query, candidate) stand K = 2 k training rows with their labels and what an LLM
reasoned about them, found by `sampling.examples`. A transformer over

    x = [f(F_1), g(c_1), y_1,  ...,  f(F_K), g(c_K), y_K,  f(F)]              3 K + 1 tokens

is causal; its last state is one more field of the click model. F are the fields of a row, of an
example as of its own moment; c its reasoning; f and g perceptrons with one hidden layer, 128 and
256 wide; y a learned vector of each label. Of each of its layers, with n = RMSNorm,

    x <- x + W_O Attention(R W_Q n(x), R W_K n(x), W_V n(x))     R turns pairs of numbers
    x <- x + W_3 (silu(W_1 n(x)) * W_2 n(x))                     SwiGLU

and a norm at the end. Beside the click model's own loss a row has, weighed,

    mean over its examples of 1 - cos(Dec(h), c)                    h: the state at the reasoning

Where a row has fewer examples than K, nobody sees the others. Without reasoning c = 0, and only the
examples' rows and labels say something: what similar rows did, a feature that needs no LLM.

Shape letters: N queries, C candidates, k examples of a label, K of both, F fields of a row, D
width, R of a reasoning, T tokens, H heads, M example rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import ExampleConfig
from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import adapters
from slgr_jax.models.backbones.attention import mixed_by_heads
from slgr_jax.models.backbones.base import Dropout, Ids, Params, TableRows, unit_rows
from slgr_jax.models.backbones.click import ClickModel
from slgr_jax.sampling import examples as examples_lib
from slgr_jax.sampling.context import HISTORY, Context, ExampleSizes, Queries, recent
from slgr_jax.sampling.features import TABLES

IN_CONTEXT = "in_context"  # of the parameters, what is beside the click model's
_HIDDEN_OF_FIELDS, _HIDDEN_OF_REASONING = 128, 256
_BASE = 10_000.0  # of the angles by which places turn
# The tables that a row reads once a query, not once a candidate or event.
_OF_QUERY = ("user", TABLES["user"], TABLES["interaction"], adapters.FIELDS["user"])


def turned(x: Float[Array, "M T H E"]) -> Float[Array, "M T H E"]:
    """Number j and number j + E/2 of place t as a point, turned by t BASE^(-2 j / E) (RoPE, Su et
    al. 2021)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * _BASE ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Layer(nn.Module):
    """One layer of the module's docstring; the inner width is 8/3 D, as LLaMA's.

    Attributes:
      heads: H.
    """

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "M T D"], visible: Bool[Array, "M T T"]
    ) -> Float[Array, "M T D"]:
        dim = x.shape[-1]

        def mapped(name: str, x: jax.Array, width: int) -> jax.Array:
            return nn.Dense(width, use_bias=False, name=name)(x)

        normed = nn.RMSNorm(name="attention_norm")(x)
        asks, keys, values = (
            mapped(name, normed, dim).reshape(*x.shape[:2], self.heads, dim // self.heads)
            for name in ("query", "key", "value")
        )
        mixed = mixed_by_heads(turned(asks), turned(keys), values, visible)
        x = x + mapped("attended", mixed, dim)
        normed, inner = nn.RMSNorm(name="forward_norm")(x), -(-8 * dim // 3)
        gated = jax.nn.silu(mapped("gate", normed, inner)) * mapped("inner", normed, inner)
        return x + mapped("outer", gated, dim)


class Perceptron(nn.Module):
    """One hidden layer with a ReLU.

    Attributes:
      hidden, width: of the layer, of what comes out.
    """

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*N A"]) -> Float[Array, "*N B"]:
        return nn.Dense(self.width, name="out")(jax.nn.relu(nn.Dense(self.hidden, name="in")(x)))


class Read(NamedTuple):
    """What the network makes of rows and their examples.

    Attributes:
      state: [M, D] the last state.
      lost: [M] mean over the examples of 1 - cos(Dec(h), c); 0 of a row without examples.
    """

    state: Float[Array, "M D"]
    lost: Float[Array, "M"]


class ExampleReader(nn.Module):
    """The transformer of the module's docstring.

    Attributes:
      dim, layers, heads: D, its depth, H.
    """

    dim: int
    layers: int
    heads: int

    @nn.compact
    def __call__(
        self,
        fields: Float[Array, "M A"],
        examples: Float[Array, "M K A"],
        reasoning: Float[Array, "M K R"],
        labels: Int[Array, "K"],
        real: Bool[Array, "M K"],
    ) -> Read:
        """Read rows beside their examples.

        Args:
          fields: of each row, side by side; examples: of its examples.
          labels: 0 or 1, of each place.
          real: which examples there are.
        """
        of_fields = Perceptron(_HIDDEN_OF_FIELDS, self.dim, name="fields")
        of_reasoning = Perceptron(_HIDDEN_OF_REASONING, self.dim, name="reasoning")
        rows, count = real.shape
        drawn = nn.initializers.normal(0.02)
        named = self.param("labels", drawn, (2, self.dim))[labels]
        named = jnp.broadcast_to(named, (rows, count, self.dim))
        tokens = jnp.stack([of_fields(examples), of_reasoning(reasoning), named], axis=2)
        tokens = tokens.reshape(rows, 3 * count, self.dim)
        x = jnp.concatenate([tokens, of_fields(fields)[:, None]], axis=1)

        there = jnp.concatenate([jnp.repeat(real, 3, axis=1), jnp.ones((rows, 1), bool)], axis=1)
        visible = there[:, None, :] & jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        for number in range(self.layers):
            x = Layer(self.heads, name=f"layer_{number}")(x, visible)
        x = nn.RMSNorm(name="norm")(x)

        decoder = Perceptron(_HIDDEN_OF_REASONING, reasoning.shape[-1], name="decoder")
        again = decoder(x[:, 1 : 3 * count : 3])
        lost = 1.0 - jnp.sum(unit_rows(again) * unit_rows(reasoning), axis=-1)
        lost = jnp.sum(jnp.where(real, lost, 0.0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        return Read(x[:, -1], lost)


class InContext:
    """A click model with examples beside each row; see the module's docstring.

    Attributes:
      lost_weight: what the loss of reasoning made again is multiplied with; 0: there is none.
    """

    vector_fields = True

    def __init__(self, model: ClickModel, sizes: ExampleSizes, knobs: ExampleConfig, length: int):
        self._model, self._sizes, self._count = model, sizes, knobs.per_label
        self._length = length
        self.tables, self.adapters, self.dropout = model.tables, model.adapters, model.dropout
        self.reads = model.reads | ({HISTORY} if sizes.timed else frozenset())
        self.lost_weight = knobs.reconstruction if knobs.reasoning and sizes.width > 1 else 0.0
        self._dim, self._fields = model.dim, model.fields
        self._reader = ExampleReader(self._dim, knobs.layers, knobs.heads)

    @property
    def _labels(self) -> Int[Array, "K"]:
        return jnp.repeat(jnp.array([1, 0]), self._count)

    def init(self, key: jax.Array) -> Params:
        fields = jnp.zeros((1, self._fields * self._dim))
        of_examples = jnp.zeros((1, 2 * self._count, fields.shape[1]))
        reasoning = jnp.zeros((1, 2 * self._count, self._sizes.width))
        real = jnp.ones(reasoning.shape[:2], bool)
        given = fields, of_examples, reasoning, self._labels, real
        reader = self._reader.init(jax.random.fold_in(key, 1), *given)
        return {**self._model.init(key), IN_CONTEXT: reader["params"]}

    def pair_width(self) -> int:
        """See `PairBackbone.pair_width`."""
        return self._model.pair_width()

    # ------------------------------------------------------------------------------- examples

    def found(
        self, context: Context, queries: Queries, items: Int[Array, "N C"]
    ) -> examples_lib.Found:
        """The examples beside each pair."""
        examples, histories = context.examples, context.histories
        assert examples is not None, "the run has examples"
        as_of = queries.as_of if self._sizes.timed else None
        if as_of is None:
            of_histories = jnp.zeros((items.shape[0], examples.vectors.shape[1]))
        else:
            assert histories is not None, "rows with moments have histories"
            events, real = recent(histories, queries, self._length)
            of_histories = examples_lib.history_vectors(examples.vectors, events, real)
        asking = queries.users, items, as_of, of_histories
        return examples_lib.find(examples, *asking, self._count)

    def _as_queries(self, found: examples_lib.Found) -> tuple[Queries, Int[Array, "M 1"]]:
        """Examples as queries with one candidate each, M = N C K."""
        as_of = None if found.as_of is None else found.as_of.reshape(-1)
        return Queries(found.users.reshape(-1), as_of), found.items.reshape(-1, 1)

    def ids(self, context: Context, queries: Queries, items: Int[Array, "N C"]) -> Ids:
        """As of the click model, [N, ...], each followed by those of the row's examples."""
        own = self._model.ids(context, queries, items)
        of_examples = self._model.ids(
            context, *self._as_queries(self.found(context, queries, items))
        )
        return {
            name: jnp.concatenate([_by_query(name, ids, len(items)) for ids in both], axis=1)
            for name, both in ((name, (own[name], of_examples[name])) for name in own)
        }

    def _split(
        self, rows: TableRows, context: Context, queries: Queries, items: Int[Array, "N C"]
    ) -> tuple[TableRows, TableRows]:
        """Rows of the pairs, and of their examples, as the click model names them."""
        own_ids = jax.eval_shape(lambda: self._model.ids(context, queries, items))
        own, of_examples, count = {}, {}, items.size * 2 * self._count
        for name, both in rows.items():
            ids = own_ids[name]
            listed = 1 if name in _OF_QUERY else ids.shape[1]
            rest = both.shape[2:]
            own[name] = both[:, :listed].reshape(*ids.shape, both.shape[-1])
            others = both[:, listed:]
            shape = (count,) if name in _OF_QUERY else (count, -1)
            of_examples[name] = others.reshape(*shape, *rest)
        return own, of_examples

    def _read(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
    ) -> tuple[TableRows, Read]:
        """The rows of the pairs, and what stands beside each."""
        own, of_examples = self._split(rows, context, queries, items)
        found, pairs = self.found(context, queries, items), items.size
        others = self._model.pair_fields(of_examples, context, *self._as_queries(found))
        fields = self._model.pair_fields(own, context, queries, items)
        read: Any = self._reader.apply(
            {"params": params[IN_CONTEXT]},
            fields.reshape(pairs, -1),
            others.reshape(pairs, 2 * self._count, -1),
            found.reasoning.reshape(pairs, 2 * self._count, -1),
            self._labels,
            found.real.reshape(pairs, -1),
        )
        return own, read

    # -------------------------------------------------------------------------------- scores

    def score(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout = None,
    ) -> Float[Array, "N C"]:
        """See `JointBackbone.score`."""
        own, read = self._read(params, rows, context, queries, items)
        beside = read.state.reshape(*items.shape, -1)
        given = own, context, queries, items
        return self._model.score(params, *given, dropout=dropout, beside=beside)

    def pair_vectors(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
        *,
        dropout: Dropout = None,
    ) -> Float[Array, "N C E"]:
        """See `PairBackbone.pair_vectors`."""
        own, read = self._read(params, rows, context, queries, items)
        beside = read.state.reshape(*items.shape, -1)
        given = own, context, queries, items
        return self._model.pair_vectors(params, *given, dropout=dropout, beside=beside)

    def lost(
        self,
        params: Params,
        rows: TableRows,
        context: Context,
        queries: Queries,
        items: Int[Array, "N C"],
    ) -> Float[Array, "N C"]:
        """See `LosesBeside.lost`."""
        return self._read(params, rows, context, queries, items)[1].lost.reshape(items.shape)


def _by_query(name: str, ids: Int[Array, "..."], queries: int) -> Int[Array, "N X ..."]:
    """Ids with those of each query in one axis."""
    rest = ids.shape[1:] if name in _OF_QUERY else ids.shape[2:]
    return ids.reshape(queries, -1, *rest)


def with_examples(
    backbone: Any, sizes: ExampleSizes, knobs: ExampleConfig, length: int
) -> InContext:
    """A click model that reads examples beside its fields.

    Args:
      length: L, events of a history that examples are found by.

    Raises:
      ConfigError: it is no click model.
    """
    if not isinstance(backbone, ClickModel):
        raise ConfigError(
            f"--examples={knobs.product} are beside the fields of a click model, and "
            f"{type(backbone).__name__} has none; use --backbone=dcnv2 or another, or drop it"
        )
    return InContext(backbone, sizes, knobs, length)
