"""The parsers: no input crashes them, and a valid answer is read exactly, whatever its dress."""

from __future__ import annotations

import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from slgr_jax.config import PROMPTS
from slgr_jax.teacher.ask.prompts import label
from slgr_jax.teacher.collect import results
from slgr_jax.teacher.collect.results import Answer, Completion, Refused

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


def read(content, form, shown=2, **facts):
    """The answer's scores, or the kind of its refusal."""
    told = results.read_line(result(content, **facts).encode())
    found = told if isinstance(told, Refused) else results.parse(form, told, shown)
    return found.kind if isinstance(found, Refused) else found.scores.tolist()


def approx(values):
    return pytest.approx(values, abs=1e-6, nan_ok=True)


# --- lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_both_shapes_of_a_response_are_read(shape):
    usage = {"prompt_tokens": 31, "completion_tokens": 4}
    told = results.read_line(result("B", shape=shape, usage=usage).encode())
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
    assert results.read_line(line.encode()).kind == kind


def test_a_byte_order_mark_is_no_part_of_a_line():
    assert results.read_line(b"\xef\xbb\xbf" + result("B").encode()).text == "B"


def test_a_line_that_is_not_utf8_is_refused():
    assert results.read_line(b'{"custom_id": "\xff"}').kind == "not JSON"


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
    found = results.read_line(line)
    assert isinstance(found, Completion | Refused)


@fast
@hypothesis.given(wild_objects, st.sampled_from(KEYS[3:]))
def test_no_response_crashes_the_reader(value, key):
    choice = {"message": {"content": "A"}, "logprobs": value, "finish_reason": value}
    for response in (value, {key: value}, {"choices": [value]}, {"choices": [choice]}):
        line = json.dumps({"custom_id": "a", "response": response}).encode()
        found = results.read_line(line)
        assert isinstance(found, Completion | Refused)
        if isinstance(found, Completion):
            assert isinstance(results.parse("pairwise", found, 2), Answer | Refused)


answers = st.text(max_size=80) | st.text(
    alphabet=st.sampled_from('ABCIab019.,:;>[]{}()"-*#\n \\`%eyYnNo'), max_size=80
)


@fast
@hypothesis.given(answers, st.sampled_from(PROMPTS), st.integers(1, 30), st.booleans())
def test_no_answer_crashes_the_parsers(text, form, shown, cut):
    shown = {"pairwise": 2, "pointwise": 1, "rating": 1}.get(form, shown)
    found = results.parse(form, Completion("r", text, [], cut, None, None), shown)
    assert isinstance(found, Answer | Refused)
    if isinstance(found, Answer):
        assert found.scores.dtype == np.float32
        assert found.scores.size == (1 if form == "pairwise" else shown)
        given = found.scores[~np.isnan(found.scores)]
        assert given.size
        assert ((given >= 0) & (given <= 1)).all()


# --- lists -------------------------------------------------------------------------------------

TITLES = ("Alien", "Plan B", "I, Robot", "2001: A Space Odyssey", "Se7en > Eight", "M", "A")


def _fenced(text):
    return f"Here are the scores:\n```json\n{text}\n```\nLet me know if you need more."


def _dresses(scores):
    """One answer in the dresses that LLMs give it."""
    pairs = [(label(k), s) for k, s in enumerate(scores)]
    title = [TITLES[k % len(TITLES)] for k in range(len(pairs))]
    plain = json.dumps(dict(pairs))
    yield plain
    yield json.dumps(dict(pairs), indent=2)
    yield json.dumps(dict(reversed(pairs)))
    yield _fenced(plain)
    yield f"Sure! Based on [the history], {{as asked}}: {plain} I hope this helps."
    yield f"<think>A is 0.99, maybe {{'B': 1}}</think>\n{plain}"
    yield f"the thought was opened by the prompt A: 0.1</think>{plain}"
    yield json.dumps({"scores": dict(pairs), "reason": "A: 0.99 would be too much"})
    yield json.dumps({a: str(s) for a, s in pairs})
    yield json.dumps({f"[{a}]": s for a, s in pairs})
    yield json.dumps({f"{a}. {t}": s for (a, s), t in zip(pairs, title, strict=True)})
    yield json.dumps({a: {"score": s, "reason": "why"} for a, s in pairs})
    yield json.dumps([{"label": a, "score": s} for a, s in pairs])
    yield json.dumps({"results": [{"item": a, "title": "Alien", "score": s} for a, s in pairs]})
    yield json.dumps([[a, s] for a, s in pairs])
    yield "\n".join(f"{a}: {s}" for a, s in pairs)
    yield "\n".join(f"- **{a}**: {s}" for a, s in pairs)
    yield ", ".join(f"{a} = {s}" for a, s in pairs)
    yield "\n".join(f"{a}. {t}: {s}" for (a, s), t in zip(pairs, title, strict=True))
    yield "\n".join(f"- **{a}.** {t} - {s}" for (a, s), t in zip(pairs, title, strict=True))
    rows = zip(pairs, title, range(1900, 2000), strict=False)
    yield json.dumps([{"name": t, "item": a, "year": y, "score": s} for (a, s), t, y in rows])
    yield "{" + ", ".join(f"'{a}': {s}" for a, s in pairs) + "}"  # Python's dict


