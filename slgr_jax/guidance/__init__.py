"""Uses of an LLM product in training: the protocol, and one file a method."""

from slgr_jax.guidance import (
    cd,
    ctrl,
    dcd,
    hint,
    htd,
    interactions,
    kd,
    list_kl,
    llm_esr,
    llmemb_rat,
    pad_mmd,
    pairwise,
    pointwise,
    rd,
    rlmrec,
    rrd,
    unkd,
)
from slgr_jax.guidance.base import Guidance, built_in, make_guidance, register
from slgr_jax.guidance.interactions import with_edges

built_in(
    {
        "pairwise": pairwise.make,
        "pointwise": pointwise.make,
        "interactions": interactions.make,
        "kd": kd.make,
        "list_kl": list_kl.make,
        "rd": rd.make_rd,
        "dllm2rec": rd.make_dllm2rec,
        "cd": cd.make,
        "rrd": rrd.make,
        "dcd": dcd.make,
        "unkd": unkd.make,
        "hint": hint.make,
        "htd": htd.make,
        "rlmrec_con": rlmrec.make_con,
        "rlmrec_gen": rlmrec.make_gen,
        "llm_esr": llm_esr.make,
        "ctrl": ctrl.make,
        "llmemb_rat": llmemb_rat.make,
        "pad_mmd": pad_mmd.make,
    }
)

# What a guidance adds to the graph that a backbone propagates along.
__all__ = ["Guidance", "make_guidance", "register", "with_edges"]
