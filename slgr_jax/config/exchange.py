"""The knobs of `slgr exchange`: rounds in which a recommender and an LLM learn from each other."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, FLOAT, Section, knob

# Knobs of a run that the rounds set themselves.
SET_BY_ROUNDS = ("init_from", "refit", "restart", "train_only", "teacher_vectors")


@dataclasses.dataclass(frozen=True)
class ExchangeConfig(Section):
    """How often, and what the LLM is told."""

    rounds: int = knob(
        3,
        "rounds in which the recommender learns from what the LLM has learned from it; 1 is "
        "ordinary distillation from lists that were made for it",
        minimum=1,
        maximum=1000,
    )
    listed: int = knob(
        100, "items of each user whose scores the LLM gets", minimum=1, maximum=COUNT
    )
    student_temperature: float = knob(
        1.0,
        "T of the recommender's softmax over the catalogue that the LLM learns from; it is applied "
        "before the list is cut, so the rest of the softmax is told as one number",
        above=0,
        maximum=FLOAT,
    )