hundredths = st.lists(st.integers(0, 100), min_size=2, max_size=30).map(
    lambda values: [value / 100 for value in values]
)


@fast
@hypothesis.given(hundredths, st.sampled_from(SHAPES))
def test_scores_are_read_exactly_in_every_dress(scores, shape):
    for text in _dresses(scores):
        assert read(text, "listwise", len(scores), shape=shape) == approx(scores), text


def _ranked(order):
    """One order in the dresses that LLMs give it."""
    names = [label(k) for k in order]
    title = [TITLES[k % 4] for k in order]
    yield " > ".join(names)
    yield ">".join(names)
    yield "Ranking: " + " > ".join(names) + "."
    yield "I ranked them like this:\n\n" + " > ".join(f"[{a}]" for a in names) + "\n\nEnjoy!"
    yield " >\n".join(names)
    yield json.dumps(names)
    yield _fenced(json.dumps({"ranking": names}))
    yield json.dumps({"ranking": " > ".join(names)})
    yield "\n".join(f"{k}. {a}" for k, a in enumerate(names, 1))
    yield "My ranking:\n" + "\n".join(
        f"{k}. {a}. {t}" for k, (a, t) in enumerate(zip(names, title, strict=True), 1)
    )
    yield "\n".join(f"{k}) {a} - {t}" for k, (a, t) in enumerate(zip(names, title, strict=True), 1))
    yield "\n".join(names)
    yield ", ".join(names)
    yield json.dumps([{"label": a, "rank": k} for k, a in enumerate(names, 1)])


@fast
@hypothesis.given(st.integers(2, 28).flatmap(lambda n: st.permutations(range(n))))
def test_orders_are_read_exactly_in_every_dress(order):
    expected = np.empty(len(order))
    expected[list(order)] = 1 - np.arange(len(order)) / (len(order) - 1)
    for text in _ranked(order):
        assert read(text, "ranking", len(order)) == approx(expected), text
    told = json.dumps({label(place): k for k, place in enumerate(order, 1)})
    assert read(told, "ranking", len(order)) == approx(expected)


def test_a_score_outside_the_range_is_clipped():
    told = Completion("r", '{"A": 7, "B": -3, "C": 5, "D": 2.5}', [], False, None, None)
    found = results.parse("listwise", told, 4, (0, 5))
    assert found.scores.tolist() == [1, 0, 1, 0.5]


def test_what_an_answer_leaves_out_has_no_score():
    nan = math.nan
    assert read('{"A": 0.5, "C": 1}', "listwise", 3) == approx([0.5, nan, 1])
    assert read('{"A": null, "B": true, "C": 1}', "listwise", 3) == approx([nan, nan, 1])
    assert read('{"A": NaN, "B": 1e999, "C": 0.5}', "listwise", 3) == approx([nan, nan, 0.5])
    assert read('{"A": 0.5, "Z": 0.1}', "listwise", 2) == approx([0.5, nan])
    assert read("B > A", "ranking", 4) == approx([2 / 3, 1, nan, nan])


def test_a_label_with_two_scores_has_none():
    assert read('{"A": 0.5, "B": 0.1, "A": 0.7}', "listwise") == approx([math.nan, 0.1])
    assert read('{"A": 0.5, "B": 0.1, "A": 0.5}', "listwise") == approx([0.5, 0.1])


def test_the_answer_comes_after_an_example():
    text = 'In the form {"A": 0.35, "B": 0.8}: {"A": 0.5, "B": 0.25}'
    assert read(text, "listwise") == approx([0.5, 0.25])


def test_an_answer_that_was_cut_off_keeps_its_whole_scores():
    cut = '{"A": 0.25, "B": 0.5, "C": 0.'
    assert read(cut + "7", "listwise", 3) == approx([0.25, 0.5, math.nan])
    assert read("A: 0.25\nB: 0.5", "listwise") == approx([0.25, 0.5])
    assert read("A: 0.25\nB: 0.5", "listwise", finish="length") == approx([0.25, math.nan])


