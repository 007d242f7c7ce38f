"""Users' lists from lists of items beside an item (an item-to-item recommender, an LLM's word).

    slgr teach similar --data=DATA --name=beside --similar=i2i.parquet --model=some-model
    slgr teach similar --data=DATA --name=beside --similar=i2i.csv --listed=100 --unknown=drop

The file has item, other, and perhaps score or rank (1 the best). A user's score of an item is the
mean over its training items of the item's score in their lists (1 / rank of ranks, 0 outside).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Write the lists, and say what the product is."""
    from slgr_jax.teacher.local import similar
    from slgr_jax.teacher.products import preferences

    sections = (config.SimilarConfig, config.ImportConfig, config.NearestConfig)
    options, reading, nearest = map(flags.section_from_flags, sections)
    print(preferences.report(similar.write(dataset, common, options, reading, nearest)))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "delimiter", "rows_per_shard", "overwrite", "with_validation"),
    sections=(config.SimilarConfig,),
    parts={config.ImportConfig: ("unknown", "built_from"), config.NearestConfig: ("listed",)},
    required=("similar",),
)
