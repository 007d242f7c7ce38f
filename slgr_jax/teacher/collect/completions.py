"""What a model answered, and the probabilities of the words it could have answered with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

Tokens = Sequence[tuple[str, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model answered.

    Attributes:
      custom_id: of the request.
      text: the answer, without what a reasoning model thought.
      tokens: of each of its tokens the token and the log-probabilities of the likeliest ones in
        its place; empty where they were not asked for. Tokens of thoughts are left out.
      cut: the answer ended because it was too long.
      prompt_tokens, completion_tokens: what was paid for; None where not told.
      sample: which of the answers to its request, from 0.
    """

    custom_id: str
    text: str
    tokens: Tokens = ()
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    sample: int = 0

    @property
    def usage(self) -> dict[str, int | None]:
        """What was paid for, by name."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


def answer_tokens(tokens: Tokens, answer: str) -> Tokens:
    """The tokens from where the answer begins: behind the thoughts before it.

    None are left where the answer is not in the tokens' text.
    """
    written = "".join(token for token, _ in tokens)
    start = written.rfind(answer)
    if start <= 0:
        return tokens if start == 0 or written.strip() == answer else ()
    position = 0
    for number, (token, _) in enumerate(tokens):
        position += len(token)
        if position > start:
            return tokens[number:]
    return ()


def word_shares(tokens: Tokens, groups: Sequence[frozenset[str]], said: int) -> np.ndarray | None:
    """Probabilities of words, from the first token that is one of them.

    A word that is not among the listed tokens gets the most it can have: the smallest listed
    probability, or what is left over.

    Args:
      tokens: of the answer.
      groups: spellings of each word, in lower case where case does not matter.
      said: which of them the text says.

    Returns:
      [words], summing to 1; None where no token is one of them, or where the first one is another
      than the text says.
    """
    for token, listed in tokens:
        if (word := _group(token, groups)) is None:
            continue
        if word != said:
            return None
        mass = np.zeros(len(groups))
        for text, value in listed.items():
            if (place := _group(text, groups)) is not None:
                mass[place] += math.exp(value)
        if not mass.sum() > 0:
            return None
        every = [math.exp(value) for value in listed.values()]
        rest = min(min(every), max(0.0, 1.0 - sum(every)))
        mass = np.where(mass > 0, mass, rest)
        return mass / mass.sum()
    return None


def _group(token: str, groups: Sequence[frozenset[str]]) -> int | None:
    text = token.strip(" \t\r\n\"'*().:[]`▁Ġ")
    for place, words in enumerate(groups):
        # Labels are capitals: `a` is an article.
        if text in words or (text.lower() in words and len(text) > 1):
            return place
    return None
