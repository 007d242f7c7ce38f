"""Free lists as LLMs write them: the titles in order, or why none are read."""

from __future__ import annotations

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from slgr_jax.teacher.collect.readings import ListRefused
from slgr_jax.teacher.collect.title_answers import read_titles
from slgr_jax.teacher.products.titles import clean


def read(text, *, asked=2, cut=False):
    """The titles without their dress, or the kind of refusal."""
    told = read_titles(text, asked, cut=cut)
    return told.kind if isinstance(told, ListRefused) else [clean(title) for title in told[0]]


@pytest.mark.parametrize(
    "text",
    [
        '{"titles": ["Heat (1995)", "Ran"]}',
        '```json\n{"titles": ["Heat (1995)", "Ran"]}\n```\nEnjoy!',
        '["Heat (1995)", "Ran"]',
        '[{"title": "Heat", "year": 1995, "reason": "x"}, {"title": "Ran"}]',
        '{"movies": [{"rank": 2, "name": "Ran"}, {"rank": 1, "name": "Heat (1995)"}]}',
        '{"title": "Heat (1995)"}\n{"title": "Ran"}',
        '{"1": "Heat (1995)", "2": "Ran"}',
        '{"reasoning": ["Jaws"], "draft": ["Ran"], "final": {"titles": ["Heat (1995)", "Ran"]}}',
        'Draft: {"titles": ["Ran"]}\nFinal answer: {"titles": ["Heat (1995)", "Ran"]}',
        "1. Heat (1995)\n2. Ran",
        "Here are two:\n\n1) **Heat** (1995) - a thief\n2) \"Ran\": a war\n\nEnjoy!",
        "**1. Heat (1995)**\n   - a thief\n**2. Ran**\n   - a war",
        "- Heat (1995)\n  - a thief\n- Ran",
        "* **Heat (1995):** a thief\n* *Ran*",
        "Draft:\n1. Ran\n2. Jaws\n\nFinal list:\n1. Heat (1995)\n2. Ran",
        "1. Ran\n2. Heat (1995)\n\nOn reflection, the other way round.\n1. Heat (1995)\n2. Ran",
    ],
)  # fmt: skip
def test_lists_are_read(text):
    assert read(text) == ["Heat (1995)", "Ran"]


def test_bare_lines_and_titles_that_look_like_more():
    assert read("My picks:\nHeat\nRan\nJaws") == ["Heat", "Ran", "Jaws"]
    odd = ["Wait Until Dark", "Final Destination", "Instead", "1984", "300: Rise of an Empire"]
    assert read("\n".join(f"{k}. {title}" for k, title in enumerate(odd, 1))) == odd
    assert read("\n".join(f"- {title}" for title in odd)) == odd
    assert read('{"titles": [1984, "Ran", null]}') == ["1984", "Ran"]
    assert read('{"titles": ["\\ud800 Ran"]}') == ["? Ran"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "no titles"),
        ("I cannot say.", "no titles"),
        ('{"titles": []}', "no titles"),
        ('{"reasoning": ["Heat", "Ran"]}', "no titles"),
        ("1. Heat\n2. Ran\n\n1. Ran\n2. Heat", "two readings"),
        ('{"titles": ["Heat"]}\nor rather\n{"titles": ["Ran"]}', "two readings"),
        ("1. Heat\n2. Ran\n\nHmm, no.", "only a draft"),
        ("From least to most likely:\n1. Heat\n2. Ran", "direction in doubt"),
    ],
)
def test_what_is_no_list_is_refused(text, kind):
    assert read(text) == kind


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ('{"titles": ["Heat", "Ran", "The Th', ["Heat", "Ran"]),
        ('{"titles": ["Heat", "Ran"', ["Heat", "Ran"]),
        ('{"draft": ["Jaws"], "titles": ["Heat", "Ran", "J', ["Heat", "Ran"]),
        ("1. Heat\n2. Ran\n3. The Th", ["Heat", "Ran"]),
        ('{"titles": ["He', "cut off"),
        ("1. He", "cut off"),
        ('{"reasoning": ["Jaws", "Hea', "cut off"),
    ],
)
def test_what_was_cut_off_keeps_its_whole_titles(text, titles):
    assert read(text, cut=True) == titles
    if isinstance(titles, list):
        assert read_titles(text, 3, cut=True)[1]  # open: it is asked again with more tokens
        assert not read_titles(text, 2, cut=True)[1]  # as many as were asked for


# Titles of any script, and words that mark drafts and corrections in prose.
WORDS = st.sampled_from(["Heat", "Wait", "Final", "Draft", "Ran", "电影", "Don't", "2", "Actually"])
TITLES = st.lists(
    st.lists(WORDS, min_size=1, max_size=3).map(" ".join), min_size=2, max_size=9, unique=True
)
DRESSES = {
    "json": lambda titles: json.dumps({"titles": titles}),
    "rows": lambda titles: json.dumps([{"title": title, "score": 0.5} for title in titles]),
    "numbers": lambda titles: "\n".join(f"{k}. {title}" for k, title in enumerate(titles, 1)),
    "bold": lambda titles: "\n".join(f"{k}. **{title}**" for k, title in enumerate(titles, 1)),
    "bullets": lambda titles: "Sure:\n\n" + "\n".join(f"* {title}" for title in titles),
    "quotes": lambda titles: "\n".join(f'- "{title}" - it fits' for title in titles),
}


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(TITLES, st.sampled_from(sorted(DRESSES)))
def test_any_titles_in_any_dress_are_read_in_order(titles, dress):
    assert read(DRESSES[dress](titles), asked=len(titles)) == titles


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(TITLES, st.sampled_from(sorted(DRESSES)), st.data())
def test_a_cut_list_is_a_beginning_of_it_or_refused(titles, dress, data):
    text = DRESSES[dress](titles)
    text = text[: data.draw(st.integers(0, len(text) - 1))]
    told = read(text, asked=len(titles), cut=True)
    assert isinstance(told, str) or told == titles[: len(told)], text
