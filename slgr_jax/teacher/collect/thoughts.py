"""The answer in what a model wrote: without thoughts, channels and drafts that it marked as such.

`final_text` cuts what stands between marks (<think>, [THINK], channels). `cues` finds the words
that say what the text behind them is: a draft, an example, the final answer, a correction.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = (
    r"(?:seed:)?think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|scratch_?pad|analysis|"
    r"(?:inner_)?monologue|cot|chain_of_thought|plan(?:ning)?|draft|deliberation|rationale|"
    r"explanation|commentary|internal"
)
_LOUD = r"THINK(?:ING)?|THOUGHTS?|REASONING|SCRATCHPAD|ANALYSIS"
# (opening, closing) of a thought, in the spellings that model families use.
_OPEN = (
    rf"<(?:{_NAMES})(?:\s[^<>]*)?>|\[(?:{_LOUD})\]|◁think▷|<\|begin_of_thought\|>|"
    r"<\|START_THINKING\|>|<\|think\|>"
)
_CLOSE = (
    rf"</(?:{_NAMES})>|\[/(?:{_LOUD})\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|"
    r"<\|/think\|>"
)
_THOUGHT = re.compile(rf"(?:{_OPEN})(?:(?!{_OPEN}).)*?(?:{_CLOSE})", re.DOTALL | re.IGNORECASE)
_LEFT_OPEN = re.compile(rf"(?:{_OPEN}).*\Z", re.DOTALL | re.IGNORECASE)
_LEFT_CLOSED = re.compile(rf"\A.*(?:{_CLOSE})", re.DOTALL | re.IGNORECASE)
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|channel|call)\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNEL = re.compile(r"\A\s*analysis.*assistant\s*final", re.DOTALL)
_SPECIAL = re.compile(r"<\|[a-zA-Z_:]{2,30}\|>|</?s>|<(?:end_of_turn|eos|bos|pad)>")
_ANSWER = re.compile(
    r"<(answer|final|final_?answer|output|result|response|solution)>(.*?)(?:</\1>|\Z)|"
    r"\[(ANSWER|FINAL)\](.*?)(?:\[/\3\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")

_FULL_WIDTH: dict[int, int | str | None] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = _FULL_WIDTH | str.maketrans(
    {"\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u3000": " ", "\u200b": None,
     "\u2060": None, "\ufeff": None, "−": "-", "\r": None}
)  # fmt: skip


def plain(text: str) -> str:
    """Full-width forms, spaces and minus signs of one kind; no carriage returns, fences, long runs
    of space."""
    text = text.translate(_PLAIN).replace("&gt;", ">").replace("&nbsp;", " ")
    text = re.sub(r"```[a-zA-Z]*\n?", "", text)
    # Long runs of space mean nothing, and patterns would try every split of them.
    return re.sub(r"(?:\s*\n){3,}", "\n\n", re.sub(r" {3,}", "  ", re.sub(r"\t{2,}", "\t", text)))


def final_text(text: str) -> str:
    """What is left without thoughts; the last part that is marked as the answer where one is.

    An opened thought that never ends takes the rest of the text; one that only ends was opened by
    the prompt and takes what is before. Nothing may be left.
    """
    channels = _CHANNEL.findall(text)
    if channels:
        finals = [content for name, content in channels if name == "final"]
        text = finals[-1] if finals else ""
    text = _BARE_CHANNEL.sub("", text)

    previous = None
    while previous != text:  # thoughts in thoughts, from the inside
        previous, text = text, _THOUGHT.sub("", text)
    text = _LEFT_OPEN.sub("", _LEFT_CLOSED.sub("", text))

    answers = [a or b for _, a, _, b in _ANSWER.findall(text) if (a or b).strip()]
    text = answers[-1] if answers else text
    boxed = _BOXED.findall(text)
    text = _LATEX_TEXT.sub(r"\1", boxed[-1] if boxed else text)
    return _SPECIAL.sub("", text).strip()


# --- words that say what the text behind them is -----------------------------------------------

_THINGS = (
    r"(?:rank(?:ing|ings|ed)?|orders?|ordering|scores?|scoring|ratings?|lists?|answers?|results?|"
    r"output|versions?|verdict|choices?|picks?|decisions?|json|response|estimates?|pass|guess|"
    r"attempt|thoughts?|impressions?|try|take|cut|drafts?|assessments?|evaluation)"
)
# The start of a text, line or sentence; `A. Sorry, Wrong Number` begins none.
_START = r"(?:(?<=[.!?;:\n])(?<!\b[A-Z][.:])|\A)[\s#>*_\"'(-]*(?:\d{1,2}[.)]\s*)?[*_]*"
_CUES = {
    "correction": (
        rf"{_START}(?:wait|actually|correction|hmm+|oops|sorry|instead|scratch that|"
        r"never ?mind)\b|\b(?:on (?:reflection|second thou?ght|further thought)|"
        r"let me (?:reconsider|re-?think|revise|re-?evaluate|adjust|correct|fix|double.?check)|"
        r"i (?:made (?:a mistake|an error)|(?:need|have|want|should|would) (?:to )?(?:revise|"
        r"correct|adjust|swap|change))|"
        r"after (?:more thought|reconsider\w*|(?:further|more|some) (?:thought|consideration|"
        r"reflection))|swap(?:ping|ped)?|should (?:be|go|rank) (?:higher|lower|above|below)|"
        r"upon (?:reflection|review))\b"
    ),
    "final": (
        rf"\b(?:final(?:ly|i[sz]ed)?|revised|updated|corrected|adjusted|definitive|refined|"
        rf"amended|concluding)\b[ \w]{{0,24}}?\b{_THINGS}\b|"
        rf"{_START}(?:(?:so|thus|hence|therefore|my|the|final)[ ,]+)*(?:final|revised|updated|"
        r"corrected|adjusted|answer|output|result|conclusion|verdict)s?(?: is| are)?[*_ ]*:"
    ),
    "draft": (
        rf"\b(?:initial|first|draft|preliminary|tentative|rough|provisional|original|previous|"
        rf"earlier|naive|quick)[ -]+(?:\w+[ -]+)?{_THINGS}\b|"
        rf"{_START}(?:initially|at first|first|draft|initial|rough|thinking|thoughts?|reasoning|"
        r"analysis|thought process|scratch ?pad|brainstorm(?:ing)?)[*_ ]*[:,]|"
        r"\bi(?: had|'d)? (?:first|initially|originally) (?:thought|ranked|scored|considered)\b"
    ),
    "example": (
        r"\b(?:for (?:example|instance)|e\.g\.|such as|example (?:output|answer|format)|"
        r"in the (?:form|format)|(?:output|answer|expected|required|response) format|"
        r"formatted (?:as|like)|something like)"
    ),
}  # fmt: skip
_CUE = re.compile(
    "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _CUES.items()), re.IGNORECASE
)


class Cue(NamedTuple):
    """Words that say what follows: `kind` is correction, final, draft or example."""

    position: int
    end: int
    kind: str


def cues(text: str) -> list[Cue]:
    """Every cue in a text, in order."""
    return [Cue(m.start(), m.end(), str(m.lastgroup)) for m in _CUE.finditer(text)]


def mark_of_key(key: str) -> str | None:
    """draft or final of a key in JSON; `skip` where what it holds is not an answer."""
    words = re.sub(r"[^a-z]+", " ", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower()).split()
    if {"final", "revised", "updated", "corrected", "adjusted", "refined"} & set(words):
        return "final"
    if {"draft", "initial", "preliminary", "tentative", "rough", "provisional", "original",
        "previous", "first"} & set(words):  # fmt: skip
        return "draft"
    if {"example", "examples", "reason", "reasons", "reasoning", "rationale", "explanation",
        "explanations", "thought", "thoughts", "thinking", "analysis", "justification", "note",
        "notes", "comment", "comments", "candidates", "history", "worst", "least",
        "excluded"} & set(words):  # fmt: skip
        return "skip"
    return None


_WORST_FIRST = re.compile(
    r"\b(?:worst (?:first|to best|to first)|least[\w -]{0,30}?\bto[\w -]{0,12}?\b(?:most|best)|"
    r"from (?:the )?(?:worst|least|lowest|bottom)|low(?:est)? to high(?:est)?|ascending|"
    r"lowest first|least (?:\w+ )?first|bottom to top|reverse(?:d)? order|worst\s*>)",
    re.IGNORECASE,
)
_LOWER_IS_BETTER = re.compile(
    r"\b(?:lower|smaller|lowest|smallest)\b[^.\n]{0,40}\b(?:better|best|closer|stronger|preferred)|"
    r"\b0(?:\.0)?\s*(?:=|is|being|means)\s*(?:the |a )?(?:best|perfect)|"
    r"\b1\s*(?:=|is|being|means)\s*(?:the )?(?:best|top|first|most|highest)|"
    r"\b(?:distance|dissimilarity|penalty)\b",
    re.IGNORECASE,
)


def direction_in_doubt(text: str) -> str:
    """Words that turn an order or a scale around; empty where none do."""
    match = _WORST_FIRST.search(text) or _LOWER_IS_BETTER.search(text)
    return match[0] if match else ""
