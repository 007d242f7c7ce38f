"""The knobs of guidances that are known as knowledge distillation: one section a method.

A section has the method's name in `RunConfig`; its knobs belong to that --guidance alone. What each
method computes, and how it differs from its paper: docs/distillation.md.
"""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import FLOAT, WIDTH, Section, knob


@dataclasses.dataclass(frozen=True)
class RRDConfig(Section):
    """--guidance=rrd: relaxed ranking distillation."""

    interesting: int = knob(
        20,
        "K: items of a list that are learned in its order",
        flag="rrd_interesting",
        minimum=1,
        maximum=WIDTH,
    )
    uninteresting: int = knob(
        20,
        "L: unlisted items that these are ranked above",
        flag="rrd_uninteresting",
        minimum=1,
        maximum=WIDTH,
    )
    sample: bool = knob(
        True,
        "draw the K items anew each step, with probability ~ exp(-rank / T); --norrd_sample takes "
        "the first K",
        flag="rrd_sample",
    )
    temperature: float = knob(
        10.0, "T of --rrd_sample", flag="rrd_temperature", above=0, maximum=FLOAT
    )
    pool: int = knob(
        500,
        "places of a list that --rrd_sample draws from",
        flag="rrd_pool",
        minimum=1,
        maximum=WIDTH,
    )
