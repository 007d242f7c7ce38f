"""Texts of items: JSON lines, Python literals, HTML, and whether any id is met."""

from __future__ import annotations

import json
import pathlib

import pyarrow as pa
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import json_lines, prepare, sources, texts
from slgr_jax.errors import InputError


def config(source: str, path: pathlib.Path, **more: object) -> PrepareConfig:
    values = {"source": source, "input": str(path), "out": "unused", **more}
    return PrepareConfig(**values)  # type: ignore[arg-type]


def rows(piece: object) -> list[tuple[object, ...]]:
    columns = piece.columns  # type: ignore[attr-defined]
    order = [columns[role] for role in ("user", "item", "timestamp", "rating") if role in columns]
    return list(zip(*(column.to_pylist() for column in order), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<span id="x">Dog &amp; Cat &quot;toy&quot;</span>\n new line',
            'Dog & Cat "toy" new line',
        ),
        ("One.<br/>Two.<p class='a'>Three</p>", "One. Two. Three"),
        ("AT&amp;amp;T &#39;97 caf&eacute; &#x2013; x", "AT&T '97 café – x"),
        ("a<!-- hidden -->b<script>x < 1</script>c <STYLE a=b>p {}</style>d", "a b c d"),
        ("&lt;b&gt;Bold&lt;/b&gt; words", "Bold words"),
        # What is no HTML stays to the letter, its spaces too.
        ("I <3 You  & me", "I <3 You  & me"),
        ("a < b > c", "a < b > c"),
        ("<untitled>", "<untitled>"),
        ("R&D;  Rock &notable", "R&D;  Rock &notable"),
        ("AT&T", "AT&T"),
        ("x &nosuchname; &#99999999; y", "x &nosuchname; &#99999999; y"),
    ],
)
def test_html_becomes_plain_text(text: str, expected: str) -> None:
    assert texts.plain(text) == expected


def test_html_is_taken_out_of_every_column_of_an_item_table() -> None:
    raw = {
        "item": pa.chunked_array([["b", "a"], ["c"]]),
        "title": pa.chunked_array([["<b>B</b>", "A &amp; A"], [None]]),
        "text": pa.chunked_array([[None, ""], ["<p></p>"]]),
        "categories": pa.chunked_array([[["x &amp; y"], None], [["z", "<i>q</i>"]]]),
    }
    table = texts.item_table(raw, "f: column item", separator="|")
    assert table.to_pylist() == [
        {"item_id": "a", "title": "A & A", "text": None, "categories": None},
        {"item_id": "b", "title": "B", "text": None, "categories": ["x & y"]},
        {"item_id": "c", "title": None, "text": None, "categories": ["z", "q"]},
    ]


@pytest.mark.parametrize("kind", [pa.list_(pa.list_(pa.string())), pa.struct([("a", pa.string())])])
def test_an_item_table_with_columns_that_are_no_text(kind: pa.DataType) -> None:
    raw = {"item": pa.chunked_array([["a"]])}
    for column in ("title", "categories"):
        with pytest.raises(InputError, match=f"f: {column} has type .*; it must be text"):
            texts.item_table(
                raw | {column: pa.chunked_array([pa.nulls(1, kind)])}, "f: column x", separator="|"
            )


@pytest.mark.parametrize(
    ("ids", "hint"),
    [
        (["100.0", "101.0"], "as '100', those of the item table as '100.0'; write whole numbers"),
        ([" 100", " 101"], "those of the item table as ' 100'; the spaces around them"),
        (["0100", "0101"], "those of the item table as '0100'; ids are exact text"),
        (["x", "y"], "those of the item table as 'x'; name the right --item_column"),
    ],
)
def test_an_item_table_that_meets_no_item_is_refused(
    tmp_path: pathlib.Path, ids: list[str], hint: str
) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("user,item\n" + "".join(f"u{k},{100 + k % 2}\n" for k in range(20)))
    items.write_text("item,title\n" + "".join(f"{item},T\n" for item in ids))
    chosen = config("csv", log, items_input=str(items), out=str(tmp_path / "d"))
    with pytest.raises(InputError, match=r"no item of the interactions is in .*csv") as error:
        prepare.prepare(chosen)
    assert hint in str(error.value)
    assert not (tmp_path / "d").exists()


# --- JSON lines ---------------------------------------------------------------------------


