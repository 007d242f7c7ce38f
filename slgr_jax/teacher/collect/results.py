"""A completion -> the scores it gives to the candidates of its request, or why it gives none.

One answer at a time, without state or files. What cannot be used is a `Refused` with the reason,
never an exception.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from slgr_jax.teacher.collect import list_answers, title_answers, word_answers
from slgr_jax.teacher.collect.completions import Completion, word_shares
from slgr_jax.teacher.collect.readings import ListRefused
from slgr_jax.teacher.collect.refusals import Refused
from slgr_jax.teacher.collect.shown import Shown

_LABELS = (frozenset({"A"}), frozenset({"B"}))
_WORDS = (word_answers.YES, word_answers.NO)
_DIGITS = tuple(frozenset({str(digit)}) for digit in range(1, 6))


@dataclasses.dataclass(frozen=True)
class Answer:
    """Scores in [0, 1] of the candidates in shown order, NaN where there is none, float32.

    Of two compared items there is one number: the probability that the first is preferred.
    `cut` answers ended before every candidate had a score; what they had said is kept.
    A free list has `titles`, in order, and no scores; an answer about a user or an item `texts`,
    one a field, empty where nothing is known (`prose_answers.parse`).
    """

    scores: np.ndarray
    cut: bool = False
    titles: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


def parse(
    form: str, completion: Completion, shown: Shown, score_range: tuple[float, float] = (0.0, 1.0)
) -> Answer | Refused:
    """The scores that an answer gives to the candidates of its request.

    Args:
      form: one of `config.PROMPTS`; for lists see `list_answers.read_list`.
      completion: the answer.
      shown: the candidates that it was about; of a free list as many as titles were asked for.
      score_range: lowest and highest score asked for; mapped to 0 and 1.
    """
    text, custom_id = completion.text, completion.custom_id
    if form in ("listwise", "ranking"):
        scores = list_answers.read_list(form, text, shown, score_range, cut=completion.cut)
        if isinstance(scores, ListRefused):
            return Refused(custom_id, scores.kind, scores.detail)
        return Answer(*scores)
    if form == "free_list":
        listed = title_answers.read_titles(text, shown.size, cut=completion.cut)
        if isinstance(listed, ListRefused):
            return Refused(custom_id, listed.kind, listed.detail)
        return Answer(np.zeros(0, np.float32), listed[1], listed[0])
    if form == "pairwise":
        said = word_answers.read_choice(text, shown)
        return _of_words(completion, said, _LABELS, np.array([1.0, 0.0]), "no single choice")
    if form == "pointwise":
        said = word_answers.read_yes_no(text)
        return _of_words(completion, said, _WORDS, np.array([1.0, 0.0]), "neither yes nor no")
    said = word_answers.read_rating(text, shown)
    return _of_words(completion, said, _DIGITS, np.linspace(0, 1, 5), "no rating from 1 to 5")


def _of_words(
    completion: Completion,
    said: int | None,
    groups: Sequence[frozenset[str]],
    values: np.ndarray,
    reason: str,
) -> Answer | Refused:
    """An answer that is one of a few words: its value, or the mean under their probabilities."""
    if said is None:
        kind = "cut off" if completion.cut else reason
        return Refused(completion.custom_id, kind, completion.text[:200])
    if completion.cut and len(completion.text.split()) > 1:
        # A sentence may have gone on to say the opposite; a word that is all of it has not.
        return Refused(completion.custom_id, "cut off", completion.text[-200:])
    shares = word_shares(completion.tokens, groups, said)
    score = values[said] if shares is None else shares @ values
    return Answer(np.array([score], np.float32))
