"""Prompts as batch-API files for any LLM: `vllm run-batch` or a hosted service.

    slgr teach requests --data=DATA --name=my_llm --model=some-llm
    slgr teach requests --data=DATA --name=my_llm --model=some-llm --prompt=pairwise --logprobs
    slgr teach requests --data=DATA --name=my_llm --model=some-llm --prompt=free_list
    slgr teach requests --data=DATA --name=my_llm --dry_run
    slgr teach requests --data=DATA --name=my_llm --open --more_tokens=4
    slgr teach requests --data=DATA --name=profiles --model=some-llm --prompt=user_profile
    slgr teach requests --data=DATA --name=facts --model=some-llm --prompt=kar_item --factors=a,b

Asks about DATA/candidates/NAME (`slgr teach candidates`), or without candidates for a text of each
user or item; what comes back goes to `slgr teach collect`. --open writes only what has no whole
answer yet.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Show the plan, and write the requests unless --dry_run; with --open, only what is open."""
    from slgr_jax.teacher.ask import asking, prompts
    from slgr_jax.teacher.ask import candidates as sets
    from slgr_jax.teacher.ask import requests as files

    options = flags.section_from_flags(config.RequestConfig)
    texts = flags.section_from_flags(config.TextConfig)
    root = files.directory(dataset.path, common.name, options.out)
    if options.open:
        _write_open(dataset, common, options, root)
        return
    if options.prompt in config.TEXT_PROMPTS:
        _ask_for_texts(dataset, common, options, texts, root)
        return

    config.refuse_text_knobs(texts, options.prompt)
    drawn, source = sets.load(dataset, options.candidate_set or common.name)
    asker = asking.asker(
        dataset,
        drawn,
        prompts.item_lines(dataset),
        options,
        common.seed,
        score_range=flags.section_from_flags(config.CollectConfig).score_range,
    )
    plan = asking.plan(asker)
    print(plan.report(), flush=True)
    if options.dry_run:
        return

    manifest = files.write(
        asker, plan, source, root, model=common.model, overwrite=common.overwrite
    )
    print(files.report(manifest, root))


def _ask_for_texts(
    dataset: Dataset,
    common: config.TeachConfig,
    options: config.RequestConfig,
    texts: config.TextConfig,
    root: pathlib.Path,
) -> None:
    from slgr_jax.teacher.ask import asking_texts
    from slgr_jax.teacher.ask import requests as files

    asker = asking_texts.asker(dataset, options, texts, common.seed)
    plan = asking_texts.plan(asker)
    print(plan.report(), flush=True)
    if options.dry_run:
        return

    manifest = asking_texts.write(asker, plan, root, model=common.model, overwrite=common.overwrite)
    print(files.report(manifest, root))


def _write_open(
    dataset: Dataset,
    common: config.TeachConfig,
    options: config.RequestConfig,
    root: pathlib.Path,
) -> None:
    from slgr_jax.data import schema
    from slgr_jax.teacher.ask import requests as files

    factors = token_factors(dataset, common, options)
    written = files.write_open(root, schema.read_request_manifest(root), factors)
    print(files.report_open(written, len(factors)))


def token_factors(
    dataset: Dataset, common: config.TeachConfig, options: config.RequestConfig
) -> dict[str, int]:
    """custom_id of each request without a whole answer -> how many times the tokens it gets."""
    from slgr_jax.teacher.collect import open_requests

    factors = {}
    for request in open_requests.open_requests(dataset, common.name, options.out):
        short = request.state == "cut" or request.reason.startswith(("cut off", "empty answer"))
        factors[request.custom_id] = options.more_tokens if short else 1
    return factors


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("model", "seed", "overwrite"),
    sections=(config.RequestConfig,),
    parts={
        config.CollectConfig: ("score_range",),
        config.TextConfig: ("factors", "words", "item_words"),
    },
)
