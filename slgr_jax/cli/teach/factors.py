"""Vectors of users and items whose inner products are the scores of EASE, item-item or iALS.

    slgr teach factors --data=DATA --name=ease --baseline=ease --width=128
    slgr train --data=DATA --workdir=RUN --dim=128 --init_item_vectors=ease \\
        --init_user_vectors=ease --init_how=leading --init_scale=10

Written to DATA/embeddings/NAME: a singular value decomposition of the scores. Matrix factorisation
that begins with them is about as good as the baseline before its first step, and learns from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Fit it, write the vectors, and say what the product is."""
    from slgr_jax.evaluation import factors
    from slgr_jax.teacher.local import embeddings

    manifest = factors.from_baseline(
        dataset,
        common,
        flags.section_from_flags(config.FreeTeacherConfig).baseline,
        flags.section_from_flags(config.BaselineConfig),
        width=flags.section_from_flags(config.FactorConfig).width,
        dtype=flags.section_from_flags(config.EmbedConfig).dtype,
    )
    print(embeddings.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite"),
    sections=(
        config.FactorConfig,
        config.FreeTeacherConfig,
        flags.without(config.BaselineConfig, ("baselines",)),
    ),
    parts={config.EmbedConfig: ("dtype",)},
)
