"""What came back from an LLM to an answer log and a product; again over more results, it only adds.

    slgr teach collect --data=DATA --name=my_llm --results=results.jsonl
    slgr teach collect --data=DATA --name=my_llm --results=FOLDER,more.jsonl

Answers that cannot be read are kept in DATA/answers/NAME/quarantine.jsonl, each with its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Collect, and say what was read and what the product is."""
    from slgr_jax.teacher.collect import collecting
    from slgr_jax.teacher.products import preferences

    options = flags.section_from_flags(config.CollectConfig)
    manifest, summary = collecting.collect(dataset, common, options)
    print(summary)
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "rows_per_shard", "overwrite", "subtitles"),
    sections=(config.CollectConfig,),
    required=("results",),
)
