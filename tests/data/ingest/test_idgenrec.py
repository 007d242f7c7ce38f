"""IDGenRec folders: sequences as S3-Rec's, keywords as texts; the real files where they are."""

from __future__ import annotations

import pathlib

import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import prepare, sources
from slgr_jax.errors import ConfigError, InputError

LINES = "A1 B7 B2 B9\nA0 B2 B7 B3 B9\n"
KEYWORDS = "B2 lip balm, cherry\nB3\nB7 lotion\n\nB9 nail polish 5\nB0 nobody has it\n"


def clone(root: pathlib.Path) -> pathlib.Path:
    for name in ("Beauty", "Toys"):
        folder = root / "rec_datasets" / name
        folder.mkdir(parents=True)
        (folder / "user_sequence.txt").write_text(LINES)
        (folder / "item_generative_indexing_phase_0.txt").write_text(KEYWORDS)
        (folder / "user_generative_index_phase_0.txt").write_text("A1 not read\n")
    return root


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    options: dict[str, object] = {"out": "unused", **more}
    return PrepareConfig(source="idgenrec", input=str(path), **options)  # type: ignore[arg-type]


def test_a_clone_becomes_a_dataset(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    manifest = prepare.prepare(config(clone(tmp_path / "clone"), name="Toys", out=str(out)))
    assert (manifest.name, manifest.split["rule"]) == ("Toys", "leave_last")
    assert [entry["name"] for entry in manifest.source["files"]] == [
        "item_generative_indexing_phase_0.txt",
        "user_sequence.txt",
    ]
    assert all(len(entry["sha256"]) == 64 for entry in manifest.source["files"])
    data = dataset.load(out)
    assert data.user_ids.to_pylist() == ["A0", "A1"]
    texts = dict(zip(*(data.items[name].to_pylist() for name in ("item_id", "text")), strict=True))
    # What stands behind the first space; an item without keywords has no text.
    assert texts == {"B2": "lip balm, cherry", "B3": None, "B7": "lotion", "B9": "nail polish 5"}
    test = {(data.user_ids[u].as_py(), data.items["item_id"][i].as_py())
            for u, i in zip(data.test.users, data.test.items, strict=True)}  # fmt: skip
    assert test == {("A0", "B9"), ("A1", "B9")}


def test_the_name_is_the_folders(tmp_path: pathlib.Path) -> None:
    folder = clone(tmp_path) / "rec_datasets" / "Beauty"
    assert sources.read(config(folder / "user_sequence.txt")).name == "Beauty"
    assert sources.read(config(folder)).name == "Beauty"


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({}, InputError, "holds 2 candidates"),
        ({"name": "Toys", "split": "global_time"}, ConfigError, "--source=idgenrec knows only"),
        ({"name": "Toys", "test_input": "x"}, ConfigError, "not used with --source=idgenrec"),
        ({"name": "Toys", "items_input": "x"}, ConfigError, "not used with --source=idgenrec"),
    ],
)
def test_refusals_name_the_source(
    tmp_path: pathlib.Path, more: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        prepare.prepare(config(clone(tmp_path), **more))


def test_another_folder_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.txt").write_text("x y\n")
    with pytest.raises(InputError, match=r"holds no user_sequence\.txt"):
        sources.read(config(tmp_path))
