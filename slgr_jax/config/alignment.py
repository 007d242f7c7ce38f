"""The knobs of guidances that align a recommender's vectors with those of a product.

A section has the method's name in `RunConfig`; its knobs belong to that --guidance alone. What each
method computes, and how it differs from its paper: docs/alignment.md.
"""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import BUILT_IN, CLICK_BACKBONES
from slgr_jax.config.guidance import ALIGNMENTS
from slgr_jax.config.knobs import FLOAT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError


def check_fits(guidance: str, backbone: str) -> None:
    """Refuse a guidance of vectors whose built-in backbone has none, no graph to mask nodes of, or
    no rows to contrast.

    Raises:
      ConfigError: what to use instead.
    """
    if guidance not in ALIGNMENTS:
        return
    if guidance == "ctrl":
        if backbone in BUILT_IN and backbone not in CLICK_BACKBONES:
            raise ConfigError(
                f"--guidance=ctrl contrasts the rows of a click model with their texts, and "
                f"--backbone={backbone} is none; use --backbone=dcnv2 or another, or "
                "--guidance=rlmrec_con"
            )
        return
    if backbone in CLICK_BACKBONES:
        raise ConfigError(
            f"--guidance={guidance} aligns vectors of users and items, and --backbone={backbone} "
            "has none that its scores are products of; use --guidance=ctrl, or give it the "
            "product's as fields: --item_vectors, --user_vectors"
        )
    if guidance == "rlmrec_gen" and backbone in BUILT_IN and backbone != "lightgcn":
        raise ConfigError(
            f"--guidance=rlmrec_gen masks nodes of a graph, and --backbone={backbone} has none; "
            "use --backbone=lightgcn or --guidance=rlmrec_con"
        )


@dataclasses.dataclass(frozen=True)
class HintConfig(Section):
    """--guidance=hint: the product's vectors as a linear map of the recommender's."""

    hidden: int = knob(
        0,
        "width of a hidden layer of the map from the recommender's vectors to the product's; 0 = "
        "a linear map",
        flag="hint_hidden",
        minimum=0,
        maximum=WIDTH,
    )


@dataclasses.dataclass(frozen=True)
class HTDConfig(Section):
    """--guidance=htd: topology distillation."""

    groups: int = knob(
        10,
        "groups that users and items are assigned to, by a map of the product's vectors that is "
        "learned; 0 = none: all cosines of a step are matched (FTD)",
        flag="htd_groups",
        minimum=0,
        maximum=1024,
    )
    topology: float = knob(
        0.5,
        "gamma: share of what matches cosines; the rest maps each group's vectors to the product's",
        flag="htd_topology",
        minimum=0,
        maximum=1,
    )
    temperature: float = knob(
        1.0,
        "temperature of the softmax, with Gumbel noise, by which groups are drawn",
        flag="htd_temperature",
        above=0,
        maximum=FLOAT,
    )
    positive: bool = knob(
        False,
        "match the cosines that are above 0 in the product alone, as the authors' program does",
        flag="htd_positive",
    )


@dataclasses.dataclass(frozen=True)
class RLMRecConConfig(Section):
    """--guidance=rlmrec_con: contrastive alignment."""

    temperature: float = knob(
        0.2,
        "tau that cosines are divided by",
        flag="rlmrec_con_temperature",
        above=0,
        maximum=FLOAT,
    )
    hidden: int = knob(
        0,
        "width of the hidden layer of what maps the product's vectors to the recommender's; 0 = "
        "half of both widths together",
        flag="rlmrec_con_hidden",
        minimum=0,
        maximum=WIDTH,
    )


@dataclasses.dataclass(frozen=True)
class RLMRecGenConfig(Section):
    """--guidance=rlmrec_gen: masked nodes of a graph and their vectors."""

    temperature: float = knob(
        0.5,
        "tau that cosines are divided by",
        flag="rlmrec_gen_temperature",
        above=0,
        maximum=FLOAT,
    )
    hidden: int = knob(
        0,
        "width of the hidden layer of what maps the recommender's vectors to the product's; 0 = "
        "half of both widths together",
        flag="rlmrec_gen_hidden",
        minimum=0,
        maximum=WIDTH,
    )


@dataclasses.dataclass(frozen=True)
class LLMESRConfig(Section):
    """--guidance=llm_esr: users towards those whose texts are alike."""

    neighbours: int = knob(
        10,
        "users with the nearest vectors whose mean a user's vector is drawn to; of a sequence "
        "model each is one more sequence to encode",
        flag="llm_esr_neighbours",
        minimum=1,
        maximum=1024,
    )
    views: float = knob(
        0.0,
        "of runs with --dual_view: so much of the term that contrasts an item's row with what its "
        "text comes to, in the guidance loss beside that of users; 0 = none",
        flag="llm_esr_views",
        minimum=0,
        maximum=FLOAT,
    )


@dataclasses.dataclass(frozen=True)
class CTRLConfig(Section):
    """--guidance=ctrl: rows of a click model and their texts."""

    temperature: float = knob(
        0.7,
        "tau that similarities are divided by",
        flag="ctrl_temperature",
        above=0,
        maximum=FLOAT,
    )
    width: int = knob(
        128,
        "numbers that rows and their texts are projected to",
        flag="ctrl_width",
        minimum=1,
        maximum=WIDTH,
    )
    subspaces: int = knob(
        4,
        "parts M of a projection; a text's part meets the row's part that is most like it; 1 = "
        "whole vectors (FLIP)",
        flag="ctrl_subspaces",
        minimum=1,
        maximum=1024,
    )


@dataclasses.dataclass(frozen=True)
class LLMEmbRATConfig(Section):
    """--guidance=llmemb_rat: items made of texts towards a finished run's."""

    temperature: float = knob(
        2.0,
        "tau that products of vectors of this run and of the product are divided by, and that "
        "those within each are multiplied with",
        flag="llmemb_rat_temperature",
        above=0,
        maximum=FLOAT,
    )
