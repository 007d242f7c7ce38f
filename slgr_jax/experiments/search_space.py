"""What `slgr tune` searches: knobs and the values each may take.

    lr=1e-3..1e-1:log      every number between two, on a logarithmic scale
    layers=1..4            every whole number between two, ends included
    dim=32|64|128          one of these

A config file has them in a table, as the same text, or as TOML writes such things:

    [search]
    lr = { low = 1e-3, high = 1e-1, log = true }
    layers = "1..4"
    dim = [32, 64, 128]
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax import config
from slgr_jax.config import config_file, knobs
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError

# The objective is compared between trials: what it means must not differ between them. And what
# only says how a run is carried out changes nothing that is worth searching.
_FIXED_SECTIONS = (config.EvaluationConfig, config.SliceConfig)
_FIXED = frozenset(
    {"seed", "restart", "refit", "track", "early_stop_metric", "checkpoint_every_s", "kernels"}
    | {"table_shards", "user_shards", "min_devices", "verify_checksums", "steps_per_dispatch"}
    | {flag_name(field) for section in _FIXED_SECTIONS for field in dataclasses.fields(section)}
)
# Share of a range, on its scale, that counts as its end.
_EDGE = 0.03


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where the knob is."""

    low: float
    high: float
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the knob takes whole numbers only."""
        return isinstance(self.low, int)

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "|".join(map(str, self.values))


SearchSpace = Mapping[str, Range | Choice]


def split_text(text: str) -> dict[str, str]:
    """`lr=1e-3..1e-1:log,dim=32|64` as name -> values, unread.

    Raises:
      ConfigError: a part that is not NAME=VALUES, or a name that comes twice.
    """
    parts: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, values = (side.strip() for side in part.partition("="))
        if not (name and equals and values):
            raise ConfigError(
                f"--search: {part!r} is not NAME=VALUES, e.g. lr=1e-3..1e-1:log or dim=32|64|128"
            )
        if name in parts:
            raise ConfigError(f"--search: {name} is given twice")
        parts[name] = values
    return parts


def make_space(search: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Range | Choice]:
    """The space that `search` describes, every value of it one that its knob can have.

    Args:
      search: knob -> text as on the command line, a list, {low, high, log}, `Range` or `Choice`.
      fixed: knobs that are given, of which none may be searched.

    Raises:
      ConfigError: an unknown knob, one that is given or cannot be searched, or values that it
        cannot have; each by its name.
    """
    if not search:
        raise ConfigError(
            "nothing to search: give --search=lr=1e-3..1e-1:log,dim=32|64|128, or a table [search] "
            "in --config"
        )
    fields: dict[str, dataclasses.Field[Any]] = {}
    hints: dict[str, Any] = {}
    for section in config.sections().values():
        types = typing.get_type_hints(section)
        fields |= {flag_name(field): field for field in dataclasses.fields(section)}
        hints |= {flag_name(field): types[field.name] for field in dataclasses.fields(section)}
    search = {"lambda" if name == "lambda_" else name: values for name, values in search.items()}
    config_file.refuse_unknown("--search", search, fields)

    space: dict[str, Range | Choice] = {}
    for name, values in search.items():
        if name in _FIXED:
            fix = "use --seeds=N for several" if name == "seed" else "it is the same in every trial"
            raise ConfigError(f"--search: {name} cannot be searched; {fix}")
        if name in fixed:
            raise ConfigError(f"--{name} is given and searched; drop one of the two")
        space[name] = _read(name, hints[name], values)
        ends = space[name]
        tried = ends.values if isinstance(ends, Choice) else (ends.low, ends.high)
        for value in tried:
            _check_value(fields[name], name, values, value)
    return space


def _check_value(field: dataclasses.Field[Any], name: str, values: Any, value: Any) -> None:
    try:
        knobs.check(field, value)
    except ConfigError as error:
        raise ConfigError(f"--search: {name}={_text(values)}: {error}") from error


def _read(name: str, hint: Any, values: Any) -> Range | Choice:
    """What a knob of type `hint` may be."""
    if isinstance(values, Range):
        values = dataclasses.asdict(values)
    elif isinstance(values, Choice):
        values = list(values.values)
    if isinstance(values, str):
        values = _parsed(name, hint, values)
    if isinstance(values, list | tuple):
        typed = tuple(config_file.typed("--search", name, hint, value) for value in values)
        if len(set(typed)) < max(len(typed), 2):
            raise ConfigError(
                f"--search: {name}={_text(values)} needs two values at least, each once"
            )
        return Choice(typed)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= set(_RANGE):
        raise ConfigError(
            f"--search: {name} = {_text(values)} is no range; give "
            f"{{ low = A, high = B, log = true }}, a list, or text such as {name}=A..B:log"
        )
    return _range(name, hint, **values)


_RANGE = ("low", "high", "log")


def _range(name: str, hint: Any, low: Any, high: Any, log: bool = False) -> Range:
    if hint not in (int, float):
        raise ConfigError(f"--search: {name} is no number; give choices, {name}=A|B")
    ends = [config_file.typed("--search", name, hint, end) for end in (low, high)]
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ConfigError(
            f"--search: {name}={low}..{high}: the first end must be below the second, both finite"
        )
    if log and ends[0] <= 0:
        raise ConfigError(
            f"--search: {name}={low}..{high}:log must begin above 0; begin at a small number, or "
            "drop :log"
        )
    return Range(ends[0], ends[1], bool(log))


def _parsed(name: str, hint: Any, text: str) -> Any:
    """The text of a range or of choices, as a file has them."""
    if ".." in text:
        ends, colon, scale = text.partition(":")
        low, _, high = ends.partition("..")
        if colon and scale.strip() != "log":
            raise ConfigError(f"--search: {name}={text}: {scale!r} is no scale; there is :log")
        return {
            "low": _value(name, hint, low),
            "high": _value(name, hint, high),
            "log": bool(colon),
        }
    return [_value(name, hint, part) for part in text.split("|")]


def _value(name: str, hint: Any, text: str) -> Any:
    """One value of a knob, from text."""
    text = text.strip()
    if hint is str:
        return text
    if typing.get_origin(hint) is tuple:
        raise ConfigError(
            f"--search: {name} holds lists; give them in a file, {name} = [[1, 2], [3]]"
        )
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise ConfigError(f"--search: {name}: {text!r} is not {wanted}") from None


def _text(values: Any) -> str:
    if isinstance(values, Mapping):
        return ", ".join(f"{key} {value}" for key, value in values.items())
    return "|".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def corners(space: SearchSpace) -> list[dict[str, Any]]:
    """Settings in which every end of every range and every choice occurs."""
    ends = {
        name: list(of.values) if isinstance(of, Choice) else [of.low, of.high]
        for name, of in space.items()
    }
    longest = max(map(len, ends.values()))
    return [
        {name: values[min(place, len(values) - 1)] for name, values in ends.items()}
        for place in range(longest)
    ]


def at_an_end(space: SearchSpace, chosen: Mapping[str, Any]) -> list[str]:
    """`lr 0.0991 is at the end of its range 0.001..0.1:log` for each such knob of `chosen`.

    Of choices only those of numbers have ends. An end that is the knob's own is none.
    """
    fields = {
        flag_name(field): field
        for section in config.sections().values()
        for field in dataclasses.fields(section)
    }
    ends = []
    for name, of in space.items():
        value, meta = chosen[name], knobs.knob_of(fields[name])
        if isinstance(of, Choice):
            numbers: Sequence[Any] = [v for v in of.values if type(v) in (int, float)]
            low, high = (min(numbers), max(numbers)) if numbers else (None, None)
            side = 0 if value == low else 1 if value == high else None
        else:
            low, high = of.low, of.high
            side = _side(of, value)
        own = (meta.minimum, meta.maximum)
        if side is not None and (low, high)[side] != own[side]:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            ends.append(f"{name} {shown} is at the end of its range {of}")
    return ends


def _side(of: Range, value: float) -> int | None:
    """0 or 1: the end of the range that a value is at; None in between."""
    if of.is_whole:
        return 0 if value == of.low else 1 if value == of.high else None
    low, high, at = (math.log(x) if of.log else x for x in (of.low, of.high, value))
    share = (at - low) / (high - low)
    return 0 if share < _EDGE else 1 if share > 1 - _EDGE else None
