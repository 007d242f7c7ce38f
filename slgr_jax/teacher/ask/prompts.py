"""Prompts: how items, histories and candidates become the text of a request.

A template is a text file with `$history` and `$candidates` (`$$` is a dollar sign), as of
`string.Template`; `$answer` is the sentence that asks for the form of the answer, `$lowest` and
`$highest` are the range of scores, `$count` is the length of a free list. Candidates are shown with
short labels, so that an answer is read by label and not by title; a free list is titles, and its
template has no `$candidates` unless the catalogue is shown. `templates/` has one a form of answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pathlib
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from slgr_jax.config import LIST_SIZES
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing

TEMPLATES = pathlib.Path(__file__).parent / "templates"
FIELDS = ("history", "candidates")
# Forms of answer that show their candidates with labels.
LABELLED = frozenset({"listwise", "ranking", "pairwise"})
_MOST_TEXT = 120  # characters of a description that stands for a missing title

Range = tuple[int, int]
# How a prompt asks for its answer: as JSON, and in words (--structured=none).
_AS_JSON: Mapping[str, str] = {
    "listwise": 'Answer with one JSON object from label to score, such as {"A": %s, "B": %s}, and '
    "nothing else.",
    "ranking": "Answer with one JSON object that has every label once, such as "
    '{"order": ["C", "A", "B"]}, and nothing else.',
    "pairwise": 'Answer with one JSON object, {"choice": "A"} or {"choice": "B"}, and nothing '
    "else.",
    "pointwise": 'Answer with one JSON object, {"answer": "Yes"} or {"answer": "No"}, and nothing '
    "else.",
    "rating": "Answer with one JSON object that has one digit from 1 (not at all) to 5 "
    '(perfectly), such as {"rating": 3}, and nothing else.',
    "free_list": 'Answer with one JSON object that has the titles in order, such as {"titles": '
    '["The best title (1999)", "The next title"]}, and nothing else.',
}
_IN_WORDS: Mapping[str, str] = {
    "listwise": _AS_JSON["listwise"],
    "ranking": "Answer with the labels only, such as C > A > B, and nothing else.",
    "pairwise": "Answer with one letter, A or B, and nothing else.",
    "pointwise": "Answer with one word, Yes or No, and nothing else.",
    "rating": "Answer with one digit from 1 (not at all) to 5 (perfectly), and nothing else.",
    "free_list": "Answer with a numbered list, one title a line, and nothing else.",
}


def label(place: int) -> str:
    """A, B, ..., Z, AA, AB, ...: the label of the candidate at a place, from 0."""
    text = ""
    place += 1
    while place:
        place, digit = divmod(place - 1, 26)
        text = chr(ord("A") + digit) + text
    return text


def item_lines(dataset: Dataset) -> list[str]:
    """[I] one line of text an item: `title (category, category)`; empty where it has no text.

    A description stands for a missing title, cut to its first 120 characters.

    Raises:
      InputError: no item has any text.
    """
    columns = [dataset.items.column(name).to_pylist() for name in ("title", "text", "categories")]
    lines = []
    for title, text, categories in zip(*columns, strict=True):
        name = " ".join((title or "").split()) or " ".join((text or "").split())[:_MOST_TEXT]
        kinds = [" ".join(category.split()) for category in categories or () if category]
        shown = ", ".join(filter(None, kinds))
        lines.append(f"{name} ({shown})" if name and shown else name)

    if not any(lines):
        raise InputError(
            f"{dataset.path} has no item texts to show; prepare it again with item titles "
            "(slgr prepare --items_input)"
        )
    return lines


def instruction(form: str, structured: str, score_range: Range) -> str:
    """The sentence that says what an answer looks like, with examples inside the range."""
    text = (_IN_WORDS if structured == "none" else _AS_JSON)[form]
    if form != "listwise":
        return text
    low, high = score_range
    examples = (f"{low + share * (high - low):.4g}" for share in (0.35, 0.8))
    return text % tuple(examples)


def as_history(lines: Sequence[str]) -> str:
    """Items of a history, oldest first, as a prompt lists them."""
    return "\n".join(f"- {line}" for line in lines)


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with gaps.

    Attributes:
      text: of the file.
      wording: what fills the optional gaps, the same in every prompt.
      hash: the first 16 digits of the SHA-256 of the text and of the wording it uses, for
        manifests.
    """

    text: str
    wording: Mapping[str, str]
    hash: str

    def render(self, history: Sequence[str], shown: Sequence[str], *, labelled: bool) -> str:
        """The prompt: a history, oldest first, and candidates in the order shown."""
        lines = [f"{label(k)}. {line}" for k, line in enumerate(shown)] if labelled else shown
        return self.fill(history=as_history(history), candidates="\n".join(lines))

    def fill(self, **gaps: str) -> str:
        """The prompt with these texts in its gaps."""
        return string.Template(self.text).substitute(self.wording, **gaps)


