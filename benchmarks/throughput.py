"""How many triples a second does a training step do, how near is that to what memory allows,
and how does it compare with other trainers?

    python benchmarks/throughput.py
    python benchmarks/throughput.py --peer=implicit,cornac --peer_python=PYTHON --batch_sizes=8192
    python benchmarks/throughput.py --peer=recbole --peer_python=PYTHON --sizes=ml100k
    python benchmarks/throughput.py --peer=torch --sizes=large --json=rows.json     # on a GPU

Every configuration runs in a process of its own: after a warm-up, --repeats turns of --seconds
each; median, minimum and maximum. Peers (peers.py) stay alive in processes of theirs and take
turns with it, A B A B; the ratio is the median over rounds of our rate by theirs. Data are made
by the script (synthetic.py): the sizes `ml100k` (943 users, 1,682 items, 80,000 interactions)
and `large` (138,000 users, 27,000 items, 10 M interactions), where backbones read them with a
random order in time and 1 to 3 of 18 categories an item. The teacher of guided steps has
scored 20 random items a user; such a step draws as many preferences as triples, and preferences
are not counted as triples.

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

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import synthetic
import turns
from absl import flags as absl_flags
from peers import PEERS, TRAINED_BY
from turns import Facts, Player, Turn

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config import (
    BACKBONES,
    CLICK_BACKBONES,
    GUIDANCE,
    SEQUENCE_BACKBONES,
    TABLE_DTYPES,
    RunConfig,
    knobs,
    make_run,
)
from slgr_jax.errors import ConfigError, UserError, listing

HERE = pathlib.Path(__file__).parent
Row = dict[str, Any]
# Knobs that each case states for itself.
# Uses of the teacher that are measured unless --guidance asks for others.
COMPARED = ("none", "pairwise")
OF_CASE = ("backbone", "table_dtype", "batch_size", "guidance", "teacher")
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
# Column of the table: key of a row and what one unit of the column is.
COLUMNS: dict[str, tuple[str, float]] = {
    "size": ("size", 0),
    "backbone": ("backbone", 0),
    "guidance": ("guidance", 0),
    "dtype": ("dtype", 0),
    "batch": ("batch_size", 0),
    "counted": ("counted", 0),
    "k/s": ("triples_per_s", 1e3),
    "min": ("min", 1e3),
    "max": ("max", 1e3),
    "k rows/s": ("rows_per_s", 1e3),
    "bytes each": ("bytes_per_triple", 1),
    "share %": ("bandwidth_share", 0.01),
    "compile s": ("compile_s", 1),
    "peak MB": ("peak_mb", 1),
    "device MB": ("device_peak_mb", 1),
    "peer": ("peer", 0),
    "peer k/s": ("peer_triples_per_s", 1e3),
    "peer k rows/s": ("peer_rows_per_s", 1e3),
    "peer MB": ("peer_peak_mb", 1),
    "ratio": ("ratio", 0),
    "ratio min": ("ratio_min", 0),
    "ratio max": ("ratio_max", 0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration."""

    size: str
    backbone: str
    guidance: str
    dtype: str
    batch_size: int

    def rival(self) -> tuple[str, int]:
        """What one peer process can take turns with: a backbone; of LightGCN, whose step costs
        the same at any batch size, one batch size."""
        return self.backbone, self.batch_size if self.backbone == "lightgcn" else 0

    @property
    def counted(self) -> str:
        """What is counted."""
        return "places" if self.backbone in SEQUENCE_BACKBONES else "triples"

    def config(self, given: Mapping[str, Any], folder: str, *, compared: bool = False) -> RunConfig:
        """This case on the data in `folder`.

        Args:
          given: knobs by their command-line names; others have the backbone's defaults.
          compared: with RecBole, whose click models but DIN have no field of a history.
        """
        from synthetic_dataset import TEACHER

        plain = compared and self.backbone in CLICK_BACKBONES and self.backbone != "din"
        given = {"history_fields": False, **given} if plain else given
        own = {
            "backbone": self.backbone,
            "table_dtype": self.dtype,
            "batch_size": self.batch_size,
            "guidance": self.guidance,
            "teacher": "" if self.guidance == "none" else TEACHER,
        }
        return make_run(folder, "", **{**given, **own})


@dataclasses.dataclass(frozen=True)
class Measured:
    """One configuration's turns, and those of each peer in the same rounds."""

    case: Case
    config: RunConfig
    facts: Facts  # of our process, those at its end included
    turns: list[Turn]
    peers: dict[str, list[Turn]]


