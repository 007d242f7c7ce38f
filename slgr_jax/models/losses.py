"""Losses on scores, element by element where they can be; the caller masks and averages.

x is the score of the preferred item minus that of the other one, in logits.

Shape letters: M places with a state each, E width, I items, N negatives that places share.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits that exist at once: enough for the matrix product to run at its best, few enough to stay
# in a CPU's last cache.
_CHUNK_LOGITS = {"cpu": 1 << 21, "other": 1 << 26}


@jax.custom_vjp
def difference(scores: Float[Array, "N 2"]) -> Float[Array, "N"]:
    """x_n = s_n0 - s_n1, with a gradient of few operations on a CPU: dx times (1, -1)."""
    return scores[:, 0] - scores[:, 1]


def _difference_backward(_: None, grad: Float[Array, "N"]) -> tuple[Float[Array, "N 2"]]:
    # A product, which reads dx; of two slices XLA would make a sum of two padded arrays and
    # compute the loss's derivative for every entry of either.
    return (grad[:, None] * jnp.array([[1.0, -1.0]]),)


difference.defvjp(lambda scores: (difference(scores), None), _difference_backward)


def bpr(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log sigmoid(x) = log(1 + exp(-x)), finite for any finite x (Rendle et al. 2009, eq. 4)."""
    return jax.nn.softplus(-x)


def binary_cross_entropy(
    logits: Float[Array, "..."], labels: Float[Array, "..."]
) -> Float[Array, "..."]:
    """-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)), finite for any finite s."""
    return jax.nn.softplus(logits) - labels * logits


def masked_sum(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """sum_n w_n v_n where a zero weight silences even a non-finite value."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax_cross_entropy(
    states: Float[Array, "M E"],
    vectors: Float[Array, "I E"],
    targets: Int[Array, "M"],
    weights: Float[Array, "M"],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of each target among all items, and how often the target scores highest.

    sum_m w_m [log sum_i exp(s_m . v_i) - s_m . v_target(m)] and sum_m w_m [target is first].

    The gradient is computed along with the loss, chunk by chunk of places, so that the M x I
    logits never exist at once and are computed once. Places of weight 0 cost nothing: the others
    are moved to the front. Nothing flows to the weights.

    Args:
      states, vectors: whose dot products are the logits.
      targets: item of each place.
      weights: 0 leaves a place out.
      chunk: places at once; 0 chooses by the device.
    """
    return _softmax_forward(states, vectors, targets, weights, chunk)[0]


def _softmax_forward(
    states: jax.Array, vectors: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    places, items = states.shape[0], vectors.shape[0]
    if not chunk:
        room = _CHUNK_LOGITS["cpu" if jax.default_backend() == "cpu" else "other"]
        chunk = max(8, min(places, room // items))

    # Places that count come first; an index past the end reads 0 and, on the way back, is dropped.
    padded = -(-places // chunk) * chunk
    order = jnp.argsort(weights <= 0, stable=True)
    order = jnp.pad(order, (0, padded - places), constant_values=places)
    states_in = states.at[order].get(mode="fill", fill_value=0.0)
    targets_in = targets.at[order].get(mode="fill", fill_value=0)
    weights_in = weights.at[order].get(mode="fill", fill_value=0.0)
    counted = jnp.sum(weights > 0)

    def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss, first, d_states, d_vectors = carry

        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, number * chunk, chunk)

        state, target, weight = part(states_in), part(targets_in), part(weights_in)
        target_cells = jnp.arange(chunk), target
        logits = state @ vectors.T

        # exp of the logits less their maximum: no overflow, and the same softmax.
        top = jnp.max(logits, axis=1)
        odds = jnp.exp(logits - top[:, None])
        total = jnp.sum(odds, axis=1)
        at_target = logits[target_cells]

        loss += masked_sum(jnp.log(total) + top - at_target, weight)
        first += masked_sum((at_target >= top).astype(jnp.float32), weight)

        # The gradient of the logits: softmax minus 1 at the target, times the weight.
        share = odds * jnp.where(weight > 0, weight / total, 0.0)[:, None]
        share = share.at[target_cells].add(-weight)
        d_states = jax.lax.dynamic_update_slice_in_dim(
            d_states, share @ vectors, number * chunk, axis=0
        )
        return loss, first, d_states, d_vectors + share.T @ state

    zero = jnp.float32(0.0)
    start = (zero, zero, jnp.zeros_like(states_in), jnp.zeros_like(vectors))
    loss, first, d_states, d_vectors = jax.lax.fori_loop(0, -(-counted // chunk), step, start)

    back = jnp.zeros_like(states).at[order].set(d_states, mode="drop", unique_indices=True)
    return (loss, first), (back, d_vectors)


def _softmax_backward(
    chunk: int, saved: tuple[jax.Array, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    d_states, d_vectors = saved
    return grads[0] * d_states, grads[0] * d_vectors, None, None


softmax_cross_entropy.defvjp(_softmax_forward, _softmax_backward)


def sampled_softmax_cross_entropy(
    states: Float[Array, "M E"],
    positives: Float[Array, "M E"],
    negatives: Float[Array, "N E"],
    targets: Int[Array, "M"],
    shared: Int[Array, "N"],
    log_expected: Float[Array, "N"],
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Cross-entropy of each target among itself and N shared negatives, corrected for sampling.

    The logit of negative j is s . v_j - log E[j], E[j] how often j is expected among the drawn
    ones (Bengio & Senecal 2008): exp of the corrected logits then sums, in expectation, to that of
    all items. A negative that is the target does not count.

    Returns:
      Per place: the loss, and 1 where the target scores above all negatives.
    """
    target_logit = jnp.sum(states * positives, axis=-1)
    raw = states @ negatives.T
    hit = targets[:, None] == shared[None, :]

    logits = jnp.where(hit, -jnp.inf, raw - log_expected[None, :])
    everything = jnp.concatenate([target_logit[:, None], logits], axis=1)
    loss = jax.nn.logsumexp(everything, axis=1) - target_logit

    first = target_logit > jnp.max(jnp.where(hit, -jnp.inf, raw), axis=1)
    return loss, first.astype(jnp.float32)
