"""Answers about a user or an item: what is read as its texts, and what is refused by name."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from slgr_jax.teacher.ask.text_prompts import ONE_TEXT
from slgr_jax.teacher.collect import prose_answers
from slgr_jax.teacher.collect.completions import Completion
from slgr_jax.teacher.collect.refusals import KINDS, Refused

FACTORS = ("genre", "lead actor", "mood")
LIKES = "Likes slow, dark crime films."
THREE = {"genre": "crime", "lead actor": "Al Pacino", "mood": "dark"}


def read(text, fields=ONE_TEXT, *, cut=False):
    answer = prose_answers.parse(Completion("c", text, cut=cut), fields)
    return answer.kind if isinstance(answer, Refused) else answer.texts


ONE = {
    "JSON": (json.dumps({"text": LIKES}), LIKES),
    "JSON in a fence": ("```json\n" + json.dumps({"text": LIKES}) + "\n```", LIKES),
    "JSON behind words": ("Here it is: " + json.dumps({"Text": f"  {LIKES}\n"}), LIKES),
    "a key of a template's own": (json.dumps({"profile": LIKES}), LIKES),
    "one inside": (json.dumps({"answer": {"text": LIKES}}), LIKES),
    "one in a list": (json.dumps([{"text": LIKES}]), LIKES),
    "a list of sentences": (json.dumps({"text": ["One.", "Two."]}), "One., Two."),
    "bare newlines in a string": ('{"text": "One.\nTwo."}', "One.\nTwo."),
    "the same twice": (json.dumps({"text": LIKES}) * 2, LIKES),
    "prose": (LIKES, LIKES),
    "prose in a fence": (f"```\n{LIKES}\n```", LIKES),
    "prose with a reference": ("Likes noir [1], and more [2, 3].",) * 2,
    "any script": (json.dumps({"text": "喜欢犯罪片"}), "喜欢犯罪片"),
    "half a surrogate pair": ('{"text": "a \\ud800 b"}', "a ? b"),
    "an item that begins as an apology does": (
        "Sorry We Missed You is a drama. I can not praise it enough.",
        "Sorry We Missed You is a drama. I can not praise it enough.",
    ),
    "a taste in the first person": ("I cannot get enough noir.", "I cannot get enough noir."),
}


@pytest.mark.parametrize("case", ONE)
def test_one_text_is_read(case):
    answer, text = ONE[case]
    assert read(answer) == (text,)


SEVERAL = {
    "JSON": json.dumps(THREE),
    "another order and case": json.dumps({k.upper(): THREE[k] for k in reversed(THREE)}),
    "keys joined otherwise": json.dumps({k.replace(" ", "_"): v for k, v in THREE.items()}),
    "more keys": json.dumps(THREE | {"note": "nothing"}),
    "one inside": json.dumps({"preferences": THREE}),
    "lines": "Genre: crime\nLead actor: Al Pacino\nMood: dark",
    "a list in Markdown": "Sure:\n1. **Genre**: crime\n2. **Lead Actor:** Al Pacino\n- mood: dark",
    "lists": json.dumps({"genre": ["crime"], "lead actor": ["Al Pacino"], "mood": "dark"}),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_a_text_a_factor_is_read(case):
    assert read(SEVERAL[case], FACTORS) == tuple(THREE.values())


def test_a_factor_of_several_lines_and_one_that_nothing_is_known_of():
    assert read("genre: crime\n  and noir\nlead actor:\nmood: dark: very", FACTORS) == (
        *("crime\n  and noir", "", "dark: very"),
    )
    for nothing in ("", None, "-", "..."):
        assert read(json.dumps(THREE | {"mood": nothing}), FACTORS) == ("crime", "Al Pacino", "")


REFUSED = {
    "empty": (json.dumps({"text": " "}), ONE_TEXT, "empty answer"),
    "the example again": ('{"text": "..."}', ONE_TEXT, "empty answer"),
    "no factor known": (json.dumps(dict.fromkeys(THREE, "")), FACTORS, "empty answer"),
    "declined": ("I'm sorry, but I can't help with that.", ONE_TEXT, "refusal"),
    "declined in JSON": (
        json.dumps({"text": "As an AI language model, I have no access to tastes."}),
        *(ONE_TEXT, "refusal"),
    ),
    "declined, of factors": ("Unfortunately, I cannot provide this.", FACTORS, "refusal"),
    "declined in a factor": (
        json.dumps(THREE | {"mood": "I am unable to determine this."}),
        *(FACTORS, "refusal"),
    ),
    "other keys": (json.dumps({"summary": "a", "reason": "b"}), ONE_TEXT, "no texts"),
    "broken JSON": ('{"text": "Likes', ONE_TEXT, "no texts"),
    "no text": (json.dumps({"text": {"a": {"b": {"c": {}}}}}), ONE_TEXT, "no texts"),
    "a factor left out": (json.dumps({"genre": "crime", "mood": "dark"}), FACTORS, "no texts"),
    "a line left out": ("genre: crime\nmood: dark", FACTORS, "no texts"),
    "prose for factors": (LIKES, FACTORS, "no texts"),
    "two lines of one factor": (
        "genre: crime\nlead actor: x\nmood: dark\ngenre: comedy",
        *(FACTORS, "no texts"),
    ),
    "two texts": ('{"text": "One."} {"text": "Two."}', ONE_TEXT, "two readings"),
    "a key twice": ('{"text": "One.", "text": "Two."}', ONE_TEXT, "two readings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named(case):
    text, fields, kind = REFUSED[case]
    assert read(text, fields) == kind


def test_a_text_that_was_cut_off_is_none():
    assert read(LIKES, cut=True) == "cut off"
    assert read(json.dumps(THREE), FACTORS, cut=True) == "cut off"


@hypothesis.given(
    st.one_of(
        st.text(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from([*FACTORS, "text", "x"]), inner, max_size=4)
            ),
            max_leaves=8,
        ).map(json.dumps),
    ),
    st.sampled_from([ONE_TEXT, FACTORS]),
    st.booleans(),
)
def test_whatever_comes_is_a_text_a_field_or_a_kind_that_is_known(text, fields, cut):
    told = read(text, fields, cut=cut)
    if isinstance(told, str):
        assert told in KINDS
        return
    assert len(told) == len(fields)
    assert any(told)
    assert all(part == part.strip() and part.encode() is not None for part in told)
