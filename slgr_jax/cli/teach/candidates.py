"""Whom to ask about what, and what it will cost.

    slgr teach candidates --data=DATA --name=my_llm --max_cost=5 --price_in=0.15 --price_out=0.6
    slgr teach candidates --data=DATA --name=my_llm --dry_run
    slgr teach candidates --data=DATA --name=my_llm --run=WORKDIR

Writes DATA/candidates/NAME, which `slgr teach requests` turns into prompts. --run adds items that
a trained run ranks high or is unsure of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand
from slgr_jax.errors import UserError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Draw candidates, show the plan, and write them unless --dry_run."""
    from slgr_jax.data import shards
    from slgr_jax.teacher.ask import asking, prompts
    from slgr_jax.teacher.ask import candidates as sets
    from slgr_jax.teacher.local import scorers

    options = flags.section_from_flags(config.CandidateConfig)
    costs = flags.section_from_flags(config.RequestConfig)
    shards.check_target(sets.set_path(dataset.path, common.name), overwrite=common.overwrite)
    lines = prompts.item_lines(dataset)
    try:
        space, spread = scorers.item_vectors(dataset, scorers.WordLlama()), "the text space"
    except UserError:  # the extra `llm` is not installed
        space, spread = None, "popularity"

    proposed = None
    if options.run:
        from slgr_jax.training import hard_candidates  # JAX: only where a trained run is asked

        proposed = hard_candidates.propose(dataset, options)

    drawn = sets.draw(dataset, lines, options, seed=common.seed, space=space, proposed=proposed)
    plan = asking.plan(asking.asker(dataset, drawn, lines, costs, common.seed))
    print(plan.report())
    if costs.dry_run:
        return

    manifest = sets.write(
        dataset,
        common.name,
        drawn.of_users(plan.users),
        options,
        seed=common.seed,
        diversity=spread,
        counts={"items_without_text": sum(not line for line in lines)},
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )
    print(sets.report(manifest))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("seed", "rows_per_shard", "overwrite"),
    sections=(config.CandidateConfig,),
    parts={
        config.RequestConfig: (
            *("prompt", "template", "history_items", "list_size", "permutations", "pairs"),
            *("catalogue", "catalogue_tokens"),
            *("orders", "max_requests", "max_tokens", "max_cost", "price_in", "price_out"),
            *("structured", "dry_run"),
        )
    },
)
