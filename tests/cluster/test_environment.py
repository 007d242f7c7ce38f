"""Where a process stands: flags, what schedulers say, and what is missing."""

from __future__ import annotations

import pytest

from slgr_jax.cluster import Place, place
from slgr_jax.cluster.environment import first_host
from slgr_jax.errors import ConfigError

SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_PROCID": "2",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}


def test_a_process_alone_is_no_job():
    assert place(environ={}) is None
    assert place(processes=1, environ={}) is None
    assert place(processes=1, coordinator="host:1", process_id=0, environ=SLURM) is None
    assert place(cluster="none", environ=SLURM) is None
    # The batch script of a Slurm job runs once, whatever the job's tasks; so does a single task.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert place(environ=batch | {"SLURM_NTASKS": "4"}) is None
    assert place(environ=SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert place(environ=TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    # An Indexed Job may be many runs: without --coordinator its pods are not one.
    assert place(environ={"JOB_COMPLETION_INDEX": "3"}) is None


def test_flags_and_schedulers_say_where_a_process_stands():
    assert place("host:1", 4, 2, environ={}) == Place("host:1", 4, 2)
    assert place("host:1", 4, environ={"JOB_COMPLETION_INDEX": "3"}) == Place("host:1", 4, 3)
    assert place(environ=SLURM) == Place(f"node007:{61440 + 12345 % 4096}", 4, 2)
    assert place("other:9", environ=SLURM) == Place("other:9", 4, 2), "a flag wins"
    assert place(environ=TPU) == Place("t-0.svc:8476", 2, 1)
    # Two steps of a Slurm job, on the same nodes, do not meet.
    assert place(environ=SLURM | {"SLURM_STEP_ID": "1"}) != place(environ=SLURM)
    assert Place("[::1]:80", 2, 0).address == ("::1", 80)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3]", "n1"),
        ("n[007,9-10],m2", "n007"),
        ("r1n[03-04]-ib", "r1n03-ib"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"processes": 2}, "also needs --coordinator=HOST:PORT of process 0, --process_id=0..N-1"),
        ({"coordinator": "h:1"}, "also needs --processes=N, --process_id=0..N-1"),
        ({"coordinator": "h:1", "processes": 2, "process_id": 2}, "--process_id=2 is not below"),
        ({"coordinator": "h", "processes": 2, "process_id": 0}, "--coordinator=h is not HOST:PORT"),
        ({"coordinator": "h:99999", "processes": 2, "process_id": 0}, "is not HOST:PORT"),
        ({"cluster": "none", "processes": 2}, "--cluster=none trains alone: drop --coordinator"),
        ({"cluster": "slurm"}, "--cluster=slurm, but the environment names no job"),
    ],
)
def test_what_is_missing_is_named(arguments, text):
    with pytest.raises(ConfigError) as error:
        place(**arguments, environ={})
    assert text in str(error.value)
