"""A recommender and an LLM that learn from each other in rounds, over files: LLMD4Rec's loop.

    round 0    WORKDIR/round_0 is trained without a teacher
    round r    the LLM learns from WORKDIR/round_(r-1)/student (`serving/student_files.py`); its
               lists become DATA/teacher/NAME_r; WORKDIR/round_r begins with what round r - 1 has
               learned (--init_from), and learns from them

No LLM is called here: where NAME_r is not there yet, the loop says what it awaits and ends; called
again, it goes on. What is in the LLM's place does not matter, another recommender for instance.
One round is ordinary distillation. LLMD4Rec (arXiv 2505.18120) has three to five.

WORKDIR/exchange.json      what was asked, and what each round came to on validation
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from slgr_jax import config
from slgr_jax.config import ExchangeConfig, RunConfig
from slgr_jax.config.knobs import flag_name
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError
from slgr_jax.experiments import pool, results
from slgr_jax.teacher.products import preferences

LOGGER = logging.getLogger(__name__)
RECORD, STUDENT = "exchange.json", "student"
DEFAULT_GUIDANCE = "list_kl"  # LLMD4Rec's


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """What is exchanged.

    Attributes:
      data: dataset directory; workdir: of all rounds.
      teacher: NAME, of which NAME_1, NAME_2, ... are what the LLM says.
      knobs: what the command line says of every run, by name.
    """

    data: str
    workdir: pathlib.Path
    teacher: str
    knobs: Mapping[str, Any]
    options: ExchangeConfig

    def __post_init__(self) -> None:
        guidance = self.knobs.get("guidance", DEFAULT_GUIDANCE)
        if guidance in ("none", config.AUTO, *config.ALIGNMENTS):
            raise ConfigError(
                f"--guidance={guidance}: rounds learn from the LLM's lists; leave it out "
                f"({DEFAULT_GUIDANCE}), or give pairwise or another that learns from lists"
            )
        config.check_used(self.run(1), self.knobs)
        self.there(1)  # whether NAME can be one

    def product(self, number: int) -> str:
        """What the LLM says in a round, under DATA/teacher."""
        return f"{self.teacher}_{number}"

    def directory(self, number: int) -> pathlib.Path:
        """A round's run."""
        return self.workdir / f"round_{number}"

    def run(self, number: int) -> RunConfig:
        """A round's run.

        Raises:
          ConfigError: knobs that do not go together.
        """
        workdir = str(self.directory(number))
        if number:
            guided = {"guidance": DEFAULT_GUIDANCE, **self.knobs, "teacher": self.product(number)}
            begins = {"init_from": str(self.directory(number - 1))}
            return config.make_run(self.data, workdir, **guided, **begins)
        of_guidance = {
            flag_name(field)
            for section in (
                config.GuidanceConfig,
                config.GateConfig,
                *config.method_sections().values(),
            )
            for field in dataclasses.fields(section)
        }
        plain = {name: value for name, value in self.knobs.items() if name not in of_guidance}
        return config.make_run(self.data, workdir, **plain)

    def there(self, number: int) -> bool:
        """Whether the LLM has answered for a round."""
        product = preferences.product_path(self.data, self.product(number))
        return (product / schema.MANIFEST).is_file()

    def asked(self) -> dict[str, Any]:
        """What a later call must have alike."""
        knobs = {name: str(value) for name, value in sorted(self.knobs.items())}
        options = dataclasses.asdict(self.options)
        del options["rounds"]  # more of them go on
        return {"data": self.data, "teacher": self.teacher, "knobs": knobs, **options}


