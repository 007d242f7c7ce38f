"""Turn offline LLM answers into a teacher product of a dataset: DATA/teacher/NAME.

    slgr teach import --data=DATA --name=NAME --scores=FILE
    slgr teach score --data=DATA --name=NAME
    slgr teach embed --data=DATA --name=NAME [--embedder=MODEL | --vectors=FILE]
    slgr teach nearest --data=DATA --name=NAME [--listed=50] [--embeddings=EMBEDDED]
    slgr teach similar --data=DATA --name=NAME --similar=FILE [--listed=50]
    slgr teach interactions --data=DATA --name=NAME [--lists=TEACHER] [--rare_items=0]
    slgr teach examples --data=DATA --name=NAME [--examples=FILE | --example_prompts=FILE]
    slgr teach candidates --data=DATA --name=NAME [--run=WORKDIR]
    slgr teach requests --data=DATA --name=NAME --model=LLM [--prompt=user_profile] [--dry_run]
    slgr teach ask --data=DATA --name=NAME --base_url=URL [--concurrency=8]
    slgr teach collect --data=DATA --name=NAME --results=FILE_OR_FOLDER[,...] [--embed=EMBEDDED]
    slgr teach from_run --data=DATA --name=NAME --run=WORKDIR [--listed=50]
    slgr teach from_baseline --data=DATA --name=NAME [--baseline=ease] [--listed=50]
    slgr teach factors --data=DATA --name=NAME [--baseline=ease] [--width=256]
    slgr teach combine --data=DATA --name=NAME --names=TEACHER,TEACHER[,...]
    slgr teach export --data=DATA --name=NAME --out=FILE
    slgr teach carry --data=DATA2 --from=DATA --name=NAME
    slgr teach inspect --data=DATA --name=NAME
    slgr teach report --data=DATA --name=NAME [--out=FOLDER]

To ask an LLM of your own: candidates, requests, ask (or a batch service), collect, report.
For texts about users or items (profiles, what it knows): requests --prompt=user_profile, ask,
collect --embed. With answers in a file already: import, report. Without an LLM: score or nearest
read the texts of items, from_run and from_baseline (EASE, ...) interactions alone; combine mixes
them with the LLM's. factors writes vectors of users and items that training can begin with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from slgr_jax.cli import flags
from slgr_jax.cli.teach import (
    ask,
    candidates,
    carry,
    collect,
    combine,
    embed,
    examples,
    export,
    factors,
    from_baseline,
    from_run,
    import_scores,
    inspect,
    interactions,
    nearest,
    report,
    requests,
    score,
    similar,
)
from slgr_jax.cli.teach.sub_command import SubCommand
from slgr_jax.config import TeachConfig
from slgr_jax.errors import listing

USAGE = __doc__ or ""
NAME = "slgr teach"

COMMANDS: Mapping[str, SubCommand] = {
    "import": import_scores.COMMAND,
    "score": score.COMMAND,
    "embed": embed.COMMAND,
    "nearest": nearest.COMMAND,
    "similar": similar.COMMAND,
    "interactions": interactions.COMMAND,
    "examples": examples.COMMAND,
    "candidates": candidates.COMMAND,
    "requests": requests.COMMAND,
    "ask": ask.COMMAND,
    "collect": collect.COMMAND,
    "from_run": from_run.COMMAND,
    "from_baseline": from_baseline.COMMAND,
    "factors": factors.COMMAND,
    "combine": combine.COMMAND,
    "export": export.COMMAND,
    "carry": carry.COMMAND,
    "inspect": inspect.COMMAND,
    "report": report.COMMAND,
}


def help_text() -> str:
    """The sub-commands, with a line each."""
    lines = [USAGE.strip(), "", "Commands:"]
    lines += [f"  {name:13} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", f"{NAME} COMMAND --help shows the flags that a command uses."])


def hints(name: str) -> dict[str, str]:
    """Flags that others have and sub-command `name` has not -> the error when one is given."""
    command = COMMANDS[name]
    owners: dict[str, list[str]] = {}
    for other, its in COMMANDS.items():
        for flag in its.flag_names() - command.flag_names():
            owners.setdefault(flag, []).append(other)

    return {
        flag: f"{NAME} {name} has no flag --{flag}, which is of {NAME} {listing(of)}; drop it, or "
        f"see {NAME} {name} --help"
        for flag, of in owners.items()
    } | dict(command.refused)


def _named(arguments: list[str]) -> str:
    """The sub-command among the arguments: the first that is no flag."""
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        flags.fail(f"no command given; commands: {listing(COMMANDS)}; see {NAME} --help")
    if words[0] not in COMMANDS:
        flags.fail(
            f"{words[0]!r} is not a command; commands: {listing(COMMANDS)}; see {NAME} --help"
        )
    return words[0]


def run() -> None:
    """`slgr teach`."""
    program, *arguments = sys.argv
    if flags.wants_help(arguments) and all(word.startswith("-") for word in arguments):
        flags.show_help(help_text())
    name = _named(arguments)
    arguments.remove(name)
    sys.argv = [program, *arguments]
    command = COMMANDS[name]

    def main(_: list[str]) -> None:
        from slgr_jax.data import dataset

        common = flags.section_from_flags(TeachConfig)
        data = dataset.load(common.data)
        command.work(data.with_validation() if common.with_validation else data, common)

    flags.run(
        main,
        usage=command.usage,
        name=f"{NAME} {name}",
        sections=command.flag_sections(),
        required=("data", "name", *command.required),
        stand_ins=command.stand_ins,
        hints=hints(name),
    )
