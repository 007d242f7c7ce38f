"""Result lines, and what is read out of them."""

from __future__ import annotations

import json

import hypothesis
import pytest

from slgr_jax.teacher.collect import envelopes, results
from slgr_jax.teacher.collect.refusals import KINDS, Refused
from slgr_jax.teacher.collect.shown import Shown

fast = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = ("body", "bare")


def result(content, *, custom_id="r0", shape="body", logprobs=None, finish="stop", usage=None):
    """One result line, as a service or as vLLM's chat sample writes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    completion = {"choices": [choice | {"finish_reason": finish, "logprobs": logprobs}]}
    if usage:
        completion["usage"] = usage
    body = {"status_code": 200, "request_id": "q", "body": completion}
    response = body if shape == "body" else completion
    return json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": None})


def read_one(line):
    """The only completion or refusal of a line."""
    (told,) = envelopes.read_line(line if isinstance(line, bytes) else line.encode())
    return told


def parse(content, form, shown=2, *, titles=(), score_range=(0.0, 1.0), **facts):
    """The answer or refusal for one content of a chat completion."""
    told = read_one(result(content, **facts))
    if isinstance(told, Refused):
        return told
    answer = results.parse(form, told, Shown(shown, [(title,) for title in titles]), score_range)
    assert not isinstance(answer, Refused) or answer.kind in KINDS
    return answer


def read(content, form, shown=2, **facts):
    """The answer's scores, or the kind of its refusal."""
    answer = parse(content, form, shown, **facts)
    return answer.kind if isinstance(answer, Refused) else answer.scores.tolist()


def approx(values):
    return pytest.approx(values, abs=1e-6, nan_ok=True)
