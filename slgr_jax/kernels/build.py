"""Compile the kernels with the machine's own C++ compiler, once, and hand its functions to XLA.

Each unit is a shared object in the user's cache, named by a hash of everything it was made from; it
is compiled for this very processor. Nothing is compiled when the package is installed: a machine
without a compiler trains with XLA alone. A machine's first run compiles beside its other work: it
begins before JAX is imported, and waits where a unit is first called.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from slgr_jax import files
from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError

HERE = pathlib.Path(__file__).parent
HEADERS = (
    "block.h",
    "calls.h",
    "common.h",
    "products.h",
    "ranks.h",
    "rows.h",
    "tables.h",
    "vectors.h",
)
_OF_ROWS = ("slgr_factor_scores", "slgr_factor_update", "slgr_row_update")
# UNIT.cc, and the functions in it that XLA calls.
TARGETS = {
    "draws": ("slgr_draw_outside", "slgr_draw_triples", "slgr_draw_preferences", "slgr_take"),
    "rows_float32": tuple(f"{name}_float32" for name in _OF_ROWS),
    "rows_bfloat16": tuple(f"{name}_bfloat16" for name in _OF_ROWS),
    "ranks": (
        "slgr_rank_rows",
        "slgr_rank_products",
        "slgr_pool_rows",
        "slgr_pool_products",
    ),
    "graph": ("slgr_graph_propagate",),
    "gates": ("slgr_logistic_gate",),
}
RANKING = ("ranks",)  # units that full ranking calls
# Finite-maths shortcuts stay off: a NaN must stay one. Without errno a square root is one
# instruction.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-DNDEBUG",
    "-fPIC",
    "-shared",
    "-w",
)
_TIMEOUT_S = 180
_LOG = logging.getLogger("slgr_jax.kernels")
_LOG.setLevel(logging.WARNING)  # whatever the level of others' messages


class BuildError(Exception):
    """Why there are no native kernels here."""


def cache_dir() -> pathlib.Path:
    """Where compiled kernels are kept: $SLGR_KERNEL_CACHE, or the user's cache."""
    chosen = os.environ.get("SLGR_KERNEL_CACHE")
    if chosen:
        return pathlib.Path(chosen)
    return files.cache_directory("kernels")


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH.

    Raises:
      BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C++ compiler on the PATH (c++, g++, clang++) and none in $CXX")


def _processor() -> str:
    """What -march=native depends on: the processor's instruction sets."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {flags or platform.processor()}"


def _include() -> str:
    """Where jaxlib keeps XLA's headers: `jax.ffi.include_dir()`, without importing JAX."""
    package = importlib.util.find_spec("jaxlib")
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders:
        raise BuildError("jaxlib is not installed")
    return os.path.join(folders[0], "include")


def shared_object(unit: str) -> pathlib.Path:
    """A compiled unit of `TARGETS`, built now unless the cache has it.

    Raises:
      BuildError: no compiler, a compiler error, or a cache that cannot be written.
    """
    tool, source = compiler(), HERE / f"{unit}.cc"
    texts = [path.read_text(encoding="utf-8") for path in (source, *(HERE / h for h in HEADERS))]
    inputs = [*texts, tool, *FLAGS, importlib.metadata.version("jaxlib"), _processor()]
    digest = hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:16]
    target = cache_dir() / f"{unit}-{digest}.so"
    if target.is_file():
        return target
    _say_compiling()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = pathlib.Path(folder) / target.name
            _run(tool, *FLAGS, "-isystem", _include(), str(source), "-o", str(built))
            os.replace(built, target)  # two processes may build at once; either's is good
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error.strerror}") from error
    return target


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    """As many compiler processes at once as there are processors, first come, first served."""
    return ThreadPoolExecutor(os.cpu_count())


@functools.cache
def _building(unit: str) -> Future[pathlib.Path]:
    return _compilers().submit(shared_object, unit)


def begin(*units: str) -> None:
    """Start to compile units that the cache lacks, in this order, and do not wait.

    It does not fail: where no unit is called, a missing compiler troubles nobody.
    """
    for unit in units:
        _building(unit)


def _run(*command: str) -> None:
    """Run the compiler.

    Raises:
      BuildError: it failed, with its first error; or it cannot be run.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        # A full disk is told by the assembler or the linker, which say nothing of an error.
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        lines += done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")


def step_units(run: RunConfig) -> tuple[str, ...]:
    """What of `TARGETS` a run's training steps call, in the order in which they do."""
    rows = [f"rows_{run.optimizer.table_dtype}"]
    if run.reference_runs:
        rows.append("rows_float32")  # of restored runs, whatever type they were trained with
    graph = ("graph",) if run.model.backbone == "lightgcn" else ()
    gates = ("gates",) if run.guided and run.gate.gate == "calibrated" else ()
    return ("draws", *dict.fromkeys(rows), *graph, *gates)


def units_of(run: RunConfig) -> tuple[str, ...]:
    """What of `TARGETS` a run calls, in the order in which it does."""
    return (*step_units(run), *RANKING)


@functools.cache
def _failure(unit: str) -> str | None:
    """None once XLA knows the unit's functions; otherwise why not."""
    import jax

    try:
        library = ctypes.cdll.LoadLibrary(str(_building(unit).result()))
        for name in TARGETS[unit]:
            jax.ffi.register_ffi_target(
                name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
            )
    except (BuildError, OSError, AttributeError) as error:
        return str(error)
    return None


def ffi_call(name: str, out: Any, **options: Any) -> Callable[..., Any]:
    """`jax.ffi.ffi_call` of a function of `TARGETS`; waits until its unit is compiled.

    Raises:
      ConfigError: it cannot be compiled, and nobody asked (`choose`) whether it can.
    """
    import jax

    reason = _failure(next(unit for unit, names in TARGETS.items() if name in names))
    if reason is not None:
        raise ConfigError(f"{name} cannot be had here: {reason}; use --kernels=xla")
    call: Callable[..., Any] = jax.ffi.ffi_call(name, out, **options)
    return call


def choose(wanted: str, *, platform: str, devices: int, units: Sequence[str] = ("draws",)) -> bool:
    """Whether a run uses the native kernels: whether all that it calls compile here.

    Where `auto` asks and a compiler or its cache fails, one line says so, and XLA's programs,
    which compute the same, do the work.

    Args:
      wanted: auto, native or xla (`TrainConfig.kernels`).
      platform, devices: what the run's mesh is made of.
      units: of `TARGETS`, those that will be called; they are waited for.

    Raises:
      ConfigError: native is wanted where it cannot be had.
    """
    if wanted == "xla":
        return False
    elsewhere = platform != "cpu" or devices > 1
    if elsewhere:
        reason: str | None = f"they run on one CPU device, the run has {devices} of kind {platform}"
    else:
        begin(*units)
        reason = next(filter(None, map(_failure, units)), None)
    if reason is not None and wanted == "native":
        raise ConfigError(f"--kernels=native: {reason}; use --kernels=xla, or auto")
    if reason is not None and not elsewhere:
        _say_once(reason)
    return reason is None


@functools.cache
def _say_compiling() -> None:
    logging.getLogger("slgr_jax").info("compiling CPU kernels, once on this machine: some seconds")


@functools.cache
def _say_once(reason: str) -> None:
    _LOG.warning("no native kernels, XLA's slower programs are used: %s", " ".join(reason.split()))
