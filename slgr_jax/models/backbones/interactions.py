"""Networks of click prediction: from the embeddings of a row's fields to its logit.

Each takes fields [R, F, D] and gives logits [R]; `Din` keeps the history apart, as it weighs the
events by the candidate. Who asks for `PAIRS` also gets the vector that the logit is a linear
function of. The first-order term of an id is not here but in its row (`click`).
Dropout is that of the perceptron, on the input of each of its layers. There is no batch
normalisation: its running means would be state that is neither a row nor a parameter.

Shape letters: R rows, N queries, C candidates, L events, F fields, T fields of an item, D width
of a field, E = F D or T D, H maps or heads, A attention width, K experts, r low rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from slgr_jax.mesh import part_of_lanes
from slgr_jax.models.backbones.base import Dropout
from slgr_jax.sampling import random_bits

# The collection in which a network leaves [R, E] what its logit is a linear function of.
PAIRS = "pairs"
GLOROT = nn.initializers.glorot_normal()
# Matrices [S, in, out], and [in, S, out], of S layers or experts, each on its own.
GLOROT_STACK = nn.initializers.glorot_normal(in_axis=1, out_axis=2, batch_axis=(0,))
GLOROT_SPLIT = nn.initializers.glorot_normal(in_axis=0, out_axis=2, batch_axis=(1,))


def dropped(x: Float[Array, "R W"], dropout: Dropout, layer: int) -> Float[Array, "R W"]:
    """x with entries set to 0 at the rate of `dropout`, the others divided by what is kept.

    Masks are hashed counters: on CPU, JAX's own generator would cost as much as the network.
    """
    if dropout is None or dropout[0] <= 0.0:
        return x
    rate, key = dropout
    part, _ = part_of_lanes()
    rows = part * x.shape[0] + jnp.arange(x.shape[0], dtype=jnp.int32)
    words = random_bits.of_rows(jax.random.fold_in(key, layer), rows, x.shape[1])
    keep = words >= jnp.uint32(int(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def _leave(module: nn.Module, *parts: Float[Array, "R _"]) -> None:
    """Leave the vector of a pair in `PAIRS`, for who asks."""
    vector = jnp.concatenate(parts, axis=1)
    module.sow(PAIRS, "vector", vector, init_fn=lambda: None, reduce_fn=lambda _, new: new)


class Dice(nn.Module):
    """f(s) = p s + (1 - p) alpha s, p = sigmoid(s), alpha learned per unit from 0.

    DIN (arXiv 1706.06978) eq. 3 without the batch statistics of s, as RecBole has it.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "R W"]) -> Float[Array, "R W"]:
        alpha = self.param("alpha", nn.initializers.zeros, (x.shape[1],))
        p = jax.nn.sigmoid(x)
        return x * (p + (1.0 - p) * alpha[None, :])


class Mlp(nn.Module):
    """Dropout, linear map, ReLU (or Dice) for each width."""

    widths: tuple[int, ...]
    dice: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "R E"], *, dropout: Dropout) -> Float[Array, "R W"]:
        for layer, width in enumerate(self.widths):
            x = nn.Dense(width, kernel_init=GLOROT)(dropped(x, dropout, layer))
            x = Dice()(x) if self.dice else jax.nn.relu(x)
        return x


class DeepFm(nn.Module):
    """DeepFM (arXiv 1703.04247): sum_{f<g} <x_f, x_g> + w . MLP([x_1 .. x_F]) + b.

    The sum over pairs is (|sum_f x_f|^2 - sum_f |x_f|^2) / 2.
    """

    mlp: tuple[int, ...]

    @nn.compact
    def __call__(
        self, fields: Float[Array, "R F D"], *, dropout: Dropout = None
    ) -> Float[Array, "R"]:
        total = jnp.sum(fields, axis=1)
        pairs = 0.5 * (jnp.sum(total * total, axis=1) - jnp.sum(fields * fields, axis=(1, 2)))
        deep = Mlp(self.mlp)(_flat(fields), dropout=dropout)
        _leave(self, 0.5 * (total * total - jnp.sum(fields * fields, axis=1)), deep)
        return pairs + nn.Dense(1, kernel_init=GLOROT)(deep)[:, 0]


# Numbers of the fields (rows times fields times width) of which a CPU makes the products at once:
# a hundred for each. All rows' would be written to memory and read back.
_AT_ONCE = 1 << 14


