"""One of two, yes or no, 1 to 5: read in every dress, with the probabilities of the words."""

from __future__ import annotations

import math

import pytest
from teacher.collect.reading import approx, read

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
