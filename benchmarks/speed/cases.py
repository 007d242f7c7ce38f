"""Configurations to time, their turns in processes of their own, and what a row says of them.

Used by `throughput.py`. Cases that differ in their guidance alone take turns with each other, and
with the peers: what slows the machine slows all of them, and a ratio is taken round by round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import synthetic
import turns
from peers import TRAINED_BY
from turns import Facts, Player, Turn

from slgr_jax.config import (
    CLICK_BACKBONES,
    LIST_GUIDANCES,
    SEQUENCE_BACKBONES,
    RunConfig,
    knobs,
    make_run,
)
from slgr_jax.experiments.arms import ARMS

FOLDER = pathlib.Path(__file__).parent
Row = dict[str, Any]
# Knobs that each case states for itself.
OF_CASE = ("backbone", "table_dtype", "batch_size", "guidance", "teacher", "reference_runs")


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration."""

    size: str
    backbone: str
    guidance: str
    dtype: str
    batch_size: int

    def peer_group(self) -> tuple[str, int]:
        """What one peer process can take turns with: a backbone; of LightGCN, whose step costs
        the same at any batch size, one batch size."""
        return self.backbone, self.batch_size if self.backbone == "lightgcn" else 0

    def plain(self) -> Case:
        """The same without guidance."""
        return dataclasses.replace(self, guidance="none")

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
        if compared and self.backbone in CLICK_BACKBONES and self.backbone != "din":
            given = {"history_fields": False, **given}
        of_case = {
            "backbone": self.backbone,
            "table_dtype": self.dtype,
            "batch_size": self.batch_size,
        }
        return make_run(folder, "", **{**given, **of_case, **self._guidance(folder)})

    def _guidance(self, folder: str) -> dict[str, Any]:
        """The knobs of its guidance, which is a method or an arm of the comparison."""
        from synthetic_dataset import LISTS, REFERENCE, TEACHER

        named = dict(ARMS.get(self.guidance, {"guidance": self.guidance}))
        if self.guidance == "none":
            return named
        ranks_unlisted = "hard_negatives" in named or named["guidance"] in LIST_GUIDANCES
        named["teacher"] = LISTS if ranks_unlisted else TEACHER
        if "reference_runs" in named:
            named["reference_runs"] = str(pathlib.Path(folder, REFERENCE))
        return named

    @property
    def reads_reference(self) -> bool:
        """Whether it needs a run that was trained before."""
        return "reference_runs" in ARMS.get(self.guidance, {})