# --- measure -------------------------------------------------------------------------------------


def measure(
    cases: Sequence[Case],
    given: Mapping[str, Any],
    pairs: synthetic.Pairs,
    *,
    repeats: int,
    seconds: float,
    steps: int = 0,
    peers: Sequence[str] = (),
    peer_python: str = "",
    peer_job: Facts | None = None,
) -> list[Row]:
    """The rows of `cases`, all on `pairs`: one a case, or one a case and peer.

    Args:
      given: knobs of every case (`Case.config`).
      peers: names; each takes part in the cases of the backbones that it trains.
      peer_job: of a peer: threads, batch_size.
    """
    found: list[Measured] = []
    facts_of: dict[tuple[Any, str], Facts] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs.save(folder)
        if any(case.guidance != "none" for case in cases):
            import synthetic_dataset

            synthetic_dataset.write_teacher(synthetic_dataset.from_pairs(pairs, folder))
        job = {"pairs": folder, "seconds": seconds, "steps": steps}
        # A peer lives for as long as the cases are about what it trains.
        for of, group in itertools.groupby(cases, Case.rival):
            mine, hard_negatives = list(group), {}
            with contextlib.ExitStack() as stack:
                for name in peers:
                    if mine[0].backbone in TRAINED_BY[name]:
                        about = peer_knobs(mine[0].config(given, folder)) | {"peer": name}
                        command = [peer_python or sys.executable, str(HERE / "peers.py")]
                        player = Player(command, job | (peer_job or {}) | about)
                        hard_negatives[name] = stack.enter_context(player)
                for case in mine:
                    config = case.config(given, folder, compared="recbole" in hard_negatives)
                    command = [sys.executable, str(HERE / "worker.py")]
                    with Player(command, job | {"config": knobs.to_json(config)}) as own:
                        taken = turns.interleave([own, *hard_negatives.values()], repeats)
                        facts = own.facts | own.finish()
                    theirs = dict(zip(hard_negatives, taken[1:], strict=True))
                    found.append(Measured(case, config, facts, taken[0], theirs))
                    print(f"  {_line(found[-1])}", flush=True)
                for name, player in hard_negatives.items():
                    facts_of[of, name] = player.facts | player.finish()
    shape = {"users": pairs.n_users, "items": pairs.n_items, "interactions": len(pairs)}
    bandwidth = max(one.facts["gather_bandwidth"] for one in found)
    return [
        own_row(one, bandwidth)
        | shape
        | (peer_row(one, name, facts_of[one.case.rival(), name]) if name else {"peer": None})
        for one in found
        for name in one.peers or [""]
    ]


def peer_knobs(run: RunConfig) -> Facts:
    """What a peer is told of a case: its backbone and what of its knobs has a name there too."""
    return {
        "backbone": run.model.backbone,
        "own_batch_size": run.sampler.batch_size,
        "dim": run.model.dim,
        "negatives": run.loss.negatives_per_positive,
        "knobs": dataclasses.asdict(run.model),
    }


def own_row(one: Measured, bandwidth: float) -> Row:
    """What a row says of our side; `bandwidth` is what the machine can do, in bytes/s."""
    rates = [turn.rate for turn in one.turns]
    rate, facts = statistics.median(rates), one.facts
    return dataclasses.asdict(one.case) | {
        "table_optimizer": one.config.optimizer.table_optimizer,
        "dim": one.config.model.dim,
        "triples_per_s": rate,
        "min": min(rates),
        "max": max(rates),
        "repeats": len(rates),
        **facts,
        "gather_bandwidth": bandwidth,
        "bandwidth_share": facts["bytes_per_triple"] * rate / bandwidth,
        "counted": one.case.counted,
        "rows_per_s": rate * facts["rows_per_triple"] or None,
    }