def test_json_lines_with_named_columns(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "reviews.json"
    records = [
        {
            "id": "r",
            "user_id": "007",
            "business": k,
            "stars": 1.0 + k,
            "date": "2018-07-01 22:09:11",
        }
        for k in range(3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"user_column": "user_id", "item_column": "business", "rating_column": "stars"}
    expected = [("007", str(k), "2018-07-01 22:09:11", str(1.0 + k)) for k in range(3)]
    for source in ("jsonl", "csv", "amazon"):
        (piece,) = sources.read(config(source, path, **names, time_column="date")).pieces
        assert [tuple(map(str, row)) for row in rows(piece)] == expected
    with pytest.raises(InputError, match=r"no column user, item; columns found: id, user_id"):
        sources.read(config("jsonl", path))
    with pytest.raises(InputError, match="holds JSON: read it with --source=jsonl"):
        sources.read(config("parquet", path, **names))


def test_numbers_and_numbers_as_text_are_the_same(tmp_path: pathlib.Path) -> None:
    """The quick reader of one type and the slow one of any type give the same dataset."""
    path = tmp_path / "log.jsonl"
    hashes = set()
    for style in (str, lambda value: value):
        records = [
            {"user": f"u{k % 4}", "item": style(k % 7), "rating": style(k % 5 + 0.5),
             "timestamp": 1_500_000_000 + k if k else style(1_500_000_000)}
            for k in range(40)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        manifest = prepare.prepare(
            config("jsonl", path, out=str(tmp_path / "d"), overwrite=True, split="leave_last")
        )
        ratings = dataset.load(tmp_path / "d").train.ratings
        assert ratings is not None
        hashes.add((manifest.split_hash, manifest.id_map_hash, ratings.tobytes()))
    assert len(hashes) == 1


@pytest.mark.parametrize("filler", ["", '{"user": "v", "item": 2, "more": 1}\n', "\n"])
def test_rows_of_json_count_from_one(tmp_path: pathlib.Path, filler: str) -> None:
    path = tmp_path / "log.jsonl"
    good = '{"user": "u", "item": "1", "rating": 3}\n'
    path.write_text(good * 2 + filler.replace("\n", "") + filler[-1:] + good.replace("3", '"x"'))
    chosen = config("jsonl", path, out=str(path.parent / "d"))
    row = 4 if "v" in filler else 3
    missing = "column rating, row 3: the value is missing" if row == 4 else f"row {row}: 'x' is not"
    with pytest.raises(InputError, match=missing):
        prepare.prepare(chosen)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no record: not one JSON object a line"),
        ("3", "line 2 is no record: it is not one JSON object"),
        ("[1]", "line 2 is no record: it begins a JSON array"),
        ('{"a": ' * 9000, "line 2 is no record: .*nested too deeply"),
        ('{"user": "a", "item": ' + "1" * 5000 + "}", "line 2 is no record: .*4300"),
        ('{"user": "\\ud800", "item": 1}', "row 2: user holds half of a surrogate pair"),
        ('{"user": ["a"], "item": 1}', r'row 2: user is \["a"\], not text or a number'),
        ('{"user": true, "item": 1}', "row 2: user is true, not text or a number"),
        ('{"user": "a", "item": 1.5}', "row 2: item is 1.5; ids must be text or whole numbers"),
        ("{'user': __import__('os'), 'item': 1}", "nor a Python literal"),
        ("{'user': " + "[" * 500 + "}", "line 2 is no record"),
    ],
)
def test_lines_that_are_no_record(tmp_path: pathlib.Path, line: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": "a", "item": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        sources.read(config("jsonl", path))
    assert str(error.value).isprintable()
    (piece,) = sources.read(config("jsonl", path, bad_rows="drop")).pieces
    assert (piece.count.rows, piece.count.dropped) == (1, 1)


def test_an_array_of_records_is_told_how_to_be_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.json"
    path.write_text('[{"user": "a", "item": "b"}]')
    with pytest.raises(InputError, match=r"write one object a line, as jq -c '\.\[\]' FILE does"):
        sources.read(config("jsonl", path))


def test_python_literals_are_records() -> None:
    line = "{'asin': 'B1', 'title': u\"It's\", 'price': None, 'ok': True, 'related': {'a': ['b']}}"
    assert json_lines.parse(line) == {
        "asin": "B1", "title": "It's", "price": None, "ok": True, "related": {"a": ["b"]}
    }  # fmt: skip


def test_item_tables_as_json_lines(tmp_path: pathlib.Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "games.jsonl"
    log.write_text("user,item\n" + "".join(f"u{k},{k % 3}\n" for k in range(12)))
    items.write_text(
        '{"item": 0, "title": "A &amp; B", "text": ["x", "y"], "categories": "p|q"}\n'
        '{"item": "1", "title": null, "categories": [["r"], "s"]}\n{"item": 7}\n'
    )
    chosen = config("csv", log, items_input=str(items), out=str(tmp_path / "d"))
    manifest = prepare.prepare(chosen)
    assert manifest.source["items_in_table"] == 2
    assert dataset.load(tmp_path / "d").items.to_pylist() == [
        {"item_id": "0", "title": "A & B", "text": "x y", "categories": ["p", "q"]},
        {"item_id": "1", "title": None, "text": None, "categories": ["r", "s"]},
        {"item_id": "2", "title": None, "text": None, "categories": None},
    ]


def test_s3rec_takes_titles_from_a_table(tmp_path: pathlib.Path) -> None:
    path, items = tmp_path / "T.txt", tmp_path / "items.csv"
    path.write_text("u 1 2 3\nv 3 2 1\n")
    (tmp_path / "T_item2attributes.json").write_text('{"1": [5], "2": [6, 7]}')
    items.write_text("id,title,categories\n1,One,own\n2,Two,\n9,Nine,\n")
    chosen = config(
        "s3rec", path, split="leave_last", items_input=str(items), item_column="id",
        out=str(tmp_path / "d"),
    )  # fmt: skip
    prepare.prepare(chosen)
    table = dataset.load(tmp_path / "d").items
    assert table["title"].to_pylist() == ["One", "Two", None]
    assert table["categories"].to_pylist() == [["own"], ["6", "7"], None]
