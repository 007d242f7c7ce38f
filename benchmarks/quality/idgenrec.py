"""Amazon Beauty, Sports and Toys from a clone of github.com/agiresearch/IDGenRec, and commands of
`slgr` over them within a number of minutes."""

from __future__ import annotations

import math
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from slgr_jax.errors import ConfigError, InputError

Cell = TypeVar("Cell")  # what a benchmark runs one after the other

DATASETS = ("Beauty", "Sports", "Toys")
SEQUENCES = "user_sequence.txt"
KEYWORDS = "item_generative_indexing_phase_0.txt"
_TO_SAVE = 120  # seconds that a command has to save its runs in


class OutOfTimeError(Exception):
    """--minutes are over."""


class Budget:
    """The time that is left for commands."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf

    def run(self, *arguments: str) -> None:
        """Run a command of `slgr`.

        Raises:
          OutOfTimeError: it was stopped, or did not begin.
          ConfigError: it failed.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        print(shlex.join(["slgr", *arguments]), flush=True)
        process = subprocess.Popen([sys.executable, "-m", "slgr_jax.cli", *arguments])
        try:
            status = process.wait(None if math.isinf(left) else left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_TO_SAVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise OutOfTimeError from None
        if status:
            raise ConfigError(f"slgr {arguments[0]} ended with status {status}; its line is above")


def hold_scale(path: pathlib.Path, scale: str) -> None:
    """Write `scale` to a file of --out, where what is there is of one scale alone.

    Raises:
      ConfigError: it is of another.
    """
    if path.is_file() and (held := path.read_text()) != scale:
        raise ConfigError(f"{path} says --scale={held}; choose another --out for --scale={scale}")
    path.write_text(scale)


def run_all(
    cells: Sequence[Cell], run_cell: Callable[[Cell], dict[str, Any]]
) -> tuple[dict[Cell, dict[str, Any]], list[Cell]]:
    """What each cell came to, and the cells that the budget cut."""
    results: dict[Cell, dict[str, Any]] = {}
    cut = []
    for cell in cells:
        try:
            results[cell] = run_cell(cell)
        except OutOfTimeError:
            cut.append(cell)
    return results, cut


def sample(source: pathlib.Path, target: pathlib.Path, share: float) -> None:
    """Copy a folder of IDGenRec with `share` of its users: those at the places that
    `default_rng(0).choice` draws without replacement, in the order of the file."""
    lines = (source / SEQUENCES).read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = np.random.default_rng(0).choice(len(lines), round(share * len(lines)), replace=False)
    target.mkdir(parents=True, exist_ok=True)
    kept = "".join(lines[place] for place in sorted(chosen))
    (target / SEQUENCES).write_text(kept, encoding="utf-8")
    (target / KEYWORDS).write_bytes((source / KEYWORDS).read_bytes())


def folder_of(root: pathlib.Path, dataset: str) -> pathlib.Path:
    """The folder of a data set in a clone.

    Raises:
      InputError: there is none.
    """
    for folder in (root / "rec_datasets" / dataset, root / dataset):
        if (folder / SEQUENCES).is_file() and (folder / KEYWORDS).is_file():
            return folder
    raise InputError(
        f"{root} holds no rec_datasets/{dataset} with {SEQUENCES} and {KEYWORDS}; give a clone "
        "of github.com/agiresearch/IDGenRec as --input"
    )


def prepare(
    folder: pathlib.Path, data: pathlib.Path, dataset: str, budget: Budget, *split: str
) -> None:
    """`slgr prepare` of a folder of IDGenRec, unless it was done.

    Args:
      folder: with the two files of the data set.
      data: dataset directory to write.
      dataset: its name.
      budget: what is left of the time.
      split: flags of the split.
    """
    if not (data / "manifest.json").is_file():
        where = (f"--input={folder / SEQUENCES}", f"--out={data}")
        budget.run("prepare", "--source=idgenrec", *where, f"--name={dataset}", *split)
