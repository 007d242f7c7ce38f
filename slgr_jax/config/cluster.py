"""The knobs of a job of several processes: who takes part, and how long one waits for another."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, Section, knob

CLUSTERS = ("auto", "none", "slurm", "tpu")


@dataclasses.dataclass(frozen=True)
class ClusterConfig(Section):
    """One run on several processes, hosts and their devices."""

    coordinator: str = knob(
        "",
        "HOST:PORT of process 0, which all others reach; found from Slurm and on TPU hosts",
    )
    processes: int = knob(
        0,
        "how many processes work on this run together; 0 = what the scheduler says, else one",
        minimum=0,
        maximum=COUNT,
    )
    process_id: int = knob(
        -1,
        "which one this is, from 0; -1 = what the scheduler says (Slurm, TPU, and Kubernetes' "
        "JOB_COMPLETION_INDEX)",
        minimum=-1,
        maximum=COUNT,
    )
    cluster: str = knob(
        "auto",
        "whose environment variables say the above: auto = those of a Slurm step of several tasks, "
        "or of a TPU slice of several hosts; none = this process works alone",
        choices=CLUSTERS,
    )
    heartbeat_s: float = knob(
        60.0,
        "seconds without a sign of life after which a process counts as lost; the others then end "
        "with status 75. One that was killed is missed at once",
        minimum=1,
        maximum=COUNT,
    )
    start_timeout_s: float = knob(
        300.0,
        "seconds that processes wait for each other before they begin",
        minimum=1,
        maximum=COUNT,
    )
