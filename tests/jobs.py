"""Jobs of two processes of two devices each, which tests start."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

REPO = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of an error for people; JAX's own log has other ones."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


class Job:
    """Two processes that run `slgr train` together."""

    def __init__(
        self,
        *flags: str,
        each: Sequence[Sequence[str]] = ((), ()),
        environ: Sequence[dict[str, str]] = ({}, {}),
        cwd: Sequence[pathlib.Path] = (REPO, REPO),
        code: Sequence[str] = ("", ""),
    ) -> None:
        """Start them; `each`, `environ`, `cwd` and `code` (in place of the command) by process."""
        shared = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        shared["PYTHONPATH"] = str(REPO)
        command = [str(REPO / "launch" / "train.py")]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, *(["-c", code[at]] if code[at] else command)),
                    *(*flags, *each[at]),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=shared | environ[at],
                cwd=cwd[at],
            )
            for at in (0, 1)
        ]

    def wait_for_epochs(self, workdir: pathlib.Path, count: int) -> None:
        limit, log = time.monotonic() + 200, workdir / "log.jsonl"
        while time.monotonic() < limit and all(x.poll() is None for x in self.processes):
            if log.exists() and len(log.read_text().splitlines()) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"no {count} epochs: {self.end()}")

    def end(self) -> list[Ended]:
        ended = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=200)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            ended.append(Ended(process.returncode, out, err))
        return ended


def by_flags(port: int | None = None) -> list[list[str]]:
    port = free_port() if port is None else port
    shared = [f"--coordinator=localhost:{port}", "--processes=2"]
    return [[*shared, f"--process_id={at}"] for at in (0, 1)]


def by_slurm() -> list[dict[str, str]]:
    """What `srun --ntasks=2` says to each task."""
    shared = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    shared |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": str(time.monotonic_ns() % 97)}
    return [{**shared, "SLURM_PROCID": str(at)} for at in (0, 1)]
