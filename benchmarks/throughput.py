"""How many triples a second does a training step do, how near is that to what memory allows,
and how does it compare with other trainers?

    python benchmarks/throughput.py
    python benchmarks/throughput.py --peer=implicit,cornac --peer_python=PYTHON --batch_sizes=8192
    python benchmarks/throughput.py --peer=torch --sizes=large --json=rows.json     # on a GPU

Every configuration runs in a process of its own: after a warm-up, --repeats turns of --seconds
each; median, minimum and maximum. Peers (peers.py) stay alive in processes of theirs and take
turns with it, A B A B; the ratio is the median over rounds of our rate by theirs. Data are made
by the script (synthetic.py): the sizes `ml100k` (943 users, 1,682 items, 80,000 interactions)
and `large` (138,000 users, 27,000 items, 10 M interactions). The teacher of guided steps has
scored 20 random items a user; such a step draws as many preferences as triples, and preferences
are not counted as triples.

  bytes a triple  rows that a triple names * bytes of a row (values and optimiser slots) * 2
                  (read, written) * (1 + preferences / triples)
  share           bytes a triple * triples/s / bandwidth of gathering random rows of 256 bytes out
                  of a table of as many rows as users: the best seen, after the turns of each case

Knobs of a run (--lr, --table_optimizer, ...) apply to every configuration; --batch_size,
--guidance, --backbone and --table_dtype may be given as they are or as lists.
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
from collections.abc import Iterator, Sequence
from typing import Any

import synthetic
import turns
from absl import flags as absl_flags
from peers import PEERS
from turns import Facts, Player, Turn

from slgr_jax import flags, knobs
from slgr_jax.config import BACKBONES, GUIDANCE, TABLE_DTYPES, RunConfig
from slgr_jax.errors import ConfigError, UserError, listing

HERE = pathlib.Path(__file__).parent
Row = dict[str, Any]
# Column of the table: key of a row and what one unit of the column is.
COLUMNS: dict[str, tuple[str, float]] = {
    "size": ("size", 0),
    "backbone": ("backbone", 0),
    "guidance": ("guidance", 0),
    "dtype": ("dtype", 0),
    "batch": ("batch_size", 0),
    "k triples/s": ("triples_per_s", 1e3),
    "min": ("min", 1e3),
    "max": ("max", 1e3),
    "bytes/triple": ("bytes_per_triple", 1),
    "share %": ("bandwidth_share", 0.01),
    "compile s": ("compile_s", 1),
    "peak MB": ("peak_mb", 1),
    "device MB": ("device_peak_mb", 1),
    "peer": ("peer", 0),
    "peer k/s": ("peer_triples_per_s", 1e3),
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

    def config(self, base: RunConfig, folder: str) -> RunConfig:
        """`base` as this case, on the data in `folder`."""
        from synthetic_dataset import TEACHER

        teacher = "" if self.guidance == "none" else TEACHER
        return dataclasses.replace(
            base,
            data=folder,
            model=dataclasses.replace(base.model, backbone=self.backbone),
            optimizer=dataclasses.replace(base.optimizer, table_dtype=self.dtype),
            sampler=dataclasses.replace(base.sampler, batch_size=self.batch_size),
            guidance=dataclasses.replace(base.guidance, guidance=self.guidance, teacher=teacher),
        )


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
    base: RunConfig,
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
      peer_job: of a peer: dim, threads, batch_size.
    """
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pairs.save(folder)
        if any(case.guidance != "none" for case in cases):
            import synthetic_dataset

            synthetic_dataset.write_teacher(synthetic_dataset.from_pairs(pairs, folder))
        job = {"pairs": folder, "seconds": seconds, "steps": steps}
        rivals = {}
        for name in peers:
            command = [peer_python or sys.executable, str(HERE / "peers.py")]
            player = Player(command, job | (peer_job or {}) | {"peer": name})
            rivals[name] = stack.enter_context(player)
        for case in cases:
            config = case.config(base, folder)
            command = [sys.executable, str(HERE / "worker.py")]
            with Player(command, job | {"config": knobs.to_json(config)}) as own:
                taken = turns.interleave([own, *rivals.values()], repeats)
                facts = own.facts | own.finish()
            theirs = dict(zip(rivals, taken[1:], strict=True))
            found.append(Measured(case, config, facts, taken[0], theirs))
            print(f"  {_line(found[-1])}", flush=True)
        facts_of = {name: player.facts | player.finish() for name, player in rivals.items()}
    shape = {"users": pairs.n_users, "items": pairs.n_items, "interactions": len(pairs)}
    bandwidth = max(one.facts["gather_bandwidth"] for one in found)
    return [
        own_row(one, bandwidth)
        | shape
        | (peer_row(one, name, facts_of[name]) if name else {"peer": None})
        for one in found
        for name in rivals or [""]
    ]


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
    }


