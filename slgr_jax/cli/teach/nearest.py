"""Each user's nearest items by text vectors, as a list over the whole catalogue.

    slgr teach nearest --data=DATA --name=near50 --listed=50
    slgr teach nearest --data=DATA --name=near50 --embeddings=my_vectors

Without --embeddings the vectors are wordllama's, of the item texts. Vectors of --embeddings are
centred first (--nocentre: as they are).
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
    from slgr_jax.teacher.local import nearest
    from slgr_jax.teacher.products import preferences

    manifest = nearest.write(dataset, common, flags.section_from_flags(config.NearestConfig))
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite", "with_validation"),
    sections=(config.NearestConfig,),
)
