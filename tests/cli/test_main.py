"""`slgr`: every command by its name, its help, and what happens to a wrong one."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import worlds

from slgr_jax.cli import main

REPO = pathlib.Path(__file__).resolve().parents[2]


def slgr(*arguments: str, cwd: pathlib.Path = REPO) -> subprocess.CompletedProcess[str]:
    """`slgr ...`, as a process."""
    return subprocess.run(
        [sys.executable, "-m", "slgr_jax.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands_with_a_line_each(arguments):
    shown = slgr(*arguments)
    assert (shown.returncode, shown.stderr) == (0, "")
    for name, command in main.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", shown.stdout, re.MULTILINE)
    assert all(len(line) <= 100 for line in shown.stdout.splitlines())


def test_a_wrong_command_is_one_line_with_the_right_ones():
    shown = slgr("tarin", "--data=x")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        "error: 'tarin' is not a command; commands: " + ", ".join(main.COMMANDS) + "; see "
        "slgr --help\n"
    )


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_is_its_docstring_with_examples_of_its_flags(name):
    shown = slgr(name, "--help").stdout
    assert shown.startswith(main.COMMANDS[name].usage.strip())
    examples = re.findall(
        rf"^    slgr {name} ((?:.*\\\n)*.*)$", main.COMMANDS[name].usage, re.MULTILINE
    )
    assert examples
    if name == "teach":  # its sub-commands have flags of their own: tests/cli/test_teach.py
        return
    flags = set(re.findall(r"^  --(\w+)=", shown, re.MULTILINE))
    for example in examples:
        assert set(re.findall(r"--(\w+)", example)) <= flags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prepare", "missing --source, --input, --out; see slgr prepare --help"),
        ("teach", "no command given"),
        ("train", "missing --data, --workdir; see slgr train --help"),
        ("evaluate", "missing --workdir, or --data and --out in its place; see slgr evaluate"),
    ],
)
def test_a_command_without_its_flags_says_which(name, text):
    shown = slgr(name)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"error: {text}")
    assert shown.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_chain_outside_a_checkout(tmp_path):
    """prepare, teach import, train, evaluate: with the package alone, from an empty folder."""
    pairs = worlds.random_pairs(0, n_users=12, n_items=9, per_user=5)
    rows = [f"u{user},i{item},{1_000 + k}" for k, (user, item) in enumerate(pairs.tolist())]
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "\n".join(rows), "utf-8")
    scores = "user,item,score\nu0,i1,0.5\nu0,i2,0.25\nu3,i1,1\nu3,i4,0\n"
    (tmp_path / "llm.csv").write_text(scores, "utf-8")

    outputs = []
    for arguments in (
        ("prepare", "--source=csv", "--input=log.csv", "--out=DATA", "--split=leave_last"),
        ("teach", "import", "--data=DATA", "--name=llm", "--scores=llm.csv",
         "--keep_training_items"),
        ("train", "--data=DATA", "--workdir=RUN", "--epochs=2", "--batch_size=8", "--dim=4",
         "--guidance=pairwise", "--teacher=llm"),
        ("evaluate", "--workdir=RUN"),
    ):  # fmt: skip
        shown = slgr(*arguments, cwd=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, ""), arguments
        outputs.append(shown.stdout)

    prepared, imported, trained, evaluated = outputs
    assert "log: 12 users, 9 items" in prepared
    assert "4 answers on 2 users and 3 items" in imported
    lines = trained.splitlines()
    assert lines[0].startswith("starting: mf on log, 12 users x 9 items")
    assert [line[:10] for line in lines[1:3]] == ["epoch    1", "epoch    2"]
    assert lines[3].startswith("finished after epoch 2")
    assert lines[3].endswith("run: RUN")
    assert "test: full ranking, mean over users" in evaluated
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DATA", "RUN", "llm.csv", "log.csv"]
