"""Checkpoints: damage is named, whatever byte it is; a reader beside the run that replaces them."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil

import numpy as np
import pytest
import worlds
from orbax.checkpoint import v1 as ocp

from slgr_jax.config import make_run
from slgr_jax.errors import ManifestError
from slgr_jax.training import checkpoint_manifest, loop, restore, run_directory
from slgr_jax.training.build import build
from slgr_jax.training.checkpoint import DIRECTORY, Checkpoints
from slgr_jax.training.state import abstract_serving


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(dataset, run): one epoch of a small run; tests work on copies of its directory."""
    path = tmp_path_factory.mktemp("trained")
    dataset = worlds.random_dataset(path / "d")
    run = make_run(str(dataset.path), str(path / "run"), dim=8, epochs=1, patience=0)
    loop.train(run)
    return dataset, run


@pytest.fixture
def copied(trained, tmp_path):
    """The directory of a copy of the run, and of its checkpoint."""
    workdir = pathlib.Path(shutil.copytree(trained[1].workdir, tmp_path / "run"))
    (step,) = checkpoint_manifest.steps_in(workdir / DIRECTORY)
    return workdir, workdir / DIRECTORY / str(step)


def _files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _ensemble(*workdirs):
    """Knobs of a guided run that refers to others."""
    names = ",".join(map(str, workdirs))
    guidance = {"guidance": "pairwise", "teacher": "t", "gate": "paper"}
    return {**guidance, "uncertainty": "ensemble", "reference_runs": names}


