"""What a request to the server may say, checked; each refusal has its HTTP status.

    {"users": ["u1", "u2"], "k": 5}                        known users
    {"histories": {"new": ["i7", "i9"]}}                   new ones: name -> items, oldest first
    {..., "mask_seen": false, "allow": [...], "deny": [...]}

In an address the same names repeat: /recommend?users=u1&users=u2&k=5. Ids are texts; whole numbers
are taken for their digits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slgr_jax.config import ServeConfig
from slgr_jax.errors import UserError, listing
from slgr_jax.serving.compiled_lists import Options
from slgr_jax.serving.histories import History

MOST_BYTES = 1 << 20  # of a request's body
FIELDS = ("users", "histories", "k", "mask_seen", "allow", "deny")
_LISTS = ("users", "allow", "deny")


class RequestError(UserError):
    """A request that cannot be answered.

    Attributes:
      status: of the HTTP answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ListRequest(NamedTuple):
    """Whose lists are asked for; either `users` or `histories` is empty.

    Attributes:
      users: ids of known users.
      histories: name -> distinct items of a new user; one that repeats weighs more.
      k: length of the lists.
    """

    users: list[str]
    histories: dict[str, History]
    k: int
    options: Options


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
      RequestError: it is none.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(422, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(
            422, f'the body is {_shown(fields)}; give an object such as {{"users": ["u1"]}}'
        )
    return fields


def from_address(parameters: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The fields in an address's query, as those of a body."""
    fields: dict[str, Any] = {}
    for name, text in parameters:
        if name in _LISTS:
            fields.setdefault(name, []).append(text)
        elif name in fields:
            raise RequestError(422, f"{name} is given twice")
        elif name == "histories":
            raise RequestError(422, "histories do not fit an address; send a POST with JSON")
        elif name == "k" and text.isascii() and text.isdecimal() and len(text) < 10:
            fields[name] = int(text)
        elif name == "mask_seen" and text in ("true", "false"):
            fields[name] = text == "true"
        else:
            fields[name] = text
    return fields


def read(fields: Mapping[str, Any], config: ServeConfig) -> ListRequest:
    """The request that fields make.

    Raises:
      RequestError: 422 for what cannot be understood, 413 for what is over a limit.
    """
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise RequestError(422, f"unknown field {listing(unknown, 3)}; fields: {listing(FIELDS)}")
    if ("users" in fields) == ("histories" in fields):
        raise RequestError(
            422, "give either users (ids of known users) or histories (items of new ones)"
        )
    k = fields.get("k", config.k)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= config.max_k:
        raise RequestError(
            422, f"k={_shown(k)} is not a whole number from 1 to {config.max_k} (--max_k)"
        )
    mask_seen = fields.get("mask_seen", True)
    if not isinstance(mask_seen, bool):
        raise RequestError(422, f"mask_seen={_shown(mask_seen)} is neither true nor false")

    allow, deny = (
        None
        if fields.get(name) is None
        else _ids(name, fields[name], config.max_filter, "max_filter")
        for name in ("allow", "deny")
    )
    options = Options(mask_seen, None if allow is None else tuple(allow), tuple(deny or ()))
    if "users" in fields:
        users = _ids("users", fields["users"], config.max_users, "max_users")
        return ListRequest(users, {}, k, options)
    return ListRequest([], _histories(fields["histories"], config), k, options)


def _histories(value: Any, config: ServeConfig) -> dict[str, History]:
    if not isinstance(value, dict) or not value:
        raise RequestError(
            422, f"histories={_shown(value)}: give an object of name -> list of item ids"
        )
    _check_count("histories", len(value), config.max_users, "max_users")
    histories = {}
    for name, items in value.items():
        ids = _ids(f"the history of {_shown(name)}", items, config.max_items, "max_items")
        counts = Counter(ids)  # in the order of first occurrence
        histories[name] = History(list(counts), weights=list(counts.values()))
    return histories


def _ids(name: str, value: Any, most: int, limit: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise RequestError(422, f"{name}={_shown(value)}: give a list of at least one id")
    _check_count(name, len(value), most, limit)
    for entry in value:
        if not isinstance(entry, str | int) or isinstance(entry, bool):
            raise RequestError(422, f"{name} holds {_shown(entry)}; ids are texts")
    return [str(entry) for entry in value]


def _check_count(name: str, count: int, most: int, limit: str) -> None:
    if count > most:
        raise RequestError(
            413, f"{name}: {count} of them; this server takes at most {most} (--{limit})"
        )


def _shown(value: Any) -> str:
    """JSON of a value, the beginning where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
