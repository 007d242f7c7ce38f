"""Files that are nearly right, from a seed: what the fuzz test of the readers feeds them."""

from __future__ import annotations

import dataclasses
import decimal
import gzip
import io
import json
import pathlib
import random
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

ROWS = 12
# Values that some reader, cast or printer somewhere chokes on.
TEXTS = (
    "", " ", "0", "-1", "1e400", "nan", "inf", "-inf", "9" * 25, "1" * 5000, "null", "NULL", "é",
    "\u2028", "\x85", "\ufeff", "\U0001f600", "a\nb", "a\rb", '"', '""', '"x', 'x"y', "\\", "\\\"",
    "a,b", "a\tb", "a;b", "1,5", "2020-01-01", "2020-13-45", "0001-01-01", "9999-12-31T23:59:59Z",
    "-292277-01-01", "13/09/2020", "True", "<b>", "&amp;", "&#99999999;", "train", "\x1f", "%s",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), 1e308, [], [1], [[]],
    {}, {"a": 1}, "\ud800", "x\udfffy", *TEXTS,
)  # fmt: skip
BYTES = (
    b"\0", b"\r", b"\n", b"\r\n", b'"', b"\\", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\xff\xfe", b"PAR1", b"ARROW1", b"PK\x03\x04", b"\x1f\x8b", b"[" * 3000, b'{"a":' * 3000,
    b"9" * 5000, b"::", b"|", b"\t", b",", b" ", b"{", b"}", b"\xe2\x80\xa8", b"\\ud800", b"'",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that reads generated files."""

    kind: str
    options: dict[str, Any]  # of PrepareConfig, `out` aside


def case(seed: int, folder: pathlib.Path) -> Case:
    """Write the files of a seed into `folder`, and say how they are to be read."""
    rng = random.Random(seed)
    kind = rng.choice(list(_KINDS))
    options = _KINDS[kind](rng, folder)
    if rng.random() < 0.5:
        options |= {"bad_rows": "drop"}
    if rng.random() < 0.3:
        options |= rng.choice(_KNOBS)
    return Case(kind, options)


_KNOBS: tuple[dict[str, Any], ...] = (
    {"encoding": "utf-16"}, {"encoding": "cp1252"}, {"encoding": "utf-7"}, {"quote": "none"},
    {"quote": "'"}, {"escape": "\\"}, {"decimal": ","}, {"time_format": "%d/%m/%Y"},
    {"time_format": "%"}, {"keep": "last"}, {"keep": "highest"}, {"count_repeats": True},
    {"columns": "user,item,rating,timestamp"}, {"columns": "user,item"}, {"split": "ratio"},
    {"split": "leave_last"}, {"min_rating": 2.0}, {"user_core": 2}, {"delimiter": "\\t"},
    {"split_column": "fold"}, {"split_column": "rating"}, {"name": "x"}, {"time_column": "item"},
    {"item_column": "user"}, {"rating_column": ""},
)  # fmt: skip


# --- values and bytes ---------------------------------------------------------------------


def _log(rng: random.Random) -> list[list[str]]:
    """Rows of user, item, rating, time; some with a value from `TEXTS`."""
    rows = [
        [f"u{k % 5}", f"i{k % 7}", str(1 + k % 5), str(1_500_000_000 + 86_400 * k)]
        for k in range(ROWS)
    ]
    for _ in range(rng.choice((0, 0, 1, 2))):
        rng.choice(rows)[rng.randrange(4)] = rng.choice(TEXTS)
    return rows


def _spoiled(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or put in."""
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 3, 40)))
        how = rng.randrange(5)
        if how == 0:
            data = data[:start]
        elif how == 1:
            data = data[:start] + data[end:]
        elif how == 2:
            data = data[:end] + data[start:]
        elif how == 3 and start < len(data):
            data = data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]
        else:
            data = data[:start] + rng.choice(BYTES) + data[end:]
    return data


