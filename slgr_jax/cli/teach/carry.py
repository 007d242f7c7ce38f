"""A product and its paid answers from yesterday's dataset to the one appended to it.

    slgr teach carry --data=DATA2 --from=DATA --name=my_llm
    slgr teach carry --data=DATA2 --from=DATA --name=my_lists --new_items=unknown

DATA2 was made with `slgr prepare --append=DATA`. Refused where DATA2 evaluates what the teacher was
shown; answers on what is a training item by now are dropped and counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Carry the product, its answer log and its requests, and say what was left out."""
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.data import schema
    from slgr_jax.teacher.collect import carry_answers
    from slgr_jax.teacher.products import carry, preferences, texts

    options = flags.section_from_flags(config.CarryConfig)
    parent = dataset_lib.load(options.parent)
    has_texts = (texts.product_path(parent.path, common.name) / schema.MANIFEST).is_file()
    if has_texts:
        print(texts.report(texts.carry(dataset, parent, common.name, overwrite=common.overwrite)))
    if not has_texts or preferences.product_path(parent.path, common.name).is_dir():
        manifest = carry.carry(
            dataset,
            parent,
            common.name,
            new_items=options.new_items,
            rows_per_shard=common.rows_per_shard,
            overwrite=common.overwrite,
        )
        print(preferences.report(manifest))
    for path in carry_answers.carry_answers(
        dataset, parent, common.name, overwrite=common.overwrite
    ):
        print(f"  carried: {path}")


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite"),
    sections=(config.CarryConfig,),
    required=("from",),
)
