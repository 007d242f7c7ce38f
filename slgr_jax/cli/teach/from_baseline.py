"""The lists of EASE, item-item, iALS or the most popular items as a teacher that costs nothing.

    slgr teach from_baseline --data=DATA --name=ease --baseline=ease --listed=50
    slgr teach combine --data=DATA --name=both --names=ease,my_llm

Fitted on training interactions, its setting chosen by validation ndcg@10. Mixed with an LLM's
lists, or in their place, it shows what the LLM adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Fit it, write the lists, and say what the product is."""
    from slgr_jax.evaluation import teacher_lists
    from slgr_jax.teacher.products import preferences

    manifest = teacher_lists.from_baseline(
        dataset,
        common,
        flags.section_from_flags(config.FreeTeacherConfig).baseline,
        flags.section_from_flags(config.NearestConfig).listed,
        flags.section_from_flags(config.BaselineConfig),
    )
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite", "with_validation"),
    sections=(config.FreeTeacherConfig, flags.without(config.BaselineConfig, ("baselines",))),
    parts={config.NearestConfig: ("listed",)},
)
