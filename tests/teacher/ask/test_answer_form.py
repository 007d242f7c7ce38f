"""The form of an answer: what a schema admits, and that its prompt and its reader agree with it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from slgr_jax.errors import ConfigError
from slgr_jax.teacher.ask import answer_form, prompts
from slgr_jax.teacher.collect import results
from slgr_jax.teacher.collect.shown import Shown

FORMS = ("listwise", "ranking", "pairwise", "pointwise", "rating", "free_list")
# Keywords that hosted services and open servers enforce; `uniqueItems` makes them refuse a request.
PORTABLE = {
    *("type", "properties", "required", "additionalProperties", "enum", "items", "description"),
    *("minimum", "maximum", "minItems", "maxItems"),
}


def admits(schema, value):
    """JSON Schema's meaning of the keywords in `PORTABLE`, written apart from the code."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
    }
    if not isinstance(value, kinds[schema["type"]]) or isinstance(value, bool):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        return False
    if schema["type"] == "array":
        sized = schema["minItems"] <= len(value) <= schema["maxItems"]
        return sized and all(admits(schema["items"], part) for part in value)
    if schema["type"] == "object":
        known = schema["properties"]
        if not set(schema["required"]) <= set(value) <= set(known):
            return False
        return all(admits(known[key], part) for key, part in value.items())
    return True


def test_a_list_of_scores_has_exactly_its_labels_within_the_range():
    schema = answer_form.answer_schema("listwise", 3, (1, 9))
    assert schema == {
        "type": "object",
        "properties": {
            name: {"type": "number", "minimum": 1, "maximum": 9} for name in ("A", "B", "C")
        },
        "required": ["A", "B", "C"],
        "additionalProperties": False,
    }
    assert admits(schema, {"A": 1, "B": 4.5, "C": 9})
    for wrong in ({"A": 1, "B": 2}, {"A": 1, "B": 2, "C": 10}, {"A": 1, "B": 2, "C": 3, "D": 4}):
        assert not admits(schema, wrong)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ("ranking", {"order": ["B", "A"]}, [{"order": ["B"]}, {"order": ["B", "C"]}, ["B", "A"]]),
        ("pairwise", {"choice": "B"}, [{"choice": "C"}, {"choice": "A or B"}, {}]),
        ("pointwise", {"answer": "No"}, [{"answer": "no idea"}, {"answer": True}]),
        ("rating", {"rating": 5}, [{"rating": 0}, {"rating": 6}, {"rating": 4.5}]),
    ],
)
def test_other_forms_admit_one_value(form, right, wrong):
    schema = answer_form.answer_schema(form, 2)
    assert admits(schema, right)
    assert not any(admits(schema, value) for value in wrong)


@pytest.mark.parametrize("form", FORMS)
def test_schemas_keep_to_what_services_enforce(form):
    def keywords(schema):
        yield from schema
        for part in (*schema.get("properties", {}).values(), schema.get("items")):
            if part is not None:
                yield from keywords(part)

    schema = answer_form.answer_schema(form, 2)
    assert set(keywords(schema)) <= PORTABLE
    # What strict mode demands of an object.
    assert schema["required"] == list(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("structured", ["json_schema", "json_object", "none"])
def test_the_example_in_a_prompt_is_of_the_form_and_is_read(form, structured):
    template = prompts.read_template(form, structured=structured)
    text = template.render(["x"], ["a", "b", "c"], labelled=True)
    sentence = text.splitlines()[-1]
    shown = 2 if form == "pairwise" else 3
    if structured == "none" and form != "listwise":
        assert "{" not in sentence
        return
    assert "JSON" in sentence
    example = sentence[sentence.index("{") : sentence.index("}") + 1]
    if form == "listwise":  # it shows two of its labels
        shown = 2
    assert admits(answer_form.answer_schema(form, shown), json.loads(example))


def test_every_answer_that_a_schema_admits_is_read_as_what_it_says():
    def read(form, value, shown, score_range=(0, 1)):
        completion = results.Completion("x", json.dumps(value), (), False, None, None)
        answer = results.parse(form, completion, Shown(shown), score_range)
        assert isinstance(answer, results.Answer), answer
        return answer.scores.tolist()

    scores = {"A": 2, "B": 7.5, "C": 10}
    assert read("listwise", scores, 3, (0, 10)) == pytest.approx([0.2, 0.75, 1.0])
    for order in itertools.permutations("ABC"):
        expected = [1 - order.index(name) / 2 for name in "ABC"]
        assert read("ranking", {"order": order}, 3) == pytest.approx(expected)
    assert [read("pairwise", {"choice": name}, 2) for name in "AB"] == [[1.0], [0.0]]
    assert [read("pointwise", {"answer": name}, 1) for name in ("Yes", "No")] == [[1.0], [0.0]]
    titles = {"titles": ["Heat (1995)", "1984"]}
    completion = results.Completion("x", json.dumps(titles))
    assert admits(answer_form.answer_schema("free_list", 2), titles)
    assert results.parse("free_list", completion, Shown(2)).titles == ("Heat (1995)", "1984")
    ratings = [read("rating", {"rating": digit}, 1)[0] for digit in range(1, 6)]
    assert ratings == np.linspace(0, 1, 5).tolist()


def test_the_range_of_scores_is_in_words_examples_and_hash():
    plain = prompts.read_template("listwise")
    wide = prompts.read_template("listwise", score_range=(0, 100))
    text = wide.render([], ["a", "b"], labelled=True)
    assert "a score from 0 (not at all) to 100 (perfectly)" in text
    assert '{"A": 35, "B": 80}' in text
    assert "from 0 (not at all) to 1 (perfectly)" in plain.render([], ["a"], labelled=True)
    assert plain.hash != wide.hash
    assert (
        prompts.read_template("rating").hash
        == prompts.read_template("rating", score_range=(0, 100)).hash
    )


def test_a_template_that_never_says_json_is_refused_for_json_objects(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("$history $candidates", encoding="utf-8")
    prompts.read_template("rating", str(path), structured="json_schema")
    with pytest.raises(ConfigError, match=r"never says JSON.*json_object; add \$answer"):
        prompts.read_template("rating", str(path), structured="json_object")
    path.write_text("$history $candidates $answer", encoding="utf-8")
    assert "JSON" in prompts.read_template("rating", str(path), structured="json_object").render(
        [], [], labelled=False
    )
