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


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("No doubt about it: yes", 1),
        ("No doubt. Yes.", 1),
        ("Without question, no.", 0),
        ("I see no reason to think otherwise, so yes.", 1),
        ("Yes, they would. There is no better match.", 1),
        ("No, they would not say yes to this.", 0),
        ("Would they choose it? Yes or no? No.", 0),
        ("At first I thought yes. Final answer: no", 0),
        ("Yes. Wait, it is a musical: no.", 0),
        ('{"answer": "no", "reason": "yes would be too much"}', 0),
        ('{"would_choose": true}', 1),
        ("<answer>Yes</answer>", 1),
        ("Nope", "neither yes nor no"),
        ("Yes and no.", "neither yes nor no"),
        ("I would not say yes.", "neither yes nor no"),
        ("Yes. No.", "neither yes nor no"),
        ('{"not_interested": "yes"}', "neither yes nor no"),
        ("No doubt", "neither yes nor no"),
    ],
)
def test_yes_and_no_in_sentences(text, score):
    assert read(text, "pointwise", 1) == (score if isinstance(score, str) else [score])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("**4**", 0.75),
        ("4.0", 0.75),
        ("4 stars", 0.75),
        ("★★★★☆", 0.75),
        ("⭐⭐⭐", 0.5),
        ("four", 0.75),
        ("Four out of five.", 0.75),
        ("perfectly", 1),
        ("Not at all.", 0),
        ("On a scale of 1 to 5, I'd say 4.", 0.75),
        ("From 1 (not at all) to 5 (perfectly): 2", 0.25),
        ("4\nThey liked 3 films like it.", 0.75),
        ("2, Se7en 3 is not for them", 0.25),
        ("\\boxed{5}", 1),
        ("First guess: 2. Final rating: 4", 0.75),
        *((text, "no rating from 1 to 5") for text in (
            "5/10", "4/10", "3 out of 10", "80%", "On a scale from 1 to 10: 4", "3-4", "4 or 5",
            "4 of 7", "0.8", "-3", "★★★★★★", "1 of 3 films fits",
        )),
    ],
)  # fmt: skip
def test_ratings_on_the_scale_that_was_asked_for(text, score):
    expected = score if isinstance(score, str) else [score]
    assert read(text, "rating", 1, titles=["Se7en 3"]) == expected


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("B > A", 0),
        ("Heat (1995)", 1),
        ("up (2009)", 0),
        ("A. Heat (1995)", 1),
        ("I first thought A. Final answer: B", 0),
        ('{"choice": "B", "rejected": "A"}', 0),
        ('{"A": false, "B": true}', 0),
        ("They would not choose A, they would pick B.", 0),
        *((text, "no single choice") for text in (
            "A: 0.3, B: 0.7", "A: 0.3", '{"A": 0.3, "B": 0.7}', "A. Up (2009)", '{"rejected": "A"}',
            "They would choose B or A", "don't choose A", "A = B", "Heat",
        )),
    ],
)  # fmt: skip
def test_choices_in_sentences_titles_and_json(text, score):
    expected = score if isinstance(score, str) else [score]
    assert read(text, "pairwise", titles=["Heat (1995)", "Up (2009)"]) == expected


@pytest.mark.parametrize("form", ["pairwise", "pointwise", "rating"])
def test_a_sentence_that_was_cut_off_is_refused_and_a_word_is_not(form):
    word = {"pairwise": "B", "pointwise": "No", "rating": "1"}[form]
    shown = 2 if form == "pairwise" else 1
    assert read(word, form, shown, finish="length") == [0]
    assert read(f"Answer: {word}, or", form, shown, finish="length") == "cut off"


def test_the_tokens_of_a_thought_are_not_those_of_the_answer():
    thought, answer = {"A": math.log(0.9), "B": math.log(0.1)}, {"A": -2.0, "B": math.log(0.6)}
    told = chat(("<think>", {}), ("B", thought), ("</think>", {}), ("B", answer))
    share = math.exp(-2.0) / (math.exp(-2.0) + 0.6)
    assert read("<think>B</think>B", "pairwise", logprobs=told) == approx([share])
