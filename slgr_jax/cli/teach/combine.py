"""Several teachers as one, by ranks or scores; --min_votes: only what so many answered.

    slgr teach combine --data=DATA --name=both --names=gpt,gemma
    slgr teach combine --data=DATA --name=agreed --names=a,b,c --method=borda --min_votes=2

The teachers are products of DATA with scores; later answers are combined again with --overwrite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Combine, and say what the product is."""
    from slgr_jax.teacher.products import combine, preferences

    manifest = combine.combine(dataset, common, flags.section_from_flags(config.CombineConfig))
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite", "with_validation"),
    sections=(config.CombineConfig,),
    refused={
        "append": "combine cannot --append: more answers change ranks and means; combine all of "
        "them again with --overwrite"
    },
)
