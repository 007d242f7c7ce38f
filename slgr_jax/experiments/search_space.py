"""What `slgr tune` and `slgr compare` search: knobs and the values each may take.

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
import functools
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


def as_mapping(search: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A search space as `make_space` takes it, from text or a table."""
    return split_text(search) if isinstance(search, str) else search


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
    fields, hints = _fields(), dict[str, Any]()
    for section in config.sections().values():
        types = typing.get_type_hints(section)
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
        of = space[name] = _read(name, hints[name], values)
        for value in of.values if isinstance(of, Choice) else (of.low, of.high):
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


def values_of(run: config.RunConfig) -> dict[str, Any]:
    """Every knob of a run by its command-line name."""
    return {
        flag_name(field): getattr(getattr(run, section), field.name)
        for section, kind in config.sections().items()
        for field in dataclasses.fields(kind)
    }


def at_an_end(space: SearchSpace, chosen: Mapping[str, Any], *, edge: float = _EDGE) -> list[str]:
    """`lr 0.0991 is at the end of its range 0.001..0.1:log` for each such knob of `chosen`."""
    return [
        f"{name} {_shown(chosen[name])} is at the end of its range {space[name]}"
        for name, _ in ends(space, chosen, edge=edge)
    ]


def ends(
    space: SearchSpace, chosen: Mapping[str, Any], *, edge: float = _EDGE
) -> list[tuple[str, int]]:
    """(knob, 0 its low end or 1 its high end) for each knob of `chosen` that is at an end.

    Of choices only those of numbers have ends. An end that is the knob's own is none.

    Args:
      edge: share of a range, on its scale, that counts as its end.
    """
    at_ends = []
    for name, of in space.items():
        if name not in chosen:
            continue
        both = bounds(of)
        side = _side(of, both, chosen[name], edge)
        if side is not None and both[side] != _limits(name)[side]:
            at_ends.append((name, side))
    return at_ends


def wider(name: str, of: Range | Choice, side: int) -> tuple[Range | Choice, Any] | None:
    """The range a step further at one side, and a value in the middle of what is new.

    A step is a third of the range on its scale; of numbers to choose from the ratio of the last
    two. It ends where the knob ends; None where it ends there already.
    """
    low, high = bounds(of)
    limit = _limits(name)[side]
    if isinstance(of, Choice):
        values = sorted(of.values)
        last, before = (values[-1], values[-2]) if side else (values[0], values[1])
        new = type(last)(last * last / before) if before else last
        if new in of.values or (limit is not None and (new > limit if side else new < limit)):
            return None
        return Choice((*of.values, new) if side else (new, *of.values)), new

    at, step = (high, 1) if side else (low, -1)
    share = (high / low) ** (1 / 3) if of.log else (high - low) / 3
    end = at * share**step if of.log else at + step * share
    middle = at * share ** (step / 2) if of.log else at + step * share / 2
    if limit is not None and (end - limit) * step >= 0:
        end, middle = limit, (at + limit) / 2
        if _is_open(name, side):  # the limit itself is no value
            end = middle
    if of.is_whole:
        end, middle = round(end), round(middle) if round(middle) != at else round(end)
    else:
        end, middle = float(f"{end:.4g}"), float(f"{middle:.4g}")
    if end == at:
        return None
    return Range(*((low, end) if side else (end, high)), of.log), middle


@functools.cache
def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {
        flag_name(field): field
        for section in config.sections().values()
        for field in dataclasses.fields(section)
    }


def _limits(name: str) -> tuple[float | None, float | None]:
    """The least and the greatest value of a knob; None where there is none."""
    if name not in _fields():
        return None, None
    meta = knobs.knob_of(_fields()[name])
    return (
        meta.above if meta.minimum is None else meta.minimum,
        meta.below if meta.maximum is None else meta.maximum,
    )


def _is_open(name: str, side: int) -> bool:
    """Whether a knob's limit is not among its values."""
    meta = knobs.knob_of(_fields()[name])
    return (meta.maximum if side else meta.minimum) is None


def bounds(of: Range | Choice) -> tuple[Any, Any]:
    """The ends of a range, or of the numbers to choose from; None where these are none."""
    if isinstance(of, Range):
        return of.low, of.high
    numbers: Sequence[Any] = [value for value in of.values if type(value) in (int, float)]
    return (min(numbers), max(numbers)) if numbers else (None, None)


def _side(of: Range | Choice, both: tuple[Any, Any], value: Any, edge: float) -> int | None:
    """0 or 1: the end of the range that a value is at; None in between."""
    low, high = both
    if isinstance(of, Choice) or of.is_whole:
        return None if low is None else 0 if value == low else 1 if value == high else None
    low, high, at = (math.log(x) if of.log else x for x in (low, high, value))
    share = (at - low) / (high - low)
    return 0 if share < edge else 1 if share > 1 - edge else None


def _shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