def peer_row(one: Measured, name: str, facts: Facts) -> Row:
    """What a row says of a peer; ratio: the median over rounds of our rate by the peer's."""
    theirs = [turn.rate for turn in one.peers[name]]
    ratios = [mine.rate / rate for mine, rate in zip(one.turns, theirs, strict=True)]
    return {
        "peer": name,
        "peer_triples_per_s": statistics.median(theirs),
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
        f", {name} {statistics.median(turn.rate for turn in taken) / 1e6:.2f} M"
        for name, taken in one.peers.items()
    )
    return (
        f"{case.size} {case.backbone} guidance={case.guidance} {case.dtype} "
        f"batch {case.batch_size}: {rate / 1e6:.2f} M triples/s{theirs}"
    )


# --- print ---------------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """A header that says on what the rows were measured, and a table of them."""
    from slgr_jax import report

    shown = [
        {
            name: round(row[key] / unit) if unit else row[key]
            for name, (key, unit) in COLUMNS.items()
            if row.get(key) is not None
        }
        for row in rows
    ]
    columns = [name for name in COLUMNS if any(name in cells for cells in shown)]
    return f"{header(rows)}\n\n{report.markdown_table(shown, columns)}"


def header(rows: Sequence[Row]) -> str:
    """Machine, versions, optimiser, the measured bandwidth of each size, and the peers."""
    first = rows[0]
    lines = [
        f"{first['devices']}, {first['cores']} cores; {_versions(first['versions'])}; "
        f"table_optimizer={first['table_optimizer']}, d = {first['dim']}, kernels: "
        f"{first['kernels']}; {first['repeats']} turns"
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        gather = mine[0]["gather_bandwidth"] / 1e9
        lines.append(
            f"{size}: {mine[0]['users']:,} users, {mine[0]['items']:,} items, "
            f"{mine[0]['interactions']:,} interactions; random rows of 256 bytes: {gather:.1f} GB/s"
        )
        for row in {row["peer"]: row for row in mine if row["peer"]}.values():
            facts = row["peer_facts"]
            lines.append(
                f"  {row['peer']}: {_versions(facts['versions'])} on {facts['device']}, "
                f"{facts['threads']} threads, {facts['optimizer']}, "
                f"{facts['skipped']:.0%} of its triples skipped"
            )
    return "\n".join(lines)


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
    absl_flags.DEFINE_list("batch_sizes", ["2048", "8192", "65536"], "triples per step")
    absl_flags.DEFINE_list(
        "dtypes", [], "storage of tables; default: all, with --peer float32, which peers compute in"
    )
    absl_flags.DEFINE_multi_string(
        "peer", [], f"compare with (repeat, or separate by commas): {', '.join(PEERS)}"
    )
    absl_flags.DEFINE_string("peer_python", "", "Python with the peers; default: this one")
    absl_flags.DEFINE_integer("peer_threads", 0, "threads of a peer; 0 = every core", lower_bound=0)
    absl_flags.DEFINE_integer(
        "peer_batch_size",
        0,
        "triples per step of torch and recbole; 0 = 8192 and 2048",
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


def cases_from_flags(compared: bool) -> Iterator[Case]:
    """Every combination asked for.

    Args:
      compared: with peers, which know neither guidance nor bfloat16 nor other backbones.
    """
    most = 1 if compared else None
    batch_sizes = chosen(("batch_sizes", "batch_size"), flags.FLAGS.batch_sizes, ())
    if not all(text.isdecimal() for text in batch_sizes):
        raise ConfigError(f"--batch_sizes: {listing(batch_sizes)}: expected integers, e.g. 2048")
    for size, backbone, guidance, dtype, batch_size in itertools.product(
        chosen(("sizes",), list(synthetic.SIZES), list(synthetic.SIZES)),
        chosen(("backbone",), BACKBONES[:most], BACKBONES),
        chosen(("guidance",), GUIDANCE[:most], GUIDANCE),
        chosen(("dtypes", "table_dtype"), TABLE_DTYPES[:most], TABLE_DTYPES),
        batch_sizes,
    ):
        yield Case(size, backbone, guidance, dtype, int(batch_size))


def main(_: list[str]) -> None:
    given = flags.FLAGS
    names = [name for part in given.peer for name in part.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ConfigError(f"--peer: {listing(unknown)} is not one of: {listing(PEERS)}")
    cases = list(cases_from_flags(bool(names)))
    if names and any(case.backbone != "mf" for case in cases):
        raise ConfigError("--peer: peers train matrix factorisation; add --backbone=mf")
    # Lists that the knobs themselves would refuse; each case states its own.
    given.backbone, given.guidance, given.table_dtype = BACKBONES[0], "none", TABLE_DTYPES[0]
    base = flags.run_config_from_flags("", "")
    rows: list[Row] = []
    for size in dict.fromkeys(case.size for case in cases):
        spec = synthetic.SIZES[size]
        if size == "large":
            spec = dataclasses.replace(spec, interactions=given.interactions)
        try:
            pairs = synthetic.make(spec)
            rows += measure(
                [case for case in cases if case.size == size],
                base,
                pairs,
                repeats=given.repeats,
                seconds=given.seconds,
                steps=given.steps,
                peers=names,
                peer_python=given.peer_python,
                peer_job={
                    "dim": base.model.dim,
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
    sections = flags.run_sections()
    flags.run(
        main,
        usage=__doc__,
        sections=tuple(sections[n] for n in sections if n not in ("slices", "evaluation")),
        own=define_flags(),
    )
