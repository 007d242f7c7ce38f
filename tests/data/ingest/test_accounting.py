"""Nothing is thrown away in silence: every line of every reader's file is accounted for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset, schema
from slgr_jax.data.ingest import bad_rows, interactions, prepare, sources
from slgr_jax.errors import InputError

START = 1_500_000_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a reader's file is written: its k-th row, and lines that are no row.

    Attributes:
      rows_of: the interactions that one good line holds.
    """

    source: str
    file: str
    good: Callable[[int], str]
    bad: tuple[str, ...]
    header: str = ""
    several_lines: Callable[[int], str] | None = None
    options: tuple[tuple[str, str], ...] = ()
    rows_of: int = 1


def _json(**values: object) -> str:
    return json.dumps(values)


LAYOUTS = (
    Layout(
        "csv", "log.csv", lambda k: f"u{k},i{k},{START + k}",
        ("u,i", "u,i,1,2", ",i,1500000000", "u,i,", "u,i,soon", "u,i,1e400", "u\0,i,1500000000"),
        "user,item,timestamp", lambda k: f'"u{k}\n and more",i,{START}',
    ),
    Layout(
        "csv", "log.tsv", lambda k: f'u{k}\t"i{k}\t{START + k}', ("u\ti", "\ti\t1500000000", "u"),
        "user\titem\ttimestamp", options=(("delimiter", "\\t"),),
    ),
    Layout(
        "csv", "bare.csv", lambda k: f"u{k};i{k};{k % 5},5", ("u;i;1,5;1", ";i;1,5", "u;i;many"),
        options=(("delimiter", ";"), ("columns", "user,item,rating"), ("decimal", ",")),
    ),
    Layout(
        "jsonl", "log.jsonl", lambda k: _json(user=f"u{k}", item=k, timestamp=START + k),
        ("{", "[]", "7", '{"user": "u", "item": 1}', _json(user=None, item=1, timestamp=START),
         _json(user=[1], item=1, timestamp=START), _json(user="\ud800", item=1, timestamp=START),
         _json(user="u", item=1.5, timestamp=START), '{"a":' * 5000),
    ),
    Layout(
        "amazon", "r.jsonl",
        lambda k: _json(reviewerID=f"A{k}", asin=f"B{k}", overall=5.0, unixReviewTime=START + k),
        ("{'asin': }", _json(reviewerID="A", asin="B", overall="good", unixReviewTime=START)),
    ),
    Layout(
        "movielens", "u.data", lambda k: f"{k}\t{k}\t3\t{START + k}",
        ("1\t2\t3", "1\t2\t3\tx", "\t2\t3\t1500000000"),
    ),
    Layout(
        "movielens", "ratings.dat", lambda k: f"{k}::{k}::3::{START + k}",
        ("1::2::3", "1::2::x::1500000000", "::2::3::1500000000"),
    ),
    Layout(
        "movielens", "ratings.csv", lambda k: f"{k},{k},3,{START + k}",
        ("1,2", "1,2,nan,1500000000"), "userId,movieId,rating,timestamp",
    ),
    Layout(
        "recbole", "d.inter", lambda k: f"u{k}\ti{k}\t3\t{START + k}",
        ("1\t2", "u\ti\t\t1500000000"),
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    ),
    Layout(
        "s3rec", "T.txt", lambda k: f"u{k} 1 2 3", ("lonely", "u0 1 2", "u \0 1"),
        options=(("split", "leave_last"),), rows_of=3,
    ),
)  # fmt: skip
IDS = [layout.file for layout in LAYOUTS]
# What a generated line is: good, bad (which), blank, or a good row over two lines.
LINES = st.lists(
    st.one_of(st.just("good"), st.just("blank"), st.just("two"), st.integers(0, 8)), max_size=14
)
PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(layout: Layout, kinds: list[object], path: pathlib.Path, ending: str) -> list[str]:
    """A file that begins with a good row, and the kind of each physical line of it."""
    lines, of_lines = ([layout.header], ["header"]) if layout.header else ([], [])
    for k, kind in enumerate(["good", *kinds, "good"]):
        if isinstance(kind, int):
            lines.append(layout.bad[kind % len(layout.bad)])
            of_lines.append("bad")
        elif kind == "two" and layout.several_lines is not None:
            lines += layout.several_lines(k).split("\n")
            of_lines += ["two", "continued"]
        elif kind == "blank":
            lines.append("")
            of_lines.append("blank")
        else:
            lines.append(layout.good(k))
            of_lines.append("good")
    path.write_bytes(ending.join(lines).encode() + ending.encode())
    return of_lines


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@PROPERTY
@given(LINES, st.sampled_from(["\n", "\r\n"]))
def test_read_and_dropped_are_the_lines_of_the_file(
    tmp_path: pathlib.Path, layout: Layout, kinds: list[object], ending: str
) -> None:
    path = tmp_path / layout.file
    lines = write(layout, kinds, path, ending)
    config = PrepareConfig(
        source=layout.source, input=str(path), out="unused", bad_rows="drop",
        **dict(layout.options),  # type: ignore[arg-type]
    )  # fmt: skip
    raw = sources.read(config)
    log, *_ = interactions.read_log(raw, config)
    (count,) = [piece.count for piece in raw.pieces]
    rows = lines.count("good") + lines.count("two")
    assert dataclasses.asdict(count) | {"where": "", "examples": [], "first_continued": 0} == {
        "where": "",
        "lines": len(lines),
        "header": lines.count("header"),
        "blank": lines.count("blank"),
        "continued": lines.count("continued"),
        "first_continued": 0,
        "rows": rows,
        "dropped": lines.count("bad"),
        "examples": [],
        "note": "",
    }
    assert len(log) == rows * layout.rows_of
    assert len(count.examples) == min(5, lines.count("bad"))
    if "two" in lines:
        assert count.first_continued == lines.index("two") + 1
    count.check()


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@PROPERTY
@given(LINES)
def test_one_bad_line_is_refused_and_named(
    tmp_path: pathlib.Path, layout: Layout, kinds: list[object]
) -> None:
    path = tmp_path / layout.file
    lines = write(layout, kinds, path, "\n")
    config = PrepareConfig(
        source=layout.source, input=str(path), out="unused", **dict(layout.options)  # type: ignore[arg-type]
    )  # fmt: skip
    if "bad" not in lines:
        raw = sources.read(config)
        interactions.read_log(raw, config)
        assert raw.pieces[0].count.dropped == 0
        return
    with pytest.raises(InputError) as error:
        interactions.read_log(sources.read(config), config)
    # A line of the file, or a row: what is neither a header nor blank nor goes on.
    is_row = [kind not in ("header", "blank", "continued") for kind in lines]
    bad = [place for place, kind in enumerate(lines) if kind == "bad"]
    names = {f"line {place + 1}" for place in bad}
    names |= {f"row {sum(is_row[: place + 1])}" for place in bad}
    assert any(f"{name}:" in f"{error.value}:".replace(" is", ":") for name in names)
    assert path.name in str(error.value)


