"""Prompts that ask for texts: what they show of a user or an item, and the form of the answer.

A template is a text file with `$history` (of a user: training items, oldest first) or `$item` (its
title, categories and description). One that has `$factors` asks for a text a factor, any other for
one text; `$words` is the most words of a text, `$answer` the sentence that asks for the form:

    {"text": "..."}                       one text
    {"genre": "...", "mood": "..."}       a text a factor; empty: nothing is known
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

from slgr_jax.config import FACTORS, TEXT_PROMPTS, RequestConfig, TextConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.ask import answer_form, prompts
from slgr_jax.teacher.ask.prompts import Template

ONE_TEXT = ("text",)  # the fields of an answer that is one text
_SHOWN = {"user": "history", "item": "item"}  # the gap that a template must have
_TOKENS_A_WORD = 1.5  # of English and most tokenizers; other scripts take more: --answer_tokens
_PHRASE_WORDS = 10  # of a factor of *_attributes, whose template asks for a phrase


def read_template(options: RequestConfig, texts: TextConfig) -> tuple[Template, tuple[str, ...]]:
    """The template of a prompt for texts, or the user's own, and the fields of its answers.

    Raises:
      ConfigError: as `prompts.read_template`; --factors with a template without $factors.
    """
    side = TEXT_PROMPTS[options.prompt]
    path = options.template or prompts.TEMPLATES / f"{options.prompt}.txt"
    factors = texts.factor_names or FACTORS

    def load(fields: Sequence[str]) -> Template:
        wording = {
            "answer": instruction(fields, options.structured),
            "words": str(texts.words),
            "factors": ", ".join(factors),
        }
        return prompts.load_template(path, (_SHOWN[side],), wording, options.structured)

    template = load(factors)
    if "factors" in string.Template(template.text).get_identifiers():
        return template, factors
    if texts.factors:
        raise ConfigError(
            f"--factors={texts.factors}, and --template={path} has no $factors: add it, or use "
            f"--prompt=kar_{side}"
        )
    return load(ONE_TEXT), ONE_TEXT


def instruction(fields: Sequence[str], structured: str) -> str:
    """The sentence that says what an answer looks like."""
    if structured == "none":
        if fields == ONE_TEXT:
            return "Answer with the text alone."
        return (
            "Answer with a line for each, which begins with its name and a colon, such as "
            f"{fields[0]}: ..., and nothing else."
        )
    example = json.dumps(dict.fromkeys(fields, "..."), ensure_ascii=False)
    return f"Answer with one JSON object, {example}, and nothing else."


def response_format(fields: Sequence[str], structured: str) -> dict[str, Any] | None:
    """The field `response_format` of a request's body; None for --structured=none."""
    properties = {name: {"type": "string"} for name in fields}
    return answer_form.as_response_format("texts", properties, structured)


def answer_tokens(fields: Sequence[str], options: RequestConfig, words: int) -> int:
    """Tokens of a whole answer, as an estimate: of its texts, and of the JSON around them."""
    if options.prompt.endswith("_attributes") and not options.template:
        words = min(words, _PHRASE_WORDS)
    return len(fields) * (round(words * _TOKENS_A_WORD) + 6) + 2


def item_blocks(dataset: Dataset, most_words: int) -> list[str]:
    """[I] what a prompt about an item shows: a line each of its title, categories, description.

    Empty where an item has neither a title nor a description.

    Args:
      most_words: of a description, from its beginning.

    Raises:
      InputError: no item has any.
    """
    columns = [dataset.items.column(name).to_pylist() for name in ("title", "categories", "text")]
    blocks = []
    for title, categories, text in zip(*columns, strict=True):
        shown = {
            "Title": " ".join((title or "").split()),
            "Categories": ", ".join(" ".join(name.split()) for name in categories or () if name),
            "Description": " ".join((text or "").split()[:most_words]),
        }
        known = shown["Title"] or shown["Description"]
        lines = [f"{name}: {held}" for name, held in shown.items() if held]
        blocks.append("\n".join(lines) if known else "")
    if not any(blocks):
        raise InputError(
            f"{dataset.path} has no item titles to show; prepare it again with them (slgr prepare "
            "--items_input)"
        )
    return blocks
