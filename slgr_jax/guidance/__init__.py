"""Uses of an LLM product in training: the protocol, and one file a method."""

from slgr_jax.guidance import pairwise, pointwise, rrd
from slgr_jax.guidance.base import Guidance, built_in, make_guidance, register

built_in({"pairwise": pairwise.make, "pointwise": pointwise.make, "rrd": rrd.make})

__all__ = ["Guidance", "make_guidance", "register"]
