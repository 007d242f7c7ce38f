"""The requests of `slgr teach requests`, to a server that answers now; killed, it goes on.

    slgr teach ask --data=DATA --name=my_llm --base_url=http://localhost:8000/v1
    slgr teach ask --data=DATA --name=my_llm --base_url=URL --max_cost=5 --price_in=1 --price_out=4
    slgr teach ask --data=DATA --name=my_llm --base_url=URL --open

Any OpenAI-compatible server: vLLM, Ollama, llama.cpp, hosted services (the extra ask). Answers go
to DATA/requests/NAME, in the batch-API format, for `slgr teach collect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach import requests
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Ask, within the budget, and say what came back."""
    from slgr_jax.teacher.ask import live
    from slgr_jax.teacher.ask import requests as files

    limits = flags.section_from_flags(config.RequestConfig)
    root = files.directory(dataset.path, common.name, limits.out)
    only = requests.token_factors(dataset, common, limits) if limits.open else None
    options = flags.section_from_flags(config.AskConfig)
    print(live.ask(root, options, limits, only=only).report())


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    sections=(config.AskConfig,),
    parts={
        config.RequestConfig: (
            *("out", "open", "more_tokens", "max_requests", "max_tokens", "max_cost"),
            *("price_in", "price_out"),
        )
    },
    required=("base_url",),
)
