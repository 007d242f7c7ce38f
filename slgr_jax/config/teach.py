"""The knobs of launch/teach.py."""

from __future__ import annotations

import dataclasses

from slgr_jax.knobs import Section, knob

# What a teacher product was built from (DESIGN section 6); the loader refuses `includes_eval`.
BUILT_FROM = ("train_only", "prefix", "includes_label", "includes_eval")
# What an item outside a user's list means: never asked about, or ranked below the list (a list
# that the teacher wrote freely over the whole catalogue).
UNLISTED = ("unknown", "below")
SCORERS = ("wordllama",)


@dataclasses.dataclass(frozen=True)
class TeachConfig(Section):
    """Teacher answers to a product under DATA/teacher."""

    data: str = knob("", "dataset directory that launch/prepare.py wrote")
    name: str = knob("", "product to write or inspect: DATA/teacher/NAME")
    scores: str = knob(
        "",
        "import: Parquet, Arrow or CSV file with user, item, score (empty score: not answered) or "
        "user, preferred, other[, margin]; ids as in the raw data",
    )
    built_from: str = knob(
        "train_only",
        "import: what the teacher saw; train_only = training interactions, prefix = what came "
        "before each interaction, includes_label = also the training answers it scores, "
        "includes_eval = evaluation data (training refuses it)",
        choices=BUILT_FROM,
    )
    unlisted: str = knob(
        "unknown",
        "import: an item outside a user's list was never asked about (unknown) or ranks below "
        "the list (below: the teacher wrote it freely over the whole catalogue)",
        choices=UNLISTED,
    )
    model: str = knob("", "import: which LLM answered, for reports")
    prompt_hash: str = knob("", "import: hash or name of the prompt, for reports")
    score_kind: str = knob("score", "import: logit, prob, rating, rank, ..., for reports")
    unknown: str = knob(
        "error",
        "import: rows with an id that DATA does not have; drop counts them",
        choices=("error", "drop"),
    )
    duplicates: str = knob(
        "error",
        "import: rows that disagree about one user's same items; equal rows count once",
        choices=("error", "mean"),
    )
    delimiter: str = knob(",", "import: CSV column separator; tab is '\\t'")
    scorer: str = knob("wordllama", "score: local language model (extra: llm)", choices=SCORERS)
    candidates: int = knob(
        20, "score: items per user with history, drawn from the popular pool", minimum=0
    )
    popular_pool: int = knob(1000, "score: size of the pool, most training users first", minimum=1)
    cold_candidates: int = knob(
        20, "score: more items per cold user, evenly spread over the text space", minimum=0
    )
    tail_fraction: float = knob(
        0.1, "score: tail items are this share of the catalogue", minimum=0, maximum=1
    )
    tail_users: int = knob(20, "score: users drawn per tail item", minimum=0)
    seed: int = knob(0, "score: seed of the candidate draws", minimum=0)
    rows_per_shard: int = knob(4_194_304, "most rows in one Arrow shard", minimum=1)
    overwrite: bool = knob(False, "replace the product when it exists")
