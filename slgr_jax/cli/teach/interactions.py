"""What users take in the word of a teacher, or of texts, as interactions to learn beside DATA's.

    slgr teach interactions --data=DATA --name=taken --lists=my_llm --places=10
    slgr teach interactions --data=DATA --name=for_new --lists=my_llm --rare_items=0 --places=0
    slgr teach interactions --data=DATA --name=for_new --rare_items=0 --users_per_item=20

--lists: the first places of the lists of DATA/teacher/my_llm. Without it, of each item the users
who are nearest to it by text. slgr train --guidance=interactions --teacher=NAME learns them; those
of a file: slgr teach import --interactions=FILE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand
from slgr_jax.errors import ConfigError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Derive them, and say what the product is."""
    from slgr_jax.teacher.local import nearest_users
    from slgr_jax.teacher.products import preferences, pseudo_interactions

    options = flags.section_from_flags(config.DeriveConfig)
    vectors = flags.section_from_flags(config.NearestConfig)
    if options.lists and vectors.embeddings:
        raise ConfigError(
            f"--lists={options.lists} and --embeddings={vectors.embeddings} both say who takes "
            "what; drop one of them"
        )
    if options.lists:
        manifest = pseudo_interactions.derive(dataset, common, options)
    else:
        manifest = nearest_users.write(dataset, common, options, vectors)
    print(preferences.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite", "with_validation"),
    sections=(config.DeriveConfig,),
    parts={config.NearestConfig: ("embeddings", "centre")},
)
