"""LLMRank's NAME.test.inter: histories and targets as sequences; the real rows where they are."""

from __future__ import annotations

import pathlib

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import prepare, sources
from slgr_jax.errors import ConfigError, InputError

SHARED = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "amazon_games_llmrank"
HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
ROWS = "7\t3 1 4\t2\n0\t5 1\t3\n\n"


def clone(root: pathlib.Path, rows: str = ROWS, header: str = HEADER) -> pathlib.Path:
    folder = root / "llmrank" / "dataset" / "Games-6k"
    folder.mkdir(parents=True)
    (folder / "Games-6k.test.inter").write_text(header + rows)
    (folder / "Games-6k.valid.inter").write_text(f"{HEADER}7\t3 1\t4\n")
    (folder / "Games-6k.item").write_text(
        "item_id:token\ttitle:token_seq\n3\tZelda\n9\tunplayed\n1\tPong\n"
    )
    return root


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    options: dict[str, object] = {"out": "unused", **more}
    return PrepareConfig(source="llmrank", input=str(path), **options)  # type: ignore[arg-type]


def test_a_row_is_a_sequence(tmp_path: pathlib.Path) -> None:
    raw = sources.read(config(clone(tmp_path)))
    (piece,) = raw.pieces
    columns = [piece.columns[role].to_pylist() for role in ("user", "item", "timestamp")]
    assert list(zip(*columns, strict=True)) == [
        *(("7", item, place) for place, item in enumerate("3142")),
        *(("0", item, place) for place, item in enumerate("513")),
    ]
    assert raw.name == "Games-6k"


def test_the_last_is_test_and_titles_are_beside(tmp_path: pathlib.Path) -> None:
    manifest = prepare.prepare(config(clone(tmp_path), out=str(tmp_path / "out")))
    assert manifest.split["rule"] == "leave_last"
    assert [entry["name"] for entry in manifest.source["files"]] == [
        "Games-6k.item",
        "Games-6k.test.inter",
    ]
    data = dataset.load(tmp_path / "out")
    items = data.items["item_id"].to_pylist()
    last = {data.user_ids[u].as_py(): items[i]
            for u, i in zip(data.test.users, data.test.items, strict=True)}  # fmt: skip
    assert last == {"7": "2", "0": "3"}
    assert dict(zip(items, data.items["title"].to_pylist(), strict=True))["3"] == "Zelda"


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ("7\t3 1 4\n", HEADER, r"line 2: 2 fields, expected a user, a history and an item"),
        ("7\t3 1\t\n", HEADER, r"line 2: 3 fields"),
        ("7\t3\t1\n7\t3\t1\n", HEADER, r"line 3: user '7' has a line before"),
        ("7\t3\n", "user_id:token\titem_id:token\n", "other .inter files: --source=recbole"),
        ("", HEADER, "is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: pathlib.Path, rows: str, header: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sources.read(config(clone(tmp_path, rows, header)))


def test_bad_rows_are_dropped_and_counted(tmp_path: pathlib.Path) -> None:
    (piece,) = sources.read(config(clone(tmp_path, f"8\t1\n{ROWS}"), bad_rows="drop")).pieces
    piece.count.check()
    assert (piece.count.rows, piece.count.dropped, piece.count.blank) == (2, 1, 1)


def test_times_do_not_compare_across_users(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="--source=llmrank knows only the order"):
        prepare.prepare(config(clone(tmp_path), split="global_time"))


@pytest.mark.skipif(
    not (SHARED / "interactions.parquet").is_file(),
    reason="shared/data/amazon_games_llmrank is not beside the checkout",
)
def test_real_rows_in_their_original_layout(tmp_path: pathlib.Path) -> None:
    """The converted table of 2,000 users written back: the same parts."""
    log = pq.read_table(SHARED / "interactions.parquet")
    log = log.filter(pc.less(log["userId"], 2000)).sort_by(
        [("userId", "ascending"), ("position", "ascending")]
    )
    by_user: dict[str, list[str]] = {}
    parts: dict[str, set[tuple[str, str]]] = {}
    for row in log.to_pylist():
        user, item = str(row["userId"]), str(row["itemId"])
        by_user.setdefault(user, []).append(item)
        parts.setdefault(row["split"], set()).add((user, item))
    rows = "".join(f"{u}\t{' '.join(items[:-1])}\t{items[-1]}\n" for u, items in by_user.items())
    prepare.prepare(config(clone(tmp_path, rows), out=str(tmp_path / "out")))
    data = dataset.load(tmp_path / "out")
    users, items = data.user_ids.to_pylist(), data.items["item_id"].to_pylist()
    for name, expected in parts.items():
        part = data.part(name)
        assert expected == {
            (users[u], items[i]) for u, i in zip(part.users, part.items, strict=True)
        }
