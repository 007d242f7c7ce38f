"""Check a product's shards and show what it is.

    slgr teach inspect --data=DATA --name=NAME

NAME is of DATA/teacher, DATA/texts, DATA/edits, DATA/examples, or several of them. A product of
another split, or one that is damaged, is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Load what is called NAME of each kind, which checks it, and show it."""
    from slgr_jax.data import schema
    from slgr_jax.teacher.local import examples
    from slgr_jax.teacher.products import edits, preferences, texts

    reports = {
        texts: lambda: texts.report(texts.load(dataset, common.name)),
        edits: lambda: edits.report(edits.load(dataset, common.name)),
        examples: lambda: examples.report(examples.load(dataset, common.name)),
    }
    held = [
        kind
        for kind in reports
        if (kind.product_path(dataset.path, common.name) / schema.MANIFEST).is_file()
    ]
    for kind in held:
        print(reports[kind]())
    if not held or preferences.product_path(dataset.path, common.name).is_dir():
        print(preferences.report(preferences.checked(dataset, common.name)))


COMMAND = SubCommand(usage=__doc__ or "", work=work)
