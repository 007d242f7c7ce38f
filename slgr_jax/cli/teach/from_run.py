"""The best items of a finished run as a teacher that costs nothing.

    slgr teach from_run --data=DATA --name=plain --run=WORKDIR --listed=50
    slgr teach combine --data=DATA --name=both --names=plain,my_llm

What the run would recommend to each user, training items left out. Mixed with an LLM's lists, or in
their place, it shows what the LLM adds.
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
    from slgr_jax.serving import run_teacher
    from slgr_jax.teacher.products import preferences

    workdir = flags.section_from_flags(config.CandidateConfig).run
    listed = flags.section_from_flags(config.NearestConfig).listed
    print(preferences.report(run_teacher.from_run(dataset, common, workdir, listed)))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("rows_per_shard", "overwrite"),
    parts={config.CandidateConfig: ("run",), config.NearestConfig: ("listed",)},
    required=("run",),
)
