"""The knobs of which dropped losses count all the same."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import learns_from_sequences
from slgr_jax.config.knobs import COUNT, WIDTH, Section, knob
from slgr_jax.config.training import LossConfig, SamplerConfig
from slgr_jax.errors import ConfigError

_SCORE = 1_000_000  # no scale of scores goes further


@dataclasses.dataclass(frozen=True)
class HardnessConfig(Section):
    """Of the greatest losses that --drop_share leaves out, those that an LLM takes for hard and
    true (LLMHD)."""

    product: str = knob(
        "",
        "product of DATA/teacher with scores of training interactions and other items (slgr teach "
        "import --scores --keep_training_items): of what --drop=hardest drops, what its scores say "
        "is hard and no noise counts all the same",
        flag="keep_hard",
    )
    pair_first: float = knob(
        7.0,
        "bpr and bce of triples: hard where the positive's score is less than this above the "
        "negative's, at the first step (scores of 0 to 10)",
        minimum=0,
        maximum=_SCORE,
        flag="hard_pair_first",
    )
    pair_last: float = knob(3.0, "and in the end", minimum=0, maximum=_SCORE, flag="hard_pair_last")
    positive_first: float = knob(
        8.0,
        "--rating_threshold: a row with label 1 is hard where its score is below this, at the "
        "first step",
        minimum=-_SCORE,
        maximum=_SCORE,
        flag="hard_positive_first",
    )
    positive_last: float = knob(
        6.0, "and in the end", minimum=-_SCORE, maximum=_SCORE, flag="hard_positive_last"
    )
    negative_first: float = knob(
        4.0,
        "--rating_threshold: a row with label 0 is hard where its score is above this, at the "
        "first step",
        minimum=-_SCORE,
        maximum=_SCORE,
        flag="hard_negative_first",
    )
    negative_last: float = knob(
        2.0, "and in the end", minimum=-_SCORE, maximum=_SCORE, flag="hard_negative_last"
    )
    steps: int = knob(
        1000,
        "steps in which a threshold falls by 1, from its first value to its last; 0 = the last "
        "from the start",
        minimum=0,
        maximum=COUNT,
        flag="hard_steps",
    )
    variance_share: float = knob(
        1.0,
        "of what is dropped, only so large a share can count as hard: those whose last "
        "--hard_variance_scores scores vary most (LLMHD: 0.1 to 0.9); 1 = all, and no scores are "
        "kept",
        above=0,
        maximum=1,
        flag="hard_variance_share",
    )
    variance_scores: int = knob(
        5,
        "--hard_variance_share: scores that are kept of a training interaction, and of each item "
        "that --keep_hard has a score of; until there are so many it is not hard",
        minimum=2,
        maximum=WIDTH,
        flag="hard_variance_scores",
    )

    @property
    def filters(self) -> bool:
        """Whether what varies little is not hard, whatever the LLM says."""
        return bool(self.product) and self.variance_share < 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pair", "positive", "negative"):
            first, last = (getattr(self, f"{name}_{end}") for end in ("first", "last"))
            if first < last:
                raise ConfigError(
                    f"--hard_{name}_first={first:g} is below --hard_{name}_last={last:g}: "
                    "thresholds fall; turn them round"
                )

    def check(self, backbone: str, loss: LossConfig, sampler: SamplerConfig) -> None:
        """Refuse what does not go with keeping what is hard.

        Raises:
          ConfigError: what, and what to do.
        """
        scored, rows = sampler.negatives == "scored", bool(loss.rating_threshold)
        if scored and not self.product:
            raise ConfigError(
                "--negatives=scored are items that the product of --keep_hard has scores of: add "
                "--keep_hard=NAME --drop_share=0.1 --drop=hardest, or use uniform"
            )
        if not self.product:
            return
        named = f"--keep_hard={self.product}"
        if not loss.drop_share or loss.drop != "hardest" or learns_from_sequences(backbone):
            raise ConfigError(
                f"{named} keeps some of what --drop=hardest drops, and nothing is dropped so; add "
                "--drop_share=0.1 --drop=hardest (not of sequence backbones), or drop it"
            )
        if not rows and not scored:
            raise ConfigError(
                f"{named} compares a positive with its negative, and no score of a negative is "
                f"known with --negatives={sampler.negatives}; add --negatives=scored --hard_share=1"
            )
        if rows and scored:
            raise ConfigError(
                "--negatives=scored: no negative is drawn with "
                f"--rating_threshold={loss.rating_threshold:g}; use uniform"
            )
        if loss.negatives_per_positive > 1:
            raise ConfigError(
                f"{named} compares a positive with its one negative; drop "
                f"--negatives_per_positive={loss.negatives_per_positive}"
            )
