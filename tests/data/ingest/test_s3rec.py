"""S3-Rec sequences: exact text, places as times, one-line errors, the real files."""

from __future__ import annotations

import json
import pathlib
import zipfile

import pyarrow as pa
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import prepare, sources
from slgr_jax.errors import ConfigError, InputError

REAL = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "s3rec_amazon"
LINES = "u1 5 3 9 03\r\n\nbob x-1 5 ž 3 9\n7 3 9"
ATTRIBUTES = {"9": [4, 2], "404": [1], "x-1": [], "03": ["Brand A", 2], "5": [2]}


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    options: dict[str, object] = {"split": "leave_last", "out": "unused", **more}
    return PrepareConfig(source="s3rec", input=str(path), **options)  # type: ignore[arg-type]


def write(folder: pathlib.Path, name: str = "Tiny", lines: str = LINES) -> pathlib.Path:
    path = folder / f"{name}.txt"
    path.write_bytes(lines.encode())
    (folder / f"{name}_item2attributes.json").write_text(json.dumps(ATTRIBUTES))
    return path


def rows(piece: object) -> list[tuple[object, ...]]:
    columns = piece.columns  # type: ignore[attr-defined]
    order = [columns[role].to_pylist() for role in ("user", "item", "timestamp")]
    return list(zip(*order, strict=True))


def test_places_in_a_line_are_times(tmp_path: pathlib.Path) -> None:
    (piece,) = sources.read(config(write(tmp_path))).pieces
    assert rows(piece) == [
        *(("u1", item, k) for k, item in enumerate(["5", "3", "9", "03"])),
        *(("bob", item, k) for k, item in enumerate(["x-1", "5", "ž", "3", "9"])),
        *(("7", item, k) for k, item in enumerate(["3", "9"])),
    ]


def test_leave_last_keeps_the_order_of_the_line(tmp_path: pathlib.Path) -> None:
    manifest = prepare.prepare(config(write(tmp_path), out=str(tmp_path / "out")))
    assert (manifest.name, manifest.source["layout"]) == ("Tiny", "s3rec")
    assert manifest.split == {"rule": "leave_last", "time_unit": "ordinal"}
    assert {entry["name"] for entry in manifest.source["files"]} == {
        "Tiny.txt",
        "Tiny_item2attributes.json",
    }
    data = dataset.load(tmp_path / "out")
    users, items = data.user_ids.to_pylist(), data.items["item_id"].to_pylist()
    assert users == ["7", "bob", "u1"]
    assert items == ["03", "3", "5", "9", "x-1", "ž"]
    found = {}
    for name in ("train", "valid", "test"):
        part = data.part(name)
        assert part.timestamps is not None
        assert part.ratings is None
        cells = zip(part.users, part.items, part.timestamps, strict=True)
        found[name] = [(users[u], items[i], int(t)) for u, i, t in cells]
    second = 10**6
    assert found["train"] == [
        ("7", "3", 0),
        ("7", "9", second),  # two items: all are for training
        *(("bob", item, k * second) for k, item in enumerate(["x-1", "5", "ž"])),
        *(("u1", item, k * second) for k, item in enumerate(["5", "3"])),
    ]
    assert found["valid"] == [("bob", "3", 3 * second), ("u1", "9", 2 * second)]
    assert found["test"] == [("bob", "9", 4 * second), ("u1", "03", 3 * second)]


def test_attributes_are_categories(tmp_path: pathlib.Path) -> None:
    prepare.prepare(config(write(tmp_path), out=str(tmp_path / "out")))
    table = dataset.load(tmp_path / "out").items
    found = dict(zip(table["item_id"].to_pylist(), table["categories"].to_pylist(), strict=True))
    # In file order; an item of the attributes alone is left out, one without attributes is null.
    assert found == {
        "03": ["Brand A", "2"],
        "3": None,
        "5": ["2"],
        "9": ["4", "2"],
        "x-1": [],
        "ž": None,
    }
    assert table["title"].null_count == table["text"].null_count == 6
    (tmp_path / "Tiny_item2attributes.json").unlink()
    raw = sources.read(config(tmp_path / "Tiny.txt"))
    assert raw.items(pa.array(["5"])) is None


