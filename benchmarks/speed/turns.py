"""Programs that take turns: each in a process of its own, only one of them computing at a time.

    with Player([python, script], job) as player:       # the process that compares
        player.facts, player.turn(), player.finish()

    turns.serve(prepare)                                 # the script: job -> Contestant

One JSON object a line over the child's standard input and output. A child stays alive between
its turns, so compiled programs and caches stay warm. Nothing but the standard library is
imported here: the other side may be an environment without this project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

Facts = dict[str, Any]
MOST_UNITS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Turn:
    """One timed repeat."""

    triples: float
    seconds: float

    @property
    def rate(self) -> float:
        """Triples per second."""
        return self.triples / self.seconds


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What a child serves.

    Attributes:
      facts: told when the child is ready: versions, devices.
      turn: one warm, timed repeat.
      finish: what is known only at the end; called once.
    """

    facts: Facts
    turn: Callable[[], Turn]
    finish: Callable[[], Facts] = dict


class Refused(Exception):  # noqa: N818 - it is an answer, not a defect
    """The child cannot do the job, in one line that says what to change."""


# --- the child -----------------------------------------------------------------------------------


def serve(prepare: Callable[[Facts], Contestant]) -> None:
    """Read a job, prepare it, then take a turn whenever told to; ends with its input."""
    # What libraries print must not end up between the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Facts) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        contestant = prepare(json.loads(sys.stdin.readline()))
        say(contestant.facts)
        for line in sys.stdin:
            if line.strip() == "turn":
                say(dataclasses.asdict(contestant.turn()))
            else:
                peak = peak_mb()  # before `finish`, which may measure something else
                say({"peak_mb": peak} | contestant.finish())
                return
    except Refused as refusal:
        say({"refused": str(refusal)})


def peak_mb() -> float:
    """The largest resident set of this process since `restart_peak`, in 10^6 bytes."""
    # Not getrusage where there is a choice: its maximum survives exec, so the child of a large
    # process starts with its parent's.
    found = _status_mb("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def restart_peak() -> None:
    """Let `peak_mb` start anew from what is resident now, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _status_mb(key: str) -> float | None:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            found = next(line for line in status if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024 / 1e6


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes; it must wait for its result."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def units_for(seconds: float, work: Callable[[int], Any]) -> int:
    """How many units make `work` last about `seconds`; at least 1. Warms it up."""
    work(1)
    units = 1
    took = timed(functools.partial(work, units))
    while took < seconds / 4 and units < MOST_UNITS:
        units = min(MOST_UNITS, max(2 * units, math.ceil(units * seconds / 2 / max(took, 1e-9))))
        took = timed(functools.partial(work, units))
    return max(1, round(units * seconds / max(took, 1e-9)))


# --- the process that compares -------------------------------------------------------------------


class HasTurn(Protocol):
    """Whatever can be told to run one repeat."""

    def turn(self) -> Turn:
        """One repeat."""
        ...


def interleave(players: Sequence[HasTurn], rounds: int) -> list[list[Turn]]:
    """The turns of each player: A B A B, so that what slows the machine slows all of them."""
    taken: list[list[Turn]] = [[] for _ in players]
    for _ in range(rounds):
        for mine, player in zip(taken, players, strict=True):
            mine.append(player.turn())
    return taken


class Player:
    """A child process and what it said.

    Attributes:
      facts: the child's, once it is ready.

    Raises:
      Refused: the child cannot do the job.
      RuntimeError: it broke; with the end of what it printed.
    """

    def __init__(self, command: Sequence[str], job: Facts) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._command = list(command)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise Refused(f"{self._command[0]} cannot be run: {error.strerror}") from error
        try:
            self.facts = self._ask(json.dumps(job))
        except BaseException:
            self.close()
            raise

    def turn(self) -> Turn:
        """One repeat of the child."""
        return Turn(**self._ask("turn"))

    def finish(self) -> Facts:
        """The child's closing facts, `peak_mb` among them; it ends."""
        found = self._ask("finish")
        self.close()
        return found

    def close(self) -> None:
        """End the child."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, line: str) -> Facts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            tail = self._errors.read()[-2000:]
            raise RuntimeError(f"{' '.join(self._command)} ended with status {code}:\n{tail}")
        found: Facts = json.loads(answer)
        if "refused" in found:
            raise Refused(found["refused"])
        return found