@dataclasses.dataclass(frozen=True)
class ExchangeResult:
    """How far it got.

    Attributes:
      awaited: the round whose answers are not there; None when all rounds are done.
      rounds: of each that is done: round, teacher, metric, best epoch.
      best: the round with the greatest metric, the first of equal ones.
    """

    plan: ExchangePlan
    awaited: int | None
    rounds: list[dict[str, Any]]

    @property
    def best(self) -> int:
        return max(range(len(self.rounds)), key=lambda number: self.rounds[number]["valid"])

    def render(self) -> str:
        """A line a round, and what to do now."""
        metric = self.plan.run(0).train.early_stop_metric
        lines = [f"{'round':>5}  {'valid ' + metric:>16}  {'epoch':>5}  learned from"]
        for row in self.rounds:
            learned = row["teacher"] or "interactions alone"
            lines.append(f"{row['round']:>5}  {row['valid']:>16.4f}  {row['epoch']:>5}  {learned}")
        if self.awaited is None:
            lines.append(f"best on validation: {self.plan.directory(self.best)}")
            return "\n".join(lines)
        name, last = self.plan.product(self.awaited), self.plan.directory(self.awaited - 1)
        command = shlex.join(
            ["slgr", "teach", "import", f"--data={self.plan.data}", f"--name={name}"]
        )
        return "\n".join(
            [
                *lines,
                f"awaiting what the LLM says in round {self.awaited}: let it learn from "
                f"{last / STUDENT} (docs/exchange.md), import its lists, give the same command "
                "again:",
                f"  {command} --scores=FILE --unlisted=below",
            ]
        )


def exchange(plan: ExchangePlan) -> ExchangeResult:
    """Go on until the last round is done, or the LLM's answers to one are not there.

    Raises:
      ConfigError: WORKDIR holds another exchange; a run diverged, or had no validation.
      KeyboardInterrupt: a signal stopped a run; it goes on when called again.
    """
    from slgr_jax.serving import load, student_files

    schema.read_dataset_manifest(plan.data)
    _hold(plan)
    done: list[dict[str, Any]] = []
    for number in range(plan.options.rounds + 1):
        if number and not plan.there(number):
            return ExchangeResult(plan, number, done)
        done.append(_train(plan, number))
        _record(plan, done)
        student = plan.directory(number) / STUDENT
        if number < plan.options.rounds and not student.is_dir():
            options, wanted = plan.options, plan.product(number + 1)
            student_files.write(
                load(str(plan.directory(number))),
                student,
                listed=options.listed,
                temperature=options.student_temperature,
                wanted=wanted,
            )
            LOGGER.info("round %d: wrote %s for the LLM to learn from", number, student)
    return ExchangeResult(plan, None, done)


def _train(plan: ExchangePlan, number: int) -> dict[str, Any]:
    """What a round came to; it is trained unless it is finished."""
    run = plan.run(number)
    if not pool.finished(run):
        LOGGER.info("round %d: training %s; its lines go to train.log there", number, run.workdir)
        pool.fit(run)
    outcome = results.outcome(run.workdir)
    assert outcome is not None, "training ended with an outcome"
    if outcome["best_metric"] is None:
        why = outcome["error"] or f"{plan.data} has no validation part to choose epochs by"
        raise ConfigError(f"round {number}, {run.workdir}: {why}")
    return {
        "round": number,
        "teacher": plan.product(number) if number else "",
        "valid": outcome["best_metric"],
        "epoch": outcome["best_epoch"],
    }


def _hold(plan: ExchangePlan) -> None:
    """Refuse a directory of another exchange."""
    record = results.read_json(plan.workdir / RECORD)
    if record is None:
        return
    was, now = record["asked"], plan.asked()
    if changed := [name for name in now if was.get(name) != now[name]]:
        texts = [f"{name}: {was.get(name)} -> {now[name]}" for name in changed]
        raise ConfigError(
            f"{plan.workdir} holds an exchange with other settings ({'; '.join(texts)}); choose "
            "another --workdir, or remove it"
        )


def _record(plan: ExchangePlan, done: list[dict[str, Any]]) -> None:
    results.write_json(plan.workdir / RECORD, {"asked": plan.asked(), "rounds": done})
