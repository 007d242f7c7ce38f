"""Uses of an LLM product in training: the protocol, and one file a method."""

from slgr_jax.guidance import cd, dcd, kd, list_kl, pairwise, pointwise, rd, rrd, unkd
from slgr_jax.guidance.base import Guidance, built_in, make_guidance, register

built_in(
    {
        "pairwise": pairwise.make,
        "pointwise": pointwise.make,
        "kd": kd.make,
        "list_kl": list_kl.make,
        "rd": rd.make_rd,
        "dllm2rec": rd.make_dllm2rec,
        "cd": cd.make,
        "rrd": rrd.make,
        "dcd": dcd.make,
        "unkd": unkd.make,
    }
)

__all__ = ["Guidance", "make_guidance", "register"]