def _refused(directory):
    """What `verify` says of a damaged checkpoint."""
    with pytest.raises(ManifestError) as error:
        checkpoint_manifest.verify(directory)
    return str(error.value)


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused_with_the_name_of_its_file(copied):
    """Seeded flips over every file of a checkpoint: arrays, metadata and the list itself."""
    _, directory = copied
    checkpoint_manifest.verify(directory)
    draw = random.Random(0)
    paths = _files(directory)
    assert {"manifest.json", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= {x.name for x in paths}
    for path in paths:
        whole = path.read_bytes()
        for _ in range(40 if path.name == "manifest.json" else 3 * bool(whole)):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            message = _refused(directory)
            assert message.startswith(f"{path} is damaged"), message
            assert message.endswith(
                f"; put back a copy of {directory}, or train anew with --restart"
            )
        path.write_bytes(whole)
    checkpoint_manifest.verify(directory)


def test_a_missing_a_cut_and_an_extra_file_are_each_named(copied):
    _, directory = copied
    for path in _files(directory):
        whole = path.read_bytes()
        path.unlink()
        said = "holds no manifest.json" if path.name == "manifest.json" else f"{path} is missing;"
        assert said in _refused(directory)
        if whole:
            path.write_bytes(whole[:-1])
            said = f"{path} is damaged ("
            if path.name != "manifest.json":
                said = f"{path} has {len(whole) - 1} bytes, manifest.json lists {len(whole)};"
            assert said in _refused(directory)
        path.write_bytes(whole)
    (directory / "state" / "more").write_text("")
    assert f"{directory / 'state' / 'more'} is not in manifest.json; remove it" in _refused(
        directory
    )


def test_every_reader_of_a_run_refuses_a_flipped_byte_of_an_array(trained, copied):
    dataset, _ = trained
    workdir, directory = copied
    for part in ("state", "best"):
        path = max((directory / part).rglob("d/*"), key=lambda path: path.stat().st_size)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        knobs = {"dim": 8, "patience": 0}
        resumed = make_run(str(dataset.path), str(workdir), epochs=2, **knobs)
        refers = make_run(
            str(dataset.path),
            str(workdir.parent / "other"),
            **_ensemble(workdir, trained[1].workdir),
            **knobs,
        )
        for read in (
            lambda: restore.restore_run(str(workdir), "best"),
            lambda: restore.restore_run(str(workdir), "last"),
            lambda resumed=resumed: loop.train(resumed),
            lambda refers=refers: restore.restore_reference_runs(refers, dataset),
        ):
            with pytest.raises(ManifestError, match=rf"{path} is damaged: its XXH3 is \w+, man"):
                read()
        path.write_bytes(whole)
    assert loop.train(resumed).epoch == 2


def test_no_verify_checksums_still_compares_names_and_sizes(copied):
    _, directory = copied
    path = max(_files(directory / "best"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[::-1])
    checkpoint_manifest.verify(directory, contents=False)
    path.write_bytes(b"")
    with pytest.raises(ManifestError, match=r"has 0 bytes, manifest\.json lists"):
        checkpoint_manifest.verify(directory, contents=False)


def test_the_manifest_says_where_the_loop_stood_and_what_was_saved(trained, copied):
    dataset, run = trained
    _, directory = copied
    manifest = checkpoint_manifest.read(directory)
    assert (manifest.progress.epoch, manifest.progress.step) == (1, int(directory.name))
    arrays = {array.name: array for array in manifest.arrays}
    for name, spec in build(run, dataset).trainer.backbone.tables.items():
        saved = arrays[f"best/values/{name}"]
        assert (saved.shape, saved.dtype) == ((spec.rows, spec.width), "float32")
        assert saved.bytes == 4 * spec.rows * spec.width
        assert f"state/tables/{name}" in arrays
    assert manifest.bytes == sum(x.stat().st_size for x in _files(directory)) - (
        (directory / "manifest.json").stat().st_size
    )


def test_a_manifest_of_another_version_is_refused_by_number(copied):
    _, directory = copied
    path = directory / "manifest.json"
    written = checkpoint_manifest.read(directory)
    later = dataclasses.replace(written, version=9)
    sealed = dataclasses.replace(later, checksum=checkpoint_manifest._checksum(later))
    path.write_text(checkpoint_manifest._text(sealed))
    assert "is slgr_jax.checkpoint 9, this code reads slgr_jax.checkpoint 1" in _refused(directory)


# --- what a kill leaves ---------------------------------------------------------------------------


def test_what_an_interrupted_save_left_is_not_read_and_is_removed(copied):
    workdir, directory = copied
    step = int(directory.name)
    left = [
        f"{step + 1}.partial",
        f"{step - 1}.removed",
        f"{step + 1}.partial.orbax-checkpoint-tmp",
    ]
    for name in left:
        shutil.copytree(directory, directory.parent / name)
    (directory.parent / "notes").mkdir()
    reader = Checkpoints(str(workdir), writable=False)
    assert reader.progress().step == step
    reader.close()
    assert len(list(directory.parent.iterdir())) == 5
    Checkpoints(str(workdir), writable=True).close()
    assert {path.name for path in directory.parent.iterdir()} == {str(step), "notes"}


def test_a_kill_while_a_step_is_saved_again_leaves_the_newer_one(copied):
    """Between STEP -> STEP.removed and STEP.partial -> STEP, where there is no STEP."""
    workdir, directory = copied
    shutil.copytree(directory, removed := directory.with_name(f"{directory.name}.removed"))
    (removed / "of the older").touch()
    directory.rename(directory.with_name(f"{directory.name}.partial"))
    Checkpoints(str(workdir), writable=True).close()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    checkpoint_manifest.verify(directory)


# --- beside a run that trains ---------------------------------------------------------------------


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_in_its_new_place(
    trained, copied, monkeypatch
):
    """The run writes step S' and deletes step S, between a reader's look at S and its reading."""
    dataset, run = trained
    workdir, old = copied
    serving = abstract_serving(build(run, dataset).trainer)
    saved = Checkpoints(str(workdir), writable=False)
    expected = saved.restore_best(serving)
    new = old.parent / str(int(old.name) + 7)

    for module, name in ((checkpoint_manifest, "read"), (ocp, "load_checkpointables")):
        original = getattr(module, name)

        def replaced(directory, *more, original=original):
            if not new.exists():
                old.rename(new)
            return original(directory, *more)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, replaced)
            restored = saved.restore_best(serving)
        new.rename(old)
        for table, values in expected.values.items():
            np.testing.assert_array_equal(restored.values[table], values)
    saved.close()


def test_the_notes_of_a_checkpoint_that_is_replaced_are_those_of_the_next(
    trained, copied, monkeypatch
):
    dataset, _ = trained
    workdir, old = copied
    checksum = checkpoint_manifest.read(old).checksum
    run = make_run(str(dataset.path), "r", **_ensemble(workdir, trained[1].workdir))
    new = old.parent / str(int(old.name) + 7)
    original, looks = checkpoint_manifest.steps_in, []

    def steps_in(root):
        looks.append(original(root))
        if len(looks) == 1:  # seen, then gone
            old.rename(new)
        return looks[-1]

    monkeypatch.setattr(checkpoint_manifest, "steps_in", steps_in)
    references = run_directory.reference_checkpoints(run)
    assert [reference["checkpoint"] for reference in references] == [checksum] * 2
    assert looks[:2] == [[int(old.name)], [int(new.name)]]
