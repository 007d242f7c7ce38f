"""`slgr train` as a user meets it: wrong flags, wrong paths, help."""

from __future__ import annotations

import os
import pathlib
import time

import pytest
import worlds
from commands import launch_train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return worlds.random_dataset(tmp_path_factory.mktemp("data") / "d").path


BAD = {
    "--lambda=-1": "--lambda=-1.0 is below its minimum 0",
    "--backbone=bert": "--backbone='bert' is not one of: mf",
    "--guidance=pairwise": "--guidance=pairwise needs --teacher=NAME",
    "--gate=magic": "--gate='magic' is not one of: paper, constant, rule",
    "--batch_size=abc": "flag --batch_size=abc",
    "--no_such_flag=1": "Unknown command line flag 'no_such_flag'",
    "--early_stop_metric=accuracy": "unknown metric 'accuracy'",
    "--table_shards=3": "--table_shards=3 does not divide the 1 devices",
    "--min_devices=64": "--min_devices=64, but JAX sees 1",
    "--lr=1e38": "NaN or infinite",
    "stray": "unexpected argument stray",
}


@pytest.mark.slow
@pytest.mark.parametrize("flag", BAD)
def test_bad_flags_give_one_line(data, tmp_path, flag):
    found = launch_train(f"--data={data}", f"--workdir={tmp_path / 'run'}", flag)
    assert found.returncode == 2, found.stderr
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1, found.stderr
    assert BAD[flag] in lines[0]


def test_missing_and_wrong_paths_give_one_line(tmp_path):
    for args, text in (
        (("--workdir=x",), "missing --data; see slgr train --help"),
        ((f"--data={tmp_path}/none", f"--workdir={tmp_path}/run"), "is not a directory"),
        ((f"--data={tmp_path}", f"--workdir={tmp_path}/run"), "holds no manifest.json"),
    ):
        found = launch_train(*args)
        assert (found.returncode, len(found.stderr.strip().splitlines())) == (2, 1), found.stderr
        assert text in found.stderr
    assert not (tmp_path / "run").exists()


def test_help_teaches_without_importing_jax():
    begin = time.monotonic()
    found = launch_train("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert found.returncode == 0
    assert time.monotonic() - begin < 10  # under a second on an idle machine
    assert "--lambda=0.1" in found.stdout
    assert "weight of the guidance loss; rlmrec_con and rlmrec_gen: 0.001" in found.stdout
    assert "(>= 0; <= 3.4e+38)" in found.stdout
    imported = {line.split("|")[-1].strip() for line in found.stderr.splitlines()}
    assert not imported & {"jax", "pyarrow", "flax", "numpy"}
