"""How many triples a second does a training step do, how near is that to what memory allows,
and how does it compare with other trainers?

    python benchmarks/speed/throughput.py
    python benchmarks/speed/throughput.py --peer=implicit,cornac --peer_python=PYTHON
    python benchmarks/speed/throughput.py --peer=recbole --peer_python=PYTHON --sizes=ml100k
    python benchmarks/speed/throughput.py --peer=torch --sizes=large --json=rows.json     # on a GPU

Every configuration runs in a process of its own: after a warm-up, --repeats turns of --seconds
each; median, minimum and maximum. Configurations that differ in --guidance alone take turns with
each other, A B A B, and with the peers (peers.py), which have processes of theirs. A ratio is
the median over rounds, beside its minimum and maximum: of our rate by a peer's, and of the rate
without guidance by that with it (`plain steps`: what a guided step costs). Data are made
by the script (synthetic.py): the sizes `ml100k` (943 users, 1,682 items, 80,000 interactions)
and `large` (138,000 users, 27,000 items, 10 M interactions), where backbones read them with a
random order in time and 1 to 3 of 18 categories an item; if asked for, `huge` (10 M users, 1 M
items, 200 M interactions). The teacher of guided steps has
scored 20 items a user, random ones and the one that is held back to validate on; such a step draws
as many preferences as triples, and preferences are not counted as triples. --guidance takes methods
and arms of the comparison (paper, calibrated, hard_negatives, ...); the reference run of those that
read one is of one epoch.

  what is counted  a triple: a positive and its negative. Of sequence backbones a place whose event
                   is predicted: a window of a history has up to --max_history of them, those
                   of bert4rec are masked. Click backbones learn a triple as two rows (an item and
                   its label), which other trainers of them count: rows/s
  bytes each       what a step reads and writes, by what it counts: rows that it names, as often as
                   it does (a softmax, or a graph: every row of the table, once) * bytes of a row
                   (values and optimiser slots) * 2
  share            bytes/s by the bandwidth of gathering random rows of 256 bytes out of a table of
                   as many rows as users: the best seen, after the turns of each case

Each backbone has its own defaults, as in launch/train.py. What is not given is swept for mf alone;
of other backbones one configuration is measured: no guidance, float32, one batch size; on large
without those whose steps take seconds and say nothing new (printed, with the reason). --peer
compares each backbone that some peer trains: recbole (its model of the same name, with the same
widths and layers), the others mf. RecBole predicts one place a row of its data, and a row is a
whole history; a window of ours predicts all its places in one pass. Its click models but DIN know
no history, and neither do ours beside it (--history_fields gives it to ours).

Knobs of a run (--lr, --table_optimizer, ...) apply to every configuration; --guidance, --backbone
and --table_dtype may be lists, and --batch_sizes is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import synthetic
import turns
from absl import flags as absl_flags
from cases import OF_CASE, Case, Row, measure
from peers import PEERS, TRAINED_BY
from rates_table import render

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config import (
    BACKBONES,
    CLICK_BACKBONES,
    GUIDANCE,
    SEQUENCE_BACKBONES,
    TABLE_DTYPES,
    knobs,
    make_run,
)
from slgr_jax.errors import ConfigError, UserError, listing
from slgr_jax.experiments.arms import ARMS

# Uses of the teacher that are measured unless --guidance asks for others.
COMPARED = ("none", "pairwise")
DEFAULT_SIZES = ("ml100k", "large")
# Batch sizes by default, of a backbone (on one size); of others its own.
BATCH_SIZES: dict[Any, list[int]] = {"mf": [2048, 8192, 65536], ("lightgcn", "large"): [65536]}
# Of the size large, by default: what is left out, and why.
LEFT_OUT: dict[str, str] = {
    "bert4rec": "seconds a step, of which most is the softmax over the catalogue, as in sasrec",
    "xdeepfm": "seconds a step, of arithmetic that is the same on ml100k",
}
LEFT_OUT_COMPARED: dict[str, str] = {
    **dict.fromkeys(
        (*SEQUENCE_BACKBONES, "din"), "RecBole keeps each row's history, gigabytes of them"
    ),
    **dict.fromkeys(
        [name for name in CLICK_BACKBONES if name != "din"],
        "RecBole takes minutes to read so many interactions",
    ),
}


# --- the command ---------------------------------------------------------------------------------


def define_flags() -> tuple[str, ...]:
    """Define this command's own flags; their names, for --help."""
    absl_flags.DEFINE_list(
        "sizes", list(DEFAULT_SIZES), f"data: {', '.join(synthetic.SIZES)}; huge takes 16 GB"
    )
    absl_flags.DEFINE_integer(
        "interactions",
        synthetic.SIZES["large"].interactions,
        "of the size large; MovieLens-20M has 20000000",
        lower_bound=synthetic.SIZES["large"].users * synthetic.SIZES["large"].fewest,
        upper_bound=200_000_000,
    )
    absl_flags.DEFINE_list(
        "batch_sizes",
        [],
        "triples (sequence backbones: windows) per step; default: 2048,8192,65536 for mf, 65536 "
        "for lightgcn on large, else the backbone's own",
    )
    absl_flags.DEFINE_list(
        "dtypes",
        [],
        "storage of tables; default: float32, of mf without --peer also bfloat16",
    )
    absl_flags.DEFINE_multi_string(
        "peer", [], f"compare with (repeat, or separate by commas): {', '.join(PEERS)}"
    )
    absl_flags.DEFINE_string("peer_python", "", "Python with the peers; default: this one")
    absl_flags.DEFINE_integer("peer_threads", 0, "threads of a peer; 0 = every core", lower_bound=0)
    absl_flags.DEFINE_integer(
        "peer_batch_size",
        0,
        "triples, rows or positives per step of torch and recbole; 0 = 8192 and 2048, of LightGCN "
        "as many as ours",
        lower_bound=0,
    )
    absl_flags.DEFINE_integer("repeats", 5, "timed turns of each", lower_bound=1)
    absl_flags.DEFINE_float("seconds", 0.5, "about how long a turn takes", lower_bound=0.0)
    absl_flags.DEFINE_integer(
        "steps", 0, "steps per turn instead of --seconds (not of peers)", lower_bound=0
    )
    absl_flags.DEFINE_string("json", "", "also write the rows to this file")
    return (
        "sizes",
        "interactions",
        "batch_sizes",
        "dtypes",
        "repeats",
        "seconds",
        "steps",
        "json",
        "peer",
        "peer_python",
        "peer_threads",
        "peer_batch_size",
    )