@dataclasses.dataclass(frozen=True)
class Measured:
    """One configuration's turns, and those of others in the same rounds.

    Attributes:
      facts: of our process, those at its end included.
      peers: peer -> its turns.
      plain: turns of the same configuration without guidance; () where it took no part.
    """

    case: Case
    config: RunConfig
    facts: Facts
    turns: Sequence[Turn]
    peers: Mapping[str, Sequence[Turn]]
    plain: Sequence[Turn] = ()


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
      repeats: rounds; in each every process that takes part has a turn.
      seconds, steps: length of a turn: about so many seconds, or exactly so many of our steps.
      peers: names; each takes part in the cases of the backbones that it trains.
      peer_job: of a peer: threads, batch_size.
    """
    measured: list[Measured] = []
    facts_of: dict[tuple[Any, str], Facts] = {}
    with tempfile.TemporaryDirectory() as folder:
        guided = _write_data(cases, pairs, folder)
        job = {"pairs": folder, "seconds": seconds, "steps": steps, "validation": guided}

        # A peer lives for as long as the cases are about what it trains.
        for group, of_group in itertools.groupby(cases, Case.peer_group):
            first, *others = of_group
            with contextlib.ExitStack() as stack:
                players: dict[str, Player] = {}
                for name in peers:
                    if first.backbone in TRAINED_BY[name]:
                        command = [peer_python or sys.executable, str(FOLDER / "peers.py")]
                        about = peer_knobs(first.config(given, folder)) | {"peer": name}
                        player = Player(command, job | (peer_job or {}) | about)
                        players[name] = stack.enter_context(player)

                for _, together in itertools.groupby([first, *others], Case.plain):
                    measured += _take_turns(list(together), given, job, players, repeats)
                for name, player in players.items():
                    facts_of[group, name] = player.facts | player.finish()

    shape = {"users": pairs.n_users, "items": pairs.n_items, "interactions": len(pairs)}
    bandwidth = max(result.facts["gather_bandwidth"] for result in measured)
    rows: list[Row] = []
    for result in measured:
        row = our_row(result, bandwidth) | plain_row(result) | shape
        group = result.case.peer_group()
        rows += [row | peer_row(result, name, facts_of[group, name]) for name in result.peers]
        if not result.peers:
            rows.append(row | {"peer": None})
    return rows


def _write_data(cases: Sequence[Case], pairs: synthetic.Pairs, folder: str) -> bool:
    """The pairs; teachers and a reference run where a case has one. Whether one has a teacher."""
    pairs.save(folder)
    guided = any(case.guidance != "none" for case in cases)
    if guided:
        import synthetic_dataset

        dataset = synthetic_dataset.from_pairs(pairs, folder, validation=True)
        synthetic_dataset.write_teachers(dataset)
        if any(case.reads_reference for case in cases):
            synthetic_dataset.write_reference(dataset)
    return guided


def _take_turns(
    cases: Sequence[Case],
    given: Mapping[str, Any],
    job: Facts,
    peers: Mapping[str, Player],
    repeats: int,
) -> list[Measured]:
    """Rounds in which each of `cases`, which differ in their guidance, and each peer has a turn."""
    configs = [case.config(given, job["pairs"], compared="recbole" in peers) for case in cases]
    command = [sys.executable, str(FOLDER / "worker.py")]
    with contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(Player(command, job | {"config": knobs.to_json(config)}))
            for config in configs
        ]
        taken = turns.interleave([*ours, *peers.values()], repeats)
        facts = [player.facts | player.finish() for player in ours]

    of_peers = dict(zip(peers, taken[len(ours) :], strict=True))
    of_cases = dict(zip(cases, taken, strict=False))
    measured = []
    for case, config, case_facts in zip(cases, configs, facts, strict=True):
        plain = of_cases.get(case.plain(), ()) if case.guidance != "none" else ()
        measured.append(Measured(case, config, case_facts, of_cases[case], of_peers, plain))
        print(f"  {_line(measured[-1])}", flush=True)
    return measured


def peer_knobs(run: RunConfig) -> Facts:
    """What a peer is told of a case: its backbone and what of its knobs has a name there too."""
    return {
        "backbone": run.model.backbone,
        "own_batch_size": run.sampler.batch_size,
        "dim": run.model.dim,
        "negatives": run.loss.negatives_per_positive,
        "knobs": dataclasses.asdict(run.model),
    }


# --- rows ----------------------------------------------------------------------------------------


def our_row(result: Measured, bandwidth: float) -> Row:
    """What a row says of our side; `bandwidth` is what the machine can do, in bytes/s."""
    rates = [turn.rate for turn in result.turns]
    rate, facts = statistics.median(rates), result.facts
    return dataclasses.asdict(result.case) | {
        "table_optimizer": result.config.optimizer.table_optimizer,
        "dim": result.config.model.dim,
        "triples_per_s": rate,
        "min": min(rates),
        "max": max(rates),
        "repeats": len(rates),
        **facts,
        "gather_bandwidth": bandwidth,
        "bandwidth_share": facts["bytes_per_triple"] * rate / bandwidth,
        "counted": result.case.counted,
        "rows_per_s": rate * facts["rows_per_triple"] or None,
    }


def ratios(first: Sequence[Turn], second: Sequence[Turn]) -> tuple[float, float, float]:
    """Median, minimum and maximum over rounds of the first's rate by the second's."""
    by_round = [a.rate / b.rate for a, b in zip(first, second, strict=True)]
    return statistics.median(by_round), min(by_round), max(by_round)


def plain_row(result: Measured) -> Row:
    """How many steps without guidance a guided step costs; {} where they were not compared.

    Both learn from as many triples a step, so it is the ratio of their rates.
    """
    if not result.plain:
        return {}
    middle, low, high = ratios(result.plain, result.turns)
    return {"plain_steps": middle, "plain_steps_min": low, "plain_steps_max": high}


def peer_row(result: Measured, name: str, facts: Facts) -> Row:
    """What a row says of a peer; ratio: the median over rounds of our rate by the peer's."""
    rates = [turn.rate for turn in result.peers[name]]
    rate = statistics.median(rates)
    ratio, ratio_min, ratio_max = ratios(result.turns, result.peers[name])
    return {
        "peer": name,
        "peer_triples_per_s": rate,
        "peer_rows_per_s": rate * result.facts["rows_per_triple"] or None,
        "peer_min": min(rates),
        "peer_max": max(rates),
        "ratio": ratio,
        "ratio_min": ratio_min,
        "ratio_max": ratio_max,
        "peer_peak_mb": facts["peak_mb"],
        "peer_facts": facts,
    }


def _line(result: Measured) -> str:
    """What is printed as soon as a case is measured."""
    case, rate = result.case, statistics.median(turn.rate for turn in result.turns)
    line = (
        f"{case.size} {case.backbone} guidance={case.guidance} {case.dtype} "
        f"batch {case.batch_size}: {rate / 1e6:.4f} M {case.counted}/s"
    )
    if result.plain:
        middle, low, high = ratios(result.plain, result.turns)
        line += f", a step costs {middle:.2f} ({low:.2f} to {high:.2f}) without guidance"
    for name, taken in result.peers.items():
        line += f", {name} {statistics.median(turn.rate for turn in taken) / 1e6:.4f} M"
    return line
