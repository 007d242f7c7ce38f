"""Compile the kernels with the machine's own C++ compiler, once, and hand its functions to XLA.

The shared object lies in the user's cache, named by a hash of everything it was made from; it is
compiled for this very processor. Nothing is compiled when the package is installed: a machine
without a compiler trains with XLA alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax

from slgr_jax.errors import ConfigError

HERE = pathlib.Path(__file__).parent
SOURCES = (HERE / "rows.cc", HERE / "draws.cc", HERE / "ranks.cc", HERE / "graph.cc")
HEADERS = (HERE / "common.h", HERE / "block.h")
TARGETS = (
    "slgr_factor_scores",
    "slgr_factor_update",
    "slgr_row_update",
    "slgr_draw_outside",
    "slgr_draw_triples",
    "slgr_draw_preferences",
    "slgr_take",
    "slgr_rank_rows",
    "slgr_pool_rows",
    "slgr_graph_propagate",
)
# Finite-maths shortcuts stay off: a NaN must stay one. Without errno a square root is one
# instruction.
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti", "-DNDEBUG", "-fPIC", "-w"),
)
_TIMEOUT_S = 180


class BuildError(Exception):
    """Why there are no native kernels here."""


def cache_dir() -> pathlib.Path:
    """Where compiled kernels are kept: $SLGR_KERNEL_CACHE, or the user's cache."""
    chosen = os.environ.get("SLGR_KERNEL_CACHE")
    if chosen:
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "slgr_jax" / "kernels"


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH.

    Raises:
      BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler on the PATH (c++, g++, clang++) and none in $CXX")


def _processor() -> str:
    """What -march=native depends on: the processor's instruction sets."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {flags or platform.processor()}"


def shared_object() -> pathlib.Path:
    """The compiled kernels, built now unless the cache has them.

    Raises:
      BuildError: no compiler, a compiler error, or a cache that cannot be written.
    """
    tool = compiler()
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    made_from = [*texts, tool, *FLAGS, importlib.metadata.version("jaxlib"), _processor()]
    name = f"kernels-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    target = cache_dir() / name
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = pathlib.Path(folder) / name
            objects = [str(built.with_suffix(f".{source.stem}.o")) for source in SOURCES]
            compile_to = (tool, *FLAGS, "-isystem", jax.ffi.include_dir(), "-c", "-o")
            with ThreadPoolExecutor() as pool:  # a compiler process each
                jobs = zip(objects, map(str, SOURCES), strict=True)
                list(pool.map(lambda job: _run(*compile_to, *job), jobs))
            _run(tool, "-shared", *objects, "-o", str(built))
            os.replace(built, target)  # two processes may build at once; either's is good
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _run(*command: str) -> None:
    """Run the compiler.

    Raises:
      BuildError: it failed, with its first error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_TIMEOUT_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise BuildError(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")


@functools.cache
def _registered() -> str | None:
    """None once XLA knows the kernels; otherwise why not."""
    try:
        library = ctypes.cdll.LoadLibrary(str(shared_object()))
        for name in TARGETS:
            jax.ffi.register_ffi_target(
                name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
            )
    except (BuildError, OSError, AttributeError) as error:
        return str(error)
    return None


def choose(wanted: str, *, platform: str, devices: int) -> bool:
    """Whether a run uses the native kernels.

    Args:
      wanted: auto, native or xla (`TrainConfig.kernels`).
      platform, devices: what the run's mesh is made of.

    Raises:
      ConfigError: native is wanted where it cannot be had.
    """
    if wanted == "xla":
        return False
    if platform != "cpu" or devices > 1:
        why: str | None = f"they run on one CPU device, the run has {devices} of kind {platform}"
    else:
        why = _registered()
    if why is not None and wanted == "native":
        raise ConfigError(f"--kernels=native: {why}; use --kernels=xla, or auto")
    return why is None
