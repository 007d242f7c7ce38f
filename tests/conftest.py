"""The test policy: 8 virtual devices, warnings and rank promotion are errors, flags parsed, shapes
checked against their annotations (`shape_checks`).

Most of the suite's time is XLA compiling small programs that run once: LLVM does not optimise them,
the older of two emitters makes them, and what one test has compiled is kept for the others, in this
process or another, and for the commands that tests run. A test that reads a compiled program asks
for a user's with `users_compiler`. A program for 8 devices costs 2.5 times one for a single device:
where the number of devices is not what is tested, runs are those of `one_device`.
"""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator

import hypothesis
import jax
import pytest
import shape_checks
from absl import flags

shape_checks.install()  # before anything imports slgr_jax

# Tracing makes far more objects than the default of 700, and nearly all of them stay.
gc.set_threshold(10_000)

# Who runs the suite in a background (&, nohup) has Python ignore what tests interrupt runs with.
for _signal, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _usual)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any_machine", deadline=None)
hypothesis.settings.load_profile("any_machine")

_quick = {"xla_backend_optimization_level": 0}
if jax.__version_info__[:2] == (0, 10):  # XLA aborts on a flag that it does not know
    _quick["xla_cpu_use_fusion_emitters"] = False
    _quick["xla_cpu_parallel_codegen_split_count"] = 1  # both processors have tests to run
_flags = [f"--{name}={int(value)}" for name, value in _quick.items()]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])  # not read so far

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
_shared = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_compiled = pathlib.Path(tempfile.gettempdir(), f"slgr_jax-tests-{_shared}")
_cache = {
    "jax_compilation_cache_dir": str(_compiled),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
for _name, _value in _cache.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)  # for the commands that tests run


def pytest_collection_finish() -> None:
    """Modules and compiled checks live to the end: a full collection need not look through them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the process that waits for all others
        shutil.rmtree(_compiled, ignore_errors=True)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Raised inside third-party packages on import or teardown; nothing here can mend them.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(orbax|flax)\..*")
        # JAX's cache is read while another process writes: that program is compiled once more.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        yield


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Runs are trained, restored and evaluated on one device."""
    import worlds  # imports slgr_jax, which is too early above

    with worlds.runs_on(1):
        yield


@pytest.fixture
def eight_devices(one_device: None) -> Iterator[None]:
    """In a module of `one_device`: on all of them."""
    import worlds

    with worlds.runs_on(8):
        yield


@pytest.fixture(scope="session")
def users_compiler() -> dict[str, bool]:
    """Options of `.compile(compiler_options=...)` that make the program a user gets."""
    return {name: True for name in _quick if name == "xla_cpu_use_fusion_emitters"}


@pytest.fixture(autouse=True, scope="session")
def _flags_are_parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
