"""Vectors of items and users to DATA/embeddings/NAME, of a local model or from a file.

    slgr teach embed --data=DATA --name=wordllama
    slgr teach embed --data=DATA --name=my_vectors --vectors=items.parquet --model=some-model
    slgr teach embed --data=DATA --name=pieces --chunks=8
    slgr teach embed --data=DATA --name=hosted --model=some-model --text_requests=texts.jsonl
    slgr teach embed --data=DATA --name=kar --item_texts=facts --user_texts=preferences --chunks=1

`slgr teach nearest --embeddings=NAME` turns them into lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Write vectors, or with --text_requests the requests for them."""
    from slgr_jax.teacher.local import embeddings

    options = flags.section_from_flags(config.EmbedConfig)
    stated = flags.section_from_flags(config.ImportConfig)
    if options.text_requests:
        count = embeddings.write_requests(dataset, options, common.model)
        print(f"{count:,} embedding requests in {options.text_requests}")
        return

    manifest = embeddings.embed(
        dataset,
        common,
        options,
        llm=flags.section_from_flags(config.ScoreConfig).llm,
        built_from=stated.built_from,
        unknown=stated.unknown,
    )
    print(embeddings.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "rows_per_shard", "overwrite"),
    sections=(config.EmbedConfig,),
    parts={config.ScoreConfig: ("llm",), config.ImportConfig: ("built_from", "unknown")},
)
