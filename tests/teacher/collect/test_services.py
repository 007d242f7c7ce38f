"""The shapes of services and the kinds of files: one answer, the same scores from each."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from teacher.collect.asked_world import answered, ask, gather, put, scores_of
from teacher.collect.reading import read_one, result

from slgr_jax.errors import InputError
from slgr_jax.teacher.collect import envelopes, result_files
from slgr_jax.teacher.collect.completions import Completion

TEXT = '{"A": 0.25, "B": 0.5}'
CALL = {"name": "rate", "arguments": TEXT}


def message(*parts, **facts):
    return {"type": "message", "role": "assistant", "content": list(parts), **facts}


SERVICES = {
    "openai": {"response": {"body": {"choices": [{"message": {"content": TEXT}}]}}},
    "body as text": {"response": {"body": json.dumps({"choices": [{"text": TEXT}]})}},
    "response as text": {"response": json.dumps({"choices": [{"text": TEXT}]})},
    "tool call": {"response": {"choices": [{"message": {"content": None, "tool_calls": [
        {"type": "function", "function": CALL}]}}]}},
    "old function call": {"response": {"choices": [{"message": {"function_call": CALL}}]}},
    "responses": {"response": {"body": {"object": "response", "status": "completed", "output": [
        {"type": "reasoning", "summary": [{"text": "A: 0.9"}]},
        message({"type": "output_text", "text": TEXT})]}}},
    "responses call": {"response": {"body": {"output": [{"type": "function_call", **CALL}]}}},
    "anthropic": {"result": {"type": "succeeded", "message": message(
        {"type": "thinking", "thinking": "A: 0.9"}, {"type": "text", "text": TEXT})}},
    "anthropic tool": {"result": {"type": "succeeded", "message": message(
        {"type": "tool_use", "input": json.loads(TEXT)})}},
    "gemini": {"response": {"candidates": [{"content": {"parts": [
        {"text": "A: 0.9", "thought": True}, {"text": TEXT}]}, "finishReason": "STOP"}]}},
    "gemini call": {"response": {"candidates": [{"content": {"parts": [
        {"functionCall": {"name": "rate", "args": json.loads(TEXT)}}]}}]}},
    "bedrock": {"modelOutput": message({"type": "text", "text": TEXT})},
    "a table's row": {"generated_text": TEXT},
}  # fmt: skip


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("key", ["custom_id", "key", "recordId"])
def test_every_service_says_the_same(service, key):
    told = read_one(json.dumps({key: "r0", **SERVICES[service]}))
    assert isinstance(told, Completion), told
    assert (told.custom_id, json.loads(told.text), told.cut) == ("r0", json.loads(TEXT), False)


CUT = (
    {"response": {"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]}},
    {"response": {"body": {"status": "incomplete", "output": [message({"text": "A"})],
                           "incomplete_details": {"reason": "max_output_tokens"}}}},
    {"result": {"type": "succeeded", "message": message({"text": "A"}, stop_reason="max_tokens")}},
    {"response": {"candidates": [{"content": {"parts": [{"text": "A"}]},
                                  "finishReason": "MAX_TOKENS"}]}},
)  # fmt: skip


@pytest.mark.parametrize("record", CUT)
def test_a_cut_answer_is_known_in_every_shape(record):
    assert read_one(json.dumps({"custom_id": "r0", **record})).cut


USAGES = (
    {"response": {"choices": [{"text": "A"}],
                  "usage": {"prompt_tokens": 7, "completion_tokens": 2}}},
    {"result": {"message": message({"text": "A"}, usage={"input_tokens": 7, "output_tokens": 2})}},
    {"response": {"candidates": [{"content": {"parts": [{"text": "A"}]}}], "usageMetadata": {
        "promptTokenCount": 7, "candidatesTokenCount": 1, "thoughtsTokenCount": 1}}},
)  # fmt: skip


@pytest.mark.parametrize("record", USAGES)
def test_tokens_are_counted_under_every_name(record):
    told = read_one(json.dumps({"custom_id": "r0", **record}))
    assert (told.prompt_tokens, told.completion_tokens) == (7, 2)


FAILED = (
    ({"result": {"type": "errored", "error": {"error": {"message": "overloaded"}}}}, "error"),
    ({"result": {"type": "expired"}}, "error"),
    ({"response": {"promptFeedback": {"blockReason": "SAFETY"}}}, "refusal"),
    ({"response": {"candidates": [{"finishReason": "SAFETY"}]}}, "refusal"),
    ({"response": {"choices": [{"message": {"content": "<think>long"}}]}}, "empty answer"),
    ({"response": {"status_code": 429, "body": {"error": "slow down"}}}, "error"),
)


@pytest.mark.parametrize(("record", "kind"), FAILED)
def test_what_a_service_did_not_answer_is_refused(record, kind):
    assert read_one(json.dumps({"custom_id": "r0", **record})).kind == kind


def test_several_choices_are_samples_paid_once():
    usage = {"prompt_tokens": 7, "completion_tokens": 6}
    choices = [{"message": {"content": text}} for text in ("A", "", "B")]
    line = json.dumps({"custom_id": "r0", "response": {"choices": choices, "usage": usage}})
    first, second, third = envelopes.read_line(line.encode())
    assert (first.text, first.sample, first.prompt_tokens) == ("A", 0, 7)
    assert second.kind == "empty answer"
    assert (third.text, third.sample, third.prompt_tokens) == ("B", 2, None)


# --- files -------------------------------------------------------------------------------------


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def as_files(lines):
    text = "\n".join(lines) + "\n"
    rows = [json.loads(line) for line in lines]
    return {
        "a.jsonl": text.encode(),
        "bom.jsonl": text.encode("utf-8-sig"),
        "crlf.jsonl": text.replace("\n", "\r\n").encode(),
        "utf16.jsonl": text.replace("\n", "\r\n").encode("utf-16"),
        "utf32.jsonl": text.encode("utf-32"),
        "array.json": json.dumps(rows, indent=1).encode(),
        "array.jsonl": json.dumps(rows).encode(),
        "indented.json": "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
        "a.jsonl.gz": gzip.compress(text.encode()),
        "a.json.zst": zstd(text.encode()),
        "blank.jsonl": ("\n\n" + text.replace("\n", "\n\n")).encode(),
    }


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    lines = [result(f"{n}: é😀", custom_id=f"r{n}") for n in range(5)]
    for name, data in as_files(lines).items():
        (tmp_path / name).write_bytes(data)
        records = list(result_files.records(tmp_path / name))
        told = [read_one(record.line) for record in records]
        assert [(one.custom_id, one.text) for one in told] == [
            (f"r{n}", f"{n}: é😀") for n in range(5)
        ], name
        assert all(record.source.startswith(name) for record in records)


@pytest.mark.parametrize("cut", [1, 8, 30])
def test_a_packed_file_that_was_cut_off_is_named(tmp_path, cut):
    lines = [result(f"text {n} {hash(str(n))}", custom_id=f"r{n}") for n in range(50)]
    for name in ("a.jsonl.gz", "a.json.zst"):
        (tmp_path / name).write_bytes(as_files(lines)[name][:-cut])
        with pytest.raises(InputError, match=rf"{name} cannot be read to its end .*copy it again"):
            list(result_files.records(tmp_path / name))


def test_parquet_of_ids_and_texts_becomes_a_product(world, tmp_path):
    lines = answered(ask(world, list_size=4))
    rows = [json.loads(line) for line in lines]
    ids = [row["custom_id"] for row in rows]
    texts = [read_one(line).text for line in lines]
    pq.write_table(pa.table({"custom_id": ids, "text": texts}), tmp_path / "out.parquet")
    gather(world, tmp_path / "out.parquet")
    expected = scores_of(world)
    requests = tmp_path / "data/requests/t"
    nested = [row["response"].get("body", row["response"]) for row in rows]
    pq.write_table(pa.table({"custom_id": ids, "response": nested}), tmp_path / "nested.parquet")
    gather(world, tmp_path / "nested.parquet", name="n", requests=requests)
    assert scores_of(world, "n") == expected
    gather(world, put(tmp_path / "a.jsonl", lines), name="u", requests=requests)
    assert scores_of(world, "u") == expected


def test_a_folder_says_what_it_passes_over(world, tmp_path):
    root = ask(world, list_size=4)
    folder = tmp_path / "results"
    folder.mkdir()
    put(folder / "a.jsonl", answered(root))
    (folder / "a.log").write_text("done")
    (folder / "b.JSONL.gz").write_bytes(gzip.compress(b""))
    (folder / "manifest.json").write_text("{}")
    _, told = gather(world, folder, root)
    assert "0 quarantined" in told
    assert "passed over 5 files: a.log, index-00000.arrow (not .jsonl, .ndjson, .json" in told
    assert "requests-00000.jsonl (requests)" in told
    assert "manifest.json, requests.json (a manifest)" in told


def test_samples_of_a_request_are_averaged(world, tmp_path):
    root = ask(world, list_size=4)
    lines = []
    for line in answered(root):
        row = json.loads(line)
        body = row["response"].get("body", row["response"])
        content = json.loads(body["choices"][0]["message"]["content"])
        flipped = json.dumps({label: round(1 - score, 2) for label, score in content.items()})
        body["choices"] += [{"message": {"content": flipped}}, {"message": {"content": flipped}}]
        lines.append(json.dumps(row))
    gather(world, put(tmp_path / "plain.jsonl", answered(root)), name="p", requests=root)
    _, told = gather(world, put(tmp_path / "a.jsonl", lines))
    assert f"{3 * len(lines)} accepted" in told
    one = scores_of(world, "p")
    expected = {pair: (score + 2 * (1 - score)) / 3 for pair, score in one.items()}
    assert scores_of(world) == pytest.approx(expected, abs=1e-6)
    _, told = gather(world, tmp_path / "a.jsonl")
    assert f"0 accepted, {3 * len(lines)} repeated" in told


# --- what people are told ----------------------------------------------------------------------


def test_a_message_that_most_results_share_is_printed_once_with_what_to_do(world, tmp_path):
    lines = answered(ask(world, list_size=4))
    failed = [
        json.dumps({"custom_id": json.loads(line)["custom_id"], "error": "quota"})
        for line in lines[2:]
    ]
    _, told = gather(world, put(tmp_path / "a.jsonl", [*lines[:2], *failed]))
    assert told.count("quota") == 1
    assert "error (quota): mend what the service complains about, then ask again" in told


def test_answers_on_another_scale_stop_the_run_and_name_the_flag(world, tmp_path):
    root = ask(world, list_size=4)
    hundred, small = [], []
    for line in answered(root):
        row = json.loads(line)
        body = row["response"].get("body", row["response"])
        message = body["choices"][0]["message"]
        scores = json.loads(message["content"])
        message["content"] = json.dumps({a: round(100 * s) for a, s in scores.items()})
        hundred.append(json.dumps(row))
        message["content"] = json.dumps({a: round(9 * s) for a, s in scores.items()})
        small.append(json.dumps(row))
    path = put(tmp_path / "a.jsonl", hundred)
    with pytest.raises(InputError, match=r"not on the scale --score_range=0,1 .*LOWEST,HIGHEST"):
        gather(world, path)
    gather(world, path, score_range=(0, 100))
    gather(world, put(tmp_path / "p.jsonl", answered(root)), name="p", requests=root)
    assert scores_of(world) == pytest.approx(scores_of(world, "p"), abs=0.005)
    path = put(tmp_path / "s.jsonl", small)
    with pytest.raises(InputError, match=r"at the lowest end of --score_range=0,100"):
        gather(world, path, name="s", requests=root, score_range=(0, 100))
