"""A reader of checkpoints beside the run that replaces them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import worlds

from slgr_jax.config import make_run
from slgr_jax.errors import ManifestError
from slgr_jax.training import loop, run_directory
from slgr_jax.training.build import build
from slgr_jax.training.checkpoint import DIRECTORY, Checkpoints
from slgr_jax.training.state import abstract_serving


def _trained(path, epochs):
    dataset = worlds.random_dataset(path / "d")
    run = make_run(str(dataset.path), str(path / f"run{epochs}"), dim=8, epochs=epochs, patience=0)
    loop.train(run)
    return dataset, run


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_in_its_new_place(
    tmp_path, monkeypatch
):
    """The run writes step S' and deletes step S, between a reader's look at S and its reading."""
    dataset, run = _trained(tmp_path, 1)
    serving = abstract_serving(build(run, dataset).trainer)
    saved = Checkpoints(run.workdir, writable=False)
    expected = saved.restore_best(serving)
    root = tmp_path / "run1" / DIRECTORY
    (old,) = [path for path in root.iterdir() if path.name.isdigit()]
    new = root / str(int(old.name) + 7)

    load = saved._checkpointer.load_checkpointables

    def replaced(step, targets):
        if not new.exists():
            old.rename(new)
        return load(step, targets)

    monkeypatch.setattr(saved._checkpointer, "load_checkpointables", replaced)
    found = saved.restore_best(serving)
    saved.close()
    for name, values in expected.values.items():
        np.testing.assert_array_equal(found.values[name], values)


def test_a_checkpoint_that_is_gone_without_another_is_an_error(tmp_path):
    dataset, run = _trained(tmp_path, 1)
    serving = abstract_serving(build(run, dataset).trainer)
    saved = Checkpoints(run.workdir, writable=False)
    assert saved._checkpointer.latest is not None
    for path in (tmp_path / "run1" / DIRECTORY).iterdir():
        shutil.rmtree(path / "best")
    with pytest.raises(ManifestError, match=r"cannot be restored"):
        saved.restore_best(serving)
    saved.close()


def test_the_notes_of_a_checkpoint_that_is_replaced_are_those_of_the_next(tmp_path, monkeypatch):
    _, run = _trained(tmp_path, 1)
    root = tmp_path / "run1" / DIRECTORY
    (old,) = [path for path in root.iterdir() if path.name.isdigit()]
    step = int(old.name)
    looks = []

    def steps_in(path):
        looks.append(path)
        if len(looks) == 1:  # seen, then gone
            old.rename(root / str(step + 7))
            return [step]
        return [step + 7]

    monkeypatch.setattr(run_directory.checkpoint, "steps_in", steps_in)
    newest, notes = run_directory._newest_notes(run.workdir)
    assert (newest, notes) == (
        step + 7,
        (root / str(step + 7) / "_CHECKPOINT_METADATA").read_bytes(),
    )
