"""Building the kernels: cached, rebuilt when anything changes, refused in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import worlds

from slgr_jax.errors import ConfigError
from slgr_jax.kernels import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of compiled kernels."""
    worlds.need_native_kernels()
    monkeypatch.setenv("SLGR_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_built_once_and_found_again(cache, monkeypatch):
    sources = [cache.parent / name for name in ("one.cc", "two.cc")]
    for number, source in enumerate(sources):
        source.write_text(f"int f{number}() {{ return {number}; }}\n")
    monkeypatch.setattr(build, "SOURCES", tuple(sources))
    built = build.shared_object()
    assert [path.name for path in cache.iterdir()] == [built.name]
    stamp = built.stat().st_mtime_ns
    assert build.shared_object() == built
    assert built.stat().st_mtime_ns == stamp
    # Other flags or another source make another file.
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNOTHING"))
    other = build.shared_object()
    sources[0].write_text("int f0() { return 2; }\n")
    assert len({built, other, build.shared_object()}) == 3


def test_a_compiler_error_is_one_line_and_leaves_nothing(cache, monkeypatch):
    broken = cache.parent / "broken.cc"
    broken.write_text("int f( { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", (broken,))
    with pytest.raises(build.BuildError, match=r"failed: .*error"):
        build.shared_object()
    assert list(cache.iterdir()) == []


def test_no_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler on the PATH"):
        build.compiler()


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch):
    cache.write_text("a file, not a folder")
    with pytest.raises(build.BuildError, match=os.fspath(cache)):
        build.shared_object()


def test_auto_falls_back_and_native_says_why(monkeypatch):
    monkeypatch.setattr(build, "_registered", lambda: "no C++ compiler")
    assert not build.choose("auto", platform="cpu", devices=1)
    assert not build.choose("xla", platform="cpu", devices=1)
    with pytest.raises(ConfigError, match="--kernels=native: no C\\+\\+ compiler; use"):
        build.choose("native", platform="cpu", devices=1)


@pytest.mark.parametrize(("platform", "devices"), [("gpu", 1), ("tpu", 4), ("cpu", 8)])
def test_only_one_cpu_device_takes_them(platform, devices):
    assert not build.choose("auto", platform=platform, devices=devices)
    with pytest.raises(ConfigError, match=f"the run has {devices} of kind {platform}"):
        build.choose("native", platform=platform, devices=devices)


@pytest.mark.parametrize(
    ("function", "kinds", "least"),
    [
        # One function for each kind of block and of table.
        ("BlockScores", 8, 2),
        ("BlockGrads", 8, 6),  # rows and slots, of users and of items
        ("Columns", 1, 1),
        ("Distinct", 1, 1),
        ("DrawOutside", 1, 5),  # bounds, free, marks, keys, shifts
        ("DrawTriples", 1, 7),  # those, who has a pair, the positive
        ("DrawPreferences", 1, 9),  # entries, lists' bounds, items and scores, what is outside
    ],
)
def test_what_is_read_ahead_is_fetched_ahead(function, kinds, least):
    """A compiler may drop calls of a function that only prefetches: no result tells, only time."""
    worlds.need_native_kernels()
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("no objdump to read the compiled kernels with")
    command = [tool, "-d", "--no-show-raw-insn", str(build.shared_object())]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.M)[1:]
    named = zip(parts[::2], parts[1::2], strict=True)
    bodies = [body for name, body in named if function in name]
    fetches = sorted(len(re.findall(r"\b(?:prefetch\w*|prfm)\b", body)) for body in bodies)
    assert len(fetches) >= kinds
    assert fetches[-kinds] >= least