def _by_chunks(
    network: Callable[[jax.Array], jax.Array], fields: Float[Array, "R F D"]
) -> Float[Array, "R M"]:
    """`network` on a chunk of rows at a time, on a CPU; backward computes a chunk once more."""
    rows, count, width = fields.shape
    chunk = max(1, _AT_ONCE // (count * width))
    if jax.default_backend() != "cpu" or rows <= chunk:
        return network(fields)
    padded = jnp.pad(fields, ((0, -rows % chunk), (0, 0), (0, 0)))
    results = jax.lax.map(jax.checkpoint(network), padded.reshape(-1, chunk, count, width))
    return results.reshape(padded.shape[0], -1)[:rows]


def _compress(
    layers: Sequence[tuple[jax.Array, jax.Array]], fields: Float[Array, "R F D"]
) -> Float[Array, "R M"]:
    """The compressed interaction network's pooled maps; see `XDeepFm`."""
    rows, count, width = fields.shape
    # Maps first, rows and width last: products run along whole vectors, each layer is one
    # matrix product, and halves are slices. Contracting with W before multiplying by X^0
    # would cost as many operations and write H F numbers instead of H/2 F.
    first = jnp.swapaxes(fields, 0, 1).reshape(count, rows * width)
    maps, pooled = first, []
    for layer, (kernel, bias) in enumerate(layers):
        # Products of every map with every field, [H F, R D].
        products = (maps[:, None, :] * first[None, :, :]).reshape(-1, rows * width)
        outputs = jax.nn.relu(kernel.T @ products + bias[:, None])
        cut = 0 if layer == len(layers) - 1 else kernel.shape[1] // 2
        maps = outputs[:cut]
        pooled.append(jnp.sum(outputs[cut:].reshape(-1, rows, width), axis=2))
    return jnp.concatenate(pooled).T


class XDeepFm(nn.Module):
    """xDeepFM (arXiv 1803.05170): a compressed interaction network beside a perceptron.

    Eq. 6, with a bias and ReLU: X^k_h = relu(sum_ij W^k_hij (X^{k-1}_i * X^0_j) + b^k_h), products
    over D entrywise. Of each layer but the last, the first half of the maps feeds the next layer
    and the second half the output (`direct=False` of RecBole); of the last all do. A map's output
    is its sum over D.

    Attributes:
      cin: maps of each layer; even but for the last.
    """

    cin: tuple[int, ...]
    mlp: tuple[int, ...]

    @nn.compact
    def __call__(
        self, fields: Float[Array, "R F D"], *, dropout: Dropout = None
    ) -> Float[Array, "R"]:
        count = fields.shape[1]
        layers, inputs = [], count
        for layer, size in enumerate(self.cin):
            kernel = self.param(f"cin_{layer}", GLOROT, (inputs * count, size))
            layers.append((kernel, self.param(f"cin_bias_{layer}", nn.initializers.zeros, (size,))))
            inputs = size // 2
        compress = functools.partial(_compress, layers)
        compressed = _by_chunks(compress, fields)
        deep = Mlp(self.mlp)(_flat(fields), dropout=dropout)
        _leave(self, compressed, deep)
        scores = nn.Dense(1, use_bias=False, kernel_init=GLOROT, name="cin_head")(compressed)
        return (scores + nn.Dense(1, kernel_init=GLOROT)(deep))[:, 0]


def _attend(
    kernels: Sequence[Float[Array, "... 4 A"]], heads: int, fields: Float[Array, "R F D"]
) -> Float[Array, "R M"]:
    """The fields after self-attention, flat; see `AutoInt`."""
    rows, count, _ = fields.shape
    x = fields
    for kernel in kernels:
        # Query, key, value and residual of all fields in one matrix product.
        width = kernel.shape[2]
        split = (rows, count, heads, width // heads)
        parts = x.reshape(rows * count, -1) @ kernel.reshape(-1, 4 * width)
        query, key, value, residual = jnp.split(parts, 4, axis=1)
        query = query.reshape(split) * np.float32(split[3] ** -0.5)
        key, value = key.reshape(split), value.reshape(split)
        # Sums of products instead of matrix products: a row's matrices have a handful of
        # fields, and on CPU a batched product is a call for each row and head.
        fit = jnp.sum(query[:, :, None] * key[:, None, :], axis=-1)  # [R, F, F, H]
        weights = jax.nn.softmax(fit, axis=2)
        mixed = jnp.sum(weights[..., None] * value[:, None, :], axis=2)
        x = jax.nn.relu(mixed.reshape(rows, count, -1) + residual.reshape(rows, count, -1))
    return _flat(x)


class AutoInt(nn.Module):
    """AutoInt (arXiv 1810.11921): self-attention over the fields, beside a perceptron.

    Eq. 5-8, per layer and head: a_fg = softmax_g(<Q x_f, K x_g> / sqrt(A / H)),
    x_f <- relu([sum_g a_fg V x_g over heads] + W x_f). The scale is not in the paper; it is in
    RecBole. Logit: w . [x_1 .. x_F] + v . MLP(fields) + b.

    Attributes:
      width: A, of all heads together.
    """

    layers: int
    heads: int
    width: int
    mlp: tuple[int, ...]

    @nn.compact
    def __call__(
        self, fields: Float[Array, "R F D"], *, dropout: Dropout = None
    ) -> Float[Array, "R"]:
        kernels, width = [], fields.shape[2]
        for layer in range(self.layers):
            shape = (width, 4, self.width)
            kernels.append(self.param(f"attention_{layer}", GLOROT_SPLIT, shape))
            width = self.width
        x = _attend(kernels, self.heads, fields)
        deep = Mlp(self.mlp)(_flat(fields), dropout=dropout)
        _leave(self, x, deep)
        scores = nn.Dense(1, use_bias=False, kernel_init=GLOROT, name="attention_head")(x)
        return (scores + nn.Dense(1, kernel_init=GLOROT)(deep))[:, 0]


class Dcn(nn.Module):
    """DCN (arXiv 1708.05123): w . [x_L, MLP(x_0)] + b with x_{l+1} = x_0 (x_l . w_l) + b_l + x_l.

    Every x_l is a_l x_0 + c_l, with a number a_l for each row and c_l = b_0 + .. + b_{l-1} for all
    of them; so all of the cross network is one product of x_0 with the w_l and w, and numbers.
    """

    layers: int
    mlp: tuple[int, ...]

    @nn.compact
    def __call__(
        self, fields: Float[Array, "R F D"], *, dropout: Dropout = None
    ) -> Float[Array, "R"]:
        x = _flat(fields)
        rows, width = x.shape
        deep = Mlp(self.mlp)(x, dropout=dropout)
        kernel = self.param("cross", GLOROT_STACK, (self.layers, width, 1))[:, :, 0]
        bias = self.param("cross_bias", nn.initializers.zeros, (self.layers, width))
        head = self.param("head", GLOROT, (width + deep.shape[1], 1))
        head_bias = self.param("head_bias", nn.initializers.zeros, ())
        dots = x @ jnp.concatenate([kernel, head[:width].T]).T
        scale, shift = jnp.ones(rows), jnp.zeros(width)
        for layer in range(self.layers):
            scale = scale + scale * dots[:, layer] + shift @ kernel[layer]
            shift = shift + bias[layer]
        _leave(self, scale[:, None] * x + shift[None, :], deep)
        cross = scale * dots[:, self.layers] + shift @ head[:width, 0]
        return cross + (deep @ head[width:])[:, 0] + head_bias


class MixedCross(nn.Module):
    """sum_k g_k(x) U_k tanh(C_k tanh(V_k x)) + b, g = softmax(G x + d); K experts of rank r.

    DCNv2 (arXiv 2008.13535) eq. 5. The g_k sum to 1, so that b stands outside the sum and the
    experts' U_k are one matrix.
    """

    experts: int
    low_rank: int

    @nn.compact
    def __call__(self, x: Float[Array, "R E"]) -> Float[Array, "R E"]:
        rows, width = x.shape
        count, rank = self.experts, self.low_rank
        down = self.param("down", GLOROT_SPLIT, (width, count, rank))
        core = self.param("core", GLOROT_STACK, (count, rank, rank))
        up = self.param("up", GLOROT_STACK, (count, rank, width))
        gate = self.param("gate", GLOROT, (width, count))
        gate_bias = self.param("gate_bias", nn.initializers.zeros, (count,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        both = x @ jnp.concatenate([down.reshape(width, -1), gate], axis=1)
        inner = jnp.tanh(both[:, : count * rank]).reshape(rows, count, rank)
        weights = jax.nn.softmax(both[:, count * rank :] + gate_bias[None, :], axis=1)
        inner = jnp.tanh(jnp.einsum("nkr,krs->nks", inner, core)) * weights[:, :, None]
        return inner.reshape(rows, -1) @ up.reshape(-1, width) + bias[None, :]


class DcnV2(nn.Module):
    """DCNv2 (arXiv 2008.13535): x_{l+1} = x_0 * f_l(x_l) + x_l, entrywise, and a perceptron.

    The paper's parallel form: the logit is linear in [x_L, MLP(x_0)].

    Attributes:
      low_rank: 0 for f_l(x) = W_l x + b_l (eq. 1), else r of `MixedCross`.
      experts: of `MixedCross`.
    """

    layers: int
    mlp: tuple[int, ...]
    experts: int
    low_rank: int

    @nn.compact
    def __call__(
        self, fields: Float[Array, "R F D"], *, dropout: Dropout = None
    ) -> Float[Array, "R"]:
        start = _flat(fields)
        x, width = start, start.shape[1]
        for layer in range(self.layers):
            name = f"cross_{layer}"
            cross = (
                MixedCross(self.experts, self.low_rank, name=name)
                if self.low_rank
                else nn.Dense(width, kernel_init=GLOROT, name=name)
            )
            x = start * cross(x) + x
        deep = Mlp(self.mlp)(start, dropout=dropout)
        _leave(self, x, deep)
        both = jnp.concatenate([x, deep], axis=1)
        return nn.Dense(1, kernel_init=GLOROT)(both)[:, 0]


class Din(nn.Module):
    """DIN (arXiv 1706.06978): the history as a sum of its events, weighed by the candidate.

    With t the candidate's fields and e_l an event's, each in one vector of E = T D:
      h_l = sigmoid(W [t, e_l, t - e_l, t * e_l] + b), further layers alike, a linear map to w_l;
      v = sum_l w_l e_l / sqrt(E), without softmax: the strength of an interest stays;
      logit = w . MLP([q, t, v, t * v]) + b, with Dice; q the query's other fields.
    Activations, scale and t * v are RecBole's, q is the paper's (RecBole leaves the user out).
    Where candidates have fields that events lack, these are the last of T, and no part of what t is
    compared and multiplied with.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "N Q D"],
        target: Float[Array, "N C T D"],
        events: Float[Array, "N L P D"],
        real: Bool[Array, "N L"],
        *,
        dropout: Dropout = None,
    ) -> Float[Array, "N C"]:
        n, c, _, dim = target.shape
        parts = events.shape[2]
        t, e = target.reshape(n, c, -1), events.reshape(n, -1, parts * dim)
        alike = t[..., : parts * dim]
        weights = jnp.where(real[:, None, :], self._weights(alike, e), 0.0)
        scaled = weights * np.float32((parts * dim) ** -0.5)
        # A sum of products, not a batched matrix product: with few candidates a query, that
        # would be a call a query on CPU.
        pooled = jnp.sum(scaled[..., None] * e[:, None, :, :], axis=2)
        side = jnp.broadcast_to(query.reshape(n, 1, -1), (n, c, query.shape[1] * dim))
        x = jnp.concatenate([side, t, pooled, alike * pooled], axis=2).reshape(n * c, -1)
        deep = Mlp(self.mlp, dice=True)(x, dropout=dropout)
        _leave(self, deep)
        return nn.Dense(1, kernel_init=GLOROT)(deep).reshape(n, c)

    def _weights(
        self, target: Float[Array, "N C E"], events: Float[Array, "N L E"]
    ) -> Float[Array, "N C L"]:
        """w_l of every candidate and event.

        The first layer splits by block of W: (W_t + W_d) t once a candidate, (W_e - W_d) e once
        an event, and only W_p (t * e) for each pair.
        """
        width = target.shape[2]
        first = self.attention[0]
        kernel = self.param("attention", GLOROT, (4 * width, first))
        bias = self.param("attention_bias", nn.initializers.zeros, (first,))
        of_target, of_event, of_difference, of_product = jnp.split(kernel, 4)
        x = (target[:, :, None, :] * events[:, None, :, :]) @ of_product
        x = x + (target @ (of_target + of_difference))[:, :, None, :]
        x = x + (events @ (of_event - of_difference))[:, None, :, :] + bias[None, None, None, :]
        x = jax.nn.sigmoid(x)
        for layer, size in enumerate(self.attention[1:], 1):
            x = jax.nn.sigmoid(nn.Dense(size, kernel_init=GLOROT, name=f"attention_{layer}")(x))
        return nn.Dense(1, kernel_init=GLOROT, name="attention_head")(x)[..., 0]


FieldNetwork = DeepFm | XDeepFm | AutoInt | Dcn | DcnV2


def _flat(fields: Float[Array, "R F D"]) -> Float[Array, "R E"]:
    return fields.reshape(fields.shape[0], -1)
