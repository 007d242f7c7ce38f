"""A folder with an answer a user: names, lists, what cannot be read, the import of it."""

from __future__ import annotations

import pathlib

import pytest

from slgr_jax import api
from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.collect import answer_folder
from slgr_jax.teacher.products import preferences

TITLES = {"a": "Alien (1979)", "b": "Brazil (1985)", "c": "Casablanca (1942)", "d": "Dune (2021)"}


def folder(root: pathlib.Path, **answers: str) -> pathlib.Path:
    root.mkdir()
    for name, text in answers.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def test_a_file_is_a_users_list(tmp_path: pathlib.Path) -> None:
    path = folder(
        tmp_path / "answers",
        user_12_checkpoint_EXP_1="Based on the profile, here are 2:\n\n1. Alien (1979)\n2. Brazil",
        user_7="1) **Casablanca** (1942) - a bar\n2) Alien",
        x3="- Dune\n- Alien\n",
        user_5_checkpoint="I cannot help with that.",
    )
    (path / "log.json").write_text("{}")
    read = answer_folder.read(path)
    assert read.table.to_pylist() == [
        {"user": "12", "item": "Alien (1979)", "rank": "1"},
        {"user": "12", "item": "Brazil", "rank": "2"},
        {"user": "7", "item": "Casablanca (1942)", "rank": "1"},
        {"user": "7", "item": "Alien", "rank": "2"},
        {"user": "x3", "item": "Dune", "rank": "1"},
        {"user": "x3", "item": "Alien", "rank": "2"},
    ]
    assert read.counts == {"answers": 4, "answers_unread": 1}


def test_what_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"holds no answers.*files found: answers"):
        answer_folder.read(folder(tmp_path / "answers").parent)
    twice = folder(tmp_path / "twice", user_1="1. Alien", user_1_b="1. Dune")
    with pytest.raises(InputError, match=r"user_1\.txt and user_1_b\.txt are both of user 1"):
        answer_folder.read(twice)
    silent = folder(tmp_path / "silent", user_1="Sorry.", user_2="No.")
    with pytest.raises(InputError, match=r"none of 2 answers has a list; user_1\.txt: no titles"):
        answer_folder.read(silent)
    binary = folder(tmp_path / "binary")
    (binary / "user_1.txt").write_bytes(b"1. Caf\xe9")
    with pytest.raises(InputError, match=r"user_1\.txt is not UTF-8"):
        answer_folder.read(binary)


def films(root: pathlib.Path) -> pathlib.Path:
    log = "user,item\n" + "".join(f"{u},{i}\n" for u in (12, 7, 5) for i in "ab")
    (root / "log.csv").write_text(log)
    (root / "test.csv").write_text(
        "user,item\n" + "".join(f"{u},{i}\n" for u in (12, 7, 5) for i in "cd")
    )
    table = "item,title\n" + "".join(f"{i},{t}\n" for i, t in TITLES.items())
    (root / "films.csv").write_text(table)
    paths = {"input": root / "log.csv", "test_input": root / "test.csv", "out": root / "data"}
    prepare.prepare(
        PrepareConfig(
            source="csv",
            items_input=str(root / "films.csv"),
            valid_from="test",
            **{name: str(path) for name, path in paths.items()},  # type: ignore[arg-type]
        )
    )
    return root / "data"


def test_the_lists_become_a_product(tmp_path: pathlib.Path) -> None:
    data = films(tmp_path)
    answers = folder(
        tmp_path / "answers",
        user_12="1. Dune\n2. Unknown Film\n3. Alien\n4. Casablanca",
        user_7="1. Casablanca\n2. Casablanca (1942)",
        user_5="no list",
    )
    with pytest.raises(ConfigError, match=r"is a folder.*add --items_as=titles"):
        api.import_teacher(data, answers, "llm")
    manifest = api.import_teacher(data, answers, "llm", items_as="titles", unlisted="below")
    held = dataset.load(data)
    product = preferences.load(held, "llm")
    users, items = held.user_ids.to_pylist(), held.items["item_id"].to_pylist()
    rows = {
        (users[user], items[product.items[row]]): float(product.scores[row])
        for user in range(held.n_users)
        for row in range(product.offsets[user], product.offsets[user + 1])
    }
    # Scores are -rank in the answer; Alien is user 12's own, and only echoes the prompt.
    assert rows == {("12", "d"): -1.0, ("12", "c"): -4.0, ("7", "c"): -1.0}
    assert manifest.counts["answers_unread"] == 1
    assert manifest.counts["titles_absent"] == 1
    assert manifest.counts["titles_repeated"] == 1
    assert "3 answers read, 1 without a list" in preferences.report(manifest)
