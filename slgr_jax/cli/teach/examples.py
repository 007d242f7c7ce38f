"""Training rows with labels, and what an LLM reasons about them, to DATA/examples/NAME.

    slgr teach examples --data=DATA --name=labels --example_share=0.1
    slgr teach examples --data=DATA --name=labels --example_prompts=asked.parquet
    slgr teach examples --data=DATA --name=reasons --examples=answered.parquet --model=some-model

Without --examples a share of the training rows is drawn, without reasoning; --example_prompts
writes what to ask an LLM of yours about each. --examples is a Parquet or Arrow file with user,
item, vector (the reasoning, embedded) and perhaps position. Labels are read from DATA. A run reads
it: slgr train --backbone=dcnv2 --examples=NAME --example_vectors=EMBEDDED.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Write the product, and say what it is."""
    from slgr_jax.teacher.local import examples

    stated = flags.section_from_flags(config.ImportConfig)
    examples.make(
        dataset,
        common,
        flags.section_from_flags(config.ExampleFileConfig),
        built_from=stated.built_from,
        unknown=stated.unknown,
    )
    print(examples.report(examples.load(dataset, common.name)))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "rows_per_shard", "overwrite"),
    sections=(config.ExampleFileConfig,),
    parts={config.ImportConfig: ("built_from", "unknown")},
)