def test_rows_of_a_table_are_accounted_for(tmp_path: pathlib.Path) -> None:
    users = ["a", None, "", "b", "c"]
    table = pa.table(
        {"user": users, "item": [1, 2, 3, None, 5], "rating": [1, 1, 1, 1, float("nan")]}
    )
    pq.write_table(table, tmp_path / "log.parquet")
    config = PrepareConfig(
        source="parquet", input=str(tmp_path / "log.parquet"), out="unused", bad_rows="drop"
    )
    raw = sources.read(config)
    log, *_ = interactions.read_log(raw, config)
    count = raw.pieces[0].count
    assert (count.lines, count.rows, count.dropped, len(log)) == (5, 1, 4, 1)
    assert [example.split("column ")[1] for example in count.examples] == [
        "user, row 2: the id is missing",
        "user, row 3: the id is empty",
        "item, row 4: the id is missing",
        "rating, row 5: the rating is nan; ratings must be finite",
    ]


def test_rows_go_into_parts_or_are_counted(tmp_path: pathlib.Path) -> None:
    rows = [f"u{k % 7},i{k % 9},{1 + k % 5},{START + k}" for k in range(200)]
    rows[17] = rows[99] = "broken"
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user,item,rating,timestamp", *rows]) + "\n")
    manifest = prepare.prepare(
        PrepareConfig(
            source="csv", input=str(path), out=str(tmp_path / "d"), bad_rows="drop",
            min_rating=2.0, user_core=3, item_core=3,
        )
    )  # fmt: skip
    data = dataset.load(tmp_path / "d")
    filters = manifest.filters
    dropped = [filters[key] for key in ("below_min_rating", "duplicates", "outside_k_core")]
    assert filters["rows_read"] == 198
    assert sum(dropped) + sum(len(data.part(part)) for part in schema.PARTS) == 198
    (lines,) = data.manifest.source["lines"]
    assert (lines["name"], lines["lines"], lines["rows"], lines["dropped"]) == (
        "log.csv", 201, 198, 2
    )  # fmt: skip
    shown = prepare.summary(data.manifest)
    assert "log.csv: 201 lines = 1 header + 198 rows + 2 dropped" in shown
    assert "dropped: log.csv, row 18: Expected 4 columns, got 1: 'broken'" in shown


def test_a_line_that_is_not_accounted_for_is_an_error() -> None:
    count = bad_rows.LineCount("f.csv", lines=10, header=1, rows=8)
    with pytest.raises(InputError, match=r"f\.csv has 10 lines, but 9 were understood"):
        count.check()
