"""Every reason why a result cannot be used says what was seen, and what to do that can be done."""

from __future__ import annotations

import dataclasses
import re

import pytest
from teacher.collect.reading import parse, read_one, result

from slgr_jax import config
from slgr_jax.cli.teach import COMMANDS
from slgr_jax.config.knobs import flag_name
from slgr_jax.teacher.collect.refusals import KINDS, Refused

TITLES = ("Heat (1995)", "Jaws (1975)", "Alien (1979)")
# Form, answer, kind, and what of the answer the refusal has to show.
ANSWERS = (
    ("ranking", '{"order": ["A", "B", "A"]}', "labels repeated or unknown", "A more than once, C"),
    ("ranking", "B > A > B", "labels repeated or unknown", "B more than once, C not at all"),
    ("ranking", "A, B, B", "labels repeated or unknown", "B more than once"),
    ("ranking", '{"order": ["A", "B", "E"]}', "labels repeated or unknown", "E where A to C were"),
    ("ranking", "A. Heat (1995)\nB. Jaws (1975)\nC. Alien (1979)", "the candidates again", "A. H"),
    ("ranking", "1. Heat\n2. Predator", "none of the labels", "A to C were shown; the answer beg"),
    ("ranking", "C > A = B", "no scores by label", "C > A = B"),
    ("ranking", "C > A > B\n\nA > C > B", "two readings", "C > A > B; and A > C > B"),
    ("ranking", "Draft: A > B > C", "only a draft", "the draft A > B > C"),
    (
        "ranking",
        "From worst to best: C > A > B",
        "direction in doubt",
        "'From worst' in 'From worst to best: C",
    ),
    ("ranking", '{"A": 9, "B": 3, "C": 5}', "scale in doubt", "3, 5, 9 are no places"),
    (
        "ranking",
        "A > B > C\nA: 0.1\nB: 0.5\nC: 0.7",
        "order against scores",
        "A > B > C; but A 0.1",
    ),
    ("free_list", "I cannot do that.", "no titles", "'I cannot do that.'"),
    ("listwise", "I cannot do that.", "none of the labels", "'I cannot do that.'"),
    ("listwise", "A is liked, and B is not.", "no scores by label", "'A is liked, and B is not.'"),
    ("listwise", "A 0.9 B 0.5", "numbers without a label", "'A 0.9 B 0.5'"),
    ("listwise", "A: 0.3 or 0.4\nB: 0.1 to 0.2", "numbers without a label", "'B: 0.1 to 0.2'"),
    ("listwise", "A. Jaws (1975): 0.9", "label and title disagree", "'A. Jaws (1975): 0.9'"),
    ("listwise", "A: 0.8\nB: 0.3\n\nA: 0.8\nB: 0.6", "two readings", "A 0.8, B 0.3; and B 0.6"),
    ("listwise", "A: 0.8\nB: 7\nC: 0.1", "outside the score range", "B: 7 is not in 0 to 1"),
    ("pairwise", "Both, A and B.", "no single choice", "Both, A and B."),
    ("pointwise", "Perhaps.", "neither yes nor no", "Perhaps."),
    ("rating", "7 of 10", "no rating from 1 to 5", "7 of 10"),
)
ENVELOPES = (
    (b'{"custom_id": "r0", "resp', "not JSON", 'begins \'{"custom_id"'),
    (b'["r0", 5]', "not an object", "list \"['r0', 5]\""),
    (b'{"id": "r0", "text": "A"}', "no custom_id", "keys id (str), text (str)"),
    (b'{"custom_id": "r0", "label": "A"}', "no response", "keys custom_id, label"),
    (b'{"custom_id": "r0", "error": {"message": "quota"}}', "error", "quota"),
    (b'{"custom_id": "r0", "response": {"says": "A"}}', "no choices", "keys says"),
    (result(None).encode(), "no text", "NoneType, stop"),
    (result("<think>hm", finish="length").encode(), "empty answer", "only thoughts, ended by leng"),
    (result(None, finish="content_filter").encode(), "refusal", "content_filter"),
)


@pytest.mark.parametrize(("form", "text", "kind", "seen"), ANSWERS)
def test_an_answer_that_cannot_be_read_is_shown(form, text, kind, seen):
    titles = TITLES[:2] if form == "pairwise" else TITLES[:1] if form == "rating" else TITLES
    refused = parse(text, form, len(titles), titles=titles)
    assert isinstance(refused, Refused)
    assert refused.kind == kind
    assert seen in refused.detail


@pytest.mark.parametrize(("line", "kind", "seen"), ENVELOPES)
def test_a_record_that_holds_no_answer_is_shown(line, kind, seen):
    refused = read_one(line)
    assert refused.kind == kind
    assert seen in refused.detail


@pytest.mark.parametrize("form", config.PROMPTS)
def test_an_answer_that_ended_before_it_said_anything_wants_more_tokens(form):
    refused = parse("The person of this history prefers", form, 2, finish="length")
    assert refused.kind == "cut off"
    assert "history prefers" in refused.detail


def test_advice_can_be_followed():
    flags = {
        flag_name(field)
        for section in config.TEACH_SECTIONS
        for field in dataclasses.fields(section)
    }
    values = {"structured": config.STRUCTURED, "prompt": config.PROMPTS}
    for kind, (_, advice) in KINDS.items():
        named = re.findall(r"--([a-z_]+)(?:=([a-z_]+))?", advice)
        for flag, value in named:
            assert flag in flags, kind
            assert not value or value in values.get(flag, (value,)), kind
        for command in re.findall(r"slgr teach (\w+)", advice):
            assert command in COMMANDS, kind


def test_every_kind_is_known_to_a_test():
    known = {kind for _, _, kind, _ in ANSWERS} | {kind for _, kind, _ in ENVELOPES}
    elsewhere = {"foreign custom_id", "another answer", "cut off", "none of the catalogue"}
    elsewhere |= {"no texts"}  # test_prose_answers.py
    assert known | elsewhere == set(KINDS)
