"""A recommender and an LLM that learn from each other in rounds, over files (LLMD4Rec).

    slgr exchange --data=DATA --workdir=DIR --teacher=NAME --backbone=sasrec --rounds=3
    ... the LLM learns from DIR/round_0/student; its lists become DATA/teacher/NAME_1 ...
    slgr exchange --data=DATA --workdir=DIR --teacher=NAME --backbone=sasrec --rounds=3

Round 0 trains without a teacher. Each round then writes what the LLM is to learn (its best items
with scores, what the rest of its softmax weighs, the rank of each training interaction), and each
next one begins as the last ended and learns from what the LLM says of that, by --guidance=list_kl
unless another is given, all of it believed unless --gate says otherwise. Nothing here calls an LLM:
where DATA/teacher/NAME_R is not there yet, the command says what it awaits and ends with status 76;
the same command goes on. Status 0: all rounds are done; 75: interrupted, the same command goes on.
"""

from __future__ import annotations

import pathlib

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config.exchange import SET_BY_ROUNDS
from slgr_jax.config.knobs import Section
from slgr_jax.errors import ConfigError

USAGE = __doc__ or ""


def run_sections() -> list[type[Section]]:
    """The knobs of the command: its own, and those of a run that it does not set itself."""
    of_run = config.sections().values()
    return [
        config.ExchangeConfig,
        *(flags.without(section, SET_BY_ROUNDS) for section in of_run),
    ]


def define() -> None:
    """Define the flags that are no knobs."""
    absl_flags.DEFINE_string("data", None, "dataset directory that slgr prepare wrote")
    absl_flags.DEFINE_string("workdir", None, "directory of all rounds")


def main(_: list[str]) -> None:
    """Go on as far as it goes, and say how far that was."""
    from slgr_jax.experiments import exchange

    given = flags.FLAGS
    knobs = flags.given_knobs(*run_sections())
    teacher = knobs.pop("teacher", "")
    if not teacher:
        raise ConfigError("missing --teacher=NAME, of which NAME_1, NAME_2, ... will be products")
    options = flags.section_from_flags(config.ExchangeConfig)
    own = set(flags.given_knobs(config.ExchangeConfig))
    plan = exchange.ExchangePlan(
        given.data,
        pathlib.Path(given.workdir),
        teacher,
        {name: value for name, value in knobs.items() if name not in own},
        options,
    )
    try:
        result = exchange.exchange(plan)
    except KeyboardInterrupt:
        raise SystemExit(flags.EXIT_INTERRUPTED) from None
    print(result.render())
    if result.awaited is not None:
        raise SystemExit(flags.EXIT_AWAITING)


def run() -> None:
    """`slgr exchange`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr exchange",
        sections=run_sections(),
        define=define,
        required=("data", "workdir"),
    )