def _write(rng: random.Random, path: pathlib.Path, data: bytes) -> pathlib.Path:
    """The spoiled bytes as they are, gzipped, or in another encoding."""
    how = rng.randrange(12)
    if how == 0:
        path = path.with_name(path.name + ".gz")
        packed = gzip.compress(_spoiled(rng, data), mtime=0)
        path.write_bytes(_spoiled(rng, packed) if rng.random() < 0.3 else packed)
    elif how == 1:
        encoding = rng.choice(("utf-16", "utf-8-sig", "cp1252", "utf-32"))
        text = data.decode("utf-8", "replace").encode(encoding, "replace")
        path.write_bytes(_spoiled(rng, text))
    else:
        path.write_bytes(_spoiled(rng, data))
    return path


def _delimited(rng: random.Random, rows: list[list[str]], delimiter: str, header: bool) -> bytes:
    lines = [["user", "item", "rating", "timestamp"], *rows] if header else rows
    if rng.random() < 0.1:
        lines[0] = [*lines[0][:-1], rng.choice(("user", "", "item"))]
    quote = rng.random() < 0.3
    ending = rng.choice(("\n", "\n", "\r\n", "\r"))
    cells = [[f'"{cell}"' if quote else cell for cell in line] for line in lines]
    return (ending.join(delimiter.join(line) for line in cells) + ending).encode()


# --- kinds of input -----------------------------------------------------------------------


