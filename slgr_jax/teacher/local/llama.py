"""The forward pass of a Llama in JAX, and log-probabilities of many continuations of one prompt.

A prompt and all its continuations are one row of tokens: a continuation sees the prompt and
itself, not its neighbours. So the prompt's keys and values are computed once, and nothing is
padded but the end of the row (`_bucket`; one compilation a bucket).

Shape letters: B rows, T tokens of a row, W width, H heads, G key-value heads, D width of a head,
V vocabulary, Q predicted tokens, N layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.errors import InputError
from slgr_jax.teacher.local.gguf_model import Architecture, Model

Params = dict[str, Any]

# Segments of a row: continuations count from 0.
PROMPT, PADDING = -1, -2
# Most continuation tokens of a row: attention grows with its square.
PACK = 1024
# Tokens of a text that its vector looks at.
TEXT_TOKENS = 256
_HEAD_ROWS = 128  # rows of logits [., V] that exist at a time


def hidden_states(
    params: Params,
    sizes: Architecture,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T W"]:
    """Output of the last layer after its norm, in the type of the parameters.

    x <- x + Attention(RMSNorm(x)); x <- x + W_down(silu(W_gate h) * W_up h), h = RMSNorm(x), with
    rotary positions and grouped keys and values (Llama 2, arXiv 2307.09288, section 2.2). Token q
    sees token k <= q of its own segment or of the prompt. Norms, rotations and the softmax are
    float32.
    """
    steps = jnp.arange(tokens.shape[1])
    causal = steps[None, :, None] >= steps[None, None, :]
    near = segments[:, :, None] == segments[:, None, :]
    visible: Bool[Array, "B T T"] = causal & (near | (segments[:, None, :] == PROMPT))
    turn = _rotation(positions, sizes)
    groups = (*tokens.shape, sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_width)

    def layer(x: Float[Array, "B T W"], weights: Params) -> tuple[Float[Array, "B T W"], None]:
        h = _rms_norm(x, weights["attn_norm"], sizes.epsilon)
        q = _rotate((h @ weights["q"]).reshape(groups), turn)
        k = _rotate((h @ weights["k"]).reshape(*groups[:3], 1, groups[4]), turn)[:, :, :, 0]
        v = (h @ weights["v"]).reshape(*groups[:3], groups[4])
        logits = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(visible[:, None, None], logits / groups[4] ** 0.5, -1e30)
        attention = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bghts,bsgd->btghd", attention, v).reshape(*tokens.shape, -1)
        x = x + mixed @ weights["o"]
        h = _rms_norm(x, weights["ffn_norm"], sizes.epsilon)
        return x + (jax.nn.silu(h @ weights["gate"]) * (h @ weights["up"])) @ weights["down"], None

    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    return _rms_norm(x, params["norm"], sizes.epsilon)


def token_log_probs(
    params: Params,
    sizes: Architecture,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    parents: Int[Array, "B Q"],
    targets: Int[Array, "B Q"],
    *,
    start: int,
) -> Float[Array, "B Q"]:
    """log P(targets | what their parent token sees), float32.

    Args:
      params, sizes, tokens, positions, segments: as `hidden_states`.
      parents: the token before each target, counted from token `start` of its row.
      targets: token ids.
      start: no parent lies before it.
    """
    states = hidden_states(params, sizes, tokens, positions, segments)[:, start:]
    head = params["head" if "head" in params else "embedding"]
    flat = states.reshape(-1, states.shape[-1])

    def normaliser(state: Float[Array, " W"]) -> Float[Array, ""]:
        logits = jnp.einsum("w,vw->v", state, head, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits)

    total = jax.lax.map(normaliser, flat, batch_size=min(_HEAD_ROWS, flat.shape[0]))
    chosen = jnp.take_along_axis(states, parents[:, :, None], axis=1)
    logits = jnp.einsum("bqw,bqw->bq", chosen, head[targets], preferred_element_type=jnp.float32)
    return logits - jnp.take_along_axis(total.reshape(states.shape[:2]), parents, axis=1)


class Llama:
    """A model on the default device: bfloat16 on an accelerator, float32 on a CPU.

    Attributes:
      name: for manifests.
      batch: prompts that are worth one call: 1 on a CPU, where rows of one prompt keep the cores
        busy and padding several to one length costs time.
    """

    def __init__(self, model: Model, *, dtype: Any = None, batch: int = 0) -> None:
        cpu = jax.default_backend() == "cpu"
        self.name = model.name
        self.batch = batch or (1 if cpu else 16)
        self.context = model.architecture.context
        self._tokenizer = model.tokenizer
        dtype = dtype or (jnp.float32 if cpu else jnp.bfloat16)
        self._params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.params)
        sizes = model.architecture
        self._log_probs = jax.jit(
            lambda params, start, *row: token_log_probs(params, sizes, *row, start=start),
            static_argnums=1,
        )
        self._states = jax.jit(functools.partial(_states, sizes))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens among them."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
    ) -> list[np.ndarray]:
        """log P(continuation | prompt), summed over its tokens.

        Args:
          prompts: token ids, at least one each.
          continuations: per prompt any number of continuations, at least one token each.

        Returns:
          Per prompt [number of its continuations] float32.
        """
        out = [np.zeros(len(many), np.float32) for many in continuations]
        rows = []
        for owner, (prompt, many) in enumerate(zip(prompts, continuations, strict=True)):
            longest = max(map(len, many), default=0)
            if len(prompt) + longest > self.context:
                raise InputError(
                    f"a prompt of {len(prompt)} and a title of {longest} tokens are over the "
                    f"{self.context} tokens of {self.name}; show fewer titles: --history_items"
                )
            rows += [(owner, prompt, many, part) for part in _packs([len(c) - 1 for c in many])]
        for begin in range(0, len(rows), self.batch):
            chunk = rows[begin : begin + self.batch]
            values = self._rows(
                [(prompt, [many[c] for c in part]) for _, prompt, many, part in chunk]
            )
            for (owner, _, many, part), row in zip(chunk, values, strict=True):
                ends = np.cumsum([len(many[c]) for c in part])
                sums = np.add.reduceat(row[: ends[-1]], np.concatenate([[0], ends[:-1]]))
                out[owner][part] = sums
        return out

    def _rows(self, rows: list[tuple[Sequence[int], list[Sequence[int]]]]) -> np.ndarray:
        """[B, Q] log-probabilities of all continuation tokens of each row, one after the other."""
        width = _bucket(max(len(prompt) for prompt, _ in rows))
        inputs = max(sum(len(c) - 1 for c in many) for _, many in rows)
        length = width + (_bucket(inputs) if inputs else 0)
        predicted = _bucket(max(sum(map(len, many)) for _, many in rows))
        tokens = np.zeros((self.batch, length), np.int32)
        positions = np.zeros_like(tokens)
        segments = np.full_like(tokens, PADDING)
        parents, targets = np.zeros((2, self.batch, predicted), np.int32)
        for b, (prompt, many) in enumerate(rows):
            place = slice(width - len(prompt), width)  # the last prompt token is at width - 1
            tokens[b, place], segments[b, place] = prompt, PROMPT
            positions[b, place] = np.arange(len(prompt))
            at, said = width, 0
            for segment, one in enumerate(many):
                own = slice(at, at + len(one) - 1)
                tokens[b, own], segments[b, own] = one[:-1], segment
                positions[b, own] = len(prompt) + np.arange(len(one) - 1)
                mine = slice(said, said + len(one))
                targets[b, mine] = one
                parents[b, mine] = [0, *range(at - width + 1, at - width + len(one))]
                at, said = at + len(one) - 1, said + len(one)
        out = self._log_probs(
            self._params, width - 1, tokens, positions, segments, parents, targets
        )
        return np.asarray(out)[: len(rows)]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the last hidden states over the first `TEXT_TOKENS` tokens, unit length.

        Returns:
          [n, W] float32; a text without tokens is a zero row.
        """
        encoded = [ids[:TEXT_TOKENS] for ids in self.encode(texts)]
        out = np.zeros((len(texts), self._params["embedding"].shape[1]), np.float32)
        filled = [index for index, ids in enumerate(encoded) if ids]
        for part in _packs([len(encoded[index]) for index in filled]):
            members = [filled[p] for p in part]
            lengths = [len(encoded[index]) for index in members]
            ends = np.cumsum(lengths)
            size = _bucket(int(ends[-1]))
            row = np.zeros((3, 1, size), np.int32)
            row[2] = PADDING
            row[0, 0, : ends[-1]] = np.concatenate([encoded[index] for index in members])
            row[1, 0, : ends[-1]] = np.concatenate([np.arange(n) for n in lengths])
            row[2, 0, : ends[-1]] = np.repeat(np.arange(len(members)), lengths)
            states = np.asarray(self._states(self._params, *row)[0, : ends[-1]])
            sums = np.add.reduceat(states, np.concatenate([[0], ends[:-1]]), axis=0)
            out[members] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return out


def _states(sizes: Architecture, params: Params, *row: Int[Array, "B T"]) -> Float[Array, "B T W"]:
    return hidden_states(params, sizes, *row).astype(jnp.float32)


def _packs(lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive indices whose lengths sum to at most `PACK` (or one longer than that)."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = PACK
        packs[-1].append(index)
        room -= length
    return packs


def _bucket(size: int) -> int:
    """Next multiple of 32 up to 256, of 128 above: rows are padded to it."""
    step = 32 if size <= 256 else 128
    return -(-size // step) * step


def _rms_norm(x: Float[Array, "... W"], weight: Float[Array, " W"], epsilon: float) -> Array:
    exact = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + epsilon)
    return (exact * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def _rotation(positions: Int[Array, "B T"], sizes: Architecture) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, 1, D / 2] of position * base^(-2 j / D)."""
    half = sizes.head_width // 2
    rates = sizes.rope_base ** (-np.arange(half) / half)
    angles = positions[:, :, None, None, None] * jnp.asarray(rates, jnp.float32).reshape(
        1, 1, 1, 1, half
    )
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "B T G R D"], turn: tuple[Array, Array]) -> Float[Array, "B T G R D"]:
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = turn
    return (
        jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)
    )
