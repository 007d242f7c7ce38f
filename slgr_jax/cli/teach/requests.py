"""Prompts as batch-API files for any LLM: `vllm run-batch` or a hosted service.

    slgr teach requests --data=DATA --name=my_llm --model=some-llm
    slgr teach requests --data=DATA --name=my_llm --model=some-llm --prompt=pairwise --logprobs
    slgr teach requests --data=DATA --name=my_llm --dry_run

Asks about DATA/candidates/NAME (`slgr teach candidates`); what comes back goes to
`slgr teach collect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Show the plan, and write the requests unless --dry_run."""
    from slgr_jax.teacher.ask import asking, prompts
    from slgr_jax.teacher.ask import candidates as sets
    from slgr_jax.teacher.ask import requests as files

    options = flags.section_from_flags(config.RequestConfig)
    drawn, source = sets.load(dataset, options.candidate_set or common.name)
    asker = asking.asker(dataset, drawn, prompts.item_lines(dataset), options, common.seed)
    plan = asking.plan(asker)
    print(plan.report(), flush=True)
    if options.dry_run:
        return

    root = files.directory(dataset.path, common.name, options.out)
    manifest = files.write(
        asker, plan, source, root, model=common.model, overwrite=common.overwrite
    )
    print(files.report(manifest, root))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "seed", "overwrite"),
    sections=(config.RequestConfig,),
)
