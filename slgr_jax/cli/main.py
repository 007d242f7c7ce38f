"""Train recommenders with offline LLM knowledge, believed only where it is right.

    slgr prepare --source=csv --input=ratings.csv --out=DATA
    slgr teach import --data=DATA --name=my_llm --scores=answers.csv
    slgr train --data=DATA --workdir=RUN --guidance=pairwise --teacher=my_llm
    slgr evaluate --workdir=RUN

`slgr quickstart` does all of it on MovieLens-100K.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from slgr_jax.cli import (
    compare,
    evaluate,
    exchange,
    export,
    flags,
    inspect,
    prepare,
    quickstart,
    recommend,
    serve,
    teach,
    train,
    tune,
)
from slgr_jax.cli.command import Command
from slgr_jax.errors import listing

COMMANDS: Mapping[str, Command] = {
    "prepare": Command(prepare.USAGE, prepare.run),
    "teach": Command(teach.USAGE, teach.run),
    "train": Command(train.USAGE, train.run),
    "evaluate": Command(evaluate.USAGE, evaluate.run),
    "recommend": Command(recommend.USAGE, recommend.run),
    "serve": Command(serve.USAGE, serve.run),
    "export": Command(export.USAGE, export.run),
    "inspect": Command(inspect.USAGE, inspect.run),
    "compare": Command(compare.USAGE, compare.run),
    "tune": Command(tune.USAGE, tune.run),
    "exchange": Command(exchange.USAGE, exchange.run),
    "quickstart": Command(quickstart.USAGE, quickstart.run),
}


def help_text() -> str:
    """The commands, with a line each."""
    assert __doc__ is not None
    lines = [__doc__.strip(), "", "Commands:"]
    lines += [f"  {name:11} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "slgr COMMAND --help shows a command's flags."])


def main(argv: Sequence[str] | None = None) -> None:
    """Run `slgr COMMAND --flags`.

    Args:
      argv: the command line, the program's name first; `sys.argv` unless given.
    """
    program, *arguments = sys.argv if argv is None else argv
    if not arguments or flags.wants_help(arguments[:1]):
        flags.show_help(help_text())

    name, *rest = arguments
    if name not in COMMANDS:
        flags.fail(f"{name!r} is not a command; commands: {listing(COMMANDS)}; see slgr --help")
    sys.argv = [program, *rest]
    COMMANDS[name].run()
