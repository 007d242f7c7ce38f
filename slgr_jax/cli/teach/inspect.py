"""Check a product's shards and show what it is.

    slgr teach inspect --data=DATA --name=NAME

NAME is of DATA/teacher, DATA/texts, or both. A product of another split, or one that is damaged, is
refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Load DATA/teacher/NAME, or DATA/texts/NAME, or both, which checks them, and show them."""
    from slgr_jax.data import schema
    from slgr_jax.teacher.products import preferences, texts

    has_texts = (texts.product_path(dataset.path, common.name) / schema.MANIFEST).is_file()
    if has_texts:
        print(texts.report(texts.load(dataset, common.name)))
    if not has_texts or preferences.product_path(dataset.path, common.name).is_dir():
        print(preferences.report(preferences.checked(dataset, common.name)))


COMMAND = SubCommand(usage=__doc__ or "", work=work)