@pytest.mark.parametrize(
    "text",
    [
        *("I cannot do that.", "[0.5, 0.2]", "{}", "A", "A: 1st, B: 80%", "Alien > Heat", "null"),
        # Answers by title, some of which look like a label.
        '{"A": 0.5, "Alien": 0.2, "Heat": 0.7}',
        '[{"title": "A", "score": 1}, {"title": "Up", "score": 0}, {"title": "Heat", "score": 0}]',
        "Alien: 0.2\nPlan A: 0.3\nHeat: 0.5",
    ],
)
def test_a_list_without_scores_by_label_is_refused(text):
    assert read(text, "listwise") == "no scores by label"


# --- one of two, yes or no, 1 to 5 -------------------------------------------------------------

CHOICES = (
    "{}", "{}.", " {}\n", "({})", "**{}**", "`{}`", "Answer: {}", "The answer is {}.", "{}. Alien",
    "Option {}", '{{"answer": "{}"}}', "```json\n{{\"choice\": \"{}\"}}\n```", "\\boxed{{{}}}",
    "I would choose {} because A person like this enjoys it.", "A tough call.\n\n{}",
    "<think>A? B?</think>{}", "My pick: **{}**, it fits.",
)  # fmt: skip


@pytest.mark.parametrize("dress", CHOICES)
def test_a_choice_is_read_in_every_dress(dress):
    assert read(dress.format("A"), "pairwise") == [1]
    assert read(dress.format("B"), "pairwise") == [0]


@pytest.mark.parametrize("text", ["A or B", "neither", "A person who likes films", "A\nB", "C"])
def test_no_choice_or_two_are_refused(text):
    assert read(text, "pairwise") == "no single choice"


@pytest.mark.parametrize(
    ("text", "score"),
    [("Yes", 1), ("no.", 0), ("Yes, there is no doubt", 1), ("**No**", 0), ('{"answer":"yes"}', 1)],
)
def test_yes_and_no(text, score):
    assert read(text, "pointwise", 1) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [("4", 0.75), ("Rating: 1", 0), ("5/5", 1), ("3 out of 5.", 0.5), ('{"rating": 2}', 0.25)],
)
def test_ratings(text, score):
    assert read(text, "rating", 1) == [score]


def test_words_that_are_none_of_the_answers_are_refused():
    assert read("perhaps", "pointwise", 1) == "neither yes nor no"
    for text in ("6", "4.5", "between 3 and 4", "12"):
        assert read(text, "rating", 1) == "no rating from 1 to 5"


def chat(*tokens):
    """`logprobs` of a chat completion: (chosen, {token: log-probability}) per place."""
    content = [
        {
            "token": token,
            "logprob": tops.get(token, -9.0),
            "top_logprobs": [{"token": t, "logprob": x} for t, x in tops.items()],
        }
        for token, tops in tokens
    ]
    return {"content": content}


def test_a_choice_is_the_softmax_of_the_two_labels():
    tops = {"A": math.log(0.6), " B": math.log(0.2), "C": math.log(0.1)}
    assert read("A", "pairwise", logprobs=chat(("A", tops))) == approx([0.75])
    assert read("(A)", "pairwise", logprobs=chat(("(", {"(": -0.01}), ("A", tops))) == approx(
        [0.75]
    )
    old = {"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": [tops]}
    assert read("A", "pairwise", logprobs=old) == approx([0.75])
    assert read("A", "pairwise", logprobs=None) == [1]


def test_several_spellings_of_a_word_add_up():
    tops = {"Yes": math.log(0.3), " yes": math.log(0.3), "No": math.log(0.2)}
    assert read("Yes", "pointwise", 1, logprobs=chat(("Yes", tops))) == approx([0.75])


def test_a_label_that_is_not_listed_gets_the_most_it_can_have():
    listed = {"A": math.log(0.9), "x": math.log(0.04)}  # 0.06 is left, the smallest listed is .04
    assert read("A", "pairwise", logprobs=chat(("A", listed))) == approx([0.9 / 0.94])
    alone = {"A": math.log(0.9)}
    assert read("A", "pairwise", logprobs=chat(("A", alone))) == approx([0.9])


def test_a_rating_is_its_mean_under_the_probabilities():
    tops = {"5": math.log(0.5), "4": math.log(0.3), "3": math.log(0.2)}
    tops |= {"1": -60.0, "2": -60.0}
    expected = 0.5 * 1 + 0.3 * 0.75 + 0.2 * 0.5
    assert read("5", "rating", 1, logprobs=chat(("5", tops))) == approx([expected])


def test_probabilities_of_another_word_than_the_text_says_are_not_believed():
    tops = {"A": math.log(0.9), "B": math.log(0.1)}
    article = chat(("A", tops), (" person", {" person": 0.0}))
    assert read("A person would choose B.", "pairwise", logprobs=article) == [0]