def chosen(names: Sequence[str], default: Sequence[str], known: Sequence[str]) -> list[str]:
    """The values of the first flag in `names` that is given, one value or a list; else `default`.

    Args:
      known: valid values; any if empty.
    """
    given = flags.FLAGS
    name = next((name for name in names if given[name].present), None)
    if name is None:
        return list(default)
    value = given[name].value
    values = value if isinstance(value, list) else str(value).split(",")
    unknown = [value for value in values if known and value not in known]
    if unknown or not values:
        raise ConfigError(f"--{name}: {listing(unknown)} is not one of: {listing(known)}")
    return values


def backbones_from_flags(size: str, peers: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The backbones to measure on `size`, and why others are left out unless asked for."""
    trained = [
        name for name in BACKBONES if not peers or any(name in TRAINED_BY[peer] for peer in peers)
    ]
    asked = chosen(("backbone",), (), BACKBONES)
    unknown = [name for name in asked if name not in trained]
    if unknown:
        raise ConfigError(
            f"--peer: {listing(peers)} train {listing(trained)}, not {listing(unknown)}; "
            f"add --backbone={trained[0]}, or --peer=recbole"
        )
    why = {} if asked or size != "large" else LEFT_OUT | (LEFT_OUT_COMPARED if peers else {})
    left_out = {name: why[name] for name in trained if name in why}
    return asked or [name for name in trained if name not in left_out], left_out


def cases_from_flags(size: str, peers: Sequence[str]) -> Iterator[Case]:
    """Every combination asked for; what is not given is swept for matrix factorisation alone.

    Args:
      peers: names of peers, which know neither guidance nor bfloat16.
    """
    batch_sizes = chosen(("batch_sizes", "batch_size"), (), ())
    if not all(text.isdecimal() for text in batch_sizes):
        raise ConfigError(f"--batch_sizes: {listing(batch_sizes)}: expected integers, e.g. 2048")

    for backbone in backbones_from_flags(size, peers)[0]:
        most = None if backbone == "mf" and not peers else 1
        default = make_run("", "", backbone=backbone).sampler.batch_size
        # Guidance varies fastest: cases that differ in it alone take turns.
        for dtype, batch_size, guidance in itertools.product(
            chosen(("dtypes", "table_dtype"), TABLE_DTYPES[:most], TABLE_DTYPES),
            batch_sizes or BATCH_SIZES.get((backbone, size)) or BATCH_SIZES.get(backbone, [0]),
            chosen(("guidance",), COMPARED[:most], (*GUIDANCE, *ARMS)),
        ):
            yield Case(size, backbone, guidance, dtype, int(batch_size) or default)


def given_knobs() -> dict[str, Any]:
    """The knobs on the command line that hold for every case."""
    names = [
        knobs.flag_name(field)
        for section in config.sections().values()
        for field in dataclasses.fields(section)
    ]
    return {
        name: flags.FLAGS[name].value
        for name in names
        if name in flags.FLAGS and not flags.FLAGS[name].using_default_value and name not in OF_CASE
    }


def main(_: list[str]) -> None:
    given = flags.FLAGS
    names = [name for part in given.peer for name in part.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ConfigError(f"--peer: {listing(unknown)} is not one of: {listing(PEERS)}")
    sizes = chosen(("sizes",), DEFAULT_SIZES, list(synthetic.SIZES))
    cases = {size: list(cases_from_flags(size, names)) for size in sizes}
    shared = given_knobs()
    for case in itertools.chain.from_iterable(cases.values()):
        case.config(shared, "")  # what is wrong is said now

    rows: list[Row] = []
    for size in sizes:
        for name, why in backbones_from_flags(size, names)[1].items():
            print(f"  {size} {name}: left out, {why}; --backbone={name} measures it", flush=True)

        spec = synthetic.SIZES[size]
        if size == "large":
            spec = dataclasses.replace(spec, interactions=given.interactions)
        try:
            rows += measure(
                cases[size],
                shared,
                synthetic.make(spec),
                repeats=given.repeats,
                seconds=given.seconds,
                steps=given.steps,
                peers=names,
                peer_python=given.peer_python,
                peer_job={
                    "threads": given.peer_threads or os.cpu_count() or 1,
                    "batch_size": given.peer_batch_size,
                },
            )
        except turns.Refused as refusal:
            raise UserError(str(refusal)) from refusal

    print(f"\n{render(rows)}")
    if given.json:
        text = json.dumps(rows, indent=2) + "\n"
        pathlib.Path(given.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sections = config.sections()
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(sections[n] for n in sections if n not in ("slices", "evaluation")),
        own=define_flags(),
    )
