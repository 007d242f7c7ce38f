"""Building the kernels: cached, rebuilt when anything changes, beside other work, refused in words;
and what XLA is told that calls one wrongly."""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError
from slgr_jax.kernels import build

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of compiled kernels."""
    worlds.need_native_kernels()
    monkeypatch.setenv("SLGR_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def sources(cache, monkeypatch):
    """A folder of sources: UNIT.cc, and one header."""
    (cache.parent / "own.h").write_text("#define NUMBER 1\n")
    monkeypatch.setattr(build, "HERE", cache.parent)
    monkeypatch.setattr(build, "HEADERS", ("own.h",))
    return cache.parent


def test_built_once_and_found_again(cache, sources, monkeypatch):
    for name in ("one", "two"):
        (sources / f"{name}.cc").write_text(
            f'#include "own.h"\nint {name}() {{ return NUMBER; }}\n'
        )
    built, second = build.shared_object("one"), build.shared_object("two")
    assert {path.name for path in cache.iterdir()} == {built.name, second.name}
    stamp = built.stat().st_mtime_ns
    assert build.shared_object("one") == built
    assert built.stat().st_mtime_ns == stamp
    # Other flags, another header or another source make another file.
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNOTHING"))
    by_flags = build.shared_object("one")
    (sources / "own.h").write_text("#define NUMBER 2\n")
    by_header = build.shared_object("one")
    (sources / "one.cc").write_text("int one() { return 3; }\n")
    found = [built, by_flags, by_header, build.shared_object("one")]
    assert [ctypes.cdll.LoadLibrary(str(path))._Z3onev() for path in found] == [1, 1, 2, 3]
    assert len(set(found)) == 4


def test_a_compiler_error_is_one_line_and_leaves_nothing(cache, sources):
    (sources / "broken.cc").write_text("int f( { return 1; }\n")
    with pytest.raises(build.BuildError, match=r"failed: .*error"):
        build.shared_object("broken")
    assert list(cache.iterdir()) == []


def test_what_has_begun_is_waited_for_and_built_once(monkeypatch):
    gate, calls = threading.Event(), []

    def slow(unit):
        calls.append(unit)
        assert gate.wait(60)
        raise build.BuildError(f"{unit} has no source")

    monkeypatch.setattr(build, "shared_object", slow)
    monkeypatch.setattr(build, "TARGETS", {"probe": ("f",), "later": ("g",)})
    build.begin("probe", "later")
    build.begin("later")  # while it is being built: nothing more
    gate.set()
    asked = {"platform": "cpu", "devices": 1, "units": ("probe", "later")}
    assert not build.choose("auto", **asked)
    with pytest.raises(ConfigError, match="--kernels=native: probe has no source; use"):
        build.choose("native", **asked)
    with pytest.raises(ConfigError, match="g cannot be had here: later has no source; use --ker"):
        build.ffi_call("g", None)
    assert sorted(calls) == ["later", "probe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "dtype", "units"),
    [
        ("mf", "float32", {"draws", "rows_float32", "ranks"}),
        ("lightgcn", "bfloat16", {"draws", "rows_bfloat16", "ranks", "graph"}),
    ],
)
def test_a_first_run_builds_what_it_uses(cache, tmp_path, backbone, dtype, units):
    """A process in which no other test has XLA know the kernels; it validates, too."""
    dataset = worlds.random_dataset(tmp_path / "d")
    command = [sys.executable, str(REPO / "launch" / "train.py"), f"--data={dataset.path}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--backbone={backbone}", "--kernels=native"]
    command += [f"--table_dtype={dtype}", "--guidance=none", "--epochs=1", "--batch_size=64"]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert {path.name.rsplit("-", 1)[0] for path in cache.iterdir()} == units


def test_no_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler on the PATH"):
        build.compiler()


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch):
    cache.write_text("a file, not a folder")
    with pytest.raises(build.BuildError, match=os.fspath(cache)):
        build.shared_object("draws")


@pytest.fixture
def nothing_built(cache, sources, monkeypatch):
    """A process that has not compiled anything yet, and two units without functions."""
    monkeypatch.setattr(build, "TARGETS", {"draws": (), "ranks": ()})
    for name in build.TARGETS:
        (sources / f"{name}.cc").write_text(f"int {name}() {{ return 1; }}\n")
    memories = (build._building, build._failure, build._say_once)
    for memory in memories:
        memory.cache_clear()
    yield cache
    for memory in memories:
        memory.cache_clear()


def test_auto_falls_back_with_a_line_and_native_says_why(nothing_built, monkeypatch, caplog):
    def none() -> str:
        raise build.BuildError("no C++ compiler")

    monkeypatch.setattr(build, "compiler", none)
    for _ in range(2):
        assert not build.choose("auto", platform="cpu", devices=1)
    assert caplog.messages == ["no native kernels, XLA's slower programs are used: no C++ compiler"]
    assert not build.choose("xla", platform="cpu", devices=1)
    with pytest.raises(ConfigError, match="--kernels=native: no C\\+\\+ compiler; use"):
        build.choose("native", platform="cpu", devices=1)


_FAULTS = {
    "disk": ("echo 'as: draws.o: No space left on device' >&2; exit 1", "No space left on device"),
    "killed": ("kill -9 $$", "failed: no message"),
    "nonsense": ("printf 'not a library' > \"$target\"", "draws-.*(invalid ELF|too short)"),
    "nothing": ("exit 0", "draws-.*cannot be written: No such file"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_compiler_that_fails_half_way_leaves_the_run_to_xla(
    fault, nothing_built, tmp_path, monkeypatch, caplog
):
    """Of two units the first compiles and the second does not: neither is used."""
    script, why = _FAULTS[fault]
    fake = tmp_path / "fake-c++"
    fake.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do target=$word; done\n'  # the last word of the command: -o TARGET
        f'case "$target" in *draws-*) {script};; *) exec {build.compiler()} "$@";; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    asked = {"platform": "cpu", "devices": 1}
    assert build.choose("auto", **asked, units=("ranks",))
    assert not build.choose("auto", **asked, units=("ranks", "draws"))
    (line,) = caplog.messages
    assert re.search(why, line)
    with pytest.raises(ConfigError, match=why):
        build.choose("native", **asked, units=("ranks", "draws"))


def test_a_cache_that_fills_up_is_a_line_too(nothing_built, monkeypatch, caplog):
    nothing_built.write_text("a file, not a folder")
    assert not build.choose("auto", platform="cpu", devices=1)
    assert str(nothing_built) in caplog.text


def test_a_compiler_that_may_not_be_run_is_named(nothing_built, monkeypatch, tmp_path):
    program = tmp_path / "c++"
    program.write_bytes(b"\x7fELF, or so it says")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(build.BuildError, match=f"{re.escape(str(program))} cannot be run"):
        build.shared_object("draws")


def test_steps_and_ranking_name_what_they_call():
    run = make_run("d", "w")
    assert build.step_units(run) == ("draws", "rows_float32")
    run = make_run("d", "w", backbone="lightgcn", table_dtype="bfloat16")
    assert build.units_of(run) == ("draws", "rows_bfloat16", "graph", "ranks")
    guided = {"guidance": "pairwise", "teacher": "t", "gate": "calibrated"}
    guided |= {"gate_inputs": "reference", "reference_runs": "r", "table_dtype": "bfloat16"}
    assert build.step_units(make_run("d", "w", **guided)) == (
        "draws",
        "rows_bfloat16",
        "rows_float32",
        "gates",
    )
    believed = make_run("d", "w", guidance="pairwise", teacher="t", gate="constant")
    assert build.step_units(believed) == ("draws", "rows_float32")


@pytest.mark.parametrize(("platform", "devices"), [("gpu", 1), ("tpu", 4), ("cpu", 8)])
def test_only_one_cpu_device_takes_them(platform, devices):
    assert not build.choose("auto", platform=platform, devices=devices)
    with pytest.raises(ConfigError, match=f"the run has {devices} of kind {platform}"):
        build.choose("native", platform=platform, devices=devices)


def _call(name, out, *arguments, **attributes):
    return jax.jit(lambda *xs: build.ffi_call(name, out)(*xs, **attributes))(*arguments)


def test_a_wrong_call_is_refused_and_nothing_is_computed():
    worlds.need_native_kernels()
    values, at = jnp.arange(4.0), jnp.arange(2)
    found = jax.ShapeDtypeStruct((2,), np.float32)
    np.testing.assert_array_equal(_call("slgr_take", found, values, at), [0.0, 1.0])
    for arguments, out, why in [
        ((at, at), found, "argument 0 is of another type"),
        ((values,), found, "argument 1 is missing"),
        ((values, at, at), found, "argument 2 is not asked for"),
        ((values, at), [found, found], "result 1 is not asked for"),
        ((values, at), jax.ShapeDtypeStruct((2,), np.int32), "result 0 is of another type"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=why):
            _call("slgr_take", out, *arguments)
    table, ids = jnp.ones((3, 2)), jnp.zeros((1, 2), jnp.int32)
    out = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, 2), (1, 2), (2,), (1, 1, 4))]
    arguments = (table, table, jnp.zeros(1, jnp.int32), ids)
    scores, *_ = _call("slgr_factor_scores_float32", out, *arguments, width=np.int64(2), bias=False)
    np.testing.assert_array_equal(scores, [[2.0, 2.0]])
    for attributes in ({"width": np.int64(2)}, {"width": np.float32(2), "bias": False}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"no attribute '(bias|width)'"):
            _call("slgr_factor_scores_float32", out, *arguments, **attributes)


@pytest.mark.parametrize(
    ("unit", "function", "kinds", "least"),
    [
        *(
            row
            for unit in ("rows_float32", "rows_bfloat16")
            for row in (
                (unit, "BlockScores", 4, 2),  # one for each kind of block
                (unit, "BlockGrads", 4, 6),  # rows and slots, of users and of items
                (unit, "Columns", 1, 1),
                (unit, "Distinct", 1, 1),
            )
        ),
        ("draws", "DrawOutside", 1, 5),  # bounds, free, marks, keys, shifts
        ("draws", "DrawTriples", 1, 7),  # those, who has a pair, the positive
        # Entries, lists' bounds, items and scores, what is outside.
        ("draws", "DrawPreferences", 1, 9),
    ],
)
def test_what_is_read_ahead_is_fetched_ahead(unit, function, kinds, least):
    """A compiler may drop calls of a function that only prefetches: no result tells, only time."""
    worlds.need_native_kernels()
    version = subprocess.run([build.compiler(), "--version"], capture_output=True, text=True)
    if "clang" in version.stdout:
        pytest.skip("it is GCC that drops such calls; Clang inlines some of these functions")
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("no objdump to read the compiled kernels with")
    command = [tool, "-d", "--no-show-raw-insn", str(build.shared_object(unit))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.M)[1:]
    named = zip(parts[::2], parts[1::2], strict=True)
    bodies = [body for name, body in named if function in name]
    fetches = sorted(len(re.findall(r"\b(?:prefetch\w*|prfm)\b", body)) for body in bodies)
    assert len(fetches) >= kinds
    assert fetches[-kinds] >= least


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("unit", build.TARGETS)
def test_no_vector_is_wider_than_the_processors(unit, processor):
    """GCC keeps such a vector in memory and compares it a number at a time: right, and slow."""
    worlds.need_native_kernels()
    version = subprocess.run([build.compiler(), "--version"], capture_output=True, text=True)
    if "clang" in version.stdout:
        pytest.skip("only GCC can be asked about it")
    if platform.machine() != "x86_64":
        pytest.skip("no processor of this kind")
    flags = [flag for flag in build.FLAGS if flag not in ("-w", "-O2", "-march=native")]
    told = ["-O0", "-Wno-psabi", "-Werror=vector-operation-performance"]
    include = ["-I", str(build.HERE), "-I", jax.ffi.include_dir()]
    source = str(build.HERE / f"{unit}.cc")
    command = [build.compiler(), *flags, f"-march={processor}", *told, *include]
    subprocess.run([*command, source, "-o", os.devnull], check=True)
