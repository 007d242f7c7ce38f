"""The form of an answer, as a request states it to a service: a JSON schema.

    listwise   {"A": 0.35, "B": 0.8}      every label, a number in the range of scores
    ranking    {"order": ["C", "A", "B"]} every label once, the best first
    pairwise   {"choice": "A"}            A or B
    pointwise  {"answer": "Yes"}          Yes or No
    rating     {"rating": 4}              1 to 5
    free_list  {"titles": ["Heat", ...]}  titles, the best first

Schemas keep to what hosted services and vLLM, llama.cpp and Ollama take: an object, all of its keys
required and no others. `uniqueItems` is not among it: OpenAI and what follows its subset answer 400
("'uniqueItems' is not permitted"), xgrammar of vLLM lacks it, and llama.cpp takes it and does not
hold to it. So an order is n labels out of n, and who reads it refuses one that names a label
twice. llama.cpp holds whole numbers to a range and others not: what is outside is refused as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slgr_jax.teacher.ask.prompts import label

# The key of an answer that is one value.
KEYS: Mapping[str, str] = {
    "ranking": "order",
    "pairwise": "choice",
    "pointwise": "answer",
    "rating": "rating",
    "free_list": "titles",
}
# Tokens of an answer: all of it, and more for each candidate (`"A": 0.85, `, `"A", `) or title.
_JSON_TOKENS: Mapping[str, tuple[int, int]] = {
    "listwise": (2, 7),
    "ranking": (6, 4),
    "pairwise": (7, 0),
    "pointwise": (7, 0),
    "rating": (7, 0),
    "free_list": (6, 12),
}
_WORD_TOKENS: Mapping[str, tuple[int, int]] = {
    "listwise": (2, 7),
    "ranking": (0, 2),
    "pairwise": (1, 0),
    "pointwise": (1, 0),
    "rating": (1, 0),
    "free_list": (2, 12),
}


def answer_tokens(form: str, structured: str) -> tuple[int, int]:
    """Tokens of a whole answer: (of all of it, more for each candidate)."""
    return (_WORD_TOKENS if structured == "none" else _JSON_TOKENS)[form]


def answer_schema(form: str, shown: int, score_range: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The JSON schema of an answer about `shown` candidates.

    Args:
      form: one of `config.PROMPTS`.
      shown: number of candidates of the request; their labels are A, B, ...; of a free list the
        number of titles.
      score_range: listwise: lowest and highest score.
    """
    labels = [label(place) for place in range(shown)]
    properties: dict[str, dict[str, Any]]
    if form == "listwise":
        low, high = score_range
        properties = {name: {"type": "number", "minimum": low, "maximum": high} for name in labels}
    elif form == "ranking":
        items = {"type": "string", "enum": labels}
        properties = {
            KEYS[form]: {
                "type": "array",
                "description": "every label once, the best first",
                "items": items,
                "minItems": shown,
                "maxItems": shown,
            }
        }
    elif form == "free_list":
        properties = {
            KEYS[form]: {
                "type": "array",
                "description": "titles, the best first",
                "items": {"type": "string"},
                "minItems": 1,
                "maxItems": shown,
            }
        }
    elif form == "pairwise":
        properties = {KEYS[form]: {"type": "string", "enum": labels}}
    elif form == "pointwise":
        properties = {KEYS[form]: {"type": "string", "enum": ["Yes", "No"]}}
    else:
        properties = {KEYS[form]: {"type": "integer", "enum": [1, 2, 3, 4, 5]}}

    return _object_of(properties)


def _object_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has these keys and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def response_format(
    form: str, shown: int, structured: str, score_range: tuple[int, int] = (0, 1)
) -> dict[str, Any] | None:
    """The field `response_format` of a request's body; None for --structured=none."""
    properties = answer_schema(form, shown, score_range)["properties"]
    return as_response_format(form, properties, structured)


def as_response_format(
    name: str, properties: Mapping[str, Any], structured: str
) -> dict[str, Any] | None:
    """`response_format` of an answer that is an object of these keys.

    Args:
      name: of the schema.
      properties: key -> JSON schema of its value.
      structured: one of `config.STRUCTURED`.
    """
    if structured == "none":
        return None
    if structured == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": True, "schema": _object_of(properties)},
    }
