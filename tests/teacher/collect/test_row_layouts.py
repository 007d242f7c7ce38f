"""Rows of an id and a text, in the layouts and files that engines and warehouses write them in."""

from __future__ import annotations

import bz2
import json

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from teacher.collect.reading import read_one

from slgr_jax.errors import InputError
from slgr_jax.teacher.collect import envelopes, result_files, results
from slgr_jax.teacher.collect.refusals import Refused
from slgr_jax.teacher.collect.shown import Shown

ANSWER = '{"A": 0.25, "B": 0.75}'
LAYOUTS = {
    "text": {"text": ANSWER},
    "ray data": {"generated_text": ANSWER, "prompt": "p", "__inference_error__": ""},
    "response": {"response": ANSWER},  # an answer that is JSON is no envelope
    "result": {"result": ANSWER},
    "ollama generate": {"response": ANSWER, "done": True, "done_reason": "stop"},
    "ollama chat": {"response": {"message": {"role": "assistant", "content": ANSWER}}},
    "ai_query": {"output": {"response": ANSWER, "error": None}},
    "ai_query, error message": {"response": {"result": ANSWER, "errorMessage": None}},
    "vllm outputs": {"outputs": [{"text": ANSWER, "finish_reason": "stop"}]},
    "tgi": {"response": [{"generated_text": ANSWER}]},
    "list": {"generated_text": [ANSWER]},
    "converse": {"modelOutput": {"output": {"message": {"content": [{"text": ANSWER}]}}}},
    "a body as text": {"response": json.dumps({"choices": [{"text": ANSWER}]})},
}


def scores(told):
    answer = results.parse("listwise", told, Shown(2))
    assert not isinstance(answer, Refused), answer
    return answer.scores.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capitals", [False, True])
def test_a_row_is_its_text(layout, capitals):
    row = {"custom_id": "r0", **LAYOUTS[layout]}
    if capitals and layout in ("text", "response", "result", "ai_query"):  # as Snowflake names them
        row = {key.upper(): value for key, value in row.items()}
    told = read_one(json.dumps(row))
    assert told.custom_id == "r0"
    assert scores(told) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("row", "kind", "seen"),
    [
        ({"output": {"response": None, "error": "too long"}}, "error", "too long"),
        ({"response": {"result": None, "errorMessage": "429"}}, "error", "429"),
        ({"generated_text": "", "__inference_error__": "Too long"}, "error", "Too long"),  # Ray's
        ({"text": None}, "no response", "keys custom_id, text"),
        ({"prediction": ANSWER}, "no response", "keys custom_id, prediction"),
    ],
)
def test_a_row_without_a_text_says_why(row, kind, seen):
    refused = read_one(json.dumps({"custom_id": "r0", **row}))
    assert refused.kind == kind
    assert seen in refused.detail


def test_several_texts_of_a_row_are_its_samples():
    row = {"custom_id": "r0", "outputs": [{"text": ANSWER}, {"text": '{"A": 1, "B": 0}'}]}
    told = envelopes.read_line(json.dumps(row).encode())
    assert [completion.sample for completion in told] == [0, 1]
    assert [scores(completion) for completion in told] == [[0.25, 0.75], [1, 0]]


def test_an_id_that_is_a_number_is_shown_as_one():
    assert "custom_id (int)" in read_one('{"custom_id": 5, "text": "A"}').detail


IDS = [f"r{number}" for number in range(5)]


def table(ids=None, texts=None):
    return pa.table({"custom_id": ids or pa.array(IDS), "text": texts or pa.array([ANSWER] * 5)})


def in_lines(text):
    return "".join(json.dumps({"custom_id": name, "text": text}) + "\n" for name in IDS)


def packed(codec):
    def write(path):
        with pa.CompressedOutputStream(str(path), codec) as file:
            file.write(in_lines(ANSWER).encode())

    return write


FILES = {
    "rows.parquet": lambda path: pq.write_table(table(), path),
    "bytes.parquet": lambda path: pq.write_table(
        table(pa.array(IDS).cast(pa.binary()), pa.array([ANSWER] * 5).cast(pa.binary())), path
    ),
    "dictionary.parquet": lambda path: pq.write_table(
        table(pa.array(IDS).dictionary_encode(), pa.array([ANSWER] * 5, pa.large_string())), path
    ),
    "feather.arrow": lambda path: feather.write_feather(table(), path),
    "a.jsonl.gz": packed("gzip"),
    "a.jsonl.zst": packed("zstd"),
    "a.jsonl.lz4": packed("lz4"),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(in_lines(ANSWER).encode())),
    "marked.jsonl": lambda path: path.write_bytes(in_lines(ANSWER).encode("utf-16")),
    "little.jsonl": lambda path: path.write_bytes(in_lines(ANSWER).encode("utf-16-le")),
    "big.jsonl": lambda path: path.write_bytes(in_lines(ANSWER).encode("utf-16-be")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_file_is_read(tmp_path, name):
    FILES[name](tmp_path / name)
    by_folder = name != "feather.arrow"  # this project's own shards end so, too
    given = tmp_path if by_folder else tmp_path / name
    (path,) = result_files.choose(str(given), tmp_path / "requests").paths
    told = [read_one(record.line) for record in result_files.records(path)]
    assert [completion.custom_id for completion in told] == IDS
    np.testing.assert_allclose([scores(completion) for completion in told], [[0.25, 0.75]] * 5)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.zip", b"PK\x03\x04{}", "is a zip file: unpack it"),
        ("a.jsonl.xz", b"\xfd7zXZ\0", "is packed with xz: unpack it"),
        (
            "a.csv",
            b"custom_id,text\nr0,A\n",
            "write its table as Parquet or JSON lines with custom",
        ),
        ("a.arrow", b"ARROW1\0\0half", "cannot be read to its end"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        list(result_files.records(path))
