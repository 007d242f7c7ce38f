"""What the CPU kernel of gates computes, as a function of JAX arrays (gates.cc does it).

Shape letters: F inputs, H hidden units, P preferences; the axis of length 2 is folds.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from slgr_jax.kernels.build import ffi_call


def logistic_gate(
    features: Float[Array, "F P"],
    folds: Int[Array, "P"],
    weight: Float[Array, "2 F"],
    bias: Float[Array, "2"],
    inner: Float[Array, "2 F H"],
    outer: Float[Array, "2 H"],
) -> Float[Array, "P"]:
    """w_f . z + b_f + v_f . tanh(V_f z) of each column z, f its fold; no gradient.

    XLA's program computes both folds' products of every column and writes out all H states; its
    hyperbolic tangent is half of what a gate costs.
    """
    out = jax.ShapeDtypeStruct(folds.shape, np.float32)
    call = ffi_call("slgr_logistic_gate", (out,))
    (logits,) = call(features, folds, weight, bias, inner, outer)
    return logits
