"""The knobs of what is learned in place of, or beside, training interactions of the data."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import learns_from_sequences
from slgr_jax.config.knobs import COUNT, WIDTH, Section, knob
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
    inserted: str = knob(
        "",
        "product of DATA/teacher, pseudo-interactions or lists (slgr teach import --interactions, "
        "slgr teach interactions): the first --inserted_per_user of a user are put into the "
        "history that sequence backbones learn, each at a random place (Llama4Rec)",
        flag="insert",
    )
    inserted_per_user: int = knob(
        1, "--insert: most items put into a history, the best first", minimum=1, maximum=WIDTH
    )
    insert_seed: int = knob(
        0,
        "--insert: the places are a function of it and the user, the same whatever --seed",
        minimum=0,
        maximum=COUNT,
    )

    @property
    def named(self) -> str:
        """The products that are read, as flags; empty for none."""
        flags = {"--edits": self.product, "--insert": self.inserted}
        return " and ".join(f"{flag}={name}" for flag, name in flags.items() if name)

    def check(self, backbone: str, loss: LossConfig, sampler: SamplerConfig) -> None:
        """Refuse what edits do not go with.

        Raises:
          ConfigError: what, and what to do.
        """
        if self.inserted and not learns_from_sequences(backbone):
            raise ConfigError(
                f"--insert={self.inserted} puts items into sequences, and --backbone={backbone} "
                f"learns none; add --guidance=interactions --teacher={self.inserted} in its place"
            )
        if self.inserted and sampler.negatives == "hard":
            raise ConfigError(
                f"--insert={self.inserted}: --negatives=hard may be an item that is put into the "
                "same user's history; use uniform or popularity"
            )
        if not self.product or self.how != "replace":
            return
        if loss.rating_threshold:
            raise ConfigError(
                f"--edit_how=replace: the rating that --rating_threshold={loss.rating_threshold:g} "
                "makes a label of is of the item that was there; use delete or weigh"
            )
        if sampler.negatives in ("hard", "in_batch", "scored"):
            raise ConfigError(
                f"--edit_how=replace: --negatives={sampler.negatives} may be a replacement of the "
                "same user; use uniform or popularity, or --edit_how=delete"
            )