def test_a_repeated_item_counts_once_where_it_came_first(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, lines="u a b a c d b\nv a b c\n")
    (tmp_path / "Tiny_item2attributes.json").unlink()
    manifest = prepare.prepare(config(path, out=str(tmp_path / "out")))
    assert (manifest.filters["rows_read"], manifest.filters["duplicates"]) == (9, 2)
    data = dataset.load(tmp_path / "out")
    assert data.train.items[data.train.users == 0].tolist() == [0, 1]
    assert (data.valid.items[0], data.test.items[0]) == (2, 3)


def test_folders_and_archives_with_several_data_sets(tmp_path: pathlib.Path) -> None:
    for name in ("Beauty", "Toys_and_Games"):
        write(tmp_path, name, f"of_{name} 1 2 3")
        (tmp_path / f"{name}_sample.txt").write_text("of_nobody 4 5 6")
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(tmp_path.glob("*[!p]")):
            zipped.write(path, f"data/{path.name}")
    for source in (tmp_path, archive):
        raw = sources.read(config(source, name="Toys_and_Games"))
        assert rows(raw.pieces[0])[0] == ("of_Toys_and_Games", "1", 0)
        assert raw.name == "Toys_and_Games"
        found = raw.items(pa.array(["5"]))
        assert found is not None
        assert set(found.table["item_id"].to_pylist()) == set(ATTRIBUTES)
        with pytest.raises(InputError, match=r"2 candidates: .*Beauty\.txt, .*Toys_and_Games\.txt"):
            sources.read(config(source))
    with pytest.raises(InputError, match=r"Beauty_sample\.txt holds sampled negatives"):
        sources.read(config(tmp_path / "Beauty_sample.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Tiny\.txt is empty"),
        ("\n \n", r"Tiny\.txt is empty"),
        ("a 1 2\n\nb\n", r"Tiny\.txt, line 3: user 'b' has no items"),
        ("a 1 2\nb 1\na 3\n", r"Tiny\.txt, line 3: user 'a' is also on line 1"),
        ("a 1 2\nb \0 1\n", r"Tiny\.txt, line 2 is not text"),
    ],
)
def test_bad_lines(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        sources.read(config(write(tmp_path, lines=text)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object of item id"),
        ('{"1": [2], "3": 4}', r"item '3' has 4, not a list"),
        ('{"1": [2], "3": [[4]]}', r"item '3' has \[\[4\]\], not a list"),
        ('{"3": [true]}', r"item '3' has \[true\], not a list"),
    ],
)
def test_bad_attributes(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = write(tmp_path)
    (tmp_path / "Tiny_item2attributes.json").write_text(text)
    with pytest.raises(InputError, match=rf"Tiny_item2attributes\.json.*{message}") as error:
        prepare.prepare(config(path, out=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": "global_time"}, "--split=global_time compares times across users"),
        ({"test_input": "x", "split": "premade"}, "--test_input is not used"),
        ({"split_column": "x", "split": "premade"}, "--split_column is not used"),
        ({"columns": "user,item"}, "--columns is not used"),
    ],
)
def test_knobs_that_do_not_fit(
    tmp_path: pathlib.Path, more: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sources.read(config(write(tmp_path), **more))


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/s3rec_amazon is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("Sports_and_Outdoors", 35_598, 18_357, 296_337),
        ("Beauty", 22_363, 12_101, 198_502),
        ("Toys_and_Games", 19_412, 11_924, 167_597),
    ],
)
def test_the_real_files(
    tmp_path: pathlib.Path, name: str, users: int, items: int, interactions: int
) -> None:
    manifest = prepare.prepare(config(REAL, name=name, out=str(tmp_path / "out")))
    counts = manifest.counts
    assert (counts["users"], counts["items"]) == (users, items)
    assert manifest.filters == {"rows_read": interactions, "duplicates": 0}
    assert (counts["valid"], counts["test"]) == (users, users)
    assert counts["train"] == interactions - 2 * users
    # One line of the file, read again by plain text.
    data = dataset.load(tmp_path / "out")
    with open(REAL / f"{name}.txt") as file:
        user, *sequence = next(line for k, line in enumerate(file) if k == 4711).split()
    u = data.user_ids.to_pylist().index(user)
    ids = data.items["item_id"].to_pylist()
    parts = [data.train, data.valid, data.test]
    assert [ids[i] for part in parts for i in part.items[part.users == u]] == sequence
    with open(REAL / f"{name}_item2attributes.json") as file:
        attributes = json.load(file)
    found = data.items["categories"].to_pylist()
    assert found == [[str(a) for a in attributes[item]] for item in ids]
