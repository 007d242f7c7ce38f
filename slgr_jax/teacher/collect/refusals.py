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
_LOOK = "look at one in the quarantine and ask again, or change the prompt"

KINDS: Mapping[str, Kind] = {
    # The file or the envelope.
    "not JSON": Kind("", "copy the file again: a line was cut off or is no JSON"),
    "not an object": Kind("", "give result files only: each line is one JSON object"),
    "no custom_id": Kind(
        "", "keep the custom_id (key, recordId) of the request in each result: without it nobody "
        "knows what was asked"
    ),
    "foreign custom_id": Kind(
        "", "name the folder these were asked from with --requests, or leave the file out"
    ),
    "no response": Kind("failed", _ASK_AGAIN),
    "error": Kind("failed", f"mend what the service complains about, then {_ASK_AGAIN}"),
    "no choices": Kind("failed", _ASK_AGAIN),
    # The answer.
    "no text": Kind("refused", _ASK_AGAIN),
    "empty answer": Kind(
        "refused", f"raise --answer_tokens (thoughts may have spent them), then {_ASK_AGAIN}"
    ),
    "refusal": Kind("refused", "change the prompt (--template) or the model, then ask again"),
    "cut off": Kind("refused", f"raise --answer_tokens, then {_ASK_AGAIN}"),
    "no scores by label": Kind("refused", _LOOK),
    "two readings": Kind("refused", _LOOK),
    "outside the score range": Kind(
        "refused", "name the scale of your prompt with --score_range=LOWEST,HIGHEST, or ask again"
    ),
    "scale in doubt": Kind(
        "refused", "name the scale of your prompt with --score_range=LOWEST,HIGHEST; else ask "
        "again for scores in that range, or for labels only where an order is asked for"
    ),
    "no single choice": Kind("refused", _LOOK),
    "neither yes nor no": Kind("refused", _LOOK),
    "no rating from 1 to 5": Kind("refused", _LOOK),
    "another answer": Kind(
        "", "nothing: the first answer is kept; start a new --name to use the other one"
    ),
}  # fmt: skip


def state_of(kind: str) -> str:
    """failed, refused, or empty: see `Kind.state`. An unknown kind is of a later version."""
    return KINDS[kind].state if kind in KINDS else "refused"
