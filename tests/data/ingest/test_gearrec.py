"""GEAR-Rec's ml-1m: MovieLens' ids, the authors' parts, Qwen's texts; what is missing is named."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset, schema, shards
from slgr_jax.data.ingest import prepare, sources, split
from slgr_jax.errors import ConfigError, InputError


def clone(root: pathlib.Path) -> pathlib.Path:
    folder = root / "data" / "ml-1m"
    folder.mkdir(parents=True)
    # Number 0 is movie 1193, number 1 movie 661, ...; users count from 1 there.
    (folder / "item_map.txt").write_text("1193 0\n661 1\n914 2\n9 3\n")
    (folder / "user_map.txt").write_text("9 0\n10 1\n")
    (folder / "train.txt").write_text("0 2 0\n1 1\n")
    (folder / "test.txt").write_text("0 1 3\n1 0 2\n")
    (folder / "llm_response_item.json").write_text(json.dumps({"0": "A ward.", "7": "?"}))
    (folder / "llm_response_user.json").write_text(json.dumps({"1": "Likes wards.", "0": "Quiet."}))
    (folder / "ml1m_extended_movie.csv").write_text(
        "MovieID,Title,Genres,overview\n"
        '1193,"Cuckoo\'s Nest, The (1975)",Drama,"Two\nlines"\n'
        "661,James (1996),Animation|Musical,\n"
    )
    return root


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    options: dict[str, object] = {"out": "unused", **more}
    return PrepareConfig(source="gearrec", input=str(path), **options)  # type: ignore[arg-type]


def test_a_clone_becomes_a_dataset(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    manifest = prepare.prepare(config(clone(tmp_path / "clone"), out=str(out), seed=1))
    assert {entry["name"] for entry in manifest.source["files"]} == {
        *("item_map.txt", "user_map.txt", "train.txt", "test.txt", "ml1m_extended_movie.csv"),
        *("llm_response_item.json", "llm_response_user.json"),
    }
    assert "llm_response_user.json" in {line["name"] for line in manifest.source["lines"]}
    data = dataset.load(out)
    users, items = data.user_ids.to_pylist(), data.items["item_id"].to_pylist()

    def pairs(name: str) -> set[tuple[str, str]]:
        part = data.part(name)
        return {(users[u], items[i]) for u, i in zip(part.users, part.items, strict=True)}

    assert pairs("train") == {("9", "914"), ("9", "1193"), ("10", "661")}
    tested = [("9", "661"), ("9", "9"), ("10", "1193"), ("10", "914")]
    half = split.halves(np.array([9, 9, 10, 10]), 1)
    assert pairs("valid") == {pair for pair, taken in zip(tested, half, strict=True) if taken}
    assert pairs("valid") | pairs("test") == set(tested)
    assert data.train.timestamps is None  # a place in a line is no time
    columns = (data.items[name].to_pylist() for name in ("title", "text", "categories"))
    about = dict(zip(items, zip(*columns, strict=True), strict=True))
    assert about["1193"] == ("Cuckoo's Nest, The (1975)", "A ward.", ["Drama"])
    assert about["661"] == ("James (1996)", None, ["Animation", "Musical"])
    people = shards.read_shards(data.path, data.manifest.files["users"], schema.USERS)
    assert people.to_pylist() == [
        {"user_id": "10", "text": "Likes wards."},
        {"user_id": "9", "text": "Quiet."},
    ]


@pytest.mark.parametrize("name", ["item_map.txt", "test.txt"])
def test_a_missing_file_is_named(tmp_path: pathlib.Path, name: str) -> None:
    root = clone(tmp_path)
    (root / "data" / "ml-1m" / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing"):
        sources.read(config(root))


def test_what_is_wrong_is_named(tmp_path: pathlib.Path) -> None:
    root = clone(tmp_path)
    with pytest.raises(ConfigError, match="--split=ratio is not used with --source=gearrec"):
        prepare.prepare(config(root, split="ratio"))
    folder = root / "data" / "ml-1m"
    (folder / "llm_response_item.json").write_text("[1]")
    with pytest.raises(InputError, match=r"llm_response_item\.json is not an object"):
        prepare.prepare(config(root, out=str(tmp_path / "out")))
    (folder / "test.txt").write_text("0 1 8\n")
    with pytest.raises(InputError, match=r"test\.txt: item 8 is not in item_map\.txt"):
        sources.read(config(root))
    (folder / "user_map.txt").write_text("9\n")
    with pytest.raises(InputError, match=r"user_map\.txt: a line is not `id number`"):
        sources.read(config(root))
