"""Knobs on the command line: parsed, explained, and refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags, teach
from slgr_jax.config import PrepareConfig, RunConfig, knobs
from slgr_jax.errors import ConfigError

REPO = pathlib.Path(__file__).resolve().parents[2]
RUN_SECTIONS = tuple(config.sections().values())
COMMANDS = {
    "prepare": (PrepareConfig,),
    **{f"teach {name}": command.flag_sections() for name, command in teach.COMMANDS.items()},
    "train": RUN_SECTIONS,
}


@pytest.fixture(params=COMMANDS)
def sections(request: pytest.FixtureRequest) -> Iterator[tuple[type, ...]]:
    """The sections of a command, defined as flags for one test."""
    yield from _defined(COMMANDS[request.param])


@pytest.fixture
def run_flags() -> Iterator[tuple[type, ...]]:
    """A training run's sections, defined as flags for one test."""
    yield from _defined(RUN_SECTIONS)


def _defined(sections: tuple[type, ...]) -> Iterator[tuple[type, ...]]:
    before = set(flags.FLAGS)
    try:
        for section in sections:
            flags.define_section(section)
        yield sections
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def _parse(*args: str) -> None:
    assert flags.FLAGS(["script", *args]) == ["script"]


def test_every_knob_has_a_flag_with_its_default_and_help(sections):
    for section in sections:
        for field in dataclasses.fields(section):
            flag = flags.FLAGS[knobs.flag_name(field)]
            assert flag.default == field.default
            assert flag.help == knobs.knob_of(field).help
        assert flags.section_from_flags(section) == section()


def test_help_mentions_each_flag_its_default_and_its_choices(sections):
    text = flags.help_text("What it does.", sections, ())
    assert text.startswith("What it does.\n")
    flat = " ".join(text.split())
    for section in sections:
        for field in dataclasses.fields(section):
            name, meta = knobs.flag_name(field), knobs.knob_of(field)
            assert f"\n  --{name}=" in text
            assert " ".join(meta.help.split()) in flat
            for choice in meta.choices or ():
                assert (choice or "''") in flat
    assert all(len(line) <= 100 for line in text.splitlines())


def test_flags_make_the_run_that_they_describe(run_flags):
    _parse("--lambda=0.5", "--ks=5,50", "--noitem_bias", "--guidance=pairwise", "--teacher=t")
    run = flags.run_config_from_flags("d", "w")
    plain = RunConfig("d", "w")
    assert config.differences(plain, run) == [
        "--item_bias: True -> False",
        "--guidance: none -> pairwise",
        "--teacher:  -> t",
        "--lambda: 0.1 -> 0.5",
        "--ks: (10, 20) -> (5, 50)",
        "--early_stop_metric: ndcg@10 -> ndcg@5",  # one that there is
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("10", (10,)), ("10,20", (10, 20)), (" 1 , 2 ", (1, 2)), ("", ())]
)
def test_integers_separated_by_commas(run_flags, text, value):
    _parse(f"--history_bins={text}")
    assert flags.FLAGS["history_bins"].value == value


@pytest.mark.parametrize("text", ["a", "1.5", "1;2", "1 2"])
def test_what_is_no_list_of_integers_is_refused(run_flags, text):
    with pytest.raises(absl_flags.IllegalFlagValueError, match=r"separated by commas, e\.g\. 10,2"):
        _parse(f"--history_bins={text}")


def test_a_value_outside_its_range_is_refused_when_the_section_is_made(run_flags):
    _parse("--ks=10,0")
    with pytest.raises(ConfigError, match="--ks=0 is below its minimum 1"):
        flags.run_config_from_flags("d", "w")


def test_two_knobs_of_one_name_are_a_defect(run_flags):
    with pytest.raises(AssertionError, match="two knobs are called --batch_size"):
        flags.define_section(config.SamplerConfig)


# --- the whole ceremony, in a process of its own ----------------------------------------------

SCRIPT = """
import sys
from slgr_jax import errors
from slgr_jax.cli import flags, teach

def main(rest):
    if rest == ["user"]:
        raise errors.InputError("a\\n  long   story")
    if rest == ["disk"]:
        raise OSError({errno}, "text of the system", "some/file")
    if rest == ["bug"]:
        raise ValueError("a defect")
    if rest == ["key"]:
        raise KeyboardInterrupt
    print("did", rest)

flags.run(main, usage="Usage.", positional=("user", "disk", "bug", "key", "fine"))
"""


def _call(*args: str, number: int = errno.ENOSPC) -> tuple[int, str, str]:
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(errno=number), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=REPO,
    )
    return completed.returncode, completed.stdout, completed.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("user",), "error: a long story"),
        (("nonsense",), "error: 'nonsense' is not a command; commands: user, disk, bug, key, fine"),
        ((), "error: no command given"),
        (("fine", "more"), "error: unexpected argument more; flags look like --name=value"),
        (("fine", "--foo=1"), "error: Unknown command line flag 'foo'"),
    ],
)
def test_what_a_user_did_wrong_is_one_line_and_status_2(args, text):
    code, out, err = _call(*args)
    assert (code, out) == (2, "")
    assert err.startswith(text)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "free space or "), (errno.ENOTDIR, ""), (errno.EROFS, "")]
)
def test_a_path_that_cannot_be_written_is_one_line_and_status_2(number, fix):
    text = f"error: {os.strerror(number)} while writing some/file; {fix}choose another path\n"
    assert _call("disk", number=number) == (2, "", text)


def test_a_defect_keeps_its_traceback():
    for args, number in ((("bug",), 0), (("disk",), errno.ENOENT)):
        code, _, err = _call(*args, number=number)
        assert code == 1
        assert "Traceback" in err


def test_ctrl_c_is_one_line_without_a_traceback():
    code, out, err = _call("key")
    assert (code, out) == (130, "")
    assert err == "interrupted; the same command goes on or begins anew\n"


def test_the_work_is_done():
    assert _call("fine") == (0, "did ['fine']\n", "")


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("--help", "Usage."),  # in the buffer until the end
        ("--help", "Usage. " * 2_000),  # past it
        ("fine", "Usage."),
    ],
)
def test_a_reader_that_goes_away_is_no_defect(command, usage):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        completed = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(errno=0).replace("Usage.", usage), command],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            cwd=REPO,
            env=buffered,
        )
    finally:
        os.close(writer)
    assert (completed.returncode, completed.stderr) == (1, "")
