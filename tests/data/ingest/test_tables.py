"""Readers: exact text, every public layout in every container, one-line errors."""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import zipfile

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest import sources, text_lines, times
from slgr_jax.errors import ConfigError, InputError


def config(source: str, path: pathlib.Path, **more: object) -> PrepareConfig:
    return PrepareConfig(source=source, input=str(path), out="unused", **more)  # type: ignore[arg-type]


def rows(piece: object) -> list[tuple[object, ...]]:
    """(user, item, time, rating) of a piece, as text and numbers."""
    cols = piece.columns  # type: ignore[attr-defined]
    order = [cols[role] for role in ("user", "item", "timestamp", "rating") if role in cols]
    return list(zip(*(column.to_pylist() for column in order), strict=True))


# --- csv, parquet, arrow ------------------------------------------------------------------


def test_csv_is_read_as_exact_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    text = 'extra,user,item,timestamp,rating\n1,007,"a, b",1,5\n2, x ,žluť,2,4\n3,NA,"nu\nll",3,1\n'
    expected = [("007", "a, b", "1", "5"), (" x ", "žluť", "2", "4"), ("NA", "nu\nll", "3", "1")]
    for data in (text.encode(), b"\xef\xbb\xbf" + re.sub(r"(?<!nu)\n", "\r\n", text).encode()):
        path.write_bytes(data)
        (piece,) = sources.read(config("csv", path)).pieces
        assert rows(piece) == expected
    zipped = tmp_path / "log.csv.gz"
    zipped.write_bytes(gzip.compress(text.encode()))
    assert rows(sources.read(config("csv", zipped)).pieces[0]) == expected


def test_a_quoted_newline_may_lie_on_a_block_boundary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "BLOCK", 64)
    path = tmp_path / "log.csv"
    expected = [(f"u{k}", "a\n" * 9) for k in range(50)]
    path.write_text("user,item\n" + "".join(f'{user},"{item}"\n' for user, item in expected))
    assert rows(sources.read(config("csv", path)).pieces[0]) == expected


