"""Answers about a list: read exactly in every dress, or refused."""

from __future__ import annotations

import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from teacher.collect.reading import SHAPES, approx, fast, parse, read

from slgr_jax.teacher.ask.prompts import label

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
        shown = [TITLES[k % len(TITLES)] for k in range(len(scores))]
        assert read(text, "listwise", len(scores), titles=shown, shape=shape) == approx(scores), (
            text
        )


def _ranked(order):
    """One order in the dresses that LLMs give it."""
    names = [label(k) for k in order]
    title = [TITLES[k % 4] for k in order]  # of the candidate, not of the place
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
        shown = [TITLES[k % 4] for k in range(len(order))]
        assert read(text, "ranking", len(order), titles=shown) == approx(expected), text
    told = json.dumps({label(place): k for k, place in enumerate(order, 1)})
    assert read(told, "ranking", len(order)) == approx(expected)


def test_scores_outside_the_range_are_refused_and_name_it():
    assert read('{"A": 4, "B": 3, "C": 5, "D": 2.5}', "listwise", 4, score_range=(0, 5)) == [
        approx(0.8), approx(0.6), 1, 0.5
    ]  # fmt: skip
    answer = parse('{"A": 7, "B": 3}', "listwise", score_range=(0, 5))
    assert (answer.kind, answer.detail) == ("outside the score range", "A: 7 is not in 0 to 5")


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
        *("I cannot do that.", "[0.5, 0.2]", "{}", "A", "Alien > Heat", "null"),
        # Answers by title, some of which look like a label.
        '{"A": 0.5, "Alien": 0.2, "Heat": 0.7}',
        '[{"title": "A", "score": 1}, {"title": "Up", "score": 0}, {"title": "Heat", "score": 0}]',
        "Alien: 0.2\nPlan A: 0.3\nHeat: 0.5",
    ],
)
def test_a_list_without_scores_by_label_is_refused(text):
    assert read(text, "listwise") in ("no scores by label", "none of the labels")


WORDS = (
    ("A: very high\nB: low\nC: medium", [1, 0.25, 0.5]),
    ("A - Excellent match\nB - Poor\nC - Good", [1, 0.25, 0.75]),
    ("A: ★★★★☆\nB: ★★☆☆☆\nC: ★★★★★", [0.8, 0.4, 1]),
    ("A: 4 stars\nB: 2.5 stars\nC: 5 stars", [0.8, 0.5, 1]),
    ("Candidate A has a score of 0.9\nCandidate B gets 0.4\nScore for C: 0.2", [0.9, 0.4, 0.2]),
    ("A: 0.9 > C: 0.5 > B: 0.1", [0.9, 0.1, 0.5]),
)


@pytest.mark.parametrize(("text", "scores"), WORDS)
def test_words_stars_and_sentences_are_scores_where_they_are_clear(text, scores):
    assert read(text, "listwise", 3) == approx(scores)


IN_DOUBT = (
    ("listwise", (0, 5), "A: 1\nB: 2\nC: 3", "scale in doubt"),  # places or scores
    ("listwise", (0, 100), "A: 0.4\nB: 0.8\nC: 1.0", "scale in doubt"),
    ("listwise", (1, 5), "A: 7/10\nB: 6/10\nC: 2/10", "scale in doubt"),
    ("listwise", (0, 1), "A: 1\nB: 90%\nC: 20%", "scale in doubt"),
    ("listwise", (0, 1), "A: 0.9\nB: 0.5\nC: 0.1 (lower is better)", "direction in doubt"),
    ("listwise", (0, 1), "A: 0.8\nB: 0.3\n\nA: 0.8\nB: 0.6", "two readings"),
    ("listwise", (0, 1), "A: 0.8\nB: 0.3\nC: 0.5\nActually swap A and B.", "only a draft"),
    ("listwise", (0, 1), "A 0.9 B 0.5 C 0.3", "numbers without a label"),
    ("ranking", (0, 1), "C > A = B", "no scores by label"),
    ("ranking", (0, 1), "C > A > B\n\nA > C > B", "two readings"),
    ("ranking", (0, 1), "From worst to best: C > A > B", "direction in doubt"),
    ("ranking", (0, 1), "1. A\n2. B (0.4)\n3. C", "scale in doubt"),
    ("ranking", (0, 1), '{"A": 9, "B": 3, "C": 5}', "scale in doubt"),
)


@pytest.mark.parametrize(("form", "score_range", "text", "kind"), IN_DOUBT)
def test_doubt_is_a_refusal(form, score_range, text, kind):
    assert read(text, form, 3, score_range=score_range) == kind


def test_a_label_with_the_title_of_another_candidate_is_refused():
    titles = ["Heat (1995)", "Jaws (1975)", "Alien (1979)"]
    renamed = "A. Alien (1979): 0.9\nB. Heat (1995): 0.5\nC. Jaws (1975): 0.1"
    assert read(renamed, "listwise", 3, titles=titles) == "label and title disagree"
    assert read("A. Heat (1995): 0.9\nB: 0.5", "listwise", 3, titles=titles)[:2] == approx(
        [0.9, 0.5]
    )
