"""`slgr inspect`: what a run and a dataset directory are, and every damaged file by name."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import worlds

import slgr_jax
from slgr_jax.cli import inspect as command
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, ManifestError
from slgr_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(dataset with a teacher, run of two epochs)."""
    path = tmp_path_factory.mktemp("inspected")
    dataset = worlds.random_dataset(path / "d")
    users = np.repeat(np.arange(6), 3).astype(np.int32)
    items = np.tile(np.arange(3), 6).astype(np.int32)
    worlds.teach(dataset, users, items, np.linspace(0, 1, 18).astype(np.float32), name="llm")
    run = make_run(str(dataset.path), str(path / "run"), dim=8, epochs=2, patience=0)
    loop.train(run)
    return dataset, run


@pytest.fixture
def copies(trained, tmp_path):
    """Copies of both directories."""
    dataset, run = trained
    copied = [
        shutil.copytree(place, tmp_path / place.name)
        for place in map(pathlib.Path, (dataset.path, run.workdir))
    ]
    return copied


def _flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_is_described_as_it_was_trained(trained):
    dataset, run = trained
    seen = slgr_jax.inspect(workdir=run.workdir)
    facts = json.loads(seen.to_json())
    log = [
        json.loads(line)
        for line in (pathlib.Path(run.workdir) / "log.jsonl").read_text().splitlines()
    ]
    assert (facts["finished"], facts["epoch"], facts["epochs"]) == (True, 2, 2)
    assert facts["step"] == log[-1]["step"]
    assert facts["best_metric"] == max(line["valid/ndcg@10"] for line in log)
    assert (facts["backbone"], facts["loss"], facts["guidance"]) == ("mf", "bpr", "none")
    arrays = {array["name"]: array for array in facts["checkpoint"]["arrays"]}
    assert arrays["best/values/user"]["shape"] == [dataset.n_users, 8]
    assert (facts["faults"], facts["evaluated"]) == ([], False)
    (line,) = [line for line in seen.lines if "best/values/user" in line]
    assert (
        line.split()[1:] == f"{dataset.n_users} x 8 float32 {32 * dataset.n_users:,} bytes".split()
    )
    assert "finished: epoch 2 of 2" in str(seen)


def test_a_dataset_is_described_with_its_products(trained):
    dataset, _ = trained
    seen = slgr_jax.inspect(data=dataset.path)
    assert seen.faults == []
    assert seen.facts["counts"]["users"] == dataset.n_users
    assert "18 rows in 1 shards" in seen.facts["teacher"]["llm"]
    assert "every one of 5 shards agrees with its checksum" in str(seen)


def test_each_damaged_file_is_named(copies):
    data, workdir = copies
    (step,) = (workdir / "checkpoints").iterdir()
    paths = [step / "_CHECKPOINT_METADATA", step / "best" / "_METADATA"]
    for path in paths:
        _flip(path)
    (workdir / "metrics.json").write_text('{"test": ')
    seen = slgr_jax.inspect(workdir=workdir)
    checkpoint, metrics = seen.faults
    assert all(f"{path} is damaged: its XXH3" in checkpoint for path in paths)
    assert metrics.startswith(f"{workdir / 'metrics.json'} is damaged")
    assert str(seen).count("DAMAGED: ") == 2

    _flip(next((data / "teacher" / "llm").glob("*.arrow")))
    (fault,) = slgr_jax.inspect(data=data).faults
    assert "teacher/llm" in fault
    _flip(next((data / "train").glob("*.arrow")))
    _flip(data / "users-00000-of-00001.arrow")
    faults = slgr_jax.inspect(data=data).faults
    assert ["train" in fault or "users" in fault for fault in faults] == [True, True]


def test_a_split_hash_that_the_shards_do_not_have_is_a_fault(copies):
    data, _ = copies
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["split_hash"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert (
        "states split_hash 000000000000, its shards have " in slgr_jax.inspect(data=data).faults[0]
    )


def test_what_is_neither_is_refused(trained, tmp_path):
    dataset, run = trained
    with pytest.raises(ConfigError, match=r"is not a run: it holds no config\.json"):
        slgr_jax.inspect(workdir=dataset.path)
    with pytest.raises(ManifestError, match="is not a finished product"):
        slgr_jax.inspect(data=run.workdir)
    with pytest.raises(ConfigError, match="give one of workdir=RUN and data=DATA"):
        slgr_jax.inspect()


def test_the_command_exits_with_2_and_names_the_file(copies, capsys, monkeypatch):
    data, workdir = copies

    class Given:
        def __init__(self, **flags):
            self.__dict__.update(flags)

    monkeypatch.setattr(
        command.flags, "FLAGS", Given(workdir=[str(workdir)], data=str(data), json=True)
    )
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["run", "dataset"]
    (step,) = (workdir / "checkpoints").iterdir()
    _flip(step / "manifest.json")
    with pytest.raises(SystemExit) as error:
        command.main([])
    assert error.value.code == 2
    assert f"error: damaged: {step / 'manifest.json'} is damaged" in capsys.readouterr().err