def peer_row(one: Measured, name: str, facts: Facts) -> Row:
    """What a row says of a peer; ratio: the median over rounds of our rate by the peer's."""
    theirs = [turn.rate for turn in one.peers[name]]
    ratios = [mine.rate / rate for mine, rate in zip(one.turns, theirs, strict=True)]
    rate = statistics.median(theirs)
    return {
        "peer": name,
        "peer_triples_per_s": rate,
        "peer_rows_per_s": rate * one.facts["rows_per_triple"] or None,
        "peer_min": min(theirs),
        "peer_max": max(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peer_peak_mb": facts["peak_mb"],
        "peer_facts": facts,
    }


def _line(one: Measured) -> str:
    case, rate = one.case, statistics.median(turn.rate for turn in one.turns)
    theirs = "".join(
        f", {name} {statistics.median(turn.rate for turn in taken) / 1e6:.4f} M"
        for name, taken in one.peers.items()
    )
    return (
        f"{case.size} {case.backbone} guidance={case.guidance} {case.dtype} "
        f"batch {case.batch_size}: {rate / 1e6:.4f} M {case.counted}/s{theirs}"
    )


# --- print ---------------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """A header that says on what the rows were measured, and a table of them."""
    from slgr_jax.reports import tables

    shown = [
        {
            name: round(row[key] / unit) if unit else row[key]
            for name, (key, unit) in COLUMNS.items()
            if row.get(key) is not None
        }
        for row in rows
    ]
    columns = [name for name in COLUMNS if any(name in cells for cells in shown)]
    return f"{header(rows)}\n\n{tables.markdown_table(shown, columns)}"


def header(rows: Sequence[Row]) -> str:
    """Machine, versions, optimisers, the measured bandwidth of each size, and the peers."""
    first = rows[0]
    lines = [
        f"{first['devices']}, {first['cores']} cores; {_versions(first['versions'])}; "
        f"d = {first['dim']}, kernels: {first['kernels']}; {first['repeats']} turns"
    ]
    optimizers: dict[str, list[str]] = {}
    for row in {row["backbone"]: row for row in rows}.values():
        optimizers.setdefault(row["table_optimizer"], []).append(row["backbone"])
    lines += [f"table_optimizer={name}: {', '.join(who)}" for name, who in optimizers.items()]
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        gather = mine[0]["gather_bandwidth"] / 1e9
        lines.append(
            f"{size}: {mine[0]['users']:,} users, {mine[0]['items']:,} items, "
            f"{mine[0]['interactions']:,} interactions; random rows of 256 bytes: {gather:.1f} GB/s"
        )
        hard_negatives = {(row["peer"], row["backbone"]): row for row in mine if row["peer"]}
        lines += dict.fromkeys(_about_peer(row) for row in hard_negatives.values())
    return "\n".join(lines)


def _about_peer(row: Row) -> str:
    facts = row["peer_facts"]
    what = f" {facts['model']}" if "model" in facts else ""
    batch = f", batch {facts['batch_size']}" if "batch_size" in facts else ""
    return (
        f"  {row['peer']}{what}: {_versions(facts['versions'])} on {facts['device']}, "
        f"{facts['threads']} threads, {facts['optimizer']}{batch}, "
        f"{facts['skipped']:.0%} of its triples skipped"
    )


def _versions(versions: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# --- the command ---------------------------------------------------------------------------------


def define_flags() -> tuple[str, ...]:
    """Define this command's own flags; their names, for --help."""
    absl_flags.DEFINE_list("sizes", list(synthetic.SIZES), "data: ml100k, large")
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
        *("sizes", "interactions", "batch_sizes", "dtypes", "repeats", "seconds", "steps", "json"),
        *("peer", "peer_python", "peer_threads", "peer_batch_size"),
    )


def chosen(names: Sequence[str], default: Sequence[str], known: Sequence[str]) -> list[str]:
    """The values of the first flag in `names` that is given, one value or a list; else `default`.

    Args:
      known: valid values; any if empty.
    """
    given = flags.FLAGS
    name = next((one for one in names if given[one].present), None)
    if name is None:
        return list(default)
    value = given[name].value
    found = value if isinstance(value, list) else str(value).split(",")
    unknown = [one for one in found if known and one not in known]
    if unknown or not found:
        raise ConfigError(f"--{name}: {listing(unknown)} is not one of: {listing(known)}")
    return found


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
        for guidance, dtype, batch_size in itertools.product(
            chosen(("guidance",), COMPARED[:most], GUIDANCE),
            chosen(("dtypes", "table_dtype"), TABLE_DTYPES[:most], TABLE_DTYPES),
            batch_sizes or BATCH_SIZES.get((backbone, size)) or BATCH_SIZES.get(backbone, [0]),
        ):
            own = make_run("", "", backbone=backbone).sampler.batch_size
            yield Case(size, backbone, guidance, dtype, int(batch_size) or own)


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
    sizes = chosen(("sizes",), list(synthetic.SIZES), list(synthetic.SIZES))
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
