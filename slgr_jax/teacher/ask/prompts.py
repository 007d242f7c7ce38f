"""Prompts: how items, histories and candidates become the text of a request.

A template is a text file with `$history` and `$candidates` (`$$` is a dollar sign), as of
`string.Template`. Candidates are shown with short labels, so that an answer is read by label and
never by title. `templates/` has one template a form of answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pathlib
import string
from collections.abc import Callable, Sequence

import numpy as np

from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing

TEMPLATES = pathlib.Path(__file__).parent / "templates"
FIELDS = ("history", "candidates")
# Forms of answer that show their candidates with labels.
LABELLED = frozenset({"listwise", "ranking", "pairwise"})
_MOST_TEXT = 120  # characters of a description that stands for a missing title


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
        named = ", ".join(" ".join(one.split()) for one in categories or () if one and one.strip())
        lines.append(f"{name} ({named})" if name and named else name)
    if not any(lines):
        raise InputError(
            f"{dataset.path} has no item texts to show; prepare it again with item titles "
            "(slgr prepare --items_input)"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with gaps.

    Attributes:
      text: of the file.
      hash: the first 16 digits of its SHA-256, for manifests.
    """

    text: str
    hash: str

    def render(self, history: Sequence[str], shown: Sequence[str], *, labelled: bool) -> str:
        """The prompt: a history, oldest first, and candidates in the order shown."""
        lines = [f"{label(k)}. {line}" for k, line in enumerate(shown)] if labelled else shown
        return string.Template(self.text).substitute(
            history="\n".join(f"- {line}" for line in history), candidates="\n".join(lines)
        )


def read_template(form: str, path: str = "") -> Template:
    """The template in the file `path`, or the one that comes with a form of answer.

    Raises:
      ConfigError: no such file, not UTF-8, a gap that is missing or that nothing fills.
    """
    source = pathlib.Path(path) if path else TEMPLATES / f"{form}.txt"
    try:
        text = source.read_text(encoding="utf-8").rstrip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template={source} cannot be read: {error}") from error
    template = string.Template(text)
    if not template.is_valid():
        raise ConfigError(f"--template={source} has a bare $; write $$ for a dollar sign")
    found = template.get_identifiers()
    missing, unknown = sorted(set(FIELDS) - set(found)), sorted(set(found) - set(FIELDS))
    if missing or unknown:
        raise ConfigError(
            f"--template={source}: missing {listing(missing)}; unknown {listing(unknown)}; a "
            "template has $history and $candidates, each at least once"
        )
    return Template(text, hashlib.sha256(text.encode()).hexdigest()[:16])


Count = Callable[[Sequence[str]], np.ndarray]


def token_counter() -> tuple[str, Count]:
    """How tokens are estimated, and (texts) -> [n] int64: with wordllama's tokenizer (a Llama's)
    where the extra `llm` is installed, else four characters a token."""
    found = importlib.util.find_spec("wordllama")
    if found is not None and found.submodule_search_locations:
        folder = pathlib.Path(next(iter(found.submodule_search_locations))) / "tokenizers"
        path = folder / "l2_supercat_tokenizer_config.json"
        if path.is_file() and importlib.util.find_spec("tokenizers") is not None:
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()

            def count(texts: Sequence[str]) -> np.ndarray:
                encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
                return np.array([len(one.ids) for one in encoded], np.int64)

            return "the Llama 2 tokenizer of wordllama", count
    return "four characters a token", _quarter


def _quarter(texts: Sequence[str]) -> np.ndarray:
    return np.array([-(-len(text) // 4) for text in texts], np.int64)
