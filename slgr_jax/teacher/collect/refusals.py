"""Why a result cannot be used, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Refused(NamedTuple):
    """A result that cannot be used: `kind` is a key of `KINDS`, `detail` is of this result."""

    custom_id: str
    kind: str
    detail: str


class Kind(NamedTuple):
    """What a kind of refusal means.

    Attributes:
      state: of the request it leaves behind: failed (the service gave no answer) or refused (the
        answer cannot be used); empty where it says nothing about a request of ours.
      advice: what to do, an imperative.
    """

    state: str
    advice: str


_ASK_AGAIN = "ask again with what slgr teach requests --open writes"
# The same requests at --temperature=0 get the same answers; other ones get others.
_NEW = (
    "write new requests (slgr teach requests --out=DIR; collect --requests=DIR adds their answers)"
)
_FORM = f"{_NEW} with --structured=json_schema, or json_object where the server knows no schema"

KINDS: Mapping[str, Kind] = {
    # The file or the envelope.
    "not JSON": Kind(
        "", "copy the file again if a line was cut off, save it as UTF-8 if it is not; what is no "
        "result file (JSON lines, Parquet) leave out"
    ),
    "not an object": Kind("", "give result files only: each line is one JSON object"),
    "no custom_id": Kind(
        "", "keep the custom_id (key, recordId) of the request in each result: without it nobody "
        "knows what was asked"
    ),
    "foreign custom_id": Kind(
        "", "name the folder these were asked from with --requests, or leave the file out"
    ),
    "no response": Kind(
        "failed", "where the answer is under another name call it text, next to custom_id; else "
        f"{_ASK_AGAIN}"
    ),
    "error": Kind("failed", f"mend what the service complains about, then {_ASK_AGAIN}"),
    "no choices": Kind(
        "failed", "where these keys are another service's layout write it as custom_id and text; "
        f"else {_ASK_AGAIN}"
    ),
    # The answer.
    "no text": Kind("refused", _ASK_AGAIN),
    "empty answer": Kind(
        "refused", "where it ended by length its thoughts spent the tokens: raise --answer_tokens, "
        f"or switch thinking off with --body; {_ASK_AGAIN}"
    ),
    "refusal": Kind("refused", "change the prompt (--template) or the model, then ask again"),
    "cut off": Kind("refused", f"raise --answer_tokens, then {_ASK_AGAIN}"),
    "no scores by label": Kind("refused", f"{_FORM}; a template of your own has to ask for labels"),
    "no titles": Kind(
        "refused", f"a list of titles is read, numbered or one a line, and no prose: {_FORM}"
    ),
    "no texts": Kind(
        "refused", "an object with the keys that were asked for is read, or a line of each name, a "
        f"colon and its text; a template of your own needs $answer: {_FORM}"
    ),
    "none of the catalogue": Kind(
        "refused", "show the model what there is to choose from (--catalogue=all), or what the "
        f"items are (--template): {_NEW}"
    ),
    "none of the labels": Kind(
        "refused", f"{_FORM}; a template of your own needs $answer, or has to ask for labels alone"
    ),
    "labels repeated or unknown": Kind(
        "refused", "no server holds a model to labels that differ, and at --temperature=0 the same "
        f"answer comes again: {_NEW} with --temperature=0.7, --prompt=listwise or a shorter "
        "--list_size, or take a larger model"
    ),
    "the candidates again": Kind(
        "refused", f"the list in the order shown tells no order: {_FORM}, or take a larger model"
    ),
    "numbers without a label": Kind(
        "refused", f"one number a label can be read (A: 0.8), and nothing beside it: {_FORM}"
    ),
    "label and title disagree": Kind(
        "refused", f"ask for labels alone ($answer in the template), or {_FORM}"
    ),
    "only a draft": Kind(
        "refused", f"the answer ends before its final part: raise --answer_tokens, or {_FORM}"
    ),
    "two readings": Kind(
        "refused", "an answer that corrects itself has to mark the one that holds (Final answer: "
        f"...): ask for that in a template, or {_FORM}"
    ),
    "order against scores": Kind(
        "refused", f"ask for one of the two, an order or scores, in the template, or {_FORM}"
    ),
    "direction in doubt": Kind(
        "refused", "say in the template that the best comes first and that higher is better, as "
        f"those that come with slgr do, or {_FORM}"
    ),
    "outside the score range": Kind(
        "refused", "name the scale of your prompt with --score_range=LOWEST,HIGHEST, or ask again"
    ),
    "scale in doubt": Kind(
        "refused", "name the scale of your prompt with --score_range=LOWEST,HIGHEST; where an "
        f"order was asked for, ask for labels alone: {_FORM}"
    ),
    "no single choice": Kind("refused", f"A or B alone is read, or its title: {_FORM}"),
    "neither yes nor no": Kind("refused", f"Yes or No is read: {_FORM}"),
    "no rating from 1 to 5": Kind(
        "refused", "one whole number from 1 to 5 is read; where your template asks for another "
        f"scale use --prompt=listwise with --score_range: {_FORM}"
    ),
    "another answer": Kind(
        "", "nothing: the first answer is kept; start a new --name to use the other one"
    ),
}  # fmt: skip


def state_of(kind: str) -> str:
    """failed, refused, or empty: see `Kind.state`. An unknown kind is of a later version."""
    return KINDS[kind].state if kind in KINDS else "refused"
