"""launch/cluster/: each template parsed, and its own part of the work run with stand-ins.

score_ray.py: tests/teacher/collect/test_score_ray.py.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess

import pytest

from slgr_jax.cli import flags
from slgr_jax.cluster import EXIT_INTERRUPTED, place

TEMPLATES = pathlib.Path(__file__).resolve().parents[2] / "launch" / "cluster"
SCRIPTS = ("slurm.sbatch", "score_vllm.sbatch", "tpu_pod.sh")
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda", "Dockerfile.tpu")


@pytest.fixture
def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Make a command of this name that runs these lines; `calls` has what it was called with."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def make(name: str, lines: str = "") -> None:
        path = commands / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{lines}\n')
        path.chmod(0o755)

    return make


def calls(tmp_path: pathlib.Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TEMPLATES / script), *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_template_says_what_it_was_tried_on():
    files = {path.name for path in TEMPLATES.iterdir()}
    assert files == {*SCRIPTS, *DOCKERFILES, "jobset.yaml", "score_ray.py"}
    for name in files:
        assert "# Tried on: " in (TEMPLATES / name).read_text(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    checked = subprocess.run(
        ["bash", "-n", str(TEMPLATES / script)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("status", "restarts", "queued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (134, 3, True), (75, 100, False)],
)
def test_a_slurm_job_is_queued_again_when_it_can_go_on(
    stand_in, tmp_path, status, restarts, queued
):
    assert EXIT_INTERRUPTED == flags.EXIT_INTERRUPTED == 75
    stand_in("srun", f"exit {status}")
    stand_in("scontrol")
    ended = run(
        *("slurm.sbatch", "--data=D", "--workdir=a b"),
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert ended.returncode == status, ended.stderr
    called = calls(tmp_path)
    assert called[0] == "srun --kill-on-bad-exit=0 slgr train --data=D --workdir=a b"
    assert called[1:] == ["scontrol requeue 7"] * queued


def test_slurm_is_asked_for_a_process_a_node_and_a_signal():
    options = re.findall(
        r"^#SBATCH --([\w-]+)=?(.*)$", (TEMPLATES / "slurm.sbatch").read_text(), re.M
    )
    asked = dict(options)
    assert asked["ntasks-per-node"] == "1"
    # To the tasks (B: would be to the batch shell), and one of those that save.
    assert asked["signal"] == "TERM@120"
    assert {"requeue", "open-mode"} <= asked.keys()


def test_request_files_go_through_vllm_once_each(stand_in, tmp_path):
    """`run-batch -i IN -o OUT --model M`: the third one dies."""
    stand_in(
        "vllm",
        "while (( $# )); do case $1 in -i) i=$2; shift;; -o) o=$2; shift;; esac; shift; done\n"
        'cp "$i" "$o"; [[ $i != *2.jsonl ]]',
    )
    requests, results = tmp_path / "requests", tmp_path / "results"
    requests.mkdir()
    for number in range(3):
        (requests / f"requests-{number:05d}.jsonl").write_text(f"{number}\n")
    arguments = ("score_vllm.sbatch", str(requests), str(results), "M", "--seed=1")
    statuses = [run(*arguments, SLURM_ARRAY_TASK_ID=str(at)).returncode for at in (0, 1, 2, 3)]
    assert statuses == [0, 0, 1, 2]
    assert sorted(path.name for path in results.iterdir()) == [
        "results-00000.jsonl",
        "results-00001.jsonl",
    ]
    assert (results / "results-00001.jsonl").read_text() == "1\n"
    first = shlex.split(calls(tmp_path)[0])
    assert first[:2] == ["vllm", "run-batch"]
    assert first[-3:] == ["--model", "M", "--seed=1"]

    assert run(*arguments, SLURM_ARRAY_TASK_ID="0").returncode == 0
    assert len(calls(tmp_path)) == 3, "what is there is not asked again"


@pytest.mark.parametrize(
    "endpoints", ["10.0.0.1,10.0.0.2", "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"]
)
def test_a_tpu_host_finds_its_place(stand_in, tmp_path, endpoints):
    stand_in("curl", f'case $* in *agent-worker-number) echo 1;; *) echo "{endpoints}";; esac')
    stand_in("slgr")
    # What gcloud would run on a host, run here: the command it is given, by a shell.
    stand_in("gcloud", 'for last; do :; done; exec bash -c "${last#--command=}"')
    ended = run("tpu_pod.sh", "pod", "zone", "--data=a b", "--workdir=R")
    assert ended.returncode == 0, ended.stderr
    assert calls(tmp_path)[-1] == (
        "slgr train --coordinator=10.0.0.1:8476 --processes=2 --process_id=1 --data=a b --workdir=R"
    )


def test_the_jobset_is_one_run_that_goes_on():
    yaml = pytest.importorskip("yaml", reason="extra yaml")
    jobset = yaml.safe_load((TEMPLATES / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(
        argument[2:].split("=", 1) for argument in container["args"] if argument.startswith("--")
    )

    assert container["args"][0] == "train"
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert given["coordinator"] == f"{host}:12345"
    assert spec["network"]["enableDNSHostnames"] is True
    assert int(given["processes"]) == job["completions"] == job["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(given["min_devices"]) == gpus * job["completions"]
    assert job["completionMode"] == "Indexed"
    stands = place(given["coordinator"], 2, environ={"JOB_COMPLETION_INDEX": "1"})
    assert stands is not None
    assert stands.process_id == 1

    # Status 2 ends the set; anything else fails the job, which starts the set anew.
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]) == (
        "FailJob",
        {"containerName": container["name"], "operator": "In", "values": [flags.EXIT_USER_ERROR]},
    )
    assert pod["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    mounted = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted
    assert given["workdir"].startswith(container["volumeMounts"][0]["mountPath"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_copies_what_is_there_and_asks_for_extras_that_are(name):
    root = TEMPLATES.parents[1]
    text = re.sub(r"\\\n", " ", (TEMPLATES / name).read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    copied = [source for words in lines if words[0] == "COPY" for source in words[1:-1]]
    assert copied
    assert all((root / source).exists() for source in copied)
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[(.*)\]'", text)
    declared = (root / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", declared, re.M) for extra in extras.split(","))
    user = [at for at, words in enumerate(lines) if words[:2] == ["USER", "slgr"]]
    assert user, "not as root"
    assert lines[-1] == ["ENTRYPOINT", '["slgr"]']
