"""Files as people have them: encodings, quotes, headers, times, repeats; and advice that works."""

from __future__ import annotations

import pathlib
import re
import shlex

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset, schema
from slgr_jax.data.ingest import interactions, prepare, sources, text_lines
from slgr_jax.data.ingest.log import Ranges
from slgr_jax.errors import ConfigError, InputError

START = 1_600_000_000


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    values = {"source": "csv", "input": str(path), "out": "unused", **more}
    return PrepareConfig(**values)  # type: ignore[arg-type]


def log(path: pathlib.Path, **more: object) -> list[tuple[object, ...]]:
    """(user, item, seconds, rating) of each row that is kept, in the order of the file."""
    chosen = config(path, **more)
    read, users, items, _ = interactions.read_log(sources.read(chosen), chosen)
    rows = Ranges.of(read)
    interactions.filtered(rows, chosen)
    read = rows.whole()
    cells = [
        [users[int(u)].as_py() for u in read.users],
        [items[int(i)].as_py() for i in read.items],
    ]
    cells.append([None] * len(read) if read.times is None else (read.times // 10**6).tolist())
    cells.append([None] * len(read) if read.ratings is None else read.ratings.tolist())
    return list(zip(*cells, strict=True))


def advised(message: str) -> dict[str, object]:
    """The knobs that a message tells to add, as a shell would read them."""
    knobs = re.findall(r"--(\w+)=('[^']*'|[^\s;,]+|,)", message)
    return {knob: shlex.split(value)[0] for knob, value in knobs if knob != "bad_rows"}


# --- encodings ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8"])
def test_ids_in_any_encoding(tmp_path: pathlib.Path, encoding: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("user;item\nZoë;1\nZoë;2\n".encode(encoding))
    assert log(path, delimiter=";", encoding=encoding)[0][:2] == ("Zoë", "1")


def test_an_encoding_is_asked_for_and_the_advice_works(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("user,item\nZoë,1\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"log\.csv, line 2: byte 0xeb at place 3") as error:
        log(path)
    assert log(path, **advised(str(error.value)))[0][0] == "Zoë"
    with pytest.raises(InputError, match="is not utf-16"):
        log(path, encoding="utf-16")
    for name in ("no-such-code", "base64"):
        with pytest.raises(ConfigError, match=f"--encoding='{name}' is no encoding of text"):
            log(path, encoding=name)


def test_marks_at_the_start_decide(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes("user,item\nž,1\n".encode(encoding))
        assert log(path)[0][:2] == ("ž", "1")


def test_item_texts_that_are_no_utf8_are_cp1252_and_said_to_be(tmp_path: pathlib.Path) -> None:
    path, items = tmp_path / "log.csv", tmp_path / "items.csv"
    path.write_text("user,item\n" + "".join(f"u{k},{k % 3}\n" for k in range(12)))
    items.write_bytes("item,title\n0,Amélie – “Le”\n1,B\n".encode("cp1252"))
    manifest = prepare.prepare(config(path, items_input=str(items), out=str(tmp_path / "d")))
    assert dataset.load(tmp_path / "d").items["title"].to_pylist() == ["Amélie – “Le”", "B", None]
    shown = prepare.summary(manifest)
    assert "items.csv: 3 lines = 1 header + 2 rows; read as cp1252" in shown
    assert "items in the item table: 2 of 3 (66.7 %)" in shown


# --- quotes, escapes, headers -------------------------------------------------------------


def test_an_open_quote_swallows_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.tsv"
    names = ["Artist", '"Heroes', '12" remix', "Artist", '"Weird Al" Yankovic', '"open', "end"]
    rows = [f"u{k}\ti{k}\t{name}\t{k}\t{START + k}" for k, name in enumerate(names)]
    path.write_text("\n".join(["user\titem\tname\trating\ttimestamp", *rows]) + "\n")
    assert len(log(path, delimiter="\\t")) == 7  # between tabs quotes are plain text
    with pytest.raises(InputError, match=r"line 3: .*add --quote=none") as error:
        log(path, delimiter="\\t", quote='"')
    assert len(log(path, delimiter="\\t", **advised(str(error.value)))) == 7
    kept = log(path, delimiter="\\t", quote='"', bad_rows="drop")
    assert [row[0] for row in kept] == ["u0", "u2", "u3", "u4", "u6"]


def test_a_quote_that_ends_rows_later_at_a_field_is_seen_by_its_rows(
    tmp_path: pathlib.Path,
) -> None:
    # By its quotes alone `"Heroes,1,..\n..,12"` is one field.
    path = tmp_path / "log.csv"
    path.write_text(
        f'user,item,name,rating,timestamp\nu,a,"Heroes,1,{START}\nv,b,x,2,{START}\n'
        f'w,c,12",3,{START}\nx,d,"a ""b""\n c, d",4,{START}\n'
    )
    with pytest.raises(InputError, match="line 2: a quote spans lines that are rows themselves"):
        log(path)
    assert [row[0] for row in log(path, bad_rows="drop")] == ["v", "w", "x"]


def test_an_open_quote_among_texts(tmp_path: pathlib.Path) -> None:
    path, items = tmp_path / "log.csv", tmp_path / "items.tsv"
    path.write_text("user,item\nu,1\n")
    items.write_text('item\ttitle\n1\t"Heroes\n2\t"Weird Al" Y\n3\t"Two\nlines"\n4\t"end\n')
    more = {"items_input": str(items), "delimiter": "\\t", "columns": "user", "user_column": "user"}
    chosen = config(path, **more, quote='"', item_column="item", bad_rows="drop")
    with pytest.raises(InputError, match="has no column item"):  # one column between tabs
        sources.read(chosen)
    path.write_text("user\titem\nu\t1\n")
    raw = sources.read(config(path, **{**more, "columns": ""}, quote='"', bad_rows="drop"))
    table = raw.items(pa.array([]))
    assert table is not None
    assert table.table["title"].to_pylist() == ["Weird Al Y", "Two\nlines"]
    assert (table.count.lines, table.count.dropped, table.count.continued) == (6, 2, 1)


def test_escapes(tmp_path: pathlib.Path) -> None:
    path, items = tmp_path / "log.csv", tmp_path / "items.csv"
    path.write_text('"user";"item"\r\n"u";"1"\r\n"u";"2"\r\n')
    items.write_text('"item";"title"\r\n"1";"Pan: \\"Wendy\\"; more"\r\n"2";"B"\r\n')
    options = {"items_input": str(items), "delimiter": ";"}
    with pytest.raises(InputError, match="row 1: Expected 2 columns, got 3") as error:
        sources.read(config(path, **options))
    chosen = config(path, **options, **advised(str(error.value)))
    table = sources.read(chosen).items(pa.array(["1"]))
    assert table is not None
    assert table.table["title"].to_pylist() == ['Pan: "Wendy"; more', "B"]


@pytest.mark.parametrize("text", ["0\t1\t5\n0\t2\t4\n", "u\ti\t5\nv\ti\t4\n"])
def test_a_file_without_a_header(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match="name all 3 columns in order") as error:
        log(path, delimiter="\\t")
    assert advised(str(error.value)) == {"columns": "user"}  # the example goes on after a comma
    rows = log(path, delimiter="\\t", columns="user, item, rating")
    assert [row[3] for row in rows] == [5.0, 4.0]
    with pytest.raises(ConfigError, match="has an empty name"):
        log(path, columns="user,,item")
    items = tmp_path / "items.tsv"
    items.write_text(f"{text.split()[1]}\tTitle\n")
    chosen = {"items_input": str(items), "items_columns": "item,title", "delimiter": "\\t"}
    raw = sources.read(config(path, columns="user,item,_", **chosen))
    table = raw.items(pa.array([]))
    assert table is not None
    assert table.table["title"].to_pylist() == ["Title"]


def test_the_delimiter_is_advised(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    for delimiter in (";", "\t", "|"):
        path.write_text(f"user{delimiter}item\nu{delimiter}1\n")
        with pytest.raises(InputError, match="add --delimiter=") as error:
            log(path)
        assert log(path, **advised(str(error.value)))[0][:2] == ("u", "1")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quote": "''"}, "--quote=\"''\" must be one ASCII character"),
        ({"quote": "é"}, "--quote='é' must be one ASCII character"),
        ({"escape": "ab"}, "--escape='ab' must be one"),
        ({"escape": '"'}, "must differ; --quote=none turns quotes off"),
        ({"delimiter": ""}, "--delimiter is empty"),
        ({"decimal": ""}, "--decimal='' must be one character"),
        ({"delimiter": "\n"}, "must be one ASCII character"),
    ],
)
def test_characters_that_cannot_be(
    tmp_path: pathlib.Path, more: dict[str, str], message: str
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item\nu,1\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        log(path, **more)


def test_rows_are_checked_across_blocks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    cells = [("ž" * (k % 40), '"' * (k % 3) + "a\r\n" * (k % 2)) for k in range(1, 200)]
    quoted = [f'"{user}","{item.replace(chr(34), chr(34) * 2)}x"' for user, item in cells]
    path.write_bytes(("user,item\r\n" + "\r\n".join(quoted)).encode())
    expected = [(user, item + "x") for user, item in cells if user]
    for block in (1, 7, 64, 1 << 20):
        # Arrow's own blocks must hold a row; ours need not.
        monkeypatch.setattr(text_lines, "BLOCK", block)
        monkeypatch.setattr("slgr_jax.data.ingest.delimited.ARROW_BLOCK", 1 << 20)
        chosen = config(path, bad_rows="drop")
        raw = sources.read(chosen)
        piece = raw.pieces[0]
        rows = zip(
            piece.columns["user"].to_pylist(), piece.columns["item"].to_pylist(), strict=True
        )
        assert [row for row in rows if row[0]] == expected
        assert piece.count.lines == 1 + len(path.read_bytes().split(b"\r\n")) - 1
        assert piece.count.continued == sum(k % 2 for k in range(1, 200))


# --- numbers and times --------------------------------------------------------------------


def test_a_comma_before_the_fraction(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user;item;rating;timestamp\nu;1;4,5;{START}\nu;2;-1,25;{START}\n")
    with pytest.raises(InputError, match="row 1: '4,5' is not a rating") as error:
        log(path, delimiter=";")
    rows = log(path, delimiter=";", **advised(str(error.value)))
    assert [row[3] for row in rows] == [4.5, -1.25]


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (["13/09/2020 12:27", "01/10/2020 00:00"], [1_599_999_620 + 400, 1_601_510_400]),
        (["Sun Sep 13 12:26:40 +0000 2020", "Sun Sep 13 14:26:41 +0200 2020"], [START, START + 1]),
        (["13.09.2020", "14.09.2020"], [1_599_955_200, 1_600_041_600]),
        (["Sep 13, 2020", "Sep 14, 2020"], [1_599_955_200, 1_600_041_600]),
    ],
)
def test_the_format_of_times_is_advised(
    tmp_path: pathlib.Path, texts: list[str], seconds: list[int]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "user,item,timestamp\n" + "".join(f'u,{k},"{t}"\n' for k, t in enumerate(texts))
    )
    with pytest.raises(InputError, match=r"row 1: .* it reads as --time_format=") as error:
        log(path)
    known = advised(str(error.value))
    assert [row[2] for row in log(path, **known)] == seconds
    with pytest.raises(InputError, match="is not a time as --time_format='%Y'"):
        log(path, time_format="%Y")


# --- repeats ------------------------------------------------------------------------------

RERATED = [
    ("u", "a", 5, 30),
    ("u", "a", 2, 10),
    ("u", "a", 3, 20),
    ("u", "b", 2, 5),
    ("v", "a", 1, 1),
]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {("u", "a"): (10, 2), ("u", "b"): (5, 2), ("v", "a"): (1, 1)}),
        ({"keep": "last"}, {("u", "a"): (30, 5), ("u", "b"): (5, 2), ("v", "a"): (1, 1)}),
        ({"keep": "highest"}, {("u", "a"): (30, 5), ("u", "b"): (5, 2), ("v", "a"): (1, 1)}),
        # The threshold comes first: the first row that passes it is kept.
        ({"min_rating": 3.0}, {("u", "a"): (20, 3)}),
        ({"min_rating": 2.0, "keep": "last"}, {("u", "a"): (30, 5), ("u", "b"): (5, 2)}),
    ],
)
def test_which_of_repeated_pairs_is_kept(
    tmp_path: pathlib.Path, more: dict[str, object], expected: dict[tuple[str, str], object]
) -> None:
    path = tmp_path / "log.csv"
    lines = [f"{user},{item},{rating},{START + time}" for user, item, rating, time in RERATED]
    path.write_text("\n".join(["user,item,rating,timestamp", *lines]))
    rows = log(path, **more)
    assert {row[:2]: (row[2] - START, row[3]) for row in rows} == expected  # type: ignore[operator]


def test_repeats_as_counts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plays.csv"
    path.write_text("user,item\n" + "u,a\n" * 3 + "v,a\nu,b\nu,b\n")
    assert [row[3] for row in log(path)] == [None] * 3
    rows = {row[:2]: row[3] for row in log(path, count_repeats=True)}
    assert rows == {("u", "a"): 3.0, ("v", "a"): 1.0, ("u", "b"): 2.0}
    path.write_text("user,item,rating\nu,a,1\nu,a,2\n")
    with pytest.raises(ConfigError, match=r"add --rating_column=$"):
        log(path, count_repeats=True)
    assert log(path, count_repeats=True, rating_column="")[0][3] == 2.0
    with pytest.raises(ConfigError, match="--keep=highest needs ratings"):
        log(path, keep="highest", rating_column="")


# --- bad rows -----------------------------------------------------------------------------


def test_dropped_rows_do_not_shift_the_numbers_of_others(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"u{k},i,{k % 5},{START + k}" for k in range(20)]
    rows[2], rows[4], rows[9], rows[12] = "short", "u\0,i,1,1", f"u,i,,{START}", f",i,1,{START}"
    path.write_text("\n".join(["user,item,rating,timestamp", "", *rows]))
    chosen = config(path, bad_rows="drop")
    raw = sources.read(chosen)
    kept, *_ = interactions.read_log(raw, chosen)
    count = raw.pieces[0].count
    assert (len(kept), count.rows, count.dropped, count.blank) == (16, 16, 4, 1)
    shown = [example.removeprefix(f"{path}").split(": ")[0] for example in count.examples]
    # Line 7 is row 5: a header and a blank line lie before it.
    assert shown == [", line 7", ", row 3", "", ""]
    assert "user, row 13: the id is empty" in count.examples[2]
    assert "rating, row 10: '' is not a rating" in count.examples[3]


def test_many_dropped_rows_are_all_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,rating\n" + "u,i,1\n" * 3 + "u,i,x\n" * 11)
    chosen = config(path, bad_rows="drop")
    raw = sources.read(chosen)
    interactions.read_log(raw, chosen)
    count = raw.pieces[0].count
    assert (count.rows, count.dropped, len(count.examples)) == (3, 11, 5)
    count.check()


# --- folders that are splits --------------------------------------------------------------


def part_table(part: str, n: int) -> pa.Table:
    return pa.table({"user": [f"{part}{k}" for k in range(n)], "item": [k % 3 for k in range(n)]})


def write_stream(path: pathlib.Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_hugging_face_splits(tmp_path: pathlib.Path) -> None:
    sizes = {"train": 9, "validation": 2, "test": 3}
    for part, n in sizes.items():
        write_stream(tmp_path / part / "data-00000-of-00001.arrow", part_table(part, n))
        write_stream(tmp_path / part / "cache-1234.arrow", part_table("stale", 5))
        (tmp_path / part / "state.json").write_text(
            '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'
        )
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    prepare.prepare(config(tmp_path, source="parquet", out=str(tmp_path / "out")))
    data = dataset.load(tmp_path / "out")
    assert [len(data.part(part)) for part in schema.PARTS] == [9, 2, 3]
    with pytest.raises(
        ConfigError, match=r"is a pre-made split \(train, valid, test\); drop --split"
    ):
        prepare.prepare(config(tmp_path, source="parquet", split="ratio", out=str(tmp_path / "o")))
    # One of its folders is a table like any other: only what state.json names is read.
    raw = sources.read(config(tmp_path / "train", source="parquet"))
    assert [(piece.part, len(piece)) for piece in raw.pieces] == [(None, 9)]
    (tmp_path / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(
        InputError, match=r"names test/data-00000-of-00001\.arrow, which is missing"
    ):
        sources.read(config(tmp_path, source="parquet"))


def test_files_named_by_their_part(tmp_path: pathlib.Path) -> None:
    for name, n in (
        ("train-00000-of-00002", 4),
        ("train-00001-of-00002", 3),
        ("test-00000-of-00001", 2),
    ):
        pq.write_table(part_table(name, n), tmp_path / f"{name}.parquet")
    raw = sources.read(config(tmp_path, source="parquet"))
    assert {piece.part: len(piece) for piece in raw.pieces} == {"train": 7, "test": 2}
    pq.write_table(part_table("x", 1), tmp_path / "more.parquet")
    with pytest.raises(InputError, match=r"parts \(.*\) and others \(more\.parquet\)"):
        sources.read(config(tmp_path, source="parquet"))
    (tmp_path / "more.parquet").rename(tmp_path / "holdout.parquet")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "holdout"]}')
    with pytest.raises(InputError, match=r"holds neither state.json nor data"):
        sources.read(config(tmp_path, source="parquet"))
