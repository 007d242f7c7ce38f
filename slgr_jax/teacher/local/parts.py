"""The finished parts of a long job, kept on disk: a job that was killed goes on where it was."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from slgr_jax.errors import InputError
from slgr_jax.files import atomically

_PLAN = "job.json"


class Parts:
    """Arrays by name in a directory that belongs to one job.

    Raises:
      InputError: the directory holds parts of another job, and `restart` is false.
    """

    def __init__(self, directory: pathlib.Path, job: str, *, restart: bool = False) -> None:
        self._root = directory
        plan = directory / _PLAN
        job_there = json.loads(plan.read_text())["job"] if plan.is_file() else None
        if job_there not in (None, job):
            if not restart:
                raise InputError(
                    f"{directory} holds parts of a job with other settings or data; finish it with "
                    "those, choose another --name, or drop them with --overwrite"
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps({"job": job}))

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return (self._root / f"{name}.npy").is_file()

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The part called `name`, made where it is missing; it appears on disk only when whole."""
        path = self._root / f"{name}.npy"
        if not path.is_file():
            part = make()
            atomically(path, lambda whole: np.save(whole, part, False), durable=True)
        values: np.ndarray = np.load(path, allow_pickle=False)
        return values

    def drop(self) -> None:
        """Remove the directory: the job is done."""
        shutil.rmtree(self._root)
