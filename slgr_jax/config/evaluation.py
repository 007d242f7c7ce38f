"""The knobs of how a run is evaluated: slices, ranking, labelled rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slgr_jax.config.knobs import BATCH, COUNT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError

ROWS = ("none", "sampled", "rated")
# Thresholds of papers: S-LLMR (arXiv 2512.21526, section 4.5; its Table 1 counts at most 3) and
# LLM-ESR (arXiv 2405.20646: fewer than 10 interactions, fewer than 20 users).
SLICE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "own": {},
    "s_llmr": {"cold_user_history": 3, "tail_item_fraction": 0.2},
    "llm_esr": {"cold_user_history": 9, "tail_item_popularity": 19},
}


@dataclasses.dataclass(frozen=True)
class SliceConfig(Section):
    """Which users are cold and which items are tail, by training counts only."""

    cold_user_history: int = knob(
        -1,
        "cold users have at most this many training interactions; -1 = the count that the "
        "quarter of users with least history does not exceed",
        minimum=-1,
        maximum=COUNT,
    )
    tail_item_fraction: float = knob(
        0.2, "tail items: this share of the catalogue, least popular first", minimum=0, maximum=1
    )
    tail_item_popularity: int = knob(
        -1,
        "tail items have at most this many training users; -1 = by --tail_item_fraction",
        minimum=-1,
        maximum=COUNT,
    )
    slice_preset: str = knob(
        "own",
        "cold and tail as a paper has them: s_llmr (at most 3 training items; the 20 % least "
        "popular items), llm_esr (at most 9; at most 19 training users); own = the knobs above",
        choices=SLICE_PRESETS,
    )
    history_bins: tuple[int, ...] = knob(
        (5, 10, 20, 50, 100), "upper edges of the history-length slices", minimum=0, maximum=COUNT
    )
    popularity_bins: tuple[int, ...] = knob(
        (5, 20, 50, 100, 200), "upper edges of the item-popularity slices", minimum=0, maximum=COUNT
    )

    @property
    def thresholds(self) -> SliceConfig:
        """The same with a preset's thresholds filled in."""
        filled = {**SLICE_PRESETS[self.slice_preset], "slice_preset": "own"}
        return dataclasses.replace(self, **filled)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Full ranking over all items."""

    ks: tuple[int, ...] = knob(
        (10, 20), "cut-offs K of the ranking metrics", minimum=1, maximum=BATCH
    )
    eval_users_per_chunk: int = knob(
        1024, "users ranked at once; bounds memory", minimum=1, maximum=BATCH
    )
    pooled_auc: bool = knob(True, "also report AUC over all user-item pairs pooled")
    rank_apart: bool = knob(
        False,
        "also rank tail items among tail items alone, and head items among head items; with "
        "--tail_item_popularity=0 tail items are those that training never saw",
    )
    ranking: bool = knob(True, "rank the catalogue; --noranking leaves only --rows")
    rows: str = knob(
        "none",
        "also predict clicks on labelled rows (auc, gauc, log-loss): sampled = each positive with "
        "--row_negatives drawn items; rated = interactions, 1 where rated --rating_threshold",
        choices=ROWS,
    )
    row_negatives: int = knob(
        1, "rows=sampled: negatives drawn for each positive", minimum=1, maximum=WIDTH
    )
    row_seed: int = knob(0, "rows=sampled: seed of the negatives", minimum=0, maximum=COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ks:
            raise ConfigError("--ks is empty; give at least one cut-off, e.g. --ks=10,20")
