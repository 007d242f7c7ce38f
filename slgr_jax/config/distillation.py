"""The knobs of guidances that are known as knowledge distillation: one section a method.

A section has the method's name in `RunConfig`; its knobs belong to that --guidance alone. What each
method computes, and how it differs from its paper: docs/distillation.md.
"""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import FLOAT, WIDTH, Section, flag_name, knob
from slgr_jax.errors import ConfigError

KD_SCORES = ("scaled", "probability", "logit")
CD_RANKS = ("student", "teacher")


def _check_not_above(section: Section, name: str, other: str) -> None:
    """Refuse to draw more items than there are to draw from."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    value, most = getattr(section, name), getattr(section, other)
    if value > most:
        flag, of = flag_name(fields[name]), flag_name(fields[other])
        raise ConfigError(
            f"--{flag}={value} is more than --{of}={most} to draw from; lower it, or raise --{of}"
        )


@dataclasses.dataclass(frozen=True)
class KDConfig(Section):
    """--guidance=kd: cross-entropy with soft labels."""

    scores: str = knob(
        "scaled",
        "what the teacher's scores are: scaled = of any unit, 0 the least and 1 the greatest of "
        "the product; probability = P(yes), within 0 and 1; logit = log(P / (1 - P))",
        flag="kd_scores",
        choices=KD_SCORES,
    )
    temperature: float = knob(
        1.0,
        "T that the logits of soft labels are divided by: above 1 softens them",
        flag="kd_temperature",
        above=0,
        maximum=FLOAT,
    )


@dataclasses.dataclass(frozen=True)
class ListKLConfig(Section):
    """--guidance=list_kl: divergence of two softmaxes over a list (LLMD4Rec)."""

    places: int = knob(
        20,
        "K: first places of a list that the teacher's probability is on",
        flag="list_kl_places",
        minimum=1,
        maximum=WIDTH,
    )
    samples: int = knob(
        80,
        "L: unlisted items that stand for all others in the recommender's softmax",
        flag="list_kl_samples",
        minimum=2,
        maximum=WIDTH,
    )
    temperature: float = knob(
        1.0,
        "T that the recommender's scores are divided by",
        flag="list_kl_temperature",
        above=0,
        maximum=FLOAT,
    )
    teacher_temperature: float = knob(
        1.0,
        "T that the teacher's scores are divided by; well below 1 where they lie within 0 and 1",
        flag="list_kl_teacher_temperature",
        above=0,
        maximum=FLOAT,
    )
    tail: float = knob(
        0.0,
        "probability that the teacher has for all items together that it did not list",
        flag="list_kl_tail",
        minimum=0,
        below=1,
    )
    sample_weights: bool = knob(
        False,
        "weigh a list by whether teacher or recommender ranks an interaction of its user better "
        "(LLMD4Rec), for teachers that list training items",
        flag="list_kl_sample_weights",
    )


@dataclasses.dataclass(frozen=True)
class RDConfig(Section):
    """--guidance=rd: ranking distillation."""

    places: int = knob(
        10, "K: first places of a list that are learned", flag="rd_places", minimum=1, maximum=WIDTH
    )
    samples: int = knob(
        100,
        "L: unlisted items by which it is estimated where the recommender ranks a listed one",
        flag="rd_samples",
        minimum=1,
        maximum=WIDTH,
    )
    position: float = knob(
        1.0,
        "lambda of the weight of position, ~ exp(-rank / lambda)",
        flag="rd_position",
        above=0,
        maximum=FLOAT,
    )
    discrepancy: float = knob(
        0.1,
        "mu of the weight of discrepancy, tanh(mu (the recommender's rank - the teacher's)); 0 = "
        "position alone",
        flag="rd_discrepancy",
        minimum=0,
        maximum=FLOAT,
    )


@dataclasses.dataclass(frozen=True)
class DLLM2RecConfig(Section):
    """--guidance=dllm2rec: importance-aware ranking distillation."""

    places: int = knob(
        10,
        "K: first places of a list that are learned",
        flag="dllm2rec_places",
        minimum=1,
        maximum=WIDTH,
    )
    samples: int = knob(
        100,
        "L: unlisted items by which it is estimated whether a listed one is among the "
        "recommender's first K",
        flag="dllm2rec_samples",
        minimum=1,
        maximum=WIDTH,
    )
    temperature: float = knob(
        1.0,
        "beta of the weight of position, ~ exp(-rank / beta)",
        flag="dllm2rec_temperature",
        above=0,
        maximum=FLOAT,
    )
    position: float = knob(
        0.3,
        "share of the weight of position",
        flag="dllm2rec_position",
        minimum=0,
        maximum=FLOAT,
    )
    confidence: float = knob(
        0.5,
        "share of the weight of confidence, ~ exp(the teacher's score, scaled to 0 and 1); 0 for "
        "teachers whose scores only say the order",
        flag="dllm2rec_confidence",
        minimum=0,
        maximum=FLOAT,
    )
    consistency: float = knob(
        0.1,
        "share of the weight of consistency, 1 for what recommender and teacher agree on",
        flag="dllm2rec_consistency",
        minimum=0,
        maximum=FLOAT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.position + self.confidence + self.consistency > 0:
            raise ConfigError(
                "--dllm2rec_position, --dllm2rec_confidence and --dllm2rec_consistency are all 0, "
                "which weighs every place by nothing; give one of them a share"
            )


@dataclasses.dataclass(frozen=True)
class CDConfig(Section):
    """--guidance=cd: collaborative distillation."""

    pool: int = knob(
        20,
        "first places of a list that items are drawn from",
        flag="cd_pool",
        minimum=1,
        maximum=WIDTH,
    )
    items: int = knob(
        10, "K: items drawn of a list each step", flag="cd_items", minimum=1, maximum=WIDTH
    )
    samples: int = knob(
        20,
        "L: unlisted items that the recommender's ranks are among, too",
        flag="cd_samples",
        minimum=1,
        maximum=WIDTH,
    )
    ranks: str = knob(
        "student",
        "whose ranks items are drawn by: the recommender's as it is at the step, or the teacher's",
        flag="cd_ranks",
        choices=CD_RANKS,
    )
    temperature: float = knob(
        20.0,
        "T of the probability of an item to be drawn, ~ exp(-rank / T)",
        flag="cd_temperature",
        above=0,
        maximum=FLOAT,
    )
    softness: float = knob(
        2.0,
        "T1 of the soft label sigmoid((the teacher's score + T2) / T1)",
        flag="cd_softness",
        above=0,
        maximum=FLOAT,
    )
    shift: float = knob(0.0, "T2 of the soft label", flag="cd_shift", minimum=-1e6, maximum=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_above(self, "items", "pool")


@dataclasses.dataclass(frozen=True)
class DCDConfig(Section):
    """--guidance=dcd: dual correction distillation."""

    listed_pool: int = knob(
        20,
        "first places of a list among which the recommender's errors are looked for",
        flag="dcd_listed_pool",
        minimum=1,
        maximum=WIDTH,
    )
    unlisted_pool: int = knob(
        40,
        "unlisted items among which they are looked for",
        flag="dcd_unlisted_pool",
        minimum=1,
        maximum=WIDTH,
    )
    interesting: int = knob(
        10,
        "K: listed items that the recommender ranks too low, corrected each step",
        flag="dcd_interesting",
        minimum=1,
        maximum=WIDTH,
    )
    uninteresting: int = knob(
        10,
        "L: unlisted items that the recommender ranks too high, at most",
        flag="dcd_uninteresting",
        minimum=1,
        maximum=WIDTH,
    )
    temperature: float = knob(
        10.0,
        "tau of the probability of an item to be drawn, ~ tanh(error in ranks / tau)",
        flag="dcd_temperature",
        above=0,
        maximum=FLOAT,
    )
    relaxed: bool = knob(
        True,
        "add the loss of relaxed ranking over all of both pools",
        flag="dcd_relaxed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_above(self, "interesting", "listed_pool")
        _check_not_above(self, "uninteresting", "unlisted_pool")


@dataclasses.dataclass(frozen=True)
class UnKDConfig(Section):
    """--guidance=unkd: unbiased knowledge distillation."""

    groups: int = knob(
        4,
        "groups of items, of equal popularity all together, within which items are compared",
        flag="unkd_groups",
        minimum=1,
        maximum=WIDTH,
    )
    pool: int = knob(
        1000,
        "first places of a user's list within a group that are drawn from",
        flag="unkd_pool",
        minimum=2,
        maximum=1_000_000,
    )
    temperature: float = knob(
        20.0,
        "T of the probability of a place to be drawn, ~ exp(-rank / T)",
        flag="unkd_temperature",
        minimum=0.1,
        maximum=1e6,
    )


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
