"""Check a product's shards and show what it is.

    slgr teach inspect --data=DATA --name=NAME

A product of another split, or one that is damaged, is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Load DATA/teacher/NAME, which checks it, and show its manifest."""
    from slgr_jax.teacher.products import preferences

    print(preferences.report(preferences.load(dataset, common.name).manifest))


COMMAND = SubCommand(usage=__doc__ or "", work=work)
