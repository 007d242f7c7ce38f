"""The knobs of what is learned in place of, or beside, training interactions of the data."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, Section, knob
from slgr_jax.config.training import LossConfig, SamplerConfig
from slgr_jax.errors import ConfigError

EDIT_HOWS = ("replace", "delete", "weigh")
THRESHOLDS = ("probability", "quantile")


@dataclasses.dataclass(frozen=True)
class EditConfig(Section):
    """Training interactions that an LLM takes for noise, and items it puts into histories."""

    product: str = knob(
        "",
        "product of DATA/edits (slgr teach import --edits=FILE): training interactions that are "
        "noise; evaluation looks at histories as they are",
        flag="edits",
    )
    how: str = knob(
        "replace",
        "replace = by the item that the product names, where it names one, else delete; delete = "
        "learn and look up without it; weigh = learn it by 1 - its probability of noise",
        choices=EDIT_HOWS,
        flag="edit_how",
    )
    threshold: float = knob(
        0.6,
        "edit what is likelier noise than this (LLM4DSR: 0.6)",
        minimum=0,
        maximum=1,
        flag="edit_threshold",
    )
    threshold_of: str = knob(
        "probability",
        "what the threshold is: a probability, or the quantile of the product's probabilities",
        choices=THRESHOLDS,
        flag="edit_threshold_of",
    )
    per_user: int = knob(
        2,
        "most edits of a user's history, the likeliest noise first (LLM4DSR: 2); 0 = no limit",
        minimum=0,
        maximum=COUNT,
        flag="edits_per_user",
    )

    def check(self, loss: LossConfig, sampler: SamplerConfig) -> None:
        """Refuse what edits do not go with.

        Raises:
          ConfigError: what, and what to do.
        """
        if not self.product or self.how != "replace":
            return
        if loss.rating_threshold:
            raise ConfigError(
                f"--edit_how=replace: the rating that --rating_threshold={loss.rating_threshold:g} "
                "makes a label of is of the item that was there; use delete or weigh"
            )
        if sampler.negatives in ("hard", "in_batch"):
            raise ConfigError(
                f"--edit_how=replace: --negatives={sampler.negatives} may be a replacement of the "
                "same user; use uniform or popularity, or --edit_how=delete"
            )
