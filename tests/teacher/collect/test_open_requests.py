"""Which requests are open, and why; and that a whole answer closes them."""

from __future__ import annotations

import hashlib
import json

import pytest
from teacher.collect.asked_world import answered, ask, gather, put, scores_of

from slgr_jax.errors import ManifestError, ShardError
from slgr_jax.teacher.collect import answer_log, quarantine
from slgr_jax.teacher.collect.open_requests import open_requests


def choice_of(result):
    """The only choice of a result, to be changed in place."""
    body = result["response"].get("body", result["response"])
    return body["choices"][0]


def damaged(lines):
    """`lines` with the first cut off, the second refused, the third failed and no fourth."""
    first, second, third = (json.loads(line) for line in lines[:3])
    content = choice_of(first)["message"]["content"]
    choice_of(first)["message"]["content"] = content[: len(content) // 2]
    choice_of(first)["finish_reason"] = "length"
    choice_of(second)["message"]["content"] = "I cannot."
    third |= {"response": None, "error": {"message": "quota exceeded"}}
    return [*map(json.dumps, (first, second, third)), *lines[4:]]


def ids(lines):
    return [json.loads(line)["custom_id"] for line in lines]


def test_without_a_log_every_request_is_missing(world):
    root = ask(world, list_size=4)
    still_open = open_requests(world, "t")
    assert [request.custom_id for request in still_open] == ids(answered(root))
    assert {request.state for request in still_open} == {"missing"}


def test_cut_refused_failed_and_missing_requests_stay_open_until_a_whole_answer(world, tmp_path):
    lines = answered(ask(world, list_size=4))
    manifest, told = gather(world, put(tmp_path / "a.jsonl", damaged(lines)))
    still_open = open_requests(world, "t")
    assert [(request.custom_id, request.state) for request in still_open] == list(
        zip(ids(lines)[:4], ("cut", "refused", "failed", "missing"), strict=True)
    )
    assert still_open[2].reason == "error: quota exceeded"
    rest = {"complete": len(lines) - 4, "cut": 1, "refused": 1, "failed": 1, "missing": 1}
    assert {state: manifest.counts[f"{state}_requests"] for state in rest} == rest
    assert f"{len(lines) - 4} of {len(lines)} requests are complete" in told
    assert "open: 1 cut, 1 refused, 1 failed, 1 missing" in told

    _, told = gather(world, put(tmp_path / "b.jsonl", lines[:4]))
    assert "3 accepted, 1 in place of cut ones, 0 repeated, 0 quarantined" in told
    assert open_requests(world, "t") == []
    retried = scores_of(world)
    gather(world, tmp_path / "a.jsonl", tmp_path / "b.jsonl")  # the cut one again changes nothing
    assert scores_of(world) == retried
    gather(world, put(tmp_path / "c.jsonl", lines), name="u", requests=tmp_path / "data/requests/t")
    assert scores_of(world, "u") == retried


def test_a_damaged_log_is_named(world, tmp_path):
    lines = answered(ask(world, list_size=4))
    gather(world, put(tmp_path / "a.jsonl", damaged(lines)))
    root = answer_log.log_path(world.path, "t")
    data = (root / quarantine.QUARANTINE).read_bytes()
    (root / quarantine.QUARANTINE).write_bytes(data.replace(b"quota", b"quote"))
    with pytest.raises(ShardError, match=r"quarantine\.jsonl is damaged .* run slgr teach collect"):
        open_requests(world, "t")
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fake"', '"Fake"'))
    with pytest.raises(
        ManifestError, match=r"manifest\.json is damaged .*SHA-256 .* over all results"
    ):
        open_requests(world, "t")


def test_a_log_of_the_first_version_is_read(world, tmp_path):
    """Its checksum was of itself too, empty; what it holds was paid for."""
    lines = answered(ask(world, list_size=4))
    gather(world, put(tmp_path / "a.jsonl", lines))
    path = answer_log.log_path(world.path, "t") / "manifest.json"
    first = json.loads(path.read_text()) | {"checksum": ""}
    first["checksum"] = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    manifest = answer_log.read_manifest(world, "t")
    path.write_text(json.dumps(first))
    assert answer_log.read_manifest(world, "t") == manifest
