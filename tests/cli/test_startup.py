"""What a command costs before it works: modules imported, programs compiled. No clock but the
processor's: other work on the machine cannot fail these."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
import worlds
from jax import monitoring

from slgr_jax.cli import flags
from slgr_jax.config import ModelConfig, SamplerConfig, TrainConfig
from slgr_jax.training import build, loop, programs
from slgr_jax.training import state as state_lib

REPO = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (REPO / "launch").glob("*.py"))
# A first epoch: seed key, initial state, serving copy, train steps, room for scores, scores, ranks,
# finite check.
PROGRAMS = 8
HEAVY = {"jax", "jaxlib", "numpy", "pyarrow", "flax", "optax", "orbax", "scipy", "matplotlib"}
SMALL = {
    "model": ModelConfig(dim=8),
    "sampler": SamplerConfig(batch_size=32),
    "train": TrainConfig(epochs=1),
}


def _imported(*command: str) -> set[str]:
    """The top-level names that a Python process imports."""
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in completed.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    names = _imported(f"launch/{script}", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "absl" in names  # what the option prints is understood
    assert not names & HEAVY
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_training_imports_nothing_it_may_not_need():
    names = _imported("-c", "import slgr_jax.training.loop")
    assert "jax" in names
    assert not names & {"orbax", "tensorstore", "scipy", "matplotlib", "tensorboardX"}


def test_kernels_can_be_compiled_before_jax_is_imported():
    assert not _imported("-c", "from slgr_jax.kernels import build") & HEAVY


# --- the compilation cache ------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path) -> dict[str, str]:
    """The process's environment for one test: of a user at `tmp_path` who set nothing."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    monkeypatch.setattr(os, "environ", kept | {"HOME": str(tmp_path)})
    return os.environ


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path, environment):
    flags.keep_compiled()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/.cache/slgr_jax/xla"
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["XDG_CACHE_HOME"] = f"{tmp_path}/moved"
    flags.keep_compiled()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/moved/slgr_jax/xla"


@pytest.mark.parametrize("chosen", ["elsewhere", ""])
def test_the_users_choice_of_a_cache_stands(tmp_path, environment, chosen):
    environment["JAX_COMPILATION_CACHE_DIR"] = chosen
    flags.keep_compiled()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == chosen
    assert not list(tmp_path.iterdir())


def test_no_cache_where_none_can_be_written(tmp_path, environment):
    (tmp_path / ".cache").write_text("a file where a directory would be")
    flags.keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in environment


def _train_process(workdir: pathlib.Path, data: pathlib.Path, home: pathlib.Path) -> dict[str, int]:
    """What JAX counts in a process of launch/train.py: programs, and those found in the cache."""
    marks = workdir.with_suffix(".marks")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    subprocess.run(
        [sys.executable, "benchmarks/speed/startup_children.py", "ours", str(marks),
         "launch/train.py", f"--data={data}", f"--workdir={workdir}", "--epochs=1", "--dim=8",
         "--batch_size=32"],
        cwd=REPO,
        env=environment | {"HOME": str(home), "PYTHONPATH": str(REPO)},
        stdout=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip
    return json.loads(marks.read_text().splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    home = tmp_path / "home"
    home.mkdir()
    first = _train_process(tmp_path / "a", dataset.path, home)
    assert first["mark"] == "saved"
    assert 0 < first["programs"] <= PROGRAMS
    assert "hits" not in first
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*-cache")}
    assert len(kept) == first["programs"]
    second = _train_process(tmp_path / "b", dataset.path, home)
    assert second["hits"] == second["programs"] == first["programs"]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*-cache")} == kept


# --- programs -------------------------------------------------------------------------------


def test_an_epoch_compiles_few_programs(tmp_path):
    """Each costs tens of milliseconds at every start, be it in the cache or not."""
    compiled, listening = [], True

    def listen(event: str, _: float, fun_name: str = "", **__: object) -> None:
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    dataset = worlds.random_dataset(tmp_path / "d")
    run = worlds.run_config(dataset, tmp_path / "run", **SMALL)
    monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.train(run)
    finally:
        listening = False
    # To save from several devices, Orbax takes the arrays apart, with a program a piece.
    ours = [name for name in compiled if name != "jit(slice)"]
    assert ours.count("jit(program)") == 1
    assert len(ours) <= PROGRAMS, ours


def test_one_program_makes_the_state_that_its_parts_make(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    trainer = build.build(worlds.run_config(dataset, tmp_path / "run", **SMALL), dataset).trainer
    for seed in (0, 2_000_000_000):
        whole = programs._make_init(trainer, {})(np.int32(seed))
        parts = state_lib.init_state(trainer, seed)
        assert jax.tree.structure(whole) == jax.tree.structure(parts)
        for leaf, part in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            assert leaf.sharding.is_equivalent_to(part.sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, part)
        key = jax.jit(programs._draw_key)(np.int32(seed))
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(seed + 1)))
