"""Records of result files: every service's shape is read, and nothing crashes the reader."""

from __future__ import annotations

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from teacher.collect.reading import SHAPES, fast, read_one, result

from slgr_jax.config import PROMPTS
from slgr_jax.teacher.collect import envelopes, results
from slgr_jax.teacher.collect.completions import Completion
from slgr_jax.teacher.collect.refusals import Refused
from slgr_jax.teacher.collect.results import Answer
from slgr_jax.teacher.collect.shown import Shown


@pytest.mark.parametrize("shape", SHAPES)
def test_both_shapes_of_a_response_are_read(shape):
    usage = {"prompt_tokens": 31, "completion_tokens": 4}
    told = read_one(result("B", shape=shape, usage=usage))
    assert told == Completion("r0", "B", [], False, 31, 4)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("", "not JSON"),
        ('{"custom_id": "a", "respo', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("7", "not an object"),
        ('{"response": {}}', "no custom_id"),
        ('{"custom_id": 7, "response": {}}', "no custom_id"),
        ('{"custom_id": "a", "method": "POST", "body": {}}', "no response"),
        ('{"custom_id": "a", "response": null, "error": {"message": "too long"}}', "error"),
        ('{"custom_id": "a", "response": {"status_code": 400, "body": {"error": "x"}}}', "error"),
        ('{"custom_id": "a", "response": {"body": {"choices": []}}}', "no choices"),
        ('{"custom_id": "a", "response": {"choices": [{"message": {}}]}}', "no text"),
        ('{"custom_id": "a", "response": {"choices": [{"text": " "}]}}', "empty answer"),
        (
            '{"custom_id": "a", "response": {"choices": [{"message": {"content": null, '
            '"refusal": "I cannot"}}]}}',
            "refusal",
        ),
    ],
)
def test_a_line_without_an_answer_is_refused_with_the_reason(line, kind):
    assert read_one(line).kind == kind


def test_a_byte_order_mark_is_no_part_of_a_line():
    assert read_one(b"\xef\xbb\xbf" + result("B").encode()).text == "B"


def test_a_line_that_is_not_utf8_is_refused():
    assert read_one(b'{"custom_id": "\xff"}').kind == "not JSON"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = ("custom_id", "response", "error", "body", "choices", "message", "content", "logprobs",
        "status_code", "usage", "text", "token", "logprob", "top_logprobs", "tokens")  # fmt: skip
wild_objects = st.recursive(
    json_values,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)


@fast
@hypothesis.given(st.binary(max_size=60) | wild_objects.map(lambda v: json.dumps(v).encode()))
def test_no_line_crashes_the_reader(line):
    told = envelopes.read_line(line)
    assert told
    assert all(isinstance(choice, Completion | Refused) for choice in told)


@fast
@hypothesis.given(wild_objects, st.sampled_from(KEYS[3:]))
def test_no_response_crashes_the_reader(value, key):
    choice = {"message": {"content": "A"}, "logprobs": value, "finish_reason": value}
    for response in (value, {key: value}, {"choices": [value]}, {"choices": [choice]}):
        line = json.dumps({"custom_id": "a", "response": response}).encode()
        for told in envelopes.read_line(line):
            if isinstance(told, Completion):
                assert isinstance(results.parse("pairwise", told, Shown(2)), Answer | Refused)
            else:
                assert isinstance(told, Refused)


answers = st.text(max_size=80) | st.text(
    alphabet=st.sampled_from('ABCIab019.,:;>[]{}()"-*#\n \\`%eyYnNo'), max_size=80
)


@fast
@hypothesis.given(answers, st.sampled_from(PROMPTS), st.integers(1, 30), st.booleans())
def test_no_answer_crashes_the_parsers(text, form, shown, cut):
    shown = {"pairwise": 2, "pointwise": 1, "rating": 1}.get(form, shown)
    answer = results.parse(form, Completion("r", text, cut=cut), Shown(shown))
    assert isinstance(answer, Answer | Refused)
    if isinstance(answer, Answer):
        assert answer.scores.dtype == np.float32
        if form == "free_list":
            assert all(answer.titles)
            assert answer.titles
            return
        assert answer.scores.size == (1 if form == "pairwise" else shown)
        given = answer.scores[~np.isnan(answer.scores)]
        assert given.size
        assert ((given >= 0) & (given <= 1)).all()