def read_template(
    form: str,
    path: str = "",
    *,
    structured: str = "json_schema",
    score_range: Range = (0, 1),
    catalogue: str = "none",
    count: int = LIST_SIZES["free_list"],
) -> Template:
    """The template in the file `path`, or the one that comes with a form of answer.

    Args:
      form: one of `config.PROMPTS`.
      path: a file of the user's; empty: the one of `templates/`.
      structured: one of `config.STRUCTURED`, for the words of `$answer`.
      score_range: `$lowest` and `$highest`.
      catalogue: free_list: one of `config.CATALOGUES`; none: the template has no $candidates.
      count: `$count`.

    Raises:
      ConfigError: no such file, not UTF-8, a gap that is missing or that nothing fills, or
        `structured` is json_object and the template never says JSON (services refuse that).
    """
    shows_none = form == "free_list" and catalogue == "none"
    own = f"{form}_catalogue" if form == "free_list" and not shows_none else form
    lowest, highest = score_range
    return load_template(
        path or TEMPLATES / f"{own}.txt",
        FIELDS[:1] if shows_none else FIELDS,
        {
            "answer": instruction(form, structured, score_range),
            "lowest": str(lowest),
            "highest": str(highest),
            "count": str(count),
        },
        structured,
        hint="; $candidates needs --catalogue=all" if shows_none else "",
    )


def load_template(
    path: str | pathlib.Path,
    fields: Sequence[str],
    wording: Mapping[str, str],
    structured: str,
    *,
    hint: str = "",
) -> Template:
    """The template in a file.

    Args:
      fields: gaps that it must have; wording: those that it may have, and what fills them.
      structured: one of `config.STRUCTURED`.
      hint: more for the error about its gaps.

    Raises:
      ConfigError: as `read_template`.
    """
    source = pathlib.Path(path)
    try:
        text = source.read_text(encoding="utf-8").rstrip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template={source} cannot be read: {error}") from error
    template = string.Template(text)
    if not template.is_valid():
        raise ConfigError(f"--template={source} has a bare $; write $$ for a dollar sign")

    gaps = set(template.get_identifiers())
    missing = sorted(set(fields) - gaps)
    unknown = sorted(gaps - set(fields) - set(wording))
    if missing or unknown:
        raise ConfigError(
            f"--template={source}: missing {listing(missing)}; unknown {listing(unknown)}; a "
            f"template has {' and '.join('$' + name for name in fields)}, each at least once, and "
            f"may have {listing('$' + name for name in wording)}{hint}"
        )
    if structured == "json_object" and "answer" not in gaps and "json" not in text.lower():
        raise ConfigError(
            f"--template={source} never says JSON, which services demand of "
            "--structured=json_object; add $answer to it, or use --structured=json_schema"
        )
    used = "".join(value for name, value in wording.items() if name in gaps)
    return Template(text, wording, hashlib.sha256((text + used).encode()).hexdigest()[:16])


Count = Callable[[Sequence[str]], np.ndarray]


def token_counter() -> tuple[str, Count]:
    """How tokens are estimated, and (texts) -> [n] int64: with wordllama's tokenizer (a Llama's)
    where the extra `llm` is installed, else four characters a token."""
    package = importlib.util.find_spec("wordllama")
    if package is not None and package.submodule_search_locations:
        folder = pathlib.Path(next(iter(package.submodule_search_locations))) / "tokenizers"
        path = folder / "l2_supercat_tokenizer_config.json"
        if path.is_file() and importlib.util.find_spec("tokenizers") is not None:
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()

            def count(texts: Sequence[str]) -> np.ndarray:
                encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
                return np.array([len(encoding.ids) for encoding in encoded], np.int64)

            return "the Llama 2 tokenizer of wordllama", count
    return "four characters a token", _quarter


def _quarter(texts: Sequence[str]) -> np.ndarray:
    return np.array([-(-len(text) // 4) for text in texts], np.int64)
