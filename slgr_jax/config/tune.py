"""The knobs of searches: slgr tune, and what slgr compare tunes its arms by."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, Section, knob

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "hyperband", "none")


@dataclasses.dataclass(frozen=True)
class SearchConfig(Section):
    """How settings are drawn."""

    sampler: str = knob(
        "tpe", "tpe learns from the trials so far, random does not", choices=SAMPLERS
    )
    sampler_seed: int = knob(0, "seed of what the sampler draws", minimum=0, maximum=COUNT)


@dataclasses.dataclass(frozen=True)
class CompareConfig(SearchConfig):
    """The search, the same for every arm."""

    trials: int = knob(
        20,
        "trials of each arm of each backbone, with seed 0; the first has what --base found, or the "
        "defaults",
        minimum=1,
        maximum=100_000,
    )
    widen: bool = knob(
        True,
        "give every arm twice a quarter of --trials more; where its best trial is at an end of a "
        "range, in a wider one",
    )
    base: bool = knob(
        True,
        "search without guidance first, with as many trials; every arm's search, that of none too, "
        "begins at the settings that this found, in the ranges that it ended with",
    )
    ease_start: bool = knob(
        True,
        "mf: search, too, whether rows begin as drawn or with the factors of EASE's scores (slgr "
        "teach factors), where EASE is a baseline by default",
    )


@dataclasses.dataclass(frozen=True)
class TuneConfig(SearchConfig):
    """The search."""

    trials: int = knob(
        20, "trials of the study, with those of earlier calls", minimum=1, maximum=1_000_000
    )
    timeout: float = knob(
        0.0, "seconds after which no more trial begins; 0 = no limit", minimum=0, maximum=COUNT
    )
    jobs: int = knob(
        1,
        "trials at once, on a CPU each in a process of one thread (accelerators take one); only "
        "one at a time makes a search repeatable",
        minimum=1,
        maximum=1024,
    )
    seeds: int = knob(
        1, "runs of a trial, from --seed on; their mean is its value", minimum=1, maximum=1000
    )
    pruner: str = knob(
        "median",
        "stop a trial early: median = below the median of the others at that epoch; hyperband; "
        "none; by the first seed",
        choices=PRUNERS,
    )
    prune_after: int = knob(
        5, "epochs that every trial has before it may be stopped", minimum=1, maximum=COUNT
    )
