"""When to stop and when to save: signals, and what the processes of a job agree on.

A scheduler's signal may reach one process and not the others, and no two clocks agree on when the
next checkpoint is due. If each did as it saw fit, one would wait for ever in a collective that the
others never enter. So each dispatch of steps carries every process's wishes to all of them; who
wants what is read when the dispatch is, one later, and all act at the same step:

    wishes [devices, 2] of (stop, save), each process its own  ->  sums [2], on all devices

One process does what it wishes at once, and dispatches nothing for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from slgr_jax import cluster
from slgr_jax.config import RunConfig, knobs
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, listing
from slgr_jax.mesh import Layout, put
from slgr_jax.training.checkpoint_manifest import Progress

# Signals that mean: save and leave. Schedulers send some of them before a job's time is over.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class InterruptedValidation(Exception):  # noqa: N818 - nothing went wrong
    """A stop was agreed on between two chunks of a validation."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that any of `STOPS` sets; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.getsignal(number) for number in STOPS}
    # What is ignored stays so: nohup means that a closed terminal is no reason to stop.
    old = {number: handler for number, handler in old.items() if handler != signal.SIG_IGN}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, old.get(signal.SIGINT, signal.SIG_IGN))

    for number in old:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class OneProcess:
    """Of a job of one process: its wishes are what happens.

    Attributes:
      wanted: set by whoever wants it to stop.
      due: whether a checkpoint is.
    """

    wanted: threading.Event
    due: Callable[[], bool]

    @property
    def stop(self) -> bool:
        """Save and leave."""
        return self.wanted.is_set()

    @property
    def save(self) -> bool:
        """A checkpoint is due."""
        return self.due()

    def cast(self) -> None:
        """This process's wishes, sent with a dispatch; what `count` takes when that is read."""

    def count(self, votes: None) -> None:
        """Take note of what a dispatch brought."""

    def saved(self) -> None:
        """A checkpoint has been written."""

    def between_chunks(self) -> None:
        """To be called between the chunks of a validation.

        Raises:
          InterruptedValidation: it is to stop.
        """
        if self.stop:
            raise InterruptedValidation


class Votes:
    """Of a job of several processes: a stop that any of them wants, a save that the first wants.

    Methods as of `OneProcess`, with the same outcome on every process.
    """

    def __init__(self, layout: Layout, wanted: threading.Event, due: Callable[[], bool]) -> None:
        self._wanted, self._due = wanted, due
        self._sharding = NamedSharding(layout.mesh, layout.batch_spec)
        self._devices = layout.devices
        self._sum: Callable[[jax.Array], jax.Array] = jax.jit(
            functools.partial(jnp.sum, axis=0), out_shardings=layout.replicated
        )
        self.stop = self.save = False
        self._of_chunk: jax.Array | None = None

    def cast(self) -> jax.Array:
        wishes = np.array([self._wanted.is_set(), cluster.is_first() and self._due()], np.int32)
        part = np.broadcast_to(wishes, (self._devices, wishes.size))
        return self._sum(put(part, self._sharding))

    def count(self, votes: jax.Array) -> None:
        stop, save = jax.device_get(votes)
        self.stop, self.save = self.stop or bool(stop), self.save or bool(save)

    def saved(self) -> None:
        self.save = False

    def between_chunks(self) -> None:
        before, self._of_chunk = self._of_chunk, self.cast()
        if before is not None:
            self.count(before)
        if self.stop:
            raise InterruptedValidation


Agreement = OneProcess | Votes


def make_agreement(layout: Layout, wanted: threading.Event, due: Callable[[], bool]) -> Agreement:
    """How a loop on these devices learns whether to stop, and whether to save.

    Args:
      wanted: set by whoever wants this process to stop.
      due: whether a checkpoint is, by this process's clock.
    """
    if cluster.processes() == 1:
        return OneProcess(wanted, due)
    return Votes(layout, wanted, due)


def refuse_other_progress(workdir: str, progress: Progress | None) -> None:
    """Refuse a job whose processes would go on from different checkpoints.

    Raises:
      ConfigError: a process sees another one than the first.
    """
    if cluster.processes() == 1:
        return
    steps = cluster.every(str(-1 if progress is None else progress.step))
    for process, step in enumerate(steps):
        if step != steps[0]:
            raise ConfigError(
                f"{workdir}: process {process} sees the checkpoint of step {step}, process 0 that "
                f"of step {steps[0]} (-1: none); the file system shows them different files: give "
                "the same command again, or choose a --workdir that all share"
            )


def refuse_other_settings(run: RunConfig, dataset: Dataset) -> None:
    """Refuse a job whose processes would not compute the same.

    Raises:
      ConfigError: they have other settings, or other data.
    """
    if cluster.processes() == 1:
        return
    sections = json.loads(knobs.to_json(run))
    settings = {
        f"{section}.{name}" if isinstance(values, dict) else section: value
        for section, values in sections.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        if section != "data"  # where it is mounted is a host's own affair
    }
    manifest = dataset.manifest
    settings |= {"--data's split": manifest.split_hash, "--data's ids": manifest.id_map_hash}
    refuse_unequal(settings)


def refuse_unequal(settings: Mapping[str, Any]) -> None:
    """Refuse a job whose processes were started with different settings.

    Args:
      settings: name -> value, as JSON has it.

    Raises:
      ConfigError: a process has others than process 0.
    """
    everyone = [json.loads(text) for text in cluster.every(json.dumps(settings))]
    for process, others in enumerate(everyone):
        changed = [
            f"{name}: {everyone[0].get(name)} -> {others.get(name)}"
            for name in sorted(everyone[0].keys() | others.keys())
            if everyone[0].get(name) != others.get(name)
        ]
        if changed:
            raise ConfigError(
                f"process {process} has other settings than process 0 ({listing(changed)}); start "
                "all of a job alike, or with --cluster=none to work alone"
            )


def refuse_in_a_job(what: str, flags: Mapping[str, str]) -> None:
    """Refuse what is left to one process.

    Args:
      what: a verb, for the fix: evaluate.
      flags: what was asked for, as it is given on a command line -> why one process does it alone.

    Raises:
      ConfigError: this is a job of several processes, and there is such a flag.
    """
    if cluster.processes() == 1:
        return
    for flag, why in flags.items():
        raise ConfigError(
            f"{flag} {why}, and this is a job of {cluster.processes()} processes; {what} so in "
            "one, inside a Slurm step with --cluster=none"
        )
