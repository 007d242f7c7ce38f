"""A local language model scores items by their texts against each user's training history.

    slgr teach score --data=DATA --name=wordllama
    slgr teach score --data=DATA --name=my_lm --scorer=transformers --llm=FOLDER --max_users=500

Without --candidate_set it draws the pairs itself, as `slgr teach candidates` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Score, and say what the scorer is worth on hidden training items."""
    from slgr_jax.teacher.local import scorers
    from slgr_jax.teacher.products import preferences

    options = flags.section_from_flags(config.ScoreConfig)
    prompt = flags.section_from_flags(config.RequestConfig)
    scorer = scorers.make(dataset, options, history_items=prompt.history_items)
    manifest = scorers.score(
        dataset,
        common,
        options,
        flags.section_from_flags(config.CandidateConfig),
        scorer,
        candidate_set=prompt.candidate_set,
    )
    print(scorers.held_in_report(dataset, scorer, options))
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("seed", "rows_per_shard", "overwrite"),
    sections=(config.ScoreConfig,),
    parts={
        config.CandidateConfig: (
            "candidates",
            "popular_pool",
            "cold_candidates",
            "tail_fraction",
            "tail_users",
        ),
        config.RequestConfig: ("candidate_set", "history_items"),
    },
)
