"""What came back from an LLM to an answer log and a product; again over more results, it only adds.

    slgr teach collect --data=DATA --name=my_llm --results=results.jsonl
    slgr teach collect --data=DATA --name=my_llm --results=FOLDER,more.jsonl
    slgr teach collect --data=DATA --name=profiles --results=results.jsonl --embed=my_vectors

The product is DATA/teacher/NAME, or DATA/texts/NAME where texts were asked for; --embed makes
vectors of these. Answers that cannot be read are kept in DATA/answers/NAME/quarantine.jsonl, each
with its reason.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Collect, and say what was read and what the product is."""
    from slgr_jax.data import schema
    from slgr_jax.teacher.ask import requests
    from slgr_jax.teacher.collect import collecting
    from slgr_jax.teacher.products import preferences

    options = flags.section_from_flags(config.CollectConfig)
    vectors = flags.section_from_flags(config.TextConfig).embed
    asked = requests.directory(dataset.path, common.name, options.requests)
    prompt = schema.read_request_manifest(asked).prompt
    if prompt in config.TEXT_PROMPTS:
        _collect_texts(dataset, common, options, vectors, config.TEXT_PROMPTS[prompt])
        return
    if vectors:
        raise ConfigError(f"--embed={vectors} is of texts, and --prompt={prompt} asked for none")

    manifest, summary = collecting.collect(dataset, common, options)
    print(summary)
    print(preferences.report(manifest))


def _collect_texts(
    dataset: Dataset,
    common: config.TeachConfig,
    options: config.CollectConfig,
    vectors: str,
    side: str,
) -> None:
    """Collect texts about users or items, and embed them where `vectors` names a product."""
    from slgr_jax.data import shards
    from slgr_jax.teacher.collect import text_collecting
    from slgr_jax.teacher.local import embeddings
    from slgr_jax.teacher.products import texts

    embed = flags.section_from_flags(config.EmbedConfig)
    llm = flags.section_from_flags(config.ScoreConfig).llm
    if vectors:
        own = f"{side}_texts"
        if getattr(embed, own) not in ("", common.name):
            raise ConfigError(
                f"--{own}={getattr(embed, own)}, and --name={common.name} are the {side}s' texts "
                "already; drop one of them"
            )
        embed = dataclasses.replace(embed, **{own: common.name})
        target = embeddings.product_path(dataset.path, vectors)
        shards.check_target(target, overwrite=common.overwrite)
    elif llm or embed != config.EmbedConfig():
        raise ConfigError(
            "--embedder, --llm, --dtype, --chunks, --chunk_words, --users, --item_texts and "
            "--user_texts are of --embed=NAME: add it, or drop them"
        )
    product, summary = text_collecting.collect(dataset, common, options)
    print(summary)
    print(texts.report(product))
    if not vectors:
        told = f"--data={dataset.path} --name=NAME --{side}_texts={common.name}"
        print(f"  next: slgr teach embed {told}")
        return

    if not embed.chunks and len(product.manifest.fields) > 1:
        embed = dataclasses.replace(embed, chunks=1)
    made = embeddings.embed(dataset, dataclasses.replace(common, name=vectors), embed, llm=llm)
    print(embeddings.report(made))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "rows_per_shard", "overwrite", "subtitles"),
    sections=(config.CollectConfig,),
    parts={
        config.TextConfig: ("embed",),
        config.EmbedConfig: (
            *("embedder", "dtype", "chunks", "chunk_words", "users"),
            *("item_texts", "user_texts"),
        ),
        config.ScoreConfig: ("llm",),
    },
    required=("results",),
)
