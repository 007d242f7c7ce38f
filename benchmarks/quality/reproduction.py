"""What a reproduction of printed numbers is made of, and how it is run.

A target is a repository that ships its data, and arms of `slgr` that stand for the rows of its
table. `reproduce.py` runs one; each step is a command of `slgr`, which is shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import pickle
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import idgenrec

from slgr_jax.errors import InputError

Pairs = Iterable[tuple[object, object]]


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of `metrics.json`, test part.

    Attributes:
      name: what the table calls it.
      slice, metric: where it is.
    """

    name: str
    slice: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Product:
    """What an arm learns from, made once.

    Attributes:
      path: its directory inside DATA; made where its manifest is not there.
      commands: of `slgr`, in which {data}, {raw} and {runs} stand for directories.
    """

    path: str
    commands: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
      name: of its run.
      title: what the table calls it.
      flags: of `slgr train`, beside the target's.
      product: what it learns from.
      printed: column -> number as the authors print it.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    product: Product | None = None
    printed: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Question:
    """What one arm gains on another."""

    text: str
    arm: str
    base: str
    column: str


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to reproduce.

    Attributes:
      name: of --target.
      title: of its section.
      repository: on GitHub, owner/name.
      source: where the printed numbers are from.
      read: (clone, folder) -> the files that were read; writes train.csv, valid.csv and test.csv
        (columns user, item), and what products are made of, into the folder.
      flags: of `slgr train`, of every arm.
      columns, arms, questions: of the table.
      differs: what is not as in the original.
    """

    name: str
    title: str
    repository: str
    source: str
    read: Callable[[pathlib.Path, pathlib.Path], Sequence[pathlib.Path]]
    flags: tuple[str, ...]
    columns: tuple[Column, ...]
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    differs: tuple[str, ...]


# --------------------------------------------------------------------------- files


def clone_file(clone: pathlib.Path, name: str, repository: str) -> pathlib.Path:
    """A file of a clone.

    Raises:
      InputError: it is not there, or a pointer to large-file storage stands in its place.
    """
    path = clone / name
    if not path.is_file():
        raise InputError(
            f"{clone} holds no {name}; give a clone of github.com/{repository} as --input"
        )
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a pointer to Git LFS; run `git lfs pull` in the clone")
    return path


class _NumbersOnly(pickle.Unpickler):
    """Refuses whatever is no dict, list, tuple, text or number: a pickle may run any code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise InputError(f"a pickle that holds {module}.{name}; only dicts of numbers are read")


def read_numbers(path: pathlib.Path) -> Any:
    """What a pickle of containers of numbers holds."""
    with path.open("rb") as file:
        return _NumbersOnly(file).load()


def write_pairs(path: pathlib.Path, pairs: Pairs) -> None:
    """Write a CSV file of (user, item)."""
    lines = [f"{user},{item}\n" for user, item in pairs]
    path.write_text("user,item\n" + "".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------- run


def run(
    target: Target,
    clone: pathlib.Path,
    out: pathlib.Path,
    seeds: int,
    budget: idgenrec.Budget,
) -> dict[str, Any]:
    """What the target came to, as JSON has it; what is finished is not run again.

    Seeds come last, so that a budget cuts seeds and not arms.

    Raises:
      InputError: a file of the clone is missing.
      ConfigError: a command failed.
    """
    raw, data, runs = (out / name for name in ("raw", "data", "runs"))
    raw.mkdir(parents=True, exist_ok=True)
    files = target.read(clone, raw)
    if not (data / "manifest.json").is_file():
        parts = (f"--{name}_input={raw / name}.csv" for name in ("valid", "test"))
        budget.run(
            *("prepare", "--source=csv", f"--input={raw / 'train.csv'}", *parts),
            *("--split=premade", f"--out={data}", f"--name={target.name}"),
        )
    folders = {"data": data, "raw": raw, "runs": runs}
    arms = {arm.name: arm for arm in target.arms}
    cells = [(name, seed) for seed in range(seeds) for name in arms]
    metrics, cut = idgenrec.run_all(
        cells,
        lambda cell: _run_arm(target, arms[cell[0]], cell[1], folders=folders, budget=budget),
    )
    rows = [_row(target, arm, metrics) for arm in target.arms]
    return {
        "title": target.title,
        "repository": target.repository,
        "source": target.source,
        "inputs": {str(path.relative_to(clone)): _sha256(path) for path in files},
        "split_hash": json.loads((data / "manifest.json").read_text())["split_hash"],
        "flags": target.flags,
        "columns": [column.name for column in target.columns],
        "rows": rows,
        "gains": gains(target, rows),
        "differs": target.differs,
        "cut": [f"{name}, seed {seed}" for name, seed in cut],
    }


def _run_arm(
    target: Target,
    arm: Arm,
    seed: int,
    *,
    folders: Mapping[str, pathlib.Path],
    budget: idgenrec.Budget,
) -> dict[str, Any]:
    """`metrics.json` of an arm."""
    workdir = folders["runs"] / f"{arm.name}_{seed}"
    metrics = workdir / "metrics.json"
    if not metrics.is_file():
        product = arm.product
        if product and not (folders["data"] / product.path / "manifest.json").is_file():
            for command in product.commands:
                budget.run(*(word.format(**folders) for word in command))
        where = (f"--data={folders['data']}", f"--workdir={workdir}", f"--seed={seed}")
        budget.run("train", *where, *target.flags, *arm.flags)
        budget.run("evaluate", f"--workdir={workdir}")
    read: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return read


def _row(
    target: Target, arm: Arm, metrics: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, Any]:
    """An arm: what is printed of it, and ours, seed after seed."""
    parts = [of_run["test"] for (name, _), of_run in metrics.items() if name == arm.name]
    return {
        "arm": arm.name,
        "title": arm.title,
        "flags": arm.flags,
        "printed": dict(arm.printed),
        "ours": {
            column.name: [part[column.slice][column.metric] for part in parts]
            for column in target.columns
        },
    }


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gains(target: Target, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each question came to: the printed gain, None where it is not printed; ours, a mean over
    the seeds that both arms have, None without any, and its least and greatest over them."""
    by_arm = {row["arm"]: row for row in rows}
    answers = []
    for question in target.questions:
        arm, base = by_arm[question.arm], by_arm[question.base]
        printed = [row["printed"].get(question.column) for row in (arm, base)]
        pairs = zip(arm["ours"][question.column], base["ours"][question.column], strict=False)
        ours = [this - that for this, that in pairs]
        answers.append(
            {
                "question": question.text,
                "column": question.column,
                "printed": None if None in printed else printed[0] - printed[1],
                "ours": statistics.fmean(ours) if ours else None,
                "low": min(ours, default=None),
                "high": max(ours, default=None),
            }
        )
    return answers
