"""What a knob is: a dataclass field with a default, a help text and a range; and knobs as JSON.

`config.py` declares the knobs, `flags.py` derives the command line from them. Neither JAX nor
pyarrow is imported here: it must load in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Collection
from typing import Any

from slgr_jax import json_files
from slgr_jax.errors import ConfigError, listing

# Upper bounds of knobs that have none of their own. What is past them fits no machine, and would
# end in an abort of the allocator or an overflow of an int32, with no word of which knob it was.
COUNT = 2_000_000_000  # of what is counted in an int32
BATCH = 10_000_000  # of what a step or a chunk of users holds at once
WIDTH = 16_384  # of a vector, a layer or a history
FLOAT = 3.4e38  # of what becomes a float32


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a field means to a user, and which values it takes."""

    help: str
    flag: str | None = None
    choices: Collection[str] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None


def knob(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default, a help text and a range.

    `minimum`/`maximum` are inclusive, `above`/`below` exclusive; `flag` is the name on the
    command line where it differs from the field's.
    """
    meta = Knob(help, flag, choices, minimum, above, maximum, below)
    return dataclasses.field(default=default, metadata={"knob": meta})


def knob_of(field: dataclasses.Field[Any]) -> Knob:
    """The `Knob` of a section's field."""
    meta = field.metadata["knob"]
    assert isinstance(meta, Knob)
    return meta


def flag_name(field: dataclasses.Field[Any]) -> str:
    """The command-line name of a section's field."""
    return knob_of(field).flag or field.name


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that a knob cannot have.

    Raises:
      ConfigError: it is no choice of the knob, or outside its range.
    """
    meta, name = knob_of(field), flag_name(field)
    if meta.choices is not None and value not in meta.choices:
        known = listing((choice for choice in meta.choices if choice), limit=len(meta.choices))
        raise ConfigError(f"--{name}={value!r} is not one of: {known}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, str | bool):
            continue
        if number != number or (math.isinf(number) and number != field.default):
            raise ConfigError(f"--{name}={number} is not a finite number")
        if meta.minimum is not None and number < meta.minimum:
            raise ConfigError(f"--{name}={number} is below its minimum {_text(meta.minimum)}")
        if meta.above is not None and number <= meta.above:
            raise ConfigError(f"--{name}={number} must be greater than {_text(meta.above)}")
        if meta.maximum is not None and number > meta.maximum:
            raise ConfigError(f"--{name}={number} is over its maximum {_text(meta.maximum)}")
        if meta.below is not None and number >= meta.below:
            raise ConfigError(f"--{name}={number} must be less than {_text(meta.below)}")


def _text(bound: float) -> str:
    """An end of a range, whole numbers in full."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of every section: checks each knob's range when it is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "knob" in field.metadata:
                check(field, getattr(self, field.name))


def to_json(config: Any) -> str:
    """A config as JSON text, one key a field and a checksum; `from_json` reads it back."""
    return (
        json.dumps(json_files.sealed(dataclasses.asdict(config)), indent=2, sort_keys=True) + "\n"
    )


def from_json(
    cls: type[Any], text: str, where: str, *, upgrade: Callable[[Any], None] | None = None
) -> Any:
    """Read back a `cls` that `to_json` wrote; `where` names it in errors.

    A knob that is not in the text has its default: the text is older than the knob. `upgrade`
    changes what an older text holds into what it would hold now.

    Raises:
      ConfigError: not JSON, an unknown key, a value of another type or outside its range.
    """
    try:
        values = json_files.loads(text)
        if isinstance(values, dict):
            values = json_files.unsealed(values)
    except ValueError as error:
        raise ConfigError(f"{where} is damaged: {error}") from error
    if upgrade is not None:
        upgrade(values)
    return _build(cls, values, where)


def _build(cls: type[Any], values: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {json.dumps(values)}; expected an object")
    unknown = sorted(set(values) - set(fields))
    if unknown:
        known = listing(fields, len(fields))
        raise ConfigError(f"{where}: unknown key {listing(unknown)}; known: {known}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {listing(missing)}")
    return cls(**{name: _value(hints[name], values[name], f"{where}: {name}") for name in values})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as JSON gives it, checked and made into what a field of type `hint` holds."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, list):
            return tuple(_value(inner, entry, where) for entry in value)
    elif type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    raise ConfigError(f"{where} is {json.dumps(value)}, of another type than the knob")