def test_csv_with_tabs_and_other_names(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text("uid\tsku\twhen\n1\t2\t3\n")
    names = {"user_column": "uid", "item_column": "sku", "time_column": "when", "delimiter": "\\t"}
    assert rows(sources.read(config("csv", path, **names)).pieces[0]) == [("1", "2", "3")]
    with pytest.raises(ConfigError, match="--delimiter=';;'"):
        sources.read(config("csv", path, **{**names, "delimiter": ";;"}))


def test_parquet_and_both_arrow_encodings_agree(tmp_path: pathlib.Path) -> None:
    table = pa.table({"user": [1, 20], "item": ["a", "b"], "other": [0, 0]})
    pq.write_table(table, tmp_path / "p")
    for name, opened in (("f", pa.ipc.new_file), ("s", pa.ipc.new_stream)):
        with opened(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    for name in "pfs":
        (piece,) = sources.read(config("parquet", tmp_path / name)).pieces
        assert rows(piece) == [(1, "a"), (20, "b")]
        assert piece.names == {"user": "user", "item": "item"}


def test_a_folder_of_parquet_files(tmp_path: pathlib.Path) -> None:
    for k in range(3):
        pq.write_table(pa.table({"user": [k], "item": [k]}), tmp_path / f"{k}.parquet")
    raw = sources.read(config("parquet", tmp_path))
    assert rows(raw.pieces[0]) == [(0, 0), (1, 1), (2, 2)]
    assert [entry["name"] for entry in raw.files[0].record()] == [f"{k}.parquet" for k in range(3)]


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_missing_and_empty(tmp_path: pathlib.Path, source: str) -> None:
    path = tmp_path / "log"
    with pytest.raises(InputError, match="log does not exist"):
        sources.read(config(source, path))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="log is empty"):
        sources.read(config(source, path))
    empty = pa.table({"user": pa.array([], pa.string()), "item": pa.array([], pa.string())})
    if source == "csv":
        path.write_text("user,item\n")
    else:
        pq.write_table(empty, path)
    with pytest.raises(InputError, match="log has no rows"):
        sources.read(config(source, path))
    with pytest.raises(InputError, match="no column itm; columns found: user, item"):
        sources.read(config(source, path, item_column="itm"))
    with pytest.raises(InputError, match="no column when; columns found: user, item"):
        sources.read(config(source, path, time_column="when"))


def test_damaged_csv(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    for data, message in (
        (b"user,item\n1,2\n3\n", "Expected 2 columns, got 1"),
        (b"user,item\n\xff,2\n", "line 2: byte 0xff at place 1 is not UTF-8"),
        (b"PAR1\0\0user,item\n", "is Parquet or Arrow: add --source=parquet"),
        (b"\x93\0\0user,item\n", "is not text; is it of another --source"),
        (b"user,item,user\n1,2,3\n", "has column user more than once"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            sources.read(config("csv", path))
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * 99999)[:-20])
    with pytest.raises(InputError, match=r"log.csv.gz cannot be read"):
        sources.read(config("csv", path))


def test_item_tables(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item\n1,01\n")
    items = tmp_path / "items.csv"
    items.write_text('item,title,categories\n01,"One, two",A|B c\n02,,\n01,later,\n')
    table = sources.read(config("csv", log, items_input=str(items))).items(pa.array([]))
    assert table is not None
    assert table.table.to_pylist() == [
        {"item_id": "01", "title": "One, two", "text": None, "categories": ["A", "B c"]},
        {"item_id": "02", "title": None, "text": None, "categories": None},
    ]
    parquet = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item": [7], "name": ["x"], "tags": [["p", "q"]]}), parquet)
    names = {"title_column": "name", "categories_column": "tags"}
    table = sources.read(config("csv", log, items_input=str(parquet), **names)).items(pa.array([]))
    assert table is not None
    assert table.table.to_pylist() == [
        {"item_id": "7", "title": "x", "text": None, "categories": ["p", "q"]}
    ]


# --- public layouts -----------------------------------------------------------------------

FLAGS = "|".join("1" if k in (1, 5) else "0" for k in range(19))
LAYOUTS = {
    "ml-100k": {
        "u.data": b"196\t242\t3\t881250949\n186\t302\t4\t891717742\n",
        "u.item": f"242|Amélie (1997)|24-Jan-1997||http://x|{FLAGS}\n".encode("latin-1"),
        "u.user": b"196|49|M|writer|55105\n",
    },
    "ml-1m": {
        "ratings.dat": b"196::242::3::881250949\n186::302::4::891717742\n",
        "movies.dat": "242::Amélie (1997)::Action|Comedy\n".encode("latin-1"),
        "users.dat": b"196::M::45::20::55105\n",
    },
    "ml-10m": {
        "ratings.dat": b"196::242::3::881250949\r\n186::302::4::891717742\r\n",
        "movies.dat": "242::Amélie (1997)::Action|Comedy\n".encode(),
    },
    "ml-25m": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n"
        b"196,242,3,881250949\n186,302,4,891717742\n",
        "movies.csv": 'movieId,title,genres\n242,"Amélie (1997)",Action|Comedy\n'.encode(),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["folder", "zip", "file"])
def test_movielens(tmp_path: pathlib.Path, layout: str, container: str) -> None:
    path = tmp_path / layout
    path.mkdir()
    for name, data in LAYOUTS[layout].items():
        (path / name).write_bytes(data)
    main = next(iter(LAYOUTS[layout]))
    if container == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"__MACOSX/{main}", "junk")
            for name, data in LAYOUTS[layout].items():
                archive.writestr(f"deep/{layout}/{name}", data)
        path = tmp_path / "x.zip"
    elif container == "file":
        path = path / main
    raw = sources.read(config("movielens", path))
    expected = [("196", "242", "881250949", "3"), ("186", "302", "891717742", "4")]
    assert rows(raw.pieces[0]) == expected
    items = raw.items(pa.array(["242"]))
    assert items is not None
    assert items.table.to_pylist() == [
        {
            "item_id": "242",
            "title": "Amélie (1997)",
            "text": None,
            "categories": ["Action", "Comedy"],
        }
    ]
    users = raw.users(pa.array(["196"]))
    if layout in ("ml-100k", "ml-1m"):
        age = "49" if layout == "ml-100k" else "45-49"
        assert users is not None
        text = f"age: {age}; gender: M; occupation: writer"
        assert users.table.to_pylist() == [{"user_id": "196", "text": text}]
    else:
        assert users is None


def test_several_candidates_need_a_name(tmp_path: pathlib.Path) -> None:
    for folder in ("ml-a", "ml-b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "u.data").write_text(f"{folder}\t1\t1\t1\n")
    with pytest.raises(InputError, match=r"holds 2 candidates: ml-a/u\.data, ml-b/u\.data; choose"):
        sources.read(config("movielens", tmp_path))
    raw = sources.read(config("movielens", tmp_path, name="ml-b"))
    assert rows(raw.pieces[0]) == [("ml-b", "1", "1", "1")]
    with pytest.raises(InputError, match=r"holds no \.inter file; files found: ml-a/u.data"):
        sources.read(config("recbole", tmp_path))


def test_damaged_archives(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"not a zip archive")
    with pytest.raises(InputError, match=r"x.zip cannot be read: File is not a zip file"):
        sources.read(config("movielens", path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("u.data", b"196\t242\t3\t881250949\n" * 20000)
    data = bytearray(path.read_bytes())
    data[200_000] ^= 1  # inside the member: only its checksum can tell
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x.zip:u.data cannot be read: Bad CRC-32"):
        sources.read(config("movielens", path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("u.data", b"".join(b"%d\t242\t3\t881250949\n" % k for k in range(20000)))
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(100)  # what is inflated is no longer a stream
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x.zip:u.data cannot be read: Error -3 while decomp"):
        sources.read(config("movielens", path))
    path.write_bytes(bytes(data[:1000]))
    with pytest.raises(InputError, match="cannot be read"):
        sources.read(config("movielens", path))


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq\n"
    'i1\tThe "Up\t1995\tA B\ni2\t\t\t\n'
)


def test_recbole(tmp_path: pathlib.Path) -> None:
    (tmp_path / "d.inter").write_text(INTER + 'u"1\ti1\t3\t881250949\nu2\ti2\t4\t881250950\n')
    (tmp_path / "d.item").write_text(ITEM)
    (tmp_path / "d.user").write_text(
        'user_id:token\tage:token\tjob:token\tzip_code:token\nu"1\t24\tx\t85711\nu2\t\t\t1\n'
    )
    for path in (tmp_path, tmp_path / "d.inter"):
        raw = sources.read(config("recbole", path))
        expected = [('u"1', "i1", "881250949", "3"), ("u2", "i2", "881250950", "4")]
        assert rows(raw.pieces[0]) == expected
        items, users = raw.items(pa.array([])), raw.users(pa.array([]))
        assert items is not None
        assert users is not None
        assert items.table.to_pylist() == [
            {"item_id": "i1", "title": 'The "Up (1995)', "text": None, "categories": ["A", "B"]},
            {"item_id": "i2", "title": None, "text": None, "categories": None},
        ]
        assert users.table.to_pylist() == [
            {"user_id": 'u"1', "text": "age: 24; job: x"},
            {"user_id": "u2", "text": None},
        ]


def test_recbole_presplit(tmp_path: pathlib.Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"d.{part}.inter").write_text(INTER + f"{part}\ti1\t3\t881250949\n")
    pieces = sources.read(config("recbole", tmp_path, split="premade")).pieces
    found = {piece.part: rows(piece)[0][0] for piece in pieces}
    assert found == {"train": "train", "valid": "valid", "test": "test"}
    with pytest.raises(InputError, match="add --split=premade"):
        sources.read(config("recbole", tmp_path))
    (tmp_path / "d.test.inter").unlink()
    with pytest.raises(InputError, match=r"d.test.inter is missing"):
        sources.read(config("recbole", tmp_path, split="premade"))


def test_recbole_header_without_types(tmp_path: pathlib.Path) -> None:
    (tmp_path / "d.inter").write_text("user_id\titem_id\n1\t2\n")
    with pytest.raises(InputError, match="tab-separated name:type, found user_id, item_id"):
        sources.read(config("recbole", tmp_path))


A, B = "A2SUAM1J3GNN3B", "B00004NKIQ"


@pytest.mark.parametrize(
    ("name", "text", "rating"),
    [
        ("r18.json.gz", json.dumps({"reviewerID": A, "asin": B, "unixReviewTime": 1400000000,
                                    "overall": 5.0, "style": {"x": 1}}), 5.0),
        ("r23.jsonl", json.dumps({"user_id": A, "parent_asin": B, "asin": "other", "rating": 5.0,
                                  "timestamp": 1400000000000, "images": []}), 5.0),
        ("b.csv", "user_id,parent_asin,rating,timestamp,history\n"
                  f"{A},{B},5.0,1400000000000,", "5.0"),
        ("r14.csv", f"{A},{B},5.0,1400000000", "5.0"),
        ("r18.csv", f"{B},{A},5.0,1400000000", "5.0"),
    ],
)  # fmt: skip
def test_amazon(tmp_path: pathlib.Path, name: str, text: str, rating: object) -> None:
    data = (text + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (piece,) = sources.read(config("amazon", tmp_path / name)).pieces
    ((user, item, _, found),) = rows(piece)
    assert (user, item, found) == (A, B, rating)
    micros, _ = times.to_microseconds(piece.columns["timestamp"], "t")
    assert micros.tolist() == [1_400_000_000_000_000]


def test_amazon_refuses_to_guess(tmp_path: pathlib.Path) -> None:
    for name, text, message in (
        (
            "x.csv",
            "u1,i1,5.0,1400000000\n",
            "name the columns, as --columns=user,item,rating,timestamp",
        ),
        ("x.jsonl", '{"user": 1}\n', "no fields user_id and parent_asin or reviewerID and asin"),
        ("y.jsonl", '{"asin": 1\n', "not one JSON object a line"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            sources.read(config("amazon", tmp_path / name))


def test_amazon_titles(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.csv").write_text(
        f"user_id,parent_asin,rating,timestamp\n{A},{B},5.0,1400000000\n"
    )
    lines = [
        {
            "parent_asin": B,
            "title": "Game",
            "description": ["One.", "Two."],
            "categories": ["X", "Y"],
        },
        {"parent_asin": "unwanted", "title": "no"},
    ]
    meta = tmp_path / "meta.jsonl"
    meta.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = sources.read(config("amazon", tmp_path / "b.csv", items_input=str(meta))).items(
        pa.array([B])
    )
    assert items is not None
    assert items.table.to_pylist() == [
        {"item_id": B, "title": "Game", "text": "One. Two.", "categories": ["X", "Y"]}
    ]
    # The 2014 files hold Python literals.
    meta.write_text(f"{{'asin': '{B}', 'title': u'It\\'s', 'categories': [['X', 'Y']]}}\n")
    items = sources.read(config("amazon", tmp_path / "b.csv", items_input=str(meta))).items(
        pa.array([B])
    )
    assert items is not None
    assert items.table.to_pylist() == [
        {"item_id": B, "title": "It's", "text": None, "categories": ["X", "Y"]}
    ]


def test_knobs_that_do_not_fit_the_source(tmp_path: pathlib.Path) -> None:
    for more, message in (
        ({"split_column": "x"}, "--split_column is not used with --source=movielens"),
        ({"items_input": "x"}, "--items_input is not used with --source=movielens"),
        ({"valid_input": "x"}, "--valid_input needs --test_input"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.read(config("movielens", tmp_path, **more))
