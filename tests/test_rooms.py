"""Imports run one way: no room imports a room above it, at the top of a module or in a function."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import slgr_jax

ROOT = pathlib.Path(slgr_jax.__file__).parent
# Highest first; rooms of one line are side by side and do not import each other.
ROOMS = (
    ("cli",),
    ("api", "registers"),
    ("experiments",),
    ("reports",),
    ("serving",),
    ("training",),
    ("guidance",),
    ("testing",),
    ("evaluation",),
    ("models",),
    ("teacher",),
    ("sampling",),
    ("data",),
    ("kernels",),
    ("config",),
    ("cluster", "mesh"),
    ("errors", "files", "json_files", "locks", "progress", "user_shards"),
)
# Of the groups of teacher/: what each may import of the others.
TEACHER: dict[str, set[str]] = {
    "products": set(),
    "ask": {"products"},
    "collect": {"ask", "products"},
    "local": {"ask", "products"},
    "audit": {"ask", "products"},
}


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """Names below `slgr_jax` that a module's text imports: `from slgr_jax.data import shards` is
    ("data", "shards")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *below = name.split(".")
            if package == "slgr_jax" and below:
                yield tuple(below)


def climbs(room: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether a module in `room` may not import `target`; both as paths below `slgr_jax`."""
    height = {name: place for place, names in enumerate(ROOMS) for name in names}
    if room[0] != target[0]:
        return target[0] in height and height[room[0]] >= height[target[0]]
    if room[0] != "teacher" or room[1] == target[1]:
        return False
    return target[1] not in TEACHER[room[1]]


def room_of(path: pathlib.Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def modules() -> list[pathlib.Path]:
    # The package's own __init__ is no room: it is the door, and imports lazily.
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_every_room_has_its_floor():
    known = {name for names in ROOMS for name in names}
    assert {room_of(path)[0] for path in modules()} <= known


def test_imports_run_one_way():
    climbing: dict[str, list[str]] = {}
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        for target in imported(path.read_text(encoding="utf-8")):
            if climbs(room_of(path), target):
                climbing.setdefault(name, []).append(".".join(target))
    assert climbing == {}


def test_what_climbs_is_seen():
    text = "def f():\n    from slgr_jax.reports import tables\nimport slgr_jax.data.shards, numpy\n"
    assert set(imported(text)) == {("reports", "tables"), ("data", "shards")}
    assert climbs(("training", "build"), ("reports", "tables"))
    assert not climbs(("reports", "tables"), ("training", "build"))
    assert climbs(("api", "registers"), ("cli", "flags"))
    assert not climbs(("cli", "flags"), ("api",))
    assert climbs(("teacher", "products", "rows"), ("teacher", "ask", "prompts"))
    assert climbs(("teacher", "local", "parts"), ("teacher", "collect", "derive"))
    assert not climbs(("teacher", "audit", "accuracy"), ("teacher", "products", "rows"))
    assert not climbs(("data", "ingest", "prepare"), ("data", "shards"))
