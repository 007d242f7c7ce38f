"""Where a process stands in its job: from flags, or from its scheduler's environment variables.

Slurm: each task of a step (`srun`) with more than one task. Kubernetes: an Indexed Job or a JobSet
says which pod this is (JOB_COMPLETION_INDEX); --coordinator and --processes say the rest. TPU: the
hosts of a slice, in TPU_WORKER_HOSTNAMES and TPU_WORKER_ID.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from slgr_jax.errors import ConfigError, listing

_TPU_PORT = 8476
# Of a Slurm job that names no port: one of the 4096 uppermost, by its number.
_SLURM_PORTS = range(61440, 65536)


class Place(NamedTuple):
    """A process in its job.

    Attributes:
      coordinator: HOST:PORT at which process 0 awaits the others.
      processes: how many there are.
      process_id: which one this is, from 0.
    """

    coordinator: str
    processes: int
    process_id: int

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, port = self.coordinator.rsplit(":", 1)
        return host.strip("[]"), int(port)


def place(
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    cluster: str = "auto",
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Where this process stands; None: it is a job of its own.

    Args:
      coordinator, processes, process_id: "", 0 and -1 are filled in from the environment.
      cluster: whose variables are read: auto, none, slurm, tpu.

    Raises:
      ConfigError: something is missing, or contradicts the rest.
    """
    if processes == 1 and process_id in (-1, 0):
        return None
    if cluster == "none" and (coordinator or processes or process_id >= 0):
        raise ConfigError(
            "--cluster=none trains alone: drop --coordinator, --processes and --process_id, or it"
        )
    detected = _detected(cluster, environ)
    if detected is None and not (coordinator or processes or process_id >= 0):
        return None
    index = environ.get("JOB_COMPLETION_INDEX", "")
    if detected is not None:
        coordinator = coordinator or detected.coordinator
        processes = processes or detected.processes
        process_id = detected.process_id if process_id < 0 else process_id
    elif process_id < 0 and index.isdecimal():
        process_id = int(index)

    missing = [
        name
        for name, known in (
            ("--coordinator=HOST:PORT of process 0", coordinator),
            ("--processes=N", processes),
            ("--process_id=0..N-1", process_id >= 0),
        )
        if not known
    ]
    if missing:
        raise ConfigError(
            f"a job of several processes also needs {listing(missing)}; alone, a process needs "
            "none of them"
        )
    if process_id >= processes:
        raise ConfigError(
            f"--process_id={process_id} is not below --processes={processes}; processes are "
            f"numbered from 0 to {processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator={coordinator} is not HOST:PORT, e.g. node7:12345")
    return Place(coordinator, processes, process_id)


def _detected(cluster: str, environ: Mapping[str, str]) -> Place | None:
    """What the scheduler says; None: nothing, or that there is one process."""
    if cluster == "none":
        return None
    by_name = {"slurm": _slurm, "tpu": _tpu}
    if cluster in by_name:
        detected = by_name[cluster](environ)
        if detected is None:
            raise ConfigError(
                f"--cluster={cluster}, but the environment names no job of several processes "
                "(Slurm: start with srun --ntasks=N; TPU: TPU_WORKER_HOSTNAMES and TPU_WORKER_ID); "
                "give --coordinator, --processes and --process_id"
            )
        return detected
    return _slurm(environ) or _tpu(environ)


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """Of a task of a step; the batch script itself, which runs once, has no step."""
    tasks, nodes = environ.get("SLURM_STEP_NUM_TASKS", ""), environ.get("SLURM_STEP_NODELIST", "")
    rank, job = environ.get("SLURM_PROCID", ""), environ.get("SLURM_JOB_ID", "")
    if not (
        tasks.isdecimal() and int(tasks) > 1 and rank.isdecimal() and job.isdecimal() and nodes
    ):
        return None
    step = environ.get("SLURM_STEP_ID", "0")
    number = int(job) + 97 * (int(step) if step.isdecimal() else 0)
    port = _SLURM_PORTS[number % len(_SLURM_PORTS)]
    return Place(f"{first_host(nodes)}:{port}", int(tasks), int(rank))


def first_host(nodes: str) -> str:
    """The first of a Slurm list of nodes: `node001` of `node[001-004,7],other`."""
    name = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodes)
    assert name is not None
    return "".join(part or "" for part in name.groups())


def _tpu(environ: Mapping[str, str]) -> Place | None:
    """Of a host of a TPU slice."""
    hosts, number = environ.get("TPU_WORKER_HOSTNAMES", ""), environ.get("TPU_WORKER_ID", "")
    names = [name.strip() for name in hosts.split(",") if name.strip()]
    if len(names) < 2 or not number.isdecimal():
        return None
    return Place(f"{names[0]}:{_TPU_PORT}", len(names), int(number))
