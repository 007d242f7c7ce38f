"""The job that this process takes part in, if any."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from slgr_jax.cluster import channel as channel_lib
from slgr_jax.cluster.channel import Channel
from slgr_jax.cluster.environment import Place
from slgr_jax.errors import ConfigError, UserError

EXIT_INTERRUPTED = channel_lib.EXIT_INTERRUPTED
LOGGER = logging.getLogger("slgr_jax")
# A collective fails before it is known which process was lost; that takes so long to hear of.
_LOSS_S = 3.0
T = TypeVar("T")
_JOB: Channel | None = None


def processes() -> int:
    """How many processes the job has."""
    return 1 if _JOB is None else _JOB.place.processes


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return _JOB is None or _JOB.place.process_id == 0


def start(place: Place | None, *, heartbeat_s: float = 60.0, timeout_s: float = 300.0) -> None:
    """Join a job: wait for all its processes, start JAX over their devices, log a table of them.

    Once in a process's life, before JAX is used; later calls with the same place do nothing.

    Args:
      place: this process's; None: it stays alone.
      heartbeat_s: silence after which a process counts as lost.
      timeout_s: how long the processes wait for each other.

    Raises:
      ConfigError: one did not come, or has not as many devices as the others; JAX is in use.
    """
    global _JOB
    if _JOB is not None and place is not None and place == _JOB.place:
        return
    if place is None:
        import jax

        if _JOB is None and jax.distributed.is_initialized():
            raise ConfigError(
                "jax.distributed.initialize was called before: leave that to slgr_jax, with "
                "coordinator, processes and process_id, so that its processes can agree"
            )
        return
    if _JOB is not None:
        raise ConfigError(f"this process is {_JOB.place} already; it cannot be {place}")

    wires, jax_address = channel_lib.meet(place, timeout_s)
    _JOB = Channel(place, wires, heartbeat_s)
    import jax

    with session():
        # JAX would take SIGTERM for itself, and training stops by votes of its own.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                jax_address,
                place.processes,
                place.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=max(int(timeout_s), 1),
                # Ours says more, and comes first.
                heartbeat_timeout_seconds=max(int(2 * heartbeat_s), 10),
                shutdown_timeout_seconds=max(int(heartbeat_s), 10),
            )
        except RuntimeError as error:
            raise ConfigError(
                f"JAX cannot start over several processes ({str(error).splitlines()[0]}); start "
                "them before anything else uses JAX"
            ) from error
        _introduce(_JOB)


def _introduce(job: Channel) -> None:
    """Log who takes part; refuse unequal numbers of devices."""
    texts = job.gather(json.dumps(_facts()))
    facts = [json.loads(text) for text in texts]
    named = [f"process {at} ({who['host']}, PID {who['pid']})" for at, who in enumerate(facts)]
    job.name(named)
    counts = [who["devices"] for who in facts]
    other = next((at for at, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        raise ConfigError(
            f"process 0 has {counts[0]} devices and process {other} on {facts[other]['host']} has "
            f"{counts[other]}; give every process as many"
        )
    rows = [("process", "host", "PID", "devices", "device memory", "host memory")]
    rows += [
        (
            str(at),
            who["host"],
            str(who["pid"]),
            f"{who['devices']} x {who['kind']}",
            _gigabytes(who["device_bytes"]),
            _gigabytes(who["host_bytes"]),
        )
        for at, who in enumerate(facts)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        say_first(line.rstrip())
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("start")  # connects the devices while all are here


def _facts() -> dict[str, Any]:
    """What this process brings to the job."""
    import jax

    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "device_bytes": stats.get("bytes_limit", 0),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else "shared with the host"


def say_first(line: str) -> None:
    """Log a line once for the job."""
    if is_first():
        LOGGER.info("%s", line)


def leave(line: str, status: int) -> NoReturn:
    """End this process with a line on standard error, without waiting for what JAX waits for."""
    if _JOB is None:
        channel_lib.leave(line, status)
    _JOB.leave(line, status)


def first(text: str) -> str:
    """Process 0's text, on every process.

    Raises:
      UserError: a process failed meanwhile.
    """
    return every(text)[0]


def every(text: str) -> list[str]:
    """The text of every process, in order, on all of them.

    Raises:
      UserError: a process failed meanwhile.
    """
    return [text] if _JOB is None else _JOB.gather(text)


def together(work: Callable[[], T]) -> T:
    """`work`'s result, once every process has done its part of the same.

    Raises:
      UserError: it failed on one process, whose line this is on all of them.
      Exception: as `work`, in a job of one process.
    """
    if _JOB is None:
        return work()
    try:
        result = work()
    except Exception as error:
        _fail(_JOB, error)
    _JOB.gather("")
    return result


@contextlib.contextmanager
def session() -> Iterator[None]:
    """What the processes do as one: they begin and end it together, or fail together.

    A process that is lost meanwhile ends the others with a message and `EXIT_INTERRUPTED`; one that
    fails for a reason of its own ends all with its line, also those that wait in a collective.

    Raises:
      UserError: as of `together`.
    """
    if _JOB is None:
        yield
        return
    with _JOB.working():
        try:
            yield
            _JOB.gather("")
        except Exception as error:
            _fail(_JOB, error)
        except BaseException:
            _JOB.close()
            raise


def _fail(job: Channel, error: Exception) -> NoReturn:
    """Tell all processes of an error of this one.

    Raises:
      UserError: what the job ends with.
      Exception: `error`, where it is a defect or has been told before.
    """
    if job.failure is not None and str(error) == job.failure:
        raise error
    expected = isinstance(error, UserError | OSError)
    if not expected:  # a collective, because another process is gone? Then this one ends meanwhile.
        time.sleep(_LOSS_S)
    what = str(error) if expected else f"{type(error).__name__}, a defect: see its own output"
    line = f"process {job.place.process_id} on {platform.node()}: {what}"
    try:
        job.fail(line)
    except UserError as agreed:
        if expected:
            raise agreed from error
        raise error from None