def _csv(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    path = _write(rng, folder / "log.csv", _delimited(rng, _log(rng), ",", header=True))
    options = {"source": "csv", "input": str(path)}
    if rng.random() < 0.3:
        items = "item,title,categories\n" + "".join(
            f"i{k},{rng.choice(('T', *TEXTS))},A|B\n" for k in range(7)
        )
        options["items_input"] = str(_write(rng, folder / "items.csv", items.encode()))
    return options


def _tsv(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    path = _write(rng, folder / "log.tsv", _delimited(rng, _log(rng), "\t", header=True))
    return {"source": "csv", "input": str(path), "delimiter": "\\t"}


def _premade(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    rows = _log(rng)
    paths = [
        _write(rng, folder / f"{part}.csv", _delimited(rng, held, ",", header=True))
        for part, held in (("a", rows[:8]), ("b", rows[8:]))
    ]
    return {"source": "csv", "input": str(paths[0]), "test_input": str(paths[1])}


def _json_text(rng: random.Random, records: list[dict[str, Any]]) -> bytes:
    for _ in range(rng.choice((0, 0, 1, 2))):
        record = rng.choice(records)
        record[rng.choice(list(record))] = rng.choice(VALUES)
    style = repr if rng.random() < 0.15 else json.dumps
    lines = []
    for record in records:
        try:
            lines.append(style(record).encode("utf-8", "surrogatepass"))
        except ValueError:  # a number with more digits than Python writes
            lines.append(b'{"user": ' + b"9" * 5000 + b"}")
    return b"\n".join(lines) + b"\n"


def _jsonl(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    names = ("user", "item", "rating", "timestamp")
    records = [dict(zip(names, row, strict=True)) for row in _log(rng)]
    if rng.random() < 0.5:
        for k, record in enumerate(records):
            record |= {"rating": 1 + k % 5, "timestamp": 1_500_000_000 + k}  # type: ignore[dict-item]
    path = _write(rng, folder / "log.jsonl", _json_text(rng, records))
    return {"source": rng.choice(("jsonl", "csv", "amazon", "parquet")), "input": str(path)}


def _amazon(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    names = ("user_id", "parent_asin", "rating", "timestamp")
    records = [dict(zip(names, row, strict=True)) for row in _log(rng)]
    path = _write(rng, folder / "r.jsonl", _json_text(rng, [dict(r) for r in records]))
    if rng.random() < 0.3:
        rows = [[f"A{k:013}", f"B{k:09}", "5.0", str(1_400_000_000 + k)] for k in range(ROWS)]
        path = _write(rng, folder / "r.csv", _delimited(rng, rows, ",", header=False))
    items = [
        {"parent_asin": f"i{k}", "title": "T", "description": ["a", "b"], "categories": [["x"]]}
        for k in range(7)
    ]
    meta = _write(rng, folder / "meta.jsonl", _json_text(rng, items))
    return {"source": "amazon", "input": str(path), "items_input": str(meta)}


def _movielens(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    rows = _log(rng)
    style = rng.randrange(3)
    if style == 0:
        _write(rng, folder / "u.data", _delimited(rng, rows, "\t", header=False))
        flags = "|".join("01"[k % 2] for k in range(19))
        movies = "".join(f"i{k}|T{k}|1-Jan-1995||http://x|{flags}\n" for k in range(7))
        _write(rng, folder / "u.item", movies.encode())
        _write(rng, folder / "u.user", b"".join(b"u%d|20|M|writer|1\n" % k for k in range(5)))
    elif style == 1:
        _write(rng, folder / "ratings.dat", _delimited(rng, rows, "::", header=False))
        _write(rng, folder / "movies.dat", b"".join(b"i%d::T (1995)::A|B\n" % k for k in range(7)))
        _write(rng, folder / "users.dat", b"".join(b"u%d::M::25::3::1\n" % k for k in range(5)))
    else:
        text = _delimited(rng, rows, ",", header=True)
        text = text.replace(b"user", b"userId", 1).replace(b"item", b"movieId", 1)
        _write(rng, folder / "ratings.csv", text)
        _write(rng, folder / "movies.csv", b"movieId,title,genres\ni1,T,A|B\ni2,U,\n")
    return {"source": "movielens", "input": str(folder)}


def _recbole(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    text = _delimited(rng, _log(rng), "\t", header=False)
    head = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    _write(rng, folder / "d.inter", head + text)
    items = b"item_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq\n"
    _write(rng, folder / "d.item", items + b"".join(b"i%d\tT\t1995\tA B\n" % k for k in range(7)))
    _write(rng, folder / "d.user", b"user_id:token\tage:token\nu1\t3\nu2\t\n")
    return {"source": "recbole", "input": str(folder)}


def _s3rec(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    lines = [f"{k} " + " ".join(str((k + j) % 9) for j in range(4)) for k in range(8)]
    path = _write(rng, folder / "T.txt", "\n".join(lines).encode())
    attributes = {str(k): rng.choice(([1], ["a"], [], [2, 3])) for k in range(9)}
    if rng.random() < 0.3:
        attributes["1"] = rng.choice([v for v in VALUES if v != 10**400])  # type: ignore[assignment]
    _write(rng, folder / "T_item2attributes.json", json.dumps(attributes).encode())
    return {"source": "s3rec", "input": str(path), "split": "leave_last"}


def _column(rng: random.Random, name: str) -> pa.Array:
    """A column of any type, most often of one that its name lets expect."""
    values = {
        "user": [f"u{k % 5}" for k in range(ROWS)],
        "item": [k % 7 for k in range(ROWS)],
        "rating": [float(1 + k % 5) for k in range(ROWS)],
        "timestamp": [1_500_000_000 + 86_400 * k for k in range(ROWS)],
    }[name]
    usual = pa.array(values)
    if rng.random() < 0.7:
        return usual
    number = [k + 1_500_000_000 for k in range(ROWS)]
    makers: tuple[Callable[[], pa.Array], ...] = (
        lambda: pa.array([[v] for v in values]),
        lambda: pa.array([{"a": v} for v in values]),
        lambda: pa.nulls(ROWS),
        lambda: pa.array([None, *values[1:]], usual.type),
        lambda: pa.array([rng.choice(TEXTS) for _ in values]),
        lambda: pa.array([rng.choice(TEXTS).encode() + b"\xff" for _ in values]),
        lambda: pa.array(values).dictionary_encode(),
        lambda: pa.DictionaryArray.from_arrays([0, 1, None] * 4, ["a", None]),
        lambda: pa.array([decimal.Decimal("1.5")] * ROWS),
        lambda: pa.array([2**63 + k for k in range(ROWS)], pa.uint64()),
        lambda: pa.array([1e308 * (-1) ** k for k in range(ROWS)]),
        lambda: pa.array([float("nan")] * ROWS, pa.float16()),
        lambda: pa.array([True] * ROWS),
        lambda: pa.array(number, pa.int64()).cast(pa.timestamp("s")),
        lambda: pa.array([2**62] * ROWS, pa.timestamp("s")),
        lambda: pa.array([-(2**62)] * ROWS, pa.timestamp("ns", tz="Nowhere/Land")),
        lambda: pa.array([2**31 - 1] * ROWS, pa.date32()),
        lambda: pa.array([2**62] * ROWS, pa.date64()),
        lambda: pa.array([1] * ROWS, pa.duration("s")),
        lambda: pa.array([1] * ROWS, pa.time32("s")),
        lambda: pa.array([b"abc"] * ROWS, pa.binary(3)),
        lambda: pa.array(["x"] * ROWS, pa.large_string()),
        lambda: pa.array(["x", "yy"] * (ROWS // 2), pa.string_view()),
        lambda: pa.array([[1.0]] * ROWS, pa.list_(pa.float32(), 1)),
        lambda: pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int32())),
        lambda: pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array(["x"])),
    )
    return rng.choice(makers)()


def _table(rng: random.Random) -> pa.Table:
    names = ["user", "item", "rating", "timestamp"]
    if rng.random() < 0.2:
        names.append(rng.choice(names))
    columns = [_column(rng, name) for name in names]
    table = pa.Table.from_arrays(columns, names)
    return table.slice(0, rng.choice((ROWS, ROWS, ROWS, 0, 3)))


def _arrow(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    table, sink = _table(rng), io.BytesIO()
    style = rng.randrange(3)
    try:
        if style == 0:
            pq.write_table(table, sink)
        else:
            opener = pa.ipc.new_file if style == 1 else pa.ipc.new_stream
            codec = rng.choice((None, None, "lz4", "zstd"))
            options = pa.ipc.IpcWriteOptions(compression=codec)
            with opener(sink, table.schema, options=options) as writer:
                writer.write_table(table)
    except pa.ArrowException:  # a type that the format lacks
        return _csv(rng, folder)
    path = folder / "log.parquet"
    path.write_bytes(_spoiled(rng, sink.getvalue()) if rng.random() < 0.7 else sink.getvalue())
    return {"source": rng.choice(("parquet", "parquet", "parquet", "csv")), "input": str(path)}


def _saved(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    """A folder as Hugging Face `datasets` saves it."""
    parts = rng.choice((["train", "test"], ["train", "validation", "test"], ["train"], [""]))
    for part in parts:
        (folder / part).mkdir(exist_ok=True)
        _arrow(rng, folder / part)
        for path in (folder / part).glob("log.*"):
            path.rename(folder / part / "data-00000-of-00001.arrow")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        if rng.random() < 0.7:
            _write(rng, folder / part / "state.json", json.dumps(state).encode())
    if parts != [""] and rng.random() < 0.7:
        _write(rng, folder / "dataset_dict.json", json.dumps({"splits": parts}).encode())
    return {"source": "parquet", "input": str(folder)}


def _zip(rng: random.Random, folder: pathlib.Path) -> dict[str, Any]:
    inside = folder / "inside"
    inside.mkdir()
    options = rng.choice((_movielens, _recbole, _csv))(rng, inside)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as z:
        for path in sorted(inside.iterdir()):
            data = path.read_bytes() if rng.random() < 0.9 else b""
            z.writestr(rng.choice(("", "a/", "../")) + path.name, data)
    path = folder / "x.zip"
    path.write_bytes(_spoiled(rng, sink.getvalue()) if rng.random() < 0.5 else sink.getvalue())
    return {"source": options["source"], "input": str(path)}


_KINDS: dict[str, Callable[[random.Random, pathlib.Path], dict[str, Any]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "premade": _premade,
    "jsonl": _jsonl,
    "amazon": _amazon,
    "movielens": _movielens,
    "recbole": _recbole,
    "s3rec": _s3rec,
    "arrow": _arrow,
    "saved": _saved,
    "zip": _zip,
}
